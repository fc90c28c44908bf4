"""The planner's FLOPs against those that are counted."""

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import lddyn
from lddyn.anatomy import Anatomy
from lddyn.ntk import Side, token_gram
from lddyn.plan import Cost, gram_cost

torch.set_num_threads(1)


def sides(vocabulary=199, chosen=16, tokens=64, count=2, **changes):
    """Sequences of `tokens` with as many cotangents as `chosen`, at the end, on a wider llama."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    sizes |= {"vocab_size": vocabulary, "max_position_embeddings": 256}
    anatomy = Anatomy(zoo.build("llama", **{**sizes, **changes}))
    found = []
    for _ in range(count):
        ids = torch.randint(3, 89, (tokens,)).tolist()
        example = lddyn.Example(ids[: tokens - chosen], ids[tokens - chosen :])
        found.append(Side.log_probs(anatomy.trace(example)))
    return found


class Counter(TorchDispatchMode):
    """FLOPs of every matrix product that torch runs, those inside of our ops included."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "lddyn":
            with self:
                return lddyn.ops.OPS[func.name().split("::")[1]].implementations["reference"](*args)
        if func.name() == "aten::matmul":
            with self:
                return func.decompose(*args)
        out = func(*args, **kwargs)
        packet = torch.ops.aten.addmm if func.name() == "aten::addmm_" else func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def counted(observed, updated):
    with lddyn.backend("reference"), Counter() as counter:
        token_gram(observed, updated)
    return counter.flops


@pytest.mark.parametrize(
    "changes",
    [{}, {"chosen": 40}, {"vocabulary": 2000}, {"num_hidden_layers": 2}, {"tokens": 128}],
    ids=str,
)
def test_gram_cost_is_what_is_counted(changes):
    """Within 10 %: products only, and of these not the similarities S of the pairing.

    Elementwise work (norms, activations, softmax, rotary) is counted on neither side.
    """
    observed, updated = sides(**changes)
    cost = gram_cost([observed], [updated])
    assert counted([observed], [updated]) == pytest.approx(cost.flops, rel=0.1)


def test_one_side_for_both_is_pulled_once():
    (side,) = sides(count=1)
    cost = gram_cost([side], [side])
    assert counted([side], [side]) == pytest.approx(cost.flops, rel=0.1)
    one, other = sides()
    both = gram_cost([one], [other])
    assert cost.pullback == pytest.approx(both.pullback / 2)
    assert cost.replay == pytest.approx(both.replay / 2)


def test_a_block_without_the_row_path_costs_more():
    eager = Anatomy(zoo.build("llama"), "eager").trace(zoo.examples()[0])
    rows = Anatomy(zoo.build("llama")).trace(zoo.examples()[0])
    dense, short = (gram_cost([s], [s]) for s in map(Side.log_probs, (eager, rows)))
    assert dense.pullback > 1.2 * short.pullback
    assert dense.head == short.head


def test_cost_explains_itself():
    cost = Cost(1e9, 2e9, 3e9, 4e9)
    assert cost.flops == 1e10
    assert cost.explain() == "10 GFLOP (replay 1, pullback 2, pairing 3, head 4)"


def test_the_plan_leaves_the_model_as_it_was():
    (side,) = sides(count=1)
    model = side.trace.anatomy.model
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    gram_cost([side], [side])
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    assert not any("forward" in m.__dict__ for m in model.modules())
