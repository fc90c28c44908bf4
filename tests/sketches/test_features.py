"""Features of tiny models of many kinds, against their exact token Gram."""

import functools
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.errors import UnsupportedModelError
from lddyn.sketches.allocation import choose_layout
from lddyn.sketches.layout import Layout, Part
from lddyn.sketches.sketch import KINDS
from lddyn.store.build import store_features

REPEATS = 400


@functools.cache
def model(name):
    """A tiny model; after a "+" what is added to it."""
    base, _, more = name.partition("+")
    changes = {"": {}, "lora": {}, "tied": {"tie_word_embeddings": True}}
    changes["small"] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    changes["bias"] = {"attention_bias": True, "mlp_bias": True}
    if more == "lora":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return zoo.lora(base)
    lm = zoo.build(base, **changes.get(more, {})).eval()
    if more == "shared":
        lm.model.layers[0].mlp = lm.model.layers[1].mlp
    return lm


@functools.cache
def truth(name):
    """The exact Gram of both examples' tokens, by the engine (the oracle's tests are elsewhere)."""
    both = zoo.examples()
    rows = [torch.cat([lddyn.ntk(model(name), a, b).gram() for b in both], 1) for a in both]
    return torch.cat(rows)


def scale(gram):
    """‖a_m‖‖a_l‖."""
    norms = gram.diagonal().sqrt()
    return norms[:, None] * norms[None]


def repeated(name, sketch, repeats=REPEATS):
    """Features with the layout of a sketch, and many more repeats."""
    lm, examples = model(name), zoo.examples()
    parts = choose_layout(lm, examples, sketch).parts
    more = replace(sketch, k=sketch.k * repeats // sketch.repeats, repeats=repeats)
    return lddyn.features(lm, examples, layout=Layout(more, parts))


def assert_unbiased(estimate, gram):
    """Errors of R repeats, in standard errors and normalised."""
    error = (estimate.value - gram) / estimate.stderr.clamp_min(1e-9)
    assert float(error.abs().max()) < 4.5
    assert 0.3 < float(error.square().mean()) < 2.2  # entries of one sketch are not independent
    assert float(((estimate.value - gram) / scale(gram)).abs().max()) < 0.1


ALL = [
    "llama",
    "llama+bias",
    "llama+tied",
    "llama+lora",
    "llama+shared",
    "gpt2",
    "opt",
    "mixtral",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "falcon",
    "gpt_oss",
]


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_counts_and_nothing_is_biased(name):
    """400 repeats: a parameter that is left out, or counted twice, is far outside of the errors."""
    feats = repeated(name, lddyn.Sketch(k=1200, seed=2))
    assert {p.name for p in feats.layout.parts} | {Anatomy(model(name)).head_bias} - {None} >= {
        n for n, p in model(name).named_parameters() if p.requires_grad
    } - {Anatomy(model(name)).head_bias}
    assert_unbiased(feats.gram(), truth(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_kind_is_unbiased(name, kind):
    assert_unbiased(repeated(name, lddyn.Sketch(kind, k=800, seed=3)).gram(), truth(name))


def test_signs_in_place_of_frames_are_unbiased():
    feats = repeated("llama", lddyn.Sketch(k=800, sides="sign"))
    assert_unbiased(feats.gram(), truth("llama"))


@pytest.mark.parametrize("name", ["llama", "llama+bias", "llama+lora", "qwen3", "gpt_oss"])
def test_what_fits_is_exact(name):
    """With room for everything nothing is sketched: every parameter's part to rounding."""
    feats = lddyn.features(model(name), zoo.examples(), lddyn.Sketch(k=10**6))
    kinds = {part.kind for part in feats.layout.parts}
    estimate, gram = feats.gram(), truth(name)
    if name != "gpt_oss":  # packed experts stay sketches
        assert kinds <= {"exact", "outer"}
        assert not estimate.stderr.any()
        assert float(((estimate.value - gram) / scale(gram)).abs().max()) < 2e-6


def test_the_head_and_the_top_block_are_kept_as_outer_products():
    feats = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=8_000))
    outer = {part.name for part in feats.layout.parts if part.kind == "outer"}
    assert "lm_head.weight" in outer
    assert {f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "gate", "down")} <= outer
    assert not any("layers.0" in name or "k_proj" in name for name in outer)
    low, high = feats.gram().interval(0.999)
    assert bool(((low <= truth("llama")) & (truth("llama") <= high)).all())


def test_low_rank_parts_take_most_of_the_error():
    """At equal k; a trained model's gradients are nearly of rank one, these are less so."""
    errors = {}
    for kind in ("twosided", "lowrank"):
        estimate = repeated("llama", lddyn.Sketch(kind, k=800, rank=4)).gram()
        errors[kind] = float((estimate.stderr / scale(truth("llama"))).square().mean().sqrt())
    assert errors["lowrank"] < 0.7 * errors["twosided"]


@pytest.mark.parametrize("kind", ["twosided", "lowrank"])
def test_intervals_of_whole_models_hold_the_truth(kind):
    """95 % intervals of 8 repeats each, 1,000 seeds, four tokens with all others of a model."""
    seeds = 1000
    feats = repeated("llama+small", lddyn.Sketch(kind, k=400, seed=1), 8 * seeds)
    some = torch.tensor([0, 3, 7, 9])
    samples = feats.layout.samples(feats.rows[some], feats.rows).view(seeds, 8, 4, -1)
    estimate = lddyn.Estimate(samples.mean(1), samples.std(1) / 8**0.5, 8)
    low, high = estimate.interval(0.95)
    gram = truth("llama+small")[some]
    held = ((low <= gram) & (gram <= high)).double()
    own = torch.zeros(4, held.shape[2]).scatter_(1, some[:, None], 1).bool()
    assert 0.93 <= float(held[:, ~own].mean()) <= 0.97
    assert 0.93 <= float(held[:, own].mean()) <= 0.97  # norms


SHARED = Path(__file__).parents[3] / "shared"


def test_errors_on_a_trained_model_are_those_of_theory(monkeypatch):
    """The whole chain against plain backward passes and the variance formulas."""
    trained, data = SHARED / "models/hh-llama-2m", SHARED / "data/hh-helpful/probes.jsonl"
    if not (trained.exists() and data.exists()):
        pytest.skip(f"NOT RUN: the trained model or its dialogues are not in {SHARED}")
    import sketches
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    rows = (lddyn.encode_row(tokenizer, r, ["chosen"]) for r in lddyn.rows(data, limit=12))
    short = [sketches.cut(r["chosen"]) for r in rows if len(r["chosen"].prompt_ids) < 70][:2]
    monkeypatch.setattr(sketches, "PAIRS", 6)
    monkeypatch.setattr(sketches, "SEEDS", 40)
    monkeypatch.setattr(sketches, "SIZES", {"twosided": [1024], "tensorsketch": [1024]})
    monkeypatch.setattr(sketches, "truncated", lambda *_: [])
    for rows in sketches.measure(lm, short)["kinds"].values():
        for group in ("other sequence", "itself"):
            found = rows[0][group]
            assert found["error"] == pytest.approx(found["theory"], rel=0.2)
            assert found["stated"] == pytest.approx(found["theory"], rel=0.15)
            assert 0.9 < found["held"] < 0.99


# --------------------------------------------------------------------------- the same bits


def test_features_have_the_same_bits_however_they_are_split():
    one, other = zoo.examples()
    layout = choose_layout(model("llama"), [one, other], lddyn.Sketch(k=2000))
    both = lddyn.features(model("llama"), [one, other], layout=layout)
    again = lddyn.features(model("llama"), [other, one], layout=layout)
    alone = lddyn.features(Anatomy(model("llama")), [other], layout=layout, memory="3MB")
    assert torch.equal(both.rows[len(one) :], again.rows[: len(other)])
    assert torch.equal(both.rows[len(one) :], alone.rows)
    assert torch.equal(both.rows[: len(one)], again.rows[len(other) :])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        other_threads = lddyn.features(model("llama"), [one, other], layout=layout)
        assert torch.equal(both.rows, other_threads.rows)
        assert torch.get_num_threads() != threads  # left as it was
    finally:
        torch.set_num_threads(threads)


def test_chunks_move_rounding_alone():
    sketch = lddyn.Sketch(k=2000)
    rows = [
        lddyn.features(model("llama"), zoo.examples(), sketch, chunk=c).rows for c in (1, 3, 16)
    ]
    for other in rows[1:]:
        assert float((other - rows[0]).norm() / rows[0].norm()) < 1e-5


def test_a_layout_does_not_depend_on_the_order_of_layers_or_runs():
    layouts = [choose_layout(model("gpt2"), zoo.examples(), lddyn.Sketch(k=2000)) for _ in range(2)]
    assert layouts[0] == layouts[1]
    assert Layout.from_dict(layouts[0].to_dict()) == layouts[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_k_is_what_is_sketched(name):
    for k in (1000, 3000):
        layout = choose_layout(model(name), zoo.examples(), lddyn.Sketch(k=k))
        repeated = layout.repeated(torch.zeros(1, layout.width)).numel()
        assert 0.55 * k < repeated <= k


def test_weights_scale_rows():
    one = zoo.examples()[0]
    sketch = lddyn.Sketch(k=2000)
    weights = torch.linspace(-1, 2, len(one))
    plain = lddyn.features(model("llama"), [one], sketch)
    weighed = lddyn.features(model("llama"), [one], weights=[weights], layout=plain.layout)
    expected = plain.gram().value * weights[:, None]
    torch.testing.assert_close(weighed.gram(plain).value, expected, rtol=1e-4, atol=1e-4)


def test_the_token_table_counts_within_the_response():
    ex = lddyn.Example([5, 9], [21, 9, 40, 2], response_mask=[True, False, True, True])
    tokens = lddyn.features(model("llama"), [ex], lddyn.Sketch(k=800)).tokens
    assert tokens.response_index.tolist() == [0, 2, 3]
    assert tokens.position.tolist() == [1, 3, 4] and tokens.token_id.tolist() == [21, 40, 2]


def test_float64_models_have_float64_features():
    with lddyn.true_float64():
        feats = lddyn.features(zoo.double(model("llama")), zoo.examples(), lddyn.Sketch(k=10**6))
        gram, norms = zoo.oracle_gram(model("llama"), *zoo.examples())
    assert feats.rows.dtype == torch.float64
    m = len(zoo.examples()[0])
    assert float(((feats.gram().value[:m, m:] - gram) / norms).abs().max()) < 1e-12


# --------------------------------------------------------------------------- sequences and files


@pytest.mark.parametrize("kind", ["twosided", "lowrank"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_sums_over_sequences_are_unbiased(name, kind):
    one, other = zoo.examples()
    sums = repeated(name, lddyn.Sketch(kind, k=800)).per_sequence()
    assert sums.layout.linear and sums.tokens.example_id == [one.content_id, other.content_id]
    m, gram = len(one), truth(name)
    blocks = [[gram[:m, :m], gram[:m, m:]], [gram[m:, :m], gram[m:, m:]]]
    expected = torch.tensor([[float(b.sum()) for b in row] for row in blocks])
    estimate = sums.gram()
    assert float(((estimate.value - expected) / estimate.stderr).abs().max()) < 4


def test_sums_of_sums_are_the_same():
    sums = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=2000)).per_sequence()
    again = sums.per_sequence()
    assert again.layout == sums.layout and torch.equal(again.rows, sums.rows)


def test_sums_of_exact_rows_are_exact():
    """All but outer products, which are sketched for the purpose."""
    feats = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=10**6))
    sums, gram = feats.per_sequence().gram().value, truth("llama")
    m = len(zoo.examples()[0])
    assert float(sums[0, 1]) == pytest.approx(float(gram[:m, m:].sum()), rel=1e-4)


def sequence_truth(name):
    """The exact Gram of both examples' whole gradients."""
    m, gram = len(zoo.examples()[0]), truth(name)
    blocks = [[gram[:m, :m], gram[:m, m:]], [gram[m:, :m], gram[m:, m:]]]
    return torch.tensor([[float(b.sum()) for b in row] for row in blocks])


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "twosided") for name in ALL), *(("llama", kind) for kind in KINDS)],
)
def test_whole_sequences_are_unbiased(name, kind):
    """One backward pass each; every parameter counts once."""
    lm, examples = model(name), zoo.examples()
    layout = choose_layout(lm, examples, lddyn.Sketch(kind, k=1200, seed=2), by="sequence")
    more = replace(layout.sketch, k=layout.sketch.k * REPEATS // 8, repeats=REPEATS)
    feats = lddyn.features(lm, examples, by="sequence", layout=Layout(more, layout.parts))
    assert feats.layout.linear and feats.tokens.example_id == [e.content_id for e in examples]
    estimate, expected = feats.gram(), sequence_truth(name)
    error = (estimate.value - expected) / estimate.stderr.clamp_min(1e-9)
    assert float(error.abs().max()) < 4.5
    assert float(((estimate.value - expected) / scale(expected)).abs().max()) < 0.1


@pytest.mark.parametrize("name", ["llama", "llama+bias", "llama+tied", "gpt2", "opt"])
def test_whole_sequences_that_fit_are_exact(name):
    feats = lddyn.features(model(name), zoo.examples(), lddyn.Sketch(k=10**6), by="sequence")
    assert {part.kind for part in feats.layout.parts} == {"exact"}
    expected = sequence_truth(name)
    torch.testing.assert_close(feats.gram().value, expected, rtol=2e-5, atol=1e-5)


def test_weights_of_whole_sequences():
    examples = zoo.examples()
    weights = [torch.linspace(-1, 2, len(e)) for e in examples]
    lm, sketch = model("llama"), lddyn.Sketch(k=10**6)
    feats = lddyn.features(lm, examples, sketch, by="sequence", weights=weights)
    w = torch.cat(weights)
    owner = torch.tensor([i for i, e in enumerate(examples) for _ in range(len(e))])
    whole = torch.zeros(2, 2).index_put_(
        (owner[:, None], owner[None]), w[:, None] * truth("llama") * w, accumulate=True
    )
    torch.testing.assert_close(feats.gram().value, whole, rtol=2e-5, atol=1e-5)


def test_layouts_of_tokens_and_of_sequences_are_not_mixed():
    lm, examples = model("llama"), zoo.examples()
    layouts = {by: choose_layout(lm, examples, lddyn.Sketch(k=2000), by) for by in _BY}
    with pytest.raises(ValueError, match="make it with choose_layout"):
        lddyn.features(lm, examples, by="sequence", layout=layouts["token"])
    with pytest.raises(ValueError, match="layout is one of sequences"):
        lddyn.features(lm, examples, layout=layouts["sequence"])
    with pytest.raises(ValueError, match="by must be 'token' or 'sequence', got 'row'"):
        choose_layout(lm, examples, lddyn.Sketch(), "row")


_BY = ("token", "sequence")


def test_a_store_answers_with_standard_errors(tmp_path):
    examples = zoo.examples()
    feats = lddyn.features(model("llama"), examples, lddyn.Sketch(k=2000))
    with lddyn.Store.create(tmp_path / "s", {}, feats.layout) as store:
        for i, ex in enumerate(examples):
            store.append(ex, feats.rows[feats.tokens.example_index == i], index=i)
    store = lddyn.Store.open(tmp_path / "s", layout=Layout.from_dict(store.layout_json))
    estimate = feats.gram()
    hits = store.query(feats.rows[:2], k=len(feats))
    for query in range(2):
        for hit in hits[query]:
            assert hit.value == pytest.approx(float(estimate.value[query, hit.row]), rel=1e-4)
            assert hit.stderr == pytest.approx(float(estimate.stderr[query, hit.row]), rel=1e-3)
    # The error of a sum is that of the summed samples: below the sum of the errors.
    hits = store.query(feats.rows[:1], k=2, by="sequence")
    samples = feats.layout.samples(feats.rows[:1], feats.rows)[:, 0]
    for hit in hits[0]:
        mine = samples[:, hit.row : hit.row + hit.tokens].sum(1)
        assert hit.value == pytest.approx(float(mine.mean()), rel=1e-4)
        assert hit.stderr == pytest.approx(float(mine.std()) / 8**0.5, rel=1e-3)


def test_features_are_saved_and_read_back(tmp_path):
    feats = lddyn.features(model("gpt2"), zoo.examples(), lddyn.Sketch("lowrank", k=2000))
    feats.save(tmp_path / "f")
    back = lddyn.Features.load(tmp_path / "f")
    assert torch.equal(back.rows, feats.rows) and back.layout == feats.layout
    assert back.tokens.example_id == feats.tokens.example_id
    assert torch.equal(back.tokens.token_id, feats.tokens.token_id)
    other = lddyn.features(model("gpt2"), zoo.examples()[:1], lddyn.Sketch("lowrank", k=3000))
    other.save(tmp_path / "g")
    (tmp_path / "g.json").replace(tmp_path / "f.json")
    with pytest.raises(ValueError, match=r"cannot be read as lddyn\.Features"):
        lddyn.Features.load(tmp_path / "f")


@pytest.mark.parametrize("by", _BY)
def test_features_say_what_they_are(by):
    feats = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=2000), by=by)
    assert feats.by == by and len(repr(feats).splitlines()) == 1 and "tensor" not in repr(feats)
    summary = json.loads(json.dumps(feats.summary()))
    assert summary["rows"] == len(feats) and summary["examples"] == 2 and summary["k"] == 2000
    document = json.loads(json.dumps(feats.to_dict()))
    assert torch.equal(torch.tensor(document["rows"]), feats.rows)
    assert Layout.from_dict(document["layout"]) == feats.layout
    assert str(feats) == feats.explain() and "are stored without error" in str(feats)
    assert len(repr(feats.layout).splitlines()) == 1 and "k = 2,000, R = 8" in repr(feats.layout)


# --------------------------------------------------------------------------- errors


def test_features_refuse(tmp_path):
    lm, examples = model("llama"), zoo.examples()
    sketch = lddyn.Sketch(k=2000)
    feats = lddyn.features(lm, examples, sketch)
    with pytest.raises(ValueError, match="examples must hold at least one Example, got none"):
        lddyn.features(lm, [], sketch)
    with pytest.raises(ValueError, match="sketch is not that of layout"):
        lddyn.features(lm, examples, lddyn.Sketch(k=9999), layout=feats.layout)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        lddyn.features(lm, examples, sketch, chunk=0)
    with pytest.raises(ValueError, match=r"weights must be a \(tokens,\) tensor per example"):
        lddyn.features(lm, examples, sketch, weights=[torch.ones(2)])
    broken = [torch.full((len(e),), float("nan")) for e in zoo.examples()]
    with pytest.raises(ValueError, match=r"weights must be finite, got \[nan.* for example 0 \(2"):
        lddyn.features(model("llama"), zoo.examples(), weights=broken)
    with pytest.raises(ValueError, match=r"k must be at least \d+, a number for each of 8 repeats"):
        lddyn.features(lm, examples, lddyn.Sketch(k=50))
    with pytest.raises(ValueError, match=r"memory must be at least \d+ bytes, \d+ for all rows"):
        lddyn.features(lm, examples, sketch, memory=1000)
    with pytest.raises(ValueError, match="layout was made for another model"):
        lddyn.features(model("gpt2"), examples, layout=feats.layout)
    with pytest.raises(ValueError, match="other has another layout"):
        feats.gram(lddyn.features(lm, examples, lddyn.Sketch(k=2000, seed=1)))


def test_a_layout_without_a_part_for_a_parameter_is_refused():
    lm, examples = model("llama"), zoo.examples()
    layout = choose_layout(lm, examples, lddyn.Sketch(k=2000))
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = tuple(
        Part(p.name, "vector", p.shape, p.sizes) if p.name == name else p for p in layout.parts
    )
    with pytest.raises(UnsupportedModelError, match=f"the layout has no part for {name}"):
        lddyn.features(lm, examples, layout=Layout(layout.sketch, parts))


def test_what_is_kept_as_an_outer_product_must_be_one():
    lm, examples = model("llama"), zoo.examples()
    layout = choose_layout(lm, examples, lddyn.Sketch(k=2000))
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = tuple(
        Part(p.name, "outer", p.shape, (1, 1)) if p.name == name else p for p in layout.parts
    )
    with pytest.raises(UnsupportedModelError, match=f"gradients of {name} were outer products"):
        lddyn.features(lm, examples, layout=Layout(layout.sketch, parts))


def test_faiss_finds_what_query_finds(tmp_path):
    pytest.importorskip("faiss")
    model, examples = (
        zoo.build("llama"),
        [lddyn.Example([1, 2 + i], [3, 4 + i, 5, 7 + 2 * i]) for i in range(9)],
    )
    stored = choose_layout(model, examples, lddyn.Sketch(k=2048), by="sequence")
    with lddyn.Store.create(tmp_path / "s", {}, stored, exist_ok=True) as store:
        store_features(store, model, dict(enumerate(examples)), stored, by="sequence")
    store = lddyn.Store.open(tmp_path / "s", layout=stored)
    rows = store.rows()[:3]
    values, found = store.to_faiss().search(stored.as_query(rows).numpy(), 4)
    hits = store.query(rows, 4, sign="up")
    assert torch.equal(torch.from_numpy(found), hits.index)
    torch.testing.assert_close(torch.from_numpy(values), hits.estimate.value)
    layout = choose_layout(model, examples, lddyn.Sketch(k=2048))
    with pytest.raises(ValueError, match="linear layout"):
        layout.as_query(torch.zeros(1, layout.width))


@pytest.mark.parametrize("by", ["token", "sequence"])
def test_a_store_takes_an_example_that_is_there_twice_once(tmp_path, by):
    lm, (one, other) = model("llama"), zoo.examples()
    layout = choose_layout(lm, [one, other], lddyn.Sketch(k=1000), by=by)
    with lddyn.Store.create(tmp_path / "s", {}, layout) as store:
        assert store_features(store, lm, {0: one, 1: one, 2: other}, layout, by=by) == 2
        assert store.example_ids == [one.content_id, other.content_id]


def test_another_layout_is_told_in_few_words(tmp_path):
    """Not as all its parts: what was asked for in another way is told beside them."""
    examples = zoo.examples()
    layouts = [choose_layout(model("llama"), examples, lddyn.Sketch(k=k)) for k in (1000, 3000)]
    lddyn.Store.create(tmp_path / "s", {}, layouts[0]).close()
    with pytest.raises(lddyn.StoreIdentityError) as caught:
        lddyn.Store.create(tmp_path / "s", {}, layouts[1], exist_ok=True)
    assert "layout.sketch.k: stored 1000, given 3000" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_numbers_leave_without_a_copy():
    import numpy as np

    feats = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=512))
    address = feats.rows.data_ptr()
    assert feats.rows.numpy().ctypes.data == address
    assert np.from_dlpack(feats.rows).ctypes.data == address
    table = feats.to_arrow()
    assert table.column("features").chunk(0).flatten().buffers()[1].address == address
    assert table.column("token_id").to_pylist() == feats.tokens.token_id.tolist()
    assert table.column("example_id").to_pylist() == feats.tokens.example_id
    feats.rows[0, 0] = 7.0
    assert table.column("features")[0].as_py()[0] == 7.0


def test_vectors_have_the_plain_inner_products_of_the_rows():
    feats = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=512), by="sequence")
    x = feats.vectors()
    gram = feats.gram().value
    assert float((x @ x.T - gram).norm()) < 1e-5 * float(gram.norm())
    summed = lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=512)).per_sequence()
    x, gram = summed.vectors(), summed.gram().value
    assert float((x @ x.T - gram).norm()) < 1e-5 * float(gram.norm())
    with pytest.raises(ValueError, match="vectors needs rows of whole sequences"):
        lddyn.features(model("llama"), zoo.examples(), lddyn.Sketch(k=512)).vectors()
