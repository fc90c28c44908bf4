"""Later questions about a decomposed step: effects of single tokens, and real steps on a copy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.engine.anatomy import Anatomy
from lddyn.engine.door import copied
from lddyn.engine.gradient import gradient_of_loss
from lddyn.engine.gram import Side, factored_push
from lddyn.engine.guard import true_float64, undisturbed
from lddyn.engine.pushforward import delta_log_probs, realised_shift
from lddyn.engine.quantised import plain_values
from lddyn.engine.streamed import is_streamed
from lddyn.engine.trace import Trace
from lddyn.errors import UnsupportedModelError
from lddyn.optimizers import Direction, check_rate, copy_optimizer, hooked
from lddyn.steps.precision import weight_change
from lddyn.steps.setup import Setup, UpdateState, shifted_copy
from lddyn.steps.verification import Verification, log_log_slope
from lddyn.steps.wide import coarse, copy_in

if TYPE_CHECKING:
    from lddyn.steps.decomposition import Decomposition, Observed


class Session:
    """The model and the step behind a `Decomposition`; answers while the weights are the same.

    Args:
        setup: What was decomposed.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.model = setup.anatomy.model
        self._trainable = sorted(setup.anatomy.trainable)
        self._weights = [
            (p, p._version, p.data_ptr(), _mark(p))
            for p in self.model.parameters()
            if not is_streamed(p)  # read-only
        ]

    def check_unchanged(self) -> None:
        """Raises a RuntimeError if the model is not what it was at the decomposition."""
        trainable = sorted(n for n, p in self.model.named_parameters() if p.requires_grad)
        if trainable != self._trainable:
            raise RuntimeError(
                "which parameters are trainable has changed since decompose(): decompose again"
            )
        for parameter, version, address, mark in self._weights:
            touched = parameter._version != version or parameter.data_ptr() != address
            # The forward pass of some adapters touches weights without changing them.
            if touched and _mark(parameter) != mark:
                raise RuntimeError(
                    "the model's weights have changed since decompose(): ask before the optimizer "
                    "steps, or decompose again"
                )

    # ----- one update token

    @undisturbed
    def token_effects(self, observed: Observed, index: int) -> Tensor:
        """What one update token did to all log-probs (M, V); see `Observed.token_effects`."""
        self.check_unchanged()
        count = observed.influence.shape[1]
        if not -count <= index < count:
            raise IndexError(f"index must be one of {count} update tokens, got {index}")
        setup = self.setup
        state = UpdateState.at(setup, setup.anatomy, setup.optimizer)
        direction = state.step.direction()
        sequence, token = state.locate(index % count)
        side = Side.log_probs(state.traces[sequence])
        scale = -state.step.rate * state.step.clip * float(state.weights[sequence][token])
        example = setup.observed[observed.name]
        effects = torch.zeros_like(observed.vocabulary_shift)
        for at, portion in setup.quadrature.points:
            trace = self._anatomy_at(state.anatomy, direction, at).trace(example)
            moved = self._pushed(side, token, trace, state.step.precondition)
            effects = effects + scale * portion * delta_log_probs(moved, trace.logits)
        return effects

    def _pushed(
        self, side: Side, token: int, trace: Trace, precondition: Direction | None
    ) -> Tensor:
        """Δz (M, V) of a trace by the unit log-prob cotangent of one update token."""
        select = torch.tensor([token], device=side.trace.logits.device)
        parts = factored_push(
            [trace], [side], self.setup.memory, precondition=precondition, select=select
        )
        _, moved = next(parts)
        return moved[0][0]

    def _anatomy_at(self, anatomy: Anatomy, direction: Direction, at: float) -> Anatomy:
        """The model at θ + at · Δθ."""
        if not at:
            return anatomy
        return self.setup.open(shifted_copy(anatomy.model, direction, at))

    # ----- real steps

    @undisturbed
    def real_step(self, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
        """All log-probs (M, V) of every observed response, before and after a real step."""
        with self._copy(dtype) as model:
            stepped = self._stepped(model, self._plain_gradient(model), 1.0)
            before, after = self.setup.open(model), self.setup.open(stepped)
            with self.setup.shifted(1.0):
                return [
                    (_all_log_probs(before.trace(e)), _all_log_probs(after.trace(e)))
                    for e in self.setup.observed.values()
                ]

    @undisturbed
    def verify(
        self, dec: Decomposition, lrs: Sequence[float] | None, dtype: torch.dtype | None
    ) -> Verification:
        """Takes real steps on a copy of the model; see `Decomposition.verify`."""
        setup = self.setup
        if setup.lr == 0:
            raise ValueError("the learning rate is 0: a step moves nothing that could be verified")
        if lrs is None:
            rates = [setup.lr * 2.0**-k for k in range(6)]
        else:
            rates = [check_rate(lr, "lrs must be positive numbers: each") for lr in lrs]
        if not rates or 0.0 in rates:
            raise ValueError(f"lrs must be positive numbers, got {rates}")
        measured, predicted = [], []
        with self._copy(dtype) as model:
            state = UpdateState.at(setup, setup.open(model), self._optimizer_over(model))
            step = state.step.direction()
            plain = self._plain_gradient(model)
            before = self._realised(state.anatomy)
            for lr in rates:
                factor = lr / setup.lr
                stepped = self._stepped(model, plain, factor)
                with setup.shifted(factor):
                    measured.append(self._realised(setup.open(stepped)) - before)
                direction = {n: factor * d for n, d in step.items()}
                predicted.append(self._predicted(state.anatomy, direction))
        errors = [float((m - p).norm()) for m, p in zip(measured, predicted, strict=True)]
        answer = torch.cat([o.delta_logp for o in dec]).to(measured[0])
        own = [i for i, lr in enumerate(rates) if math.isclose(lr, setup.lr)]
        return Verification(
            rates,
            torch.stack(measured),
            torch.stack(predicted),
            errors,
            log_log_slope(rates, errors),
            setup.quadrature.order,
            str(dtype or "model dtype"),
            float((measured[own[0]] - answer).norm()) if own else None,
            self._own_step() if dtype is not None else None,
        )

    def _own_step(self) -> dict[str, Any] | None:
        """A real step in the model's own 16-bit number type; None for other types."""
        dtype = coarse(self.setup.anatomy.trainable)
        if dtype is None:
            return None
        with self._copy(None) as model:
            before = self._realised(self.setup.open(model))
            stepped = self._stepped(model, self._plain_gradient(model), 1.0)
            old, new = (
                {n: p.detach() for n, p in m.named_parameters() if p.requires_grad}
                for m in (model, stepped)
            )
            change = self._realised(self.setup.open(stepped)) - before
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "moved": weight_change(old, new),
            "measured": float(change.double().sum()),
        }

    def _realised(self, anatomy: Anatomy) -> Tensor:
        """The log π(y_m) of all observed tokens, one after another (ΣM,)."""
        return torch.cat([anatomy.trace(e).log_probs() for e in self.setup.observed.values()])

    def _predicted(self, anatomy: Anatomy, direction: Direction) -> Tensor:
        """Δ log π(y_m) of all observed tokens (ΣM,) along Δθ, by the decomposition's rule."""
        parts = []
        for at, portion in self.setup.quadrature.points:
            moved = self._anatomy_at(anatomy, direction, at)
            parts.append(
                portion
                * torch.cat(
                    [
                        realised_shift(moved.trace(e), direction)
                        for e in self.setup.observed.values()
                    ]
                )
            )
        return reduce(torch.add, parts)

    @contextlib.contextmanager
    def _copy(self, dtype: torch.dtype | None) -> Iterator[nn.Module]:
        """A copy of the model, in `dtype`, to take real steps from."""
        self.check_unchanged()
        streamed = any(map(is_streamed, self.model.parameters()))
        if streamed and dtype is not None:
            raise UnsupportedModelError(
                f"a streamed model cannot be copied in {dtype}: use dtype=None, in its own"
            )
        if dtype is not None:
            model = copy_in(self.model, dtype)
        else:
            model = shifted_copy(self.model, None) if streamed else copied(self.model)
        exact = true_float64() if dtype is torch.float64 else contextlib.nullcontext()
        with exact, torch.enable_grad():
            yield model

    def _optimizer_over(self, model: nn.Module, factor: float = 1.0) -> torch.optim.Optimizer:
        """The optimizer with its state over a copy's parameters, its rates times a factor."""
        own, new = (
            {n: p for n, p in m.named_parameters() if p.requires_grad} for m in (self.model, model)
        )
        return copy_optimizer(self.setup.optimizer, own, new, factor)

    def _plain_gradient(self, model: nn.Module) -> Direction:
        """∇θ L by one backward pass through the loss itself, with nothing of this library's own."""
        anatomy, update = self.setup.open(model), self.setup.update
        return gradient_of_loss(anatomy, update.examples, update.loss)

    def _stepped(self, model: nn.Module, gradient: Direction, factor: float) -> nn.Module:
        """A copy of the model after a real step of the real optimizer class."""
        stepped = shifted_copy(model, None)
        trainable = {n: p for n, p in stepped.named_parameters() if p.requires_grad}
        optimizer = self._optimizer_over(stepped, factor)
        for name, parameter in trainable.items():
            parameter.grad = hooked(self.setup.anatomy.trainable[name], gradient[name].clone())
        if self.setup.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), self.setup.max_grad_norm)
        optimizer.step()
        for parameter in trainable.values():
            parameter.grad = None
        return stepped


def _mark(parameter: Tensor) -> tuple[float, float]:
    """Two numbers that change when the values do."""
    values = plain_values(parameter)
    if not values.is_floating_point():  # quantised
        values = values.float()
    return float(values.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(values))


def _all_log_probs(trace: Trace) -> Tensor:
    return trace.logits.detach().double().log_softmax(-1)
