"""The store: what is written is read back, and belongs to what made it."""

import copy
import json
import os
import sys
import threading
import time

import numpy as np
import pytest
import store_torture
import torch
from store_torture import contents, data_set, features, fill
from stores import IDENTITY, Repeats, expected, filled_store

import lddyn
from lddyn import Store, files
from lddyn.errors import StoreError, StoreIdentityError
from lddyn.store import lock, manifest
from lddyn.store.identity import identify


@pytest.fixture
def filled(tmp_path):
    return filled_store(tmp_path / "filled")


# --------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_tokens_come_back(tmp_path, dtype):
    examples = data_set(200)
    with Store.create(tmp_path / "s", IDENTITY, 6, dtype, shard=600) as store:
        for i, ex in enumerate(examples):
            store.append(ex, features(i, len(ex), 6))
    store = Store.open(tmp_path / "s", IDENTITY)
    assert torch.equal(store.rows(), expected(examples, dtype=dtype)) and store.dtype == dtype
    tokens = store.tokens()
    assert tokens.example_id == [e.content_id for e in examples for _ in e.targets]
    assert tokens.token_id.tolist() == [t for e in examples for t in e.targets]
    assert tokens.position.tolist() == [p for e in examples for p in e.positions]
    assert tokens.response_index.tolist() == [k for e in examples for k in range(len(e))]
    assert tokens.example_index.tolist() == [i for i, e in enumerate(examples) for _ in e.targets]
    assert len(store) == len(tokens) and all(store.has(e) for e in examples)
    assert store.verify() == []
    walked = torch.cat([shard.rows for shard in store.shards()])
    assert torch.equal(walked, store.rows())


def test_a_masked_response_keeps_its_places(tmp_path):
    ex = lddyn.Example([5, 6], [1, 2, 3], response_mask=[True, False, True])
    with Store.create(tmp_path / "s", {}, 2) as store:
        store.append(ex, torch.ones(2, 2))
    tokens = Store.open(tmp_path / "s").tokens()
    assert tokens.response_index.tolist() == [0, 2] and tokens.position.tolist() == [1, 3]
    assert tokens.token_id.tolist() == [1, 3]


def test_rows_of_any_range(filled):
    store, examples = filled
    truth = expected(examples)
    for a, b in [(0, 0), (0, 1), (3, 200), (len(truth) - 1, len(truth)), (len(truth),) * 2]:
        assert torch.equal(store.rows(a, b), truth[a:b])
        assert len(store.tokens(a, b)) == len(truth[a:b])
    span = store.span(examples[4])
    assert torch.equal(store.rows(span.start, span.stop), features(4, len(examples[4]), 6))
    for bad in [(-1, 2), (0, len(truth) + 1), (5, 4)]:
        with pytest.raises(IndexError, match=f"within 0:{len(truth)}"):
            store.rows(*bad)
    with pytest.raises(KeyError, match="not in"):
        store.span("0" * 32)


def test_rows_are_views_of_the_file_and_cannot_change_it(filled):
    store, _ = filled
    first = next(store.shards())
    assert store.rows(0, 3).data_ptr() == first.rows.data_ptr()
    assert np.shares_memory(store.rows(1, 3).numpy(), first.rows.numpy())
    before = contents(store.path)
    store.rows(0, 3).fill_(7.0)
    assert contents(store.path) == before
    assert not torch.equal(Store.open(store.path).rows(0, 3), torch.full((3, 6), 7.0))


def test_more_shards_than_are_mapped_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lddyn.store.shards._MAPPED", 2)
    examples = data_set(300)
    store = fill(tmp_path / "s", examples, 6, 512)
    assert (
        torch.equal(store.rows(), expected(examples)) and len(store._contents.shards._mapped) == 2
    )


def test_nothing_but_whole_examples_and_only_once(tmp_path):
    a, b = data_set(100)[:2]
    with Store.create(tmp_path / "s", IDENTITY, 4) as store:
        store.append(a, torch.ones(len(a), 4), index=7)
        assert len(store) == 0 and store.has(a) and not store.has(b)
        for bad, message in [
            ((a, torch.ones(len(a), 4)), "in the store already"),
            ((b, torch.ones(len(b), 4), None, 7), "index 7 belongs to another example"),
            ((b, torch.ones(len(b) + 1, 4)), rf"must be {len(b) + 1} integers"),
            ((b, torch.ones(len(b), 5)), r"rows must be floating \(n, 4\), got torch.float32"),
            ((b, torch.ones(len(b), 4, dtype=torch.int64)), "rows must be floating"),
            ((b, torch.ones(0, 4)), "at least 1 row"),
            ((b, torch.full((len(b), 4), torch.nan)), "finite in torch.float32, got nan in row 0"),
            ((b.content_id, torch.ones(3, 4)), "tokens must be given with a content id"),
            (("../" * 3, torch.ones(3, 4)), "content id, got '../../../'"),
            (("a\0b", torch.ones(3, 4)), "must be an Example or its content id"),
            ((b.content_id, torch.ones(3, 4), {"position": [1, 2, 3]}), "got no response_index"),
        ]:
            with pytest.raises(ValueError, match=message):
                store.append(*bad[:3], **({"index": bad[3]} if len(bad) > 3 else {}))
        columns = {"response_index": [0, 1], "position": [4, 5], "token_id": [2**31, 1]}
        with pytest.raises(ValueError, match="within 0"):
            store.append(b.content_id, torch.ones(2, 4), columns)
        columns["token_id"] = [2**31 - 1, 0]
        store.append(b.content_id, torch.ones(2, 4), columns)
    store = Store.open(tmp_path / "s")
    assert store.tokens().example_index.tolist() == [7] * len(a) + [1, 1]
    assert store.tokens().token_id.tolist()[-2:] == [2**31 - 1, 0]


def test_float16_does_not_overflow_silently(tmp_path):
    ex = data_set(1)[0]
    with Store.create(tmp_path / "s", {}, 2, "float16") as store:
        with pytest.raises(ValueError, match=r"finite in torch\.float16, got 1000000\.0 in row 0"):
            store.append(ex, torch.full((len(ex), 2), 1e6))
        assert not store.has(ex)


def test_shards_are_plain_safetensors(filled):
    from safetensors.torch import load_file

    store, examples = filled
    tensors = load_file(store.path / "shard-000000.safetensors")
    assert torch.equal(tensors["rows"], expected(examples)[: len(tensors["rows"])])
    assert bytes(tensors["example_id"][0].tolist()).hex() == examples[0].content_id


def test_arrow(filled, tmp_path):
    pa = pytest.importorskip("pyarrow")
    store, examples = filled
    store.rows()
    before = pa.total_allocated_bytes()
    table = store.to_arrow()
    grown = pa.total_allocated_bytes() - before
    assert grown < 100 * len(table)  # ids and numbers, not features
    assert table["token_id"].to_pylist() == [t for e in examples for t in e.targets]
    assert table["example_id"][0].as_py() == examples[0].content_id
    flat = np.concatenate([c.flatten().to_numpy() for c in table["features"].chunks])
    assert np.array_equal(flat.reshape(-1, 6), expected(examples).numpy())
    assert "features" not in store.to_arrow(features=False).column_names
    for dtype, kind in (("bfloat16", pa.float32()), ("float16", pa.float16())):
        with Store.create(tmp_path / dtype, {}, 6, dtype) as other:
            other.append(examples[0], features(0, len(examples[0]), 6))
            other.flush()
            column = other.to_arrow()["features"]
            assert column.type == pa.list_(kind, 6)
            truth = expected(examples[:1], dtype=other.dtype).float().numpy()
            assert np.array_equal(np.array(column.to_pylist(), dtype=np.float32), truth)


def test_arrow_is_asked_for_by_name(filled, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        filled[0].to_arrow()


# --------------------------------------------------------------------------- identity


def test_identity_names_every_field_that_differs(tmp_path):
    layout = Repeats(6)
    Store.create(tmp_path / "s", IDENTITY, layout).close()
    assert Store.open(tmp_path / "s", IDENTITY, layout=Repeats(6)).layout_json == layout.to_dict()
    other = {"model": {"weights": "xyz", "config": "def"}, "data": 3}
    with pytest.raises(StoreIdentityError) as caught:
        Store.open(tmp_path / "s", other, layout=Repeats(6, scale=2.0))
    text = str(caught.value)
    for part in (
        "model.weights: stored 'abc', given 'xyz'",
        "data: stored 'absent', given 3",
        "tokenizer: stored 't', given 'absent'",
        "layout.scale: stored 1.0, given 2.0",
    ):
        assert part in text
    assert "config" not in text and "\n" not in text and len(caught.value.fields) == 4
    with pytest.raises(StoreIdentityError, match="dtype: stored 'float32', given 'float16'"):
        Store.create(tmp_path / "s", IDENTITY, layout, "float16", exist_ok=True)
    with pytest.raises(StoreIdentityError, match="width: stored 6, given 8"):
        Store.create(tmp_path / "s", IDENTITY, Repeats(8), exist_ok=True)
    Store.create(tmp_path / "s", IDENTITY, layout, exist_ok=True).close()


def test_identify_sees_weights_tokenizer_and_data():
    import zoo

    class Words:
        chat_template = None

        def get_vocab(self):
            return {"a": 0, "b": 1}

    model, examples = zoo.build("llama"), data_set(200)
    first = identify(model, Words(), examples, seed=0)
    assert first == identify(model, Words(), examples, seed=0)
    assert {"model", "tokenizer", "data", "versions", "seed"} == set(first)
    other = Words()
    other.chat_template = "{{ messages }}"
    changed = identify(model, other, examples[::-1], seed=1)
    fields = set(manifest.differences(first, changed))
    assert fields == {"tokenizer.chat_template", "data.digest", "seed"}
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert set(manifest.differences(first, identify(model, Words(), examples, seed=0))) == {
        "model.weights"
    }
    with pytest.raises(ValueError, match="when must be JSON"):
        identify(model, when=time)


def test_identify_does_not_see_how_a_tokenizer_was_called_last():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?")
    model = torch.nn.Linear(1, 1)
    before = identify(model, words)
    words(["a b", "a"], padding=True, truncation=True, max_length=1)
    assert words.backend_tokenizer.padding is not None
    assert identify(model, words) == before
    words.add_tokens(["c"])
    changed = manifest.differences(before, identify(model, words))
    assert set(changed) == {"tokenizer.rules"}


def test_what_create_and_open_refuse(tmp_path, filled):
    with pytest.raises(StoreError, match="is a store already"):
        Store.create(filled[0].path, {}, 6)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("data")
    with pytest.raises(StoreError, match="must be empty, got 'precious'"):
        Store.create(tmp_path / "x", {}, 6)
    with pytest.raises(StoreError, match="cannot make a store"):
        Store.create(tmp_path / "x" / "precious", {}, 6)
    with pytest.raises(StoreError, match="no store here"):
        Store.open(tmp_path / "x")
    for kwargs, message in [
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"layout": 0}, "width of at least 1, got 0"),
        ({"shard": "much"}, "memory must look like"),
        ({"identity": {"a": object()}}, "identity must be JSON"),
        ({"identity": {"a": float("nan")}}, "identity must be JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            Store.create(tmp_path / "y", **{"identity": {}, "layout": 3} | kwargs)
    with pytest.raises(ValueError, match='mode must be "r" or "a"'):
        Store.open(filled[0].path, mode="w")
    assert not (tmp_path / "y").exists()


def test_a_creation_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    write = files.write_durably
    for cut in (0, 1):
        calls = iter(range(9))

        def stop(path, data, cut=cut, calls=calls):
            if next(calls) == cut:
                raise KeyboardInterrupt
            write(path, data)

        monkeypatch.setattr("lddyn.store.store.write_durably", stop)
        with pytest.raises(KeyboardInterrupt):
            Store.create(tmp_path / "s", {}, 3)
        with pytest.raises(StoreError, match="no store here"):
            Store.open(tmp_path / "s")
    monkeypatch.setattr("lddyn.store.store.write_durably", write)
    Store.create(tmp_path / "s", {}, 3).close()
    assert len(Store.open(tmp_path / "s")) == 0


def test_files_have_the_mode_that_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        store = fill(tmp_path / "s", data_set(30), 6, 2**20)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in store.path.iterdir()}
    assert set(modes.values()) == {0o640}


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("untouched")
    with Store.create(tmp_path / "s", {}, 6) as store:
        (store.path / "incoming.tmp").symlink_to(tmp_path / "victim")
        store.append(data_set(1)[0], features(0, len(data_set(1)[0]), 6))
    assert (tmp_path / "victim").read_text() == "untouched"


@pytest.mark.parametrize("name", ["lock", "journal.jsonl"])
def test_a_link_in_the_place_of_a_file_of_the_store_is_refused(tmp_path, name):
    """In a shared folder, somebody may plant links to files that are none of the store's."""
    store = fill(tmp_path / "s", data_set(2), 6, 2**20)
    (tmp_path / "victim").write_text("untouched")
    (store.path / name).unlink()
    (store.path / name).symlink_to(tmp_path / "victim")
    with pytest.raises(lddyn.StoreError), Store.open(store.path, mode="a") as again:
        again.append(data_set(3)[2], features(2, len(data_set(3)[2]), 6))
    assert (tmp_path / "victim").read_text() == "untouched"
    (store.path / name).unlink()
    os.mkfifo(store.path / name)
    with pytest.raises(lddyn.StoreError):
        Store.open(store.path, mode="a")


# --------------------------------------------------------------------------- the whole


def test_a_store_says_what_it_is(filled):
    store, _ = filled
    text = repr(store)
    assert f"{len(store)} tokens of 12 examples" in text and "6 × float32" in text
    assert store.nbytes == sum(p.stat().st_size for p in store.path.glob("*.safetensors"))
    written = json.loads((store.path / "manifest.json").read_text())
    assert written["manifest"]["identity"] == store_torture.IDENTITY
    assert json.loads(json.dumps(store.to_dict()))["identity"] == store_torture.IDENTITY
    assert store.summary()["tokens"] == len(store) and store.explain().startswith(str(store.path))


# --------------------------------------------------------------------------- threads


@pytest.mark.case("threads: one Store object")
def test_threads_share_one_store_object(tmp_path):
    """Two threads append and a third one reads: everything that was appended is there, whole."""
    store = Store.create(tmp_path / "s", IDENTITY, 6, shard=200)
    examples, errors, reading = data_set(80), [], threading.Event()

    def append(part):
        try:
            for i in range(part, len(examples), 2):
                store.append(examples[i], features(i, len(examples[i]), 6), index=i)
        except Exception as error:
            errors.append(error)

    def read():
        try:
            while not reading.is_set():
                known = len(store)
                assert len(store.rows(0, known)) == len(store.tokens(0, known)) == known
                if known:
                    assert store.query(torch.ones(1, 6), k=3).estimate.value.isfinite().all()
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=append, args=(part,)) for part in range(2)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    reading.set()
    reader.join()
    store.close()
    assert not errors
    opened = Store.open(tmp_path / "s", IDENTITY)
    assert opened.verify() == [] and len(opened.example_ids) == len(examples)
    for i, example in enumerate(examples):
        rows = opened.rows(opened.span(example).start, opened.span(example).stop)
        assert torch.equal(rows, features(i, len(example), 6))
        assert opened.example_at(i) == example.content_id


def test_a_copied_and_a_forked_store_wait_for_nobody(filled):
    store, _ = filled
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with store._mutex.lock:
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    twin = copy.copy(store._mutex)
    assert twin.lock.acquire(blocking=False)
    child = os.fork()
    if child == 0:
        os._exit(0 if store._mutex.lock.acquire(timeout=1) else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()


def test_a_store_that_is_open_when_python_ends_says_nothing(tmp_path, monkeypatch):
    """Modules are gone then, before the last objects are."""
    held = lock.Lock(tmp_path / "lock")
    monkeypatch.setattr(lock, "os", None)
    held.__del__()
    monkeypatch.undo()
    lock.Lock(tmp_path / "lock").release()
