"""A whole run of preference training, predicted without making it.

If gradients stayed constant, a run could be simulated on the log-probs of the set alone: any loss,
rate, clipping and choice of rows is a loop over vectors of as many numbers (`Simulation`), in which
a `Motion` says how a step moves log π.

Gradients do change. So `lddyn.sets.segments` divides a run into segments, computes the net step Δθ
of each, and takes gradients and log-probs anew at θ + Δθ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lddyn.results import Result, load_result, save_result
from lddyn.sets.motion import AdamMetric, GramMotion, Motion
from lddyn.sets.run import Batch, Run

__all__ = [
    "Forecast",
    "Simulation",
    "least_falls",
    "response_effects",
    "simulate",
]


@dataclass(frozen=True, repr=False)
class Forecast(Result):
    """Predicted changes of log π by a run.

    Attributes:
        run: Settings of the run.
        path: log π after every step, linear in θ within a segment, (steps + 1, 2, N) nats.
        coefficients: (2, N): Δθ of a segment is about P Σ_j coefficients_j ∇ log π(y_j); summed
            over the segments.
        change: Δ log π of y+ and y− by the run, (2, N) nats.
        effects: (N, N) nats: the part of Δ log π(y_i+) that pair j causes; rows and `left_over` sum
            to `change[0]`.
        segments: Segments of the run: at the start of each, gradients are those of its own weights,
            and `change` is evaluated at the weights after the last one. 0: `simulate`, linear in
            log π from the start of the run to its end.
        left_over: (N,) nats: the part of `change[0]` that belongs to no pair: what gradients at the
            ends of the segments do not explain. None: nothing.
        observed: Δ log π of the observed sequences by the run, (M,) nats; None: there are none.
        observed_effects: (M, N) nats: the part of `observed` that each pair causes.
    """

    run: Run
    path: Tensor
    coefficients: Tensor
    change: Tensor
    effects: Tensor
    segments: int = 0
    left_over: Tensor | None = None
    observed: Tensor | None = None
    observed_effects: Tensor | None = None

    @property
    def contribution(self) -> Tensor:
        """Part of the mean Δ log π(y+) of all pairs that each pair causes, (N,) nats."""
        return self.effects.mean(0)

    def weighted(self, pair_weights: Tensor) -> Tensor:
        """Predicted Δ log π(y+) (N,) in nats with these pair weights (N,); 0 leaves a pair out.

        Linear in the pair weights, but capped so that no log π ends above 0. What is left over goes
        with the mean weight.
        """
        weights = pair_weights.to(self.effects)
        change = self.effects @ weights
        if self.left_over is not None:
            change = change + weights.mean() * self.left_over
        return change.minimum(-self.path[0, 0])

    def summary(self) -> dict[str, Any]:
        """The run's settings, mean Δ log π of y+ and y− in nats, and how many y+ fall."""
        up, down = self.change
        return asdict(self.run) | {
            "chosen": float(up.mean()),
            "rejected": float(down.mean()),
            "chosen_falls": int((up < 0).sum()),
            "pairs": len(up),
            "segments": self.segments,
            "left_over": 0.0 if self.left_over is None else float(self.left_over.abs().mean()),
        }

    def explain(self) -> str:
        """The prediction in one sentence."""
        from lddyn.report.explain import explain_run

        return explain_run(self.summary())

    def to_dict(self) -> dict[str, Any]:
        """All numbers, JSON-safe."""
        return {
            "run": asdict(self.run),
            "segments": self.segments,
            **{name: value.tolist() for name, value in self.tensors().items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, without what is None."""
        every = (
            *("path", "coefficients", "change", "effects", "left_over"),
            *("observed", "observed_effects"),
        )
        return {k: x for k in every if (x := getattr(self, k)) is not None}

    def save(self, path: str | Path) -> None:
        """Writes `path`.json and its tensors (`lddyn.results`), in one commit."""
        facts = {"run": asdict(self.run), "segments": self.segments}
        save_result(path, _KIND, 3, self.tensors(), facts)

    @classmethod
    def load(cls, path: str | Path) -> Forecast:
        """Reads what `save` wrote.

        Raises:
            ValueError: If a file is missing, damaged, or of another kind or format.
        """
        tensors, facts = load_result(path, _KIND, 3)
        return cls(run=Run(**facts["run"]), segments=int(facts["segments"]), **tensors)

    def __repr__(self) -> str:
        up, down = self.change.mean(1).tolist()
        return (
            f"Forecast({self.run}, {self.change.shape[1]} pairs: mean Δ log π(y+) {up:+.3g}, "
            f"Δ log π(y−) {down:+.3g} nats{'' if self.segments else ', linear'})"
        )


_KIND = "lddyn.Forecast"
_FALLS = 100.0  # what a fall costs in `least_falls`


class Simulation:
    """A run on log-probs alone, some steps at a time.

    Args:
        log_probs: log π at the start, (sides, N) nats.
        pull: log π (sides, N), and a batch of B rows -> −∂L/∂ log π of its loss, (sides, B).
        run: Settings of the run.
        rows: The rows that are trained on.

    Attributes:
        now: log π, (sides, N) nats.
        path: log π at the start and after every step, each (sides, N).
        steps: Number of steps of the whole run.
    """

    def __init__(
        self,
        log_probs: Tensor,
        pull: Callable[[Tensor, Batch], Tensor],
        run: Run,
        rows: Sequence[int],
    ) -> None:
        self.now, self.path = log_probs.clone(), [log_probs]
        self._pull, self._run = pull, run
        self._batches = run.batches(rows)
        self.steps = len(self._batches)
        self._rates = run.rates(self.steps)
        self._done = 0

    def cuts(self, segments: int) -> list[int]:
        """Steps between which segments lie: 0, …, steps.

        The learning rates of each segment add up to about the same, so that a schedule which decays
        has its first segment shorter. There is no segment without a step.
        """
        count = min(segments, self.steps)
        passed, cuts = torch.tensor([0.0, *self._rates]).double().cumsum(0), [0]
        for k in range(1, count):
            near = int((passed - passed[-1] * k / count).abs().argmin())
            cuts.append(min(max(near, cuts[-1] + 1), self.steps - count + k))
        return [*cuts, self.steps]

    def advance(self, steps: int, motion: Motion) -> None:
        """Makes some steps with gradients that stay as they are.

        Args:
            steps: How many.
            motion: How a step moves log π; a segment of it has begun.
        """
        start, limit = self.now, self._run.max_grad_norm
        for step in range(self._done, self._done + steps):
            batch, rate = self._batches[step], self._rates[step]
            c = torch.zeros_like(start)
            c[:, batch.pairs] = self._pull(self.now, batch)
            square = motion.square(c)
            clip = 1.0 if limit is None else min(1.0, limit / (math.sqrt(square) + 1e-6))
            self.now = start + motion.step(c, clip, square, rate, step)
            self.path.append(self.now)
        self._done += steps


def simulate(
    gram: Tensor,
    adam: AdamMetric | None,
    log_probs: Tensor,
    weights_at: Callable[[Tensor], Tensor],
    run: Run,
    pairs: Sequence[int],
    pair_weights: Tensor,
) -> Forecast:
    """Simulates a run with gradients that stay as they are at the start; decay is left out.

    Args:
        gram: J Jᵀ (2N, 2N), all chosen first.
        adam: Adam's diagonal; None for SGD.
        log_probs: log π at the start, (2, N) nats.
        weights_at: log π (2, N) -> w± = ∂L/∂ log π, (2, N).
        run: Settings of the run.
        pairs: The pairs that are trained on.
        pair_weights: Weight of each pair's loss, (N,).

    Returns:
        Forecast without segments.

    Cost: 8 N² a step.
    """

    def pull(now: Tensor, batch: Batch) -> Tensor:
        return -(weights_at(now) * pair_weights)[:, batch.pairs] * batch.weights

    simulation, motion = Simulation(log_probs, pull, run, pairs), GramMotion(run)
    motion.begin(log_probs.shape, gram, adam)
    simulation.advance(simulation.steps, motion)
    net, kernel = motion.net, gram if adam is None else adam.gram
    effects = response_effects(kernel[: net.shape[1]], net)
    path = torch.stack(simulation.path)
    return Forecast(run.without_state(), path, net, simulation.now - log_probs, effects)


def response_effects(kernel: Tensor, net: Tensor) -> Tensor:
    """(I, N): the part of Δ log π(y_i) that row j causes, Σ K(i, j) c_j over the row's sequences.

    Args:
        kernel: K (I, S).
        net: c (sides, N).
    """
    return (kernel.reshape(len(kernel), *net.shape) * net).sum(1)


def least_falls(effects: Tensor) -> Tensor:
    """Weights of the rows that are trained on, under which little falls, (N,), with mean 1.

        min Σ_j (a_j − 1)² + κ Σ_i min(0, Σ_j a_j E_ij / max_j |E_ij|)²,  a ≥ 0,  Σ a = N,  κ = 100

    The weights stay 1 where nothing falls. With a larger κ less falls, and fewer pairs are trained
    on.

    Args:
        effects: E (I, N): what each row moves each of I quantities by.

    Cost: one non-negative least-squares problem of N + I unknowns.
    """
    from scipy.optimize import nnls

    watched, rows = effects.shape
    scale = effects.abs().amax(1, keepdim=True).clamp(min=1e-300)
    root, whole = math.sqrt(_FALLS), 1e4
    problem = torch.zeros(rows + watched + 1, rows + watched).to(effects)
    problem[:rows, :rows] = torch.eye(rows)
    problem[rows:-1, :rows] = root * effects / scale
    problem[rows:-1, rows:] = -root * torch.eye(watched)  # a rise, which costs nothing
    problem[-1, :rows] = whole
    right = torch.cat([torch.ones(rows), torch.zeros(watched), torch.tensor([whole * rows])])
    solution, _ = nnls(problem.numpy(), right.double().numpy(), maxiter=30 * len(problem))
    weights = torch.from_numpy(solution[:rows])
    weights = weights.where(weights > 1e-9, 0.0)
    return weights / weights.mean()
