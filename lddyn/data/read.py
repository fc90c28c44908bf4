"""Data rows from files, folders, globs, data sets and iterables."""

from __future__ import annotations

import ast
import bz2
import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from lddyn.data.columns import Row
from lddyn.errors import ExampleError, glimpse
from lddyn.files import (
    LARGEST_RECORD,
    open_regular,
    parse_json,
    read_regular,
    unique_keys,
)

__all__ = ["rows"]

RowDict = dict[str, Any]


class PlacedRow(NamedTuple):
    """A row, and where it is.

    Attributes:
        where: Such as "pairs.jsonl, line 3".
        row: The row, or the error that says why it cannot be read.
    """

    where: str
    row: RowDict | ExampleError


Source = str | os.PathLike[str] | Iterable[Row] | Iterable[PlacedRow]


_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXT_COLUMNS = (
    *("text", "prompt", "completion", "chosen", "rejected", "instruction", "output"),
    *("query", "response", "question"),
)
_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_LONGEST_LINE = 1 << 28  # bytes of a row

_LARGEST_JSON = 1 << 33  # bytes of a file that is one JSON value
_OTHER = (".xlsx", ".xls", ".yaml", ".yml", ".pkl", ".pickle", ".feather", ".tfrecord", ".db")
_SPLIT = re.compile(r"^(train|test|valid|validation|eval|dev)(?=[^a-z]|$)")


def rows(source: Source, *, limit: int | None = None, skip: bool = False) -> list[RowDict]:
    """Read data rows from files, a data set, or any iterable of mappings.

    Args:
        source: A path: a JSONL, JSON, CSV, TSV, text or Parquet file, also as .gz, .bz2 or .xz; a
            folder of such files; a folder of `datasets.save_to_disk`; or a glob such as
            `"data/train-*.parquet"`. Or a list of dicts, a `datasets.Dataset`, a pandas data frame,
            or any iterable of mappings.
        limit: Most rows to read. None: all.
        skip: Leave out rows that cannot be read, instead of raising.

    Returns:
        The rows as dicts, in order.

    Raises:
        ExampleError: (a ValueError) If a row cannot be read; the message names file, line and
            problem. If a data set has several splits; the message names them.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from lddyn.data.read import rows
        >>> rows([{"prompt": "Is it red?", "completion": " Yes"}])
        [{'prompt': 'Is it red?', 'completion': ' Yes'}]
    """
    read: list[RowDict] = []
    for _, row in itertools.islice(placed_rows(source), limit):
        if not isinstance(row, ExampleError):
            read.append(row)
        elif not skip:
            raise row
    return read


def placed_rows(source: Source) -> Iterator[PlacedRow]:
    """Yield the place of each row, and the row or the error that says why it cannot be read.

    Raises:
        ExampleError: If the file or the source as a whole cannot be read.
        FileNotFoundError: If there is no such file.
        TypeError: If the source is no path and cannot be iterated over.
    """
    if isinstance(source, str | os.PathLike):
        for file in source_files(source):
            yield from _read_file(file)
        return
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # data frame
        source = source.to_dict("records")
    if _is_column_table(source):
        source = _rows_of_columns(source)  # type: ignore[arg-type]
    if isinstance(source, Mapping):
        source = _only_split(source, "the data set", "choose a split, or put the row in a list")
    if not isinstance(source, Iterable):
        raise TypeError(f"source must be a path or an iterable of rows, got {glimpse(source)}")
    for index, row in enumerate(source):
        if isinstance(row, PlacedRow):
            yield row
        else:
            where = f"row {index}"
            yield PlacedRow(where, _as_row(row, where))


def _unreadable(where: str, problem: str) -> ExampleError:
    """Error for a row that cannot be read."""
    return ExampleError(f"{where}: {problem}", problem="unreadable_row")


def _as_row(row: object, where: str) -> RowDict | ExampleError:
    """The row as a dict, or the error that says why it is no mapping."""
    if not isinstance(row, Mapping):
        return _unreadable(where, f"a row must be a mapping of columns, got {glimpse(row)}")
    return {str(key): value for key, value in row.items()}


def _only_split(splits: Mapping[Any, Any], where: str, advice: str) -> Iterable[Row]:
    """The rows of the only split of a data set; raises if it has several, or none."""
    tables = {n: t for n, t in splits.items() if hasattr(t, "column_names") or isinstance(t, list)}
    if len(tables) == 1:
        name, table = next(iter(tables.items()))
        if hasattr(table, "column_names") or _is_split_table({name: table}):
            return table  # type: ignore[no-any-return]
    names = ", ".join(repr(str(name)) for name in list(splits)[:8])
    raise _unreadable(where, f"must be rows, got one mapping with keys {names}: {advice}")


def source_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a path: the file, those of a folder, or those that a glob names.

    Raises:
        ExampleError: If a folder has several splits.
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if path.exists():
        raise _unreadable(str(path), "must be a regular file or a folder, not a pipe or a device")
    named = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if path in named:  # os.path.exists is False for what its own glob names
        raise _unreadable(str(path), "a link that leads nowhere")
    if not named:
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected {', '.join(_FILES)} (also with .gz), a "
            "folder of them, a data set saved by datasets, or a glob"
        )
    return [file for name in named for file in source_files(name)]


def _listed(path: Path, key: str, inner: str | None = None) -> list[str]:
    """Names of files or folders beside a JSON file of datasets' that lists them.

    Raises:
        ExampleError: If it lists none, or one elsewhere.
    """
    try:
        listed = parse_json(read_regular(path, limit=LARGEST_RECORD))[key]
        names = [entry if inner is None else entry[inner] for entry in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(str(path), f"not as datasets writes it ({error})") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or name != os.path.basename(name):
            raise _unreadable(str(path), f"names what cannot be beside it: {name!r:.80}")
    return names


def _folder_files(path: Path) -> list[Path]:
    """The data files of a folder; one of `save_to_disk` says which they are."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = _listed(splits, "splits")
        if len(names) != 1:
            raise _unreadable(
                str(path), f"has the splits {', '.join(names)}: give one, such as {path / names[0]}"
            )
        path = path / names[0]
    state = path / "state.json"
    if state.is_file():
        files = [path / name for name in _listed(state, "_data_files", "filename")]
    else:
        files = sorted(file for file in path.rglob("*") if _is_data(file, path))
        found = {match[0]: file for file in files if (match := _SPLIT.match(file.name))}
        if len(found) > 1:
            one = next(iter(found.values()))
            pattern = re.sub(r"\d+", "*", one.name, count=1)
            raise _unreadable(
                str(path),
                f"has files of the splits {', '.join(sorted(found))}: give the files of one, such "
                f"as {one.parent / pattern}",
            )
    if not files:
        raise FileNotFoundError(f"{path}: this folder has no {', '.join(_FILES)}")
    return files


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file of a folder holds rows: by its name, hidden files and READMEs left out."""
    parts = file.relative_to(folder).parts
    if any(part.startswith((".", "_")) for part in parts) or not file.is_file():
        return False
    about = ("dataset_info", "dataset_infos", "state", "readme", "license")
    return _kind(file) in _FILES and file.name.lower().split(".")[0] not in about


def _kind(path: Path) -> str:
    """The ending that says how a file is read, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _OPEN:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked; one in UTF-16, which says so in its first bytes, as UTF-8."""
    file = os.fdopen(open_regular(path), "rb")
    opener: Any = _OPEN.get(path.suffix.lower())
    stream: Any = file if opener is None else opener(file, "rb")
    if stream.peek(2)[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return stream  # type: ignore[no-any-return]
    with stream:
        content = stream.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise _unreadable(str(path), f"longer than {_LARGEST_JSON} bytes in UTF-16")
    try:
        return io.BytesIO(content.decode("utf-16").encode())
    except UnicodeError as error:
        raise _unreadable(str(path), f"begins as UTF-16 and is not ({error})") from error


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file with their numbers, from 1; an endless line is an error."""
    for number in itertools.count(1):
        line = stream.readline(_LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > _LONGEST_LINE:
            raise _unreadable(f"{path}, line {number}", f"longer than {_LONGEST_LINE} bytes")
        yield number, line


def _read_file(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of one file."""
    if path.suffix.lower() in (".zst", ".zip", ".7z", ".tar"):
        raise _unreadable(str(path), "unpack it first; .gz, .bz2 and .xz are read as they are")
    kind = _kind(path)
    if kind in _OTHER:
        raise _unreadable(str(path), f"{kind} is not read: export it as JSONL, CSV or Parquet")
    try:
        os.close(open_regular(path))
    except ValueError as error:
        raise _unreadable(str(path), str(error)) from error
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
        elif kind == ".arrow":
            yield from _read_arrow(path)
        elif kind in (".csv", ".tsv"):
            yield from _read_csv(path, "," if kind == ".csv" else "\t")
        elif kind == ".txt":
            yield from _read_text(path)
        else:
            yield from _read_json(path)
    except (gzip.BadGzipFile, EOFError, lzma.LZMAError) as error:
        raise _unreadable(str(path), f"damaged compression ({error})") from error


def _read_json(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of a JSON or JSONL file: a list, an object with one list, or a row a line."""
    with _open(path) as stream:
        head = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    whole = None
    if head.startswith(b"[") or (head.startswith(b"{") and not _is_complete(head)):
        whole = _load_json(path, must=head.startswith(b"["))
    if whole is not None:
        yield from _entries(whole, path)
        return
    with _open(path) as stream:
        for number, line in _lines(stream, path):
            where = f"{path}, line {number}"
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            row = _parse_line(text, where)
            if number == 1 and (_is_split_table(row) or _is_column_table(row)):
                yield from _entries(row, path)
            else:
                yield PlacedRow(where, row)


def _entries(table: object, path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of a list, or of an object with one list of rows."""
    if _is_split_table(table):
        table = _only_split(table, str(path), "give a file with one list of rows")  # type: ignore[arg-type]
    if _is_column_table(table):
        table = _rows_of_columns(table)  # type: ignore[arg-type]
    for index, row in enumerate(table if isinstance(table, list) else [table]):
        where = f"{path}, entry {index}"
        if isinstance(row, Mapping) and {"row_idx", "row"} <= set(row):
            row = row["row"]  # as the data sets server of Hugging Face answers
        yield PlacedRow(where, _as_row(row, where))


def _is_column_table(table: object) -> bool:
    """Whether an object holds the rows as columns: {"prompt": [...], "chosen": [...]}."""
    if not isinstance(table, Mapping) or not table:
        return False
    columns = list(table.values())
    if not all(isinstance(c, list) and c and len(c) == len(columns[0]) for c in columns):
        return False
    texts = [c for name, c in table.items() if name in _TEXT_COLUMNS]
    whole = [c for name, c in table.items() if name in ("messages", "conversations")]
    return any(all(isinstance(x, str) for x in c) for c in texts) or any(
        all(isinstance(x, list) for x in c) for c in whole
    )


def _rows_of_columns(table: Mapping[str, list[Any]]) -> list[RowDict]:
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


def _is_split_table(row: object) -> bool:
    """Whether a JSON object holds lists of rows by their split, as in {"train": [...]}."""
    if not isinstance(row, Mapping) or not row:
        return False
    tables = {
        name: table
        for name, table in row.items()
        if isinstance(table, list) and all(isinstance(entry, Mapping) for entry in table)
    }
    named = all(name in ("data", "rows") or _SPLIT.match(str(name)) for name in tables)
    about = row.keys() - tables.keys()
    return bool(tables) and named and not about & {*_TEXT_COLUMNS, "messages", "conversations"}


def _is_complete(head: bytes) -> bool:
    """Whether the first line of a file is a whole JSON value."""
    line, newline, _ = head.partition(b"\n")
    if not newline and len(head) >= 1 << 15:
        return True  # a long line
    try:
        json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _load_json(path: Path, must: bool) -> Any:
    """A whole JSON file; None where it need not be one and is none."""
    try:
        with _open(path) as stream:
            text = stream.read(_LARGEST_JSON + 1)
            if len(text) > _LARGEST_JSON:
                raise _unreadable(str(path), f"larger than {_LARGEST_JSON} bytes: use JSON lines")
            return json.loads(text.decode("utf-8-sig"))
    except ExampleError:
        raise
    except (ValueError, RecursionError) as error:
        if must:
            raise _unreadable(str(path), f"not a JSON list ({error})") from error
        return None


def _parse_line(text: bytes, where: str) -> RowDict | ExampleError:
    """The row of one line of a JSONL file, or why there is none."""
    try:
        row = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
        if b"\\ud" in text.lower():  # an escaped surrogate, which must be half of a pair
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return _unreadable(where, "no text (half of a surrogate pair)")
    except UnicodeDecodeError as error:
        return _unreadable(where, f"not UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return _unreadable(where, f"not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return _unreadable(where, "not JSON (nested too deep)")
    except ValueError as error:  # Python reads no integers of more than 4,300 digits
        long = "integer string conversion" in str(error)
        return _unreadable(where, "a number has too many digits" if long else str(error))
    return _as_row(row, where)


def _read_csv(path: Path, delimiter: str) -> Iterator[PlacedRow]:
    """Yield the rows of a CSV or TSV file; its first line names the columns."""
    csv.field_size_limit(1 << 30)
    with _open(path) as stream:
        if b"\0" in stream.read(1 << 16):
            raise _unreadable(str(path), "holds zero bytes: no text in UTF-8")
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header = text.readline(1 << 20)
        if delimiter not in header:  # as spreadsheets write it in countries with a decimal comma
            delimiter = next((other for other in ";\t|" if other in header), delimiter)
        text.seek(0)
        reader = csv.DictReader(text, delimiter=delimiter)
        names = [name for name in reader.fieldnames or () if name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise _unreadable(str(path), f"two columns are called {twice!r}")
        for number, cells in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if None in cells or None in cells.values():
                columns = len(reader.fieldnames or ())
                count = sum(v is not None for k, v in cells.items() if k is not None)
                count += len(cells.get(None) or ())
                problem = f"must have {columns} cells, got {count}"
                yield PlacedRow(where, _unreadable(where, problem))
                continue
            broken = next((k for k, v in cells.items() if _is_broken(v)), None)
            if broken is not None:
                yield PlacedRow(where, _unreadable(where, f"not UTF-8 (in column {broken!r})"))
                continue
            # pandas and datasets write an index as a column without a name
            named = {k: v for k, v in cells.items() if k and not k.startswith("Unnamed: ")}
            yield PlacedRow(where, {name: _cell(value) for name, value in named.items()})


def _is_broken(text: str) -> bool:
    """Whether bytes that are not UTF-8 were read into a text."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def _cell(value: str) -> Any:
    """A cell: a list or an object where it is written as one, a boolean, or the text."""
    if value in ("True", "False"):
        return value == "True"
    if value[:1] + value[-1:] in ("[]", "{}"):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def _read_text(path: Path) -> Iterator[PlacedRow]:
    """Yield each line that is not blank as a row with a text."""
    with _open(path) as stream:
        for number, line in _lines(stream, path):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start})"
                yield PlacedRow(where, _unreadable(where, problem))
                continue
            if text.strip():
                yield PlacedRow(where, {"text": text})


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of a Parquet file, batch by batch."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or give JSONL"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            yield from _number(path, table.iter_batches())
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), f"not a Parquet file ({error})") from error


def _read_arrow(path: Path) -> Iterator[PlacedRow]:
    """Yield the rows of an Arrow file, as `datasets.save_to_disk` writes it."""
    try:
        import pyarrow as pa
    except ImportError:
        raise ImportError(
            f"{path}: reading a saved data set needs pyarrow; pip install pyarrow, or give JSONL"
        ) from None
    try:
        with pa.memory_map(str(path)) as stream:
            try:
                batches = pa.ipc.open_stream(stream)
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(stream)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _number(path, batches)
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), f"not an Arrow file ({error})") from error


def _number(path: Path, batches: Iterable[Any]) -> Iterator[PlacedRow]:
    """Yield the rows of Arrow batches with their places."""
    index = itertools.count()
    for batch in batches:
        try:
            read: list[Any] = batch.to_pylist()
        except (ValueError, OverflowError):  # a time before year 1 or after year 9999, for instance
            read = [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for row in read:
            where = f"{path}, row {next(index)}"
            yield PlacedRow(where, _unreadable(where, row) if isinstance(row, str) else row)


def _arrow_row(row: Any) -> RowDict | str:
    """The one row of an Arrow batch, or the reason why it cannot be read."""
    values: RowDict = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            return f"the value of {name} ({column.type}) cannot be read ({error})"
    return values
