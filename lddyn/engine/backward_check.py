"""Holds a model's derivatives to a plain backward pass, once for each model.

The engine follows what torch functions show it. A weight inside a `torch.autograd.Function` (a
fused kernel), TorchScript or compiled code escapes it, and so does a state that passes from block
to block beside the hidden state: their gradient would be missing without a word. Therefore whatever
pulls cotangents back, or pushes tangents, first compares both on the first tokens of its first
sequence:

    pulled    for one random cotangent on the logits, the gradient of every trainable parameter by
              the engine's factors, and by a plain backward pass of the whole model
    pushed    ⟨v, J e⟩ and ⟨Jᵀ v, e⟩ of every segment, for random tangents e of all that it uses

The cotangent is random, not that of a response: a learned response's gradient is small and
cancels, a random one does not. A model whose blocks fail alone is made one segment, and compared
again. A verdict is remembered with the model for as long as its modules, their `forward` methods
and the choice of trainable parameters stay.

Cost: a few forward and backward passes of at most 16 tokens; in memory a share of the gradients of
all trainable parameters, and not more than 64 MiB, or the gradient of the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import Factors, HeadFactor, pull
from lddyn.engine.gradient import inner_product
from lddyn.engine.guard import undisturbed
from lddyn.engine.ledger import Tap
from lddyn.engine.linearized import Source, linearize, push
from lddyn.engine.quantised import computing_dtypes
from lddyn.engine.streamed import is_streamed
from lddyn.engine.trace import Replay, Trace
from lddyn.engine.trial import GRADIENT, GRADIENT_OF_ALL, Trial
from lddyn.errors import DisagreementError, NonFiniteError
from lddyn.memory import is_out_of_memory

_SEAMS = Trial("a model can be replayed block by block")

_PULLED = Trial("gradients are those of a plain backward pass")

_PUSHED = Trial("tangents are pushed by the transpose of the backward pass")

_TOKENS, _COUNTED = 16, 4  # of the sequence that is compared, and its tokens with cotangents

_BYTES = 64 << 20  # of plain gradients at a time, or an eighth of them all, or the largest


def check_pull(anatomy: Anatomy, example: Example) -> None:
    """Compares pulled gradients with a plain backward pass, where that was not done yet.

    Args:
        anatomy: The model.
        example: A sequence; its first 16 tokens are used.

    Raises:
        DisagreementError: If they differ by more than rounding; the message names the parameter.
    """
    if "pulled" not in anatomy.checked:
        _check(anatomy, example, pushed=False)


def check_push(anatomy: Anatomy, example: Example) -> None:
    """`check_pull`, and whether pushing is the transpose of pulling, where not done yet.

    Raises:
        DisagreementError: If they differ by more than rounding; the message names the parameter or
            the segment.
        RuntimeError: By torch, if an operation has no second derivative.
    """
    if "pushed" not in anatomy.checked:
        _check(anatomy, example, pushed=True)


def trust(copy: Anatomy, original: Anatomy) -> None:
    """Takes the verdicts of a model over for a copy with other values of its weights."""
    copy.checked |= original.checked
    if original.joined and not copy.joined:
        copy.join(original.joined)
    copy.inherit(original)


@undisturbed
def _check(anatomy: Anatomy, example: Example, pushed: bool) -> None:
    key = _structure(anatomy)
    seams = _SEAMS.verdicts(anatomy.base).get(key)
    if seams is not None and not seams.passed and not anatomy.joined:
        anatomy.join(seams.reason)
    _once(anatomy, "pulled", _PULLED, key, lambda: _pull_or_join(anatomy, _short(example), key))
    if pushed:
        _once(anatomy, "pushed", _PUSHED, key, lambda: _compare_pushes(anatomy, _short(example)))


def _once(anatomy: Anatomy, name: str, trial: Trial, key: int, compare: Callable[[], None]) -> None:
    """Runs a comparison, unless this model has passed it."""
    if name in anatomy.checked:
        return
    if anatomy.trainable and not trial.verdict(anatomy.base, key):
        anatomy.checked.add(name)  # the comparison itself must not begin another one
        try:
            with anatomy.analysis():
                compare()
        except BaseException:
            anatomy.checked.discard(name)
            raise
        trial.settle(anatomy.base, key, True)
    anatomy.checked.add(name)


def _pull_or_join(anatomy: Anatomy, example: Example, key: int) -> None:
    """Compares pulled gradients; a model that fails is made one segment, and compared again."""
    try:
        _compare_pulls(anatomy, example)
    except Exception as error:
        if anatomy.joined or anatomy.streamed or is_out_of_memory(error):
            raise
        anatomy.join(f"{type(error).__name__}: {error}")
        try:
            _compare_pulls(anatomy, example)
        except Exception as second:
            both = isinstance(error, DisagreementError) and isinstance(second, DisagreementError)
            raise (second if both else error) from None
    if anatomy.joined:
        _SEAMS.settle(anatomy.base, key, False, anatomy.joined)


def _structure(anatomy: Anatomy) -> int:
    """A number that changes with the modules, their forward methods, and what trains."""
    modules = tuple(
        (name, type(module).__qualname__, _code(type(module).forward), _code(own))
        for name, module in anatomy.model.named_modules()
        for own in (module.__dict__.get("forward"),)
    )
    return hash((anatomy.attention, tuple(sorted(anatomy.trainable)), modules))


def _code(function: object) -> int:
    """Tells functions apart; copies of a model share it."""
    inner = getattr(function, "func", function)  # of functools.partial
    inner = getattr(inner, "__func__", inner)
    return id(getattr(inner, "__code__", inner))


def _short(example: Example) -> Example:
    """The first tokens of a sequence, of which the last few are counted."""
    ids = example.ids[:_TOKENS]
    start = max(1, len(ids) - _COUNTED)
    return Example(prompt_ids=ids[:start], response_ids=ids[start:], name="check")


def _compare_pulls(anatomy: Anatomy, example: Example) -> None:
    trace = anatomy.trace(example)
    cotangents = _cotangents(trace)
    limits = _Limits(anatomy, trace.hidden.dtype)
    parts = [_head(trace, cotangents)]
    state = _entering(trace, parts[0])
    for segment in _down(anatomy):
        state, factors = pull(anatomy.replay(trace, segment, trace.length), state)
        parts.append(factors)
    _compare_gradients(anatomy, example, cotangents, _by_name(parts), limits)


def _compare_pushes(anatomy: Anatomy, example: Example) -> None:
    trace = anatomy.trace(example)
    limits, noise = _Limits(anatomy, trace.hidden.dtype), _Noise()
    state = _entering(trace, _head(trace, _cotangents(trace)))
    for segment in _down(anatomy):
        replay = anatomy.replay(trace, segment, trace.length)
        state = _compare_push(anatomy.segments[segment], replay, state, noise, limits)


def _down(anatomy: Anatomy) -> range:
    """Segments from the top to the lowest one with a trainable parameter."""
    return range(len(anatomy.segments) - 1, anatomy.lowest_segment() - 1, -1)


def _cotangents(trace: Trace) -> Tensor:
    """Random cotangents on the logits, (M, V)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(trace.logits.shape, generator=generator).to(trace.logits)


class _Limits:
    """The differences that count as rounding, for the least precise numbers of a model."""

    def __init__(self, anatomy: Anatomy, dtype: torch.dtype):
        tensors = [*anatomy.trainable.values(), torch.empty(0, dtype=dtype)]
        tensors += computing_dtypes(anatomy.model)
        self.own, self.of_all = GRADIENT.loosest(tensors), GRADIENT_OF_ALL.loosest(tensors)
        self.coarse = self.own > GRADIENT.float32


def _head(trace: Trace, cotangents: Tensor) -> Factors:
    anatomy = trace.anatomy
    rows = cotangents if trace.slope is None else cotangents * trace.slope
    names = anatomy.head_weight, anatomy.head_bias
    hidden = anatomy.head.own(trace.hidden)
    return Factors(head=HeadFactor(*names, hidden, rows, trace.logits, trace.targets))


def _entering(trace: Trace, head: Factors) -> Tensor:
    """The sum of all cotangents at the head's input, (1, 1, T, d)."""
    assert head.head is not None
    rows = trace.anatomy.head.back_project(head.head.rows).to(trace.hidden.dtype)
    state = rows.new_zeros(1, 1, trace.length, rows.shape[1])
    state[0, 0].index_add_(0, trace.positions, rows)
    return state


# --------------------------------------------------------------------------- pushed


class _Noise(Source):
    """Random tangents at every tap and direct parameter, kept to be paired afterwards."""

    size = 1

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.taps: list[Tensor] = []
        self.shapes: dict[str, torch.Size] = {}
        self.parameters: dict[str, Tensor] = {}

    def random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers with the dtype and device of another tensor."""
        return torch.randn(shape, generator=self.generator).to(like)

    def start(self, replay: Replay) -> None:
        """Forgets the tangents of the segment before."""
        self.taps, self.parameters = [], {}
        self.shapes = {direct.name: direct.shape for direct in replay.direct}
        self.like = replay.output.detach()

    def tap(self, tap: Tap) -> Tensor:
        """Tangent (1, rows, width)."""
        self.taps.append(self.random((1, tap.shape.numel() // tap.width, tap.width), self.like))
        return self.taps[-1]

    def direct(self, name: str) -> Tensor:
        """Tangent (1, *shape)."""
        self.parameters[name] = self.random((1, *self.shapes[name]), self.like)
        return self.parameters[name]


def _compare_push(
    label: str, replay: Replay, state: Tensor, noise: _Noise, limits: _Limits
) -> Tensor:
    """⟨v, J e⟩ and ⟨Jᵀ v, e⟩ of a segment for a cotangent v of its output; returns its input's."""
    if not replay.targets or not replay.output.requires_grad:
        return state
    noise.start(replay)
    linear = linearize(replay)
    entering = None if replay.input is None else noise.random(replay.input.shape, state)
    moved = push(linear, noise, None if entering is None else entering[None])
    pushed = 0.0 if moved is None else float((moved.double() * state.view_as(moved)).sum())
    given = [*noise.taps, *(noise.parameters[direct.name] for direct in replay.direct)]
    given += [] if entering is None else [entering]
    gradients = torch.autograd.grad(
        replay.output,
        replay.targets,  # type: ignore[arg-type]  # edges and tensors may be mixed
        state.view_as(replay.output),
        allow_unused=True,
    )
    pulled, square = 0.0, 0.0
    for gradient, tangent in zip(gradients, given, strict=True):
        if gradient is not None:
            pulled += float((gradient.double() * tangent.view_as(gradient)).sum())
            square += float(gradient.double().square().sum())
    if not abs(pushed - pulled) <= limits.own * max(square**0.5, abs(pulled)):
        raise DisagreementError(
            f"in {label}, tangents that are pushed forward sum to {pushed:.6g}, the same "
            f"operations pulled back to {pulled:.6g}: one of them has a wrong or silent second "
            "derivative (a torch.autograd.Function, or a custom operation)"
        )
    below = gradients[-1] if replay.input is not None else None
    return torch.zeros_like(state) if below is None else below[None]


# --------------------------------------------------------------------------- pulled

_Uses = dict[str, list[tuple[str, Tensor, Tensor | None]]]  # name -> (kind, δ, activations)


def _by_name(parts: Sequence[Factors]) -> _Uses:
    """Every use of every parameter, under the parameter's name (with "[e]" for one expert)."""
    uses: _Uses = {}

    def add(name: str | None, kind: str, delta: Tensor, x: Tensor | None = None) -> None:
        if name is not None:
            uses.setdefault(name, []).append((kind, delta, x))

    for part in parts:
        if part.head is not None:
            add(part.head.weight, "linear", part.head.rows, part.head.hidden)
            add(part.head.bias, "whole", part.head.rows.sum(0))
        for tap, delta in part.taps:
            rows = delta[0]
            add(tap.bias, "whole", rows.sum(0))
            if tap.kind == "embedding":
                rows = rows * tap.updated()[:, None]
            add(tap.weight, tap.kind, rows, tap.activations)
        for name, gradient in part.direct.items():
            add(name, "whole", gradient[0])
    return uses


def _subtract(total: Tensor, kind: str, delta: Tensor, x: Tensor | None) -> None:
    """Subtracts one use of a parameter from its gradient, in place."""
    if kind == "whole" or x is None:
        total.sub_(delta.view_as(total))
    elif kind == "embedding":
        total.index_add_(0, x, -delta.to(total))
    else:
        one, other = (delta, x) if kind == "linear" else (x, delta)
        total.addmm_(one.to(total).T, other.to(total), alpha=-1)


def _compare_gradients(
    anatomy: Anatomy, example: Example, cotangents: Tensor, uses: _Uses, limits: _Limits
) -> None:
    """Raises if the factors of a parameter are not its plain gradient, beyond rounding."""
    errors: dict[str, tuple[float, float]] = {}  # norms of the difference and of the gradient
    for name, gradient in _plain_gradients(anatomy, example, cotangents, limits):
        size = inner_product(gradient, gradient) ** 0.5
        if not math.isfinite(size):
            raise NonFiniteError(
                f"the gradient of {name} is NaN or infinite although all weights and logits are "
                f"finite: the backward pass overflows in {anatomy.trainable[name].dtype}; use a "
                "wider dtype"
            )
        for key, parts in uses.items():
            base, _, index = key.partition("[")
            if base == name:
                into = gradient[int(index[:-1])] if index else gradient
                for use in parts:
                    _subtract(into, *use)
        errors[name] = inner_product(gradient, gradient) ** 0.5, size
    total = sum(size**2 for _, size in errors.values()) ** 0.5
    reached = {key.partition("[")[0] for key in uses}
    for name, (error, size) in errors.items():
        # Rounding in 16 bits hides much; a parameter that no operation showed is an error anyway.
        silent = name not in reached and size > GRADIENT_OF_ALL.float32 * total
        if silent or not error <= max(limits.own * size, limits.of_all * total):
            raise DisagreementError(
                f"the gradient of {name} by lddyn's factors differs from that of a plain backward "
                f"pass of the whole model by {error:.3g}, of a norm of {size:.3g}: this parameter "
                "is used where lddyn cannot follow it (a torch.autograd.Function, TorchScript, "
                "compiled code, a state that blocks share beside the hidden state), or a layer "
                "rounds its inputs (dynamic quantisation of activations)"
            )


def _plain_gradients(
    anatomy: Anatomy, example: Example, cotangents: Tensor, limits: _Limits
) -> Iterator[tuple[str, Tensor]]:
    """Gradients by plain backward passes, in at least float32; yields them one after another.

    The model attends by its own attention, unless 16 bits would let tokens choose other experts.
    """
    streamed = any(map(is_streamed, anatomy.trainable.values()))
    with (
        anatomy.analysis(own_attention=limits.coarse),
        anatomy.differentiating(),
        anatomy.untied() as leaf,
    ):
        value = (anatomy.response_logits(example) * cotangents).sum()
        groups = [] if streamed or not value.requires_grad else list(_groups(anatomy))
        for names in groups:
            parameters = [anatomy.trainable[name] for name in names]
            both = [leaf] if leaf is not None and anatomy.head_weight in names else []
            gradients: list[Tensor | None] = list(
                torch.autograd.grad(
                    value,
                    [*parameters, *both],
                    retain_graph=names is not groups[-1],
                    allow_unused=True,
                )
            )
            if both:
                place = names.index(str(anatomy.head_weight))
                gradients[place] = _sum_of(gradients[place], gradients.pop())
            for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
                gradient, gradients[i] = gradients[i], None
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                yield name, gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, in the memory of the first; None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def _groups(anatomy: Anatomy) -> Iterator[list[str]]:
    """Names of parameters whose gradients are in memory together: eight groups at most."""
    sizes = {name: 4 * parameter.numel() for name, parameter in anatomy.trainable.items()}
    most = max(_BYTES, sum(sizes.values()) // 8, *sizes.values())
    names: list[str] = []
    for name in reversed(sizes):
        if names and sum(sizes[n] for n in names) + sizes[name] > most:
            yield names
            names = []
        names.append(name)
    if names:
        yield names
