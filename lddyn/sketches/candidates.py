"""The ways to a table of all pairs that a plan compares, each with its cost, memory and error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lddyn.engine.anatomy import Anatomy
from lddyn.sketches.costs import Cost, Load, paired_cost, pushed_cost, sketched_cost, summed_cost
from lddyn.sketches.gradients import CHUNK, WINDOW, chunk_bytes, sequence_bytes
from lddyn.sketches.layout import Layout
from lddyn.sketches.result import PAIRS
from lddyn.text import bytes_text


@dataclass(frozen=True)
class Candidate:
    """One way to the table of inner products of all pairs.

    Attributes:
        method: `"paired"`: the gradients of both sides are pulled back and their factors paired;
            `"pushed"`: the gradients of one side are pushed through the other; `"features"`:
            sketches in memory; `"store"`: sketches on disk; `"gradients"`: by sequence only, whole
            gradients are formed and kept.
        flops: FLOPs of all its products.
        seconds: These FLOPs at the measured rate of one product: a lower bound.
        memory: Bytes beyond the model. Exact ways use more, up to `workspace`, where that helps.
        disk: Bytes on disk.
        error: Expected ‖Ĝ − G‖_F / ‖G‖_F; 0: exact to rounding; NaN: unknown.
        fits: Whether the memory suffices.
        why: The reason for the memory, or for not fitting.
        workspace: Bytes of `memory` that the engine may use freely.
        transposed: Whether the rows of the observed side are the ones that are pushed.
        layout: Layout of the sketches; None for exact ways.
    """

    method: str
    flops: float
    seconds: float
    memory: int
    disk: int
    error: float
    fits: bool
    why: str
    workspace: int = 0
    transposed: bool = False
    layout: Layout | None = None

    @property
    def name(self) -> str:
        """The method, with kind and size of its sketch."""
        if self.layout is None or self.method == "gradients":
            return self.method
        sketch = self.layout.sketch
        return f"{self.method} ({sketch.kind}, k = {sketch.k})"


@dataclass(frozen=True)
class Task:
    """The table that is planned: its two sides, and what there is to compute it with.

    Attributes:
        rows: Loads of the observed sequences.
        columns: Loads of the updated ones.
        distinct: Every load once.
        together: Whether rows and columns are whole sequences.
        rate: FLOP/s of one product.
        budget: Bytes of memory.
    """

    rows: Sequence[Load]
    columns: Sequence[Load]
    distinct: Sequence[Load]
    together: bool
    rate: float
    budget: int

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return self.rows[0].rates.element

    @property
    def tokens(self) -> tuple[int, int]:
        """Counted tokens of both sides."""
        return sum(map(len, self.rows)), sum(map(len, self.columns))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the table."""
        return (len(self.rows), len(self.columns)) if self.together else self.tokens


def exact_candidates(task: Task, anatomy: Anatomy) -> list[Candidate]:
    """The exact ways: both sides paired, and the cheaper of the two directions of pushing."""
    m, n = task.tokens
    fixed = sum(load.kept for load in task.distinct) + m * n * task.element
    tables = f"{bytes_text(fixed)} for {len(task.distinct)} forward passes and the table"
    # Without a caller who wants it, the dearer direction is not worth a line.
    one_way, other_way = (_pushed(task, anatomy, fixed, tables, t) for t in (False, True))
    dearer = max(one_way, other_way, key=lambda c: c.flops)
    pushed = other_way if dearer is one_way else one_way
    return [_paired(task, anatomy, fixed, tables), pushed]


def _space(task: Task, fixed: int) -> tuple[int, int]:
    """(least bytes of workspace, bytes that pulling back may use)."""
    least = 4 * max(load.workspace for load in task.distinct)
    return least, max(task.budget - fixed, least)


def _paired(task: Task, anatomy: Anatomy, fixed: int, tables: str) -> Candidate:
    """Both sides pulled back and paired, as `token_gram` does.

    The factors of one segment are held for a group of updated rows at a time; for each further
    group the observed side is pulled back again.
    """
    rates = task.rows[0].rates
    least, space = _space(task, fixed)
    width = sum(len(u) * u.length for u in task.columns) * rates.widest * task.element
    groups = max(1, math.ceil(width / (space // 2)))
    again = (groups - 1) * sum(sum(load.pulled(space)) for load in task.rows)
    flops = paired_cost(task.rows, task.columns, task.distinct, space).flops + again
    why = tables if groups == 1 else f"{tables}; the observed side is pulled back {groups} times"
    shared = [name for name in anatomy.shared() if name != anatomy.head_weight]
    if shared:
        why = f"{shared[0]} is used by several blocks: push"
    left = task.budget - fixed
    return Candidate(
        "paired",
        flops,
        flops / task.rate,
        memory=fixed + min(space, max(least, int(2 * width))),
        disk=0,
        error=0.0,
        fits=left >= least and not shared,
        why=why,
        workspace=left,
    )


def _pushed(task: Task, anatomy: Anatomy, fixed: int, tables: str, transposed: bool) -> Candidate:
    """The rows of one side pulled back and pushed through the other, as `factored_gram` does."""
    one, other = (task.columns, task.rows) if transposed else (task.rows, task.columns)
    _, space = _space(task, fixed)
    flops = pushed_cost(one, other, space).flops
    logits = 8 * task.rows[0].rates.vocabulary * max(map(len, one))
    # A chunk's factors of half of the blocks are held on average.
    least = 2 * (max(o.workspace for o in other) * (1 + len(anatomy.blocks) // 2) + logits)
    left = task.budget - fixed
    sides = ("observed", "updated") if transposed else ("updated", "observed")
    return Candidate(
        "pushed",
        flops,
        flops / task.rate,
        memory=fixed + least,
        disk=0,
        error=0.0,
        fits=left >= least,
        why=f"{tables}; {sides[0]} rows through the {sides[1]} side",
        workspace=left,
        transposed=transposed,
    )


def sketched_candidates(task: Task, layout: Layout, error: float) -> list[Candidate]:
    """Rows of a layout in memory, and on disk; by sequence without error: whole gradients."""
    cost, count, work, held = _sequences(task, layout) if task.together else _tokens(task, layout)
    m, n = task.shape
    row = layout.width * task.element
    size = count * row
    # The rows of a sequence that is listed twice are copied; pairs are compared some at a time.
    copied = 0 if count == m + n or count == m == n else (m + n) * row
    compared = 4 * m * n * task.element + 24 * min(layout.sketch.repeats * m * n, PAIRS)
    memory = size + max(work, copied + compared)
    what = "sequence" if task.together else "token"
    why = f"{layout.width} numbers a {what}; every {what} once, kept for later questions"
    method = "gradients" if task.together and error == 0 else "features"
    seconds, stored = cost.flops / task.rate, held * row + work
    fits, fits_stored = memory <= task.budget, stored <= task.budget
    on_disk = f"{why}, on disk; searched for the largest products"
    return [
        Candidate(method, cost.flops, seconds, memory, 0, error, fits, why, layout=layout),
        Candidate(
            "store",
            cost.flops,
            seconds,
            stored,
            size,
            error,
            fits_stored,
            on_disk,
            layout=layout,
        ),
    ]


def _tokens(task: Task, layout: Layout) -> tuple[Cost, int, int, int]:
    """Cost, number of rows, workspace in bytes, and rows that a store's writer holds."""
    m, n = task.tokens
    cost, _ = sketched_cost(task.distinct, layout, m * n, task.budget)
    work = max(
        chunk_bytes(layout, load.workspace, min(CHUNK, len(load)), task.element)
        for load in task.distinct
    )
    return cost, sum(map(len, task.distinct)), work, max(map(len, task.distinct))


def _sequences(task: Task, layout: Layout) -> tuple[Cost, int, int, int]:
    """The same for rows that are whole sequences."""
    count = len(task.distinct)
    cost = summed_cost(task.distinct, layout, len(task.rows) * len(task.columns))
    logits = max(map(len, task.distinct)) * task.rows[0].rates.vocabulary
    longest = max(load.workspace for load in task.distinct)
    work = sequence_bytes(layout, longest, logits, task.element)
    return cost, count, work, min(WINDOW, count)
