"""The first pass over a set; rows in a store survive an interrupt, and other diagnoses use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lddyn.engine.logits import Response
from lddyn.ranks import Ranks
from lddyn.sets.passes import Passes
from lddyn.sets.preparation import Preparation
from lddyn.sets.rows import SetReading, SetRows, new_rows, read_rows
from lddyn.sets.run import Run
from lddyn.sets.training_set import TrainingSet
from lddyn.sketches.dense_rows import DenseRows
from lddyn.sketches.layout import Layout
from lddyn.store.build import build_store
from lddyn.store.store import Store

__all__ = ["check_store", "read_start"]


def check_store(store: str | Path | None, run: Run | None) -> None:
    """Raises a ValueError for a store together with a run."""
    if store is not None and run is not None:
        raise ValueError(
            "store keeps rows of plain gradients, and a run needs rows of its optimizer's metric "
            "at several points: rank with the store first, and predict the run without it"
        )


def read_start(
    prepared: Preparation,
    passes: Passes,
    set_: TrainingSet,
    run: Run | None,
    store: str | Path | None,
    reader: Callable[[int, Response], None],
) -> tuple[SetRows, SetReading]:
    """The first pass over a set: rows of all sequences, and what the responses say.

    Rows are filled by the pass, or come from a store. Sketched rows of a run stay empty: they are
    made once Adam's metric is known (`predict_run`).
    """
    if store is None:
        rows = new_rows(prepared.access, passes, set_, prepared.sketch)
    else:
        rows = _stored(prepared, set_, store, passes.ranks, passes.bar.shown)
    later = store is not None or (run is not None and prepared.sketch is not None)
    passes.bar.say("log-probs" if later else "gradients")
    return rows, read_rows(passes, set_, [] if later else [rows], reader=reader)


def _stored(
    prepared: Preparation,
    set_: TrainingSet,
    path: str | Path,
    ranks: Ranks,
    progress: bool,
) -> SetRows:
    """Sketched rows of all sequences of a set, from a store that gets the ones it lacks.

    Args:
        prepared: The model, the workspace and the sketch.
        set_: The set.
        path: Folder of the store, by sequence: made if it is absent (`lddyn.store.build`).
        ranks: Processes that divide the missing sequences.
        progress: Show a bar over the missing ones.

    Raises:
        StoreIdentityError: If the store is of another model, sketch or kind of row.
        UnsupportedModelError: If the model has no Anatomy.

    Cost: a forward and a backward pass for each missing sequence.
    """
    build_store(
        prepared.access.anatomy,
        set_.sequences,
        path,
        prepared.sketch,
        by="sequence",
        memory=prepared.workspace,
        progress=progress,
        ranks=ranks,
    )
    ranks.wait()  # the first process merges what the others have made
    store = Store.open(path)
    assert store.layout_json is not None  # `build_store` writes it
    layout = Layout.from_dict(store.layout_json)
    count = len(set_.sequences)
    dense = DenseRows(layout, prepared.access.named, count)
    for number, example in enumerate(set_.sequences):
        dense.rows[number] = store.rows(store.span(example).start, store.span(example).stop)[0]
    return SetRows(dense, range(count))
