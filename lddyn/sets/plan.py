"""What a diagnosis will take, said before it begins: passes, epochs of training, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lddyn.memory import Budget, in_gib
from lddyn.sets.close_ups import CLOSE_UP, LBK
from lddyn.sets.passes import BACKWARD, FORWARD
from lddyn.sets.rows import SURVEY, exact_bytes
from lddyn.sets.run import Run
from lddyn.sets.segments import measured_batches
from lddyn.sets.training_set import TrainingSet
from lddyn.sketches.sketch import Sketch
from lddyn.text import seconds_text

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


def vector_bytes(
    size: int, number: int, run: Run | None, exact: bool, close_ups: int, lbk: bool
) -> int:
    """Bytes of vectors of all trainable values that a diagnosis holds at a time.

    Args:
        size: Number of trainable values.
        number: Bytes of one.
        run: A predicted run: the weights at its start and a scratch vector; of Adam a second
            moment, and where rows are exact, what `AdamMotion` keeps; what an optimizer remembers.
        exact: Whether rows are exact.
        close_ups: Number of close-ups: the mean gradient, those of a pair's two responses, and
            the parts of which one of them is made.
        lbk: Whether LBK of all pairs is computed: a gradient, and its parts.
    """
    running = 0
    if run is not None:
        running, adam = 2, run.optimizer == "adamw"
        running += 5 if adam and exact else 1 if adam else 0
        if run.optimizer_state is not None:  # its first moment, and what that moves
            running += 2 if adam and exact else 1
    looking = 4 if close_ups else 2 if lbk else 0
    # A run's vectors are given up before the close-ups, but the mean is beside them.
    together = max(running + bool(close_ups), looking)
    return together * size * number


@dataclass(frozen=True)
class SetPlan:
    """The parts of a diagnosis and what they cost.

    Attributes:
        parts: Name of a part → its work, in forward passes of one sequence.
        epoch: Work of one epoch of the training that is explained, in the same unit: a forward and
            a backward pass a sequence, and a forward pass of the reference.
        rows: Bytes of the rows of all sequences.
        vectors: Bytes of vectors of all trainable values.
        batch: Bytes of the graphs of one batch, and of the largest parameter's gradient; 0 until
            the model was looked at.
        exact: Whether inner products are exact.
        error: Standard error of a sketched inner product, in parts of √(K_ii K_jj); 0 if exact.
        refresh, close_ups, lbk: As of `diagnose`, after what a budget leaves out.
        left_out: What a budget leaves out, in words.
        processes: Number of processes that divide the work; memory is that of each.
        seconds: How long the work takes at the model's own speed, by a forward pass that was timed;
            small models take up to three times as long. None: not measured.
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
    batch: int = 0
    processes: int = 1
    seconds: float | None = None

    @classmethod
    def of(
        cls,
        set_: TrainingSet,
        size: int,
        number: int,
        sketch: Sketch | None,
        run: Run | None,
        refresh: int,
        close_ups: int,
        lbk: bool,
        processes: int = 1,
    ) -> SetPlan:
        """The plan of a diagnosis.

        Args:
            set_: The set.
            size: Number of trainable values in this process.
            number: Bytes of one.
            sketch: As of `diagnose`.
            run: As of `diagnose`.
            refresh: As of `diagnose`.
            close_ups: As of `diagnose`.
            lbk: As of `diagnose`.
            processes: That divide the passes.
        """
        n, observed = len(set_), len(set_.observed)
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
        vectors = vector_bytes(size, number, run, sketch is None, close_ups, lbk)
        return cls(
            parts,
            (BACKWARD + FORWARD) * sequences,
            rows,
            vectors,
            sketch is None,
            0.0 if sketch is None else 1 / math.sqrt(sketch.k),
            refresh,
            close_ups,
            lbk,
            processes=processes,
        )

    @property
    def work(self) -> int:
        """Forward passes of one sequence in all."""
        return sum(self.parts.values())

    @property
    def memory(self) -> int:
        """Bytes beyond the model."""
        return self.rows + self.vectors + self.batch

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
        divided = ""
        if self.processes > 1:
            alone = self.epochs / self.processes
            divided = f", the time of {alone:.2g} on one, divided among {self.processes} processes"
        time = "" if self.seconds is None else f"{seconds_text(self.seconds)} or more: "
        return (
            f"{time}{self.epochs:.1f} epochs of the training that is explained ({parts}){divided}; "
            f"{how}; {in_gib(self.memory)} beyond the model"
            + (" in each process" if self.processes > 1 else "")
            + "".join(f"; left out for the budget: {what}" for what in self.left_out)
        )


def plan_within(
    budget: float | None,
    made: Callable[[int, int, bool], SetPlan],
    refresh: int,
    close_ups: int,
    lbk: bool,
    memory: Budget | None = None,
) -> SetPlan:
    """The plan of a diagnosis that takes at most so many epochs of training, and so much memory.

    LBK of all pairs is left out first, then close-ups one by one, then segments of the run. Memory
    does not depend on the number of close-ups, nor on that of segments.

    Args:
        budget: Epochs; None: no limit.
        made: (refresh, close_ups, lbk) -> the plan of it.
        refresh: As of `diagnose`.
        close_ups: As of `diagnose`.
        lbk: As of `diagnose`.
        memory: `memory=`; None: no limit.

    Raises:
        ValueError: If what cannot be left out takes longer.
        MemoryBudgetError: If what cannot be left out takes more memory.
    """
    whole = smaller = plan = made(refresh, close_ups, lbk)
    less = [
        (refresh, close_ups, False),
        *((refresh, count, False) for count in reversed(range(close_ups))),
        *((count, 0, False) for count in reversed(range(1, refresh))),
    ]
    if memory is not None:
        options = [(refresh, close_ups, lbk), (refresh, 0, lbk), (refresh, 0, False)]
        fits = [o for o in options if memory.holds(made(*o).rows + made(*o).vectors)]
        refresh, close_ups, lbk = fits[0] if fits else options[-1]
        smaller = plan = made(refresh, close_ups, lbk)
        memory.require(
            plan.rows + plan.vectors,
            "the prediction of a run" if plan.vectors else "a row of each sequence",
            "train an adapter (--adapter), predict no run, or lower k of the sketch",
        )
        less = [o for o in less if o[1] <= close_ups and o[2] <= lbk]
    while budget is not None and plan.epochs > budget:
        if not less:
            raise ValueError(
                f"budget {budget:g} is too small: {', '.join(plan.parts)} alone take "
                f"{plan.epochs:.1f} epochs of training; read fewer pairs (--limit), train an "
                "adapter (--adapter), or predict no run"
            )
        plan = made(*less.pop(0))
    for_memory = tuple(f"{what} (memory)" for what in _differences(whole, smaller))
    return replace(plan, left_out=(*for_memory, *_differences(smaller, plan)))


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
