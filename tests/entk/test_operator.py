"""The kernel against an explicit Jacobian in true float64, its symmetries, and its memory."""

import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import zoo

import lddyn
from lddyn.engine import gram
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gradient import gradient
from lddyn.engine.gram import Side, factored_gram, factored_push, token_gram
from lddyn.engine.guard import true_float64
from lddyn.engine.pushforward import AlongDirection, Pushforward

torch.set_num_threads(1)

THE_16 = list(zoo.ARCHITECTURES)[:16]
FLOAT32, BFLOAT16 = 5e-6, 2e-2


def sides(model, examples=None, attention="lddyn"):
    anatomy = Anatomy(model, attention)
    return [Side.log_probs(anatomy.trace(e)) for e in examples or zoo.examples()]


# A head is tied in every other architecture; tests/steps/test_decompose.py has the others.
KINDS = [
    (name, kind)
    for i, name in enumerate(zoo.ARCHITECTURES)
    for kind in (("tied", "untied")[i % 2], ("lora", "lora-attention")[i // 2 % 2])
] + [(name, kind) for name in [*zoo.ARCHITECTURES][16:] for kind in ("tied", "untied")]


@pytest.mark.parametrize(("name", "kind"), dict.fromkeys(KINDS))
def test_gram_matches_the_explicit_jacobian(name, kind):
    if kind == "lora":
        model = zoo.lora(name)
    elif kind == "lora-attention":
        wanted = ("q_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
        found = {n.rsplit(".", 1)[-1] for n, _ in zoo.build(name).named_modules()}
        model = zoo.lora(name, target_modules=sorted(found.intersection(wanted)))
    else:
        model = zoo.build(name, tie_word_embeddings=kind == "tied")
    truth, scale = zoo.oracle_gram(model, *zoo.examples())
    for attention in ("eager", "lddyn"):
        observed, updated = sides(model, attention=attention)
        for way in (token_gram, factored_gram):
            error = zoo.normalised_error(way([observed], [updated]), truth, scale)
            assert error <= FLOAT32, (attention, way.__name__)


@pytest.mark.parametrize("name", THE_16)
def test_gram_in_bfloat16(name):
    """Within 2e-2, or no worse than plain autograd in bfloat16 (a ReLU of OPT flips near zero)."""
    model = zoo.build(name).bfloat16().eval()
    truth, scale = zoo.oracle_gram(model, *zoo.examples())
    rows = [
        zoo.jacobian(zoo.token_log_probs(model, e), list(model.parameters())).double()
        for e in zoo.examples()
    ]
    bound = max(BFLOAT16, 1.25 * zoo.normalised_error(rows[0] @ rows[1].T, truth, scale))
    assert bound == BFLOAT16 or name == "opt"
    for attention in ("eager", "lddyn"):
        observed, updated = sides(model, attention=attention)
        for way in (token_gram, factored_gram):
            value = way([observed], [updated])
            assert value.dtype == torch.float32
            assert zoo.normalised_error(value, truth, scale) <= bound


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "falcon"])
def test_gram_in_float64_is_exact(name):
    model = zoo.double(zoo.build(name, tie_word_embeddings=True))
    truth, scale = zoo.oracle_gram(model, *zoo.examples())
    with true_float64():
        observed, updated = sides(model)
        for way in (token_gram, factored_gram):
            assert zoo.normalised_error(way([observed], [updated]), truth, scale) <= 1e-13


def test_fresh_lora_moves_only_b():
    """B = 0: the gradient of A is zero, and the A part of every entry with it."""
    model = zoo.lora("llama", zero=True)
    observed, updated = sides(model)
    parts = {}
    token_gram(
        [observed],
        [updated],
        sink=lambda name, o, u, block: parts.setdefault(name, []).append(block.abs().max()),
    )
    largest = {n: float(max(v)) for n, v in parts.items()}
    assert len(largest) == 2 * 7 * 2
    for name, value in largest.items():
        assert (value == 0) if "lora_A" in name else (value > 0), name
    truth, scale = zoo.oracle_gram(model, *zoo.examples())
    assert zoo.normalised_error(token_gram([observed], [updated]), truth, scale) <= FLOAT32


def test_opt_with_projections():
    """word_embed_proj_dim: the tail has a trainable projection between norm and head."""
    model = zoo.build("opt")
    assert model.model.decoder.project_out is not None
    truth, scale = zoo.oracle_gram(model, *zoo.examples())
    observed, updated = sides(model)
    assert zoo.normalised_error(token_gram([observed], [updated]), truth, scale) <= FLOAT32


# --------------------------------------------------------------------------- sum rules


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "olmoe"])
def test_gram_is_symmetric_and_positive(name):
    model = zoo.build(name, tie_word_embeddings=True)
    one, other = sides(model)
    for way in (token_gram, factored_gram):
        forward, back = way([one], [other]), way([other], [one])
        norms = [way([s], [s]) for s in (one, other)]
        scale = norms[0].diagonal().sqrt()[:, None] * norms[1].diagonal().sqrt()[None]
        assert zoo.normalised_error(forward, back.T.double(), scale) <= 1e-6
        for own in norms:
            assert float((own - own.T).abs().max()) <= 1e-6 * float(own.abs().max())
            values = torch.linalg.eigvalsh(own.double())
            assert float(values[0]) >= -1e-6 * float(values[-1])
            assert float(values[0]) < 0.9 * float(values[-1])


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mixtral"])
def test_rows_and_columns_of_the_operator(name):
    """A·1 = 0, πᵀA = 0, 1ᵀG = 0, and K that a common shift of all logits cannot excite."""
    model = zoo.build(name)
    observed, updated = sides(model)
    assert float(updated.rows.sum(1).abs().max()) <= 1e-6
    # Σ_v π_v ∇ log π(v) = 0: one backward pass each says so of the rows.
    trace = observed.trace
    probabilities = trace.logits.softmax(-1)
    expected_row = torch.eye(zoo.VOCABULARY)[trace.targets] - probabilities
    assert torch.allclose(observed.rows, expected_row, atol=1e-6)
    kernel = lddyn.ntk(model, *zoo.examples())
    assert kernel.shape == (6, zoo.VOCABULARY, 5, zoo.VOCABULARY)
    moved = kernel @ updated.rows
    shifted = moved - (probabilities * moved).sum(-1, keepdim=True)  # A Δz
    assert float((probabilities * shifted).sum(-1).abs().max()) <= 1e-5 * float(moved.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_operator_matches_the_dense_kernel(tied):
    small = {"vocab_size": 63, "num_hidden_layers": 1}
    model = zoo.build("llama", tie_word_embeddings=tied, **small)
    observed, updated = zoo.examples()
    exact = zoo.double(model).eval()
    parameters = list(exact.parameters())
    with true_float64():
        jacobians = [
            zoo.jacobian(
                exact(input_ids=torch.tensor([e.ids])).logits[0][e.positions[m]], parameters
            )
            for e, m in ((observed, 2), (updated, 3))
        ]
    truth = jacobians[0] @ jacobians[1].T
    scale = jacobians[0].norm(dim=1)[:, None] * jacobians[1].norm(dim=1)[None]
    kernel = lddyn.ntk(model, observed, updated)
    block = kernel.block(2, 3)
    assert block.shape == (63, 63)
    assert zoo.normalised_error(block, truth, scale) <= FLOAT32
    assert zoo.normalised_error(kernel.T.block(3, 2), truth.T, scale.T) <= FLOAT32
    g = torch.zeros(5, 63)
    g[3] = torch.randn(63)
    expected = truth @ g[3].double()
    size = scale.norm(dim=1) * float(g.norm())
    assert float(((kernel @ g)[2].double() - expected).abs().div(size).max()) <= FLOAT32


def test_gram_of_any_cotangents():
    model = zoo.build("qwen2", tie_word_embeddings=True)
    observed, updated = zoo.examples()
    kernel = lddyn.ntk(model, observed, updated)
    v_o, v_u = torch.randn(6, zoo.VOCABULARY), torch.randn(5, zoo.VOCABULARY)
    paired, pushed = (kernel.gram(v_o, v_u, method=m) for m in ("paired", "pushed"))
    exact = zoo.double(model).eval()
    parameters = list(exact.parameters())
    rows = []
    with true_float64():
        for e, v in ((observed, v_o), (updated, v_u)):
            logits = exact(input_ids=torch.tensor([e.ids])).logits[0][list(e.positions)]
            rows.append(zoo.jacobian((logits * v).sum(1), parameters))
    truth = rows[0] @ rows[1].T
    scale = rows[0].norm(dim=1)[:, None] * rows[1].norm(dim=1)[None]
    assert zoo.normalised_error(paired, truth, scale) <= FLOAT32
    assert zoo.normalised_error(pushed, truth, scale) <= FLOAT32
    # The default rows are those of log-probs.
    assert torch.equal(kernel.gram(), token_gram(*[[s] for s in sides(model)]))
    with pytest.raises(ValueError, match=r"v_o must be \(tokens, vocabulary\) = \(6, 89\)"):
        kernel.gram(torch.zeros(5, zoo.VOCABULARY))
    with pytest.raises(ValueError, match="method must be 'auto', 'paired' or 'pushed'"):
        kernel.gram(method="guess")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma2"])
def test_column_totals_are_one_backward_and_one_push(name):
    model = zoo.build(name)
    observed, updated = sides(model)
    gram = token_gram([observed], [updated])
    anatomy = updated.trace.anatomy
    total = gradient(anatomy, [zoo.examples()[1]], [torch.ones(5)])
    with anatomy.analysis():
        moved = Pushforward(observed.trace).logits(AlongDirection(total))[0]
    rows = (observed.rows * moved).sum(1)
    size = float(gram.abs().sum(1).max())
    assert float((gram.sum(1) - rows).abs().max()) <= 2e-6 * size
    # The other way round gives the totals of the columns.
    total = gradient(anatomy, [zoo.examples()[0]], [torch.ones(6)])
    with anatomy.analysis():
        moved = Pushforward(updated.trace).logits(AlongDirection(total))[0]
    columns = (updated.rows * moved).sum(1)
    assert float((gram.sum(0) - columns).abs().max()) <= 2e-6 * float(gram.abs().sum(0).max())


# --------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_memory_changes_nothing(name):
    model = zoo.build(name, tie_word_embeddings=True)
    observed, updated = sides(model)
    reference = token_gram([observed], [updated], memory="2GiB")
    size = float(reference.abs().max())
    for memory in (1, "30KB"):
        for way in (token_gram, factored_gram):
            value = way([observed], [updated], memory=memory)
            assert float((value - reference).abs().max()) <= 3e-6 * size
        both = token_gram([observed, updated], [updated, observed], memory=memory)
        assert float((both[:6, :5] - reference).abs().max()) <= 3e-6 * size
        assert float((both[6:, 5:] - reference.T).abs().max()) <= 3e-6 * size


@pytest.mark.parametrize("memory", [1, "30KB", "200KB"])
def test_groups_of_sides_that_are_on_both_sides(memory, monkeypatch):
    """Products of two such sides are computed once, also where memory divides them into groups."""
    model = zoo.build("llama", tie_word_embeddings=True, pad_token_id=5)
    anatomy = lddyn.Anatomy(model)
    made = [([5, 9, 5], [4, 5, 8, 11]), ([3, 5], [7, 7, 5]), ([8], [5, 9]), ([9, 2], [6, 5, 3])]
    a, b, c, d = (Side.log_probs(anatomy.trace(lddyn.Example(p, r))) for p, r in made)
    observed, updated = [c, a, b], [b, d, a]
    expected = torch.cat([torch.cat([token_gram([o], [u]) for u in updated], 1) for o in observed])
    parts = torch.zeros_like(expected)

    def sink(name, rows_o, rows_u, block):
        parts[rows_o[:, None], rows_u[None]] += block

    value = token_gram(observed, updated, memory, sink=sink)
    size = float(expected.abs().max())
    assert float((value - expected).abs().max()) <= 3e-6 * size
    assert float((parts - expected).abs().max()) <= 3e-6 * size
    # One side with itself, one row a group: row l goes down with the rows that follow it.
    pulled = []
    start = gram.Pullback.__init__
    monkeypatch.setattr(
        gram.Pullback,
        "__init__",
        lambda self, trace, rows, select, chunk: (
            pulled.append(len(select)),
            start(self, trace, rows, select, chunk),
        )[1],
    )
    own = token_gram([a], [a], memory=1)
    assert sum(pulled) == 4 + 3 + 2 + 1
    assert float((own - expected[2:6, 6:]).abs().max()) <= 3e-6 * size


def test_order_of_sides_and_repeats():
    model = zoo.build("llama")
    one, other = sides(model)
    own, cross = token_gram([one], [one]), token_gram([one], [other])
    many = token_gram([other, one, one], [one, other, one])
    size = float(own.abs().max())
    blocks = {(1, 0): own, (1, 2): own, (2, 0): own, (1, 1): cross, (2, 1): cross, (0, 0): cross.T}
    for (i, j), block in blocks.items():
        rows = [slice(0, 5), slice(5, 11), slice(11, 17)][i]
        columns = [slice(0, 6), slice(6, 11), slice(11, 17)][j]
        assert float((many[rows, columns] - block).abs().max()) <= 2e-6 * size


class Table(torch.nn.Module):
    """An MLP behind a gain that an embedding of other rows than the tokens makes."""

    def __init__(self, inner, rows):
        super().__init__()
        self.inner, self.rows, self.table = inner, rows, torch.nn.Embedding(8, 32)

    def forward(self, x):
        at = torch.arange(x.shape[1])
        if self.rows == "one":
            return self.inner(x * (1 + self.table(torch.tensor([3]))))
        gains = self.table((at[:, None] - at).clamp(0, 7))  # (T, T, d), as for relative positions
        gains = gains * (at[:, None] >= at)[..., None]
        return self.inner(x * (1 + gains.mean(1)[None] * x.shape[1] / (at[:, None] + 1)))


@pytest.mark.parametrize("rows", ["one", "pairs of tokens"])
def test_embeddings_of_other_rows_than_the_tokens(rows):
    """Several chunks of one side, whose rows are not the tokens in their order."""
    model = zoo.build("llama")
    block = model.model.layers[0]
    block.mlp = Table(block.mlp, rows)
    examples = [
        lddyn.Example(prompt_ids=[5], response_ids=[7 * i % 80 + 3 for i in range(n)])
        for n in (3, 40)
    ]
    truth, scale = zoo.oracle_gram(model, *examples)
    observed, updated = sides(model, examples)
    assert zoo.normalised_error(token_gram([observed], [updated]), truth, scale) <= FLOAT32


def test_same_bits_twice():
    model = zoo.build("mixtral")
    first, second = (token_gram(*[[s] for s in sides(model)]) for _ in range(2))
    assert torch.equal(first, second)


def test_permuting_examples_permutes_columns():
    model = zoo.build("qwen3")
    examples = [lddyn.Example(prompt_ids=[5, 9], response_ids=r) for r in ([4], [7, 7, 8], [9, 60])]
    observed = sides(model)[0]
    anatomy = observed.trace.anatomy
    three = [Side.log_probs(anatomy.trace(e)) for e in examples]
    straight = token_gram([observed], three)
    turned = token_gram([observed], three[::-1])
    expected = torch.cat([straight[:, 4:], straight[:, 1:4], straight[:, :1]], dim=1)
    assert torch.allclose(turned, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_select_pushes_only_what_was_asked():
    model = zoo.build("gpt2")
    observed, updated = sides(model)
    ((rows, moved),) = list(factored_push([observed.trace], [updated], select=torch.tensor([3, 1])))
    found = torch.einsum("cmv,mv->mc", moved[0], observed.rows)
    gram = token_gram([observed], [updated])
    assert sorted(rows.tolist()) == [1, 3]
    assert torch.allclose(found, gram[:, rows], atol=1e-5 * float(gram.abs().max()))


_MODELS = {}


@hypothesis.settings(max_examples=25, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    data=st.data(),
    name=st.sampled_from(["llama", "gpt2", "mistral", "mixtral"]),
    memory=st.sampled_from(["2GiB", "20KB"]),
)
def test_any_lengths_masks_and_repeats(data, name, memory):
    if name not in _MODELS:
        _MODELS[name] = zoo.build(name, tie_word_embeddings=True)
    model = _MODELS[name]
    token = st.integers(3, 9)  # few, so that they repeat

    def example():
        response = data.draw(st.lists(token, min_size=1, max_size=7))
        mask = data.draw(
            st.none()
            | st.lists(st.booleans(), min_size=len(response), max_size=len(response)).filter(any)
        )
        return lddyn.Example(
            prompt_ids=data.draw(st.lists(token, min_size=1, max_size=6)),
            response_ids=response,
            response_mask=mask,
        )

    observed = example()
    updated = observed if data.draw(st.booleans()) else example()
    truth, scale = zoo.oracle_gram(model, observed, updated)
    anatomy = Anatomy(model)
    one = Side.log_probs(anatomy.trace(observed))
    other = one if updated is observed else Side.log_probs(anatomy.trace(updated))
    for way in (token_gram, factored_gram):
        value = way([one], [other], memory=memory)
        assert value.shape == (len(observed), len(updated))
        assert zoo.normalised_error(value, truth, scale) <= FLOAT32


# --------------------------------------------------------------------------- running out


@pytest.mark.parametrize("way", [token_gram, factored_gram])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_out_of_memory_halves_the_chunks(way, limit, monkeypatch):
    model = zoo.build("llama")
    observed, updated = sides(model)
    reference = way([observed], [updated])
    module = sys.modules["lddyn.engine.pullback"]
    original, refused = module.pull, []

    def pull(replay, cotangents):
        if len(cotangents) > limit:
            refused.append(len(cotangents))
            raise torch.OutOfMemoryError("no room (made up)")
        return original(replay, cotangents)

    monkeypatch.setattr(module, "pull", pull)
    value = way([observed], [updated])
    assert refused
    assert float((value - reference).abs().max()) <= 1e-6 * float(reference.abs().max())


@pytest.mark.parametrize("way", [token_gram, factored_gram])
def test_out_of_memory_at_one_cotangent_is_passed_on(way, monkeypatch):
    model = zoo.build("llama")
    observed, updated = sides(model)

    def pull(replay, cotangents):
        raise torch.OutOfMemoryError("no room (made up)")

    monkeypatch.setattr(sys.modules["lddyn.engine.pullback"], "pull", pull)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        way([observed], [updated])


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    model = zoo.build("llama")
    observed, updated = sides(model)
    calls = []

    def pull(replay, cotangents):
        calls.append(len(cotangents))
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["lddyn.engine.pullback"], "pull", pull)
    with pytest.raises(RuntimeError, match="a bug"):
        token_gram([observed], [updated])
    assert len(calls) == 1


@pytest.mark.parametrize("bad", ["lots", "-1GiB", "0", 0, -5, "2 parsecs", "", None, True, "nanGB"])
def test_bad_memory(bad):
    observed, updated = sides(zoo.build("llama"))
    with pytest.raises(ValueError, match="memory must"):
        token_gram([observed], [updated], memory=bad)
