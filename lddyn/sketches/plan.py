"""What a table of inner products costs, and which way to it is cheapest, before any work is done.

FLOPs are counted from a traced forward pass, not from a model's name. The error of a sketch is
measured on a few tokens (pilot.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from lddyn import ops
from lddyn.cells import Grid
from lddyn.data.example import Example
from lddyn.data.token_table import table_of
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import Side, factored_gram, token_gram
from lddyn.engine.guard import undisturbed
from lddyn.estimate import Estimate
from lddyn.files import JsonObject, json_safe
from lddyn.memory import DEFAULT_MEMORY, parse_memory
from lddyn.results import Result
from lddyn.sketches.candidates import Candidate, Task, exact_candidates, sketched_candidates
from lddyn.sketches.costs import Load, Rates
from lddyn.sketches.features import features
from lddyn.sketches.layout import Layout, by_sequence
from lddyn.sketches.pilot import Pilot
from lddyn.sketches.result import Features
from lddyn.sketches.sketch import Sketch
from lddyn.text import bytes_text, seconds_text

if TYPE_CHECKING:
    from torch import nn

_KINDS = ("twosided", "lowrank")

_TIE = 1.1  # what an exact answer may cost over an estimate


def _costs(c: Candidate) -> list[str]:
    """Time, memory, disk and error of a way, as text."""
    error = "exact" if c.error == 0 else "?" if math.isnan(c.error) else f"{c.error:.2%}"
    disk = bytes_text(c.disk) if c.disk else "–"
    return [seconds_text(c.seconds), bytes_text(c.memory), disk, error]


@dataclass(frozen=True)
class Plan(Result):
    """The ways to a table of inner products, and the one to take. Made by `lddyn.plan`.

    Attributes:
        shape: (M, L), tokens of both sides, or sequences.
        candidates: All ways, by FLOPs.
        chosen: The cheapest one that fits and is precise enough, or an exact one that costs at most
            a tenth more; None if there is none.
        memory: Bytes that may be used.
        rtol: Wanted error; None: exact.
        rate: FLOP/s of one product of this model's width, measured when planned.
        by: `"token"` or `"sequence"`.
    """

    shape: tuple[int, int]
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    memory: int
    rtol: float | None
    rate: float
    anatomy: Anatomy = field(repr=False)
    observed: tuple[Example, ...] = field(repr=False)
    updated: tuple[Example, ...] = field(repr=False)
    by: str = "token"

    def __repr__(self) -> str:
        chosen = "nothing fits" if self.chosen is None else self.chosen.name
        return (
            f"Plan({self.shape[0]} x {self.shape[1]} {self.by} pairs: {chosen}, of "
            f"{len(self.candidates)} ways)"
        )

    def summary(self) -> JsonObject:
        """The chosen way: FLOPs, seconds, bytes and error, JSON-safe; None if nothing fits."""
        names = ("method", "flops", "seconds", "memory", "disk", "error")
        chosen = {name: getattr(self.chosen, name, None) for name in names}
        numbers = {"shape": list(self.shape), "by": self.by, "rtol": self.rtol}
        return {name: json_safe(value) for name, value in (numbers | chosen).items()}

    def explain(self) -> str:
        """A table of all ways with their costs, and an arrow at the one to take."""
        wanted = "exact" if self.rtol is None else f"within {100 * self.rtol:g} %"
        lines = [
            f"{self.shape[0]} x {self.shape[1]} {self.by} pairs of {len(self.observed)} and "
            f"{len(self.updated)} sequences, {wanted}, in {bytes_text(self.memory)} beyond the "
            "model",
            f"{'':2}{'way':36} {'GFLOP':>9} {'time ≥':>9} {'memory':>9} {'disk':>9} {'error':>8}",
        ]
        for c in self.candidates:
            seconds, memory, disk, error = _costs(c)
            mark = "→" if c is self.chosen else " "
            lines.append(
                f"{mark:2}{c.name:36} {c.flops / 1e9:9.4g} {seconds:>9} {memory:>9} {disk:>9} "
                f"{error:>8}"
            )
            lines.append(f"{'':4}{c.why}")
        lines.append(f"time at {self.rate / 1e9:.4g} GFLOP/s, the rate of one product here and now")
        if self.chosen is None:
            lines.append("nothing fits: raise memory or rtol, or plan for fewer examples at a time")
        return "\n".join(lines)

    def _grids(self) -> list[Grid]:
        rows = []
        for c in self.candidates:
            name = f"{'→ ' if c is self.chosen else ''}{c.name}"
            rows.append((name, [c.flops / 1e9, *_costs(c), "" if c.fits else "does not fit"]))
        return [Grid("Ways", ["GFLOP", "time ≥", "memory", "disk", "error", ""], rows)]

    def _caption(self) -> str:
        return repr(self)

    def to_dict(self) -> JsonObject:
        """The table and all ways to it, JSON-safe."""
        rows = []
        for c in self.candidates:
            row = {f.name: getattr(c, f.name) for f in fields(c) if f.name != "layout"}
            row["chosen"] = c is self.chosen
            row["sketch"] = None if c.layout is None else asdict(c.layout.sketch)
            row["width"] = None if c.layout is None else c.layout.width
            rows.append(json_safe(row))
        return {
            "shape": list(self.shape),
            "memory": self.memory,
            "rtol": self.rtol,
            "flops_per_second": self.rate,
            "by": self.by,
            "candidates": rows,
        }

    def run(self, progress: bool = False) -> Estimate:
        """The table ⟨∇ log π(y_m), ∇ log π(y_l)⟩ of all pairs, computed the chosen way.

        Returns:
            Estimate (M, L); its standard error is 0 where the way is exact.

        Raises:
            RuntimeError: If no way was chosen, or a store was: a store is built by
                `lddyn features build` and searched, not multiplied out.
        """
        chosen = self.chosen
        if chosen is None:
            raise RuntimeError(f"there is no way to run:\n{self.explain()}")
        if chosen.layout is None:
            return self._exact(chosen, progress)
        if chosen.method == "store":
            sketch = chosen.layout.sketch
            more = f" --rank {sketch.rank}" if sketch.kind == "lowrank" else ""
            more += " --by sequence" if self.by == "sequence" else ""
            raise RuntimeError(
                "the plan is a store: make it with lddyn features build --kind "
                f"{sketch.kind} -k {sketch.k} --repeats {sketch.repeats} --seed {sketch.seed}"
                f"{more}, and search it with lddyn features query"
            )
        return self._sketched(chosen.layout, progress)

    def _exact(self, chosen: Candidate, progress: bool) -> Estimate:
        """The table of tokens by the engine; by sequence it is summed over their tokens."""
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

    def _sketched(self, layout: Layout, progress: bool) -> Estimate:
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
            of_side = made.rows[first:last] if one_piece else made.rows[at.to(made.rows.device)]
            return Features(of_side, table_of(side, self.by), layout)

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
    """The ways to the inner products of all token gradients of these sequences, with their costs.

    An exact way is chosen where it costs at most a tenth more FLOPs than a precise enough estimate.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        observed: Sequences whose counted response tokens are the M rows.
        updated: Sequences of the L columns; default: the same.
        by: `"token"`, or `"sequence"`: rows and columns are the gradients of whole sequences.
        rtol: Wanted ‖Ĝ − G‖_F / ‖G‖_F; sketches are made as large as that takes. Default: exact.
        memory: Bytes beyond the model, or "2GiB": stored forward passes, workspace and result.
        sketch: Kind, repeats and seed of sketches to consider, and k where rtol is not given;
            default: two-sided and low-rank ones.

    Returns:
        Plan: `print` it, `run()` it.

    Raises:
        ValueError: If a side is empty, `by` is neither, or rtol is not positive and finite.

    Cost: a forward pass, and a few times the features of 64 to 128 tokens of up to 16 sequences (by
    sequence, of these sequences as a whole).

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> examples = [lddyn.Example([1, 2], [3, 4, 5 + i]) for i in range(4)]
        >>> way = lddyn.plan(model, examples)
        >>> way
        Plan(12 x 12 token pairs: paired, of 6 ways)
        >>> way.run().value.shape
        torch.Size([12, 12])
    """
    observed = tuple(observed)
    updated = observed if updated is None else tuple(updated)
    for name, side in (("observed", observed), ("updated", updated)):
        if not side:
            raise ValueError(f"{name} must hold at least one Example, got none")
    together = by_sequence(by)
    if rtol is not None and not 0 < rtol < math.inf:
        raise ValueError(f"rtol must be positive and finite, got {rtol}")
    anatomy = Anatomy.of(model)
    budget = parse_memory(memory, anatomy.device)
    longest = max((*observed, *updated), key=lambda e: e.length)
    rates = Rates.of(Side.log_probs(anatomy.trace(longest)))
    loads = {e: Load(rates, e.length, tuple(e.positions)) for e in (*observed, *updated)}
    rows, columns = [loads[e] for e in observed], [loads[e] for e in updated]
    rate = _rate(anatomy, rates)
    task = Task(rows, columns, list(loads.values()), together, rate, budget)
    candidates = exact_candidates(task, anatomy)
    pilot = Pilot(anatomy, observed, updated, together, loads[longest].workspace, budget)
    for wanted in _sketches(sketch, together):
        candidates += sketched_candidates(task, *pilot.size(wanted, rtol))
    if together:
        # As many numbers as all parameters, for every repeat: nothing needs to be sketched.
        parameters = sum(p.numel() for p in anatomy.trainable.values())
        k = Sketch().repeats * (parameters + len(anatomy.trainable))
        layout = pilot.layout(Sketch(k=k))
        if all(part.kind == "exact" for part in layout.parts):  # packed experts are sketched
            candidates += sketched_candidates(task, layout, 0.0)[:1]
    candidates.sort(key=lambda c: c.flops)
    chosen = choose(candidates, rtol)
    return Plan(
        task.shape, tuple(candidates), chosen, budget, rtol, rate, anatomy, observed, updated, by
    )


def _sketches(sketch: Sketch | None, together: bool) -> list[Sketch]:
    """The sketches to consider; rows of whole sequences store no low-rank parts."""
    if sketch is not None:
        return [sketch]
    return [Sketch(kind) for kind in (_KINDS[:1] if together else _KINDS)]


def choose(candidates: Sequence[Candidate], rtol: float | None) -> Candidate | None:
    """The cheapest way that fits and is precise enough; in a near tie the cheapest exact one."""
    limit = 0.0 if rtol is None else rtol
    good = [c for c in candidates if c.fits and c.error <= limit]
    least = min((c.flops for c in good), default=0.0)
    exact = [c for c in good if c.error == 0 and c.flops <= _TIE * least]
    return min(exact or good, key=lambda c: (c.flops, c.disk), default=None)


def _rate(anatomy: Anatomy, rates: Rates) -> float:
    """FLOP/s of one product with the model's hidden width, measured here and now."""
    like = anatomy.head.layer.weight
    a = like.new_full((2048, rates.hidden), 0.5)  # draws none of the caller's random numbers
    b = like.new_full((rates.hidden, 4 * rates.hidden), 0.5)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        ops.product(a, b)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - began)
    return float(2.0 * a.numel() * b.shape[1] / best)
