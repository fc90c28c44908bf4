"""Leaving out or weighting the rows of a set, as a diagnosis ranks them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.data.read import source_files
from lddyn.files import (
    LARGEST_RECORD,
    JsonObject,
    digest_of,
    read_regular,
    read_sealed,
    replace_file,
    sealed,
    unsealed,
)

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis
    from lddyn.sets.sequence_diagnosis import SequenceDiagnosis

__all__ = ["Filtered", "check_source", "filter_rows", "read_diagnosed", "write_source"]

_SOURCE, _RECORD = "source.json", "diagnosis.json"
_KINDS = ("lddyn.Diagnosis", "lddyn.SequenceDiagnosis")


@dataclass(frozen=True)
class Filtered:
    """Rows that are kept and rows that are not, in their order.

    Attributes:
        kept: The rows to train on, with a `"weight"` each if they were reweighted, and some several
            times if they were resampled.
        kept_rows: Their numbers in the data set, from 0.
        dropped: The rows that are left out, the most harmful pair first.
        dropped_rows: Their numbers.
        helpful: Number of dropped rows that raise the target, of pairs the chosen responses. It is
            above 0 where `drop` exceeds the number of harmful rows.
    """

    kept: list[dict[str, Any]]
    kept_rows: list[int]
    dropped: list[dict[str, Any]]
    dropped_rows: list[int]
    helpful: int

    def write(self, folder: str | Path) -> None:
        """Writes kept.jsonl and dropped.jsonl into a folder, one row a line, as they were."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("kept", self.kept), ("dropped", self.dropped)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            replace_file(folder / f"{name}.jsonl", text)


def filter_rows(
    rows: Sequence[Mapping[str, Any] | None],
    diagnosis: Diagnosis | SequenceDiagnosis | Mapping[str, Any],
    *,
    drop: int = 0,
    reweight: bool = False,
    resample: bool = False,
    seed: int = 0,
) -> Filtered:
    """Leaves the most harmful rows out, gives each row its weight, or repeats rows by weight.

    Args:
        rows: All rows of the data set. Rows that were not diagnosed are kept, with weight 1; None,
            for a row that cannot be read, is left out.
        diagnosis: The diagnosis, or the content of its diagnosis.json. Made with `row_numbers`, or
            of all rows in their order.
        drop: Number of pairs to leave out, the most harmful first (`Diagnosis.worst`).
        reweight: Give every kept row a `"weight"`: the factor of its loss
            (`Diagnosis.pair_weights`, `SequenceDiagnosis.row_weights`).
        resample: Write every kept row as often as its weight says, for trainers that read no
            weights: a whole number of times whose mean over seeds is the weight, and that differs
            from it by less than 1.
        seed: Of `resample`.

    Raises:
        ValueError: If `drop` exceeds the number of pairs or leaves no row, a diagnosed row does not
            exist, a row has a `"weight"` already, all weights are 0, or rows are to be both
            weighted and resampled.

    Example:
        >>> from lddyn.sets.filter import filter_rows
        >>> rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
        >>> pairs = [{"row": 0, "contribution": 0.1}, {"row": 2, "contribution": -0.2}]
        >>> diagnosis = {"worst": [1, 0], "pair_weights": [1.3, 0.7], "pairs": pairs}
        >>> filter_rows(rows, diagnosis, drop=1).kept
        [{'prompt': 'a'}, {'prompt': 'b'}]
        >>> [row["weight"] for row in filter_rows(rows, diagnosis, reweight=True).kept]
        [1.3, 1.0, 0.7]
        >>> filter_rows(rows, diagnosis, resample=True).kept_rows
        [0, 0, 1]
    """
    document = diagnosis if isinstance(diagnosis, Mapping) else diagnosis.to_dict()
    pairs = document["pairs"] if "pairs" in document else document["sequences"]
    if reweight and resample:
        raise ValueError("reweight and resample are two ways of one weight: choose one of them")
    given = document.get("pair_weights", document.get("row_weights"))
    by_weight = reweight or resample
    if by_weight and given is None:
        raise ValueError("the diagnosis has no weights: make it anew with this version")
    if not 0 <= drop <= len(pairs) or drop == len(rows):
        raise ValueError(
            f"drop must be from 0 to {len(pairs)}, the number of pairs, and leave a row, got {drop}"
        )
    weighted = [number for number, row in enumerate(rows) if row and "weight" in row]
    if reweight and weighted:
        raise ValueError(
            f"row {weighted[0]} has a weight already: rename that column, or no new weights"
        )
    if by_weight and not any(given):
        raise ValueError("all weights of the diagnosis are 0: make it anew with this version")
    numbers = [int(_number(pair)) for pair in pairs]
    if max(numbers) >= len(rows):
        raise ValueError(
            f"row {max(numbers)} was diagnosed, but there are {len(rows)} rows: give the rows that "
            "were diagnosed"
        )
    gone = document["worst"][:drop]
    dropped = [numbers[pair] for pair in gone]
    content = [{} if row is None else dict(row) for row in rows]
    readable = [number for number, row in enumerate(rows) if row is not None]
    kept = [number for number in readable if number not in set(dropped)]
    weights = dict(zip(numbers, given, strict=True)) if by_weight else {}
    if resample:
        kept = _repeated(kept, [weights.get(number, 1.0) for number in kept], seed)
    return Filtered(
        kept=[
            content[number] | ({"weight": weights.get(number, 1.0)} if reweight else {})
            for number in kept
        ],
        kept_rows=kept,
        dropped=[content[number] for number in dropped],
        dropped_rows=dropped,
        helpful=sum(_contribution(pairs[pair]) >= 0 for pair in gone),
    )


def _repeated(numbers: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Each number floor(w) or ceil(w) times, w on average over seeds (systematic resampling)."""
    passed, repeated = random.Random(seed).random(), []
    for number, weight in zip(numbers, weights, strict=True):
        before, passed = math.floor(passed), passed + weight
        repeated += [number] * (math.floor(passed) - before)
    if not repeated:
        raise ValueError("no row is left by these weights: give another seed, or reweight")
    return repeated


def _contribution(pair: Mapping[str, Any]) -> float:
    """Contribution of a pair to all chosen responses: in the run, where one was predicted."""
    return float(pair.get("run_contribution", pair["contribution"]))


def write_source(folder: str | Path, data: str | Path) -> None:
    """Writes the path and digest of the diagnosed rows into the folder of a diagnosis.

    Args:
        folder: Folder of the diagnosis, which was saved there.
        data: A file, a folder of files, or a glob.
    """
    data = Path(data).resolve()
    source = {
        "data": str(data),
        "data_digest": _digest(data),
        "diagnosis_digest": digest_of(_record(Path(folder))),
    }
    replace_file(Path(folder) / _SOURCE, sealed(source))


def _record(folder: Path) -> bytes:
    return read_regular(folder / _RECORD, limit=LARGEST_RECORD)


def _digest(data: Path) -> str:
    """Digest of the content of a data file, or of all files of a folder or a glob."""
    digests = [digest_of(read_regular(file)) for file in source_files(data)]
    return digests[0] if len(digests) == 1 else digest_of("".join(digests).encode())


def check_source(folder: str | Path, data: str | Path | None = None) -> Path:
    """Path of the data file that was diagnosed, checked by its digest.

    Args:
        folder: Folder of the diagnosis.
        data: Path of the file now. Default: its path at that time.

    Raises:
        FileNotFoundError: If the folder has no diagnosis, or the file is gone.
        ValueError: If the file is not the one that was diagnosed.
    """
    source = _source(Path(folder))
    file = Path(source["data"] if data is None else data)
    try:
        digest = _digest(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: no such file; --data says where the rows are now"
        ) from None
    if digest != source["data_digest"]:
        raise ValueError(
            f"{file}: not the rows that were diagnosed ({source['data']} at that time): diagnose "
            "these rows first"
        )
    return file


def read_diagnosed(folder: str | Path) -> JsonObject:
    """The content of diagnosis.json in the folder of a diagnosis, as `filter_rows` takes it.

    Raises:
        FileNotFoundError: If the folder has no diagnosis.
        ValueError: If it is damaged, no diagnosis, or not the one of the rows in source.json.
    """
    folder = Path(folder)
    source, record = _source(folder), folder / _RECORD
    content = _record(folder)
    document = unsealed(content, str(record))
    if document.get("kind") not in _KINDS:
        raise ValueError(f"{record}: must hold a diagnosis, got {document.get('kind')!r:.80}")
    if source["diagnosis_digest"] != digest_of(content):
        raise ValueError(
            f"{folder}: {_RECORD} and {_SOURCE} are not of one diagnosis: diagnose again"
        )
    if not _is_whole(document):
        raise ValueError(f"{record}: its rows, ranks and weights do not fit together")
    return document


def _is_whole(document: JsonObject) -> bool:
    """Whether rows, ranks and weights are such as `Diagnosis.to_dict` writes."""
    pairs: Any = document.get("pairs", document.get("sequences"))
    weights = document.get("pair_weights", document.get("row_weights"))
    try:
        n, numbers = len(pairs), [_number(pair) for pair in pairs]
        ranked = sorted(document["worst"]) == [*range(n)]
        finite = all(math.isfinite(_contribution(pair)) for pair in pairs)
        weighted = weights is None or (
            len(weights) == n and all(0 <= weight <= 1.001 * n for weight in weights)  # mean 1
        )
    except (TypeError, AttributeError, LookupError, ValueError, OverflowError):
        return False
    counted = all(type(x) is int and x >= 0 for x in numbers) and len({*numbers}) == n > 0
    return counted and finite and weighted and ranked


def _number(pair: Mapping[str, Any]) -> Any:
    """The number of a pair's row in the data set."""
    return pair.get("row", pair.get("pair", pair.get("sequence")))


def _source(folder: Path) -> dict[str, str]:
    """What `write_source` wrote."""
    path = folder / _SOURCE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {_SOURCE} here; expected a folder that lddyn diagnose --out wrote"
        )
    source = read_sealed(path)
    for name in ("data", "data_digest", "diagnosis_digest"):
        if not isinstance(source.get(name), str):
            raise ValueError(f"{path}: has no {name}; diagnose again with this version of lddyn")
    return source
