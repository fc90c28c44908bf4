"""The store: what is written is there, whatever happens; what is damaged is never believed."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import store_torture
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_torture import contents, data_set, features, fill

import lddyn
from lddyn import Estimate, Store, files
from lddyn.errors import StoreCorruptError, StoreError, StoreIdentityError, StoreLockedError
from lddyn.store import manifest
from lddyn.store.identity import identify
from lddyn.store.query import Pairing
from lddyn.store.writer import Writer

IDENTITY = {"model": {"weights": "abc", "config": "def"}, "tokenizer": "t"}


class Repeats:
    """A stand-in for a sketch's layout: the mean of independent repeats, with its error."""

    def __init__(self, width, repeats=2, scale=1.0, linear=None):
        self.width, self.repeats, self.scale = width, repeats, scale
        if linear is not None:
            self.linear = linear

    def _parts(self, a, b):
        shape = (-1, self.repeats, self.width // self.repeats)
        return torch.einsum("nrk,mrk->nmr", a.view(shape), b.view(shape)) * self.scale

    def value(self, a, b):
        return self._parts(a, b).mean(2)

    def estimate(self, a, b):
        parts = self._parts(a, b)
        return Estimate(parts.mean(2), parts.std(2) / self.repeats**0.5, self.repeats)

    def to_json(self):
        return {"kind": "repeats", "repeats": self.repeats, "scale": self.scale}


@pytest.fixture
def filled(tmp_path):
    """A store of 12 examples in several shards, and its data."""
    examples = data_set(700)[:12]
    store = fill(tmp_path / "filled", examples, 6, 1024)
    assert store.n_shards > 3
    return store, examples


def expected(examples, width=6, dtype=torch.float32):
    return torch.cat([features(i, len(e), width) for i, e in enumerate(examples)]).to(dtype)


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
    assert Store.open(tmp_path / "s", IDENTITY, layout=Repeats(6)).layout_json == layout.to_json()
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
    put = files.put
    for cut in (0, 1):
        calls = iter(range(9))

        def stop(path, data, cut=cut, calls=calls):
            if next(calls) == cut:
                raise KeyboardInterrupt
            put(path, data)

        monkeypatch.setattr("lddyn.store.store.put", stop)
        with pytest.raises(KeyboardInterrupt):
            Store.create(tmp_path / "s", {}, 3)
        with pytest.raises(StoreError, match="no store here"):
            Store.open(tmp_path / "s")
    monkeypatch.setattr("lddyn.store.store.put", put)
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


# --------------------------------------------------------------------------- kills and damage


def test_killed_writers_lose_nothing(tmp_path):
    examples = data_set(12_000)
    fill(tmp_path / "once", examples, 16, 2**14)
    counts = store_torture.kill(tmp_path / "killed", examples, 16, 2**14, kills=6)
    assert counts["kills"] == 6 and counts["lost"] == counts["duplicated"] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "once")


@pytest.mark.parametrize("seed", range(2))
def test_damage_is_never_believed(tmp_path, seed):
    result = store_torture.damage(tmp_path, 1000, seed=seed + 1)
    assert result["silently_wrong"] == result["crashes"] == 0, result["first"]
    assert result["refused"] > 500 and result["right"] > 20


def test_every_prefix_of_the_journal_is_the_whole_store_or_refused(filled):
    """What a power cut may leave: shards are older than the lines that list them."""
    store, examples = filled
    files, truth = contents(store.path), expected(examples)
    journal = files["journal.jsonl"]
    for cut in [*range(0, len(journal), 37), len(journal) - 1]:
        for mode in ("r", "a"):
            (store.path / "journal.jsonl").write_bytes(journal[:cut])
            with Store.open(store.path, mode=mode) as again:
                assert torch.equal(again.rows(), truth)
            after = (store.path / "journal.jsonl").read_bytes()
            assert after == (journal if mode == "a" else journal[:cut])
    # Without the shard, a journal that ends in half its line is damage, and is left alone.
    last = store.path / f"shard-{store.n_shards - 1:06d}.safetensors"
    last.unlink()
    for mode in ("r", "a"):
        (store.path / "journal.jsonl").write_bytes(journal[:-9])
        with pytest.raises(StoreCorruptError, match=rf"{last.name}: this shard is missing"):
            Store.open(store.path, mode=mode)
        assert (store.path / "journal.jsonl").read_bytes() == journal[:-9]


def test_damage_is_named_and_verify_finds_it(filled):
    store, _ = filled
    path = store.path / "shard-000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fresh = Store.open(store.path)
    (problem,) = fresh.verify()
    assert "shard-000002.safetensors: checksum does not match" in problem
    start = fresh._contents.starts[2]
    fresh.rows(0, start)  # the others can be read
    with pytest.raises(StoreCorruptError, match="shard-000002"):
        fresh.rows(0, start + 1)
    with pytest.raises(StoreCorruptError, match="shard-000002"):
        fresh.query(torch.ones(1, 6))
    path.write_bytes(data[:-1])
    with pytest.raises(StoreCorruptError, match=rf"must have {len(data)} bytes, got"):
        Store.open(store.path)


def test_a_shard_damaged_after_its_first_use_is_noticed_by_verify(filled):
    store, _ = filled
    store.rows()
    path = store.path / "shard-000001.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 4]))
    assert len(store.verify()) == 1


def test_a_manifest_of_another_version(filled):
    store, _ = filled
    changed = dict(store._manifest, format=2)
    (store.path / "manifest.json").write_bytes(manifest.render(changed))
    with pytest.raises(StoreError, match="format must be 1, got 2"):
        Store.open(store.path)
    for text in (b"[" * 100_000, b"{}", b"null", b'{"manifest": 3}', b"\xff\xfe", b"1" * 5000):
        (store.path / "manifest.json").write_bytes(text)
        with pytest.raises(StoreCorruptError, match=r"manifest\.json: damaged"):
            Store.open(store.path)
    with open(store.path / "manifest.json", "wb") as file:
        file.truncate(2**25)
    with pytest.raises(StoreCorruptError, match="larger than"):
        Store.open(store.path)


def test_a_shard_with_a_huge_header_is_refused_at_once(filled):
    store, _ = filled
    path = store.path / f"shard-{store.n_shards:06d}.safetensors"
    with open(path, "wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**30)
    began = time.perf_counter()
    with pytest.raises(StoreCorruptError, match="no header of a shard"):
        Store.open(store.path)
    assert time.perf_counter() - began < 1


def test_nothing_is_relied_on_before_it_is_synced(tmp_path, monkeypatch):
    """Content, then name, then journal: what power cuts need, and kills cannot show."""
    examples, order = data_set(200), []
    store = Store.create(tmp_path / "s", {}, 6)
    for name in ("pwrite", "fsync", "replace"):
        real = getattr(os, name)

        def call(first, *args, name=name, real=real):
            path = first if name == "replace" else os.readlink(f"/proc/self/fd/{first}")
            order.append(f"{name} {os.path.basename(path)}")
            return real(first, *args)

        monkeypatch.setattr(os, name, call)
    store.append(examples[0], features(0, len(examples[0]), 6))
    store.flush()
    assert order == [
        "pwrite incoming.tmp",
        "fsync incoming.tmp",
        "replace incoming.tmp",
        "fsync s",
        "pwrite journal.jsonl",
        "fsync journal.jsonl",
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_fails_at_any_call_leaves_a_whole_store(tmp_path, monkeypatch, code):
    """Every system call of a flush fails once, half way where it can; the next flush succeeds."""
    examples = data_set(200)[:4]
    real = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "replace", "ftruncate")}
    fail_at, calls, tried = 0, 0, set()

    def failing(name):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                tried.add(name)
                if name == "pwrite":
                    real["pwrite"](args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    for fail_at in range(1, 40):
        folder = tmp_path / str(fail_at)
        fill(folder, examples[:2], 6, 2**20)
        calls = 0
        with Store.open(folder, mode="a") as store:
            store.append(examples[2], features(2, len(examples[2]), 6))
            with monkeypatch.context() as patch:
                for name in real:
                    patch.setattr(os, name, failing(name))
                calls = 0
                try:
                    store.flush()
                    failed = False
                except StoreError as error:
                    failed = True
                    assert os.strerror(code) in str(error) and "1 examples wait" in str(error)
                calls = 99
            assert store.has(examples[2])
            between = Store.open(folder)  # what another process sees now
            assert len(between) in (len(expected(examples[:2])), len(expected(examples[:3])))
            assert torch.equal(between.rows(), expected(examples)[: len(between)])
            store.append(examples[3], features(3, len(examples[3]), 6))
        again = Store.open(folder)
        assert torch.equal(again.rows(), expected(examples)) and again.verify() == []
        assert not (folder / "incoming.tmp").exists()
        if not failed:
            break
    assert not failed and tried >= {"open", "pwrite", "fsync", "replace"}


def test_a_file_limit_of_the_system_is_survived(tmp_path):
    """The kernel itself stops writing in the middle of a shard."""
    resource = pytest.importorskip("resource")
    import signal

    examples = data_set(400)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store.create(tmp_path / "s", store_torture.IDENTITY, 6)
    try:
        for i, ex in enumerate(examples):
            store.append(ex, features(i, len(ex), 6))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(StoreError, match="File too large"):
            store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(Store.open(store.path)) == 0 and len(store) == 0
    store.close()
    assert torch.equal(Store.open(store.path).rows(), expected(examples))


# --------------------------------------------------------------------------- two processes


def test_a_second_writer_is_refused_and_told_who_writes(filled):
    store, _ = filled
    with Store.open(store.path, mode="a"):
        began = time.perf_counter()
        with pytest.raises(StoreLockedError, match=rf"written by process {os.getpid()} on"):
            Store.open(store.path, mode="a")
        assert time.perf_counter() - began < 1
        with pytest.raises(StoreLockedError):
            Store.create(store.path, store_torture.IDENTITY, 6, exist_ok=True)
        Store.open(store.path).rows()
    Store.open(store.path, mode="a").close()
    (store.path / "lock").write_bytes(b"process 1 on nowhere\n\xff")  # of a writer that was killed
    Store.open(store.path, mode="a").close()


def test_the_lock_ends_with_its_object(tmp_path):
    store = Store.create(tmp_path / "s", {}, 2)
    with pytest.raises(StoreLockedError):
        Store.open(tmp_path / "s", mode="a")
    del store
    gc.collect()
    Store.open(tmp_path / "s", mode="a").close()


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, time, lddyn; s = lddyn.Store.create(sys.argv[1], {}, 2); print(1, flush=True);"
        "time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(StoreLockedError, match=f"process {child.pid} on"):
        Store.open(tmp_path / "s", mode="a")
    child.kill()
    child.wait()
    child.stdout.close()
    Store.open(tmp_path / "s", mode="a").close()


def test_a_forked_worker_neither_writes_nor_keeps_the_lock(tmp_path):
    ex = data_set(1)[0]
    store = Store.create(tmp_path / "s", {}, 6)
    store.append(ex, features(0, len(ex), 6))
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.flush()
            verdict = b"wrote"
        except StoreError as error:
            verdict = b"refused" if "forked" in str(error) else b"other"
        os.write(ready[1], verdict)
        os.read(go[0], 1)  # outlives the writer
        os._exit(0)
    assert os.read(ready[0], 99) == b"refused"
    with pytest.raises(StoreLockedError):  # the child let go, the parent did not
        Store.open(tmp_path / "s", mode="a")
    store.close()
    Store.open(tmp_path / "s", mode="a").close()
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    for fd in (*ready, *go):
        os.close(fd)
    with pytest.raises(StoreError, match="not open for writing"):
        store.append(ex, torch.ones(len(ex), 6))


def test_reading_while_another_process_writes(tmp_path):
    examples = data_set(6000)
    truth = expected(examples)
    Store.create(tmp_path / "s", store_torture.IDENTITY, 6, shard=1024).close()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        status = 1
        try:
            fill(tmp_path / "s", examples, 6, 1024)
            status = 0
        finally:
            os._exit(status)
    seen, sizes = Store.open(tmp_path / "s"), set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        for store in (seen, Store.open(tmp_path / "s")):
            store.refresh()
            sizes.add(len(store))
            assert torch.equal(store.rows(), truth[: len(store)])
    seen.refresh()
    assert seen.refresh() == 0 and torch.equal(seen.rows(), truth)
    assert len(sizes) > 1 and seen.verify() == []


def test_a_block_that_fails_writes_what_a_kill_would_have(tmp_path):
    examples = data_set(60)
    identity = store_torture.IDENTITY
    with (
        pytest.raises(RuntimeError, match="my own"),
        Store.create(tmp_path / "s", identity, 6) as store,
    ):
        store.append(examples[0], features(0, len(examples[0]), 6))
        raise RuntimeError("my own")
    assert len(Store.open(tmp_path / "s")) == 0
    assert len(fill(tmp_path / "s", examples, 6, 2**20)) == len(expected(examples))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from(["append", "append", "append", "flush", "reopen", "abandon", "read"]),
        max_size=25,
    ),
    st.sampled_from([1, 300, 2**20]),
)
def test_any_sequence_of_actions_keeps_what_was_flushed(tmp_path, actions, shard):
    """Against a list: what is flushed stays, what is not may go; order and content hold."""
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    examples = data_set(1500)[:25]
    store = Store.create(folder, IDENTITY, 6, shard=shard)
    given_, flushed = [], 0
    for action in actions:
        if action == "append":
            i = next(i for i in range(25) if i not in given_)
            store.append(examples[i], features(i, len(examples[i]), 6), index=i)
            given_.append(i)
        elif action == "flush":
            store.flush()
        elif action == "reopen":
            store.close()
        if action != "abandon":
            flushed = len(store.example_ids)
        else:
            store._writer.lock.release()
            given_ = given_[:flushed]
        if action in ("reopen", "abandon"):
            store = Store.open(folder, IDENTITY, mode="a")
        assert [store.has(e) for e in examples] == [i in given_ for i in range(25)]
        reader = Store.open(folder)
        kept = given_[:flushed]
        assert reader.example_ids == [examples[i].content_id for i in kept]
        truth = [features(i, len(examples[i]), 6) for i in kept]
        assert torch.equal(reader.rows(), torch.cat([torch.empty(0, 6), *truth]))
    store.close()


# --------------------------------------------------------------------------- merging


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


# --------------------------------------------------------------------------- many against many


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
