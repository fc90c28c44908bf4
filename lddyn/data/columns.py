"""The columns of each row format, and the error for a column that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lddyn.errors import ExampleError

__all__ = ["MASKS", "PREPARED_PAIRS", "WHOLE", "Row"]

Row = Mapping[str, Any]  # one row of a data set: column → value

# The formats as an error lists them; `lddyn.encode_row` documents them.
_FORMATS = (
    "{text}",
    "{messages}",
    "{prompt, completion}",
    "{prompt, completion, label}",
    "{prompt, chosen, rejected}",
    "{chosen, rejected}",
    "{input_ids, labels or completion_mask}",
    "{prompt_ids, chosen_ids, rejected_ids}",
    "{prompt, plus the columns named in fields}",
)

# Column → field, of rows that hold a whole text or conversation; the first one there is read.
WHOLE = {"messages": "messages", "conversations": "messages", "text": "text"}

# (prompt, chosen, rejected) as token ids: columns of TRL 1, and of TRL 0.24.
PREPARED_PAIRS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)

# Columns of `input_ids` rows that say which tokens are in the loss; a token is if all say so.
MASKS = ("attention_mask", "labels", "completion_mask", "assistant_masks")


def require_columns(row: Row, *columns: str) -> None:
    """Raise `missing_column` for the first of the columns that the row lacks."""
    for column in columns:
        if column not in row:
            raise missing_column(column, row)


def missing_column(column: str, row: Row) -> ExampleError:
    """Error for a column that the row lacks; it lists the row's columns and all formats."""
    return ExampleError(
        f"row must have a column {column!r}, got {sorted(map(str, row))}; formats: "
        f"{' | '.join(_FORMATS)}",
        problem="missing_column",
        field=column,
    )
