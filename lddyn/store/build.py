"""Computing features of a data set into a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.data.example import Example
from lddyn.data.token_table import token_columns
from lddyn.engine.anatomy import Anatomy
from lddyn.memory import DEFAULT_MEMORY
from lddyn.sketches.features import WINDOW
from lddyn.sketches.layout import Layout
from lddyn.sketches.rows import features
from lddyn.store.store import Store

if TYPE_CHECKING:
    from torch import nn


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
    """Makes the features of examples and appends them to a store, in order; resumes.

    Args:
        store: Open for writing, made with `layout`.
        model: A causal LM of transformers, or its Anatomy.
        examples: Place in the data set -> example. Those that the store has are left out, and
            repeats.
        layout: Of the rows; see `plan_layout`.
        by: `"token"`, or `"sequence"`: one row an example, under the name of its first token.
        memory: Workspace for the rows and a chunk of one example, or of 64 whole sequences.
        progress: Show a bar over tokens.

    Returns:
        How many examples were appended.

    Raises:
        ValueError: If `by` is neither, the store is of another layout, or as by `features`.
        StoreError: As by `Store.append`.

    Cost: that of `features`; one example's rows in memory, or 64 whole sequences', and a shard.
    """
    if store.layout_json != layout.to_json():
        raise ValueError(f"{store.path} has another layout: create it with that of these rows")
    anatomy = Anatomy.of(model)
    bar = tqdm(
        total=sum(len(e) for e in examples.values()),
        desc="features",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    # An example that is there twice is a row of the store once, at its first place.
    first: dict[str, tuple[int, Example]] = {}
    for index, example in examples.items():
        if not store.has(example):
            first.setdefault(example.content_id, (index, example))
    missing = list(first.values())
    bar.update(bar.total - sum(len(example) for _, example in missing))
    step = 1 if by == "token" else WINDOW
    for start in range(0, len(missing), step):
        some = missing[start : start + step]
        feats = features(anatomy, [e for _, e in some], by=by, layout=layout, memory=memory)
        for row, (index, example) in enumerate(some):
            if by == "token":
                store.append(example, feats.rows, index=index)
            else:
                columns = {name: of[:1] for name, of in token_columns(example).items()}
                store.append(example.content_id, feats.rows[row : row + 1], columns, index=index)
        bar.update(sum(len(example) for _, example in some))
    bar.close()
    store.flush()
    return len(missing)
