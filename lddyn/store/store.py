"""Token features on disk: a folder that survives a kill at any moment and never lies about it.

    manifest.json            what the features belong to; written once, with a checksum of itself
    journal.jsonl            one line per shard, appended, chained: its digest, its examples
    shard-000000.safetensors rows and token table of whole examples, with a digest of itself inside
    lock                     who writes (a kernel lock: it ends with its process)

A shard is written to a temporary file, synced, renamed, and then entered in the journal. One that
was renamed but not entered proves by its own digest that it belongs here and is entered later, by
the next writer (a reader takes it as it is). So what a kill leaves behind is complete up to some
example, and a journal that lost its end is noticed: either it can be written again from the shards,
or opening is an error. Every shard is checked against its digest before its first row is used.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.data.token_table import COLUMNS, TokenTable, arrow_table, token_columns
from lddyn.errors import StoreCorruptError, StoreError, StoreIdentityError
from lddyn.estimate import Estimate
from lddyn.files import TEMPORARY, canonical, digest_of, put, read, sync_folder, write_all
from lddyn.memory import parse_memory
from lddyn.store.lock import Lock
from lddyn.store.manifest import (
    DTYPES,
    FORMAT,
    JOURNAL,
    LARGEST_MANIFEST,
    LOCK,
    MANIFEST,
    differences,
    essence,
    plain,
    read_manifest,
    render,
)
from lddyn.store.query import SIGNS, Hits, Layout, Pairing, strongest
from lddyn.store.shards import (
    CONTENT_ID,
    SHARD_NAME,
    Pending,
    Record,
    check_seal,
    examples_of,
    pack,
    unpack,
)

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Shard", "Store"]

_OPEN_SHARDS = 64  # mapped at a time

_QUERIES = 1024  # in one pass over the store


@dataclass(frozen=True)
class Shard:
    """Some whole examples of a store.

    Attributes:
        number: Which shard.
        start: Row of the store that `rows[0]` is.
        rows: Features (n, width), mapped from disk; writing to them does not change the file.
        tokens: Which token each row is.
    """

    number: int
    start: int
    rows: Tensor
    tokens: TokenTable


@dataclass
class _Place:
    """Where an example is."""

    number: int  # among the examples
    index: int
    start: int
    count: int


class Store:
    """Token features of many examples in a folder: crash-safe, checked, one writer, many readers.

    Made by `Store.create`, opened by `Store.open`; a context manager. Examples go in whole, each
    once, known by `Example.content_id`; rows keep the order in which examples were appended. A
    killed writer loses what was not flushed, nothing else: open again, skip what the store `has`.

    A `with` block that ends by an exception does not flush, as if it had been killed: a run that is
    resumed then writes the same files, bit for bit, as one that was not interrupted.

    Attributes:
        path: The folder.
        width: Numbers in a row.
        dtype: torch.float32, float16 or bfloat16.
        identity: What the features belong to.
        layout_json: `layout.to_json()` of what made the rows; None: plain vectors.

    Example:
        >>> import lddyn, torch
        >>> ex = lddyn.Example(prompt_ids=[1, 7], response_ids=[4, 5])
        >>> with lddyn.Store.create("features", {"model": "toy"}, layout=3) as store:
        ...     store.append(ex, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> store = lddyn.Store.open("features", {"model": "toy"})
        >>> len(store), store.has(ex), store.rows(1, 2)
        (2, True, tensor([[0., 2., 0.]]))
        >>> hit = store.query(torch.tensor([[3.0, -1.0, 0.0]]), k=1, sign="down")[0][0]
        >>> hit.value, hit.token_id
        (-2.0, 5)
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], layout: Layout | None, lock: Lock | None
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._manifest = dict(manifest)
        self.width: int = manifest["width"]
        self.dtype = DTYPES[manifest["dtype"]]
        self.identity: dict[str, Any] = manifest["identity"]
        self.layout_json: dict[str, Any] | None = manifest["layout"]
        self.layout = layout
        self._shard_bytes: int = manifest["shard_bytes"]
        self._seal = digest_of(canonical(manifest))  # of every shard, and of the first line
        self._lock = lock
        self._records: list[Record] = []
        self._starts = [0]  # row at which each shard begins, and the end
        self._places: dict[str, _Place] = {}
        self.example_ids: list[str] = []
        self._indices: dict[int, str] = {}  # place in the data set → example
        self._chain = self._seal  # checksum of the last line
        self._offset = 0  # end of the last line
        self._entered = 0  # shards in the journal; what follows is adopted
        self._checked: dict[int, tuple[int, int, int]] = {}
        self._mapped: OrderedDict[int, Shard] = OrderedDict()
        self._pending: list[Pending] = []
        self._pending_bytes = 0
        self._waiting: set[str] = set()  # examples and indices that are not yet on disk
        self._waiting_indices: set[int] = set()
        self._ready: tuple[bytearray, Record] | None = None
        self._load()

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls,
        path: str | Path,
        identity: Mapping[str, Any],
        layout: Layout | int,
        dtype: torch.dtype | str = "float32",
        *,
        shard: int | str = "64MiB",
        exist_ok: bool = False,
    ) -> Store:
        """Makes an empty store and opens it for writing.

        Args:
            path: A folder that does not exist or is empty.
            identity: What features depend on, as JSON; see `identify`.
            layout: What made the rows (a sketch's layout), or the width of plain vectors.
            dtype: Of the rows: float32, float16 or bfloat16.
            shard: Bytes of features after which a shard is written. A kill loses less than this;
                writing takes four times as much memory.
            exist_ok: Open a store that is there, if it has the same identity, layout and dtype.

        Raises:
            StoreError: If the folder holds anything else, or cannot be written.
            StoreIdentityError: With exist_ok, if the store there belongs to something else.
            StoreLockedError: If another process writes it.
            ValueError: If an argument is not of the kind above.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        width = layout if isinstance(layout, int) else layout.width
        if isinstance(width, bool) or width < 1:
            raise ValueError(f"layout must have a width of at least 1, got {width}")
        manifest = {
            "format": FORMAT,
            "identity": plain("identity", dict(identity)),
            "layout": None if isinstance(layout, int) else plain("layout", layout.to_json()),
            "dtype": name,
            "width": width,
            "shard_bytes": parse_memory(shard),
        }
        given = None if isinstance(layout, int) else layout
        return cls._create(Path(path), manifest, given, exist_ok)

    @classmethod
    def _create(
        cls, path: Path, manifest: dict[str, Any], layout: Layout | None, exist_ok: bool
    ) -> Store:
        text = render(manifest)
        if len(text) > LARGEST_MANIFEST:
            raise ValueError(f"identity must be below {LARGEST_MANIFEST} bytes, got {len(text)}")
        if exist_ok and (path / MANIFEST).exists():
            store = cls.open(path, mode="a", layout=layout)
            differ = differences(essence(store._manifest), essence(manifest))
            if differ:
                store.close()
                raise StoreIdentityError(path, differ)
            return store
        lock = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = Lock(path / LOCK)
            if (path / MANIFEST).exists():
                raise StoreError(
                    f'{path} is a store already: Store.open(path, identity, mode="a") continues it'
                )
            others = {p.name for p in path.iterdir()} - {LOCK, JOURNAL, TEMPORARY}
            if others:
                raise StoreError(f"{path} must be empty, got {sorted(others)[0]!r} in it")
            put(path / JOURNAL, b"")
            put(path / MANIFEST, text)  # from here on it is a store
            sync_folder(path.parent)
            return cls(path, manifest, layout, lock)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise StoreError(f"cannot make a store in {path}: {error}") from error
            raise

    @classmethod
    def open(
        cls,
        path: str | Path,
        identity: Mapping[str, Any] | None = None,
        mode: Literal["r", "a"] = "r",
        *,
        layout: Layout | None = None,
    ) -> Store:
        """Opens a store that is there.

        Args:
            path: Its folder.
            identity: What it must belong to, field for field. None: not checked.
            mode: `"r"` reads, also while another process writes (`refresh` sees what is new);
                `"a"` appends, and first puts in order what a killed writer left.
            layout: What made the rows; needed for queries unless rows are plain vectors.

        Raises:
            StoreError: If there is no store, or it cannot be read or (`"a"`) written.
            StoreCorruptError: If manifest or journal are damaged, or a shard is missing. Shards are
                checked when their first row is used; `verify` checks them all.
            StoreIdentityError: If identity or layout differ; it names the fields and both values.
            StoreLockedError: If mode is `"a"` and another process writes.
            ValueError: If mode is neither.

        Cost: reading the journal, about 60 bytes per example.
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise ValueError(f'mode must be "r" or "a", got {mode!r}')
        manifest = read_manifest(path)
        differ: dict[str, tuple[Any, Any]] = {}
        if identity is not None:
            differ |= differences(manifest["identity"], plain("identity", dict(identity)))
        if layout is not None:
            given = plain("layout", layout.to_json())
            differ |= differences({"layout": manifest["layout"]}, {"layout": given})
        if differ:
            raise StoreIdentityError(path, differ)
        lock = Lock(path / LOCK) if mode == "a" else None
        try:
            return cls(path, manifest, layout, lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    # ------------------------------------------------------------------ what is there

    def _load(self) -> None:
        """Reads the journal on from where it was read before; as a writer, puts things in order."""
        # In this order: what is listed was there before the journal was read.
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read: {error}") from error
        listed = [int(m[1]) for m in map(SHARD_NAME.fullmatch, names) if m]
        journal = self.path / JOURNAL
        *lines, torn = read(journal, self._offset).split(b"\n")
        self._forget(self._entered)
        for line in lines:
            number = len(self._records)
            payload, _, checksum = line.rpartition(b" ")
            if digest_of(self._chain.encode(), payload).encode() != checksum:
                raise StoreCorruptError(
                    f"{journal}: line {number + 1} (shard {number}) is damaged, or of another store"
                )
            try:
                record = Record.parse(payload)
            except ValueError as error:
                raise StoreCorruptError(f"{journal}: line {number + 1}: {error}") from error
            self._stat(record)
            self._enter(record)
            self._chain, self._offset = checksum.decode(), self._offset + len(line) + 1
        adopted_from = self._entered = len(self._records)
        # Renamed and not entered; all shards that a journal lost at its end look like that too.
        while self._shard_path(len(self._records)).exists():
            self._enter(self._adoptable(len(self._records)))
        # A line is written after its shard, so a kill does not leave half a line without a shard.
        lost = torn and len(self._records) == adopted_from
        if lost or max(listed, default=-1) >= len(self._records):
            raise StoreCorruptError(
                f"{self._shard_path(len(self._records))}: this shard is missing; the journal, or a "
                "later shard, shows that it was there"
            )
        if self._lock is not None:  # only now: what cannot be put in order is left as it is
            try:
                for record in self._records[adopted_from:]:
                    self._write_line(record)
            except OSError as error:
                raise StoreError(f"{journal}: cannot be written: {error}") from error

    def _shard_path(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.safetensors"

    def _stat(self, record: Record) -> tuple[int, int, int]:
        """Inode, size and time of a shard that must be there with the size of its record."""
        path = self._shard_path(record.number)
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

    def _enter(self, record: Record) -> None:
        """Adds a shard to what this object knows."""
        where = f"{self.path / JOURNAL}: shard {record.number}"
        if record.number != len(self._records):
            raise StoreCorruptError(f"{where} in the place of {len(self._records)}")
        start = self._starts[-1]
        for name, index, count in record.examples:
            if not CONTENT_ID.fullmatch(name) or count < 1:
                raise StoreCorruptError(f"{where} lists no example as {name!r} of {count} tokens")
            if name in self._places or index in self._indices:
                raise StoreCorruptError(f"{where} lists example {name} (index {index}) again")
            self._places[name] = _Place(len(self.example_ids), index, start, count)
            self.example_ids.append(name)
            self._indices[index] = name
            start += count
        self._records.append(record)
        self._starts.append(start)

    def _forget(self, number: int) -> None:
        """Drops the shards from this one on: adopted ones, which the journal may list by now."""
        for record in self._records[number:]:
            for name, index, _ in record.examples:
                del self._places[name]
                del self._indices[index]
            self._mapped.pop(record.number, None)
        del self._records[number:], self._starts[number + 1 :]
        del self.example_ids[len(self._places) :]

    def _adoptable(self, number: int) -> Record:
        """The record of a shard that proves by its seal that it belongs here."""
        path = self._shard_path(number)
        digest, size = check_seal(path, number, self._seal)
        tensors = unpack(path, number, self.width, self.dtype)
        return Record(number, size, digest, examples_of(path, tensors))

    def _shard(self, number: int) -> Shard:
        """A shard, mapped; checked against its digest unless the file is as it was then."""
        if number in self._mapped:
            self._mapped.move_to_end(number)
            return self._mapped[number]
        record, path = self._records[number], self._shard_path(number)
        state = self._stat(record)
        if self._checked.get(number) != state:
            if check_seal(path, number, self._seal) != (record.digest, record.size):
                raise StoreCorruptError(f"{path}: not the shard that the journal lists")
            self._checked[number] = state
        tensors = unpack(path, number, self.width, self.dtype)
        if examples_of(path, tensors) != record.examples:
            raise StoreCorruptError(f"{path}: holds other examples than the journal lists")
        names = [name for name, _, count in record.examples for _ in range(count)]
        index = tensors["example_index"][tensors["example"].long()]
        tokens = TokenTable(names, index, *(tensors[column] for column in COLUMNS))
        shard = Shard(number, self._starts[number], tensors["rows"], tokens)
        self._mapped[number] = shard
        if len(self._mapped) > _OPEN_SHARDS:
            self._mapped.popitem(last=False)
        return shard

    def refresh(self) -> int:
        """Takes in what a writer has added since; returns how many rows.

        Raises:
            StoreCorruptError: If what was added is damaged.
        """
        before = len(self)
        if self._lock is None:
            self._load()
        return len(self) - before

    def verify(self) -> list[str]:
        """Reads every byte of every shard again; returns what is wrong, one line each, or [].

        Manifest and journal were checked when the store was opened. Cost: 1 to 2 GiB/s.
        """
        self._checked.clear()
        self._mapped.clear()
        problems = []
        for record in self._records:
            try:
                self._shard(record.number)
            except StoreError as error:
                problems.append(str(error))
        return problems

    # ------------------------------------------------------------------ writing

    def append(
        self,
        example: Example | str,
        rows: Tensor,
        tokens: Mapping[str, Any] | None = None,
        *,
        index: int | None = None,
    ) -> None:
        """Adds the rows of one example; they are on disk after `flush`, or when a shard is full.

        Args:
            example: The example, or its content id (then `tokens` must say what the rows are).
            rows: Features (n, width), one per counted response token, any device and float dtype;
                copied and cast to the store's dtype.
            tokens: Columns `response_index`, `position` and `token_id`, n integers each. None: the
                example's own.
            index: Place of the example in the data set; `merge` orders by it. None: how many
                examples there are.

        Raises:
            ValueError: If the example is in the store, shapes do not fit, or a row is not finite in
                the store's dtype.
            StoreError: If the store is not open for writing, or a full shard cannot be written (the
                example is kept in memory: make room and `flush`).
        """
        self._check_writer()
        name = example if isinstance(example, str) else example.content_id
        if not CONTENT_ID.fullmatch(name):
            raise ValueError(f"example must be an Example or its content id, got {name!r:.80}")
        if self.has(name):
            raise ValueError(f"example {name} is in the store already: ask store.has(…) first")
        rows = torch.as_tensor(rows).detach()
        if rows.ndim != 2 or rows.shape[1] != self.width or not rows.is_floating_point():
            raise ValueError(
                f"rows must be floating (n, {self.width}), got {rows.dtype} {tuple(rows.shape)}"
            )
        if len(rows) < 1:
            raise ValueError(f"rows must have at least 1 row, got 0 for example {name}")
        if tokens is None:
            if isinstance(example, str):
                raise ValueError("tokens must be given with a content id: which token is each row?")
            tokens = token_columns(example)
        columns = {column: _column(column, tokens, len(rows)) for column in COLUMNS}
        if index is None:
            index = len(self.example_ids) + len(self._waiting)
        if index in self._indices or index in self._waiting_indices:
            raise ValueError(
                f"index {index} belongs to another example: pass index=, the place of this one in "
                "the data set"
            )
        kept = rows.to("cpu", self.dtype, copy=True).contiguous()
        if not bool(torch.isfinite(kept).all()):
            bad = int((~torch.isfinite(kept)).any(1).nonzero()[0])
            raise ValueError(
                f"rows must be finite in {self.dtype}, got {float(rows[bad].abs().max())} in row "
                f"{bad} of example {name}"
            )
        self._pending.append(Pending(name, int(index), kept, columns))
        self._waiting.add(name)
        self._waiting_indices.add(int(index))
        self._pending_bytes += kept.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what was appended; when this returns it survives a crash of the machine.

        Raises:
            StoreError: If the disk is full or the folder not writable. Nothing is lost: what could
                not be written stays in memory, the store on disk is whole, `flush` may be called
                again.
        """
        self._check_writer()
        while self._ready is not None or self._pending:
            if self._ready is None:
                self._ready = pack(len(self._records), self._seal, self._pending)
                self._pending, self._pending_bytes = [], 0
            data, record = self._ready  # the same bytes again if this fails half way
            path = self._shard_path(record.number)
            try:
                put(path, data)
                self._write_line(record)
            except OSError as error:
                with contextlib.suppress(OSError):
                    (self.path / TEMPORARY).unlink(missing_ok=True)
                raise StoreError(
                    f"{path}: cannot be written: {error} ({len(self._waiting)} examples wait in "
                    "memory: make room and call flush() again)"
                ) from error
            self._ready = None
            self._enter(record)
            for name, index, _ in record.examples:
                self._waiting.remove(name)
                self._waiting_indices.remove(index)

    def _write_line(self, record: Record) -> None:
        """Enters a shard in the journal, over whatever half a line a kill has left."""
        payload = record.payload()
        checksum = digest_of(self._chain.encode(), payload)
        line = payload + b" " + checksum.encode() + b"\n"
        fd = os.open(self.path / JOURNAL, os.O_WRONLY)
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
        self._chain, self._offset = checksum, self._offset + len(line)
        self._entered = record.number + 1

    def _check_writer(self) -> None:
        if self._lock is None or self._lock.fd < 0:
            raise StoreError(
                f'{self.path} is not open for writing here: it was opened with mode="r", closed, '
                'or inherited by a forked process; Store.open(path, mode="a") appends'
            )

    def close(self) -> None:
        """Flushes, lets go of the lock and unmaps; further use needs another `open`.

        Raises:
            StoreError: If the last shard cannot be written; the store then stays open.
        """
        if self._lock is not None and self._lock.fd >= 0:
            self.flush()
            self._lock.release()
        self._mapped.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._lock is not None:
            self._lock.release()

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        """Tokens on disk (what waits to be flushed does not count)."""
        return self._starts[-1]

    def __repr__(self) -> str:
        return (
            f"Store({str(self.path)!r}: {len(self)} tokens of {len(self.example_ids)} examples in "
            f"{len(self._records)} shards, {self.width} × {str(self.dtype).removeprefix('torch.')})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the shards."""
        return sum(record.size for record in self._records)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self._records)

    def has(self, example: Example | str) -> bool:
        """Whether an example is in the store, or waits to be flushed."""
        name = example if isinstance(example, str) else example.content_id
        return name in self._places or name in self._waiting

    def example_at(self, index: int) -> str | None:
        """Content id of the example with this place in the data set; None: not on disk."""
        return self._indices.get(index)

    def span(self, example: Example | str) -> slice:
        """The rows of an example.

        Raises:
            KeyError: If it is not on disk.
        """
        name = example if isinstance(example, str) else example.content_id
        if name not in self._places:
            raise KeyError(f"example {name} is not in {self.path}")
        place = self._places[name]
        return slice(place.start, place.start + place.count)

    def shards(self) -> Iterator[Shard]:
        """Every shard in order, mapped one at a time.

        Raises:
            StoreCorruptError: If one is damaged.
        """
        for number in range(len(self._records)):
            yield self._shard(number)

    def _pieces(self, start: int, stop: int | None) -> list[tuple[Shard, slice]]:
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows must be within 0:{len(self)}, got {start}:{stop}")
        pieces = []
        number = bisect.bisect_right(self._starts, start) - 1
        while number < len(self._records) and self._starts[number] < stop:
            first = self._starts[number]
            inside = slice(max(start - first, 0), min(stop, self._starts[number + 1]) - first)
            pieces.append((self._shard(number), inside))
            number += 1
        return pieces if stop > start else []

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Features start:stop, (n, width) in the store's dtype.

        Within one shard this is a view of the mapped file (`.numpy()` shares it too; NumPy has no
        bfloat16); across shards it is a copy. Writing to it never changes the file.

        Raises:
            IndexError: If the range is not within the store.
            StoreCorruptError: If a shard is damaged.
        """
        parts = [shard.rows[inside] for shard, inside in self._pieces(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, self.width, dtype=self.dtype)

    def tokens(self, start: int = 0, stop: int | None = None) -> TokenTable:
        """Which token each of the rows start:stop is.

        Raises:
            IndexError: If the range is not within the store.
            StoreCorruptError: If a shard is damaged.
        """
        parts = [shard.tokens[inside] for shard, inside in self._pieces(start, stop)]
        if len(parts) == 1:
            return parts[0]
        empty = {"example_index": torch.int64, **dict.fromkeys(COLUMNS, torch.int32)}
        columns = (
            torch.cat([torch.empty(0, dtype=kind), *(getattr(p, name) for p in parts)])
            for name, kind in empty.items()
        )
        return TokenTable([name for part in parts for name in part.example_id], *columns)

    def to_arrow(self, features: bool = True) -> pyarrow.Table:
        """Token table and features as an Arrow table, one chunk per shard, for other tools.

        Args:
            features: With a column `features` of fixed-size lists. float32 and float16 are views of
                the mapped files; Arrow has no bfloat16, which is copied as float32.

        Raises:
            ImportError: If pyarrow is not installed.
            StoreCorruptError: If a shard is damaged.
        """
        pieces = ((shard.tokens, shard.rows) for shard in self.shards())
        return arrow_table(pieces, self.width, self.dtype if features else None)

    # ------------------------------------------------------------------ many against many

    def to_faiss(self, factory: str = "Flat") -> Any:
        """An index of faiss over all rows by inner product, for searches that may be approximate.

            index.search(store.layout.as_query(rows).numpy(), k)    # (n, k) values and row numbers

        Args:
            factory: As faiss.index_factory takes it: `"Flat"` is exact, `"IVF1024,PQ64"` small.

        Raises:
            ImportError: If faiss is not installed.
            ValueError: If the layout is not linear; `query` needs no index, and takes any.
            StoreCorruptError: If a shard is damaged.

        Cost: N width floats in memory, twice while an index that needs it is trained.
        """
        try:
            import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError:
            raise ImportError("to_faiss needs faiss: pip install faiss-cpu") from None
        if self.layout_json is not None and not getattr(self.layout, "linear", False):
            raise ValueError(
                f"the layout of {self.path} must be linear for faiss, and be given when the store "
                "is opened: outer products have no plain inner product; use query, or a store of "
                "sequences (lddyn features build --by sequence)"
            )
        index = faiss.index_factory(self.width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(self.rows().float().numpy())
        for record in self._records:
            index.add(self._shard(record.number).rows.float().numpy())
        return index

    def query(
        self,
        rows: Tensor,
        k: int = 10,
        *,
        layout: Layout | None = None,
        sign: str = "both",
        by: str = "token",
        exclude: Iterable[Example | str] = (),
        memory: int | str = "256MiB",
    ) -> Hits:
        """The k stored tokens, or sequences, that pair most strongly with each query; exact.

            value[q, s] = Σ_{t ∈ s} ⟨rows_q, row_t⟩   (⟨·,·⟩ as the layout estimates it)

        Args:
            rows: Features of the queries, (m, width), made as the stored ones were; any device.
            k: How many for each query; fewer come back if the store has fewer.
            layout: What made the rows. None: the one the store was opened with; rows of a store
                that has none are paired by their inner product.
            sign: `"up"`: the largest values; `"down"`: the smallest; `"both"`: the largest in size.
            by: `"token"`, or `"sequence"`: tokens of one example are summed.
            exclude: Examples to leave out, such as the query's own.
            memory: Bytes for a block of rows and its values; more only if one example is larger.

        Returns:
            Values with their standard errors, best first; ties go to the lower row.

        Raises:
            ValueError: If an argument is not of the kind above, nothing is left to choose from, or
                the store has a layout and none is given.
            StoreIdentityError: If the layout is another than the store's.
            StoreCorruptError: If a shard is damaged.

        Cost: 2 m N width FLOPs for N stored tokens, and one pass over the files for 1,024 queries.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width or len(rows) < 1:
            raise ValueError(f"rows must be (m, {self.width}), got {tuple(rows.shape)}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        for name, value, known in (("sign", sign, SIGNS), ("by", by, ("token", "sequence"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if layout is not None:
            given = plain("layout", layout.to_json())
            differ = differences({"layout": self.layout_json}, {"layout": given})
            if differ:
                raise StoreIdentityError(self.path, differ)
        layout = layout or self.layout
        if layout is None and self.layout_json is not None:
            raise ValueError(
                f"layout must be given: {self.path} holds sketches, whose inner product the layout "
                "knows (store.layout_json describes it)"
            )
        names = {e if isinstance(e, str) else e.content_id for e in exclude}
        banned = torch.tensor([self._places[n].number for n in names if n in self._places])
        if len(banned) == len(self.example_ids):
            raise ValueError(f"nothing to choose from: {self!r}, {len(banned)} examples excluded")
        queries, pairing = rows.detach().float(), Pairing(layout)
        chunk = min(len(queries), _QUERIES)
        # Of a row: itself, its float32 copy, and for each query values, keys and their parts.
        step = max(1, parse_memory(memory) // (8 * self.width + 48 * chunk))
        index, values = strongest(
            queries, lambda: self._blocks(by, step, banned, queries.device), k, pairing, sign, chunk
        )
        stderr, samples = torch.zeros_like(values), None
        if layout is not None:
            for query, found, row in zip(queries.split(1), index.tolist(), stderr, strict=True):
                if by == "token":
                    hits = torch.cat([self.rows(i, i + 1) for i in found]).to(query)
                    row[:], samples = pairing.stderr(query, hits)
                    continue
                for place, i in enumerate(found):
                    span = self.span(self.example_ids[i])
                    hits = self.rows(span.start, span.stop).to(query)
                    row[place], samples = pairing.stderr_of_sum(query, hits)
        return Hits(by, index, Estimate(values, stderr, samples), self)

    def _blocks(
        self, by: str, step: int, banned: Tensor, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows, the group of each, and what the groups are called, as `strongest` wants them."""
        number = 0
        for record in self._records:
            shard = self._shard(record.number)
            counts = torch.tensor([count for _, _, count in record.examples])
            owner = torch.arange(number, number + len(counts)).repeat_interleave(counts)
            number += len(counts)
            bounds = list(range(0, record.rows, step))
            if by == "sequence":  # whole examples, as many as fit
                bounds = [0]
                ends = counts.cumsum(0).tolist()
                for before, end in pairwise(ends):
                    if end - bounds[-1] > step:
                        bounds.append(before)
            for a, b in pairwise([*bounds, record.rows]):
                keep = torch.arange(a, b)
                if len(banned):
                    keep = keep[~torch.isin(owner[a:b], banned)]
                    if not len(keep):
                        continue
                rows = shard.rows[a:b] if len(keep) == b - a else shard.rows[keep]
                called, group = torch.unique_consecutive(owner[keep], return_inverse=True)
                if by == "token":
                    called = keep + shard.start
                yield rows.to(device, torch.float32), group.to(device), called.to(device)

    # ------------------------------------------------------------------ merging

    @staticmethod
    def merge(paths: Sequence[str | Path], out: str | Path, *, append: bool = False) -> Store:
        """One store from those of several ranks, in the order of the examples' indices.

        Ranks that were given `index=` yield what one rank would have written, row for row. An
        example that several have is taken once. A merge that was interrupted goes on.

        Args:
            paths: Stores with the same identity, layout and dtype.
            out: Folder of the merged store; none of the above.
            append: After whatever `out` holds already, as one rank that continues it would.

        Returns:
            The merged store, open for reading.

        Raises:
            StoreIdentityError: If two stores belong to different things.
            StoreError: If two examples have one index, one example has different rows, or `out`
                holds something else.
            ValueError: If there are no paths, or `out` is one of them.

        Cost: every row is read, checked and written once.
        """
        if not paths:
            raise ValueError("paths must name at least 1 store, got none")
        if Path(out).resolve() in [Path(p).resolve() for p in paths]:
            raise ValueError(f"out must be another folder than those to merge, got {out}")
        stores = [Store.open(path) for path in paths]
        best: dict[str, tuple[int, Store]] = {}
        for store in stores:
            differ = differences(essence(stores[0]._manifest), essence(store._manifest))
            if differ:
                raise StoreIdentityError(store.path, differ)
            for name, place in store._places.items():
                if name in best:
                    _check_same(name, best[name][1], store)
                if name not in best or place.index < best[name][0]:
                    best[name] = place.index, store
        order = sorted(best, key=lambda name: best[name][0])
        for one, other in pairwise(order):
            if best[one][0] == best[other][0]:
                raise StoreError(
                    f"index {best[one][0]} belongs to {one} in {best[one][1].path} and to {other} "
                    f"in {best[other][1].path}: append with index=, the place in the data set"
                )
        with Store._create(Path(out), stores[0]._manifest, None, exist_ok=True) as target:
            if not append and target.example_ids != order[: len(target.example_ids)]:
                raise StoreError(f"{out} holds other examples: merge into another folder")
            taken = {place.index: name for name, place in target._places.items()}
            for name in order:
                index, store = best[name]
                if target.has(name):
                    _check_same(name, target, store)
                elif index in taken:
                    raise StoreError(
                        f"index {index} belongs to {taken[index]} in {out} and to {name} in "
                        f"{store.path}: append with index=, the place in the data set"
                    )
            for name in (name for name in order if not target.has(name)):
                index, store = best[name]
                span = store.span(name)
                table = store.tokens(span.start, span.stop)
                columns = {column: getattr(table, column) for column in COLUMNS}
                target.append(name, store.rows(span.start, span.stop), columns, index=index)
        return Store.open(out)


def _check_same(name: str, one: Store, other: Store) -> None:
    """Two ranks may have the same example, with the same features."""
    a, b = one.span(name), other.span(name)
    ta, tb = one.tokens(a.start, a.stop), other.tokens(b.start, b.stop)
    same = torch.equal(one.rows(a.start, a.stop), other.rows(b.start, b.stop)) and all(
        torch.equal(getattr(ta, column), getattr(tb, column)) for column in COLUMNS
    )
    if not same:
        raise StoreError(f"example {name} has different rows in {one.path} and {other.path}")


def _column(name: str, tokens: Mapping[str, Any], count: int) -> Tensor:
    """A column of the token table as int32, or what is wrong with it."""
    if name not in tokens:
        raise ValueError(f"tokens must have the columns {', '.join(COLUMNS)}, got no {name}")
    column = torch.as_tensor(tokens[name])
    if column.shape != (count,) or column.is_floating_point() or column.is_complex():
        raise ValueError(
            f"tokens[{name!r}] must be {count} integers, one per row, got {column.dtype} "
            f"{tuple(column.shape)}"
        )
    column = column.to("cpu", torch.int64)
    if bool((column < 0).any()) or bool((column >= 2**31).any()):
        raise ValueError(f"tokens[{name!r}] must be within 0..2^31 - 1")
    return column.to(torch.int32)
