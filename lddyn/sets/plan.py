"""What a diagnosis will take, said before it begins: passes, epochs of training, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lddyn.memory import in_gib
from lddyn.sets.access import Access
from lddyn.sets.close_ups import CLOSE_UP, LBK
from lddyn.sets.passes import BACKWARD, FORWARD
from lddyn.sets.rows import SURVEY, exact_bytes
from lddyn.sets.run import Run
from lddyn.sets.segments import measured_batches
from lddyn.sets.training_set import TrainingSet
from lddyn.sketches.sketch import Sketch

__all__ = ["SetPlan", "parse_budget", "plan_within"]


def parse_budget(budget: float | str | None) -> float | None:
    """A budget in epochs: 2, "2" or "2x".

    Raises:
        ValueError: If it is no positive number.
    """
    if budget is None:
        return None
    try:
        epochs = float(budget.removesuffix("x") if isinstance(budget, str) else budget)
    except (TypeError, ValueError):
        epochs = math.nan
    if not 0 < epochs < math.inf:
        raise ValueError(f"budget must be a number of epochs such as 2x, got {budget!r}")
    return epochs


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
        refresh, close_ups, lbk: As of `diagnose`, after what a budget leaves out.
        left_out: What a budget leaves out, in words.
    """

    parts: dict[str, int]
    epoch: int
    rows: int
    vectors: int
    exact: bool
    error: float
    refresh: int
    close_ups: int
    lbk: bool
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        set_: TrainingSet,
        access: Access,
        sketch: Sketch | None,
        run: Run | None,
        refresh: int,
        close_ups: int,
        lbk: bool,
    ) -> SetPlan:
        """The plan of a diagnosis; arguments as of `diagnose`."""
        n, size, observed = len(set_), access.size, len(set_.observed)
        sequences = len(set_.examples)
        parts, segments = {"gradients": BACKWARD * (sequences + observed)}, 1
        if run is not None:
            segments = min(refresh, len(run.batches(range(n))))
            # The watched responses; the others are only read.
            end = BACKWARD * (n + observed) + FORWARD * (sequences - n)
            parts["gradients"] *= segments
            if sketch is None:
                parts["gradients after the run"] = end
            else:
                parts["log-probs"] = FORWARD * (sequences + observed)
                parts["gradients after each segment"] = end * segments
                moments = set_.sides * run.batch * len(measured_batches(run, n))
                if run.optimizer == "adamw":
                    parts["second moment"] = BACKWARD * segments * min(moments, sequences)
                parts["net step"] = BACKWARD * segments * sequences
        if sketch is not None:
            surveys = 1 + (segments if run is not None and run.optimizer == "adamw" else 0)
            parts["where gradients are large"] = BACKWARD * min(SURVEY, sequences) * surveys
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
            refresh,
            close_ups,
            lbk,
        )

    @property
    def work(self) -> int:
        """Forward passes of one sequence in all."""
        return sum(self.parts.values())

    @property
    def epochs(self) -> float:
        """The work in epochs of the training that is explained."""
        return self.work / self.epoch

    def explain(self) -> str:
        """The plan in a few sentences."""
        parts = ", ".join(f"{name} {work / self.epoch:.1f}" for name, work in self.parts.items())
        how = (
            "inner products are exact"
            if self.exact
            else f"inner products are estimated, ±{self.error:.1%} of √(K_ii K_jj)"
        )
        return (
            f"{self.epochs:.1f} epochs of the training that is explained ({parts}); "
            f"{how}; {in_gib(self.rows + self.vectors)} beyond the model"
            + "".join(f"; left out for the budget: {what}" for what in self.left_out)
        )


def plan_within(
    budget: float | None,
    made: Callable[[int, int, bool], SetPlan],
    refresh: int,
    close_ups: int,
    lbk: bool,
) -> SetPlan:
    """The plan of a diagnosis that takes at most so many epochs of training.

    LBK of all pairs is left out first, then close-ups one by one, then segments of the run.

    Args:
        budget: Epochs; None: no limit.
        made: (refresh, close_ups, lbk) -> the plan of it.
        refresh: As of `diagnose`.
        close_ups: As of `diagnose`.
        lbk: As of `diagnose`.

    Raises:
        ValueError: If what cannot be left out takes longer.
    """
    whole = plan = made(refresh, close_ups, lbk)
    less = [
        (refresh, close_ups, False),
        *((refresh, count, False) for count in reversed(range(close_ups))),
        *((count, 0, False) for count in reversed(range(1, refresh))),
    ]
    while budget is not None and plan.epochs > budget:
        if not less:
            raise ValueError(
                f"budget {budget:g} is too small: {', '.join(plan.parts)} alone take "
                f"{plan.epochs:.1f} epochs of training; read fewer pairs (--limit), train an "
                "adapter (--adapter), or predict no run"
            )
        plan = made(*less.pop(0))
    return replace(plan, left_out=_differences(whole, plan))


def _differences(whole: SetPlan, plan: SetPlan) -> tuple[str, ...]:
    """What a plan leaves out of another."""
    left_out = []
    if whole.lbk and not plan.lbk:
        left_out.append("LBK of all pairs")
    if plan.close_ups < whole.close_ups:
        left_out.append(f"the tokens of {whole.close_ups - plan.close_ups} of {whole.close_ups}")
    if plan.refresh < whole.refresh:
        left_out.append(f"{whole.refresh - plan.refresh} of {whole.refresh} segments of the run")
    return tuple(left_out)
