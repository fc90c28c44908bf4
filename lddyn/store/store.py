"""Token features on disk: a folder that stays readable if its writer is killed at any moment.

    manifest.json            what the features belong to; written once, with a checksum of itself
    journal.jsonl            one line per shard, appended: its digest and its examples (journal.py)
    shard-000000.safetensors rows and token table of whole examples, sealed by a digest (shards.py)
    lock                     who writes; the kernel releases it when the process ends (lock.py)

A shard is written to a temporary file, synced, renamed, and then entered in the journal. A shard
that was renamed but not entered contains the digest of the manifest and of its own bytes, by which
reader and writer recognise it: a reader uses it, the next writer enters it. After a kill the store
therefore holds all examples up to some one. A journal without its last lines is written again from
the shards where that is possible; otherwise opening the store is an error. Every shard is checked
before its first row is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.data.token_table import TokenTable, arrow_table
from lddyn.errors import StoreError, StoreIdentityError
from lddyn.files import TEMPORARY, JsonObject, canonical, digest_of, sync_folder, write_durably
from lddyn.memory import parse_memory
from lddyn.store.contents import Contents
from lddyn.store.export import faiss_index
from lddyn.store.journal import Journal
from lddyn.store.lock import Lock, Mutex, exclusive
from lddyn.store.manifest import (
    DTYPES,
    FORMAT,
    JOURNAL,
    LARGEST_MANIFEST,
    LOCK,
    MANIFEST,
    Manifest,
    differences,
    essence,
    json_copy,
    read_manifest,
    render,
)
from lddyn.store.merge import copy_missing, sources
from lddyn.store.query import Hits, InnerProduct, search
from lddyn.store.shards import Shard, ShardFolder
from lddyn.store.writer import Columns, Writer

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Store"]


class Store:
    """Token features of many examples in a folder: crash-safe, checked, one writer, many readers.

    Made by `Store.create`, opened by `Store.open`; a context manager. An example is appended whole
    and once, under its `Example.content_id`; rows keep the order in which examples were appended.
    A killed writer loses only examples that were not flushed: open the store again and append the
    examples that it does not have (`has`).

    Threads may share one Store: its methods run one at a time, so that `append` and `flush` wait
    for a `query` of another thread.

    A `with` block that ends by an exception does not flush, as if it had been killed: a run that is
    resumed then writes the same files, bit for bit, as one that was not interrupted.

    Attributes:
        path: The folder.
        width: Numbers in a row.
        dtype: torch.float32, float16 or bfloat16.
        identity: What the features belong to; see `identify`.
        layout_json: `layout.to_dict()` of the layout of the rows; None: plain vectors.
        layout: The layout that the store was opened with, or None.

    Example:
        >>> import lddyn, torch
        >>> ex = lddyn.Example(prompt_ids=[1, 7], response_ids=[4, 5])
        >>> with lddyn.Store.create("features", {"model": "toy"}, layout=3) as store:
        ...     store.append(ex, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> store = lddyn.Store.open("features", {"model": "toy"})
        >>> store
        Store('features': 2 tokens of 1 examples in 1 shards, 3 × float32)
        >>> len(store), store.has(ex), store.rows(1, 2)
        (2, True, tensor([[0., 2., 0.]]))
        >>> hit = store.query(torch.tensor([[3.0, -1.0, 0.0]]), k=1, sign="down")[0][0]
        >>> hit.value, hit.token_id
        (-2.0, 5)
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        layout: InnerProduct | None,
        lock: Lock | None,
    ) -> None:
        """Use `create` or `open`."""
        self.path, self._mutex = path, Mutex()
        self._manifest = manifest
        self.width = manifest["width"]
        self.dtype = DTYPES[manifest["dtype"]]
        self.identity = manifest["identity"]
        self.layout_json = manifest["layout"]
        self.layout = layout
        seal = digest_of(canonical(manifest))  # of every shard, and of the journal's first line
        shards = ShardFolder(path, seal, self.width, self.dtype)
        self._contents = Contents(Journal(path / JOURNAL, seal), shards)
        self._writer: Writer | None = None
        if lock is not None:
            self._writer = Writer(self._contents, lock, manifest["shard_bytes"])
        unlisted = self._contents.update()
        if self._writer is not None:  # only now: a damaged store is left as it is
            self._writer.list_shards(unlisted)

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls,
        path: str | Path,
        identity: Mapping[str, Any],
        layout: InnerProduct | int,
        dtype: torch.dtype | str = "float32",
        *,
        shard: int | str = "64MiB",
        exist_ok: bool = False,
    ) -> Store:
        """An empty store, open for writing.

        Args:
            path: A folder that does not exist or is empty.
            identity: What the features depend on, as JSON; see `identify`.
            layout: The layout of the rows, such as `Features.layout`; or the width of plain
                vectors.
            dtype: Dtype of the rows: float32, float16 or bfloat16.
            shard: Bytes of features after which a shard is written. A kill loses less than this;
                writing takes four times as much memory.
            exist_ok: Open an existing store, if it has the same identity, layout and dtype.

        Raises:
            StoreError: If the folder holds anything else, or cannot be written.
            StoreIdentityError: With exist_ok, if the existing store has another identity, layout or
                dtype.
            StoreLockedError: If another process writes to the store.
            ValueError: If an argument is not of the kind above.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        width = layout if isinstance(layout, int) else layout.width
        if isinstance(width, bool) or width < 1:
            raise ValueError(f"layout must have a width of at least 1, got {width}")
        manifest: Manifest = {
            "format": FORMAT,
            "identity": json_copy("identity", dict(identity)),
            "layout": None if isinstance(layout, int) else json_copy("layout", layout.to_dict()),
            "dtype": name,
            "width": width,
            "shard_bytes": parse_memory(shard),
        }
        return cls._create(
            Path(path), manifest, None if isinstance(layout, int) else layout, exist_ok
        )

    @classmethod
    def _create(
        cls, path: Path, manifest: Manifest, layout: InnerProduct | None, exist_ok: bool
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
            write_durably(path / JOURNAL, b"")
            write_durably(path / MANIFEST, text)  # from here on it is a store
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
        layout: InnerProduct | None = None,
    ) -> Store:
        """An existing store, open for reading or appending.

        Args:
            path: Its folder.
            identity: The identity that the store must have, field for field. None: not checked.
            mode: `"r"` reads, also while another process writes (`refresh` sees what is new);
                `"a"` appends, and first enters shards that a killed writer left.
            layout: The layout of the rows; needed for queries unless rows are plain vectors.

        Raises:
            StoreError: If there is no store, or it cannot be read or (`"a"`) written.
            StoreCorruptError: If manifest or journal are damaged, or a shard is missing. A shard is
                checked when its first row is used; `verify` checks all of them.
            StoreIdentityError: If identity or layout differ; the message names each field with both
                values.
            StoreLockedError: If mode is `"a"` and another process writes to the store.
            ValueError: If mode is neither.

        Cost: reading the journal, about 60 bytes for each example.
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise ValueError(f'mode must be "r" or "a", got {mode!r}')
        manifest = read_manifest(path)
        differ: dict[str, tuple[object, object]] = {}
        if identity is not None:
            differ |= differences(manifest["identity"], json_copy("identity", dict(identity)))
        if layout is not None:
            differ |= _other_layout(manifest["layout"], layout)
        if differ:
            raise StoreIdentityError(path, differ)
        lock = Lock(path / LOCK) if mode == "a" else None
        try:
            return cls(path, manifest, layout, lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    @exclusive
    def refresh(self) -> int:
        """Reads what a writer has added since the store was opened; returns the number of new rows.

        Raises:
            StoreCorruptError: If what was added is damaged.
        """
        before = len(self)
        if self._writer is None:
            self._contents.update()
        return len(self) - before

    @exclusive
    def verify(self) -> list[str]:
        """Reads every byte of every shard again and returns one line for each damaged shard.

        Manifest and journal were checked when the store was opened. Cost: 1 to 2 GiB/s.
        """
        return self._contents.verify()

    # ------------------------------------------------------------------ writing

    @exclusive
    def append(
        self,
        example: Example | str,
        rows: Tensor,
        tokens: Columns | None = None,
        *,
        index: int | None = None,
    ) -> None:
        """Adds the rows of one example; they are on disk after `flush`, or when a shard is full.

        Args:
            example: The example, or its content id; with a content id `tokens` must be given.
            rows: Features (n, width), one per counted response token, any device and float dtype;
                copied and cast to the store's dtype.
            tokens: Columns `response_index`, `position` and `token_id`, n integers each. None:
                those of the example.
            index: Index of the example in the data set; `merge` orders by it. None: the number of
                examples in the store.

        Raises:
            ValueError: If the example is in the store, shapes do not fit, or a row is not finite in
                the store's dtype.
            StoreError: If the store is not open for writing, or a full shard cannot be written (the
                example is kept in memory: make room and `flush`).
        """
        self._check_writer().append(example, rows, tokens, index)

    @exclusive
    def flush(self) -> None:
        """Writes what was appended; when this returns it survives a crash of the machine.

        Raises:
            StoreError: If the disk is full or the folder not writable. Nothing is lost: examples
                that could not be written stay in memory, the store on disk is whole, and `flush`
                may be called again.
        """
        self._check_writer().flush()

    def _check_writer(self) -> Writer:
        if self._writer is None or self._writer.lock.fd < 0:
            raise StoreError(
                f'{self.path} is not open for writing here: it was opened with mode="r", closed, '
                'or inherited by a forked process; Store.open(path, mode="a") appends'
            )
        return self._writer

    @exclusive
    def close(self) -> None:
        """Flushes, releases the lock and unmaps the shards; further use needs another `open`.

        Raises:
            StoreError: If the last shard cannot be written; the store then stays open.
        """
        if self._writer is not None and self._writer.lock.fd >= 0:
            self._writer.flush()
            self._writer.lock.release()
        self._contents.shards.unmap()

    def __enter__(self) -> Store:
        return self

    @exclusive
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            self._writer.lock.release()

    # ------------------------------------------------------------------ what it holds

    def __len__(self) -> int:
        """Rows on disk: tokens, or whole sequences. Examples that wait in memory do not count."""
        return len(self._contents)

    def __repr__(self) -> str:
        what = "sequences" if self._whole else "tokens"
        return (
            f"Store({str(self.path)!r}: {len(self)} {what} of {len(self.example_ids)} examples in "
            f"{self.n_shards} shards, {self.width} × {str(self.dtype).removeprefix('torch.')})"
        )

    @property
    def _whole(self) -> bool:
        """Whether each row is a whole sequence, as `build_store` notes in the identity."""
        return self.identity.get("rows") == "sequence"

    @property
    def example_ids(self) -> list[str]:
        """Content ids of the examples on disk, in stored order."""
        return self._contents.example_ids

    @property
    @exclusive
    def nbytes(self) -> int:
        """Bytes of the shards."""
        return sum(record.size for record in self._contents.records)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self._contents.records)

    @exclusive
    def has(self, example: Example | str) -> bool:
        """Whether an example is in the store, or waits to be flushed."""
        name = example if isinstance(example, str) else example.content_id
        waiting = self._writer is not None and name in self._writer.examples
        return waiting or name in self._contents.places

    @exclusive
    def example_at(self, index: int) -> str | None:
        """Content id of the example with this index in the data set; None: not on disk."""
        return self._contents.at(index)

    @exclusive
    def span(self, example: Example | str) -> slice:
        """The rows of an example.

        Raises:
            KeyError: If it is not on disk.
        """
        name = example if isinstance(example, str) else example.content_id
        if name not in self._contents.places:
            raise KeyError(f"example {name} is not in {self.path}")
        place = self._contents.places[name]
        return slice(place.start, place.start + place.count)

    @exclusive
    def summary(self) -> JsonObject:
        """Path, numbers of rows (`tokens`), examples and shards, bytes, width, dtype; JSON-safe."""
        return {
            "path": str(self.path),
            "tokens": len(self),
            "examples": len(self.example_ids),
            "shards": self.n_shards,
            "bytes": self.nbytes,
            "width": self.width,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @exclusive
    def explain(self) -> str:
        """The summary in one line, for people."""
        what = "sequences" if self._whole else "tokens"
        return (
            f"{self.path}: {len(self):,} {what} of {len(self.example_ids):,} examples, "
            f"{self.n_shards} shards, {self.nbytes / 2**20:,.1f} MiB, {self.width} × "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    def to_dict(self) -> JsonObject:
        """`summary`, `layout` and `identity`, JSON-safe; no rows."""
        return self.summary() | {"layout": self.layout_json, "identity": self.identity}

    # ------------------------------------------------------------------ reading

    def shards(self) -> Iterator[Shard]:
        """Yields every shard in order, mapped.

        Raises:
            StoreCorruptError: If a shard is damaged.
        """
        for number in range(self.n_shards):
            with self._mutex.lock:
                shard = self._contents.shard(number)
            yield shard

    @exclusive
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Features start:stop, (n, width) in the store's dtype.

        Within one shard this is a view of the mapped file (`.numpy()` shares it too; NumPy has no
        bfloat16); across shards it is a copy. Writing to it never changes the file.

        Raises:
            IndexError: If the range is not within the store.
            StoreCorruptError: If a shard is damaged.
        """
        return self._contents.rows(start, stop)

    @exclusive
    def tokens(self, start: int = 0, stop: int | None = None) -> TokenTable:
        """Which token each of the rows start:stop is.

        Raises:
            IndexError: If the range is not within the store.
            StoreCorruptError: If a shard is damaged.
        """
        return self._contents.tokens(start, stop)

    @exclusive
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

    @exclusive
    def to_faiss(self, factory: str = "Flat") -> Any:
        """A faiss index of all rows by inner product, for searches that may be approximate.

            index.search(store.layout.as_query(rows).numpy(), k)    # (n, k) values and row numbers

        Args:
            factory: Description for faiss.index_factory: `"Flat"` is exact, `"IVF1024,PQ64"` small.

        Raises:
            ImportError: If faiss is not installed.
            ValueError: If the layout is not linear; `query` needs no index and takes any layout.
            StoreCorruptError: If a shard is damaged.

        Cost: rows × width floats in memory, twice while an index that needs it is trained.
        """
        if self.layout_json is not None and not getattr(self.layout, "linear", False):
            raise ValueError(
                f"the layout of {self.path} must be linear for faiss, and be given when the store "
                "is opened: outer products have no plain inner product; use query, or a store of "
                "sequences (lddyn features build --by sequence)"
            )
        return faiss_index(self._contents, factory)

    @exclusive
    def query(
        self,
        rows: Tensor,
        k: int = 10,
        *,
        layout: InnerProduct | None = None,
        sign: str = "both",
        by: str = "token",
        exclude: Iterable[Example | str] = (),
        memory: int | str = "256MiB",
    ) -> Hits:
        """The k stored tokens, or sequences, with the strongest inner product with each query.

            value[q, s] = Σ_{t ∈ s} ⟨rows_q, row_t⟩   (⟨·,·⟩ as the layout estimates it)

        Exact: every stored row is compared.

        Args:
            rows: Features of the queries, (m, width), of the same layout as the stored ones; any
                device.
            k: Hits for each query; fewer if the store has fewer tokens or sequences.
            layout: The layout of the rows. None: the one that the store was opened with; rows of a
                store without layout are compared by their plain inner product.
            sign: `"up"`: the largest values; `"down"`: the smallest; `"both"`: the largest in size.
            by: `"token"`, or `"sequence"`: values are summed over the tokens of each example.
            exclude: Examples to leave out, such as the one that the queries come from.
            memory: Bytes for a block of rows and its values; more only if one example is larger.

        Returns:
            Hits: values with their standard errors, best first; ties go to the lower row.

        Raises:
            ValueError: If an argument is not of the kind above, no example is left, or the store
                has a layout and none is given.
            StoreIdentityError: If the layout is not the store's.
            StoreCorruptError: If a shard is damaged.

        Cost: 2 m N width FLOPs for N stored rows, and one pass over the files for 1,024 queries.
        """
        if layout is not None:
            differ = _other_layout(self.layout_json, layout)
            if differ:
                raise StoreIdentityError(self.path, differ)
        layout = layout or self.layout
        if layout is None and self.layout_json is not None:
            raise ValueError(
                f"layout must be given: {self.path} holds sketches, whose inner product depends on "
                "their layout (store.layout_json describes it)"
            )
        return search(
            self._contents,
            rows,
            k,
            layout,
            sign=sign,
            by=by,
            exclude={e if isinstance(e, str) else e.content_id for e in exclude},
            memory=memory,
            whole=self._whole,
        )

    # ------------------------------------------------------------------ merging

    @staticmethod
    def merge(paths: Sequence[str | Path], out: str | Path, *, append: bool = False) -> Store:
        """One store from the stores of several processes, in the order of the examples' indices.

        Processes that gave `index=` to `append` get the files that one process would have written,
        bit for bit. An example that several stores have is taken once. An interrupted merge can be
        called again and goes on.

        Args:
            paths: Stores with the same identity, layout and dtype.
            out: Folder of the merged store; none of the above.
            append: Add to an existing store in `out`, as one process that continues it would.

        Returns:
            The merged store, open for reading.

        Raises:
            StoreIdentityError: If identity, layout or dtype of two stores differ.
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
        first = stores[0]._manifest
        for store in stores:
            differ = differences(essence(first), essence(store._manifest))
            if differ:
                raise StoreIdentityError(store.path, differ)
        best = sources([store._contents for store in stores])
        with Store._create(Path(out), first, None, exist_ok=True) as target:
            if not append and target.example_ids != list(best)[: len(target.example_ids)]:
                raise StoreError(f"{out} holds other examples: merge into another folder")
            copy_missing(target._check_writer(), best)
        return Store.open(out)


def _other_layout(stored: object, layout: InnerProduct) -> dict[str, tuple[object, object]]:
    """Fields in which a layout differs from a store's."""
    given = json_copy("layout", layout.to_dict())
    return differences({"layout": stored}, {"layout": given})
