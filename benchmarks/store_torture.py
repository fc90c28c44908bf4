"""Kills a store's writer, and damages its files, and counts what was lost.

python benchmarks/store_torture.py --out benchmarks/results/NAME.json    # 50 kills, 10,000 files
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lddyn
from lddyn.errors import StoreError
from lddyn.store.store import Store

IDENTITY = {"model": "torture", "seed": 0}


def example(index: int) -> lddyn.Example:
    """One of a data set that anybody can make again: 1 to 80 response tokens."""
    count = random.Random(index).randint(1, 80)
    return lddyn.Example([index + 1, 2], [1 + (index * 7 + k) % 1000 for k in range(count)])


def features(index: int, count: int, width: int) -> torch.Tensor:
    """Its rows."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(count, width, generator=generator)


def data_set(tokens: int) -> list[lddyn.Example]:
    """Examples with this many tokens together, to within one example."""
    found: list[lddyn.Example] = []
    total = 0
    while total < tokens:
        found.append(example(len(found)))
        total += len(found[-1])
    return found


def fill(
    path: Path, examples: list[lddyn.Example], width: int, shard: int, tell: int = -1
) -> Store:
    """Appends what is not there yet, as a resumed run does; tells a pipe what is on disk."""
    with Store.create(path, IDENTITY, width, shard=shard, exist_ok=True) as store:
        for index, ex in enumerate(examples):
            if not store.has(ex):
                before = len(store)
                store.append(ex, features(index, len(ex), width), index=index)
                if tell >= 0 and len(store) > before:
                    os.write(tell, len(store).to_bytes(8, "little"))
    return Store.open(path)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "lock"}


def kill(
    path: Path, examples: list[lddyn.Example], width: int, shard: int, kills: int, seed: int = 0
) -> dict[str, Any]:
    """Writes in child processes that are killed at random moments until the data set is stored."""
    rng = random.Random(seed)
    total = sum(map(len, examples))
    steps = total * width * 4 / shard  # flushes
    counts = {
        "rounds": 1,
        "kills": 0,
        "acknowledged": 0,
        "lost": 0,
        "duplicated": 0,
        "adopted": 0,
        "torn": 0,
    }
    while True:
        pipe, end = os.pipe()
        child = os.fork()
        if child == 0:  # only files from here on; leaves without Python's clean-up
            status = 1
            try:
                torch.set_num_threads(1)
                os.close(pipe)
                fill(path, examples, width, shard, end)
                status = 0
            finally:
                os._exit(status)
        os.close(end)
        told, wanted = b"", rng.randint(0, max(1, round(steps / kills)))
        if counts["kills"] < kills:
            while len(told) < 8 * wanted and (chunk := os.read(pipe, 8)):
                told += chunk
            time.sleep(rng.uniform(0, 0.008))
            os.kill(child, signal.SIGKILL)
        while chunk := os.read(pipe, 4096):
            told += chunk
        os.close(pipe)
        status = os.waitpid(child, 0)[1]
        acknowledged = int.from_bytes(told[-8:], "little") if told else 0
        counts["acknowledged"] = max(counts["acknowledged"], acknowledged)
        if os.WIFSIGNALED(status):
            counts["kills"] += 1
        elif status != 0:
            raise RuntimeError("a writer failed; its traceback is above")
        if (path / "manifest.json").exists():
            journal = (path / "journal.jsonl").read_bytes()
            counts["torn"] += not journal.endswith(b"\n") and bool(journal)
            counts["adopted"] += len(list(path.glob("shard-*.safetensors"))) > journal.count(b"\n")
            store = Store.open(path)  # a reader, before any writer has put things in order
            counts["lost"] += max(0, counts["acknowledged"] - len(store))
            ids = [i for s in store.shards() for i in dict.fromkeys(s.tokens.example_id)]
            counts["duplicated"] += len(ids) - len(set(ids))
        if status == 0:
            counts["lost"] += total - len(Store.open(path))
            if counts["kills"] >= kills:
                return counts
            shutil.rmtree(path)  # it was faster than its killer: once more
            counts["rounds"] += 1
            counts["acknowledged"] = 0


# ---------------------------------------------------------------------------------------------
# Damage


def mutate(
    files: dict[str, bytes], others: dict[str, bytes], rng: random.Random
) -> tuple[str, Any]:
    """A kind of damage and the files after it (None: deleted)."""
    shards = [n for n in files if n.startswith("shard")]
    kind = rng.choice(
        [
            "bit",
            "bit",
            "byte",
            "truncate",
            "insert",
            "zero",
            "delete",
            "empty",
            "append",
            "swap shards",
            "foreign",
            "header",
            "cut line",
            "swap lines",
            "repeat line",
            "drop line",
            "split",
            "rename",
        ]
    )
    name = rng.choice(["manifest.json", "journal.jsonl", rng.choice(shards)])
    data = bytearray(files[name])
    at = rng.randrange(len(data))
    span = rng.choice([1, 2, 8, 64, 512, 4096])
    noise = rng.randbytes(span)
    lines = files["journal.jsonl"].splitlines(keepends=True)
    i, j = rng.sample(range(len(lines)), 2)
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "truncate":
        del data[at:]
    elif kind == "insert":
        data[at:at] = noise
    elif kind == "zero":
        data[at : at + span] = bytes(len(data[at : at + span]))
    elif kind == "delete":
        return kind, {name: None}
    elif kind == "empty":
        data.clear()
    elif kind == "append":
        data += noise
    elif kind == "swap shards":
        a, b = rng.sample(shards, 2)
        return kind, {a: files[b], b: files[a]}
    elif kind == "foreign":  # a sound file of another store with the same names
        return kind, {name: others[name]}
    elif kind == "header":  # of a shard: where tensors begin and what they are called
        name = rng.choice(shards)
        data = bytearray(files[name])
        at = rng.randrange(8 + int.from_bytes(data[:8], "little"))
        data[at : at + 8] = noise[:8].ljust(8, b"\x7f")
    elif kind == "split":  # what several power cuts could leave: the ends of two files
        other = rng.choice(list(files))
        return kind, {name: bytes(data[:at]), other: files[other][: rng.randrange(9999)]}
    elif kind == "rename":
        name = rng.choice(shards)
        return kind, {name: None, f"shard-{rng.randrange(12):06d}.safetensors": files[name]}
    else:
        name = "journal.jsonl"
        if kind == "cut line":
            lines[i] = lines[i][: rng.randrange(len(lines[i]))]
        elif kind == "swap lines":
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == "repeat line":
            lines.insert(j, lines[i])
        else:
            del lines[i:]
        data = bytearray(b"".join(lines))
    return kind, {name: bytes(data)}


def load(path: Path, mode: Any) -> Any:
    """Everything that a store says."""
    store = Store.open(path, mode=mode)
    try:
        said = [store.identity, store.width, len(store), store.example_ids, store.rows().tolist()]
        tokens = store.tokens()
        said += [tokens.example_id, tokens.example_index.tolist(), tokens.token_id.tolist()]
        said += [tokens.response_index.tolist(), tokens.position.tolist()]
        return said
    finally:
        store.close()


def damage(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Opens and reads `count` damaged stores; half as a writer, which repairs what kills leave."""
    rng = random.Random(seed)
    path = folder / "whole"
    examples = data_set(150)
    files = contents(fill(path, examples, 4, 512).path)
    others = contents(fill(folder / "other", examples[::-1], 4, 512).path)
    truth = load(path, "r")
    result: dict[str, Any] = {"files": count, "refused": 0, "right": 0, "silently_wrong": 0}
    result |= {"crashes": 0, "kinds": {}, "first": []}
    for number in range(count):
        kind, changed = mutate(files, others, rng)
        for name, data in changed.items():
            if data is None:
                (path / name).unlink()
            else:
                (path / name).write_bytes(data)
        mode = "ra"[number % 2]
        try:
            outcome = "right" if load(path, mode) == truth else "silently_wrong"
        except StoreError:
            outcome = "refused"
        except Exception as error:
            outcome = "crashes"
            result["first"].append(f"{kind} of {list(changed)}: {type(error).__name__}: {error}")
        if outcome == "silently_wrong":
            result["first"].append(f"{kind} of {list(changed)}")
        if outcome == "refused" and mode == "a":  # a writer must not make it worse
            kept = contents(path)
            spoilt = [n for n, d in changed.items() if d is not None and kept.get(n) != d]
            if spoilt:
                result["crashes"] += 1
                result["first"].append(f"{kind}: the refused writer changed {spoilt}")
        result[outcome] += 1
        tally = result["kinds"].setdefault(kind, {})
        tally[outcome] = tally.get(outcome, 0) + 1
        for file in path.iterdir():
            if file.name != "lock" and file.name not in files:
                file.unlink()
        for name in files:
            if name in changed or mode == "a":
                (path / name).write_bytes(files[name])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--shard", type=int, default=2**18)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--files", type=int, default=10_000)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="store-torture-"))
    try:
        examples = data_set(asked.tokens)
        began = time.perf_counter()
        whole = fill(folder / "once", examples, asked.width, asked.shard)
        once = time.perf_counter() - began
        began = time.perf_counter()
        killed = kill(folder / "killed", examples, asked.width, asked.shard, asked.kills)
        killed["seconds"] = time.perf_counter() - began
        same = contents(folder / "once") == contents(folder / "killed")
        killed |= {"bit_identical": same, "tokens": len(whole), "shards": whole.n_shards}
        killed |= {"bytes": whole.nbytes, "examples": len(examples), "uninterrupted_seconds": once}
        print("killed:", killed, flush=True)
        rows = [features(i, len(ex), asked.width) for i, ex in enumerate(examples)]
        began = time.perf_counter()
        with Store.create(folder / "large", IDENTITY, asked.width) as store:
            for ex, made in zip(examples, rows, strict=True):
                store.append(ex, made)
        large = Store.open(folder / "large")
        write = large.nbytes / (time.perf_counter() - began) / 2**30
        began = time.perf_counter()
        problems = large.verify()
        verify = large.nbytes / (time.perf_counter() - began) / 2**30
        queries = large.rows(0, 64)
        began = time.perf_counter()
        large.query(queries, k=10)
        query = time.perf_counter() - began
        speed = {
            "write_gib_per_second": write,
            "verify_gib_per_second": verify,
            "problems": problems,
        }
        speed |= {"query_seconds": query, "queries": len(queries), "k": 10}
        print("speed:", speed, flush=True)
        began = time.perf_counter()
        damaged = damage(folder, asked.files)
        damaged["seconds"] = time.perf_counter() - began
        print("damaged:", damaged, flush=True)
        if asked.out:
            from record import record

            result = {"killed": killed, "damaged": damaged, "speed": speed, "width": asked.width}
            record(asked.out, "store", result)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
