"""The planner's FLOPs against those that are counted."""

import dataclasses
import json
import sys

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import Side, token_gram
from lddyn.sketches.costs import Cost, Load, gram_cost
from lddyn.sketches.plan import choose

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
    token_gram(observed[:1], observed[:1])  # the model is held to a plain backward pass once
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
    state = torch.get_rng_state()
    gram_cost([side], [side])
    lddyn.plan(model, examples(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    assert not any("forward" in m.__dict__ for m in model.modules())


def examples(count, tokens=6, start=0):
    random = torch.Generator().manual_seed(start)
    made = [torch.randint(3, 89, (tokens + 4,), generator=random).tolist() for _ in range(count)]
    return [lddyn.Example(ids[:4], ids[4:]) for ids in made]


def test_the_plan_is_run():
    anatomy, some = Anatomy(zoo.build("llama")), examples(3)
    one = lddyn.plan(anatomy, some)
    assert one.chosen.method == "paired" and one.shape == (18, 18)
    exact = one.run()
    truth = lddyn.ntk(anatomy.model, some[0], some[2]).gram()
    torch.testing.assert_close(exact.value[:6, 12:], truth, rtol=1e-4, atol=1e-5)
    assert not exact.stderr.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_pushing_either_side_gives_the_same_table(transposed):
    """A single token on one side: one push through the other sequences."""
    anatomy = Anatomy(zoo.build("llama"))
    many, one = examples(2, tokens=20), [lddyn.Example([5], [6])]
    way = lddyn.plan(anatomy, *((one, many) if transposed else (many, one)))
    pushed = next(c for c in way.candidates if c.method == "pushed")
    assert pushed.transposed is transposed
    forced = dataclasses.replace(way, chosen=pushed).run().value
    paired = next(c for c in way.candidates if c.method == "paired")
    table = dataclasses.replace(way, chosen=paired).run().value
    torch.testing.assert_close(forced, table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "by"), [("twosided", "token"), ("lowrank", "token"), ("twosided", "sequence")]
)
def test_the_expected_error_of_a_sketch_is_the_measured_one(kind, by):
    """Within 1.5, as the root mean square over 12 seeds, of another set of sequences than seen."""
    anatomy, some = Anatomy(zoo.build("llama")), examples(4)
    exact = lddyn.plan(anatomy, some, by=by).run().value.double()
    way = lddyn.plan(anatomy, some, by=by, rtol=0.2, sketch=lddyn.Sketch(kind))
    found = next(c for c in way.candidates if c.method == "features")
    assert 0 < found.error <= 0.2 and found.fits
    squares = []
    for seed in range(12):
        sketch = dataclasses.replace(found.layout.sketch, seed=100 + seed)
        layout = dataclasses.replace(found.layout, sketch=sketch)
        table = lddyn.features(anatomy, some, by=by, layout=layout).gram().value.double()
        squares.append(((table - exact).norm() / exact.norm()) ** 2)
    measured = float(torch.stack(squares).mean().sqrt())
    assert 1 / 1.5 < measured / found.error < 1.5


def test_a_pair_that_drowns_in_noise_is_planned():
    """Of one token with another the first sketch sees nothing: its error is not known."""
    anatomy = Anatomy(zoo.build("llama"))
    for token in (5, 7, 9, 10):
        pair = [lddyn.Example([token], [6])], [lddyn.Example([token + 2, 2], [8, 9])]
        for rtol in (0.1, 10.0):
            way = lddyn.plan(anatomy, *pair, rtol=rtol, sketch=lddyn.Sketch(k=300))
            assert way.chosen is not None
            json.dumps(way.to_dict(), allow_nan=False)


def test_whole_sequences_are_planned():
    """Every exact way gives the same table; a store of sequences is asked for as one."""
    anatomy, some = Anatomy(zoo.build("llama")), examples(4)
    way = lddyn.plan(anatomy, some, some[1:], by="sequence")
    assert way.shape == (4, 3) and way.chosen.method == "gradients"
    truth = lddyn.ntk(anatomy.model, some[0], some[2]).gram().sum()
    ways = [c for c in way.candidates if c.error == 0]
    assert {c.method for c in ways} == {"gradients", "paired", "pushed"}
    for candidate in ways:
        table = dataclasses.replace(way, chosen=candidate).run()
        assert table.value[0, 1] == pytest.approx(float(truth), rel=1e-4, abs=1e-4)
        assert table.value.shape == (4, 3) and not table.stderr.any()
    assert "4 x 3 sequence pairs" in way.explain() and way.to_dict()["by"] == "sequence"
    stored = next(c for c in way.candidates if c.method == "store")
    with pytest.raises(RuntimeError, match="--by sequence, and search it"):
        dataclasses.replace(way, chosen=stored).run()


def test_sketches_of_sequences_run_in_the_memory_they_were_planned_for():
    anatomy, some = Anatomy(zoo.build("llama")), examples(20, tokens=30)
    way = lddyn.plan(anatomy, some, by="sequence", rtol=0.4, memory="1GiB")
    sketched = next(c for c in way.candidates if c.method == "features")
    table = dataclasses.replace(way, chosen=sketched, memory=sketched.memory).run()
    feats = lddyn.features(anatomy, some, by="sequence", layout=sketched.layout)
    torch.testing.assert_close(table.value, feats.gram().value, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="memory must be at least"):
        dataclasses.replace(way, chosen=sketched, memory=sketched.memory // 4).run()


def test_packed_experts_have_no_gradients_as_they_are():
    way = lddyn.plan(zoo.build("gpt_oss"), examples(2), by="sequence")
    assert way.chosen.method in ("paired", "pushed")


def test_a_near_tie_goes_to_what_is_exact():
    """Of two short sequences a sketch saves little; of many it saves most."""
    anatomy = Anatomy(zoo.build("llama"))
    for count, rtol in ((1, 0.5), (2, 0.5), (12, 0.5)):
        way = lddyn.plan(anatomy, examples(count), rtol=rtol)
        good = [c for c in way.candidates if c.fits and c.error <= rtol]
        least = min(c.flops for c in good)
        near = [c for c in good if c.error == 0 and c.flops <= 1.1 * least]
        assert (way.chosen.error == 0) is bool(near)
    cheap, exact = (
        dataclasses.replace(way.chosen, error=e, flops=f) for e, f in ((0.1, 1.0), (0.0, 1.09))
    )
    assert choose([cheap, exact], 0.5) is exact and choose([cheap, exact], None) is exact
    dear = dataclasses.replace(exact, flops=1.11)
    assert choose([cheap, dear], 0.5) is cheap and choose([cheap], 0.05) is None


def test_memory_decides():
    """The table and the forward passes do not fit: sketches, on disk if they must."""
    anatomy, some = Anatomy(zoo.build("llama")), examples(24, tokens=40)
    assert lddyn.plan(anatomy, some, rtol=0.5).chosen.fits
    tight = lddyn.plan(anatomy, some, rtol=0.5, memory="5MiB")
    assert tight.chosen.method == "store" and tight.chosen.disk > 0
    with pytest.raises(RuntimeError, match="lddyn features build --kind"):
        tight.run()
    low = lddyn.plan(anatomy, some, memory="5MiB", sketch=lddyn.Sketch("lowrank", rank=3))
    stored = next(c for c in low.candidates if c.method == "store")
    with pytest.raises(RuntimeError, match=r"--kind lowrank .* --rank 3,"):
        dataclasses.replace(low, chosen=stored).run()
    nothing = lddyn.plan(anatomy, some, memory="5MiB")
    assert nothing.chosen is None and "raise memory or rtol" in nothing.explain()
    with pytest.raises(RuntimeError, match="no way"):
        nothing.run()


@pytest.mark.parametrize("memory", [1, "300KiB"])
@pytest.mark.parametrize("rtol", [None, 0.3])
def test_memory_in_which_no_sketch_fits_is_planned_for(memory, rtol):
    way = lddyn.plan(Anatomy(zoo.build("llama")), examples(10), rtol=rtol, memory=memory)
    if memory == 1:
        assert way.chosen is None and "nothing fits" in way.explain()
    else:
        assert way.chosen.fits and way.chosen.memory <= way.memory


@pytest.mark.parametrize("kind", ["twosided", "sjlt"])
@pytest.mark.parametrize("sides", ["same", "repeated", "shared"])
def test_sketches_run_in_the_memory_they_were_planned_for(kind, sides):
    """Gradients that are formed count; a sequence that is listed again is not sketched again."""
    anatomy, some = Anatomy(zoo.build("llama")), examples(4)
    pair = {
        "same": (some, None),
        "repeated": (some[:2] * 9, some[1:2] * 9),
        "shared": (some[:3], some[1:]),
    }[sides]
    way = lddyn.plan(anatomy, *pair, rtol=0.4, sketch=lddyn.Sketch(kind))
    chosen = next(c for c in way.candidates if c.method == "features")
    found = dataclasses.replace(way, chosen=chosen, memory=chosen.memory).run()
    one, other = (lddyn.features(anatomy, side or some, layout=chosen.layout) for side in pair)
    torch.testing.assert_close(found.value, one.gram(other).value, rtol=1e-4, atol=1e-4)


def test_a_small_workspace_pulls_the_observed_side_again():
    anatomy, some = Anatomy(zoo.build("llama")), examples(10, tokens=40)
    ample = lddyn.plan(anatomy, some).candidates
    kept = next(c for c in ample if c.method == "paired")
    tight = lddyn.plan(anatomy, some, memory=kept.memory - kept.memory // 4).candidates
    again = next(c for c in tight if c.method == "paired")
    assert again.flops > 1.05 * kept.flops and "times" in again.why


def test_weights_shared_between_blocks_are_pushed():
    model = zoo.build("llama")
    first, second = model.model.layers[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    way = lddyn.plan(model, examples(2))
    paired = next(c for c in way.candidates if c.method == "paired")
    assert not paired.fits and "used by several blocks" in paired.why
    assert way.chosen.method == "pushed" and way.run().value.shape == (12, 12)


def test_what_cannot_be_planned_says_so():
    anatomy = Anatomy(zoo.build("llama"))
    with pytest.raises(ValueError, match="by must be 'token' or 'sequence', got 'row'"):
        lddyn.plan(anatomy, examples(1), by="row")
    with pytest.raises(ValueError, match="updated must hold"):
        lddyn.plan(anatomy, examples(1), [])
    for rtol in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"rtol must be positive and finite, got {rtol}"):
            lddyn.plan(anatomy, examples(1), rtol=rtol)


def test_the_plan_is_told_as_text_and_json():
    way = lddyn.plan(Anatomy(zoo.build("llama")), examples(2), rtol=0.3)
    text, document = way.explain(), json.loads(json.dumps(way.to_dict()))
    assert "12 x 12 token pairs of 2 and 2 sequences, within 30 %" in text
    assert sum(row["chosen"] for row in document["candidates"]) == 1
    for row in document["candidates"]:
        assert row["method"] in text and row["flops"] > 0
    assert str(way) == text and len(repr(way).splitlines()) == 1 and "tensor" not in repr(way)
    summary = json.loads(json.dumps(way.summary(), allow_nan=False))
    assert summary["method"] == way.chosen.method and summary["flops"] == way.chosen.flops


def test_chunks_are_those_of_the_engine_where_the_last_tokens_do_not_count(monkeypatch):
    """Cotangents do not reach the whole sequence, and more of them go together."""
    anatomy = Anatomy(zoo.build("llama", max_position_embeddings=512))
    example = lddyn.Example([5], [6] * 400, [i < 64 for i in range(400)])
    side, taken = Side.log_probs(anatomy.trace(example)), []
    module = sys.modules["lddyn.sketches.costs"]
    real = module.chunk_size
    monkeypatch.setattr(module, "chunk_size", lambda *a: taken.append(real(*a)) or taken[-1])
    Load.of(side).pulled(1 << 34)
    assert taken == [side.chunk(1 << 34)] == [32]
