"""The passes of one decomposition, and the checks between them.

Every change of a log-prob is computed twice: by pairing the factors of both sides token by token,
and by pushing the whole step forward through the observed response. What went through each
parameter is compared with a plain backward pass of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from lddyn.engine.experts import expert_remarks
from lddyn.engine.gradient import gradient_in_parts, inner_product
from lddyn.engine.gram import Side, factored_gram, token_gram
from lddyn.engine.pullback import Pullback, segments_down
from lddyn.engine.pushforward import AlongDirection, log_prob_shift, pair_direction, push_direction
from lddyn.engine.quantised import computing_dtypes
from lddyn.engine.trace import Trace
from lddyn.engine.trial import WHOLE_STEP
from lddyn.errors import DisagreementError, NonFiniteError
from lddyn.objectives.objective import Objective
from lddyn.optimizers import Direction
from lddyn.steps.decomposition import Decomposition, Observed, UpdateToken
from lddyn.steps.precision import describe_precision, has_dropout, noise_remarks
from lddyn.steps.session import Session
from lddyn.steps.setup import Setup, UpdateState, unused
from lddyn.steps.wide import coarse


@dataclass(frozen=True)
class Prediction:
    """Δ log π of all observed tokens, one after another (ΣM rows), in nats.

    Of one point on the step, or the weighted sum over the points of a rule.

    Attributes:
        influence: (ΣM, L), by update token.
        history: (ΣM,), by the optimizer's state.
        decay: (ΣM,), by weight decay.
        pushed: (ΣM,), all of these together, from the push of the whole step.
        shift: (ΣM, V), the same for every token of the vocabulary.
        parameters: Parameter → (ΣM,), what went through it.
    """

    influence: Tensor
    history: Tensor
    decay: Tensor
    pushed: Tensor
    shift: Tensor
    parameters: dict[str, Tensor]

    def scaled(self, weight: float) -> Prediction:
        """Times a weight."""
        return Prediction(
            weight * self.influence,
            weight * self.history,
            weight * self.decay,
            weight * self.pushed,
            weight * self.shift,
            {name: weight * value for name, value in self.parameters.items()},
        )

    def plus(self, other: Prediction) -> Prediction:
        """The sum of two."""
        parameters = dict(self.parameters)
        for name, value in other.parameters.items():
            parameters[name] = parameters[name] + value if name in parameters else value
        return Prediction(
            self.influence + other.influence,
            self.history + other.history,
            self.decay + other.decay,
            self.pushed + other.pushed,
            self.shift + other.shift,
            parameters,
        )

    def paired(self) -> Tensor:
        """The changes (ΣM,) by pairing factors, to be compared with `pushed`."""
        return self.influence.sum(1) + self.history + self.decay

    def agreement(self, limit: float) -> float:
        """Largest difference between the two computations, relative to the largest row.

        Raises:
            DisagreementError: If it is beyond the limit, or not a number.
        """
        paired = self.paired()
        scale = self.influence.abs().sum(1) + self.history.abs() + self.decay.abs()
        difference = (paired - self.pushed).abs()
        worst, largest = float(difference.max()), float(scale.max())
        agreement = worst / largest if largest else worst
        if not agreement <= limit:
            row = int(difference.argmax())
            raise DisagreementError(
                f"the factors say Δ log π = {float(paired[row]):.6g} nats for observed token "
                f"{row}, the push of the whole step {float(self.pushed[row]):.6g} "
                f"(difference {agreement:.1e} of the largest row, limit {limit:.0e}): an operation "
                "of this model has a wrong or silent derivative (please report the model's class), "
                "or the learning rate is so large that rounding decides"
            )
        return agreement

    def reconciled(self) -> Prediction:
        """The prediction whose rows add up to `pushed`.

        Where the parts of a row cancel, rounding every part to 16 bits leaves little of their sum,
        which the push rounds as a whole. The difference is divided as independent errors in
        proportion to the parts would be: by their squares.
        """
        difference = self.pushed - self.paired()
        squares = self.influence.square().sum(1) + self.history.square() + self.decay.square()
        factor = difference / squares.clamp(min=torch.finfo(squares.dtype).tiny)
        return replace(
            self,
            influence=self.influence + factor[:, None] * self.influence.square(),
            history=self.history + factor * self.history.square(),
            decay=self.decay + factor * self.decay.square(),
        )


def make_passes(setup: Setup) -> Decomposition:
    """Makes every pass of a decomposition, checks them against each other, and the result."""
    passes = _Passes(setup, UpdateState.at(setup, setup.anatomy, setup.optimizer))
    weight_at = dict(setup.quadrature.points)
    pushed: dict[float, Tensor] = {}  # point on the step -> Δ log π (ΣM,) predicted there

    def predictions() -> Iterator[Prediction]:
        for at in sorted({0.0, 0.5, *weight_at}):
            sides = passes.sides(at)
            shifts = [log_prob_shift(side.trace, passes.direction) for side in sides]
            pushed[at] = torch.cat(
                [_picked(shift, side.trace) for shift, side in zip(shifts, sides, strict=True)]
            )
            if at in weight_at:
                yield passes.predict(sides, shifts, pushed[at]).scaled(weight_at[at])
            del sides, shifts  # and a copy of the model, before the next one is made

    total = reduce(Prediction.plus, predictions())
    return passes.result(total, pushed[0.0] - pushed[0.5])


def _picked(shift: Tensor, trace: Trace) -> Tensor:
    """The response's own tokens (M,) of a change of all log-probs (M, V)."""
    return shift.gather(1, trace.targets[:, None])[:, 0]


class _Passes:
    """The passes of one setup, from the update's state before the step."""

    def __init__(self, setup: Setup, state: UpdateState):
        self.setup, self.state = setup, state
        self.direction = state.step.take_direction()
        self.weights = torch.cat(state.weights)
        self.updated = [Side.log_probs(trace) for trace in state.traces]
        known = dict(zip(setup.update.examples, self.updated, strict=True))
        self.start = [
            known[e] if e in known else Side.log_probs(setup.anatomy.trace(e))
            for e in setup.observed.values()
        ]
        model = setup.anatomy.model
        self.limit = WHOLE_STEP.loosest([*model.parameters(), *computing_dtypes(model)])

    def sides(self, at: float) -> list[Side]:
        """The observed responses at θ + at · Δθ."""
        if at == 0.0:
            return self.start
        anatomy = self.setup.moved(self.setup.anatomy, self.direction, at)
        with self.setup.shifted(at):
            return [Side.log_probs(anatomy.trace(e)) for e in self.setup.observed.values()]

    def predict(self, sides: list[Side], shifts: list[Tensor], pushed: Tensor) -> Prediction:
        """What the step does by the gradients of the observed responses at one point."""
        step = self.state.step
        influence, parameters = self._influence(sides)
        self._check_parameters([side.trace for side in sides], parameters)
        history, decay = (
            torch.cat([_contract(side, part) for side in sides])
            for part in (step.history, step.decay)
        )
        return Prediction(influence, history, decay, pushed, torch.cat(shifts), parameters)

    def _influence(self, sides: list[Side]) -> tuple[Tensor, dict[str, Tensor]]:
        """The influence table (ΣM, L) at one point, and its row sums by parameter."""
        step, setup = self.state.step, self.setup
        workspace = setup.budget.workspace
        factors = -step.rate * step.clip * self.weights
        rows = sum(len(side) for side in sides)
        parameters: dict[str, Tensor] = {}
        anatomy = self.state.anatomy
        shared = [n for n in anatomy.shared() if n != anatomy.head_weight]
        if step.precondition is None and not shared:

            def sink(name: str, rows_o: Tensor, rows_u: Tensor, block: Tensor) -> None:
                summed = block @ factors[rows_u].to(block.dtype)
                parameters.setdefault(name, block.new_zeros(rows)).index_add_(0, rows_o, summed)

            gram = token_gram(sides, self.updated, workspace, setup.progress, sink)
            for extra in (step.history, step.decay):
                if extra is not None:
                    _add_along(sides, extra, parameters)
        else:
            gram = factored_gram(sides, self.updated, workspace, setup.progress, step.precondition)
            _add_along(sides, self.direction, parameters)
        return gram * factors, _merge_experts(parameters)

    def _check_parameters(self, traces: list[Trace], parameters: dict[str, Tensor]) -> None:
        """Compares what went through each parameter with a plain backward pass of the whole model.

        Factors and push see the same operations; what both miss (a weight inside a
        torch.autograd.Function or TorchScript) only this can tell.
        """
        anatomy, budget = traces[0].anatomy, self.setup.budget
        # Autograd leaves out the padding row of an embedding, but the observed response reads it.
        padded = [
            (m, m.padding_idx)
            for m in anatomy.model.modules()
            if isinstance(m, nn.Embedding) and type(m).forward is nn.Embedding.forward
        ]
        expected = dict.fromkeys(anatomy.trainable, 0.0)

        def compare(name: str, value: Tensor) -> None:
            expected[name] += inner_product(value, self.direction[name].to(value))

        try:
            for module, _ in padded:
                module.padding_idx = None
            gradient_in_parts(
                anatomy,
                [trace.example for trace in traces],
                [torch.ones(len(t.example), device=anatomy.device) for t in traces],
                compare,
                most=budget.group(),
                recompute=budget.recomputes(traces),
            )
        finally:
            for module, index in padded:
                module.padding_idx = index
        through = {n: float(parameters[n].sum()) if n in parameters else 0.0 for n in expected}
        scale = max(
            sum(abs(v) for v in expected.values()),
            float(sum(v.abs().sum() for v in parameters.values())),
        )
        for name, value in expected.items():
            if not (math.isfinite(value) and math.isfinite(through[name])):
                raise NonFiniteError(
                    f"the change of log π through {name} is {value:.6g} by a plain backward pass "
                    f"and {through[name]:.6g} by lddyn's factors: the gradient of log π or its "
                    f"product with the step overflows in {self.direction[name].dtype}; lower the "
                    "learning rate, or use a wider dtype"
                )
            silent = name not in parameters and value != 0.0
            if silent or not abs(through[name] - value) <= self.limit * scale:
                raise DisagreementError(
                    f"through {name} the factors say {through[name]:.6g} nats, a plain backward "
                    f"pass of the whole model {value:.6g}: this parameter is used where lddyn "
                    "cannot follow it (a torch.autograd.Function, TorchScript, compiled code)"
                )

    def result(self, total: Prediction, error: Tensor) -> Decomposition:
        """The result, cut into observed responses."""
        setup, state = self.setup, self.state
        agreement = total.agreement(self.limit)
        if state.step.precondition is not None and coarse(setup.anatomy.trainable):
            total = total.reconciled()
        names, sequences = _columns(setup.update)
        session = Session(setup)
        observed, start = [], 0
        for (name, example), side in zip(setup.observed.items(), self.start, strict=True):
            at = slice(start, start + len(side))
            start = at.stop
            observed.append(
                Observed(
                    name=name,
                    token_ids=list(example.targets),
                    tokens=list(example.token_texts),
                    influence=total.influence[at],
                    history=total.history[at],
                    weight_decay=total.decay[at],
                    error_estimate=error[at],
                    logp=side.trace.log_probs(),
                    sequences=sequences,
                    parameters={n: float(v[at].sum()) for n, v in total.parameters.items()},
                    agreement=agreement,
                    vocabulary_shift=total.shift[at],
                    _session=session,
                )
            )
        tokens = [
            UpdateToken(name, i, target, text, float(w))
            for name, example, ws in zip(names, setup.update.examples, state.weights, strict=True)
            for i, (target, text, w) in enumerate(
                zip(example.targets, example.token_texts, ws, strict=True)
            )
        ]
        trainable = setup.anatomy.trainable
        start_log_probs = [log_probs.detach() for log_probs in state.log_probs]
        settings = {
            **setup.update.describe(),
            **setup.update.describe_start(start_log_probs),
            **describe_precision(setup, self.direction, self.start),
            "optimizer": type(setup.optimizer).__name__,
            "clip_factor": state.step.clip,
            "trainable_parameters": sum(p.numel() for p in trainable.values()),
            "dtype": str(next(iter(trainable.values())).dtype),
            "attention": setup.anatomy.attention,
            "dropout_off": has_dropout(setup.anatomy.model),
            "remarks": [
                *setup.remarks,
                *setup.update.remarks(),
                *noise_remarks(setup.anatomy.model),
                *expert_remarks(setup.anatomy.model, trainable),
            ],
            "verified": "row sums against one backward and one push of the whole step",
        }
        return Decomposition(observed, tokens, state.loss, setup.lr, setup.rule, settings, session)


def _contract(side: Side, direction: Direction | None) -> Tensor:
    """Change of the response's own log-probs (M,) along Δθ: ⟨e_y − π, Δz⟩; None: zero."""
    if direction is None:
        return torch.zeros_like(side.rows[:, 0])
    return (side.rows * push_direction(side.trace, direction)).sum(1)


def _add_along(sides: list[Side], direction: Direction, parameters: dict[str, Tensor]) -> None:
    """Adds ⟨∇ log π(y_m), Δθ of each parameter⟩ to `parameters`, (ΣM,) each."""
    source = AlongDirection(direction)
    total = sum(len(side) for side in sides)
    offset = 0

    def add(rows: Tensor, name: str, values: Tensor) -> None:
        row = parameters.setdefault(name, values.new_zeros(total))
        row.index_add_(0, rows, values.to(row.dtype))

    for side in sides:
        anatomy = side.trace.anatomy
        with anatomy.analysis():
            pull = Pullback(side.trace, side.given)
            at = pull.selected + offset
            pair_direction(pull.head_factors(), source, partial(add, at))
            for segment in segments_down(anatomy):
                for rows, factors in pull.step(segment):
                    pair_direction(factors, source, partial(add, rows + offset))
        offset += len(side)


def _merge_experts(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums the experts of a packed parameter: "up[3]" is a part of "up"."""
    merged: dict[str, Tensor] = {}
    for name, value in parameters.items():
        base = name.rsplit("[", 1)[0]
        merged[base] = merged[base] + value if base in merged else value
    return merged


def _columns(update: Objective) -> tuple[list[str], dict[str, slice]]:
    """Unique sequence names, and their columns of the influence table."""
    names: list[str] = []
    sequences: dict[str, slice] = {}
    start = 0
    for name, example in zip(update.names, update.examples, strict=True):
        unique = unused(name, {*sequences, "history", "weight decay"})
        names.append(unique)
        sequences[unique] = slice(start, start + len(example))
        start += len(example)
    return names, sequences
