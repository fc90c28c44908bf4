"""The files of a feature store: sealed shards, chained journal lines, a checked manifest, a lock.

Nothing here trusts what it reads: a byte that was changed, cut, added or moved is a
`StoreCorruptError` that names the file, and nothing is written before it is known to be in order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MANIFEST, JOURNAL, LOCK, TEMPORARY = "manifest.json", "journal.jsonl", "lock", "incoming.tmp"
COLUMNS = ("response_index", "position", "token_id")
CONTENT_ID = re.compile(r"[0-9a-f]{32}")
SHARD_NAME = re.compile(r"shard-(\d{6,})\.safetensors")
# What a shard says about itself: its store, its number, and the digest of all other bytes.
_SEAL = re.compile(rb'"lddyn":"([0-9a-f]{32}) (\d{1,12}) ([0-9a-f]{32})"')
_HOLE = b"0" * 32
LARGEST_MANIFEST = 2**24
_LARGEST_HEADER = 2**16


class StoreError(RuntimeError):
    """A store that cannot be read or written; the message names the file."""


class StoreCorruptError(StoreError):
    """A file of the store is not what was written."""


class StoreLockedError(StoreError):
    """Another process writes this store."""


class StoreIdentityError(StoreError):
    """The store was made by something else than what it is opened for.

    Attributes:
        fields: Name → (stored, given) of each field that differs; absent ones are `"absent"`.
    """

    def __init__(self, path: Path, fields: dict[str, tuple[Any, Any]]) -> None:
        """The message names all fields with both values, of lists what differs first."""
        shown = {k: _apart(a, b) for k, (a, b) in fields.items()}
        listed = "; ".join(f"{k}: stored {a!r}, given {b!r}" for k, (a, b) in shown.items())
        super().__init__(
            f"{path} belongs to something else: {listed} (open it with what made it, or make "
            "another store)"
        )
        self.fields = fields


# ---------------------------------------------------------------------------------------------
# Bytes


def digest_of(*parts: bytes | bytearray) -> str:
    """128 bits of SHA-256, which processors compute at 2 GiB/s; 32 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def canonical(content: Any) -> bytes:
    """The one JSON text of a content: what digests are taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def plain(name: str, content: Any) -> Any:
    """`content` as JSON gives it back: tuples become lists; what JSON cannot hold is refused."""
    try:
        return json.loads(canonical(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be JSON (text, numbers, lists, dicts): {error}") from error


def _parse(data: bytes) -> Any:
    """JSON, or a ValueError whatever is wrong with it."""
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("too deeply nested") from None


def write_all(fd: int, data: bytes | bytearray, offset: int = 0) -> None:
    """Writes at an offset, however many calls the kernel wants for it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(path: Path) -> None:
    """Makes names durable: a rename is lost with the power until its folder is synced."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put(path: Path, data: bytes | bytearray) -> None:
    """Writes a file so that after any crash it is there as a whole or not at all."""
    temporary = path.with_name(TEMPORARY)
    temporary.unlink(missing_ok=True)  # and O_EXCL: never through somebody's link
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file that other processes see as it was or as it is, never in part.

    Unlike `put` it does not wait for the disk: after a loss of power it may be the old one.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def read(path: Path, offset: int = 0, limit: int | None = None) -> bytes:
    """The file from an offset, as a StoreError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            if limit is not None and os.fstat(file.fileno()).st_size > limit:
                raise StoreCorruptError(f"{path}: larger than {limit} bytes")
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        raise StoreCorruptError(f"{path}: this file of the store is missing") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _apart(stored: Any, given: Any) -> tuple[Any, Any]:
    """Of two lists the first entries that differ, or else their lengths."""
    if isinstance(stored, list) and isinstance(given, list):
        for one, other in zip(stored, given, strict=False):
            if one != other:
                return one, other
        return len(stored), len(given)
    return stored, given


def differences(stored: Any, given: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name → both values, of the fields that differ."""
    a, b = _flat(stored), _flat(given)
    absent = "absent"
    pairs = {key: (a.get(key, absent), b.get(key, absent)) for key in sorted({*a, *b})}
    # Compared as JSON: 1, 1.0 and true are different fields.
    return {k: (x, y) for k, (x, y) in pairs.items() if canonical(x) != canonical(y)}


# ---------------------------------------------------------------------------------------------
# The lock


class Lock:
    """Exclusive right to write; the kernel takes it back when the process ends, however it ends."""

    fd = -1

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise StoreError("writing a store needs a POSIX system (reading does not)") from None
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened for writing: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(fd, 200).decode(errors="replace").strip() or "an unknown process"
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise StoreLockedError(
                    f'{path.parent} is being written by {owner}: wait for it, or read with mode="r"'
                ) from None
            raise StoreError(f"{path}: cannot be locked: {error}") from error
        self.fd = fd
        _LOCKS.add(self)
        with contextlib.suppress(OSError):  # only for the message above
            os.ftruncate(fd, 0)
            write_all(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode())

    def release(self) -> None:
        """Ends the right to write."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)
            self.let_go()

    def let_go(self) -> None:
        """Closes the descriptor; in a forked child that leaves the lock with the parent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.let_go()  # a writer that nobody holds any more must not keep others out


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_LOCKS):
        lock.let_go()


if hasattr(os, "register_at_fork"):
    # A data loader's worker that outlives a killed writer must not keep the lock.
    os.register_at_fork(after_in_child=_let_go_in_child)


# ---------------------------------------------------------------------------------------------
# Shards and their records


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
        return canonical({
            "shard": self.number, "bytes": self.size, "digest": self.digest, "rows": self.rows,
            "examples": self.examples,
        })  # fmt: skip

    @classmethod
    def parse(cls, payload: bytes) -> Record:
        """The record of a line; a ValueError if the line is not exactly what `payload` writes."""
        try:
            content = _parse(payload)
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


# ---------------------------------------------------------------------------------------------
# The manifest


def essence(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two stores must share; the size of shards is only a habit of the writer."""
    return {k: v for k, v in manifest.items() if k != "shard_bytes"}


def render(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest file, checksum included."""
    content = {"checksum": digest_of(canonical(manifest)), "manifest": manifest}
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, byte for byte as it was written."""
    file = path / MANIFEST
    if not file.exists():
        raise StoreError(f"{path}: no store here (no {MANIFEST})")
    data = read(file, limit=LARGEST_MANIFEST)
    try:
        content = _parse(data)
        manifest: dict[str, Any] = content["manifest"]
        sound = render(manifest) == data  # the checksum, and no byte more
        version = manifest.get("format")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StoreCorruptError(f"{file}: damaged: {error}") from error
    if not sound:
        raise StoreCorruptError(f"{file}: checksum does not match: the manifest is damaged")
    if version != FORMAT:
        raise StoreError(f"{file}: format must be {FORMAT}, got {version!r}: another lddyn's store")
    expected = {"format", "identity", "layout", "dtype", "width", "shard_bytes"}
    if set(manifest) != expected or manifest["dtype"] not in DTYPES:
        raise StoreCorruptError(f"{file}: must have {sorted(expected)}, got {sorted(manifest)}")
    return manifest
