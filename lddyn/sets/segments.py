"""Predicting a run with the model, in segments with gradients of their own.

A segment takes the gradients and log π at its own start, runs on log-probs to its end
(`Simulation`), and moves θ by the sum of the steps that were simulated (`lddyn.sets.motion`):

    exact rows under Adam:  Δθ = Σ_t rate_t m̂_t / (√v̂_t + ε) − s D θ
    else:                   Δθ = P (Σ_j c_j ∇θ log π(y_j) + h m) − s D θ

D is 1 for the parameters that decay, and 0 for the others; m is what the optimizer remembered
before the run; c, h and s are the simulation's. P is 1 for SGD; for Adam it is estimated over the
segments so far, from all rows where they are exact, else from batches.

The change that is predicted is log π at the last θ minus log π at the first. So the curvature along
each straight step is in it; what is left out is that gradients change within a segment.

What pair j does to y_i+ in a segment is ⟨ḡ_i, P c_j ∇θ log π(y_j)⟩, with ḡ_i the mean of the
gradients of log π(y_i+) at both ends of the segment (the trapezoidal rule). Where rows are exact,
the estimated P is scaled to the segment's Δθ. (Adam's own P is 1/|g| in its first steps; where
gradients of rows cancel, it would tell of rounding.) Of single sequences, y+ is the sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lddyn.engine.gram import sequence_gram
from lddyn.engine.sharded import WHOLE, Shards, local
from lddyn.engine.turns import switching
from lddyn.sets.access import Access
from lddyn.sets.flat import Flat
from lddyn.sets.forecast import Forecast, Simulation, response_effects
from lddyn.sets.motion import AdamMetric, AdamMotion, GramMotion
from lddyn.sets.passes import Passes
from lddyn.sets.resumed import OptimizerState
from lddyn.sets.rows import Direction, Gram, SetReading, SetRows, new_rows, read_rows
from lddyn.sets.run import Batch, Run
from lddyn.sets.training_step import TrainingStep
from lddyn.sketches.sketch import Sketch

__all__ = ["Moments", "Prediction", "measured_batches", "predict_run"]

_COLUMNS = 1 << 18  # of gradients in one product

_FEWEST = 8  # batches from which Adam's second moment is estimated; else half of them


class Moments:
    """Adam's second moment v, the mean over the steps of the segments so far.

    Args:
        parameters: Name → trainable parameter.
        run: Settings of the run.
        shards: How the parameters are divided among processes.
        state: What the optimizer remembers of steps before the run: they count as many steps as
            Adam's mean has not forgotten, fewer with each segment.

    Attributes:
        segments: Segments so far.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        run: Run,
        shards: Shards = WHOLE,
        state: OptimizerState | None = None,
    ) -> None:
        self._sum, self._steps, self._shards = Flat(parameters), 0.0, shards
        self.segments = 0
        self._batch, self._epsilon = run.batch, run.epsilon
        self._kept = 1.0  # of what is known, by a step
        if state is not None and state.steps:
            self._kept = run.beta2
            self._sum.copy(state.second)
            self._sum.vector /= 1 - run.beta2
            self._steps = (1 - run.beta2**state.steps) / (1 - run.beta2)

    def _count(self, steps: int) -> float:
        """The weight of some more steps, after which those before count less."""
        if self._kept == 1.0:
            counted = float(steps)
        else:
            left = self._kept**steps
            self._sum.vector *= left
            self._steps *= left
            counted = (1 - left) / (1 - self._kept)
        self._steps += counted
        self.segments += 1
        return counted

    def add_exact(self, rows: Tensor, pulls: Tensor, steps: int) -> None:
        """Adds a segment whose gradients are known: v = E[g]² + Var[g]/|B| over rows.

        Args:
            rows: Gradients of all sequences (S, P).
            pulls: −∂L/∂ log π, (sides, N).
            steps: Steps of the segment.
        """
        pulls, counted = pulls.to(rows)[:, :, None], self._count(steps)
        for start in range(0, rows.shape[1], _COLUMNS):
            at = slice(start, start + _COLUMNS)
            pull = (pulls * rows[:, at].view(*pulls.shape[:2], -1)).sum(0)
            mean = pull.mean(0).square()
            variance = (pull.square().mean(0) - mean).clamp(min=0)
            self._sum.vector[at] += counted * (mean + variance / self._batch)

    def add_measured(
        self, passes: Passes, step: TrainingStep, now: Tensor, run: Run, steps: int, scratch: Flat
    ) -> None:
        """Adds a segment by the gradients of some of the run's batches: v = E ‖ḡ_B‖².

        Cost: a forward and a backward pass for each response of half of the batches of an epoch, or
        of 8 batches if that is more.
        """
        batches, counted = measured_batches(run, len(step)), self._count(steps)
        for batch in batches:
            pull = step.pull(now, batch).flatten()
            passes.sum_gradients(step.set_.of_rows(batch.pairs), pull, scratch)
            self._sum.vector.addcmul_(scratch.vector, scratch.vector, value=counted / len(batches))

    @property
    def total(self) -> float:
        """Σ v."""
        total = self._sum.vector.sum(dtype=torch.float64)
        self._shards.add_up(total)
        return float(total) / self._steps

    def precondition(self, vector: Tensor, power: float = 1.0) -> None:
        """Multiplies a vector (P,) by P = 1/(√v + ε), or a power of it, in blocks."""
        for start in range(0, len(vector), _COLUMNS):
            at = slice(start, start + _COLUMNS)
            vector[at] *= (
                (self._sum.vector[at] / self._steps).sqrt_().add_(self._epsilon).pow_(-power)
            )


def measured_batches(run: Run, pairs: int) -> list[Batch]:
    """The batches whose gradients Adam's second moment is estimated from, without rows."""
    batches = run.batches(range(pairs))[: -(-pairs // run.batch)]
    return batches[: max(_FEWEST, -(-len(batches) // 2))]


@dataclass(frozen=True)
class _Kernel:
    """What the steps of one segment need of gradients."""

    rows: SetRows  # under P where they are sketched
    gram: Gram
    adam: AdamMetric | None
    shrinks: Tensor | None  # ⟨∇θ log π, D θ⟩ (S,)
    remembered: Tensor | None  # ⟨∇θ log π, P m⟩ (S,)


@dataclass(frozen=True)
class Prediction:
    """A predicted run.

    Attributes:
        forecast: What it does.
        gram: J Jᵀ at the start.
        adam: Adam's metric at the start; None for SGD.
    """

    forecast: Forecast
    gram: Gram
    adam: AdamMetric | None


class _Segments:
    """The parts of a predicted run that need the model; sketched rows are of √P ∘ gradients."""

    def __init__(
        self,
        access: Access,
        passes: Passes,
        step: TrainingStep,
        run: Run,
        sketch: Sketch | None,
        state: OptimizerState | None,
    ) -> None:
        self.access, self.passes, self.step, self.run = access, passes, step, run
        self.sketch, self.parameters = sketch, access.named
        self.scratch = Flat(self.parameters)
        self.start = Flat(self.parameters)
        self.start.copy(self.parameters)
        decaying = run.decaying(access.model)
        self.decaying = {n: p for n, p in access.named.items() if n in decaying}
        self.first: Flat | None = None
        adam, shards = run.optimizer == "adamw", access.shards
        self.moments = Moments(self.parameters, run, shards, state) if adam else None
        self.motion: AdamMotion | GramMotion
        if adam and sketch is None:
            work = self.scratch.vector
            self.motion = AdamMotion(run, self.parameters, state, work, shards)
        elif state is None:
            self.motion = GramMotion(run)
        else:
            self.first = Flat(self.parameters)
            self.first.copy(state.first)
            square = torch.zeros(1).double()
            for moment in state.second.values():
                square += moment.sum(dtype=torch.float64).cpu()
            shards.add_up(square)
            self.motion = GramMotion(run, state.steps, float(square))

    def begin(self, rows: SetRows, now: Tensor, steps: int) -> _Kernel:
        """Begins a segment at the present weights: gradients there, paired.

        Args:
            rows: Rows of plain gradients. Exact ones are those of the present weights, sketched
                ones are filled here.
            now: log π at the present weights.
            steps: Steps of the segment.
        """
        kernel = (self._exact if self.sketch is None else self._sketched)(rows, now, steps)
        if isinstance(self.motion, AdamMotion):
            same = self.step.set_.representatives[: now.numel()]
            self.motion.begin(now.shape, rows.dense.rows[: now.numel()], same, kernel.shrinks)
        else:
            self.motion.begin(
                now.shape, kernel.gram.value, kernel.adam, kernel.shrinks, kernel.remembered
            )
        return kernel

    def _sketched(self, rows: SetRows, now: Tensor, steps: int) -> _Kernel:
        under: list[SetRows] = []
        if self.moments is not None:
            self.passes.bar.say("second moment")
            self.moments.add_measured(self.passes, self.step, now, self.run, steps, self.scratch)
            self.moments.precondition(self.scratch.vector.fill_(1.0), 0.5)
            under = [new_rows(self.access, self.passes, self.step.set_, self.sketch, self.scratch)]
        self.passes.bar.say("gradients")
        along = [Direction(self.decaying)] if self.decaying else []
        if self.first is not None:
            root = self.scratch if self.moments is not None else None
            along.append(Direction(self.first.views, root))
        reading = read_rows(self.passes, self.step.set_, [rows, *under], along=along)
        told = list(reading.along[:, : len(self.step.set_.examples)])
        shrinks = told[0] if self.decaying else None
        remembered = told[-1] if self.first is not None else None
        return self._pair(rows, [rows, *under][-1], None, shrinks, remembered)

    def _exact(self, rows: SetRows, now: Tensor, steps: int) -> _Kernel:
        shrinks = remembered = diagonal = None
        if self.decaying:
            self.scratch.vector.zero_()
            self.scratch.copy(self.decaying)
            shrinks = self._along(rows, self.scratch.vector)
        if self.moments is not None:
            fresh, pulls = not self.moments.segments, -self.step.weights_at(now)
            self.moments.add_exact(rows.dense.rows[: now.numel()], pulls, steps)
            if fresh:  # for `simulate`, at the start
                self.moments.precondition(diagonal := self.scratch.vector.fill_(1.0))
        elif self.first is not None:
            remembered = self._along(rows, self.first.vector)
        return self._pair(rows, rows, diagonal, shrinks, remembered)

    def _along(self, rows: SetRows, vector: Tensor) -> Tensor:
        """⟨∇θ log π, d⟩ of the set's sequences (S,) float64, of exact rows."""
        total = (rows.dense.rows[: len(self.step.set_.examples)] @ vector).double().cpu()
        self.access.shards.add_up(total)
        return total

    def _pair(
        self,
        rows: SetRows,
        under: SetRows,
        diagonal: Tensor | None,
        shrinks: Tensor | None,
        remembered: Tensor | None,
    ) -> _Kernel:
        """Inner products of plain rows, and of those under P."""
        gram = rows.gram(self.step.set_)
        if self.moments is None or (under is rows and diagonal is None):
            return _Kernel(rows, gram, None, shrinks, remembered)
        metric = AdamMetric(under.gram(self.step.set_, diagonal).value, self.moments.total)
        return _Kernel(under, gram, metric, shrinks, remembered)

    def move(self, rows: SetRows) -> None:
        """θ ← θ + Δθ of the segment."""
        total, motion = self.scratch.vector, self.motion
        weights = motion.net.flatten()
        if isinstance(motion, AdamMotion):
            total.copy_(motion.delta)
        else:
            if self.sketch is None:
                torch.mv(rows.dense.rows[: len(weights)].T, weights.to(total), out=total)
            else:
                self.passes.bar.say("net step")
                self.passes.sum_gradients(self.step.set_.examples, weights, self.scratch)
            if self.first is not None:
                total.add_(self.first.vector, alpha=motion.history)
            if self.moments is not None:
                self.moments.precondition(total)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                kept = 1 - motion.shrunk if name in self.decaying else 1.0
                part = local(parameter)
                part.copy_(part.to(total) * kept + self.scratch.views[name])

    def arrive(self, kernel: _Kernel, ends: SetRows) -> tuple[SetReading, Tensor]:
        """Reads the set where a segment ends.

        Args:
            kernel: That of the segment.
            ends: Rows to be filled, of all sequences or of the watched ones.

        Returns:
            log π, and ⟨ḡ_i, P g_j⟩ (N + M, S) float64 with the mean ḡ_i of the gradients of the
            watched sequences here and where the segment began, and g_j of all responses there.
        """
        scratch, exact = self.scratch.vector, self.sketch is None
        if self.moments is not None:
            self.moments.precondition(scratch.fill_(1.0), 1.0 if exact else 0.5)
        if isinstance(self.motion, AdamMotion):
            self.motion.fit(scratch, self.motion.delta.clone())
        self.passes.bar.say("gradients after a segment")
        reading = read_rows(self.passes, self.step.set_, [ends])
        there = kernel.rows.dense.rows[: self.motion.net.numel()]
        diagonal = None if self.moments is None else scratch
        inner = torch.zeros(())
        for rows in (kernel.rows, ends):
            parts = self._watched(rows)
            if exact:
                paired = [sequence_gram(part, diagonal, there) for part in parts]
                self.access.shards.add_up(*paired)
            else:
                paired = [rows.dense.layout.value(x, there).double().cpu() for x in parts]
            inner = inner + torch.cat(paired) / 2
        return reading, inner[:, self.step.set_.representatives[: len(there)]]

    def _watched(self, rows: SetRows) -> list[Tensor]:
        """The rows of the first sequences of the set, and of the observed ones."""
        n, values, set_ = len(self.step), rows.dense.rows, self.step.set_
        whole = len(values) == len(set_.sequences)
        parts = (values[:n], values[len(set_.examples) if whole else n :])
        return [part for part in parts if len(part)]

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """The weights may be moved within, and are as before afterwards, to the bit."""
        with switching(self.access.model, moves=True) as undo:
            undo.add(self._put_back)
            yield

    def _put_back(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                local(parameter).copy_(self.start.views[name])


def predict_run(
    access: Access,
    passes: Passes,
    rows: SetRows,
    step: TrainingStep,
    run: Run,
    *,
    segments: int,
    sketch: Sketch | None,
    state: OptimizerState | None = None,
    ranked: Callable[[Gram], None] = lambda gram: None,
) -> Prediction:
    """Predicts a run in segments.

    Args:
        access: The model; its weights are moved and put back.
        passes: Passes over the set.
        rows: Exact rows of plain gradients at the start, or sketched ones to be filled. They are
            overwritten; exact rows of the same size are made beside them.
        step: One small step on the set; its Gram is not used.
        run: Settings of the run.
        segments: Number of segments.
        sketch: How rows are sketched; None: they are exact.
        state: What the optimizer remembers of steps before the run; None: it is fresh.
        ranked: Gets the Gram at the start, as soon as it is known.

    Cost: exact rows: a forward and a backward pass a sequence for each segment but the last; at the
    end such a pass for the first sequence of each row, and a forward pass for the second. Sketched
    ones: for each segment three such passes (the second moment, the rows, the net step; the first
    of them over half of the set) and what exact rows need at the end.
    """
    model, n, set_ = _Segments(access, passes, step, run, sketch, state), len(step), step.set_
    before = step.readings.log_probs
    simulation = Simulation(before, step.pull, run, range(n))
    cuts = simulation.cuts(segments)
    effects, total = torch.zeros(len(set_.watched), n).double(), torch.zeros_like(before)
    first: tuple[Gram, AdamMetric | None] | None = None
    observed = step.readings.observed
    spare = rows.empty(rows.numbers) if sketch is None else None
    with model.moving():
        for since, after in pairwise(cuts):
            kernel = model.begin(rows, simulation.now, after - since)
            if first is None:
                ranked(kernel.gram)
                first = kernel.gram, kernel.adam
            simulation.advance(after - since, model.motion)
            total = total + model.motion.net
            model.move(rows)
            if spare is None:
                ends = kernel.rows.empty(set_.watched)
            else:
                ends = spare.first(set_.watched) if after == simulation.steps else spare
            reading, inner = model.arrive(kernel, ends)
            simulation.now = simulation.path[-1] = reading.log_probs
            observed = reading.observed
            effects += response_effects(inner, model.motion.net)
            if spare is not None:
                rows, spare = spare, rows
    assert first is not None
    change = simulation.now - before
    forecast = Forecast(
        run.without_state(),
        torch.stack(simulation.path),
        total,
        change,
        effects[:n],
        len(cuts) - 1,
        change[0] - effects[:n].sum(1),
        observed - step.readings.observed if set_.observed else None,
        effects[n:] if set_.observed else None,
    )
    return Prediction(forecast, *first)
