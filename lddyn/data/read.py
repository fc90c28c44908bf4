"""Data rows from files (JSONL, JSON, Parquet), data sets and iterables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lddyn.data.columns import Row
from lddyn.errors import ExampleError, glimpse

__all__ = ["rows"]

RowDict = dict[str, Any]


def rows(
    source: str | os.PathLike[str] | Iterable[Row], *, limit: int | None = None
) -> list[RowDict]:
    """Read data rows from a file, a data set, or any iterable of mappings.

    Args:
        source: Path of a JSONL, JSON (a list) or Parquet file; or a list of dicts, a
            `datasets.Dataset`, a pandas data frame, or any iterable of mappings.
        limit: Most rows to read. None: all.

    Returns:
        The rows as dicts, in order.

    Raises:
        ExampleError: (a ValueError) If a row cannot be read; the message names file, line and
            problem.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from lddyn.data.read import rows
        >>> rows([{"prompt": "Is it red?", "completion": " Yes"}])
        [{'prompt': 'Is it red?', 'completion': ' Yes'}]
    """
    read: list[RowDict] = []
    for row in rows_or_errors(source):
        if limit is not None and len(read) >= limit:
            break
        if isinstance(row, ExampleError):
            raise row
        read.append(row)
    return read


def _unreadable(where: str, problem: str) -> ExampleError:
    """Error for a row that cannot be read."""
    return ExampleError(f"{where}: {problem}", problem="unreadable_row")


def rows_or_errors(
    source: str | os.PathLike[str] | Iterable[Row],
) -> Iterator[RowDict | ExampleError]:
    """Yield each row, or the error that says why it cannot be read.

    Raises:
        ExampleError: If the file or the source as a whole cannot be read.
        FileNotFoundError: If there is no such file.
        TypeError: If the source is no path and cannot be iterated over.
    """
    if isinstance(source, str | os.PathLike):
        yield from _read_file(Path(source))
        return
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # data frame
        source = source.to_dict("records")
    if isinstance(source, Mapping):
        raise ExampleError(
            f"source must be an iterable of rows, got one mapping with keys "
            f"{sorted(map(str, source))[:8]}: choose a split, or put the row in a list",
            problem="unreadable_row",
        )
    if not isinstance(source, Iterable):
        raise TypeError(f"source must be a path or an iterable of rows, got {glimpse(source)}")
    for index, row in enumerate(source):
        yield _as_row(row, f"row {index}")


def _as_row(row: object, where: str) -> RowDict | ExampleError:
    """The row as a dict, or the error that says why it is no mapping."""
    if not isinstance(row, Mapping):
        return _unreadable(where, f"a row must be a mapping of columns, got {glimpse(row)}")
    return {str(key): value for key, value in row.items()}


def _read_file(path: Path) -> Iterator[RowDict | ExampleError]:
    """Yield the rows of a JSONL, JSON or Parquet file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a .jsonl, .json or .parquet file"
            + (" (this is a directory)" if path.is_dir() else "")
        )
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path)
        return
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        try:
            table = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise _unreadable(str(path), f"not a JSON list ({error})") from error
        for index, row in enumerate(table):
            yield _as_row(row, f"{path}, entry {index}")
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}, line {number}"
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield _unreadable(where, f"not UTF-8 ({error.reason} at byte {error.start})")
            except json.JSONDecodeError as error:
                yield _unreadable(where, f"not JSON ({error.msg} at column {error.colno})")
            except RecursionError:
                yield _unreadable(where, "not JSON (nested too deep)")
            else:
                yield _as_row(row, where)


def _read_parquet(path: Path) -> Iterator[RowDict | ExampleError]:
    """Yield the rows of a Parquet file, batch by batch."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or give JSONL"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), f"not a Parquet file ({error})") from error
