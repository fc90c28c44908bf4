"""Rows of data files as pairs and as observed responses, with what is left out of them."""

from __future__ import annotations

from collections.abc import Sequence
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
    from lddyn.data.rows import encode_row
    from lddyn.errors import ExampleError

    pairs, rows, skipped = [], [], []
    for number, (where, row) in enumerate(content):
        try:
            if isinstance(row, ExampleError):
                raise row
            encoded = encode_row(tokenizer, row, options=options)
            if not {"chosen", "rejected"} <= set(encoded):
                there = ", ".join(map(repr, row))
                raise ExampleError(f"a pair must have chosen and rejected, got {there}")
            for side in ("chosen", "rejected"):
                check_fits(encoded[side], side, config)
            pairs.append((encoded["chosen"], encoded["rejected"]))
            rows.append(number)
        except ValueError as error:
            unread = getattr(error, "problem", "") == "unreadable_row"
            field = getattr(error, "field", "")
            place = "" if unread else f"{where}, {field}: " if field else f"{where}: "
            skipped.append((number, f"{place}{error}"))
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
    from lddyn.data.rows import encode_row
    from lddyn.errors import ExampleError

    made: dict[str, Example] = {}
    left_out: list[str] = []
    for number, (where, row) in enumerate(placed_rows(file)):
        try:
            if isinstance(row, ExampleError):
                raise row
            for field, example in encode_row(tokenizer, row, options=options).items():
                check_fits(example, field, config)
                made[f"row {number}, {field}"] = example
        except ValueError as error:
            left_out.append(f"{where}: {error}")
    if not made:
        raise ValueError(f"{file}: no response can be observed ({', '.join(left_out[:1])})")
    for why in left_out[:3]:
        warn(f"not observed: {why}")
    if len(left_out) > 3:
        warn(f"{len(left_out)} rows of {file} in all are not observed")
    return made


def warn_of_skipped(given: PairSet, data: Path, content: Sequence[PlacedRow]) -> None:
    """Says which rows are left out; an error if all are."""
    if not given.pairs:
        why = given.skipped[0][1] if given.skipped else "there is none"
        if content and all(isinstance(p.row, dict) and "label" in p.row for p in content):
            raise ValueError(
                f"{data}: the rows have a label, one response each; a diagnosis is of pairs. "
                "`lddyn decompose --objective kto --row N` takes KTO's step on such a row; where "
                "prompts repeat, join a desirable and an undesirable response to a pair of chosen "
                "and rejected"
            )
        raise ValueError(f"{data}: no row is a pair of chosen and rejected ({why})")
    for number, why in given.skipped[:3]:
        warn(f"row {number} is not diagnosed: {why}")
    if len(given.skipped) > 3:
        warn(f"{len(given.skipped)} rows in all are not diagnosed")
