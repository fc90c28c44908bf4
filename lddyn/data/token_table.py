"""Which token each feature row belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.example import Example

if TYPE_CHECKING:
    import pyarrow

if TYPE_CHECKING:
    import pyarrow

__all__ = ["TokenTable"]


def row_table(examples: Sequence[Example], by: str) -> TokenTable:
    """Which token, or whole sequence, each row is, for rows of these examples in their order."""
    if by == "sequence":
        names = [e.content_id for e in examples]
        return sequence_table(names, torch.arange(len(names)))
    found = [token_columns(e) for e in examples]
    columns = (
        torch.tensor([x for each in found for x in each[name]], dtype=torch.int32)
        for name in COLUMNS
    )
    return TokenTable(
        [e.content_id for e in examples for _ in range(len(e))],
        torch.tensor([i for i, e in enumerate(examples) for _ in range(len(e))]),
        *columns,
    )


def sequence_table(names: list[str], index: Tensor) -> TokenTable:
    """The same for rows of whole sequences: content ids and places."""
    none = torch.full((len(names),), -1, dtype=torch.int32)
    return TokenTable(names, index, none, none.clone(), none.clone())


@dataclass(frozen=True)
class TokenTable:
    """Which token each row is.

    Attributes:
        example_id: `Example.content_id` of each row, list of n.
        example_index: Place of the example in the data set, (n,) int64.
        response_index: Place of the token in the response, (n,) int32.
        position: Logit column that predicts the token, (n,) int32.
        token_id: The token, (n,) int32.
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
        """Some of the rows."""
        columns = (getattr(self, name)[rows] for name in ("example_index", *COLUMNS))
        return TokenTable(self.example_id[rows], *columns)


def arrow_table(
    pieces: Iterable[tuple[TokenTable, Tensor]], width: int, dtype: torch.dtype | None
) -> pyarrow.Table:
    """Token tables and rows of a dtype (None: without them) as an Arrow table, a chunk a piece.

    The column of rows is a view of them; Arrow has no bfloat16, which is copied as float32.
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


def token_columns(example: Example) -> dict[str, Sequence[int]]:
    """`response_index`, `position` and `token_id` of each counted response token."""
    first = len(example.prompt_ids) - 1
    return {
        "response_index": [p - first for p in example.positions],
        "position": example.positions,
        "token_id": example.targets,
    }


COLUMNS = ("response_index", "position", "token_id")
