"""One row per cotangent above the last attention, against the pullback over all positions."""

from dataclasses import replace

import pytest
import torch
import zoo

import lddyn
from lddyn.engine import rowwise
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import Factors, Shelf, merge, over_rows, pair, summed
from lddyn.engine.gram import Side, token_gram
from lddyn.engine.guard import true_float64
from lddyn.engine.pullback import Pullback
from lddyn.engine.rowwise import ROWWISE

torch.set_num_threads(1)

# Whether the last block takes the row path. The others route their tokens to experts (mixtral, …),
# or have an attention of their own (falcon, stablelm, bloom).
BLOCKS = dict.fromkeys(zoo.ARCHITECTURES, True)
BLOCKS |= dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), False)
BLOCKS |= dict.fromkeys(("falcon", "stablelm", "bloom"), False)

# Tokens 3, 4, 7, 8 and 10 of eleven are cotangents' own.
GAPS = lddyn.Example(
    prompt_ids=[5, 9, 33, 7],
    response_ids=[21, 9, 40, 7, 62, 2, 8, 11],
    response_mask=[True, True, False, False, True, True, False, True],
)


def pulled(trace, cotangents, chunk=16, rows=None, dense=False):
    """[(rows, state, factors)] of the tail and the last block, chunk by chunk."""
    anatomy = trace.anatomy
    ROWWISE.verdicts(anatomy).clear()
    for segment in anatomy.segments[-2:] if dense else ():
        ROWWISE.settle(anatomy, segment, False, "to compare with")
    last = len(anatomy.blocks)
    with anatomy.analysis():
        down = Pullback(trace, cotangents, rows, chunk)
        found = []
        for segment in (last + 1, last):
            parts = list(down.step(segment))
            states = [x.state for x in down.chunks]
            found += [(r, s, f) for (r, f), s in zip(parts, states, strict=True)]
    return found


def whole(state, trace, rows, length):
    """States as those over all positions of the prefix."""
    if state.dim() > 2:
        return state
    out = state.new_zeros(len(state), 1, length, state.shape[-1])
    out[torch.arange(len(state)), 0, trace.positions[rows]] = state
    return out


def gradients(factors):
    """Every parameter's gradient (c, …), out of its factors."""
    found = {}

    def add(name, gradient):
        found[name] = found.get(name, 0) + gradient

    for tap, delta in factors.taps:
        if tap.weight is not None and tap.kind != "embedding":
            add(tap.weight, torch.einsum("cto,ti->coi", over_rows(delta), tap.activations))
        if tap.bias is not None:
            add(tap.bias, summed(delta))
    for name, gradient in factors.direct.items():
        add(name, gradient)
    return found


def assert_same_pull(trace, limit, **options):
    cotangents = torch.randn_like(trace.logits)
    short = pulled(trace, cotangents, **options)
    took = {s: ROWWISE.verdict(trace.anatomy, s) for s in trace.anatomy.segments}
    long = pulled(trace, cotangents, dense=True, **options)
    for (rows, state, one), (same, expected, other) in zip(short, long, strict=True):
        assert torch.equal(rows, same)
        length = expected.shape[2]
        pairs = {"state": (whole(state, trace, rows, length), expected)}
        left, right = gradients(one), gradients(other)
        assert left.keys() == right.keys()
        pairs |= {name: (left[name], right[name]) for name in left}
        largest = max(float(y.abs().max()) for _, y in pairs.values())
        for name, (x, y) in pairs.items():  # a key's bias has no gradient but for rounding
            scale = max(float(y.abs().max()), 1e-3 * largest)
            assert float((x - y).abs().max()) <= limit * scale, name
    return [took[s] for s in trace.anatomy.segments[-2:]], short


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_rows_are_the_pullback_over_all_positions(name):
    """State and gradients in float64; a chunk of 4 or 2 is as many rows as there are heads."""
    with true_float64():
        trace = Anatomy(zoo.double(zoo.build(name))).trace(GAPS)
        for chunk in (16, 4, 2, 1):
            took, short = assert_same_pull(trace, 1e-12, chunk=chunk)
            assert took == [BLOCKS[name], True]
            tail = short[: len(short) // 2]
            assert all(state.dim() == 2 for _, state, _ in tail)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3", "gpt_neox", "phi3"])
def test_rows_in_float32(name):
    took, _ = assert_same_pull(Anatomy(zoo.build(name)).trace(GAPS), 2e-5, chunk=4)
    assert took == [True, True]


@pytest.mark.parametrize("select", [[0], [4, 1], [2, 2, 0]])
def test_selected_rows(select):
    trace = Anatomy(zoo.build("qwen3")).trace(GAPS)
    assert_same_pull(trace, 2e-5, rows=torch.tensor(select))


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "olmo2"])
def test_every_position_of_the_prefix_is_a_row(name):
    """No axis shrinks, so that tokens and heads cannot be told apart: right, if not by rows."""
    every = lddyn.Example(prompt_ids=[5], response_ids=[21, 9, 40, 7])
    trace = Anatomy(zoo.build(name)).trace(every)
    assert len(trace.positions) == int(trace.positions.max()) + 1 == 4
    assert_same_pull(trace, 2e-5)
    truth, scale = zoo.oracle_gram(trace.anatomy.model, every, every)
    side = Side.log_probs(trace)
    assert zoo.normalised_error(token_gram([side], [side]), truth, scale) <= 5e-6


@pytest.mark.parametrize("targets", ["attention", "mlp", "all-linear"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3"])
def test_adapters(name, targets):
    wanted = {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value"},
        "mlp": {"up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"},
    }
    modules = {n.rsplit(".", 1)[-1] for n, _ in zoo.build(name).named_modules()}
    chosen = targets if targets == "all-linear" else sorted(wanted[targets] & modules)
    trace = Anatomy(zoo.lora(name, target_modules=chosen)).trace(GAPS)
    took, short = assert_same_pull(trace, 2e-5, chunk=4)
    assert took[0]
    ranks = {delta.dim() for _, _, factors in short[-2:] for _, delta in factors.taps}
    assert ranks == {"attention": {2, 3}, "mlp": {2}, "all-linear": {2, 3}}[targets]


@pytest.mark.parametrize("frozen", ["norm", "bias", "proj", "layers.1"])
def test_frozen_subsets(frozen):
    model = zoo.build("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert assert_same_pull(Anatomy(model).trace(GAPS), 2e-5, chunk=4)[0] == [True, True]


def test_eager_attention_is_not_cut_to_rows():
    took, _ = assert_same_pull(Anatomy(zoo.build("llama"), "eager").trace(GAPS), 2e-5)
    assert took == [False, True]


def test_what_a_block_does_between_positions_is_noticed():
    """A block that adds a running mean does not act row by row: its forward's rows differ."""
    model = zoo.build("llama")
    mlp = model.model.layers[1].mlp
    original = mlp.forward

    def running(x):
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return original(x) + x.cumsum(1) / count

    mlp.forward = running
    took, _ = assert_same_pull(Anatomy(model).trace(GAPS), 2e-5, chunk=2)
    assert took == [False, True]


def test_a_direct_parameter_that_is_no_gain_is_not_cut_to_rows():
    model = zoo.build("llama")
    mlp = model.model.layers[1].mlp
    mlp.scale = torch.nn.Parameter(torch.randn(40))
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.scale)
    took, short = assert_same_pull(Anatomy(model).trace(GAPS), 2e-5)
    assert took == [False, True]
    assert "model.layers.1.mlp.scale" in gradients(short[-1][2])


def test_spread_is_the_share_of_the_last_block_that_is_not_one_row():
    """Only the keys' and values' projections see all positions: 32 of llama's 212 columns."""
    trace = Anatomy(zoo.build("llama")).trace(GAPS)
    share = rowwise.spread(trace)
    pushed = 2 * 16
    columns = 32 + pushed + 32 + 40 + 40 + 32  # q, k and v, o, gate, up, down
    flops = 32 * (columns - 32) + 40 * 32
    assert share.width == pytest.approx(pushed / columns)
    assert share.flops == pytest.approx(32 * pushed / flops)
    routed = rowwise.spread(Anatomy(zoo.build("mixtral")).trace(GAPS))
    assert (routed.flops, routed.width) == (1.0, 1.0)


# --------------------------------------------------------------------------- factors


def test_merged_chunks_pair_as_they_did():
    """Rank-one taps, padded prefixes, gains and biases: joined, the Gram is the same."""
    trace = Anatomy(zoo.build("qwen2")).trace(GAPS)
    cotangents = torch.randn_like(trace.logits)
    for segment in (slice(0, 3), slice(3, 6)):  # the tail's chunks, the last block's
        chunks = [(r, f) for r, _, f in pulled(trace, cotangents, chunk=2)[segment]]
        expected = gram(chunks, chunks)
        copies = [(rows, replace(f, taps=list(f.taps))) for rows, f in chunks]  # will be emptied
        merged = merge(copies, 5, chunks[-1][1].tokens, Shelf())
        assert len(merged) == 1 and [p.stop for p in merged[0].parts] == [2, 4, 5]
        rows, factors = merged[0].rows, merged[0].factors
        parts = [(rows[p], factors.part(p)) for p in merged[0].parts]
        joined = [(rows, factors)]
        for one, other in ((chunks, joined), (joined, chunks), (joined, joined), (parts, joined)):
            torch.testing.assert_close(gram(one, other), expected, rtol=1e-5, atol=1e-4)


def test_chunks_that_do_not_fit_together_stay_apart():
    """Routed tokens have no order to merge by; a shelf lends its buffers again when it turns."""
    trace = Anatomy(zoo.build("mixtral")).trace(GAPS)
    chunks = [(r, f) for r, _, f in pulled(trace, torch.randn_like(trace.logits), chunk=2)[3:6]]
    expected = gram(chunks, chunks)
    merged = merge(list(chunks), 5, 12, Shelf())
    assert len(merged) == 3
    apart = [(m.rows, m.factors) for m in merged]
    torch.testing.assert_close(gram(apart, apart), expected, rtol=1e-5, atol=1e-4)

    shelf, like = Shelf(), torch.zeros(1)
    first = shelf.take(like, 2, 3)
    assert shelf.take(like, 2, 3).data_ptr() != first.data_ptr()
    shelf.turn()
    assert shelf.take(like, 3, 2).data_ptr() == first.data_ptr()
    shelf.turn()
    shelf.turn()
    assert not shelf.free and shelf.take(like.double(), 6).dtype == torch.float64


def gram(observed, updated):
    total = torch.zeros(5, 5)
    for rows_o, one in observed:
        for rows_u, other in updated:
            at = rows_o[:, None], rows_u[None]
            pair(one, other, lambda _, x, at=at: total.index_put_(at, x, accumulate=True))
    return total


def test_spread_and_summed_of_rank_one():
    delta = torch.randn(3, 4)
    over = over_rows(delta)
    assert over.shape == (3, 3, 4)
    for m in range(3):
        expected = torch.zeros(3, 4)
        expected[m] = delta[m]
        assert torch.equal(over[m], expected)
    assert torch.equal(summed(over), summed(delta))
    assert len(Factors()) == 0
