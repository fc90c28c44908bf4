"""What an answer costs, and which way to it is cheapest: FLOPs, bytes and error before any work.

FLOPs are counted from a traced forward pass, not from a model's name. Errors of sketches are those
of a few tokens that are sketched, pair by pair, and weighed by how many pairs of a kind there are.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lddyn import ops
from lddyn.data.example import Example
from lddyn.data.token_table import table_of
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import Side, factored_gram, token_gram
from lddyn.engine.guard import undisturbed
from lddyn.estimate import Estimate
from lddyn.memory import DEFAULT_MEMORY, parse_memory
from lddyn.sketches.costs import Load, Rates, paired_cost, pushed_cost, sketched_cost, summed_cost
from lddyn.sketches.divide import plan_layout
from lddyn.sketches.features import CHUNK, PAIRS, WINDOW, Features
from lddyn.sketches.gradients import chunk_bytes, sequence_bytes
from lddyn.sketches.layout import Layout
from lddyn.sketches.rows import features
from lddyn.sketches.sketch import Sketch

if TYPE_CHECKING:
    from torch import nn

_PILOT = 8, 64  # examples of a side, and tokens of all, whose products tell a sketch's error

_ROUNDS = 4  # of looking for k

_KINDS = ("twosided", "lowrank")

_TIE = 1.1  # what an exact answer may cost over an estimate


@dataclass(frozen=True)
class Candidate:
    """One way to the table of all token pairs.

    Attributes:
        method: `"paired"`: both sides pulled back, factors paired; `"pushed"`: rows of one side
            pushed through the other; `"features"`: sketches in memory; `"store"`: on disk. By
            sequence also `"gradients"`: formed and kept as they are.
        flops: All of it.
        seconds: flops at the rate of a product, measured when planned: a lower bound.
        memory: Bytes beyond the model; exact ways take more, up to `workspace`, where that helps.
        disk: Bytes.
        error: Expected ‖Ĝ − G‖_F / ‖G‖_F; 0: exact to rounding; NaN: not known.
        fits: Whether memory suffices.
        why: What decides.
        workspace: Bytes of `memory` that the engine may use as it likes.
        transposed: Whether the observed side's rows are the ones that are pushed.
        layout: Of sketches.
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
        """The method, and the sketch's kind and size."""
        if self.layout is None or self.method == "gradients":
            return self.method
        sketch = self.layout.sketch
        return f"{self.method} ({sketch.kind}, k = {sketch.k})"


@dataclass(frozen=True)
class Plan:
    """Every way that was looked at, and the one to take. Made by `plan`.

    Attributes:
        shape: (M, L), tokens of both sides, or sequences.
        candidates: In the order of FLOPs.
        chosen: The cheapest that fits and is precise enough, or an exact one that costs at most a
            tenth more; None: there is none.
        memory: Bytes that were given.
        rtol: Wanted error; None: exact.
        rate: FLOP/s of a product of this model's size, here and now.
        by: `"token"` or `"sequence"`.
    """

    shape: tuple[int, int]
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    memory: int
    rtol: float | None
    rate: float
    anatomy: Anatomy
    observed: tuple[Example, ...]
    updated: tuple[Example, ...]
    by: str = "token"

    def explain(self) -> str:
        """A table of all candidates, and what to do."""
        wanted = "exact" if self.rtol is None else f"within {100 * self.rtol:g} %"
        lines = [
            f"{self.shape[0]} x {self.shape[1]} {self.by} pairs of {len(self.observed)} and "
            f"{len(self.updated)} sequences, {wanted}, in {_bytes(self.memory)} beyond the model",
            f"{'':2}{'way':36} {'GFLOP':>9} {'time ≥':>9} {'memory':>9} {'disk':>9} {'error':>8}",
        ]
        for c in self.candidates:
            error = "exact" if c.error == 0 else "?" if math.isnan(c.error) else f"{c.error:.2%}"
            disk = _bytes(c.disk) if c.disk else "–"
            mark = "→" if c is self.chosen else " "
            lines.append(
                f"{mark:2}{c.name:36} {c.flops / 1e9:9.4g} {_seconds(c.seconds):>9} "
                f"{_bytes(c.memory):>9} {disk:>9} {error:>8}"
            )
            lines.append(f"{'':4}{c.why}")
        lines.append(f"time at {self.rate / 1e9:.4g} GFLOP/s, the rate of one product here and now")
        if self.chosen is None:
            lines.append("nothing fits: raise memory or rtol, or plan for fewer examples at a time")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All numbers, for other programs."""
        rows = []
        for c in self.candidates:
            row = {k: v for k, v in vars(c).items() if k != "layout"}
            row["error"] = None if math.isnan(c.error) else c.error
            row["chosen"] = c is self.chosen
            row["sketch"] = None if c.layout is None else vars(c.layout.sketch)
            row["width"] = None if c.layout is None else c.layout.width
            rows.append(row)
        return {
            "shape": list(self.shape),
            "memory": self.memory,
            "rtol": self.rtol,
            "flops_per_second": self.rate,
            "by": self.by,
            "candidates": rows,
        }

    def run(self, progress: bool = False) -> Estimate:
        """⟨∇ log π(y_m), ∇ log π(y_l)⟩ of all pairs of tokens, or sequences, the chosen way.

        Raises:
            RuntimeError: If nothing was chosen, or a store was: it is made by
                `lddyn features build`, and is asked, not multiplied out.
        """
        chosen = self.chosen
        if chosen is None:
            raise RuntimeError(f"there is no way to run:\n{self.explain()}")
        if chosen.method == "store":
            assert chosen.layout is not None
            sketch = chosen.layout.sketch
            more = f" --rank {sketch.rank}" if sketch.kind == "lowrank" else ""
            more += " --by sequence" if self.by == "sequence" else ""
            raise RuntimeError(
                "the plan is a store: make it with lddyn features build --kind "
                f"{sketch.kind} -k {sketch.k} --repeats {sketch.repeats} --seed {sketch.seed}"
                f"{more}, and ask it with lddyn features query"
            )
        if chosen.layout is not None:
            return self._compare(chosen.layout, progress)
        sides = {e: Side.log_probs(self.anatomy.trace(e)) for e in (*self.observed, *self.updated)}
        one, other = [sides[e] for e in self.observed], [sides[e] for e in self.updated]
        if chosen.method == "paired":
            table = token_gram(one, other, chosen.workspace, progress)
        elif chosen.transposed:
            table = factored_gram(other, one, chosen.workspace, progress).T
        else:
            table = factored_gram(one, other, chosen.workspace, progress)
        if self.by == "sequence":
            for axis, side in enumerate((self.observed, self.updated)):
                parts = table.split([len(e) for e in side], axis)
                table = torch.stack([part.sum(axis) for part in parts], axis)
        return Estimate(table, torch.zeros_like(table))

    def _compare(self, layout: Layout, progress: bool) -> Estimate:
        """The products of sketches; every sequence is sketched once."""
        distinct = list(dict.fromkeys((*self.observed, *self.updated)))
        made = features(
            self.anatomy, distinct, by=self.by, layout=layout, memory=self.memory, progress=progress
        )
        lengths = [len(e) if self.by == "token" else 1 for e in distinct]
        places = torch.arange(len(made)).split(lengths)
        place = dict(zip(distinct, places, strict=True))

        def rows(side: tuple[Example, ...]) -> Features:
            at = torch.cat([place[e] for e in side])
            first, last = int(at[0]), int(at[-1]) + 1
            one_piece = last - first == len(at) and bool((at.diff() == 1).all())
            found = made.rows[first:last] if one_piece else made.rows[at.to(made.rows.device)]
            return Features(found, table_of(side, self.by), layout)

        return rows(self.observed).gram(rows(self.updated))


@undisturbed
def plan(
    model: nn.Module | Anatomy,
    observed: Sequence[Example],
    updated: Sequence[Example] | None = None,
    *,
    by: str = "token",
    rtol: float | None = None,
    memory: int | str = DEFAULT_MEMORY,
    sketch: Sketch | None = None,
) -> Plan:
    """How to get the inner products of all token gradients of these sequences, and at what cost.

    An exact way is taken where it costs at most a tenth more FLOPs than an estimate that would do.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        observed: Sequences whose counted response tokens are the M rows.
        updated: Those of the L columns; default: the same.
        by: `"token"`, or `"sequence"`: rows and columns are the gradients of whole sequences.
        rtol: Wanted ‖Ĝ − G‖_F / ‖G‖_F; sketches are made as large as that takes. Default: exact.
        memory: Bytes beyond the model, or "2GiB": stored forward passes, workspace and result.
        sketch: Kind, repeats and seed to look at, and k where rtol is not given; default: two-sided
            and low-rank ones.

    Returns:
        Plan: `explain()` it, `run()` it.

    Raises:
        ValueError: If a side is empty, `by` is neither, or rtol is not positive and finite.

    Cost: a forward pass; the features of 64 to 128 tokens of up to 16 sequences, or of these as a
    whole, a few times.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> examples = [lddyn.Example([1, 2], [3, 4, 5 + i]) for i in range(4)]
        >>> way = lddyn.plan(model, examples)
        >>> way.chosen.method, way.run().value.shape
        ('paired', torch.Size([12, 12]))
    """
    observed = tuple(observed)
    updated = observed if updated is None else tuple(updated)
    for name, side in (("observed", observed), ("updated", updated)):
        if not side:
            raise ValueError(f"{name} must hold at least one Example, got none")
    if by not in ("token", "sequence"):
        raise ValueError(f"by must be 'token' or 'sequence', got {by!r}")
    if rtol is not None and not 0 < rtol < math.inf:
        raise ValueError(f"rtol must be positive and finite, got {rtol}")
    anatomy = Anatomy.of(model)
    budget = parse_memory(memory, anatomy.device)
    longest = max((*observed, *updated), key=lambda e: e.length)
    rates = Rates.of(Side.log_probs(anatomy.trace(longest)))
    loads = {e: Load(rates, e.length, tuple(e.positions)) for e in (*observed, *updated)}
    rows, columns = [loads[e] for e in observed], [loads[e] for e in updated]
    rate = _rate(anatomy, rates)
    found = _exact(anatomy, rows, columns, list(loads.values()), rate, budget)
    together = by == "sequence"
    pilot = _Pilot(anatomy, observed, updated, together, loads[longest].workspace, budget)
    estimated = partial(_estimated, rows, columns, list(loads.values()), together, rate, budget)
    kinds = _KINDS[: 1 if together else None] if sketch is None else (sketch.kind,)
    for kind in kinds:  # the low rank of a sum of gradients is not looked for
        wished = Sketch(kind) if sketch is None else sketch
        found += estimated(*pilot.look(wished, rtol))
    if together:
        # As many numbers as all parameters, for every repeat: nothing needs to be sketched.
        parameters = sum(p.numel() for p in anatomy.trainable.values())
        repeats = Sketch().repeats
        layout = pilot.layout(Sketch(k=repeats * (parameters + len(anatomy.trainable))))
        if all(part.kind == "exact" for part in layout.parts):  # packed experts are not kept so
            found += estimated(layout, 0.0)[:1]
    found.sort(key=lambda c: c.flops)
    chosen = choose(found, rtol)
    shape = len(rows), len(columns)
    if not together:
        shape = sum(map(len, rows)), sum(map(len, columns))
    return Plan(shape, tuple(found), chosen, budget, rtol, rate, anatomy, observed, updated, by)


def choose(candidates: Sequence[Candidate], rtol: float | None) -> Candidate | None:
    """The cheapest that fits and is precise enough; in a near tie the cheapest that is exact."""
    limit = 0.0 if rtol is None else rtol
    good = [c for c in candidates if c.fits and c.error <= limit]
    least = min((c.flops for c in good), default=0.0)
    exact = [c for c in good if c.error == 0 and c.flops <= _TIE * least]
    return min(exact or good, key=lambda c: (c.flops, c.disk), default=None)


def _exact(
    anatomy: Anatomy,
    rows: Sequence[Load],
    columns: Sequence[Load],
    distinct: Sequence[Load],
    rate: float,
    budget: int,
) -> list[Candidate]:
    """Both sides pulled back, and either one pushed through the other."""
    rates, blocks = rows[0].rates, len(anatomy.blocks)
    m, n = sum(map(len, rows)), sum(map(len, columns))
    fixed = sum(load.kept for load in distinct) + m * n * rates.element
    left, found = budget - fixed, []
    tables = f"{_bytes(fixed)} for {len(distinct)} forward passes and the table"

    # What `token_gram` does: factors of one segment for a group of updated rows at a time.
    least = 4 * max(load.workspace for load in distinct)
    width = sum(len(u) * u.length for u in columns) * rates.widest * rates.element
    space = max(left, least)
    groups = max(1, math.ceil(width / (space // 2)))
    again = (groups - 1) * sum(sum(load.pulled(space)) for load in rows)
    flops = paired_cost(rows, columns, distinct, space).flops + again
    why = tables if groups == 1 else f"{tables}; the observed side is pulled back {groups} times"
    shared = [n for n in anatomy.shared() if n != anatomy.head_weight]
    if shared:
        why = f"{shared[0]} is used by several blocks: push"
    memory = fixed + min(space, max(least, int(2 * width)))
    found.append(
        Candidate(
            "paired", flops, flops / rate, memory, 0, 0.0, left >= least and not shared, why, left
        )
    )
    for transposed in (False, True):
        one, other = (columns, rows) if transposed else (rows, columns)
        # Without a caller who wants it, the dearer direction is not worth a line.
        cost = pushed_cost(one, other, space)
        most = 8 * rates.vocabulary * max(map(len, one))
        least = 2 * (max(o.workspace for o in other) * (1 + blocks // 2) + most)
        what = "observed rows through the updated side" if transposed else "updated rows through"
        why = f"{tables}; {what}{'' if transposed else ' the observed side'}"
        found.append(
            Candidate(
                "pushed",
                cost.flops,
                cost.flops / rate,
                fixed + least,
                0,
                0.0,
                left >= least,
                why,
                left,
                transposed,
            )
        )
    found.remove(max(found[1:], key=lambda c: c.flops))
    return found


def _estimated(
    rows: Sequence[Load],
    columns: Sequence[Load],
    distinct: Sequence[Load],
    together: bool,
    rate: float,
    budget: int,
    layout: Layout,
    error: float,
) -> list[Candidate]:
    """Sketches, or gradients as they are, in memory and on disk."""
    element = rows[0].rates.element
    if together:
        m, n, tokens = len(rows), len(columns), len(distinct)
        cost, size = summed_cost(distinct, layout, m * n), tokens * layout.width * element
        logits = max(map(len, distinct)) * rows[0].rates.vocabulary
        longest = max(load.workspace for load in distinct)
        work = sequence_bytes(layout, longest, logits, element)
        one = min(WINDOW, tokens) * layout.width * element
    else:
        m, n = sum(map(len, rows)), sum(map(len, columns))
        cost, size = sketched_cost(distinct, layout, m * n, budget)
        work = max(
            chunk_bytes(layout, load.workspace, min(CHUNK, len(load)), element) for load in distinct
        )
        one = max(map(len, distinct)) * layout.width * element
        tokens = sum(map(len, distinct))
    # Rows of a sequence that is listed twice are copied; pairs are compared some at a time.
    copied = 0 if tokens == m + n or tokens == m == n else (m + n) * layout.width * element
    compared = 4 * m * n * element + 24 * min(layout.sketch.repeats * m * n, PAIRS)
    memory = size + max(work, copied + compared)
    what = "sequence" if together else "token"
    why = f"{layout.width} numbers a {what}; every {what} once, kept for later questions"
    method = "gradients" if together and error == 0 else "features"
    seconds = cost.flops / rate
    return [
        Candidate(
            method, cost.flops, seconds, memory, 0, error, memory <= budget, why, layout=layout
        ),
        Candidate(
            "store",
            cost.flops,
            seconds,
            one + work,
            size,
            error,
            one + work <= budget,
            f"{why}, on disk; asked for the largest products",
            layout=layout,
        ),
    ]


class _Pilot:
    """A few tokens of a few sequences, whose sketched products tell how far sketches are off."""

    def __init__(
        self,
        anatomy: Anatomy,
        observed: tuple[Example, ...],
        updated: tuple[Example, ...],
        together: bool,
        workspace: int,
        budget: int,
    ):
        self.anatomy, self.budget = anatomy, budget
        self.by = "sequence" if together else "token"
        self.chunk = max(1, min(CHUNK, budget // 2 // workspace))
        self.examples = list(dict.fromkeys((*observed, *updated)))
        sides = [dict.fromkeys(observed), dict.fromkeys(updated)]
        picked = [_spaced(list(side), _PILOT[0]) for side in sides]
        union = list(dict.fromkeys((*picked[0], *picked[1])))
        self.thin, rows, times = union, union, Counter(updated)
        if together:
            own = sum(times[e] for e in observed)
            self.counts = own, 0, len(observed) * len(updated) - own
        else:
            self.thin = [_thinned(e, max(8, _PILOT[1] // len(union))) for e in union]
            rows = [e for e, thin in zip(union, self.thin, strict=True) for _ in range(len(thin))]
            self.counts = self._pairs(observed, updated, times)
        self.sides = [torch.tensor([e in side for e in rows]) for side in sides]

    @staticmethod
    def _pairs(
        observed: tuple[Example, ...], updated: tuple[Example, ...], times: Counter[Example]
    ) -> tuple[int, int, int]:
        """Token pairs by kind: a token with itself, two of a sequence, two of different ones."""
        tokens = sum(map(len, observed)) * sum(map(len, updated))
        own = sum(times[e] * len(e) for e in observed)
        inside = sum(times[e] * len(e) ** 2 for e in observed)
        return own, inside - own, tokens - inside

    def layout(self, sketch: Sketch) -> Layout:
        """Of all of the sequences."""
        return plan_layout(self.anatomy, self.examples, sketch, self.by)

    def look(self, sketch: Sketch, rtol: float | None) -> tuple[Layout, float]:
        """The smallest sketch of this kind within rtol, or the nearest; and its expected error."""
        repeats, tried = sketch.repeats, []
        # A few tokens miss some of the tail of the errors: a tenth on trained models.
        aim = math.inf if rtol is None else 0.85 * rtol
        least = 2 * repeats * (len(self.anatomy.trainable) + 1)
        parameters = sum(p.numel() for p in self.anatomy.trainable.values())
        rows = len(self.sides[0])
        most = max(least, min(parameters, self.budget // 2 // (8 * rows)))
        k, seen = min(max(sketch.k, least), most), set()
        for _ in range(_ROUNDS):
            k = -(-k // repeats) * repeats
            if k in seen:
                break
            seen.add(k)
            layout = self.layout(replace(sketch, k=k))
            error = self.error(layout)
            tried.append((layout, error))
            if rtol is None or error == 0 or 0.75 * aim <= error <= aim:
                break
            # Products that drown in the noise of the sketch (NaN): four times as many numbers.
            growth = 4.0 if math.isnan(error) else 1.15 * (error / aim) ** 2
            k = int(min(max(k * growth, least), most))
        precise = [(x, e) for x, e in tried if e <= aim]
        if precise:
            return min(precise, key=lambda found: found[0].width)
        return min(tried, key=lambda found: math.inf if math.isnan(found[1]) else found[1])

    def error(self, layout: Layout) -> float:
        """Expected ‖Ĝ − G‖_F / ‖G‖_F of all pairs."""
        # Few rows, and a chunk that fits if any does: where neither fits, the plan has to say so.
        made = features(
            self.anatomy, self.thin, by=self.by, layout=layout, memory=2**62, chunk=self.chunk
        )
        products, table = made.gram(), made.tokens
        spread = products.stderr.double() ** 2
        square = products.value.double() ** 2 - spread
        index = table.example_index.to(spread.device)
        inside = index[:, None] == index
        own = torch.eye(len(made), dtype=torch.bool, device=spread.device)
        one, other = (side.to(spread.device) for side in self.sides)
        across = (one[:, None] & other) & ~inside
        off = total = 0.0
        kinds = own, inside & ~own, across if bool(across.any()) else ~inside
        for count, kind in zip(self.counts, kinds, strict=True):
            if count and bool(kind.any()):
                off += count * float(spread[kind].mean())
                total += count * float(square[kind].mean())
        return math.sqrt(off / total) if total > 0 else math.nan


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _thinned(example: Example, count: int) -> Example:
    """The same sequence with at most so many counted tokens."""
    first = len(example.prompt_ids) - 1
    kept = set(_spaced(list(example.positions), count))
    mask = tuple(first + i in kept for i in range(len(example.response_ids)))
    return replace(example, response_mask=mask)


def _rate(anatomy: Anatomy, rates: Rates) -> float:
    """FLOP/s of a product with one of the model's widths."""
    like = anatomy.head.weight
    a = like.new_full((2048, rates.hidden), 0.5)  # not of the caller's random numbers
    b = like.new_full((rates.hidden, 4 * rates.hidden), 0.5)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        ops.product(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - began)
    return float(2.0 * a.numel() * b.shape[1] / best)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
