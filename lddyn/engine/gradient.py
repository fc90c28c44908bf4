"""Gradients of a scalar with respect to every trainable parameter, by plain backward passes.

The model runs as a whole, without replays, taps or factors: the factored engine is checked against
these gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.memory import return_free_memory

Gradient = dict[str, Tensor]  # parameter name -> tensor of the parameter's shape


def gradient(
    model: nn.Module | Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor],
    *,
    most: int | None = None,
    recompute: bool = False,
) -> Gradient:
    """Σ_l w_l ∇θ log π(y_l) over the counted tokens of several sequences.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: The sequences; each takes one backward pass of its own.
        weights: One tensor (L,) for each example.
        most: As of `gradient_in_parts`. Results are the same up to the rounding of a sum.
        recompute: As of `gradient_in_parts`.

    Returns:
        The gradient of every trainable parameter, by name; zeros where none is reached.

    Cost: 6 N T FLOPs for each sequence; one gradient the size of the trainable parameters, and one
        more of a group while a further sequence is added.
    """
    anatomy = Anatomy.of(model)
    total: Gradient = {}

    def add(name: str, value: Tensor) -> None:
        total[name] = total[name].add_(value) if name in total else value

    gradient_in_parts(anatomy, examples, weights, add, most=most, recompute=recompute)
    return {name: total[name] for name in anatomy.trainable}


def gradient_in_parts(
    anatomy: Anatomy,
    examples: Sequence[Example],
    weights: Sequence[Tensor],
    take: Callable[[str, Tensor], None],
    *,
    most: int | None = None,
    recompute: bool = False,
) -> None:
    """The same gradient in parts, each of one parameter and one sequence; they are to be added.

    Args:
        anatomy: The model.
        examples: As of `gradient`.
        weights: As of `gradient`.
        take: Gets the parameter's name and a part, which it may keep and change.
        most: Bytes of the parameters whose gradients are taken together, at least one; those of
            the largest come first, and those of the two uses of a tied weight one by one. None: all
            parameters together.
        recompute: Whether blocks are run again on the way back, so that no graph of the whole model
            is held.

    Cost: for each group of parameters a forward pass, and a backward pass down to it.
    """

    def hand_out(parts: Gradient) -> None:
        parts = _apart(parts)
        for name in list(parts):
            take(name, parts.pop(name))

    head = anatomy.head_weight
    for names in _groups(anatomy.trainable, most):
        parameters = {name: anatomy.trainable[name] for name in names}
        for example, weight in zip(examples, weights, strict=True):
            with (
                anatomy.analysis(),
                anatomy.differentiating(recompute),
                anatomy.untied(most is not None and head in parameters) as leaf,
            ):
                value = anatomy.response_log_probs(example)
                loss = (value * weight.to(value.dtype)).sum()
                hand_out(gradient_of(loss, parameters, retain_graph=leaf is not None))
                if leaf is not None and head is not None:
                    hand_out(gradient_of(loss, {head: leaf}))
                del value, loss
        if most is not None:
            return_free_memory()


def _groups(parameters: Mapping[str, Tensor], most: int | None) -> Iterator[list[str]]:
    """Names of parameters in groups of at most so many bytes, or of one; large ones first."""
    if most is None:
        yield list(parameters)
        return
    large = [name for name, p in parameters.items() if p.nbytes > most]
    yield from ([name] for name in sorted(large, key=lambda n: -parameters[n].nbytes))
    names: list[str] = []
    for name in reversed([name for name in parameters if name not in set(large)]):
        if names and sum(parameters[n].nbytes for n in (*names, name)) > most:
            yield names
            names = []
        names.append(name)
    if names:
        yield names


def _apart(parts: Gradient) -> Gradient:
    """The same tensors, copied where two share memory or one repeats its own: they are added to."""
    seen: set[int] = set()
    for name, part in parts.items():
        address = part.untyped_storage().data_ptr()
        if address in seen or not part.is_contiguous():
            parts[name] = part.clone(memory_format=torch.contiguous_format)
        seen.add(address)
    return parts


def gradient_of_loss(
    model: nn.Module | Anatomy,
    examples: Sequence[Example],
    loss: Callable[[list[Tensor]], Tensor],
    *,
    recompute: bool = False,
) -> Gradient:
    """∇θ of a loss of the log-probs [(L_0,), (L_1,), …] of several sequences, by one backward pass.

    Cost: 6 N T FLOPs for each sequence; the graphs of all forward passes at once, or with
    `recompute` one block's, and another forward pass.
    """
    anatomy = Anatomy.of(model)
    with anatomy.analysis(), anatomy.differentiating(recompute):
        log_probs = [anatomy.response_log_probs(example) for example in examples]
        return gradient_of(loss(log_probs).reshape(()), anatomy.trainable)


def gradient_of_logits(
    model: nn.Module | Anatomy, example: Example, cotangents: Tensor
) -> Gradient:
    """Σ_l ∇θ ⟨v_l, z_l⟩ for cotangents (L, V) on the logits, by one backward pass."""
    anatomy = Anatomy.of(model)
    return _pulled_back(anatomy, anatomy.response_logits, example, cotangents)


def gradient_of_hidden(
    model: nn.Module | Anatomy, example: Example, cotangents: Tensor
) -> Gradient:
    """Σ_l ∇θ ⟨g_l, h_l⟩ for cotangents (L, d) at the head's input, by one backward pass."""
    anatomy = Anatomy.of(model)
    return _pulled_back(anatomy, anatomy.response_hidden, example, cotangents)


def _pulled_back(
    anatomy: Anatomy, forward: Callable[[Example], Tensor], example: Example, cotangents: Tensor
) -> Gradient:
    with anatomy.analysis(), anatomy.differentiating():
        value = forward(example)
        return gradient_of((value * cotangents.to(value.dtype)).sum(), anatomy.trainable)


def inner_product(one: Tensor, other: Tensor) -> float:
    """⟨one, other⟩ of two tensors of a shape; products are summed in float64, block by block."""
    blocks = zip(one.flatten().split(_BLOCK), other.flatten().split(_BLOCK), strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in blocks)


_BLOCK = 1 << 20  # numbers that are converted to float64 together


# --------------------------------------------------------------------------- of any scalar


def gradient_of(
    value: Tensor, parameters: Mapping[str, Tensor], *, retain_graph: bool = False
) -> Gradient:
    """The gradient of a scalar by parameter name; zeros where the scalar does not depend on one."""
    parts = _partial_derivatives(value, list(parameters.values()), retain_graph)
    return dict(zip(parameters, parts, strict=True))


def flat_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar with respect to all parameters, as by `flatten`, (P,)."""
    return flatten(_partial_derivatives(value, parameters))


def flatten(parts: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
    """Tensors one after the other in one vector (P,), float32 on the CPU."""
    tensors = parts.values() if isinstance(parts, Mapping) else parts
    return torch.cat([part.detach().flatten().float().cpu() for part in tensors])


def unflatten(flat: Tensor, parameters: Mapping[str, Tensor]) -> Gradient:
    """A vector (P,) in pieces with the parameters' names, shapes, dtypes and devices."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    named = zip(parameters.items(), flat.split(sizes), strict=True)
    return {name: part.view(p.shape).to(p) for (name, p), part in named}


def _partial_derivatives(
    value: Tensor, parameters: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    if not value.requires_grad:  # no parameter is on the way
        return [torch.zeros_like(parameter) for parameter in parameters]
    parts = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=retain_graph)
    return [
        torch.zeros_like(parameter) if part is None else part
        for parameter, part in zip(parameters, parts, strict=True)
    ]
