"""Rows whose texts are token ids already, as a trainer prepares them.

Three formats: a pair as ids, prompt and completion as ids, and `input_ids` with a loss mask (one
sequence, or several documents packed into one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lddyn.data.columns import MASKS, PREPARED_PAIRS, Row, require_columns
from lddyn.data.encode import make_example
from lddyn.data.example import IGNORED_LABEL, Example, entries, token_ids
from lddyn.data.options import RowOptions
from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import EmptyResponseError, ExampleError

__all__ = ["Encoder"]

# What is left to do for one field of a row. Fields are encoded one by one, so that a field that
# cannot be encoded does not take the others with it.
Encoder = Callable[[], Example]


def prepared_encoders(
    tokenizer: Tokenizer | None, row: Row, options: RowOptions
) -> list[tuple[str, Encoder]]:
    """(field, encoder) of each response of a row of token ids; empty for a row of another format.

    Raises:
        ExampleError: If a column is missing, or masks or documents do not fit the ids.
    """
    for prompt, chosen, rejected in PREPARED_PAIRS:
        if chosen in row or rejected in row:
            require_columns(row, prompt, chosen, rejected)
            fields = {"chosen": row[chosen], "rejected": row[rejected]}
            return [
                (name, _ids_encoder(tokenizer, row[prompt], ids, name, options))
                for name, ids in fields.items()
            ]
    if "completion_ids" in row:
        require_columns(row, "prompt_ids")
        prompt_ids, ids = row["prompt_ids"], row["completion_ids"]
        return [("completion", _ids_encoder(tokenizer, prompt_ids, ids, "completion", options))]
    if "input_ids" not in row:
        return []
    ids = token_ids("input_ids", row["input_ids"])
    counted = _counted_tokens(row, ids)
    documents = _documents(row, len(ids))
    encoders = []
    for index, (begin, end) in enumerate(documents):
        name = "input_ids" if len(documents) == 1 else f"document_{index}"
        encoder = _masked_encoder(tokenizer, ids[begin:end], counted[begin:end], name, options)
        encoders.append((name, encoder))
    return encoders


def _ids_encoder(
    tokenizer: Tokenizer | None, prompt: object, response: object, name: str, options: RowOptions
) -> Encoder:
    """Encoder of a prompt and a response that are both token ids."""

    def encoder() -> Example:
        left, right = token_ids("prompt_ids", prompt), token_ids(f"{name}_ids", response)
        if not left or not right:
            return Example(left, right, name=name)  # raises, and says which is empty
        return make_example(tokenizer, left, right, None, [], name, options)

    return encoder


def _masked_encoder(
    tokenizer: Tokenizer | None,
    ids: Sequence[int],
    counted: Sequence[bool],
    name: str,
    options: RowOptions,
) -> Encoder:
    """Encoder of ids with a loss mask; the prompt ends where counting begins."""

    def encoder() -> Example:
        places = [index for index, value in enumerate(counted) if value and index > 0]
        if not places:
            raise EmptyResponseError(
                f"{name} must count at least 1 token after the first, got none in {len(ids)}: the "
                "loss mask is empty; drop the row",
                field=name,
            )
        start, stop = places[0], places[-1] + 1  # tokens after the last counted one change nothing
        mask = counted[start:stop]
        return make_example(tokenizer, ids[:start], ids[start:stop], mask, [], name, options)

    return encoder


def _counted_tokens(row: Row, ids: Sequence[int]) -> list[bool]:
    """Which tokens of an `input_ids` row are in the loss, from its label and mask columns."""
    counted = [True] * len(ids)
    for column in MASKS:
        if row.get(column) is None:
            continue
        values = entries(row[column])
        if len(values) != len(ids):
            raise ExampleError(
                f"{column} must have {len(ids)} entries, one per input id, got {len(values)}",
                problem="bad_mask",
                field=column,
            )
        if column == "labels":
            for index, (label, token) in enumerate(zip(values, ids, strict=True)):
                if label not in (IGNORED_LABEL, token):
                    raise ExampleError(
                        f"labels[{index}] must be input_ids[{index}] = {token} or {IGNORED_LABEL},"
                        f" got {label}: labels are not shifted in a data set",
                        problem="bad_mask",
                        field="labels",
                    )
            values = [label != IGNORED_LABEL for label in values]
        counted = [a and bool(b) for a, b in zip(counted, values, strict=True)]
    return counted


def _documents(row: Row, length: int) -> list[tuple[int, int]]:
    """(begin, end) of each document of a packed row; one of the whole row if it is not packed."""
    if row.get("seq_lengths") is not None:
        ends: list[int] = []
        for size in entries(row["seq_lengths"]):
            ends.append(int(size) + (ends[-1] if ends else 0))
        total = ends[-1] if ends else 0
        if total != length:
            raise ExampleError(
                f"seq_lengths must add up to {length} input ids, got {total}",
                problem="bad_mask",
                field="seq_lengths",
            )
        begins = [0, *ends[:-1]]
    elif row.get("position_ids") is not None:
        positions = entries(row["position_ids"])
        begins = [index for index, position in enumerate(positions) if position == 0] or [0]
        if begins[0] != 0:
            begins.insert(0, 0)
        ends = [*begins[1:], length]
    else:
        begins, ends = [0], [length]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if end > begin]
