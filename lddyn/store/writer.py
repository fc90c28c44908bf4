"""Appending to a store: examples wait in memory until they fill a shard or are flushed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.data.token_table import COLUMNS, token_columns
from lddyn.errors import StoreError
from lddyn.files import TEMPORARY, write_durably
from lddyn.store.contents import CONTENT_ID, Contents
from lddyn.store.journal import Record
from lddyn.store.lock import Lock
from lddyn.store.shards import Waiting, pack

Columns: TypeAlias = Mapping[str, Sequence[int] | Tensor]


class Writer:
    """The one writer of a store.

    Args:
        contents: What the store holds; shards that were written are added to it.
        lock: The right to write.
        shard_bytes: Bytes of rows after which a shard is written.

    Raises:
        StoreError: If the journal cannot be written.
    """

    def __init__(self, contents: Contents, lock: Lock, shard_bytes: int) -> None:
        self.contents, self.lock, self.shard_bytes = contents, lock, shard_bytes
        self.examples: set[str] = set()  # not yet on disk
        self._indices: set[int] = set()  # of these examples
        self._waiting: list[Waiting] = []
        self._bytes = 0
        self._packed: tuple[bytearray, Record] | None = None  # a shard whose writing has failed

    def list_shards(self, unlisted: Sequence[Record]) -> None:
        """Writes journal lines for shards that have none.

        Raises:
            StoreError: If the journal cannot be written.
        """
        journal = self.contents.journal
        try:
            for record in unlisted:
                journal.append(record)
        except OSError as error:
            raise StoreError(f"{journal.path}: cannot be written: {error}") from error

    def append(
        self, example: Example | str, rows: Tensor, tokens: Columns | None, index: int | None
    ) -> None:
        """Adds the rows of one example; see `Store.append`."""
        name = example if isinstance(example, str) else example.content_id
        if not CONTENT_ID.fullmatch(name):
            raise ValueError(f"example must be an Example or its content id, got {name!r:.80}")
        if name in self.contents.places or name in self.examples:
            raise ValueError(f"example {name} is in the store already: check store.has(…) first")
        rows = self._checked(rows, name)
        if tokens is None:
            if isinstance(example, str):
                raise ValueError("tokens must be given with a content id: which token is each row?")
            tokens = token_columns(example)
        columns = {column: _column(column, tokens, len(rows)) for column in COLUMNS}
        if index is None:
            index = len(self.contents.example_ids) + len(self.examples)
        if self.contents.at(index) is not None or index in self._indices:
            raise ValueError(
                f"{self.contents.shards.path}: index {index} belongs to another example: pass "
                "index=, the place of this one in its data set, or take another folder (--out, "
                "--store) for another data set"
            )
        dtype = self.contents.shards.dtype
        kept = rows.to("cpu", dtype, copy=True).contiguous()
        if not bool(torch.isfinite(kept).all()):
            bad = int((~torch.isfinite(kept)).any(1).nonzero()[0])
            raise ValueError(
                f"rows must be finite in {dtype}, got {float(rows[bad].abs().max())} in row "
                f"{bad} of example {name}"
            )
        self._waiting.append(Waiting(name, int(index), kept, columns))
        self.examples.add(name)
        self._indices.add(int(index))
        self._bytes += kept.nbytes
        if self._bytes >= self.shard_bytes:
            self.flush()

    def _checked(self, rows: Tensor, name: str) -> Tensor:
        width = self.contents.shards.width
        rows = torch.as_tensor(rows).detach()
        if rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point():
            raise ValueError(
                f"rows must be floating (n, {width}), got {rows.dtype} {tuple(rows.shape)}"
            )
        if len(rows) < 1:
            raise ValueError(f"rows must have at least 1 row, got 0 for example {name}")
        return rows

    def flush(self) -> None:
        """Writes what waits; see `Store.flush`."""
        contents = self.contents
        while self._packed is not None or self._waiting:
            if self._packed is None:
                seal = contents.shards.seal
                self._packed = pack(len(contents.records), seal, self._waiting)
                self._waiting, self._bytes = [], 0
            data, record = self._packed  # the same bytes again if this fails half way
            path = contents.shards.file(record.number)
            try:
                write_durably(path, data)
                contents.journal.append(record)
            except OSError as error:
                with contextlib.suppress(OSError):
                    path.with_name(TEMPORARY).unlink(missing_ok=True)
                raise StoreError(
                    f"{path}: cannot be written: {error} ({len(self.examples)} examples wait in "
                    "memory: make room and call flush() again)"
                ) from error
            self._packed = None
            contents.add(record)
            for name, index, _ in record.examples:
                self.examples.remove(name)
                self._indices.remove(index)


def _column(name: str, tokens: Columns, count: int) -> Tensor:
    """A column of the token table as int32; a ValueError if it is not one."""
    if name not in tokens:
        raise ValueError(f"tokens must have the columns {', '.join(COLUMNS)}, got no {name}")
    column = torch.as_tensor(tokens[name])
    if column.shape != (count,) or column.is_floating_point() or column.is_complex():
        raise ValueError(
            f"tokens[{name!r}] must be {count} integers, one per row, got {column.dtype} "
            f"{tuple(column.shape)}"
        )
    column = column.to("cpu", torch.int64)
    if bool((column < 0).any()) or bool((column >= 2**31).any()):
        raise ValueError(f"tokens[{name!r}] must be within 0..2^31 - 1")
    return column.to(torch.int32)
