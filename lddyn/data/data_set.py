"""The rows of a data set as distinct examples, each with its index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lddyn.data.example import Example
from lddyn.data.options import DEFAULT, RowOptions
from lddyn.data.read import Source, placed_rows
from lddyn.data.rows import encode_row
from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import ExampleError

__all__ = ["distinct_examples"]


def distinct_examples(
    tokenizer: Tokenizer | None,
    rows: Source,
    fields: Sequence[str] | Literal["all"] | None = None,
    options: RowOptions = DEFAULT,
    *,
    check: Callable[[Example], None] | None = None,
    skip: bool = False,
) -> tuple[dict[int, Example], list[str]]:
    """Encode the responses of data rows and remove duplicates.

    Args:
        tokenizer: As in `encode_row`.
        rows: The data: anything that `lddyn.rows` reads.
        fields: Names of the responses to keep. None: those of the row's format; `"all"`: every text
            column.
        options: As in `encode_row`.
        check: Called with each example; raises ValueError for one that cannot be used, as
            `Anatomy.check_limits` does.
        skip: Leave out rows and examples that cannot be used, instead of raising.

    Returns:
        Index → example, in order, and one line for each row or example that was left out. The index
        counts all responses of the data set; of equal examples the first one is kept.

    Raises:
        ExampleError: (a ValueError) If a row cannot be encoded or an example does not pass `check`,
            unless `skip`; the message begins with the row's number.

    Example:
        >>> from lddyn.data.data_set import distinct_examples
        >>> row = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}
        >>> examples, left_out = distinct_examples(None, [row, row, {}], skip=True)
        >>> {index: example.name for index, example in examples.items()}, len(left_out)
        ({0: 'chosen', 1: 'rejected'}, 1)
    """
    distinct: dict[int, Example] = {}
    seen: set[str] = set()
    left_out: list[str] = []

    def refuse(where: str, error: ValueError) -> None:
        if not skip:
            problem = getattr(error, "problem", "invalid")
            raise ExampleError(f"{where}: {error}", problem=problem) from error
        left_out.append(f"{where}: {error}")

    count = 0
    for number, (_, row) in enumerate(placed_rows(rows)):
        if isinstance(row, ExampleError):
            refuse(f"row {number}", row)
            continue
        try:
            encoded = encode_row(tokenizer, row, fields, options, skip_empty=True)
        except ValueError as error:
            field = getattr(error, "field", "")
            refuse(f"row {number}, {field}" if field else f"row {number}", error)
            continue
        for name, example in encoded.items():
            if fields not in (None, "all") and name not in fields:
                continue
            count += 1
            try:
                if check is not None:
                    check(example)
            except ValueError as error:
                refuse(f"row {number}, {name}", error)
                continue
            if example.content_id not in seen:
                distinct[count - 1] = example
            seen.add(example.content_id)
    return distinct, left_out
