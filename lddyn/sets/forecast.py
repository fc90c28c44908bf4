"""A whole run of preference training, predicted from the gradients at its start.

If gradients stayed constant, a run could be simulated on the 2N log-probs alone. One step on the
batch B, in which pair j has the weights w_j±(log π) = ∂L/∂ log π, changes all log-probs by

    Δ log π = −rate K c,      c_j± = w_j±(log π) / |B|,      K = J P Jᵀ

J holds the gradients ∇θ log π of all sequences, P is 1 for SGD and 1/(√v + ε) for Adam, with v the
mean of its second moment over batches at the start, E[g]² + Var[g]/|B|. P is rescaled as gradients
grow or shrink: ‖g‖² = cᵀ J Jᵀ c of each step is known. Momentum averages c. So any loss, rate and
choice of pairs is a loop over vectors of 2N numbers.

Logits stay linear in θ longer than log-probs. So `lddyn.sets.net_step` predicts the change of
logits by the whole run linearly, applies the softmax, and attributes the change of each log π(y+)
to the pairs by integrated gradients.
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
from lddyn.settings import Like, TrainerSettings

__all__ = ["AdamMetric", "Forecast", "Run", "projected", "simulate"]

OPTIMIZERS = ("adamw", "sgd")

SCHEDULES = ("constant", "linear", "cosine")

# transformers' names of schedules, with or without warm-up.
_SCHEDULES = {"constant_with_warmup": "constant"}

_BETA2 = 0.999


@dataclass(frozen=True)
class Run:
    """Settings of a training run that is to be predicted.

    Attributes:
        lr: Learning rate at its start.
        epochs: Passes over the pairs.
        batch: Pairs in a batch; a loss is the mean over them.
        optimizer: "adamw" (without its weight decay, which moves little in a short run) or "sgd".
        schedule: "constant"; "linear" or "cosine" to 0 at the end, as transformers has them.
        warmup: Steps over which the rate rises linearly from 0, before its schedule; below 1: the
            part of all steps.
        momentum: Momentum of the gradient; Adam's β₁.
        seed: Seed of the order of pairs.

    Raises:
        ValueError: If a value is not one that training can have.

    Example:
        >>> import lddyn
        >>> lddyn.Run(lr=1e-4, epochs=4)
        Run(lr=0.0001, epochs=4, batch=8, optimizer='adamw', schedule='constant', momentum=0.9, \
seed=0, warmup=0.0)
    """

    lr: float
    epochs: int = 1
    batch: int = 8
    optimizer: str = "adamw"
    schedule: str = "constant"
    momentum: float = 0.9
    seed: int = 0
    warmup: float = 0.0

    @classmethod
    def like(cls, source: Like, seed: int = 0) -> Run:
        """The run that a trainer with these settings makes, on one device.

        Neither weight decay nor clipping is in a predicted run: clipping does not change Adam's
        direction, and decay moves little.

        Args:
            source: A TRL config, a trainer, a file of arguments …: see `lddyn.TrainerSettings`.
            seed: Seed of the order of pairs.

        Raises:
            ValueError: If the schedule or the optimizer is none of those above.
        """
        settings = TrainerSettings.of(source)
        return cls(
            settings.learning_rate,
            max(1, round(settings.epochs)),
            settings.batch,
            optimizer=settings.optimizer or "none",
            schedule=_SCHEDULES.get(settings.schedule, settings.schedule),
            momentum=settings.betas[0] if settings.optimizer == "adamw" else 0.0,
            seed=seed,
            warmup=settings.warmup_ratio or float(settings.warmup_steps),
        )

    def __post_init__(self) -> None:
        """Checks values."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def batches(self, pairs: Sequence[int]) -> list[Tensor]:
        """The batches of the whole run, drawn from these pairs."""
        generator, index = torch.Generator().manual_seed(self.seed), torch.tensor(list(pairs))
        orders = (torch.randperm(len(index), generator=generator) for _ in range(self.epochs))
        return [index[part] for order in orders for part in order.split(self.batch)]

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of one of the run's steps."""
        rise = math.ceil(steps * self.warmup) if self.warmup < 1 else int(self.warmup)
        if step < rise:
            return self.lr * step / rise
        done = (step - rise) / max(1, steps - rise)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done if self.schedule == "linear" else 1.0)


@dataclass(frozen=True)
class AdamMetric:
    """What a simulated run needs of Adam's diagonal P at the start.

    Attributes:
        gram: J P Jᵀ, (2N, 2N) float64, laid out as the Gram.
        second_moment: Σ v, the sum of Adam's second moment at the start over all parameters.
    """

    gram: Tensor
    second_moment: float


@dataclass(frozen=True, repr=False)
class Forecast(Result):
    """Predicted changes of log π by a run.

    Attributes:
        run: Settings of the run.
        path: log π after every step of a linear model, (steps + 1, 2, N) nats.
        coefficients: (2, N): Δθ of the run is P Σ_j coefficients_j ∇ log π(y_j).
        change: Δ log π of y+ and y− by the run, (2, N) nats.
        effects: (N, N) nats: the part of Δ log π(y_i+) that pair j causes; rows sum to `change[0]`.
        curved: Whether `change` and `effects` went through the softmax; else they are linear.
    """

    run: Run
    path: Tensor
    coefficients: Tensor
    change: Tensor
    effects: Tensor
    curved: bool = False

    @property
    def contribution(self) -> Tensor:
        """Part of the mean Δ log π(y+) of all pairs that each pair causes, (N,) nats."""
        return self.effects.mean(0)

    def weighted(self, pair_weights: Tensor) -> Tensor:
        """Predicted Δ log π(y+) (N,) in nats with these pair weights (N,); 0 leaves a pair out.

        Linear in the pair weights, but capped so that no log π ends above 0.
        """
        return (self.effects @ pair_weights.to(self.effects)).minimum(-self.path[0, 0])

    def summary(self) -> dict[str, Any]:
        """The run's settings, mean Δ log π of y+ and y− in nats, and how many y+ fall."""
        up, down = self.change
        return asdict(self.run) | {
            "chosen": float(up.mean()),
            "rejected": float(down.mean()),
            "chosen_falls": int((up < 0).sum()),
            "pairs": len(up),
            "through_the_softmax": self.curved,
        }

    def explain(self) -> str:
        """The prediction in one sentence."""
        from lddyn.report.explain import explain_run

        return explain_run(self.summary())

    def to_dict(self) -> dict[str, Any]:
        """All numbers, JSON-safe."""
        return {
            "run": asdict(self.run),
            "curved": self.curved,
            **{name: getattr(self, name).tolist() for name in _TENSORS},
        }

    def save(self, path: str | Path) -> None:
        """Writes `path`.json and its tensors (`lddyn.results`), in one commit."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        save_result(path, _KIND, 1, tensors, {"run": asdict(self.run), "curved": self.curved})

    @classmethod
    def load(cls, path: str | Path) -> Forecast:
        """Reads what `save` wrote.

        Raises:
            ValueError: If a file is missing, damaged, or of another kind or format.
        """
        tensors, facts = load_result(path, _KIND, 1)
        return cls(run=Run(**facts["run"]), curved=bool(facts["curved"]), **tensors)

    def __repr__(self) -> str:
        up, down = self.change.mean(1).tolist()
        return (
            f"Forecast({self.run}, {self.change.shape[1]} pairs: mean Δ log π(y+) {up:+.3g}, "
            f"Δ log π(y−) {down:+.3g} nats{'' if self.curved else ', linear'})"
        )


_KIND = "lddyn.Forecast"
_TENSORS = ("path", "coefficients", "change", "effects")


def simulate(
    gram: Tensor,
    adam: AdamMetric | None,
    log_probs: Tensor,
    weights_at: Callable[[Tensor], Tensor],
    run: Run,
    pairs: Sequence[int],
    pair_weights: Tensor,
) -> Forecast:
    """Simulates a run with gradients that stay as they are at the start.

    Args:
        gram: J Jᵀ (2N, 2N), all chosen first.
        adam: Adam's diagonal; None for SGD.
        log_probs: log π at the start, (2, N) nats.
        weights_at: log π (2, N) -> w± = ∂L/∂ log π, (2, N).
        run: Settings of the run.
        pairs: The pairs that are trained on.
        pair_weights: Weight of each pair's loss, (N,).

    Returns:
        Forecast, not curved.

    Cost: 8 N² a step.
    """
    n, batches = log_probs.shape[1], run.batches(pairs)
    now, net, moment = log_probs.clone(), torch.zeros(2, n).double(), torch.zeros(2, n).double()
    path, kernel, square = [now], gram if adam is None else adam.gram, 0.0
    for step, batch in enumerate(batches):
        c = torch.zeros_like(net)
        c[:, batch] = (-weights_at(now) * pair_weights)[:, batch] / len(batch)
        if adam is None:
            c = moment = run.momentum * moment + c
        else:  # Adam's two moments, corrected for their start from zero
            moment = run.momentum * moment + (1 - run.momentum) * c
            square = _BETA2 * square + (1 - _BETA2) * float(c.flatten() @ gram @ c.flatten())
            v = max(square / (1 - _BETA2 ** (step + 1)), 1e-300)
            c = moment / (1 - run.momentum ** (step + 1)) * math.sqrt(adam.second_moment / v)
        net = net + run.rate(step, len(batches)) * c
        now = log_probs + (kernel @ net.flatten()).view(2, n)
        path.append(now)
    effects = kernel[:n, :n] * net[0] + kernel[:n, n:] * net[1]
    return Forecast(run, torch.stack(path), net, now - log_probs, effects)


def projected(effects: Tensor) -> Tensor:
    """The pair weights nearest to 1 under which no row of E = effects has a negative sum, (N,).

        min ‖a − 1‖²  subject to  E a ≥ 0, a ≥ 0

    The feasible set is a cone, so that by Moreau a = 1 + Aᵀ λ with A = [E; I],
    λ = argmin_{λ ≥ 0} ‖1 + Aᵀ λ‖.

    Cost: one non-negative least-squares problem of N equations.
    """
    from scipy.optimize import nnls

    scale = effects.abs().amax(1, keepdim=True).clamp(min=1e-300)
    faces = torch.cat([effects / scale, torch.eye(effects.shape[1]).to(effects)]).numpy()
    multipliers, _ = nnls(
        faces.T, -torch.ones(effects.shape[1]).to(effects).numpy(), maxiter=30 * len(faces)
    )
    weights: Tensor = torch.from_numpy(1 + faces.T @ multipliers).clamp(min=0)
    return weights.where(weights > 1e-9, 0.0)
