"""Which examples a store holds, and where their rows are."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.data.token_table import COLUMNS, TokenTable
from lddyn.errors import StoreCorruptError, StoreError
from lddyn.store.journal import Journal, Record
from lddyn.store.shards import Shard, ShardFolder

CONTENT_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Place:
    """Where an example is.

    Attributes:
        number: Number of the example in stored order.
        index: Its index in the data set.
        start: Its first row.
        count: Number of its rows.
    """

    number: int
    index: int
    start: int
    count: int


class Contents:
    """The examples and rows of a store, as its journal and its shards list them.

    Args:
        journal: The journal file.
        shards: The shard files.

    Attributes:
        records: One for each shard, in order.
        starts: Row of the store at which each shard begins; the last entry is the number of rows.
        places: Content id → where the example is.
        example_ids: Content ids in stored order.
    """

    def __init__(self, journal: Journal, shards: ShardFolder) -> None:
        self.journal, self.shards = journal, shards
        self.records: list[Record] = []
        self.starts = [0]
        self.places: dict[str, Place] = {}
        self.example_ids: list[str] = []
        self._by_index: dict[int, str] = {}

    # ------------------------------------------------------------------ what there is

    def update(self) -> list[Record]:
        """Reads what was added to the journal, then looks for shards that it does not list.

        A writer renames a shard before it writes the shard's line. A shard without a line is
        therefore sound if its seal says so; all shards of a journal that lost its end look like
        that too.

        Returns:
            Records of the shards that the journal does not list.

        Raises:
            StoreCorruptError: If the journal or an unlisted shard is damaged, or a shard is missing
                that the journal or a later shard shows to have existed.
        """
        listed = self.shards.listed()  # first: these existed before the journal was read
        added = self.journal.new_records()
        self._drop(self.journal.count)
        for record in added:
            self.shards.state(record)
            self.add(record)
        unlisted = []
        while (next_record := self.shards.unlisted(len(self.records))) is not None:
            self.add(next_record)
            unlisted.append(next_record)
        # A kill leaves half a line only after the line's shard was written.
        lost = self.journal.torn and not unlisted
        if lost or max(listed, default=-1) >= len(self.records):
            raise StoreCorruptError(
                f"{self.shards.file(len(self.records))}: this shard is missing; the journal, or a "
                "later shard, shows that it was there"
            )
        return unlisted

    def add(self, record: Record) -> None:
        """Adds the examples of the next shard.

        Raises:
            StoreCorruptError: If it is not the next shard, or lists an example again.
        """
        where = f"{self.journal.path}: shard {record.number}"
        if record.number != len(self.records):
            raise StoreCorruptError(f"{where} in the place of {len(self.records)}")
        start = self.starts[-1]
        for name, index, count in record.examples:
            if not CONTENT_ID.fullmatch(name) or count < 1:
                raise StoreCorruptError(f"{where} lists no example as {name!r} of {count} tokens")
            if name in self.places or index in self._by_index:
                raise StoreCorruptError(f"{where} lists example {name} (index {index}) again")
            self.places[name] = Place(len(self.example_ids), index, start, count)
            self.example_ids.append(name)
            self._by_index[index] = name
            start += count
        self.records.append(record)
        self.starts.append(start)

    def _drop(self, number: int) -> None:
        """Drops the shards from this number on; the journal may list them by now."""
        for record in self.records[number:]:
            for name, index, _ in record.examples:
                del self.places[name]
                del self._by_index[index]
            self.shards.unmap(record.number)
        del self.records[number:], self.starts[number + 1 :]
        del self.example_ids[len(self.places) :]

    def at(self, index: int) -> str | None:
        """Content id of the example with this index in the data set, or None."""
        return self._by_index.get(index)

    def __len__(self) -> int:
        """Number of rows."""
        return self.starts[-1]

    def verify(self) -> list[str]:
        """Reads every byte of every shard again; one line for each damaged shard."""
        self.shards.forget_checks()
        problems = []
        for number in range(len(self.records)):
            try:
                self.shard(number)
            except StoreError as error:
                problems.append(str(error))
        return problems

    # ------------------------------------------------------------------ rows

    def shard(self, number: int) -> Shard:
        """A shard, checked and mapped."""
        return self.shards.open(self.records[number], self.starts[number])

    def pieces(self, start: int, stop: int | None) -> Iterator[tuple[Shard, slice]]:
        """Yields the shards that hold rows start:stop, each with the rows inside it.

        Raises:
            IndexError: If the range is not within the store.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows must be within 0:{len(self)}, got {start}:{stop}")
        number = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            first, end = self.starts[number], self.starts[number + 1]
            yield self.shard(number), slice(start - first, min(stop, end) - first)
            start, number = end, number + 1

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop; see `Store.rows`."""
        parts = [shard.rows[inside] for shard, inside in self.pieces(start, stop)]
        if len(parts) == 1:
            return parts[0]
        empty = torch.empty(0, self.shards.width, dtype=self.shards.dtype)
        return torch.cat(parts) if parts else empty

    def tokens(self, start: int = 0, stop: int | None = None) -> TokenTable:
        """Which token each of the rows start:stop is."""
        parts = [shard.tokens[inside] for shard, inside in self.pieces(start, stop)]
        if len(parts) == 1:
            return parts[0]
        empty = {"example_index": torch.int64, **dict.fromkeys(COLUMNS, torch.int32)}
        columns = (
            torch.cat([torch.empty(0, dtype=kind), *(getattr(p, name) for p in parts)])
            for name, kind in empty.items()
        )
        return TokenTable([name for part in parts for name in part.example_id], *columns)
