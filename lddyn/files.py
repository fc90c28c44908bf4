"""Files that a crash leaves whole, old or new; digests; values that JSON can hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lddyn.errors import StoreCorruptError, StoreError

__all__ = [
    "JsonObject",
    "append_text",
    "canonical",
    "digest_of",
    "json_safe",
    "naming",
    "open_regular",
    "parse_json",
    "read_regular",
    "read_sealed",
    "read_stored",
    "replace_file",
    "sealed",
    "subfolder",
    "unsealed",
    "write_durably",
]

JsonObject = dict[str, Any]  # what a JSON object becomes: name → value, or what is nested in it
LARGEST_RECORD = 1 << 30  # bytes of a JSON file of lddyn's: more is no such file
TEMPORARY = "incoming.tmp"  # name of a file until it is complete


@contextlib.contextmanager
def naming(file: str) -> Iterator[None]:
    """A ValueError within names the file, unless there is none or it is named already."""
    try:
        yield
    except ValueError as error:
        if not file or file in str(error):
            raise
        raise ValueError(f"{file}: {error}") from error


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
    """Write a file of a store: it is whole or old after a crash or a loss of power.

    The folder's one writer calls it, so that all files share the temporary name `TEMPORARY`.

    Cost: it waits for the disk, twice.
    """
    _replace(path, data, path.with_name(TEMPORARY), durable=True)


def replace_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file that other processes see whole: the old one or the new one.

    A link at its temporary name is removed and never followed.

    Args:
        path: The file; it may exist.
        content: Its bytes, or its text (written as UTF-8).
        durable: Wait for the disk, so that a loss of power leaves the old or the new one, too.
    """
    data = content.encode() if isinstance(content, str) else content
    _replace(path, data, path.with_name(path.name + ".tmp"), durable=durable)


def _replace(path: Path, data: bytes | bytearray, temporary: Path, *, durable: bool) -> None:
    temporary.unlink(missing_ok=True)  # with O_EXCL below: never writes through a link
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:  # a full disk: calls of the kernel on numbers name no file
        temporary.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    if durable:
        sync_folder(path.parent)


def open_regular(path: Path | str, flags: int = os.O_RDONLY) -> int:
    """A file descriptor of a regular file; it must be closed.

    A pipe or a device of that name is refused without waiting for it. When the flags ask for
    writing, a link is refused, too, and a file with several names: in a shared folder it could be a
    file of somebody else, or that of a backup.

    Raises:
        OSError: If it cannot be opened, or is a link and would be written.
        ValueError: If it is no regular file, or has several names (hard links) and would be
            written.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    fd = os.open(path, flags | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
    about = os.fstat(fd)
    names = about.st_nlink if writes else 1
    if stat.S_ISREG(about.st_mode) and names < 2:
        return fd
    os.close(fd)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path}: must be a regular file")
    raise ValueError(
        f"{path}: has {names} names (hard links), and writing would change the others, too: put a "
        "copy of the file in its place"
    )


def subfolder(folder: Path, *names: str) -> Path:
    """A folder inside the folder of a result, which is made; it is never one elsewhere.

    Raises:
        ValueError: If one of the names is a link: it could lead to a folder of somebody else.
    """
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise ValueError(
                f"{folder}: is a link, and a result is written into a folder of its own"
            )
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_regular(
    path: Path | str, offset: int = 0, limit: int | None = None, most: int | None = None
) -> bytes:
    """The bytes of a regular file, or of the file that a link leads to, from an offset to its end.

    Args:
        path: The file.
        offset: First byte.
        limit: Most bytes that the whole file may have. None: any.
        most: Most bytes to read. None: up to the end.

    Raises:
        OSError: If it is missing or cannot be read.
        ValueError: If it is no regular file, or larger than `limit`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        if limit is not None and os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"{path}: larger than {limit} bytes")
        file.seek(offset)
        return file.read(most)


def append_text(path: Path, text: str) -> None:
    """Appends to a regular file, which is made if it is not there; a link is refused.

    Where there is no room for all of the text, nothing is appended.
    """
    fd = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(fd).st_size
        try:
            write_all(fd, text.encode())
        except OSError as error:  # a full disk: calls of the kernel on numbers name no file
            os.ftruncate(fd, size)
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these pairs, as `object_pairs_hook` of the module json.

    Raises:
        ValueError: If a key occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return values


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text whose objects name every key once.

    Raises:
        ValueError: If it is no JSON (NaN and Infinity are none), nested too deeply, or a key occurs
            twice in one object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_constant=refuse,
        )
    except RecursionError:
        raise ValueError("too deeply nested") from None


def sealed(content: Mapping[str, Any], indent: int | None = 1) -> str:
    """The JSON text of `json_safe(content)` with its "digest": `unsealed` sees any later change.

    Args:
        content: The content, without an entry "digest".
        indent: None writes one line.

    Raises:
        TypeError: If the content holds what JSON cannot.
    """
    values = json_safe({**content})
    if "digest" in values:
        raise ValueError('the content to seal must have no entry "digest"')
    values["digest"] = digest_of(canonical(values))
    return json.dumps(values, indent=indent, allow_nan=False) + "\n"


def unsealed(text: str | bytes, name: str) -> dict[str, Any]:
    """The content of a text that `sealed` made, without its digest.

    Args:
        text: The text.
        name: What errors call it.

    Raises:
        ValueError: If it has changed since it was written, or was never sealed.
    """
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not as lddyn wrote it: {error}") from error
    if not isinstance(values, dict) or "digest" not in values:
        raise ValueError(f"{name} has no digest: this version of lddyn did not write it")
    if values.pop("digest") != digest_of(canonical(values)):
        raise ValueError(f"{name} is not as lddyn wrote it: its digest differs")
    return dict(values)


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file that holds what `sealed` made, without its digest.

    Raises:
        OSError: If the file is missing or cannot be read.
        ValueError: If it has changed since it was written, or was never sealed.
    """
    return unsealed(read_regular(path, limit=LARGEST_RECORD), str(path))


def read_stored(
    path: Path, offset: int = 0, limit: int | None = None, most: int | None = None
) -> bytes:
    """Bytes of a file of a store, from an offset to its end.

    Args:
        path: The file.
        offset: First byte.
        limit: Most bytes that the whole file may have. None: any.
        most: Most bytes to read. None: up to the end.

    Raises:
        StoreCorruptError: If the file is missing or too large.
        StoreError: If it cannot be read.
    """
    try:
        return read_regular(path, offset, limit, most)
    except ValueError as error:
        raise StoreCorruptError(str(error)) from None
    except FileNotFoundError:
        raise StoreCorruptError(f"{path}: this file of the store is missing") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error


def json_safe(value: Any) -> Any:
    """The value as strict JSON can hold it: NaN and infinities are None, tuples lists, keys str."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    return value
