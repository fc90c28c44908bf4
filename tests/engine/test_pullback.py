"""Pulling cotangents back and pushing tangents forward: one is the transpose of the other."""

import pytest
import torch
import zoo

import lddyn
from lddyn.engine import head
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import Factors, pair
from lddyn.engine.gradient import gradient
from lddyn.engine.gram import Side
from lddyn.engine.pullback import Pullback, reach, segments_down
from lddyn.engine.pushforward import (
    AlongDirection,
    AlongFactors,
    Pushforward,
    batched_shifts,
    delta_log_probs,
    log_prob_shift,
    log_prob_shifts,
    pair_direction,
    realised_shift,
)
from lddyn.memory import is_out_of_memory, parse_memory

torch.set_num_threads(1)

NAMES = ["gpt2", "llama", "gemma2", "opt", "falcon", "mixtral", "gpt_oss"]


def random_direction(anatomy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in anatomy.trainable.items()}


def pulled(trace, rows, **options):
    """Every segment's (rows, factors) of a pullback, the head's first."""
    with trace.anatomy.analysis():
        pull = Pullback(trace, rows, **options)
        parts = [(pull.selected, pull.head_factors())]
        for segment in segments_down(trace.anatomy):
            parts += list(pull.step(segment))
    return parts


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", NAMES)
def test_push_is_the_transpose_of_pull(name, tied):
    """⟨v, J Δθ⟩ = ⟨Jᵀ v, Δθ⟩ for random cotangents and directions."""
    model = zoo.build(name, tie_word_embeddings=tied)
    anatomy = Anatomy(model)
    trace = anatomy.trace(zoo.examples()[0])
    rows = torch.randn(trace.logits.shape)
    source = AlongDirection(random_direction(anatomy))
    with anatomy.analysis():
        moved = Pushforward(trace).logits(source)[0]
    found = torch.zeros(len(rows))

    for at, factors in pulled(trace, rows):
        pair_direction(factors, source, lambda _, v, at=at: found.index_add_(0, at, v))
    expected = (rows * moved).sum(1)
    scale = rows.norm(dim=1) * moved.norm(dim=1)
    assert float(((found - expected).abs() / scale).max()) <= 2e-6


@pytest.mark.parametrize("name", [*NAMES, "granite", "cohere"])
def test_push_is_the_finite_difference(name):
    model = zoo.build(name)
    anatomy = Anatomy(model)
    observed, _ = zoo.examples()
    trace = anatomy.trace(observed)
    direction = random_direction(anatomy, 1)
    with anatomy.analysis():
        moved = Pushforward(trace).logits(AlongDirection(direction))[0]
    flat = torch.cat([d.flatten() for d in direction.values()]).double()
    truth = zoo.oracle_shift(model, observed, flat)
    found = delta_log_probs(moved, trace.logits)
    assert float((found - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_factors_push_their_own_gradient(name):
    """Pushing factors equals pushing the gradient that they stand for."""
    model = zoo.build(name, tie_word_embeddings=True)
    anatomy = Anatomy(model)
    observed, updated = zoo.examples()
    trace, other = anatomy.trace(observed), anatomy.trace(updated)
    side = Side.log_probs(other)
    index = torch.tensor([2])
    parts = [f for _, f in pulled(other, side.rows, select=index)]
    with anatomy.analysis():
        push = Pushforward(trace)
        by_factors = push.logits(AlongFactors(parts))[0]
        weight = torch.zeros(len(updated))
        weight[2] = 1.0
    dense = gradient(anatomy, [updated], [weight])
    with anatomy.analysis():
        by_direction = push.logits(AlongDirection(dense))[0]
    assert float((by_factors - by_direction).abs().max()) <= 3e-6 * float(by_direction.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_precondition_multiplies_the_gradient(name):
    model = zoo.build(name, tie_word_embeddings=True)
    anatomy = Anatomy(model)
    observed, updated = zoo.examples()
    trace, other = anatomy.trace(observed), anatomy.trace(updated)
    precondition = {n: d.abs() for n, d in random_direction(anatomy, 2).items()}
    parts = [f for _, f in pulled(other, Side.log_probs(other).rows, select=torch.tensor([1]))]
    with anatomy.analysis():
        push = Pushforward(trace)
        by_factors = push.logits(AlongFactors(parts, precondition))[0]
    weight = torch.zeros(len(updated))
    weight[1] = 1.0
    dense = gradient(anatomy, [updated], [weight])
    with anatomy.analysis():
        by_direction = push.logits(
            AlongDirection({n: precondition[n] * g for n, g in dense.items()})
        )[0]
    assert float((by_factors - by_direction).abs().max()) <= 3e-6 * float(by_direction.abs().max())


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_chunks_are_prefixes_in_order(chunk):
    model = zoo.build("llama")
    trace = Anatomy(model).trace(zoo.examples()[0])
    rows = Side.log_probs(trace).rows
    parts = pulled(trace, rows, chunk=chunk)
    assert parts[0][0].tolist() == list(range(6))
    blocks = parts[1:]
    assert len(blocks) == 4 * -(-6 // chunk)
    for at, factors in blocks:
        longest = reach(int(trace.positions[at].max()), trace.length)
        for tap, delta in factors.taps:
            if delta.dim() == 2:  # above the last attention: rows
                assert delta.shape == (len(at), tap.width)
                continue
            assert delta.shape == (len(at), longest, tap.width)
            for row, position in zip(delta, trace.positions[at], strict=True):
                assert not row[int(position) + 1 :].any()  # causality


def test_linearity_of_pull():
    model = zoo.build("qwen3")
    trace = Anatomy(model).trace(zoo.examples()[0])
    one, other = torch.randn(2, *trace.logits.shape)
    results = [pulled(trace, rows) for rows in (one, other, 2 * one - 3 * other)]
    for (_, a), (_, b), (_, c) in zip(*results, strict=True):
        for (_, x), (_, y), (_, z) in zip(a.taps, b.taps, c.taps, strict=True):
            assert torch.allclose(2 * x - 3 * y, z, atol=1e-5 * float(z.abs().max()) + 1e-12)


def test_pullback_stops_at_the_lowest_trainable_segment():
    model = zoo.build("llama")
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    anatomy = Anatomy(model)
    anatomy.trace(zoo.examples()[0])
    assert [anatomy.segments[s] for s in segments_down(anatomy)] == ["tail", "block 1"]


def test_gradient_weights_each_token():
    model = zoo.build("gpt2").eval()
    anatomy = Anatomy(model)
    examples = zoo.examples()
    weights = [torch.randn(len(e)) for e in examples]
    total = gradient(anatomy, examples, weights)
    loss = sum(
        (zoo.token_log_probs(model, e) * w).sum() for e, w in zip(examples, weights, strict=True)
    )
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for (name, value), g in zip(total.items(), expected, strict=True):
        assert torch.allclose(value, g, atol=1e-5 * float(g.abs().max()) + 1e-9), name


def test_pairing_nothing():
    parts = []
    pair(Factors(), Factors(), lambda name, block: parts.append(name))
    assert not parts and len(Factors()) == 0


def test_wrong_shape_of_cotangents():
    trace = Anatomy(zoo.build("llama")).trace(zoo.examples()[0])
    with pytest.raises(ValueError, match=r"= \(6, 89\), got \(5, 89\)"):
        Pullback(trace, torch.zeros(5, 89))


def test_delta_log_probs_conserves_probability():
    """Σ_v π_v Δ log π_v = 0, shifts cancel, and tokens near one keep their digits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 50, generator=generator)
    moved = torch.randn(7, 50, generator=generator)
    out = delta_log_probs(moved, logits)
    assert float((logits.softmax(-1) * out).sum(-1).abs().max()) <= 1e-6
    assert torch.allclose(delta_log_probs(moved + 1e3, logits), out, atol=1e-3)
    exact = torch.autograd.functional.jvp(
        lambda z: z.log_softmax(-1), logits.double(), moved.double()
    )[1]
    assert torch.allclose(out.double(), exact, atol=1e-5)
    # A token with π = 1 − 1e-9: its log-prob moves by Σ_v π_v (Δz_y − Δz_v), of order 1e-9.
    peaked = torch.zeros(1, 3)
    peaked[0, 0] = 21.4
    small = delta_log_probs(torch.tensor([[100.0, 101.0, 103.0]]), peaked)
    wide = peaked.double()
    exact = torch.tensor([[100.0, 101.0, 103.0]]).double()
    exact = exact - (wide.softmax(-1) * exact).sum(-1, keepdim=True)
    assert float(small[0, 0]) == pytest.approx(float(exact[0, 0]), rel=1e-4)


@pytest.mark.parametrize("part", [1, 1000, 1 << 25])
def test_projections_of_a_narrow_weight(part, monkeypatch):
    """W in bfloat16 is cast in parts of one row, of some rows, and whole."""
    monkeypatch.setattr(head, "_CAST", part)
    weight = torch.randn(300, 8).bfloat16()
    hidden, rows = torch.randn(5, 8), torch.randn(5, 300)
    assert torch.allclose(head.project(hidden, weight), hidden @ weight.float().T, atol=1e-5)
    assert torch.allclose(head.back_project(rows, weight), rows @ weight.float(), atol=1e-4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GiB", 2**31),
        ("500MB", 5 * 10**8),
        ("1.5 KiB", 1536),
        (7, 7),
        ("64 b", 64),
        ("1tib", 2**40),
    ],
)
def test_parse_memory(text, value):
    assert parse_memory(text) == value


@pytest.mark.parametrize("bad", ["", "GiB", "2 GiBs", "-2GiB", 0, -1, None, True, False, "1e400B"])
def test_parse_memory_refuses(bad):
    with pytest.raises(ValueError, match="memory must"):
        parse_memory(bad)


def test_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


def test_public_names():
    assert lddyn.ntk(zoo.build("gpt2"), *zoo.examples()).gram().shape == (6, 5)


@pytest.mark.parametrize("name", NAMES)
def test_token_factors_are_the_gradients_of_autograd(name):
    anatomy = Anatomy(zoo.build(name).eval())
    example = lddyn.Example(prompt_ids=[3, 7], response_ids=[5, 2, 9, 5])
    shapes = {n: p.shape for n, p in anatomy.trainable.items()}
    found = {n: torch.zeros(4, *shape) for n, shape in shapes.items()}
    for factor in lddyn.token_factors(anatomy, example, chunk=3):
        base, _, expert = factor.name.partition("[")
        if expert:
            place = found[base][:, int(expert[:-1])]
            place[factor.tokens] += factor.dense(shapes[base][1:])
        else:
            found[base][factor.tokens] += factor.dense(shapes[base])
    for m in range(4):
        weight = torch.eye(4)[m]
        truth = gradient(anatomy, [example], [weight])
        for n, whole in truth.items():
            error = (found[n][m] - whole).norm() / (1e-3 + whole.norm())
            assert error < 1e-4, (n, m, float(error))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "mixtral", "bloom", "cohere"])
def test_shifts_in_a_batch_are_those_of_each_sequence(name):
    model = zoo.build(name).eval()
    one, other = zoo.examples()
    first = lddyn.Example([4, 8], [15, 16, 23, 42], [True, False, False, True])
    examples, anatomy = [one, other, first], Anatomy(model)
    directions = [random_direction(anatomy) for _ in range(2)]
    found = dict(batched_shifts(anatomy, examples, directions))
    assert sorted(found) == [0, 1, 2]
    for index, example in enumerate(examples):
        trace = anatomy.trace(example)
        expected = log_prob_shifts(trace, directions)
        close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
        torch.testing.assert_close(found[index].change, expected, **close)
        realised = torch.stack([realised_shift(trace, d) for d in directions])
        torch.testing.assert_close(found[index].realised, realised, **close)
        torch.testing.assert_close(found[index].logits, trace.logits, rtol=1e-4, atol=1e-4)
    before = [log_prob_shift(anatomy.trace(e), directions[0]) for e in examples]
    with torch.no_grad(), torch.inference_mode():
        again = dict(batched_shifts(anatomy, examples, directions[:1]))
    for index, expected in enumerate(before):
        torch.testing.assert_close(again[index].change[0], expected, rtol=1e-3, atol=1e-3)
