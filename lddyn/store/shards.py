"""Shard files: rows of whole examples, sealed by a digest, written once and mapped when read.

Nothing here trusts what it reads: a byte that was changed, cut, added or moved is a
`StoreCorruptError` that names the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lddyn.data.token_table import COLUMNS, TokenTable
from lddyn.errors import StoreCorruptError, StoreError
from lddyn.files import digest_of, open_regular, parse_json
from lddyn.store.journal import Record

__all__ = ["Shard"]

_MAPPED = 64  # shards that stay mapped at a time

_NAME = re.compile(r"shard-(\d{6,})\.safetensors")

# What a shard says about itself: its store, its number, and the digest of all other bytes.
_SEAL = re.compile(rb'"lddyn":"([0-9a-f]{32}) (\d{1,12}) ([0-9a-f]{32})"')

_BLANK = b"0" * 32  # stands for the digest while the digest is computed

_LARGEST_HEADER = 2**16


@dataclass(frozen=True)
class Shard:
    """Some whole examples of a store.

    Attributes:
        number: Number of the shard, from 0.
        start: Row of the store that `rows[0]` is.
        rows: Features (n, width), mapped from disk; writing to them does not change the file.
        tokens: Which token each row is.
    """

    number: int
    start: int
    rows: Tensor
    tokens: TokenTable

    def __repr__(self) -> str:
        n, width = self.rows.shape
        examples = len(dict.fromkeys(self.tokens.example_id))
        return (
            f"Shard({self.number}: rows {self.start} to {self.start + n - 1} of the store, "
            f"{examples} examples, {width} × {str(self.rows.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True)
class Waiting:
    """An example that waits to be written."""

    example_id: str
    index: int
    rows: Tensor
    columns: dict[str, Tensor]


class ShardFolder:
    """The shards of one store: checked against their digests, mapped, the last 64 kept open.

    Args:
        path: Folder of the store.
        seal: Digest of the manifest; every shard carries it.
        width: Numbers in a row.
        dtype: Dtype of the rows.
    """

    def __init__(self, path: Path, seal: str, width: int, dtype: torch.dtype) -> None:
        self.path, self.seal, self.width, self.dtype = path, seal, width, dtype
        # Inode, size and time of each file when its digest was checked.
        self._checked: dict[int, tuple[int, int, int]] = {}
        self._mapped: OrderedDict[int, Shard] = OrderedDict()

    def file(self, number: int) -> Path:
        """Path of a shard."""
        return self.path / f"shard-{number:06d}.safetensors"

    def listed(self) -> list[int]:
        """Numbers of the shard files in the folder.

        Raises:
            StoreError: If the folder cannot be read.
        """
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read: {error}") from error
        return [int(match[1]) for match in map(_NAME.fullmatch, names) if match]

    def state(self, record: Record) -> tuple[int, int, int]:
        """Inode, size and modification time (ns) of a shard's file.

        Raises:
            StoreCorruptError: If the file is missing or has another size than the record says.
        """
        path = self.file(record.number)
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            raise StoreCorruptError(f"{path}: this shard is missing") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error}") from error
        if stat.st_size != record.size:
            raise StoreCorruptError(
                f"{path}: must have {record.size} bytes, got {stat.st_size}: the shard is damaged"
            )
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def unlisted(self, number: int) -> Record | None:
        """The record of a shard that the journal does not list; None if there is no such file.

        Raises:
            StoreCorruptError: If the shard does not prove by its seal that it belongs here.
        """
        path = self.file(number)
        if not os.path.lexists(path):
            return None
        digest, size = check_seal(path, number, self.seal)
        tensors = unpack(path, number, self.width, self.dtype)
        return Record(number, size, digest, examples_of(path, tensors))

    def open(self, record: Record, start: int) -> Shard:
        """A shard, mapped. Its digest is checked unless its file is as it was when last checked.

        Args:
            record: What the journal says about it.
            start: Row of the store at which it begins.

        Raises:
            StoreCorruptError: If the shard is damaged or is not the one of the record.
        """
        number, path = record.number, self.file(record.number)
        if number in self._mapped:
            self._mapped.move_to_end(number)
            return self._mapped[number]
        state = self.state(record)
        if self._checked.get(number) != state:
            if check_seal(path, number, self.seal) != (record.digest, record.size):
                raise StoreCorruptError(f"{path}: not the shard that the journal lists")
            self._checked[number] = state
        tensors = unpack(path, number, self.width, self.dtype)
        if examples_of(path, tensors) != record.examples:
            raise StoreCorruptError(f"{path}: holds other examples than the journal lists")
        names = [name for name, _, count in record.examples for _ in range(count)]
        index = tensors["example_index"][tensors["example"].long()]
        tokens = TokenTable(names, index, *(tensors[column] for column in COLUMNS))
        shard = Shard(number, start, tensors["rows"], tokens)
        self._mapped[number] = shard
        if len(self._mapped) > _MAPPED:
            self._mapped.popitem(last=False)
        return shard

    def unmap(self, number: int | None = None) -> None:
        """Forgets the mapping of one shard, or of all."""
        if number is None:
            self._mapped.clear()
        else:
            self._mapped.pop(number, None)

    def forget_checks(self) -> None:
        """Makes the next use of every shard read and check all of its bytes."""
        self._checked.clear()
        self._mapped.clear()


def pack(number: int, store: str, examples: Sequence[Waiting]) -> tuple[bytearray, Record]:
    """The sealed bytes of a shard, and its record; `store` is the digest of the manifest."""
    from safetensors.torch import save

    counts = torch.tensor([len(e.rows) for e in examples])
    tensors = {name: torch.cat([e.columns[name] for e in examples]) for name in COLUMNS}
    tensors |= {
        "rows": torch.cat([e.rows for e in examples]),
        "example": torch.arange(len(examples), dtype=torch.int32).repeat_interleave(counts),
        "example_index": torch.tensor([e.index for e in examples]),
        "example_id": torch.tensor(
            [list(bytes.fromhex(e.example_id)) for e in examples], dtype=torch.uint8
        ),
    }
    seal = f"{store} {number} {_BLANK.decode()}"
    data = bytearray(save(tensors, metadata={"lddyn": seal}))
    match = _SEAL.search(data[: 8 + struct.unpack_from("<Q", data)[0]])
    assert match is not None, "safetensors wrote the metadata in another form"
    digest = digest_of(data)
    data[match.start(3) : match.end(3)] = digest.encode()
    listed = tuple((e.example_id, e.index, len(e.rows)) for e in examples)
    return data, Record(number, len(data), digest, listed)


def check_seal(path: Path, number: int, store: str) -> tuple[str, int]:
    """Digest and size of a shard file, after its seal was checked against all of its bytes.

    Raises:
        StoreCorruptError: If a byte is not as it was written, or the shard has another number or
            belongs to another store than the one with this manifest digest.
    """
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < length <= _LARGEST_HEADER:
                raise StoreCorruptError(f"{path}: no header of a shard")
            header = bytearray(file.read(length))
            match = _SEAL.search(header)
            if match is None:
                raise StoreCorruptError(f"{path}: no seal of a shard")
            if os.fstat(file.fileno()).st_size != 8 + length + _data_bytes(header):
                raise StoreCorruptError(f"{path}: has another size than its header says")
            owner, which, sealed = (part.decode() for part in match.groups())
            header[match.start(3) : match.end(3)] = _BLANK
            digest.update(head)
            digest.update(header)
            buffer = bytearray(2**18)
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
            size = file.tell()
    except FileNotFoundError:
        raise StoreCorruptError(f"{path}: this shard is missing") from None
    except ValueError as error:
        raise StoreCorruptError(f"{path}: no shard: {error}") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if digest.hexdigest()[:32] != sealed:
        raise StoreCorruptError(f"{path}: checksum does not match: the shard is damaged")
    if owner != store or which != str(number):
        raise StoreCorruptError(f"{path}: this is shard {which}, or a shard of another store")
    return sealed, size


def _data_bytes(header: bytearray) -> int:
    """Bytes of the tensors that a header lists: where the last one ends.

    Raises:
        ValueError: If it is no header of a safetensors file.
    """
    try:
        tensors = [entry for name, entry in parse_json(bytes(header)).items() if name[:2] != "__"]
        return max(int(entry["data_offsets"][1]) for entry in tensors)
    except (AttributeError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"its header lists no tensors ({error})") from None


def unpack(path: Path, number: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard, mapped; a StoreCorruptError if a name, shape or dtype is wrong."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise StoreCorruptError(f"{path}: shard {number} cannot be read: {error}") from error
    n, e = len(tensors.get("rows", ())), len(tensors.get("example_id", ()))
    expected = {
        "rows": ((n, width), dtype),
        "example": ((n,), torch.int32),
        "example_id": ((e, 16), torch.uint8),
        "example_index": ((e,), torch.int64),
        **{name: ((n,), torch.int32) for name in COLUMNS},
    }
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if kinds != expected:
        raise StoreCorruptError(f"{path}: shard {number} must hold {expected}, got {kinds}")
    return tensors


def examples_of(path: Path, tensors: Mapping[str, Tensor]) -> tuple[tuple[str, int, int], ...]:
    """(content id, index, number of rows) of the examples of a shard, in order."""
    ids = [bytes(row).hex() for row in tensors["example_id"].tolist()]
    owner = tensors["example"].long()
    counts = torch.bincount(owner, minlength=len(ids)) if bool((owner >= 0).all()) else owner
    expected = torch.arange(len(ids)).repeat_interleave(counts) if len(counts) == len(ids) else None
    if expected is None or not torch.equal(expected, owner) or not bool((counts > 0).all()):
        raise StoreCorruptError(f"{path}: rows do not belong to the examples of the shard")
    return tuple(zip(ids, tensors["example_index"].tolist(), counts.tolist(), strict=True))
