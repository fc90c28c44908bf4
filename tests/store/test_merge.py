"""Stores of several processes are merged into the files of one."""

import pytest
import store_torture
import torch
from store_torture import contents, data_set, features, fill
from stores import IDENTITY, expected

from lddyn import Store
from lddyn.errors import StoreError, StoreIdentityError
from lddyn.store.writer import Writer


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_merged_ranks_are_the_files_of_one(tmp_path, ranks):
    examples = data_set(400)
    fill(tmp_path / "one", examples, 6, 1500)
    paths = [tmp_path / f"rank{r}" for r in range(ranks)]
    for rank, path in enumerate(paths):
        with Store.create(path, store_torture.IDENTITY, 6, shard=1500) as store:
            for i in range(rank, len(examples), ranks):
                store.append(examples[i], features(i, len(examples[i]), 6), index=i)
    merged = Store.merge(paths[::-1], tmp_path / "merged")
    assert torch.equal(merged.rows(), expected(examples))
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")
    Store.merge(paths, tmp_path / "merged")  # again: nothing to do
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")


def ranks_with(tmp_path, *groups):
    paths = []
    for number, group in enumerate(groups):
        paths.append(tmp_path / f"r{number}")
        with Store.create(paths[-1], IDENTITY, 6) as store:
            for ex, index, seed in group:
                store.append(ex, features(seed, len(ex), 6), index=index)
    return paths


def test_merge_takes_a_shared_example_once_and_refuses_contradictions(tmp_path):
    a, b, c = data_set(200)[:3]
    paths = ranks_with(tmp_path, [(a, 0, 0), (b, 4, 1)], [(b, 1, 1), (c, 2, 2)])
    merged = Store.merge(paths, tmp_path / "out")
    assert merged.example_ids == [a.content_id, b.content_id, c.content_id]
    assert torch.equal(merged.rows(), expected([a, b, c]))
    for name, groups, message in [
        ("same index", ([(a, 0, 0)], [(b, 0, 1)]), "index 0 belongs to .* append with index="),
        ("other rows", ([(a, 0, 0)], [(a, 0, 1)]), "has different rows in"),
    ]:
        (tmp_path / name).mkdir()
        with pytest.raises(StoreError, match=message):
            Store.merge(ranks_with(tmp_path / name, *groups), tmp_path / name / "out")
    with pytest.raises(ValueError, match="out must be another folder"):
        Store.merge(paths, paths[1])
    with pytest.raises(ValueError, match="at least 1 store"):
        Store.merge([], tmp_path / "none")
    Store.create(tmp_path / "other", {"model": "x"}, 6).close()
    with pytest.raises(StoreIdentityError, match=r"identity\.model.*given 'x'"):
        Store.merge([paths[0], tmp_path / "other"], tmp_path / "never")
    with pytest.raises(StoreError, match="holds other examples"):
        Store.merge(paths[1:], tmp_path / "out")
    Store.merge(paths[1:], tmp_path / "on")
    longer = Store.merge(paths[:1], tmp_path / "on", append=True)
    assert longer.example_ids == [b.content_id, c.content_id, a.content_id]
    d = data_set(200)[3]
    for name, group, message in [
        (
            "taken",
            [(d, 5, 3), (data_set(200)[4], 1, 4)],
            "index 1 belongs to .* append with index=",
        ),
        ("changed", [(d, 5, 3), (a, 0, 9)], "has different rows in"),
    ]:
        (tmp_path / name).mkdir()
        with pytest.raises(StoreError, match=message):
            Store.merge(ranks_with(tmp_path / name, group), tmp_path / "on", append=True)
    assert Store.open(tmp_path / "on").example_ids == longer.example_ids  # nothing was added


def test_a_merge_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    examples = data_set(400)
    paths = ranks_with(tmp_path, *([(e, i, i)] for i, e in enumerate(examples)))
    whole = contents(Store.merge(paths, tmp_path / "whole").path)
    append, calls = Writer.append, iter(range(1000))

    def stop(self, *args, **kwargs):
        if next(calls) == 5:
            raise KeyboardInterrupt
        append(self, *args, **kwargs)
        self.flush()

    monkeypatch.setattr(Writer, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        Store.merge(paths, tmp_path / "cut")
    assert 0 < len(Store.open(tmp_path / "cut").example_ids) < len(examples)
    monkeypatch.setattr(Writer, "append", append)
    merged = Store.merge(paths, tmp_path / "cut")
    assert torch.equal(merged.rows(), expected(examples)) and len(whole) == 3
