"""Damaged copies of everything that lddyn saves and reads back, for `make torture`."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutations
import test_results
import zoo

import lddyn
from lddyn.data.read import placed_rows
from lddyn.errors import StoreError
from lddyn.files import append_text, read_sealed, replace_file, sealed
from lddyn.probes.endpoint import Endpoint, write
from lddyn.probes.probe_set import ProbeSet
from lddyn.report.dynamics import read_lines
from lddyn.sets.filter import check_source, filter_rows, read_diagnosed, write_source
from lddyn.steps.folder import read_steps, write_steps

# Runs the attempts first, first + 1, … and yields "" for each that survives, else what happened.
Attempts = Callable[[Path, int], Iterator[str]]


def problem(error: BaseException) -> str:
    """One line on an exception that should not have come."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def damaged_results(name: str) -> Attempts:
    """Damages two saves of one kind of result, and loads them."""

    def attempts(folder: Path, first: int) -> Iterator[str]:
        model = zoo.build("llama").eval()
        step = test_results.step.__wrapped__(model)
        other = lddyn.decompose(model, zoo.examples()[0], lddyn.SFT(zoo.examples()[1]), 2e-3)
        more = [model] if name == "LowRank" else []
        saves, whole = [], []
        for number, held in enumerate((step, other)):
            result = test_results.RESULTS[name](model, held)
            result.save(folder / str(number) / "result")
            saves.append({p.name: p.read_bytes() for p in (folder / str(number)).iterdir()})
            whole.append(type(result).load(folder / str(number) / "result", *more).to_dict())
        yield from _loads(
            folder, first, saves, lambda p: type(result).load(p / "result", *more).to_dict(), whole
        )

    return attempts


def _loads(
    folder: Path, first: int, saves: list[dict[str, bytes]], load: Callable[[Path], Any], whole: Any
) -> Iterator[str]:
    """Loads damaged copies of saved files: an error of lddyn's, or one of the whole results."""
    place, number = folder / "damaged", first
    while True:
        damaged = mutations.mutate(*saves, random.Random(number))
        shutil.rmtree(place, ignore_errors=True)
        for file, data in damaged.items():
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(data)
        try:
            loaded = load(place)
            right = whole(loaded) if callable(whole) else loaded in whole
            yield "" if right else f"attempt {number}: silently wrong"
        except (ValueError, StoreError, FileNotFoundError) as error:
            yield (
                ""
                if str(place) in str(error)
                else (f"attempt {number}: does not name the file: {problem(error)}")
            )
        except Exception as error:
            yield f"attempt {number}: {problem(error)}"
        number += 1


def damaged_steps(folder: Path, first: int) -> Iterator[str]:
    """Damages folders of `lddyn decompose --out`."""
    model = zoo.build("llama").eval()
    step = test_results.step.__wrapped__(model)
    other = lddyn.decompose(model, zoo.examples()[0], lddyn.SFT(zoo.examples()[1]), 2e-3)
    saves, whole = [], []

    def load(place: Path) -> Any:
        decs, checks, facts = read_steps(place)
        return [
            {name: dec.to_dict() for name, dec in decs.items()},
            {name: None if c is None else c.to_dict() for name, c in checks.items()},
            facts,
        ]

    for number, dec in enumerate((step, other)):
        check = dec.verify([1e-3, 5e-4])
        place = folder / str(number)
        write_steps(place, {"": dec}, {"": check}, title=str(number))
        kept = [p for p in place.rglob("*") if p.suffix in (".json", ".safetensors")]
        saves.append({p.relative_to(place).as_posix(): p.read_bytes() for p in kept})
        whole.append(load(place))
    # Without its summary, or the check, the rest of a folder may still be read.
    parts = [
        [w[0], check, facts] for w in whole for check in (w[1], {"": None}) for facts in (w[2], {})
    ]
    yield from _loads(folder, first, saves, load, parts)


def damaged_watches(folder: Path, first: int) -> Iterator[str]:
    """Damages the file of a watched run: whole lines of it are read, from the first on."""
    saves, whole = [], []
    for number in range(2):
        path = folder / str(number) / "dynamics.jsonl"
        path.parent.mkdir()
        for step in range(20):
            append_text(path, sealed({"step": step, "log_prob/a": -step - number / 3}, indent=None))
        saves.append({path.name: path.read_bytes()})
        whole.append(read_lines(path))
    yield from _loads(
        folder,
        first,
        saves,
        lambda place: read_lines(place / "dynamics.jsonl"),
        lambda rows: any(rows == run[: len(rows)] for run in whole),
    )


def damaged_labs(folder: Path, first: int) -> Iterator[str]:
    """Damages results.json of an experiment."""
    saves, whole = [], []
    for number in range(2):
        path = folder / str(number) / "results.json"
        path.parent.mkdir()
        replace_file(path, sealed({"experiment": "x", "claims": [[number, 0.25]] * 30}))
        saves.append({path.name: path.read_bytes()})
        whole.append(read_sealed(path))
    yield from _loads(folder, first, saves, lambda p: read_sealed(p / "results.json"), whole)


def damaged_answers(folder: Path, first: int) -> Iterator[str]:
    """Damages the answers of a service that writes responses: what is gone is asked for again."""
    rows = [{"prompt": f"{n}?", "chosen": f" number {n}"} for n in range(12)]

    class Service(Endpoint):
        """Answers, and counts what it was asked."""

        asked: list[str] = []  # noqa: RUF012

        def ask(self, text: str) -> str:
            self.asked.append(text)
            return f"{self.model} {len(text)}"

    def written(place: Path, name: str) -> Any:
        service = Service("http://localhost/v1", name)
        Service.asked.clear()
        fields = ["chosen_gptsemantic"]
        return write(ProbeSet(rows), service, place / "answers.jsonl", fields=fields).rows

    saves, whole = [], []
    for number, name in enumerate(("one", "other")):
        whole.append(written(folder / str(number), name))
        path = folder / str(number) / "answers.jsonl"
        saves.append({path.name: path.read_bytes()})
    yield from _loads(folder, first, saves, lambda place: written(place, "one"), whole[:1])


def damaged_filters(folder: Path, first: int) -> Iterator[str]:
    """Damages the folder of a diagnosis and its rows, and filters the rows by it."""
    model = zoo.build("llama").eval()
    result = test_results.diagnosed(model)
    saves, whole = [], []

    def load(place: Path) -> Any:
        file = check_source(place, place / "rows.jsonl")
        return vars(
            filter_rows([row for _, row in placed_rows(file)], read_diagnosed(place), drop=1)
        )

    for number in range(2):
        place = folder / str(number)
        place.mkdir()
        rows = [{"prompt": f"{number} {row}"} for row in range(6)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "rows.jsonl").write_text(text, encoding="utf-8")
        if number:
            result = lddyn.diagnose(model, [zoo.examples()] * 2, close_ups=0)
        result.save(place / "diagnosis")
        write_source(place, place / "rows.jsonl")
        whole.append(load(place))
        kept = [p for p in place.iterdir() if p.suffix != ".safetensors"]  # not read here
        saves.append({p.name: p.read_bytes() for p in kept})
    yield from _loads(folder, first, saves, load, whole)
