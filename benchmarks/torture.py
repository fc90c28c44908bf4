"""Breaks lddyn in every way that docs/reliability.md promises to survive, and counts.

export PYTHONPATH=.:tests:tests/engine            # as `make torture` does
python benchmarks/torture.py                      # goes on where it stopped
python benchmarks/torture.py --only threads       # one promise
python benchmarks/torture.py --docs               # writes the table of docs/reliability.md

Attempt number n of a promise always does the same. The counts are in one JSON file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damaged
import interrupts
import power
import store_torture
import test_results
import test_turns
import torch
import zoo
from damaged import Attempts, problem

import lddyn
from lddyn.data.audit import audit
from lddyn.data.read import placed_rows
from lddyn.errors import StoreError
from lddyn.files import replace_file

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Promise:
    """One row of the table."""

    name: str
    words: str
    target: int
    attempts: Attempts


# --------------------------------------------------------------------------- stores


def damaged_stores(folder: Path, first: int) -> Iterator[str]:
    """Damages stores, in batches of 200."""
    number = first
    while True:
        place = folder / "stores"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        result = store_torture.damage(place, 200, seed=number // 200 + 1000)
        bad = result["silently_wrong"] + result["crashes"]
        yield from result["first"][:bad] or [""] * bad
        yield from [""] * (200 - bad)
        number += 200


def killed_writers(folder: Path, first: int) -> Iterator[str]:
    """Kills writers of a store, 10 a store, and compares it with one that was not interrupted."""
    examples = store_torture.data_set(6000)
    whole = store_torture.fill(folder / "whole", examples, 16, 2**13)
    files, number = store_torture.contents(whole.path), first
    while True:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        counts = store_torture.kill(folder / "killed", examples, 16, 2**13, 10, seed=number)
        same = store_torture.contents(folder / "killed") == files
        lost = counts["lost"] + counts["duplicated"]
        yield "" if same and not lost else f"kills {number}: {counts}, same files: {same}"
        yield from [""] * 9
        number += 10


def killed_saves(folder: Path, first: int) -> Iterator[str]:
    """Kills a process that saves two results in turns to one place."""
    values = [lddyn.Estimate(torch.full((400,), float(n)), torch.ones(400)) for n in range(2)]
    number = first
    while True:
        rng, path = random.Random(number), folder / "kept"
        values[0].save(path)
        child = os.fork()
        if child == 0:
            while True:
                for value in values:
                    value.save(path)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            value = float(lddyn.Estimate.load(path).value.mean())
            yield "" if value in (0.0, 1.0) else f"attempt {number}: {value}"
        except Exception as error:
            yield f"attempt {number}: {problem(error)}"
        number += 1


def power_losses(folder: Path, first: int) -> Iterator[str]:
    """Cuts the power during the saving of a result, or the appending to a store."""
    number = first
    while True:
        rng, place = random.Random(number), folder / f"power-{number}"
        place.mkdir()
        yield (_power_in_save, _power_in_append)[number % 2](place, rng)
        shutil.rmtree(place)
        number += 1


def _states(place: Path, work: Callable[[], object], rng: random.Random) -> tuple[int, int]:
    """Runs work, and leaves the folder as a loss of power does; (calls made, calls in all)."""
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    inodes = {p.name: p.stat().st_ino for p in place.iterdir()}
    with power.recorded(place) as calls:
        work()
    k = rng.randint(0, len(calls))
    for path in place.iterdir():
        path.unlink()
    for name, data in power.after(before, inodes, calls, k, rng).items():
        (place / name).write_bytes(data)
    return k, len(calls)


def _power_in_save(place: Path, rng: random.Random) -> str:
    old, new = (lddyn.Estimate(torch.full((40,), float(n)), torch.ones(40)) for n in range(2))
    old.save(place / "kept")
    made, calls = _states(place, lambda: new.save(place / "kept"), rng)
    try:
        value = float(lddyn.Estimate.load(place / "kept").value.mean())
    except Exception as error:
        return f"save, call {made} of {calls}: {problem(error)}"
    wrong = value not in (0.0, 1.0) or (made == calls and value == 0.0)
    return f"save, call {made} of {calls}: {value}" if wrong else ""


def _power_in_append(place: Path, rng: random.Random) -> str:
    examples = store_torture.data_set(300)
    count = rng.randrange(len(examples))
    store_torture.fill(place, examples[:count], 4, 2**10)
    safe = len(lddyn.Store.open(place))
    made, calls = _states(
        place, lambda: store_torture.fill(place, examples[: count + 3], 4, 2**10), rng
    )
    truth = torch.cat([store_torture.features(i, len(e), 4) for i, e in enumerate(examples)])
    try:
        for mode in ("r", "a"):
            with lddyn.Store.open(place, mode=mode) as store:
                rows = store.rows()
                if len(rows) < safe or not torch.equal(rows, truth[: len(rows)]):
                    return f"append, call {made} of {calls}: {len(rows)} rows of {safe}"
        store_torture.fill(place, examples, 4, 2**10)
        again = lddyn.Store.open(place)
        whole = torch.equal(again.rows(), truth) and not again.verify()
        return "" if whole else f"append, call {made} of {calls}: goes on wrongly"
    except Exception as error:
        return f"append, call {made} of {calls}: {problem(error)}"


# --------------------------------------------------------------------------- models


def interrupted_guards(folder: Path, first: int) -> Iterator[str]:
    """Sends Ctrl-C at every line of every guard: attempt n at line n, again from the start on."""
    works = [(m, work) for m, make in _guarded() for work in make(m)]
    lines = [(m, work, i) for m, work in works for i in range(len(interrupts.places(work)))]
    number = first
    while True:
        model, work, line = lines[number % len(lines)]
        before = interrupts.state(model)
        came: bool | None = interrupts.interrupted(work, line)
        after = interrupts.state(model)
        changed = [str(key) for key, value in after.items() if value != before[key]]
        came = came is not False  # None: the line did not run this time
        yield "" if came and not changed else f"line {line}: came: {came}; changed: {changed[:3]}"
        number += 1


def _guarded() -> list[tuple[Any, Callable[[Any], list[Callable[[], None]]]]]:
    return [
        (zoo.build("llama").train(), test_turns.guards),
        (zoo.lora("llama").train(), test_turns.adapters),
    ]


def shared_models(folder: Path, first: int) -> Iterator[str]:
    """Runs four calls on one model in four threads, and compares with the calls alone."""
    model = zoo.build("llama").eval()
    observed, updated = zoo.examples()
    ids = torch.tensor([[5, 9, 33, 4, 8, 1]])

    def backward() -> torch.Tensor:
        twin = lddyn.Anatomy(model).trainable["model.norm.weight"]
        twin.grad = None
        model(ids).logits.sum().backward()
        return twin.grad.clone()  # type: ignore[no-any-return]

    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: lddyn.ntk(model, observed, updated).gram(),
        lambda: lddyn.decompose(model, observed, lddyn.SFT(updated), 1e-3)[0].influence,
        lambda: lddyn.features(model, [observed], lddyn.Sketch(k=400)).rows,
        lambda: model(ids).logits.detach(),
    ]
    alone, gradient, number = [kind() for kind in kinds], backward(), first
    while True:
        chosen = random.Random(number).choices(range(4), k=4)
        wrong: list[str] = []

        def run(kind: int, wrong: list[str] = wrong) -> None:
            try:
                same = torch.equal(kinds[kind](), alone[kind])
                wrong.extend([] if same else [f"call {kind} returned something else"])
            except Exception as error:
                wrong.append(problem(error))

        def train(wrong: list[str] = wrong) -> None:
            same = torch.equal(backward(), gradient)
            wrong.extend([] if same else ["a backward pass lost a gradient"])

        threads = [threading.Thread(target=run, args=(kind,), daemon=True) for kind in chosen]
        threads.append(threading.Thread(target=train, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        hangs = ["a thread hangs"] if any(t.is_alive() for t in threads) else []
        yield "; ".join(wrong + hangs)
        number += 1


# --------------------------------------------------------------------------- fuzzing


_COLUMNS = [
    *("prompt", "chosen", "rejected", "completion", "text", "messages", "label", "role", "content"),
    *("prompt_ids", "chosen_ids", "response_mask", "tools", "weight", "ref_chosen_logps"),
]


def fuzzed_rows(folder: Path, first: int) -> Iterator[str]:
    """Audits files of random rows, and of mutated good ones, by hypothesis."""
    import chats
    from hypothesis import strategies as st

    text = st.text(st.characters(codec=None), max_size=12)
    names = st.sampled_from(_COLUMNS)
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        text,
        st.just(10**40),
        st.sampled_from(["user", "assistant", "\ud800", "\u202e", "", "1" * 5000]),
    )
    values = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(names | text, inner, max_size=3)
        ),
        max_leaves=8,
    )
    rows = st.dictionaries(names | text, values, max_size=5)
    lines = st.lists(
        rows.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=40), max_size=3
    )
    tokenizer = chats.make_tokenizer()
    path = folder / "rows.jsonl"

    def check(content: list[bytes]) -> None:
        path.write_bytes(b"\n".join(content))
        try:
            list(placed_rows(path))
            audit(tokenizer, path, vocab_size=400)
        except lddyn.ExampleError as error:
            assert str(path) in str(error), f"does not name the file: {error}"

    yield from _fuzz(lines, check, first)


def fuzzed_files(folder: Path, first: int) -> Iterator[str]:
    """Writes bytes that hypothesis chooses into files of a store and of a saved result."""
    from hypothesis import strategies as st

    estimate = lddyn.Estimate(torch.arange(9.0), torch.ones(9))
    (folder / "e").mkdir()
    estimate.save(folder / "e" / "x")
    store = store_torture.fill(folder / "s", store_torture.data_set(80), 4, 512)
    kept = {p: p.read_bytes() for place in ("s", "e") for p in (folder / place).iterdir()}
    truth, paths = store.rows().clone(), sorted(p for p in kept if p.name != "lock")
    change = st.tuples(
        st.sampled_from(paths), st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9)
    )

    def check(changes: list[tuple[Path, float, int, bytes]]) -> None:
        for path, data in kept.items():
            path.write_bytes(data)
        for path, where, length, data in changes:
            old = path.read_bytes()
            at = int(where * len(old))
            path.write_bytes(old[:at] + data + old[at + length :])
        try:
            value = lddyn.Estimate.load(folder / "e" / "x").value
            assert torch.equal(value, estimate.value), "a result is silently wrong"
        except ValueError as error:
            assert str(folder / "e") in str(error)
        try:
            rows = lddyn.Store.open(folder / "s").rows()
            assert torch.equal(rows, truth), "a store is silently wrong"
        except StoreError as error:
            assert str(folder / "s") in str(error)

    yield from _fuzz(st.lists(change, min_size=1, max_size=3), check, first)


def _fuzz(strategy: Any, check: Callable[[Any], None], first: int) -> Iterator[str]:
    """Batches of 25 executions, each with a seed of its own."""
    import hypothesis

    settings = hypothesis.settings(
        max_examples=25,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    number = first
    while True:
        ran: list[str] = []

        def counted(value: Any) -> None:
            ran.append("")  # noqa: B023
            try:
                check(value)
            except Exception as error:
                ran[-1] = f"{value!r:.200}: {problem(error)}"  # noqa: B023

        hypothesis.seed(number)(settings(hypothesis.given(strategy)(counted)))()
        yield from ran
        number += len(ran)


_BATCH = 2000  # executions of one process


def guided(target: str) -> Attempts:
    """Runs the fuzzer that follows coverage, in batches with seeds of their own."""

    def attempts(folder: Path, first: int) -> Iterator[str]:
        if importlib.util.find_spec("atheris") is None:
            print(f"guided {target}: SKIPPED, pip install atheris")
            return
        number = first
        while True:
            program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("guided.py"))]
            seed = str(number // _BATCH + 1)
            ran = subprocess.run(
                [*program, target, "--runs", str(_BATCH), "--seed", seed],
                capture_output=True,
                text=True,
            )
            said = [line for line in ran.stderr.splitlines() if line.strip()]
            yield "" if ran.returncode == 0 else f"seed {seed}: {' | '.join(said[-6:])[:500]}"
            yield from [""] * (_BATCH - 1)
            number += _BATCH

    return attempts


# --------------------------------------------------------------------------- all promises

_SAVED = [name for name in test_results.RESULTS if name not in ("Observed", "Plan")]

_WHOLE = "damaged files are an error, or changed nothing"

_WORDS = {
    "saved steps": _WHOLE,
    "watched runs": "a damaged file is an error, or only its end is missing",
    "lab results": "damaged files are an error",
    "probe answers": "a damaged file is an error, or only its end is asked for again",
    "filters": "a damaged diagnosis, or rows that changed since, are an error",
    "stores": "damaged files are an error, or are made whole",
    "killed writers": "SIGKILL loses no row that was flushed; going on makes the same files",
    "killed saves": "SIGKILL leaves the old result or the new one",
    "power losses": "leave the old result or the new one, and every row that was flushed",
    "Ctrl-C": "at any line of a guard leaves the model as it was",
    "threads": "that share a model get what they get alone",
    "fuzzed rows": "hostile rows are findings of their file",
    "guided rows": "any bytes of a file of rows are findings, or an error that names the file",
    "guided stores": "any bytes of a file of a store are an error, or changed nothing",
    "guided results": "any bytes of a file of a result are an error, or changed nothing",
    "fuzzed files": "bytes written into stores and results are an error, or changed nothing",
}

_ATTEMPTS: dict[str, tuple[int, Attempts]] = {
    "saved steps": (10_000, damaged.damaged_steps),
    "watched runs": (10_000, damaged.damaged_watches),
    "lab results": (10_000, damaged.damaged_labs),
    "probe answers": (10_000, damaged.damaged_answers),
    "filters": (10_000, damaged.damaged_filters),
    "stores": (10_000, damaged_stores),
    "killed writers": (500, killed_writers),
    "killed saves": (1000, killed_saves),
    "power losses": (10_000, power_losses),
    "Ctrl-C": (3000, interrupted_guards),
    "threads": (500, shared_models),
    "fuzzed rows": (50_000, fuzzed_rows),
    "fuzzed files": (50_000, fuzzed_files),
    "guided rows": (50_000, guided("rows")),
    "guided stores": (50_000, guided("stores")),
    "guided results": (50_000, guided("results")),
}

PROMISES = [
    *(Promise(f"saved {name}", _WHOLE, 10_000, damaged.damaged_results(name)) for name in _SAVED),
    *(Promise(name, _WORDS[name], *attempts) for name, attempts in _ATTEMPTS.items()),
]


def run(promise: Promise, counts: dict[str, Any], target: int, save: Callable[[], None]) -> None:
    """Goes on with a promise until it was tried `target` times."""
    folder, saved = Path(tempfile.mkdtemp(prefix="torture-")), time.monotonic()
    try:
        if counts["attempted"] >= target:
            return
        for failure in promise.attempts(folder, counts["attempted"]):
            counts["attempted"] += 1
            counts["survived"] += not failure
            if failure:
                counts["failed"] = [*counts["failed"], failure][:20]
            if time.monotonic() > saved + 5:
                save()
                saved = time.monotonic()
            if counts["attempted"] >= target:
                break
    finally:
        save()
        shutil.rmtree(folder, ignore_errors=True)


def table(state: dict[str, Any]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| what | attempted | survived | failed | promise |", "|---|---|---|---|---|"]
    for promise in PROMISES:
        counts = state.get(promise.name)
        if counts:
            failed = counts["attempted"] - counts["survived"]
            numbers = f"{counts['attempted']:,} | {counts['survived']:,} | {failed:,}"
            lines.append(f"| {promise.name} | {numbers} | {promise.words} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=ROOT / ".benchmarks" / "torture.json")
    parser.add_argument("--only", nargs="*", help="names of promises")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the attempts")
    parser.add_argument("--docs", action="store_true", help="write the table of the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it behind "&"
    state = json.loads(options.state.read_text()) if options.state.exists() else {}

    def save() -> None:
        options.state.parent.mkdir(parents=True, exist_ok=True)
        replace_file(options.state, json.dumps(state, indent=1) + "\n")

    if not options.docs:
        for promise in PROMISES:
            if not options.only or any(part in promise.name for part in options.only):
                counts = state.setdefault(
                    promise.name, {"attempted": 0, "survived": 0, "failed": []}
                )
                run(promise, counts, max(1, round(promise.target * options.scale)), save)
                print(promise.name, counts, flush=True)
    else:
        page = ROOT / "docs" / "reliability.md"
        begin, end = "<!-- torture:begin -->\n", "<!-- torture:end -->"
        text = page.read_text()
        head, rest = text.split(begin)
        page.write_text(head + begin + table(state) + "\n" + end + rest.split(end)[1])
    if any(counts["failed"] for counts in state.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
