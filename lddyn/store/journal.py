"""The journal of a store: one checksummed line for each shard, appended after the shard's file.

The checksum of a line covers the line before it, and that of the first line covers the manifest. A
line that was changed, moved, dropped or copied from another store is therefore detected.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lddyn.errors import StoreCorruptError, StoreError
from lddyn.files import canonical, digest_of, open_regular, parse_json, read_stored, write_all

_PART = 1 << 24  # bytes that are read at a time


@dataclass(frozen=True)
class Record:
    """One line of the journal: a shard and the examples in it.

    Attributes:
        number: Number of the shard, from 0.
        size: Bytes of the shard's file.
        digest: Digest in the shard's seal.
        examples: (content id, index in the data set, number of rows) of each example, in order.
    """

    number: int
    size: int
    digest: str
    examples: tuple[tuple[str, int, int], ...]

    @cached_property
    def rows(self) -> int:
        """Rows in the shard."""
        return sum(count for _, _, count in self.examples)

    def payload(self) -> bytes:
        """The line without its checksum."""
        return canonical(
            {
                "shard": self.number,
                "bytes": self.size,
                "digest": self.digest,
                "rows": self.rows,
                "examples": self.examples,
            }
        )

    @classmethod
    def parse(cls, payload: bytes) -> Record:
        """The record of a line; a ValueError if the line is not exactly what `payload` writes."""
        try:
            content = parse_json(payload)
            examples = tuple((str(i), int(x), int(n)) for i, x, n in content["examples"])
            record = cls(
                int(content["shard"]), int(content["bytes"]), str(content["digest"]), examples
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a record of a shard: {error}") from error
        if record.payload() != payload:
            raise ValueError("not a record of a shard")
        return record


class Journal:
    """The journal file, read from where the last call stopped.

    Args:
        path: The file.
        seal: Digest of the manifest, which starts the chain of checksums.

    Attributes:
        count: Lines that were read or written: shards in the journal.
        torn: Whether the file ended in an incomplete line when it was last read.
    """

    def __init__(self, path: Path, seal: str) -> None:
        self.path = path
        self.count = 0
        self.torn = False
        self._chain = seal  # checksum of the last line
        self._offset = 0  # end of the last line, bytes

    def new_records(self) -> Iterator[Record]:
        """Reads the file on; returns an iterator over the records of lines added since last time.

        A line counts as read once the next one is taken: a caller that stops with an error gets the
        same line again.

        Raises:
            StoreCorruptError: (by the iterator) If a line is damaged or out of order.
        """
        *lines, rest = self._read().split(b"\n")
        self.torn = bool(rest)
        return self._parse(lines)

    def _read(self) -> bytes:
        """The rest of the file, up to a hole: zeros that a sparse file or a loss of power has."""
        parts: list[bytes] = []
        at = self._offset
        while part := read_stored(self.path, at, most=_PART):
            parts.append(part)
            at += len(part)
            if not part.strip(b"\0"):
                break
        return b"".join(parts)

    def _parse(self, lines: list[bytes]) -> Iterator[Record]:
        for line in lines:
            where = f"{self.path}: line {self.count + 1}"
            payload, _, checksum = line.rpartition(b" ")
            if digest_of(self._chain.encode(), payload).encode() != checksum:
                raise StoreCorruptError(
                    f"{where} (shard {self.count}) is damaged, or belongs to another store"
                )
            try:
                record = Record.parse(payload)
            except ValueError as error:
                raise StoreCorruptError(f"{where}: {error}") from error
            yield record
            self._advance(line + b"\n", checksum.decode())

    def append(self, record: Record) -> None:
        """Writes the line of a shard and syncs it; an incomplete line at the end is overwritten.

        Raises:
            OSError: If the line cannot be written; the file then ends as it did before.
            StoreError: If the file is no regular file, or has several names.
        """
        payload = record.payload()
        checksum = digest_of(self._chain.encode(), payload)
        line = payload + b" " + checksum.encode() + b"\n"
        try:
            fd = open_regular(self.path, os.O_WRONLY)
        except ValueError as error:
            raise StoreError(str(error)) from error
        try:
            if os.fstat(fd).st_size != self._offset:
                os.ftruncate(fd, self._offset)
            try:
                write_all(fd, line, self._offset)
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, self._offset)
                raise
        finally:
            os.close(fd)
        self._advance(line, checksum)

    def _advance(self, line: bytes, checksum: str) -> None:
        self._chain = checksum
        self._offset += len(line)
        self.count += 1
