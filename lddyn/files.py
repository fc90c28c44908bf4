"""Files that a crash leaves whole, old or new; digests; values that JSON can hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lddyn.errors import StoreCorruptError, StoreError

__all__ = [
    "JsonObject",
    "canonical",
    "digest_of",
    "json_lines",
    "json_safe",
    "read_stored",
    "replace_file",
    "write_durably",
]

JsonObject = dict[str, Any]  # what a JSON object becomes: name → value, or what is nested in it
TEMPORARY = "incoming.tmp"  # name of a file until it is complete


def digest_of(*parts: bytes | bytearray) -> str:
    """SHA-256 of the parts one after another, cut to 128 bits: 32 hex digits.

    Cost: about 2 GiB/s, as processors compute SHA-256 themselves.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def canonical(content: Any) -> bytes:
    """The JSON text of a value, the same for equal values: digests are taken of it.

    Raises:
        ValueError: If the value holds a NaN or an infinity.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_all(fd: int, data: bytes | bytearray, offset: int = 0) -> None:
    """Write all of the data at an offset; one call of the kernel may write only a part."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(path: Path) -> None:
    """Make renames in the folder durable: until then a loss of power undoes them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes | bytearray) -> None:
    """Write a file that is whole or old after a crash of the process or a loss of power.

    Cost: it waits for the disk, twice.
    """
    temporary = path.with_name(TEMPORARY)
    temporary.unlink(missing_ok=True)  # with O_EXCL below: never writes through a link
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file that other processes see whole: the old one or the new one.

    Unlike `write_durably` it does not wait for the disk: after a loss of power the old one may be
    there.

    Args:
        path: The file; it may exist.
        content: Its bytes, or its text (written as UTF-8).
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def read_stored(path: Path, offset: int = 0, limit: int | None = None) -> bytes:
    """Bytes of a file of a store, from an offset to its end.

    Args:
        path: The file.
        offset: First byte.
        limit: Most bytes that the whole file may have. None: any.

    Raises:
        StoreCorruptError: If the file is missing or too large.
        StoreError: If it cannot be read.
    """
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


def json_lines(path: Path) -> Iterator[Any]:
    """The value of every line of a JSONL file; a line that a crash cut short is skipped."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def json_safe(value: Any) -> Any:
    """The value as strict JSON can hold it: NaN and infinities are None, tuples lists, keys str."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    return value
