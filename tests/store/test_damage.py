"""Kills, damage and other processes: nothing is lost, and nothing damaged is believed."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import time

import pytest
import store_torture
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_torture import contents, data_set, features, fill
from stores import IDENTITY, expected, filled_store

from lddyn import Store
from lddyn.errors import StoreCorruptError, StoreError, StoreLockedError
from lddyn.store import manifest


@pytest.fixture
def filled(tmp_path):
    return filled_store(tmp_path / "filled")


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


@pytest.mark.case("a store's manifest that was edited and sealed anew")
@pytest.mark.parametrize(
    "change",
    [
        *({"width": -1}, {"width": "x"}, {"shard_bytes": 0}),
        *({"dtype": ["float32"]}, {"identity": []}, {"layout": "x"}),
    ],
)
def test_a_manifest_of_other_types_is_named(tmp_path, change):
    """Also of a store without rows, whose journal belongs to any manifest."""
    with Store.create(tmp_path / "s", {"model": 1}, 4) as store:
        changed = {**store._manifest, **change}
    (tmp_path / "s" / "manifest.json").write_bytes(manifest.render(changed))
    (name,) = change
    with pytest.raises(StoreCorruptError, match=rf"manifest\.json: has no {name} that"):
        Store.open(tmp_path / "s")


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
