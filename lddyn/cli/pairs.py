"""Rows of data files as pairs and as observed responses, with what is left out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lddyn.cli.console import warn
from lddyn.cli.rows import check_fits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.audit import Audit
    from lddyn.data.example import Example
    from lddyn.data.options import RowOptions
    from lddyn.data.read import PlacedRow

# Findings of an audit that make a pair one to fix.
_FAULTS = ("identical_pair", "duplicate", "blank_response")
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PairSet:
    """The rows of a file that are pairs.

    Attributes:
        pairs: (chosen, rejected).
        rows: The number of each pair's row.
        skipped: Rows that are no pair, with the reason.
        faults: Pair → what the audit found in its row, where it is to be fixed.
        audit: The audit of all rows.
    """

    pairs: list[tuple[Example, Example]]
    rows: list[int]
    skipped: list[tuple[int, str]]
    faults: dict[int, str]
    audit: Audit


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    config: object,
    content: Sequence[PlacedRow],
    options: RowOptions,
) -> PairSet:
    """The rows that are pairs, as token sequences, and what is wrong with the rows."""
    from lddyn.data.audit import audit

    pairs, rows, skipped = [], [], []
    for number, encoded in encode_rows(tokenizer, config, content, options, _SIDES):
        if isinstance(encoded, str):
            skipped.append((number, encoded))
            continue
        pairs.append((encoded["chosen"], encoded["rejected"]))
        rows.append(number)
    audited = audit(tokenizer, content, options=options, config=config)
    faulty = {f.row: f.problem for f in audited if f.problem in _FAULTS}
    faults = {i: faulty[row] for i, row in enumerate(rows) if row in faulty}
    return PairSet(pairs, rows, skipped, faults, audited)


def encode_observed(
    tokenizer: PreTrainedTokenizerBase, config: object, file: Path, options: RowOptions
) -> dict[str, Example]:
    """The responses of a data file by row and field; rows that cannot be read are said.

    Raises:
        ValueError: If no response is left.
    """
    from lddyn.data.read import placed_rows

    made: dict[str, Example] = {}
    left_out: list[str] = []
    for number, encoded in encode_rows(tokenizer, config, placed_rows(file), options):
        if isinstance(encoded, str):
            left_out.append(encoded)
        else:
            made |= {f"row {number}, {field}": e for field, e in encoded.items()}
    if not made:
        raise ValueError(f"{file}: no response can be observed ({', '.join(left_out[:1])})")
    warn_of_first(
        [f"not observed: {why}" for why in left_out], f"rows of {file} in all are not observed"
    )
    return made


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    config: object,
    content: Iterable[PlacedRow],
    options: RowOptions,
    sides: Sequence[str] = (),
) -> Iterator[tuple[int, dict[str, Example] | str]]:
    """Each row's number, and its responses by field or why it has none that the model can read.

    Args:
        tokenizer: The tokenizer.
        config: The model's config.
        content: The rows.
        options: How they are encoded.
        sides: Fields that a row must have, and that are read; empty: all of the row's format.
    """
    from lddyn.data.rows import encode_row
    from lddyn.errors import ExampleError

    for number, (where, row) in enumerate(content):
        try:
            if isinstance(row, ExampleError):
                raise row
            encoded = encode_row(tokenizer, row, options=options)
            if not set(sides) <= set(encoded):
                there = ", ".join(map(repr, row))
                raise ExampleError(f"a pair must have {' and '.join(sides)}, got {there}")
            read = {field: encoded[field] for field in sides or encoded}
            for field, example in read.items():
                check_fits(example, field, config)
            yield number, read
        except ValueError as error:
            unread = getattr(error, "problem", "") == "unreadable_row"
            field = getattr(error, "field", "")
            place = "" if unread else f"{where}, {field}: " if field else f"{where}: "
            yield number, f"{place}{error}"


def warn_of_first(lines: Sequence[str], in_all: str) -> None:
    """The first three of some warnings, and how many there are."""
    for line in lines[:3]:
        warn(line)
    if len(lines) > 3:
        warn(f"{len(lines)} {in_all}")


def warn_of_skipped(given: PairSet, data: Path, content: Sequence[PlacedRow]) -> None:
    """Says which rows are left out; an error if all are."""
    if not given.pairs:
        why = given.skipped[0][1] if given.skipped else "there is none"
        raise ValueError(f"{data}: no row is a pair of chosen and rejected ({why})")
    lines = [f"row {number} is not diagnosed: {why}" for number, why in given.skipped]
    warn_of_first(lines, "rows in all are not diagnosed")
