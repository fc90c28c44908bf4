"""Writing files so that a crash leaves the old one or the new one; digests; JSON-safe values."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lddyn.errors import StoreCorruptError, StoreError

__all__ = ["plain"]

TEMPORARY = "incoming.tmp"  # what a file is called until it is complete


def digest_of(*parts: bytes | bytearray) -> str:
    """128 bits of SHA-256, which processors compute at 2 GiB/s; 32 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def canonical(content: Any) -> bytes:
    """The one JSON text of a content: what digests are taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


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


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become None, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
