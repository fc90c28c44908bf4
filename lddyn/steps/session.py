"""The passes of one decomposition, and the checks between them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gradient import gradient
from lddyn.engine.gram import Side, factored_gram, factored_push, token_gram
from lddyn.engine.guard import true_float64, undisturbed
from lddyn.engine.pullback import Pullback, segments_down
from lddyn.engine.pushforward import AlongDirection, Pushforward, delta_log_probs, pair_direction
from lddyn.engine.streamed import is_streamed
from lddyn.engine.trace import Trace
from lddyn.errors import DisagreementError, UnsupportedModelError
from lddyn.objectives import Objective
from lddyn.optimizers import (
    Direction,
    Step,
    copy_optimizer,
    make_optimizer,
    optimizer_kind,
    optimizer_step,
)
from lddyn.steps.decomposition import Decomposition, Observed, UpdateToken
from lddyn.steps.verify import ORDERS, RULES, Verification, log_log_slope, shifted_copy


@dataclass
class _State:
    """The step at one parameter point: traces, weights, gradient and Δθ."""

    anatomy: Anatomy
    updated: list[Trace]
    loss: float
    weights: list[Tensor]
    step: Step


class Session:
    """Everything one decomposition computes; kept for token_effects and verify."""

    def __init__(
        self,
        model: nn.Module,
        observed: dict[str, Example],
        update: Objective,
        lr: float | None,
        optimizer: str | torch.optim.Optimizer,
        max_grad_norm: float | None,
        rule: str,
        memory: int | str,
        attention: str,
        progress: bool,
    ):
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper renames parameters
        self.model, self.observed, self.update = model, observed, update
        self.max_grad_norm, self.rule, self.memory = max_grad_norm, rule, memory
        self.attention, self.progress = attention, progress
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        streamed = {n: p for n, p in trainable.items() if is_streamed(p)}
        if streamed:
            size = sum(p.nbytes for p in streamed.values())
            raise UnsupportedModelError(
                f"{len(streamed)} streamed weights are trainable, {next(iter(streamed))} first: a "
                "decomposition holds their gradient, the step and a shifted copy, "
                f"{3 * size:,} bytes; train an adapter instead, or use lddyn.ntk, which holds none"
            )
        if isinstance(optimizer, str):
            if lr is None:
                raise ValueError(f"lr is needed with optimizer={optimizer!r}")
            optimizer = make_optimizer(optimizer, list(trainable.values()) or [nn.Parameter()], lr)
            self.lr = lr
        else:
            rates = {float(g["lr"]) for g in optimizer.param_groups}
            self.lr = max(rates) if lr is None else lr
            if lr is not None and rates != {lr}:
                if len(rates) > 1:
                    raise ValueError(
                        f"the optimizer's groups have several learning rates {sorted(rates)}: "
                        "leave lr out to use them"
                    )
                if not max(rates) > 0:
                    raise ValueError(
                        "the optimizer's learning rate is 0, so lr cannot rescale it: set the "
                        "group's lr, or leave lr out"
                    )
                optimizer = copy_optimizer(optimizer, trainable, trainable, lr / max(rates))
        # A copy with its state: schedulers and later steps must not change what this one was.
        self.trainable = sorted(trainable)
        optimizer_kind(optimizer)
        self.optimizer = copy_optimizer(optimizer, trainable, trainable) if trainable else optimizer
        self._remember()

    # ----- one point

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
        """Forward and backward of the update at the model's parameters."""
        anatomy = Anatomy(model, self.attention)
        updated = [anatomy.trace(e) for e in self.update.examples]
        log_probs = [t.log_probs() for t in updated]
        loss, weights = self.update.weights(log_probs)
        total = gradient(anatomy, self.update.examples, weights)
        step = optimizer_step(optimizer, anatomy.trainable, total, self.max_grad_norm)
        return _State(anatomy, updated, loss, weights, step)

    def _shift(self, trace: Trace, direction: Direction) -> Tensor:
        """Change of all log-probs (M, V) along a direction."""
        with trace.anatomy.analysis():
            moved = Pushforward(trace, keep=False).logits(AlongDirection(direction))[0]
        return delta_log_probs(moved, trace.logits)

    def _contract(self, trace: Trace, direction: Direction | None, rows: Tensor) -> Tensor:
        """Change of the realised log-probs (M,) along a direction: ⟨e_y − π, Δz⟩."""
        if direction is None:
            return torch.zeros_like(rows[:, 0])
        with trace.anatomy.analysis():
            moved = Pushforward(trace, keep=False).logits(AlongDirection(direction))[0]
        return (rows * moved).sum(1)

    # ----- the decomposition

    @undisturbed
    def run(self) -> Decomposition:
        """Makes every pass of the decomposition, and the result."""
        # The reference log-probs stay those of this very step, whatever is asked later.
        self.update = self.update.prepare(Anatomy(self.model, self.attention))
        state = self.state(self.model, self.optimizer)
        direction = state.step.direction()
        weights = torch.cat(state.weights)
        sides_u = [Side.log_probs(t) for t in state.updated]
        by_example = dict(zip(self.update.examples, sides_u, strict=True))
        names, sequences = _slices(self.update)
        totals: dict[str, Tensor] = {}  # accumulated over the points of the rule

        def accumulate(key: str, value: Tensor) -> None:
            totals[key] = totals[key] + value if key in totals else value

        halfway: list[Tensor] = []
        start_sides: list[Side] = []
        by_parameter: dict[str, Tensor] = {}
        points = dict(RULES[self.rule])
        for at in sorted({0.0, 0.5, *points}):
            weight = points.get(at, 0.0)
            anatomy = state.anatomy
            if at:
                anatomy = Anatomy(shifted_copy(self.model, direction, at), self.attention)
            sides = [
                by_example[e] if at == 0.0 and e in by_example else Side.log_probs(anatomy.trace(e))
                for e in self.observed.values()
            ]
            shifts = [self._shift(s.trace, direction) for s in sides]
            realised = torch.cat(
                [
                    x.gather(1, s.trace.targets[:, None])[:, 0]
                    for x, s in zip(shifts, sides, strict=True)
                ]
            )
            if at == 0.0:
                start_sides = sides
                halfway.append(realised)
            elif at == 0.5:
                halfway.append(realised)
            if not weight:
                continue
            accumulate("realised", weight * realised)
            accumulate("shift", weight * torch.cat(shifts))
            for key, part in (("history", state.step.history), ("decay", state.step.decay)):
                accumulate(
                    key,
                    weight * torch.cat([self._contract(s.trace, part, s.rows) for s in sides]),
                )
            table, parameters = self._table(state, sides, sides_u, weights, direction)
            self._check_parameters(anatomy, direction, parameters)
            accumulate("influence", weight * table)
            for name, value in parameters.items():
                value = weight * value
                by_parameter[name] = by_parameter[name] + value if name in by_parameter else value
        return self._answer(
            state,
            start_sides,
            totals,
            halfway[0] - halfway[1],
            by_parameter,
            names,
            sequences,
        )

    def _table(
        self,
        state: _State,
        sides: list[Side],
        sides_u: list[Side],
        weights: Tensor,
        direction: Direction,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The influence table (ΣM, L) at one point, and its row sums by parameter."""
        step = state.step
        factors = -step.rate * step.clip * weights
        rows = sum(len(s) for s in sides)
        parameters: dict[str, Tensor] = {}
        shared = [n for n in state.anatomy.shared() if n != state.anatomy.head_weight]
        if step.precondition is None and not shared:

            def sink(name: str, rows_o: Tensor, rows_u: Tensor, block: Tensor) -> None:
                summed = block @ factors[rows_u].to(block.dtype)
                parameters.setdefault(name, block.new_zeros(rows)).index_add_(0, rows_o, summed)

            table = token_gram(sides, sides_u, self.memory, self.progress, sink) * factors
            for extra in (step.history, step.decay):
                if extra is not None:
                    self._by_direction(sides, extra, parameters)
        else:
            table = (
                factored_gram(sides, sides_u, self.memory, self.progress, step.precondition)
                * factors
            )
            self._by_direction(sides, direction, parameters)
        return table, _merge_experts(parameters)

    def _check_parameters(
        self, anatomy: Anatomy, direction: Direction, parameters: dict[str, Tensor]
    ) -> None:
        """Each parameter's share must be what a plain backward pass of the whole model says.

        Factors and push see the same operations; what both miss (a weight inside a
        torch.autograd.Function or TorchScript) only this can tell.
        """
        examples = list(self.observed.values())
        ones = [torch.ones(len(e), device=anatomy.device) for e in examples]
        # Autograd leaves out the padding row of an embedding, but the observed response reads it.
        padded = [
            (m, m.padding_idx) for m in anatomy.model.modules() if isinstance(m, nn.Embedding)
        ]
        try:
            for module, _ in padded:
                module.padding_idx = None
            plain = gradient(anatomy, examples, ones)
        finally:
            for module, index in padded:
                module.padding_idx = index
        expected = {
            n: float((g * direction[n].to(g)).sum(dtype=torch.float64)) for n, g in plain.items()
        }
        found = {n: float(parameters[n].sum()) if n in parameters else 0.0 for n in expected}
        scale = max(
            sum(abs(v) for v in expected.values()),
            float(sum(v.abs().sum() for v in parameters.values())),
        )
        for name, value in expected.items():
            silent = name not in parameters and value != 0.0
            if silent or not abs(found[name] - value) <= _agreement(self.model) * scale:
                raise DisagreementError(
                    f"through {name} the factors say {found[name]:.6g} nats, a plain backward pass "
                    f"of the whole model {value:.6g}: this parameter is used where lddyn cannot "
                    "follow it (a torch.autograd.Function, TorchScript, compiled code)"
                )

    def _by_direction(
        self, sides: list[Side], direction: Direction, parameters: dict[str, Tensor]
    ) -> None:
        """Adds ⟨∇ log π(y_m), Δθ of each parameter⟩ to `parameters`, (ΣM,) each."""
        source = AlongDirection(direction)
        total = sum(len(s) for s in sides)
        offset = 0
        for side in sides:
            anatomy = side.trace.anatomy

            def add(rows: Tensor, name: str, values: Tensor) -> None:
                row = parameters.setdefault(name, values.new_zeros(total))
                row.index_add_(0, rows, values.to(row.dtype))

            with anatomy.analysis():
                pull = Pullback(side.trace, side.given)
                at = pull.selected + offset
                pair_direction(pull.head_factors(), source, partial(add, at))
                for segment in segments_down(anatomy):
                    for rows, factors in pull.step(segment):
                        pair_direction(factors, source, partial(add, rows + offset))
            offset += len(side)

    def _answer(
        self,
        state: _State,
        sides: list[Side],
        totals: dict[str, Tensor],
        error: Tensor,
        parameters: dict[str, Tensor],
        names: list[str],
        sequences: dict[str, slice],
    ) -> Decomposition:
        influence = totals["influence"]
        predicted = influence.sum(1) + totals["history"] + totals["decay"]
        scale = influence.abs().sum(1) + totals["history"].abs() + totals["decay"].abs()
        difference = (predicted - totals["realised"]).abs()
        worst, largest = float(difference.max()), float(scale.max())
        agreement = worst / largest if largest else worst
        limit = _agreement(self.model)
        if not agreement <= limit:
            row = int(difference.argmax())
            raise DisagreementError(
                f"the factors say Δ log π = {float(predicted[row]):.6g} nats for observed token "
                f"{row}, the push of the whole step {float(totals['realised'][row]):.6g} "
                f"(difference {agreement:.1e} of the largest row, limit {limit:.0e}): an operation "
                "of this model has a wrong or silent derivative. Please report the model's class."
            )
        observed, start = [], 0
        for (name, example), side in zip(self.observed.items(), sides, strict=True):
            at = slice(start, start + len(side))
            start = at.stop
            observed.append(
                Observed(
                    name=name,
                    token_ids=list(example.targets),
                    tokens=list(example.token_texts),
                    influence=influence[at],
                    history=totals["history"][at],
                    weight_decay=totals["decay"][at],
                    error_estimate=error[at],
                    logp=side.trace.log_probs(),
                    sequences=sequences,
                    parameters={n: float(v[at].sum()) for n, v in parameters.items()},
                    agreement=agreement,
                    vocabulary_shift=totals["shift"][at],
                    _effects=self._token_effects,
                )
            )
        tokens = [
            UpdateToken(name, i, target, text, float(w))
            for name, example, ws in zip(names, self.update.examples, state.weights, strict=True)
            for i, (target, text, w) in enumerate(
                zip(example.targets, list(example.token_texts), ws, strict=True)
            )
        ]
        settings = {
            **self.update.describe(),
            "optimizer": type(self.optimizer).__name__,
            "clip_factor": state.step.clip,
            "trainable_parameters": sum(p.numel() for p in state.anatomy.trainable.values()),
            "dtype": str(next(iter(state.anatomy.trainable.values())).dtype),
            "attention": self.attention,
            "verified": "row sums against one backward and one push of the whole step",
        }
        return Decomposition(observed, tokens, state.loss, self.lr, self.rule, settings, self)

    # ----- later questions

    def _remember(self) -> None:
        """Notes which weights this is about."""
        self.weights = [
            (p, p._version, p.data_ptr(), _mark(p))
            for p in self.model.parameters()
            if not is_streamed(p)  # read-only
        ]

    def _check_unchanged(self) -> None:
        if sorted(n for n, p in self.model.named_parameters() if p.requires_grad) != self.trainable:
            raise RuntimeError(
                "which parameters are trainable has changed since decompose(): decompose again"
            )
        for parameter, version, address, mark in self.weights:
            touched = parameter._version != version or parameter.data_ptr() != address
            # The forward pass of some adapters touches weights without changing them.
            if touched and _mark(parameter) != mark:
                raise RuntimeError(
                    "the model's weights have changed since decompose(): ask before the optimizer "
                    "steps, or decompose again"
                )

    @undisturbed
    def _token_effects(self, observed: Observed, index: int) -> Tensor:
        self._check_unchanged()
        if not -observed.influence.shape[1] <= index < observed.influence.shape[1]:
            raise IndexError(
                f"index must be one of {observed.influence.shape[1]} update tokens, got {index}"
            )
        index %= observed.influence.shape[1]
        state = self.state(self.model, self.optimizer)
        direction = state.step.direction()
        local = index
        for trace, weight in zip(state.updated, state.weights, strict=True):  # noqa: B007
            if local < len(weight):
                break
            local -= len(weight)
        side = Side.log_probs(trace)
        one = _Single(side, local)
        total: Tensor | None = None
        for at, portion in RULES[self.rule]:
            anatomy = state.anatomy
            if at:
                anatomy = Anatomy(shifted_copy(self.model, direction, at), self.attention)
            trace_o = anatomy.trace(self.observed[observed.name])
            moved = one.push(trace_o, self.memory, state.step.precondition)
            scale = -state.step.rate * state.step.clip * float(weight[local]) * portion
            part = scale * delta_log_probs(moved, trace_o.logits)
            total = part if total is None else total + part
        assert total is not None
        return total

    @contextlib.contextmanager
    def _copy(self, dtype: torch.dtype | None) -> Iterator[nn.Module]:
        """A copy of the model, in `dtype`, to take real steps from."""
        self._check_unchanged()
        streamed = any(map(is_streamed, self.model.parameters()))
        if streamed and dtype is not None:
            raise UnsupportedModelError(
                f"a streamed model cannot be copied in {dtype}: use dtype=None, in its own"
            )
        model = shifted_copy(self.model, None) if streamed else copy.deepcopy(self.model)
        if dtype is not None:
            model = model.to(dtype)
        exact = true_float64() if dtype is torch.float64 else contextlib.nullcontext()
        with exact, torch.enable_grad():
            yield model

    @undisturbed
    def real_step(self, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
        """All log-probs of every observed response, before and after a real step."""
        with self._copy(dtype) as model:
            stepped = self._real_step(model, self._plain_gradient(model), 1.0)
            before, after = Anatomy(model, self.attention), Anatomy(stepped, self.attention)
            return [
                (_all_log_probs(before.trace(e)), _all_log_probs(after.trace(e)))
                for e in self.observed.values()
            ]

    @undisturbed
    def verify(
        self, dec: Decomposition, lrs: Sequence[float] | None, dtype: torch.dtype | None
    ) -> Verification:
        """Takes real steps on a copy of the model; see `Decomposition.verify`."""
        lrs = [self.lr * 2.0**-k for k in range(6)] if lrs is None else list(lrs)
        if not lrs or any(not (math.isfinite(lr) and lr > 0) for lr in lrs):
            raise ValueError(f"lrs must be positive numbers, got {lrs}")
        old = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        measured, predicted = [], []
        with self._copy(dtype) as model:
            new = {n: p for n, p in model.named_parameters() if p.requires_grad}
            base = copy_optimizer(self.optimizer, old, new)
            state = self.state(model, base)
            plain = self._plain_gradient(model)
            before = [state.anatomy.trace(e).log_probs() for e in self.observed.values()]
            for lr in lrs:
                factor = lr / self.lr
                stepped = self._real_step(model, plain, factor)
                direction = {n: factor * d for n, d in state.step.direction().items()}
                after = Anatomy(stepped, self.attention)
                measured.append(
                    torch.cat(
                        [
                            after.trace(e).log_probs() - b
                            for e, b in zip(self.observed.values(), before, strict=True)
                        ]
                    )
                )
                total = torch.zeros_like(measured[-1])
                for at, portion in RULES[self.rule]:
                    anatomy = state.anatomy
                    if at:
                        anatomy = Anatomy(shifted_copy(model, direction, at), self.attention)
                    rows = []
                    for e in self.observed.values():
                        trace = anatomy.trace(e)
                        shift = self._shift(trace, direction)
                        rows.append(shift.gather(1, trace.targets[:, None])[:, 0])
                    total += portion * torch.cat(rows)
                predicted.append(total)
        errors = [float((m - p).norm()) for m, p in zip(measured, predicted, strict=True)]
        answer = torch.cat([o.delta_logp for o in dec]).to(measured[0])
        own = [i for i, lr in enumerate(lrs) if math.isclose(lr, self.lr)]
        return Verification(
            list(lrs),
            torch.stack(measured),
            torch.stack(predicted),
            errors,
            log_log_slope(lrs, errors),
            ORDERS[self.rule],
            str(dtype or "model dtype"),
            float((measured[own[0]] - answer).norm()) if own else None,
        )

    def _plain_gradient(self, model: nn.Module) -> Direction:
        """∇θ L by one backward pass through the loss itself, with nothing of this library's own."""
        anatomy = Anatomy(model, self.attention)
        parameters = list(anatomy.trainable.values())
        with anatomy.analysis():
            for parameter in parameters:
                parameter.requires_grad_(True)
            log_probs = []
            for example in self.update.examples:
                log_probs.append(anatomy.response_log_probs(example))
            loss = self.update.loss(log_probs).reshape(())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for n, p, g in zip(anatomy.trainable, parameters, gradients, strict=True)
        }

    def _real_step(self, model: nn.Module, gradient: Direction, factor: float) -> nn.Module:
        """A copy of the model after a real step of the real optimizer class."""
        stepped = shifted_copy(model, None)
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        new = {n: p for n, p in stepped.named_parameters() if p.requires_grad}
        optimizer = copy_optimizer(self.optimizer, own, new, factor)
        for name, parameter in new.items():
            parameter.grad = gradient[name].clone()
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(new.values()), self.max_grad_norm)
        optimizer.step()
        for parameter in new.values():
            parameter.grad = None
        return stepped


@dataclass
class _Single:
    """One update token, pushed to another trace."""

    side: Side
    index: int

    def push(self, trace: Trace, memory: int | str, precondition: Direction | None) -> Tensor:
        """Δz (M, V) of its unit log-prob cotangent."""
        select = torch.tensor([self.index], device=self.side.trace.logits.device)
        return next(
            moved[0][0]
            for _, moved in factored_push(
                [trace], [self.side], memory, precondition=precondition, select=select
            )
        )


# How far factors and push may differ, relative to the largest row: rounding, with room.
_AGREEMENT = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}


def _mark(parameter: Tensor) -> tuple[float, float]:
    """Two numbers that change when the values do."""
    values = parameter.detach()
    return float(values.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(values))


def _agreement(model: nn.Module) -> float:
    """The limit for a model: that of its least precise weights (a float32 LoRA on bfloat16)."""
    return max(_AGREEMENT.get(p.dtype, 0.0) for p in model.parameters())


def _all_log_probs(trace: Trace) -> Tensor:
    return trace.logits.detach().double().log_softmax(-1)


def _merge_experts(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums the experts of a packed parameter: "up[3]" is a part of "up"."""
    merged: dict[str, Tensor] = {}
    for name, value in parameters.items():
        base = name.rsplit("[", 1)[0]
        merged[base] = merged[base] + value if base in merged else value
    return merged


def unused(name: str, taken: Container[str]) -> str:
    """The name, with a number where it is taken."""
    candidates = (f"{name} ({i})" for i in itertools.count(1))
    return name if name not in taken else next(c for c in candidates if c not in taken)


def _slices(update: Objective) -> tuple[list[str], dict[str, slice]]:
    """Unique sequence names and their columns of the influence table."""
    names: list[str] = []
    sequences: dict[str, slice] = {}
    start = 0
    for name, example in zip(update.names, update.examples, strict=True):
        unique = unused(name, {*sequences, "history", "weight decay"})
        names.append(unique)
        sequences[unique] = slice(start, start + len(example))
        start += len(example)
    return names, sequences
