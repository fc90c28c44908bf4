"""FLOPs and bytes of each way to compute an influence table, counted from a traced forward pass."""

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
    """FLOPs, elements and bytes of a model for one token of a forward pass.

    Attributes:
        linear: FLOPs of products with weights, up to the last attention.
        mixing: FLOPs of attention, divided by the squared number of tokens.
        row: FLOPs of the products above the last attention, where a cotangent stays in one row.
        width: Elements of the outputs of products with weights.
        widest: Elements of these outputs in the segment that has most.
        workspace: Bytes of one cotangent that is pulled back.
        trace: Elements of a stored forward pass.
        hidden: Width of the head's input.
        vocabulary: Width of the head's output.
        element: Bytes of a number.
        device: Where the model is.
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
    element: int
    device: torch.device

    @classmethod
    def of(cls, side: Side) -> Rates:
        """The rates of the model, measured on a traced sequence. Cost: as `rowwise.spread`."""
        trace, length = side.trace, side.trace.length
        last, share = trace.anatomy.segments[-2:][0], spread(trace)
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
    """A sequence with a cotangent on each of its counted tokens.

    Attributes:
        rates: Rates of the model.
        length: Number of tokens T.
        positions: Positions of the cotangents in ascending order.
    """

    rates: Rates
    length: int
    positions: tuple[int, ...]

    @classmethod
    def of(cls, side: Side) -> Load:
        """The load of a traced side."""
        positions = side.trace.positions.sort().values.tolist()
        return cls(Rates.of(side), side.trace.length, tuple(positions))

    def __len__(self) -> int:
        """Number of cotangents."""
        return len(self.positions)

    @property
    def reached(self) -> float:
        """Mean over cotangents of the tokens that they reach: p + 1 at position p."""
        return sum(self.positions) / len(self.positions) + 1

    @property
    def workspace(self) -> int:
        """Bytes of the workspace of one cotangent that is pulled back."""
        return math.ceil(self.rates.workspace * self.length)

    @property
    def kept(self) -> int:
        """Bytes of the stored forward pass, with the logits of the response tokens."""
        rates = self.rates
        head = len(self) * (rates.hidden + rates.vocabulary)
        return int((rates.trace * self.length + head) * rates.element)

    def pulled(self, budget: int) -> tuple[float, float]:
        """FLOPs of replaying the segments, and of pulling all cotangents back.

        Cotangents are pulled back in chunks, as in the engine. A cotangent at position p takes
        (p + 1)/T of a segment's linear FLOPs. It takes ((p + 1)/T)² of twice the attention FLOPs,
        because both operands of each of these products have a gradient. Above the last attention it
        takes the FLOPs of one row (see `rowwise`).

        Args:
            budget: Bytes of memory; they decide the size of a chunk.
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
        """FLOPs of one forward pass, and of one backward pass of the sum of all cotangents."""
        far, rates = self.positions[-1] + 1, self.rates
        linear, mixing = far * (rates.linear + rates.row), far**2 * rates.mixing
        return linear + mixing + self.head / 2, linear + 2 * mixing + self.head / 2

    @property
    def head(self) -> float:
        """FLOPs of pulling the cotangents through the head."""
        return 4.0 * len(self) * self.rates.hidden * self.rates.vocabulary


@dataclass
class Cost:
    """FLOPs of an M x L influence table, by part.

    Attributes:
        replay: Forward passes of the segments, one for each chunk of cotangents.
        pullback: Pulling the cotangents through the products, each over its causal prefix.
        pairing: Inner products of the factors of the two sides.
        head: Pulling the cotangents through the head, and the head's own part of the kernel.
    """

    replay: float
    pullback: float
    pairing: float
    head: float

    @property
    def flops(self) -> float:
        """The sum of all parts."""
        return self.replay + self.pullback + self.pairing + self.head

    def explain(self) -> str:
        """The sum and the parts as text, in GFLOP."""
        parts = ("replay", "pullback", "pairing", "head")
        listed = ", ".join(f"{part} {getattr(self, part) / 1e9:.3g}" for part in parts)
        return f"{self.flops / 1e9:.4g} GFLOP ({listed})"


def gram_cost(
    observed: Sequence[Side], updated: Sequence[Side], memory: int | str = DEFAULT_MEMORY
) -> Cost:
    """FLOPs of `token_gram` with a cotangent on every response token of all sides.

    A side that is both observed and updated is pulled back only once.
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
    """Cost of pulling both sides back and taking inner products of their factors.

    Args:
        observed: Loads of the observed sequences.
        updated: Loads of the updated sequences.
        distinct: Loads of all sequences, each once.
        budget: Bytes of memory.
    """
    pulled = [load.pulled(budget) for load in distinct]
    widths = sum(len(o) * o.rates.width * o.reached for o in observed)
    rows = sum(len(o) * o.rates.width for o in observed)
    pairing = 2.0 * widths * sum(u.length for u in updated)
    pairing += 2.0 * rows * sum(u.reached * len(u) for u in updated)
    m, n = sum(map(len, observed)), sum(map(len, updated))
    head = sum(load.head for load in distinct) + 2.0 * m * n * observed[0].rates.vocabulary
    return Cost(sum(r for r, _ in pulled), sum(p for _, p in pulled), pairing, head)


def pushed_cost(observed: Sequence[Load], updated: Sequence[Load], budget: int) -> Cost:
    """Cost of pulling every updated row back and pushing it through every observed sequence."""
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
    """Cost of token rows (each pulled back, sketched, compared in pairs), and bytes of all rows.

    Args:
        loads: The sequences.
        layout: Layout of a row.
        pairs: Number of inner products of two rows.
        budget: Bytes of memory.
    """
    pulled = [load.pulled(budget) for load in loads]
    fixed = per_token = 0.0  # FLOPs to sketch one row: of any length, and for each token
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
    """Cost of rows of whole sequences: one forward and backward pass each, sketched, compared."""
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
