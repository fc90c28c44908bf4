"""Computing the features of a data set into a store, by one process or by several."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.data.example import Example
from lddyn.data.token_table import token_columns
from lddyn.engine.anatomy import Anatomy
from lddyn.errors import StoreIdentityError
from lddyn.files import JsonObject
from lddyn.memory import DEFAULT_MEMORY
from lddyn.ranks import Ranks
from lddyn.sketches.allocation import choose_layout
from lddyn.sketches.features import features
from lddyn.sketches.gradients import WINDOW
from lddyn.sketches.layout import Layout
from lddyn.sketches.sketch import Sketch
from lddyn.store.identity import identify
from lddyn.store.manifest import MANIFEST
from lddyn.store.store import Store

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["BuiltStore", "build_store", "store_features"]


@dataclass(frozen=True)
class BuiltStore:
    """What `build_store` made.

    Attributes:
        store: The finished store, open for reading.
        written: Number of examples that this call added.
        processes: Number of processes that built it.
    """

    store: Store
    written: int
    processes: int

    def to_dict(self) -> JsonObject:
        """`Store.to_dict` with `written` and `processes`, JSON-safe."""
        return self.store.to_dict() | {"written": self.written, "processes": self.processes}


def build_store(
    model: nn.Module | Anatomy,
    examples: Mapping[int, Example] | Sequence[Example],
    path: str | Path,
    sketch: Sketch | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    by: str = "token",
    dtype: torch.dtype | str = "float32",
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> BuiltStore | None:
    """Sketches the token gradients of a data set into a store.

    A build that was interrupted continues when it is called again, and a store that exists is
    extended by the examples that it does not have. Under torchrun each process computes every n-th
    example into a store of its own beside `path`; process 0 merges them. The files are bit for bit
    those of a single process.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: The data set: a sequence, or index → example. Duplicates are stored once.
        path: Folder of the store.
        sketch: How gradients are sketched; default `Sketch()`.
        tokenizer: Becomes part of the store's identity. None: left out.
        by: `"token"`: a row for each counted response token; `"sequence"`: one for each example.
        dtype: Dtype of the stored rows: float32, float16 or bfloat16.
        memory: Workspace beyond the model, in bytes or as "2GiB".
        progress: Show a bar over the tokens of process 0.
        ranks: This process among those that build the store. None: as torchrun's environment
            variables say, else a single process.

    Returns:
        BuiltStore; None in processes other than 0, which return before the stores are merged.

    Raises:
        ValueError: If there is no example, or as by `features`.
        StoreIdentityError: If the store in `path` belongs to another model, tokenizer, sketch,
            dtype or kind of row.
        StoreError: If the store cannot be written.

    Cost: that of `features`; in memory the rows of one example (by sequence, of 64) and a shard.

    Example:
        >>> import lddyn, transformers
        >>> from lddyn.store.build import build_store
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> examples = [lddyn.Example([1, 2], [3, 4, 5 + i]) for i in range(4)]
        >>> built = build_store(model, examples, "features", lddyn.Sketch(k=800))
        >>> len(built.store), built.written
        (12, 4)
        >>> build_store(model, examples, "features", lddyn.Sketch(k=800)).written
        0
    """
    if not isinstance(examples, Mapping):
        examples = dict(enumerate(examples))
    if not examples:
        raise ValueError("examples must hold at least one Example, got none")
    path, sketch = Path(path), sketch or Sketch()
    with contextlib.ExitStack() as stack:
        ranks = ranks or stack.enter_context(Ranks.of_torchrun())
        anatomy = Anatomy.of(model)
        model_dtype = str(anatomy.head.dtype).removeprefix("torch.")
        identity = identify(anatomy.model, tokenizer, dtype=model_dtype, rows=by)
        parts = [path]
        if ranks.world > 1:
            name = f"{path.name}.rank-{{}}-of-{ranks.world}"
            parts = [path.with_name(name.format(i)) for i in range(ranks.world)]
        # The layout of a store that exists already, which other examples may have decided; else one
        # that all processes find alike, because it depends on the whole data set.
        layout = _stored_layout([path, *parts], sketch)
        if layout is None:
            layout = choose_layout(anatomy, list(examples.values()), sketch, by)
        missing, before = _missing(examples, path, identity, layout, dtype)
        mine = {i: e for n, (i, e) in enumerate(examples.items()) if n % ranks.world == ranks.rank}
        if missing:
            mine = {i: e for i, e in mine.items() if i in missing}
            with Store.create(parts[ranks.rank], identity, layout, dtype, exist_ok=True) as store:
                show = progress and ranks.rank == 0
                store_features(store, anatomy, mine, layout, by=by, memory=memory, progress=show)
        ranks.wait()
    if ranks.rank != 0:
        return None
    if ranks.world > 1:
        if missing:
            Store.merge(parts, path, append=True)
        for part in filter(Path.exists, parts):
            shutil.rmtree(part)
    store = Store.open(path, layout=layout)
    return BuiltStore(store, len(store.example_ids) - before, ranks.world)


def _stored_layout(paths: Sequence[Path], sketch: Sketch) -> Layout | None:
    """The layout of the first of these stores that exists and was made with this sketch."""
    for path in paths:
        if (path / MANIFEST).exists():
            described = Store.open(path).layout_json
            layout = None if described is None else Layout.from_dict(described)
            if layout is not None and layout.sketch == sketch:
                return layout
    return None


def _missing(
    examples: Mapping[int, Example],
    path: Path,
    identity: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype | str,
) -> tuple[set[int], int]:
    """Indices of the examples that the store in `path` does not have, and how many it has."""
    if not (path / MANIFEST).exists():
        return set(examples), 0
    store = Store.open(path, identity, layout=layout)
    stored, wanted = (str(x).removeprefix("torch.") for x in (store.dtype, dtype))
    if stored != wanted:
        raise StoreIdentityError(path, {"dtype": (stored, wanted)})
    missing = {index for index, example in examples.items() if not store.has(example)}
    return missing, len(store.example_ids)


def store_features(
    store: Store,
    model: nn.Module | Anatomy,
    examples: Mapping[int, Example],
    layout: Layout,
    *,
    by: str = "token",
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
) -> int:
    """Computes the features of examples and appends them to a store that is open for writing.

    Args:
        store: Open for writing, made with `layout`.
        model: A causal LM of transformers, or its Anatomy.
        examples: Index in the data set → example. Examples that the store has are left out, and so
            are duplicates.
        layout: Layout of the rows; see `choose_layout`.
        by: `"token"`, or `"sequence"`: one row an example, entered under its first token.
        memory: Workspace for the rows and a chunk of one example, or of 64 whole sequences.
        progress: Show a bar over tokens.

    Returns:
        Number of examples that were appended.

    Raises:
        ValueError: If `by` is neither, the store has another layout, or as by `features`.
        StoreError: As by `Store.append`.

    Cost: that of `features`; in memory one example's rows, or those of 64 whole sequences, and a
    shard.
    """
    if store.layout_json != layout.to_dict():
        raise ValueError(f"{store.path} has another layout: create it with that of these rows")
    anatomy = Anatomy.of(model)
    bar = tqdm(
        total=sum(len(e) for e in examples.values()),
        desc="features",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    first: dict[str, tuple[int, Example]] = {}  # of duplicates
    for index, example in examples.items():
        if not store.has(example):
            first.setdefault(example.content_id, (index, example))
    missing = list(first.values())
    bar.update(bar.total - sum(len(example) for _, example in missing))
    step = 1 if by == "token" else WINDOW
    for start in range(0, len(missing), step):
        some = missing[start : start + step]
        try:
            made = features(anatomy, [e for _, e in some], by=by, layout=layout, memory=memory)
        except BaseException:
            store.flush()  # Ctrl-C, and memory that runs out, keep the rows before
            raise
        for row, (index, example) in enumerate(some):
            if by == "token":
                store.append(example, made.rows, index=index)
            else:
                columns = {name: column[:1] for name, column in token_columns(example).items()}
                store.append(example.content_id, made.rows[row : row + 1], columns, index=index)
        bar.update(sum(len(example) for _, example in some))
    bar.close()
    store.flush()
    return len(missing)
