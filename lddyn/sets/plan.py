"""What a diagnosis will take, said before it begins: passes, epochs of training, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lddyn.memory import in_gib
from lddyn.sets.access import Access
from lddyn.sets.close_ups import CLOSE_UP, LBK
from lddyn.sets.pairs import PairSet
from lddyn.sets.passes import BACKWARD, FORWARD
from lddyn.sets.rows import exact_bytes
from lddyn.sets.run import Run
from lddyn.sets.segments import measured_batches
from lddyn.sketches.sketch import Sketch

__all__ = ["SetPlan"]


@dataclass(frozen=True)
class SetPlan:
    """The parts of a diagnosis and what they cost.

    Attributes:
        parts: Name of a part → its work, in forward passes of one sequence.
        epoch: Work of one epoch of the training that is explained, in the same unit: a forward and
            a backward pass a sequence, and a forward pass of the reference.
        rows: Bytes of the rows of all sequences.
        vectors: Bytes of vectors of all trainable values.
        exact: Whether inner products are exact.
        error: Standard error of a sketched inner product, in parts of √(K_ii K_jj); 0 if exact.
    """

    parts: dict[str, int]
    epoch: int
    rows: int
    vectors: int
    exact: bool
    error: float

    @classmethod
    def of(
        cls,
        pairs: PairSet,
        access: Access,
        sketch: Sketch | None,
        run: Run | None,
        refresh: int,
        close_ups: int,
        lbk: bool,
    ) -> SetPlan:
        """The plan of a diagnosis; arguments as of `diagnose`."""
        n, size, observed = len(pairs), access.size, len(pairs.observed)
        sequences = 2 * n
        parts = {"gradients": BACKWARD * (sequences + observed)}
        if run is not None:
            segments = min(refresh, len(run.batches(range(n))))
            # The chosen and the observed responses; the rejected ones are only read.
            end = BACKWARD * (n + observed) + FORWARD * n
            parts["gradients"] *= segments
            if sketch is None:
                parts["gradients after the run"] = end
            else:
                parts["log-probs"] = FORWARD * (sequences + observed)
                parts["gradients after each segment"] = end * segments
                moments = 2 * run.batch * len(measured_batches(run, n))
                if run.optimizer == "adamw":
                    parts["second moment"] = BACKWARD * segments * min(moments, sequences)
                parts["net step"] = BACKWARD * segments * sequences
        if lbk:
            parts["LBK"] = LBK * n
        if close_ups:
            if sketch is not None:
                parts["mean gradient"] = BACKWARD * n
            parts["tokens"] = CLOSE_UP * min(n, 2 * close_ups)
        if sketch is None:
            rows = exact_bytes(sequences + observed, size, 4, run is not None)
        else:  # plain rows, those under P, and those of the chosen after a segment
            kept = 2 if run is not None and run.optimizer == "adamw" else 1
            later = 0 if run is None else n + observed
            rows = 4 * sketch.k * ((sequences + observed) * kept + later)
        vectors = (0 if run is None else 3) + bool(close_ups)
        return cls(
            parts,
            (BACKWARD + FORWARD) * sequences,
            rows,
            4 * vectors * size,
            sketch is None,
            0.0 if sketch is None else 1 / math.sqrt(sketch.k),
        )

    @property
    def work(self) -> int:
        """Forward passes of one sequence in all."""
        return sum(self.parts.values())

    def explain(self) -> str:
        """The plan in a few sentences."""
        parts = ", ".join(f"{name} {work / self.epoch:.1f}" for name, work in self.parts.items())
        how = (
            "inner products are exact"
            if self.exact
            else f"inner products are estimated, ±{self.error:.1%} of √(K_ii K_jj)"
        )
        return (
            f"{self.work / self.epoch:.1f} epochs of the training that is explained ({parts}); "
            f"{how}; {in_gib(self.rows + self.vectors)} beyond the model"
        )
