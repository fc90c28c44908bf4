"""Building a store: resumed, extended, and by several processes, always the same files."""

import json
from pathlib import Path

import pytest
import torch
import zoo

import lddyn
from lddyn.errors import StoreIdentityError
from lddyn.ranks import Ranks
from lddyn.store.build import build_store

SKETCH = lddyn.Sketch(k=900)


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama").eval()


@pytest.fixture(scope="module")
def examples():
    return [lddyn.Example([5, 9, i], [21, 9 + i, 40][: 1 + i % 3]) for i in range(6)]


def files(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.name != "lock"}


def test_a_store_is_built_and_extended(model, examples, tmp_path):
    first = build_store(model, examples[:4], tmp_path / "s", SKETCH)
    assert first.written == len(first.store.example_ids) == 4 and first.processes == 1
    assert json.loads(json.dumps(first.to_dict()))["written"] == 4
    whole = build_store(model, [*examples, examples[0]], tmp_path / "s", SKETCH)
    assert whole.written == 2 and whole.store.example_at(6) is None  # the last is the first again
    assert whole.store.layout == first.store.layout
    assert build_store(model, examples, tmp_path / "s", SKETCH).written == 0
    hits = whole.store.query(whole.store.rows(0, 1), 2)
    assert hits[0][0].example_index == 0 and bool((hits.estimate.stderr > 0).any())


@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_files_of_one(model, examples, tmp_path, world, by):
    def build(some):
        for rank in reversed(range(world)):  # one after the other, the one that merges last
            built = build_store(
                model, some, tmp_path / "s", SKETCH, by=by, ranks=Ranks(rank, world)
            )
            assert (built is None) == (rank > 0)
        assert not list(tmp_path.glob("s.rank-*"))
        return built

    build_store(model, examples, tmp_path / "one", SKETCH, by=by)
    assert build(examples).written == 6 and build(examples).written == 0
    assert files(tmp_path / "s") == files(tmp_path / "one")


def test_several_processes_extend_a_store(model, examples, tmp_path):
    build_store(model, examples[:1], tmp_path / "s", SKETCH)
    for rank in (1, 0):
        built = build_store(model, examples, tmp_path / "s", SKETCH, ranks=Ranks(rank, 2))
    assert built.written == 5 and built.processes == 2
    alone = build_store(model, examples[:1], tmp_path / "one", SKETCH)
    alone = build_store(model, examples, tmp_path / "one", SKETCH)
    assert alone.store.example_ids == built.store.example_ids
    assert torch.equal(alone.store.rows(), built.store.rows())


def test_another_model_sketch_or_dtype_is_refused(model, examples, tmp_path):
    build_store(model, examples[:2], tmp_path / "s", SKETCH)
    for changes, field in [
        ({"sketch": lddyn.Sketch(k=904)}, "layout.sketch.k: stored 900, given 904"),
        ({"dtype": "bfloat16"}, "dtype: stored 'float32', given 'bfloat16'"),
        ({"by": "sequence"}, "rows: stored 'token', given 'sequence'"),
        ({"model": zoo.build("gpt2").eval()}, "model.weights"),
    ]:
        arguments = {"model": model, "examples": examples, "path": tmp_path / "s", "sketch": SKETCH}
        with pytest.raises(StoreIdentityError, match=field):
            build_store(**arguments | changes)
    with pytest.raises(ValueError, match="at least one Example"):
        build_store(model, [], tmp_path / "empty", SKETCH)
