"""A whole run of preference training, foretold from the gradients of its start.

With gradients that stay as they are, sequences move by each other's gradients alone: the batch B of
one step, in which pair j has the weights w_j±(log π) of the objective, moves all log-probs by

    Δ log π = rate K c,      c_j± = w_j±(log π) / |B|,      K = J P Jᵀ

J holds the gradients ∇θ log π of all sequences, P is 1 for SGD and 1/(√v + ε) for Adam, with v what
its second moment is on average over batches of the start, E[g]² + Var[g]/|B|. That keeps its shape
while its scale, the mean of ‖g‖² = cᵀ J Jᵀ c so far, is followed; momentum averages c. So any loss,
rate and choice of pairs is a loop over vectors of 2N numbers.

What is linear in θ longest are logits, not log-probs: `diagnose(…, run=…)` pushes the net step
through them and the softmax, and divides the change of each y+ among the pairs by the integral of
its gradient along the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Forecast", "Run", "projected", "simulate"]

OPTIMIZERS = ("adamw", "sgd")

SCHEDULES = ("constant", "linear")

_BETA2 = 0.999


@dataclass(frozen=True)
class Run:
    """How a run will train.

    Attributes:
        lr: Learning rate at its start.
        epochs: Passes over the pairs.
        batch: Pairs in a batch; a loss is the mean over them.
        optimizer: "adamw" (its decay is left out: it moves nothing in a short run) or "sgd".
        schedule: "constant", or "linear" to 0 at the end, as trainers have it.
        momentum: Of the gradient: β₁ of Adam.
        seed: Of the order.

    Raises:
        ValueError: If a value is not one that training can have.
    """

    lr: float
    epochs: int = 1
    batch: int = 8
    optimizer: str = "adamw"
    schedule: str = "constant"
    momentum: float = 0.9
    seed: int = 0

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
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def batches(self, pairs: Sequence[int]) -> list[Tensor]:
        """The batches of the whole run, of these pairs."""
        generator, index = torch.Generator().manual_seed(self.seed), torch.tensor(list(pairs))
        orders = (torch.randperm(len(index), generator=generator) for _ in range(self.epochs))
        return [index[part] for order in orders for part in order.split(self.batch)]


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to do.

    Attributes:
        run: How it trains.
        path: log π after every step of a linear model, (steps + 1, 2, N) nats.
        coefficients: (2, N): Δθ of the run is P Σ_j coefficients_j ∇ log π(y_j).
        change: Δ log π of y+ and y− by the run, (2, N) nats.
        effects: (N, N) nats: its part in Δ log π(y_i+) that pair j makes; rows sum to `change[0]`.
        curved: Whether `change` and `effects` went through the softmax; else they are linear.
    """

    run: Run
    path: Tensor
    coefficients: Tensor
    change: Tensor
    effects: Tensor
    curved: bool = False

    @property
    def gives(self) -> Tensor:
        """What each pair gives to the mean Δ log π(y+) of all pairs, (N,) nats."""
        return self.effects.mean(0)

    def weighted(self, shares: Tensor) -> Tensor:
        """Δ log π(y+) (N,) if pairs had these weights, 0 to leave one out, nats.

        Linear in the weights, but no log π ends above 0.
        """
        return (self.effects @ shares.to(self.effects)).minimum(-self.path[0, 0])


def simulate(
    gram: Tensor,
    adam: tuple[Tensor, float] | None,
    log_probs: Tensor,
    pull: Callable[[Tensor], Tensor],
    run: Run,
    pairs: Sequence[int],
    shares: Tensor,
) -> Forecast:
    """Runs a linear model in function space.

    Args:
        gram: J Jᵀ (2N, 2N), all chosen first.
        adam: J P Jᵀ and Σ v of P, for Adam.
        log_probs: At the start, (2, N) nats.
        pull: log π (2, N) → w± = −∂L/∂ log π, (2, N).
        run: How it trains.
        pairs: Those that are trained on.
        shares: Weight of each pair's loss, (N,).

    Returns:
        Forecast, not curved.

    Cost: 8 N² a step.
    """
    n, batches = log_probs.shape[1], run.batches(pairs)
    now, net, moment = log_probs.clone(), torch.zeros(2, n).double(), torch.zeros(2, n).double()
    path, kernel, square = [now], gram if adam is None else adam[0], 0.0
    for step, batch in enumerate(batches):
        c = torch.zeros_like(net)
        c[:, batch] = (pull(now) * shares)[:, batch] / len(batch)
        if adam is None:
            c = moment = run.momentum * moment + c
        else:  # the means that Adam makes of its two moments, without their start from zero
            moment = run.momentum * moment + (1 - run.momentum) * c
            square = _BETA2 * square + (1 - _BETA2) * float(c.flatten() @ gram @ c.flatten())
            v = max(square / (1 - _BETA2 ** (step + 1)), 1e-300)
            c = moment / (1 - run.momentum ** (step + 1)) * math.sqrt(adam[1] / v)
        rate = run.lr * (1 - step / len(batches) if run.schedule == "linear" else 1.0)
        net = net + rate * c
        now = log_probs + (kernel @ net.flatten()).view(2, n)
        path.append(now)
    effects = kernel[:n, :n] * net[0] + kernel[:n, n:] * net[1]
    return Forecast(run, torch.stack(path), net, now - log_probs, effects)


def projected(effects: Tensor) -> Tensor:
    """The weights next to 1 under which no row of effects has a negative sum: (N,), none negative.

        min ‖a − 1‖²  subject to  E a ≥ 0, a ≥ 0

    A cone, so that by Moreau a = 1 + Aᵀ λ with A = [E; I], λ = argmin_{λ ≥ 0} ‖1 + Aᵀ λ‖.

    Cost: one non-negative least-squares problem of N equations.
    """
    from scipy.optimize import nnls

    scale = effects.abs().amax(1, keepdim=True).clamp(min=1e-300)
    faces = torch.cat([effects / scale, torch.eye(effects.shape[1]).to(effects)]).numpy()
    multipliers, _ = nnls(
        faces.T, -torch.ones(effects.shape[1]).to(effects).numpy(), maxiter=30 * len(faces)
    )
    found: Tensor = torch.from_numpy(1 + faces.T @ multipliers).clamp(min=0)
    return found.where(found > 1e-9, 0.0)
