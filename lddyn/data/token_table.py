"""The table that says which token, or which sequence, each row of features belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.example import Example

if TYPE_CHECKING:
    import pyarrow

__all__ = ["COLUMNS", "TokenTable"]

COLUMNS = ("response_index", "position", "token_id")  # what a row says of its token, int32 each


@dataclass(frozen=True)
class TokenTable:
    """Which token each row of features belongs to; of a whole sequence, only which example.

    Attributes:
        example_id: `Example.content_id` of each row, list of n.
        example_index: Index of the example in the data set, (n,) int64.
        response_index: Index of the token in the response, (n,) int32; -1 for a sequence.
        position: Logit column that predicts the token, (n,) int32; -1 for a sequence.
        token_id: The token, (n,) int32; -1 for a sequence.
    """

    example_id: list[str]
    example_index: Tensor
    response_index: Tensor
    position: Tensor
    token_id: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.example_id)

    def __getitem__(self, rows: slice) -> TokenTable:
        """The table of some of the rows."""
        columns = (getattr(self, name)[rows] for name in ("example_index", *COLUMNS))
        return TokenTable(self.example_id[rows], *columns)


def token_columns(example: Example) -> dict[str, Sequence[int]]:
    """`response_index`, `position` and `token_id` of each counted response token."""
    first = len(example.prompt_ids) - 1
    return {
        "response_index": [p - first for p in example.positions],
        "position": example.positions,
        "token_id": example.targets,
    }


def table_of(examples: Sequence[Example], by: str) -> TokenTable:
    """Table of the rows of these examples, in their order.

    Args:
        examples: The examples.
        by: "token" for a row per counted token, "sequence" for a row per example.
    """
    if by == "sequence":
        return sequence_table([e.content_id for e in examples], torch.arange(len(examples)))
    per_example = [token_columns(e) for e in examples]
    columns = (
        torch.tensor([x for columns in per_example for x in columns[name]], dtype=torch.int32)
        for name in COLUMNS
    )
    return TokenTable(
        [e.content_id for e in examples for _ in range(len(e))],
        torch.tensor([i for i, e in enumerate(examples) for _ in range(len(e))]),
        *columns,
    )


def sequence_table(example_id: list[str], example_index: Tensor) -> TokenTable:
    """Table of rows that are whole sequences."""
    none = torch.full((len(example_id),), -1, dtype=torch.int32)
    return TokenTable(example_id, example_index, none, none.clone(), none.clone())


def arrow_table(
    pieces: Iterable[tuple[TokenTable, Tensor]], width: int, dtype: torch.dtype | None
) -> pyarrow.Table:
    """Token tables with their features as one Arrow table; each piece becomes a chunk.

    Args:
        pieces: Tables, each with its features (n, width).
        width: Numbers per row.
        dtype: Dtype of the features. None: the table has no column of features.

    Returns:
        The columns of `TokenTable` and `features`, which shares memory with the tensors; Arrow has
        no bfloat16, which is copied as float32.

    Raises:
        ImportError: If pyarrow is missing.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise ImportError("to_arrow needs pyarrow: pip install pyarrow") from None
    fields = [
        pa.field("example_id", pa.string()),
        pa.field("example_index", pa.int64()),
        *(pa.field(column, pa.int32()) for column in COLUMNS),
    ]
    if dtype is not None:
        kinds = {torch.float16: pa.float16(), torch.float64: pa.float64()}
        fields.append(pa.field("features", pa.list_(kinds.get(dtype, pa.float32()), width)))
    schema = pa.schema(fields)
    batches = []
    for tokens, rows in pieces:
        arrays = [pa.array(tokens.example_id, pa.string())]
        arrays += [pa.array(getattr(tokens, name).numpy()) for name in ("example_index", *COLUMNS)]
        if dtype is not None:
            rows = (rows.float() if dtype == torch.bfloat16 else rows).cpu()
            flat = pa.array(rows.reshape(-1).numpy())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, width))
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)
