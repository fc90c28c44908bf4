"""From rows of a data file to token sequences, with errors that name the row and the column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lddyn.cli.options import OneRowOptions, split
from lddyn.data.columns import group_advice
from lddyn.data.context import position_limit, text_config
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.audit import Audit, Finding
    from lddyn.data.example import Example


def read_row(options: OneRowOptions, option: str = "--row") -> JsonObject:
    """The row that an option names.

    Raises:
        ValueError: If the file has fewer rows, or this one cannot be read.
    """
    from lddyn.data.read import placed_rows
    from lddyn.errors import ExampleError

    count = 0
    for number, (_, row) in enumerate(placed_rows(options.data)):
        if number == options.row:
            if isinstance(row, ExampleError):
                raise row
            return row
        count += 1
    if not count:
        raise ValueError(f"{options.data} has no rows")
    raise ValueError(
        f"{option} must be below {count}, the number of rows in {options.data}, got {options.row}"
    )


@dataclass(frozen=True)
class Columns:
    """Which columns of a row a step concerns.

    Attributes:
        update: Those that it learns from; empty: the first one that is encoded.
        observe: Those that are watched; empty: those of `update`.
        named: Those that are encoded by name; empty: what the data format has.
    """

    update: tuple[str, ...]
    observe: tuple[str, ...]
    named: tuple[str, ...]


def choose_columns(
    row: Mapping[str, Any],
    where: str,
    update: str | None,
    observe: str | None,
    count: int,
    reader: str,
) -> Columns:
    """The columns that --update and --observe name, or those of the data format.

    Args:
        row: The row.
        where: Its file and number, for messages.
        update: The option --update.
        observe: The option --observe.
        count: How many responses are read, 1 or 2.
        reader: What reads the responses, for messages, such as "--objective sft".

    Raises:
        ValueError: If --update has another number of columns, or the row lacks one.
    """
    learned, watched = split(update), split(observe)
    for option, text, names in (("--update", update, learned), ("--observe", observe, watched)):
        if text is not None and not names:
            raise ValueError(f"{option} must name fields of the row, got {text!r}")
    if learned and len(learned) != count:
        raise ValueError(
            f"--update must name {count} field{'s' if count > 1 else ''} for "
            f"{reader}, got {', '.join(learned)}"
        )
    if not learned and count == 2:
        learned = ["chosen", "rejected"]
    elif not learned and set(row) & {"prompt", "completion", "chosen"} == {"prompt"}:
        there = ", ".join(name for name in row if name != "prompt")
        if not any(name.endswith("_ids") for name in row) and "messages" not in row:
            raise ValueError(
                f"{where} has no completion or chosen, which {reader} reads: name the "
                f"response with --update; there are: {there}{group_advice(row)}"
            )
    tokenized = any(name.endswith("_ids") for name in row)
    after_prompt = {"prompt", "instruction", "chosen", "rejected"} & set(row) and not tokenized
    named = [name for name in (*learned, *watched) if name in row] if after_prompt else []
    return Columns(tuple(learned), tuple(watched), tuple(dict.fromkeys(named)))


def encode_columns(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    options: OneRowOptions,
    columns: Columns,
) -> tuple[dict[str, Example], list[str], list[str]]:
    """The responses of a row as token sequences.

    Returns:
        Column → example; the columns that the step learns from; the columns that are watched.

    Raises:
        ValueError: If a response is empty, absent or cannot be encoded.
    """
    from lddyn.data.rows import encode_row
    from lddyn.errors import EmptyResponseError, ExampleError

    place, named = options.place, list(columns.named)
    try:
        examples = encode_row(
            tokenizer, row, named or None, options.encoding, skip_empty=bool(named)
        )
    except EmptyResponseError as error:
        raise ValueError(f"{place}: {error}") from error
    except ExampleError as error:
        where = f"{place}, {error.field}" if error.field else place
        raise ValueError(f"{where}: {error}") from error
    for name in named:
        if name not in examples:
            raise ValueError(
                f"{place}, {name}: the response is empty: there is no log-probability to measure"
            )
    learned = list(columns.update) or list(examples)[:1]
    watched = list(columns.observe) or learned
    absent = [name for name in (*learned, *watched) if name not in examples]
    if absent:
        texts = [name for name, value in row.items() if isinstance(value, str) and name != "prompt"]
        raise ValueError(
            f"{place} has no field {absent[0]!r}; there are: "
            + ", ".join(dict.fromkeys((*examples, *texts)))
        )
    return examples, learned, watched


def check_fits(example: Example, name: str, config: object) -> None:
    """Raises a ValueError if the model cannot read the example: too long, or an unknown token."""
    vocabulary = getattr(text_config(config), "vocab_size", None)
    try:
        example.check_model_limits(vocabulary, position_limit(config))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def finding_to_dict(finding: Finding, row: int) -> JsonObject:
    """A finding of the audit of one row, by its number in the file."""
    return {**vars(finding), "row": row if finding.row >= 0 else None}


def audit_lines(audit: Audit, row: int) -> list[str]:
    """What the audit of one row found."""
    if audit.ok:
        return [f"audit of row {row}: nothing found"]
    lines = [f"audit of row {row}:"]
    for finding in audit:
        place = finding.field or "the row"
        lines.append(f"  {finding.severity}: {finding.problem} ({place}): {finding.detail}")
    return lines
