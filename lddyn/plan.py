"""What an exact answer costs: FLOPs counted from a traced forward pass, not from a model's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lddyn.ledger import HEAD, Work
from lddyn.ntk import Side, chunk_size
from lddyn.pullback import DEFAULT_MEMORY, parse_memory, reach
from lddyn.rowwise import spread


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

    One cotangent at position p costs (p + 1)/T of a segment's linear FLOPs, and twice its attention
    FLOPs scaled by ((p + 1)/T)² (both operands of each product move); above the last attention it
    costs one row (see `rowwise`). A side that is observed and updated is pulled back once.
    """
    replay = pullback = pairing = head = 0.0
    once = {id(side): side for side in (*observed, *updated)}
    widths = {}
    for key, side in once.items():
        trace = side.trace
        last, share = trace.anatomy.segments[-2], spread(trace)
        work = {n: w for n, w in trace.work.items() if n != HEAD}
        top = work.get(last, Work())
        linear = sum(w.linear for w in work.values()) - (1 - share.flops) * top.linear
        mixing = sum(w.mixing for w in work.values()) - (top.mixing if share.flops < 1 else 0)
        rows = (1 - share.flops) * top.linear / trace.length
        width = sum(w.width for w in work.values()) - (1 - share.width) * top.width
        widths[key] = width / trace.length
        positions = trace.positions.sort().values.tolist()
        chunk = chunk_size(side, parse_memory(memory))
        for start in range(0, len(positions), chunk):
            part = positions[start : start + chunk]
            far = reach(part[-1], trace.length) / trace.length
            replay += far * linear + far**2 * mixing + len(part) * rows
            pullback += len(part) * (far * linear + 2 * far**2 * mixing + rows)
        head += 4.0 * len(side) * trace.hidden.shape[-1] * trace.logits.shape[-1]
    for one in observed:
        for other in updated:
            mean_o, mean_u = (float((x.trace.positions + 1).double().mean()) for x in (one, other))
            pushed, paired = mean_o * other.trace.length, mean_u * len(other)
            pairing += 2.0 * len(one) * widths[id(one)] * (pushed + paired)
            head += 2.0 * len(one) * len(other) * one.trace.logits.shape[-1]
    return Cost(replay, pullback, pairing, head)
