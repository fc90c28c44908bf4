"""Whole sequences in batches: the gradients, and the bits, that each of them has alone."""

import pytest
import torch
import zoo

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gradient import gradient
from lddyn.engine.sequences import batches, keeps_apart, pass_together, pull_sequences
from lddyn.errors import NonFiniteError, UnsupportedModelError
from lddyn.sketches.allocation import choose_layout
from lddyn.sketches.gradients import Batching

ROUTED = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
ALONE = ROUTED | {"falcon"}  # whose biases are added beside the products


def mixed(count=9):
    """Sequences of many lengths; the last tokens of one do not count."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 80, (4 + 3 * i,), generator=draw).tolist() for i in range(count)]
    examples = [lddyn.Example(row[:2], row[2:]) for row in ids]
    counted = [i < 4 for i in range(len(ids[-1]) - 2)]
    return [*examples, lddyn.Example(ids[-1][:2], ids[-1][2:], counted)]


# One of each kind of block: norms, biases, tied heads, soft caps, parallel branches, experts.
BATCHED = ["llama", "gpt2", "gemma2", "opt", "falcon", "bloom", "mixtral", "gpt_oss"]


@pytest.mark.parametrize("name", BATCHED)
def test_bits_do_not_depend_on_the_batch(name, monkeypatch):
    anatomy, examples = Anatomy(zoo.build(name).eval()), mixed()
    layout = choose_layout(anatomy, examples, lddyn.Sketch(k=2400), by="sequence")

    def rows(some, **settings):
        return lddyn.features(anatomy, some, by="sequence", layout=layout, **settings).rows

    whole = rows(examples)
    assert keeps_apart(anatomy) is (name not in ALONE)
    known = Anatomy(anatomy.model)
    for example in examples:
        known.trace(example)
    assert anatomy.ledger == known.ledger  # a batch enters no use of its own
    assert torch.equal(rows(examples[::-1]).flip(0), whole)
    assert torch.equal(rows(examples[2:], chunk=3), whole[2:])
    assert torch.equal(torch.cat([rows([e]) for e in examples[:3]]), whole[:3])
    monkeypatch.setattr(
        Batching, "of", lambda *_: Batching(2, keep_graphs=False, least=0)
    )  # segments are made again
    assert torch.equal(rows(examples), whole)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma2", "mixtral", "falcon"])
def test_gradients_are_those_of_a_backward_pass(name):
    """Of every parameter, formed from the factors."""
    model, examples = zoo.build(name).eval(), mixed(5)
    anatomy = Anatomy(model)
    for example in examples:
        anatomy.trace(example)
    for length, index in batches(anatomy, examples, 4):
        some = [examples[i] for i in index]
        found = [{n: torch.zeros_like(p) for n, p in anatomy.trainable.items()} for _ in index]
        with anatomy.analysis():
            batch = pass_together(anatomy, some, length, keep=True)
            for rows, factors in pull_sequences(anatomy, some, [None] * len(some), batch):
                add(found, rows, factors)
        for example, mine in zip(some, found, strict=True):
            expected = gradient(anatomy, [example], [torch.ones(len(example))])
            for key, value in expected.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-4)


def add(found, rows, factors):
    """Gradients from factors, parameter by parameter, in the plainest way."""
    for i, row in enumerate(rows.tolist()):
        total = found[row]
        for key, value in factors.direct.items():
            total[key] += value[i]
        for tap, delta in factors.taps:
            if tap.bias is not None:
                total[tap.bias] += delta[i].sum(0)
            if tap.weight is None:
                continue
            key, _, expert = tap.weight.partition("[")
            into = total[key][int(expert[:-1])] if expert else total[key]
            if tap.kind == "embedding":
                keep = tap.updated()[i]
                into.index_add_(0, tap.activations[i][keep], delta[i][keep])
            else:
                x = tap.activations[i]
                into += delta[i].T @ x if tap.kind == "linear" else x.T @ delta[i]
        if factors.head is not None and factors.head.weight is not None:
            total[factors.head.weight] += factors.head.rows.T @ factors.head.hidden
        if factors.head is not None and factors.head.bias is not None:
            total[factors.head.bias] += factors.head.rows.sum(0)


def test_lengths_are_padded_where_nothing_sees_it():
    anatomy, examples = Anatomy(zoo.build("llama").eval()), mixed()
    anatomy.trace(examples[0])
    found = dict(batches(anatomy, examples, 16))
    assert sorted(found) == [16, 32] and 9 in found[16]  # cut after its last token that counts
    long = lddyn.Example([5], list(range(3, 63)))
    assert max(length for length, _ in batches(anatomy, [long], 16)) == 64
    short = Anatomy(zoo.build("llama", max_position_embeddings=61).eval())
    short.trace(long)
    assert list(batches(short, [long], 16)) == [(61, [0])]  # no room for more positions


def test_angles_that_depend_on_the_length_are_those_of_the_sequence():
    """Rotary angles rescale beyond 20 tokens: what is shorter may not be padded beyond that."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 20,
        "factor": 8.0,
    }
    model = zoo.build("phi3", rope_parameters=rope, original_max_position_embeddings=20).eval()
    anatomy = Anatomy(model)
    examples = [lddyn.Example([5], list(range(4, 3 + n))) for n in (10, 12, 18, 22, 40, 42)]
    anatomy.trace(examples[0])
    found = sorted(batches(anatomy, examples, 16))
    assert found == [(16, [0, 1]), (18, [2]), (22, [3]), (48, [4, 5])]
    # The first tokens of a long one count alone: at one token, angles would not tell.
    first = lddyn.Example([5], list(range(4, 43)), [i < 7 for i in range(39)])
    assert list(batches(anatomy, [first], 16)) == [(40, [0])]
    layout = choose_layout(anatomy, [first], lddyn.Sketch(k=400_000), by="sequence")
    norm = lddyn.features(anatomy, [first], by="sequence", layout=layout).gram().value
    weights = gradient(anatomy, [first], [torch.ones(7)]).values()
    torch.testing.assert_close(
        norm[0, 0], sum(g.square().sum() for g in weights), rtol=1e-5, atol=0
    )


def test_a_model_that_mixes_the_sequences_of_a_batch_is_not_given_one(monkeypatch):
    model = zoo.build("llama").eval()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x) + 0.1 * x.mean(0, keepdim=True))
    anatomy = Anatomy(model)
    anatomy.trace(mixed()[0])
    assert not keeps_apart(anatomy)


def test_a_model_whose_bits_depend_on_the_batch_is_not_given_one():
    """Falcon's own attention, its biases frozen: products of another layout in a batch."""
    model = zoo.build("falcon").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    anatomy, examples = Anatomy(model), mixed()
    layout = choose_layout(anatomy, examples, lddyn.Sketch(k=2400), by="sequence")
    whole, *each = (
        lddyn.features(anatomy, some, by="sequence", layout=layout).rows
        for some in (examples, *([e] for e in examples))
    )
    assert torch.equal(torch.cat(each), whole)


def test_code_that_takes_one_sequence_is_given_one(monkeypatch):
    model = zoo.build("llama").eval()
    mlp, examples = model.model.layers[1].mlp, mixed(3)
    forward = mlp.forward

    def alone(x):
        assert len(x) == 1, "one sequence at a time"
        return forward(x)

    monkeypatch.setattr(mlp, "forward", alone)
    rows = lddyn.features(model, examples, lddyn.Sketch(k=2400), by="sequence").rows
    assert len(rows) == len(examples) and bool(rows.isfinite().all())


def test_rows_that_a_probe_did_not_show_are_refused(monkeypatch):
    """A block that leaves out some tokens of long sequences, by a mask of its own."""
    model = zoo.build("llama").eval()
    mlp, examples = model.model.layers[1].mlp, mixed()
    forward = mlp.forward

    def some(x):
        kept = torch.ones(x.shape[:2], dtype=torch.bool)
        kept[:, 20:22] = False
        out = torch.zeros_like(x)
        out[kept] = forward(x[kept])
        return out

    monkeypatch.setattr(mlp, "forward", some)
    layout = choose_layout(model, examples[:3], lddyn.Sketch(k=2400), by="sequence")
    with pytest.raises(UnsupportedModelError, match=r"cannot be told apart: give chunk=1"):
        lddyn.features(model, examples, by="sequence", layout=layout)
    rows = lddyn.features(model, examples, by="sequence", layout=layout, chunk=1).rows
    assert bool(rows.isfinite().all())


def test_what_is_not_finite_is_named(monkeypatch):
    model, examples = zoo.build("llama").eval(), mixed(4)
    layout = choose_layout(model, examples, lddyn.Sketch(k=2400), by="sequence")
    anatomy = Anatomy(model)
    lddyn.features(anatomy, examples, by="sequence", layout=layout)
    with torch.no_grad():
        model.model.embed_tokens.weight[examples[2].ids[0]] = float("nan")
    with pytest.raises(NonFiniteError, match="embed_tokens"):
        lddyn.features(anatomy, examples, by="sequence", layout=layout)


def test_memory_that_holds_no_sequence_is_refused():
    model, examples = zoo.build("llama").eval(), mixed()
    with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes, \d+ for all rows"):
        lddyn.features(model, examples, lddyn.Sketch(k=2400), by="sequence", memory=1000)
