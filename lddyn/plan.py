"""What an exact answer costs: FLOPs counted from a traced forward pass, not from a model's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lddyn.ledger import HEAD
from lddyn.ntk import CHUNK, Side


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


def gram_cost(observed: Sequence[Side], updated: Sequence[Side], chunk: int = CHUNK) -> Cost:
    """FLOPs of `token_gram` for sides whose rows are cotangents on every response token.

    One cotangent at position p costs (p + 1)/T of the segment's linear FLOPs, and twice its
    attention FLOPs scaled by ((p + 1)/T)² (both operands of each product move). A
    side that is observed and updated is pulled back once.
    """
    replay = pullback = pairing = head = 0.0
    once = {id(side): side for side in (*observed, *updated)}
    for side in once.values():
        trace = side.trace
        reach = [(int(p) + 1) / trace.length for p in trace.positions.sort().values]
        linear = sum(w.linear for n, w in trace.work.items() if n != HEAD)
        mixing = sum(w.mixing for n, w in trace.work.items() if n != HEAD)
        for start in range(0, len(reach), chunk):
            part = reach[start : start + chunk]
            top = part[-1]
            replay += top * linear + top**2 * mixing
            pullback += len(part) * (top * linear + 2 * top**2 * mixing)
        head += 4.0 * len(side) * trace.hidden.shape[-1] * trace.logits.shape[-1]
    for one in observed:
        for other in updated:
            widths = {n: w.width / one.trace.length for n, w in one.trace.work.items() if n != HEAD}
            total = sum(widths.values())
            mean = float((one.trace.positions + 1).double().mean())
            far = other.trace.length
            pairing += 2.0 * len(one) * total * far * (mean + len(other))
            head += 2.0 * len(one) * len(other) * one.trace.logits.shape[-1]
    return Cost(replay, pullback, pairing, head)
