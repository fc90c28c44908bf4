"""The files of a feature store: sealed shards, chained journal lines, a checked manifest, a lock.

Nothing here trusts what it reads: a byte that was changed, cut, added or moved is a
`StoreCorruptError` that names the file, and nothing is written before it is known to be in order.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lddyn.data.token_table import COLUMNS
from lddyn.errors import StoreCorruptError, StoreError
from lddyn.files import canonical, digest_of
from lddyn.store.manifest import parse_json

CONTENT_ID = re.compile(r"[0-9a-f]{32}")

SHARD_NAME = re.compile(r"shard-(\d{6,})\.safetensors")

# What a shard says about itself: its store, its number, and the digest of all other bytes.
_SEAL = re.compile(rb'"lddyn":"([0-9a-f]{32}) (\d{1,12}) ([0-9a-f]{32})"')

_HOLE = b"0" * 32

_LARGEST_HEADER = 2**16


@dataclass(frozen=True)
class Record:
    """One line of the journal."""

    number: int
    size: int  # bytes of the file
    digest: str
    examples: tuple[tuple[str, int, int], ...]  # content id, index, tokens

    @cached_property
    def rows(self) -> int:
        """Tokens in the shard."""
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


@dataclass(frozen=True)
class Pending:
    """An example that waits to be written."""

    example_id: str
    index: int
    rows: Tensor
    columns: dict[str, Tensor]


def pack(number: int, manifest: str, examples: Sequence[Pending]) -> tuple[bytearray, Record]:
    """The bytes of a shard, sealed, and its record."""
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
    seal = f"{manifest} {number} {_HOLE.decode()}"
    data = bytearray(save(tensors, metadata={"lddyn": seal}))
    match = _SEAL.search(data[: 8 + struct.unpack_from("<Q", data)[0]])
    assert match is not None, "safetensors wrote the metadata in another form"
    digest = digest_of(data)
    data[match.start(3) : match.end(3)] = digest.encode()
    listed = tuple((e.example_id, e.index, len(e.rows)) for e in examples)
    return data, Record(number, len(data), digest, listed)


def check_seal(path: Path, number: int, manifest: str) -> tuple[str, int]:
    """Digest and size of a shard file, after its seal was checked against all of its bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < length <= _LARGEST_HEADER:
                raise StoreCorruptError(f"{path}: no header of a shard")
            header = bytearray(file.read(length))
            match = _SEAL.search(header)
            if match is None:
                raise StoreCorruptError(f"{path}: no seal of a shard")
            owner, which, sealed = (part.decode() for part in match.groups())
            header[match.start(3) : match.end(3)] = _HOLE
            digest.update(head)
            digest.update(header)
            buffer = bytearray(2**18)
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
            size = file.tell()
    except FileNotFoundError:
        raise StoreCorruptError(f"{path}: this shard is missing") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if digest.hexdigest()[:32] != sealed:
        raise StoreCorruptError(f"{path}: checksum does not match: the shard is damaged")
    if owner != manifest or which != str(number):
        raise StoreCorruptError(f"{path}: shard {which} of another place or store")
    return sealed, size


def unpack(path: Path, number: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard, mapped; names, shapes and dtypes are checked."""
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
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if found != expected:
        raise StoreCorruptError(f"{path}: shard {number} must hold {expected}, got {found}")
    return tensors


def examples_of(path: Path, tensors: Mapping[str, Tensor]) -> tuple[tuple[str, int, int], ...]:
    """The examples of a shard, as its record lists them."""
    ids = [bytes(row).hex() for row in tensors["example_id"].tolist()]
    owner = tensors["example"].long()
    counts = torch.bincount(owner, minlength=len(ids)) if bool((owner >= 0).all()) else owner
    expected = torch.arange(len(ids)).repeat_interleave(counts) if len(counts) == len(ids) else None
    if expected is None or not torch.equal(expected, owner) or not bool((counts > 0).all()):
        raise StoreCorruptError(f"{path}: rows do not belong to the examples of the shard")
    return tuple(zip(ids, tensors["example_index"].tolist(), counts.tolist(), strict=True))
