"""Later questions about a decomposed step: effects of single tokens, and real steps on a copy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.engine.anatomy import Anatomy
from lddyn.engine.door import frozen_shared
from lddyn.engine.gradient import gradient_of_loss
from lddyn.engine.gram import Side, factored_push
from lddyn.engine.guard import true_float64, undisturbed
from lddyn.engine.pushforward import delta_log_probs, realised_shift
from lddyn.engine.quantised import plain_values
from lddyn.engine.streamed import is_streamed
from lddyn.engine.trace import Trace
from lddyn.errors import UnsupportedModelError
from lddyn.optimizers import Direction, Scaled, check_rate, copy_optimizer, hooked
from lddyn.steps.budget import held_bytes, making_bytes, states_of
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
        direction = state.step.take_direction()
        sequence, token = state.locate(index % count)
        side = Side.log_probs(state.traces[sequence])
        scale = -state.step.rate * state.step.clip * float(state.weights[sequence][token])
        example = setup.observed[observed.name]
        effects = torch.zeros_like(observed.vocabulary_shift)
        for at, portion in setup.quadrature.points:
            trace = setup.moved(state.anatomy, direction, at).trace(example)
            moved = self._pushed(side, token, trace, state.step.precondition)
            effects = effects + scale * portion * delta_log_probs(moved, trace.logits)
        return effects

    def _pushed(
        self, side: Side, token: int, trace: Trace, precondition: Direction | None
    ) -> Tensor:
        """Δz (M, V) of a trace by the unit log-prob cotangent of one update token."""
        select = torch.tensor([token], device=side.trace.logits.device)
        parts = factored_push(
            [trace],
            [side],
            self.setup.budget.workspace,
            precondition=precondition,
            select=select,
        )
        _, moved = next(parts)
        return moved[0][0]

    # ----- real steps

    @undisturbed
    def real_step(self, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
        """All log-probs (M, V) of every observed response, before and after a real step."""
        examples = list(self.setup.observed.values())
        with self._copy(dtype) as model:
            anatomy = self.setup.open(model)
            before = [_all_log_probs(anatomy.trace(e)) for e in examples]
            gradient = self._plain_gradient(anatomy)
            with self._stepped(anatomy, gradient, 1.0) as stepped, self.setup.shifted(1.0):
                after = [_all_log_probs(stepped.trace(e)) for e in examples]
        return list(zip(before, after, strict=True))

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
            anatomy, step = state.anatomy, state.step.take_direction()
            before = self._realised(anatomy)
            for lr in rates:
                predicted.append(self._predicted(anatomy, Scaled(step, lr / setup.lr)))
            del state, step  # before the vectors of the real steps are made
            plain = self._plain_gradient(anatomy)
            for lr in rates:
                factor = lr / setup.lr
                with self._stepped(anatomy, plain, factor) as stepped, setup.shifted(factor):
                    measured.append(self._realised(stepped) - before)
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
            anatomy = self.setup.open(model)
            before = self._realised(anatomy)
            old = {n: p.detach() for n, p in self.setup.anatomy.trainable.items()}
            with self._stepped(anatomy, self._plain_gradient(anatomy), 1.0) as stepped:
                new = {n: p.detach() for n, p in stepped.trainable.items()}
                moved = weight_change(old, new)
                change = self._realised(stepped) - before
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "moved": moved,
            "measured": float(change.double().sum()),
        }

    def _realised(self, anatomy: Anatomy) -> Tensor:
        """The log π(y_m) of all observed tokens, one after another (ΣM,)."""
        return torch.cat([anatomy.trace(e).log_probs() for e in self.setup.observed.values()])

    def _predicted(self, anatomy: Anatomy, direction: Mapping[str, Tensor]) -> Tensor:
        """Δ log π(y_m) of all observed tokens (ΣM,) along Δθ, by the decomposition's rule."""
        parts = []
        for at, portion in self.setup.quadrature.points:
            moved = self.setup.moved(anatomy, direction, at)
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
        self._require(dtype)
        model = frozen_shared(self.model) if dtype is None else copy_in(self.model, dtype)
        exact = true_float64() if dtype is torch.float64 else contextlib.nullcontext()
        with exact, torch.enable_grad():
            yield model

    def _optimizer_over(self, model: nn.Module, factor: float = 1.0) -> torch.optim.Optimizer:
        """The optimizer with its state over a copy's parameters, its rates times a factor."""
        own, new = (
            {n: p for n, p in m.named_parameters() if p.requires_grad} for m in (self.model, model)
        )
        return copy_optimizer(self.setup.optimizer, own, new, factor)

    def _require(self, dtype: torch.dtype | None) -> None:
        """Raises where `memory=` does not hold a copy of the model in this type, and its step."""
        setup, parameters = self.setup, list(self.model.parameters())
        optimizer, trainable = setup.optimizer, setup.anatomy.trainable
        own = sum(p.nbytes for p in trainable.values())
        size = sum(_bytes_as(p, dtype) for p in trainable.values())
        copy = size if dtype is None else sum(_bytes_as(p, dtype) for p in parameters)
        # The step that is predicted, in the copy's type, and where it is not looked at from its
        # start a second copy; then the gradient and the state of the one that is taken.
        predicted = held_bytes(trainable, optimizer) * size // max(own, 1)
        if any(at for at, _ in setup.quadrature.points):
            predicted += size
        if dtype is None:
            predicted = max(predicted, making_bytes(setup.anatomy, trainable, optimizer))
        taken = size * (1 + states_of(optimizer) + self._changes_gradients())
        name = str(dtype or "the model's own type").removeprefix("torch.")
        setup.budget.budget.require(
            copy + max(predicted, taken),
            f"a real step on a copy of the model in {name}",
            "or ask for it in the model's own type (dtype=None)"
            if dtype
            else "or train an adapter",
        )

    def _plain_gradient(self, anatomy: Anatomy) -> Direction:
        """∇θ L by one backward pass through the loss itself, with nothing of this library's own."""
        update = self.setup.update
        return gradient_of_loss(
            anatomy, update.examples, update.loss, recompute=self.setup.budget.budget.strict
        )

    def _changes_gradients(self) -> bool:
        """Whether a real step may change a gradient in place."""
        setup = self.setup
        return (
            setup.max_grad_norm is not None
            or any(group.get("nesterov") for group in setup.optimizer.param_groups)
            or any(p._backward_hooks for p in setup.anatomy.trainable.values())
        )

    @contextlib.contextmanager
    def _stepped(self, anatomy: Anatomy, gradient: Direction, factor: float) -> Iterator[Anatomy]:
        """The copy after a real step of the real optimizer class, at the first weights on exit."""
        setup = self.setup
        own = {n: p.detach() for n, p in setup.anatomy.trainable.items()}
        if not all(torch.equal(p, own[n].to(p)) for n, p in anatomy.trainable.items()):
            # Passes of some models (RWKV's) scale their weights.
            anatomy = setup.open(shifted_copy(anatomy.model, None))
        trainable = anatomy.trainable
        optimizer = self._optimizer_over(anatomy.model, factor)
        changes = self._changes_gradients()
        try:
            for name, parameter in trainable.items():
                given = gradient[name].clone() if changes else gradient[name]
                parameter.grad = hooked(setup.anatomy.trainable[name], given)
            if setup.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(trainable.values()), setup.max_grad_norm)
            optimizer.step()
            for parameter in trainable.values():
                parameter.grad = None
            yield anatomy
        finally:
            with torch.no_grad():
                for name, parameter in trainable.items():
                    parameter.grad = None
                    parameter.copy_(own[name])


def _bytes_as(parameter: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a parameter in a number type; None: its own."""
    return parameter.nbytes if dtype is None else parameter.numel() * dtype.itemsize


def _mark(parameter: Tensor) -> tuple[float, float]:
    """Two numbers that change when the values do."""
    values = plain_values(parameter)
    if not values.is_floating_point():  # quantised
        values = values.float()
    sums = [float(x.sum(dtype=torch.float64)) for x in values.flatten().split(1 << 20)]
    return sum(sums), float(torch.linalg.vector_norm(values))


def _all_log_probs(trace: Trace) -> Tensor:
    return trace.logits.detach().double().log_softmax(-1)
