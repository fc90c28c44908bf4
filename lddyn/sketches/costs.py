"""FLOPs and bytes of every way to a table of token pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lddyn.engine.gram import Side, chunk_size
from lddyn.engine.ledger import HEAD, Work
from lddyn.engine.pullback import reach
from lddyn.engine.rowwise import spread
from lddyn.memory import DEFAULT_MEMORY, parse_memory
from lddyn.sketches.layout import Layout


@dataclass(frozen=True)
class Rates:
    """What a model's products cost: FLOPs and elements, per token of one forward pass.

    linear: products with weights. mixing: attention, per token squared. row: what one cotangent
    costs above the last attention. width: outputs of products with weights; widest: of the widest
    segment. workspace: bytes of a cotangent. trace: elements that a stored forward pass keeps.
    hidden, vocabulary: of the head.
    """

    linear: float
    mixing: float
    row: float
    width: float
    widest: float
    workspace: float
    trace: float
    hidden: int
    vocabulary: int
    element: int  # bytes
    device: torch.device

    @classmethod
    def of(cls, side: Side) -> Rates:
        """From a trace. Cost: see `rowwise.spread`."""
        trace, length = side.trace, side.trace.length
        last, share = trace.anatomy.segments[-2], spread(trace)
        work = {n: w for n, w in trace.work.items() if n != HEAD}
        top = work.get(last, Work())
        linear = sum(w.linear for w in work.values()) - (1 - share.flops) * top.linear
        mixing = sum(w.mixing for w in work.values()) - (top.mixing if share.flops < 1 else 0)
        width = sum(w.width for w in work.values()) - (1 - share.width) * top.width
        return cls(
            linear / length,
            mixing / length**2,
            (1 - share.flops) * top.linear / length,
            width / length,
            max((w.width for w in trace.work.values()), default=0) / length,
            side.bytes_per_cotangent() / length,
            sum(x.numel() for x in trace.inputs) / length,
            trace.hidden.shape[-1],
            trace.logits.shape[-1],
            trace.logits.element_size(),
            trace.hidden.device,
        )


@dataclass(frozen=True)
class Load:
    """A sequence of T tokens with a cotangent on each of some positions, in ascending order."""

    rates: Rates
    length: int
    positions: tuple[int, ...]

    @classmethod
    def of(cls, side: Side) -> Load:
        """The load of a traced side."""
        positions = side.trace.positions.sort().values.tolist()
        return cls(Rates.of(side), side.trace.length, tuple(positions))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def reached(self) -> float:
        """Mean number of tokens that a cotangent reaches, p + 1."""
        return sum(self.positions) / len(self.positions) + 1

    @property
    def workspace(self) -> int:
        """Bytes of one cotangent that is pulled back."""
        return math.ceil(self.rates.workspace * self.length)

    @property
    def kept(self) -> int:
        """Bytes of the stored forward pass, logits of the response tokens among them."""
        rates = self.rates
        head = len(self) * (rates.hidden + rates.vocabulary)
        return int((rates.trace * self.length + head) * rates.element)

    def pulled(self, budget: int) -> tuple[float, float]:
        """FLOPs of (replays, pulling back) all cotangents in the engine's chunks.

        One cotangent at position p costs (p + 1)/T of a segment's linear FLOPs, and twice its
        attention FLOPs scaled by ((p + 1)/T)² (both operands of each product move); above the last
        attention it costs one row (see `rowwise`).
        """
        rates, far = self.rates, reach(self.positions[-1], self.length)
        chunk = chunk_size(far, self.workspace, budget, rates.device)  # as `Side.chunk`
        replay = pullback = 0.0
        for start in range(0, len(self), chunk):
            part = self.positions[start : start + chunk]
            far = reach(part[-1], self.length)
            replay += far * rates.linear + far**2 * rates.mixing + len(part) * rates.row
            pullback += len(part) * (far * rates.linear + 2 * far**2 * rates.mixing + rates.row)
        return replay, pullback

    def passed(self) -> tuple[float, float]:
        """FLOPs of (a forward, a backward) pass for the sum of all cotangents."""
        far, rates = self.positions[-1] + 1, self.rates
        linear, mixing = far * (rates.linear + rates.row), far**2 * rates.mixing
        return linear + mixing + self.head / 2, linear + 2 * mixing + self.head / 2

    @property
    def head(self) -> float:
        """FLOPs of the cotangents through the head."""
        return 4.0 * len(self) * self.rates.hidden * self.rates.vocabulary


@dataclass
class Cost:
    """FLOPs of an M x L influence table, by part.

    replay: forward passes of the segments, one per chunk of cotangents.
    pullback: the cotangents through the products; causal, on prefixes.
    pairing: pushing the factors of one side and contracting with the other's.
    head: the cotangents through the head, and the head's own part of the kernel.
    """

    replay: float
    pullback: float
    pairing: float
    head: float

    @property
    def flops(self) -> float:
        """All of it."""
        return self.replay + self.pullback + self.pairing + self.head

    def explain(self) -> str:
        """The parts as text, in GFLOP."""
        parts = ("replay", "pullback", "pairing", "head")
        shares = ", ".join(f"{p} {getattr(self, p) / 1e9:.3g}" for p in parts)
        return f"{self.flops / 1e9:.4g} GFLOP ({shares})"


def gram_cost(
    observed: Sequence[Side], updated: Sequence[Side], memory: int | str = DEFAULT_MEMORY
) -> Cost:
    """FLOPs of `token_gram` for sides whose rows are cotangents on every response token.

    A side that is observed and updated is pulled back once.
    """
    loads = {id(side): Load.of(side) for side in (*observed, *updated)}
    budget = parse_memory(memory, updated[0].trace.hidden.device)
    return paired_cost(
        [loads[id(s)] for s in observed],
        [loads[id(s)] for s in updated],
        list(loads.values()),
        budget,
    )


def paired_cost(
    observed: Sequence[Load], updated: Sequence[Load], distinct: Sequence[Load], budget: int
) -> Cost:
    """Cost of pulling both sides back and pairing their factors."""
    pulled = [load.pulled(budget) for load in distinct]
    widths = sum(len(o) * o.rates.width * o.reached for o in observed)
    rows = sum(len(o) * o.rates.width for o in observed)
    pairing = 2.0 * widths * sum(u.length for u in updated)
    pairing += 2.0 * rows * sum(u.reached * len(u) for u in updated)
    m, n = sum(map(len, observed)), sum(map(len, updated))
    head = sum(load.head for load in distinct) + 2.0 * m * n * observed[0].rates.vocabulary
    return Cost(sum(r for r, _ in pulled), sum(p for _, p in pulled), pairing, head)


def pushed_cost(observed: Sequence[Load], updated: Sequence[Load], budget: int) -> Cost:
    """Every updated row pulled back, and pushed through every observed sequence."""
    pulled = [load.pulled(budget) for load in updated]
    rows, pairing = sum(map(len, updated)), 0.0
    through = sum(o.length * o.rates.linear + 2 * o.length**2 * o.rates.mixing for o in observed)
    length = sum(o.length for o in observed)
    for u in updated:
        pairing += len(u) * (2.0 * u.reached * u.rates.width) * length
    head = sum(u.head for u in updated) + rows * sum(o.head / 2 for o in observed)
    return Cost(
        sum(r for r, _ in pulled), sum(p for _, p in pulled) + rows * through, pairing, head
    )


def sketched_cost(
    loads: Sequence[Load], layout: Layout, pairs: int, budget: int
) -> tuple[Cost, int]:
    """Every row pulled back and sketched, and all pairs compared: FLOPs, and bytes of all rows."""
    pulled = [load.pulled(budget) for load in loads]
    fixed = per_token = 0.0  # FLOPs of a row
    repeats, sketch = layout.sketch.repeats, layout.sketch
    for part in layout.parts:
        (left, right), (rows, columns) = part.sizes, part.shape
        if part.kind not in ("sketch", "minus", "onehot"):
            fixed += 2.0 * left * right * repeats
        elif sketch.kind in ("twosided", "lowrank"):
            per_token += 2.0 * repeats * left * (rows + right)
        elif sketch.kind == "tensorsketch":
            per_token += 2.0 * repeats * (rows + columns + 3 * left * math.log2(left + 1))
        else:
            per_token += 2.0 * rows * columns
            fixed += (2.0 * left if sketch.kind != "sjlt" else 2.0) * repeats * rows * columns
    count = sum(map(len, loads))
    work = sum(len(load) * load.reached for load in loads) * per_token + count * fixed
    width = layout.width
    cost = Cost(
        sum(r for r, _ in pulled),
        sum(p for _, p in pulled),
        work + 2.0 * pairs * width,
        sum(load.head / 2 for load in loads),
    )
    return cost, count * width * loads[0].rates.element


def summed_cost(loads: Sequence[Load], layout: Layout, pairs: int) -> Cost:
    """Every sequence's forward and backward pass, its sums sketched or formed, all compared."""
    repeats, kind = layout.sketch.repeats, layout.sketch.kind
    work = 0.0
    for part in layout.parts:
        (left, right), (rows, columns) = part.sizes, part.shape
        for load in loads:
            tokens = len(load) if part.kind == "summed" else load.positions[-1] + 1
            if part.kind == "vector" or columns == 1:
                work += 2.0 * repeats * left * rows
            elif part.kind in ("summed", "onehot"):
                hashed = rows if part.kind == "summed" else right
                work += 2.0 * repeats * tokens * (hashed + right * columns + left * right)
            elif part.kind == "sketch" and kind in ("twosided", "lowrank"):
                sides = left * rows + right * columns + left * right
                work += 2.0 * repeats * tokens * sides
            elif part.kind == "sketch" and kind == "tensorsketch":
                transforms = 3 * left * math.log2(left + 1)
                work += 2.0 * repeats * tokens * (rows + columns + transforms)
            else:
                work += 2.0 * tokens * rows * columns
                if part.kind == "sketch":
                    work += (2.0 * left if kind != "sjlt" else 2.0) * repeats * rows * columns
    passes = [load.passed() for load in loads]
    return Cost(
        sum(f for f, _ in passes), sum(b for _, b in passes), work + 2.0 * pairs * layout.width, 0.0
    )
