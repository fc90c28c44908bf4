"""The strongest stored tokens for a query, against brute force."""

import json

import pytest
import torch
from store_torture import data_set, features
from stores import IDENTITY, Repeats

import lddyn
from lddyn import Store
from lddyn.errors import StoreIdentityError
from lddyn.store.query import Pairing


def integers(n, width, seed, span=2):
    """Small whole numbers: products are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, (n, width), generator=generator).float()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole_numbers(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("query") / "s"
    examples = data_set(500)
    with Store.create(path, IDENTITY, 6, request.param, shard=2000) as store:
        for i, ex in enumerate(examples):
            store.append(ex, integers(len(ex), 6, i))
    return Store.open(path), examples


def best(values, k, sign):
    """Brute force: ties go to the lower place."""
    score = {"up": values, "down": -values, "both": values.abs()}[sign]
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return order, values.gather(1, order)


@pytest.mark.parametrize("sign", ["up", "down", "both"])
@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize(("k", "memory"), [(1, 1), (7, 3000), (10_000, "1MiB")])
def test_query_is_brute_force_with_ties(whole_numbers, monkeypatch, sign, by, k, memory):
    store, examples = whole_numbers
    monkeypatch.setattr("lddyn.store.query._QUERIES", 2)
    queries = integers(5, 6, 999)
    values = queries @ store.rows().float().T
    if by == "sequence":
        values = torch.stack([v.sum(1) for v in values.split([len(e) for e in examples], 1)], 1)
    index, truth = best(values, k, sign)
    hits = store.query(queries, k, sign=sign, by=by, memory=memory)
    assert torch.equal(hits.index, index) and torch.equal(hits.estimate.value, truth)
    assert hits.index.shape[1] == min(k, values.shape[1])
    assert len(hits) == 5 and not hits.estimate.stderr.any()


@pytest.mark.parametrize("by", ["token", "sequence"])
def test_query_keeps_within_its_memory(whole_numbers, monkeypatch, by):
    store, examples = whole_numbers
    value, seen = Pairing.value, []

    def watched(self, queries, rows):
        seen.append((len(queries), len(rows)))
        return value(self, queries, rows)

    monkeypatch.setattr(Pairing, "value", watched)
    store.query(integers(7, 6, 0), 3, by=by, memory=20_000)
    longest = max(map(len, examples))
    for m, n in seen:  # a row, its float32 copy; values and int64 keys with their parts
        assert n * (2 * 4 * 6 + 48 * m) <= 20_000 or (by == "sequence" and n <= longest)
    assert sum(n for _, n in seen) == len(store) and len(seen) > 5


def test_hits_name_tokens_and_sequences(whole_numbers):
    store, examples = whole_numbers
    queries = integers(2, 6, 5)
    hit = store.query(queries, 3, sign="up")[1][2]
    tokens = store.tokens(hit.row, hit.row + 1)
    example = examples[hit.example_index]
    assert hit.example_id == example.content_id == tokens.example_id[0]
    assert example.targets[hit.response_index] == hit.token_id
    assert example.positions[hit.response_index] == hit.position
    assert hit.value == float(queries[1] @ store.rows(hit.row, hit.row + 1)[0].float())
    whole = store.query(queries, 3, by="sequence")[0][0]
    assert whole.tokens == len(examples[whole.example_index]) and whole.token_id is None
    assert store.span(examples[whole.example_index]).start == whole.row


def test_hits_say_what_they_are(whole_numbers):
    store, _ = whole_numbers
    hits = store.query(integers(2, 6, 5), 3, by="sequence")
    document = json.loads(json.dumps(hits.to_dict()))
    assert [len(q) for q in document["queries"]] == [3, 3] and document["by"] == "sequence"
    assert document["queries"][0][0]["value"] == hits[0][0].value
    assert hits.summary()["largest"] == float(hits.estimate.value.max())
    lines = hits.explain().splitlines()
    assert lines[0] == "query 0" and len(lines) == 8 and hits[1][2].example_id in lines[-1]
    assert "3 strongest sequences for each of 2 queries" in repr(hits)
    assert "tensor" not in repr(hits) + repr(next(store.shards()))


@pytest.mark.parametrize("by", ["token", "sequence"])
def test_excluded_examples_are_left_out(whole_numbers, by):
    store, examples = whole_numbers
    gone = [examples[0], examples[3].content_id, "0" * 32]
    hits = store.query(integers(2, 6, 1), 10_000, by=by, exclude=gone, memory=3000)
    ids = {h.example_id for h in hits[0]}
    assert ids == {e.content_id for e in examples} - {examples[0].content_id, gone[1]}
    with pytest.raises(ValueError, match="nothing to choose from"):
        store.query(integers(1, 6, 1), exclude=examples)


@pytest.mark.parametrize("linear", [None, False, True])
@pytest.mark.parametrize("by", ["token", "sequence"])
def test_query_with_a_layout_has_standard_errors(tmp_path, by, linear):
    examples, layout = data_set(150), Repeats(6, 3, 0.5, linear)
    with Store.create(tmp_path / "s", IDENTITY, layout, shard=500) as store:
        for i, ex in enumerate(examples):
            store.append(ex, features(i, len(ex), 6))
    store = Store.open(tmp_path / "s")
    queries, rows = features(99, 3, 6), store.rows()
    with pytest.raises(ValueError, match="layout must be given"):
        store.query(queries)
    with pytest.raises(StoreIdentityError, match=r"layout\.repeats: stored 3, given 2"):
        store.query(queries, layout=Repeats(6, 2, 0.5))
    hits = store.query(queries, 4, layout=layout, by=by)
    full, lengths = layout.estimate(queries, rows), [len(e) for e in examples]
    values, errors = full.value, full.stderr
    if by == "sequence":
        values = torch.stack([v.sum(1) for v in values.split(lengths, 1)], 1)
        sums = torch.stack([r.sum(0) for r in rows.split(lengths)])
        exact = layout.estimate(queries, sums).stderr
        bound = torch.stack([e.sum(1) for e in errors.split(lengths, 1)], 1)
        assert (exact <= bound * (1 + 1e-5)).all()
        errors = exact if linear else bound
    index, truth = best(values, 4, "both")
    assert torch.equal(hits.index, index) and hits.estimate.samples == 3
    torch.testing.assert_close(hits.estimate.value, truth)
    torch.testing.assert_close(hits.estimate.stderr, errors.gather(1, index))
    remembered = Store.open(tmp_path / "s", layout=layout).query(queries, 4, by=by)
    assert torch.equal(remembered.index, index)


def test_zero_and_minus_zero_are_a_tie(tmp_path):
    ex = lddyn.Example([1], [2, 3, 4])
    with Store.create(tmp_path / "s", {}, 1) as store:
        store.append(ex, torch.tensor([[-0.0], [0.0], [-0.0]]))
    for sign in ("up", "down", "both"):
        hits = Store.open(tmp_path / "s").query(torch.ones(1, 1), 3, sign=sign)
        assert hits.index.tolist() == [[0, 1, 2]]


def test_query_refuses_what_it_cannot_answer(whole_numbers, tmp_path):
    store, _ = whole_numbers
    for kwargs, message in [
        ({"rows": torch.ones(1, 5)}, r"rows must be \(m, 6\), got \(1, 5\)"),
        ({"rows": torch.ones(6)}, "rows must be"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"sign": "left"}, "sign must be one of both, up, down, got 'left'"),
        ({"by": "batch"}, "by must be one of token, sequence"),
        ({"rows": torch.full((1, 6), torch.inf)}, "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.query(**{"rows": torch.ones(1, 6)} | kwargs)
    Store.create(tmp_path / "empty", {}, 6).close()
    with pytest.raises(ValueError, match="nothing to choose from"):
        Store.open(tmp_path / "empty").query(torch.ones(1, 6))
