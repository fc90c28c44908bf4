"""The pieces of a decoder block that are not products, differentiable for many cotangents at once.

The derivatives of attention, norms, gated activations and rotary embeddings are linear maps, once
the forward pass is fixed. Each layer is an autograd Function:

- its backward pass is one op of `lddyn.ops` (the pullback) over a whole batch of cotangents, under
  `torch.func.vmap`;
- the derivative of the backward pass with respect to the cotangent is the matching pushforward;
- forward mode calls the same pushforward.

A second derivative with respect to the layer's own inputs raises an error: a zero would be wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lddyn import ops, reference
from lddyn.engine.undo import shielded

Batched = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Linear:
    """A linear map and its transpose, both on batches.

    Attributes:
        pull: The map. Every operand and result has shape (C, *shape).
        push: The transposed map, likewise.
        backend: Backend that the ops are called with. None: lddyn's choice.
    """

    pull: Batched
    push: Batched
    # Taken when the map is made: autograd may run it in another thread, which has no override.
    backend: str | None = field(default_factory=ops.overridden)

    @property
    def transposed(self) -> Linear:
        """The transposed map."""
        return Linear(self.push, self.pull, self.backend)

    def __call__(self, *batched: Tensor) -> tuple[Tensor, ...]:
        """The map, on a batch."""
        if self.backend is None:
            return self.pull(*batched)
        with ops.backend(self.backend):
            return self.pull(*batched)

    def stacked(self, size: int) -> Linear:
        """This map applied to each of `size` operands."""

        def each(function: Batched) -> Batched:
            return lambda *x: tuple(
                y.unflatten(0, (len(x[0]), size)) for y in function(*(y.flatten(0, 1) for y in x))
            )

        return Linear(each(self.pull), each(self.push), self.backend)


class _Function(torch.autograd.Function):
    """A Function without defaults: torch binds its arguments by their signature at every call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """What the forward returns, with its graph."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Apply(_Function):
    """Applies `linear.pull` to cotangents; its derivative applies `linear.push`.

    The arguments are (linear, count, *tensors): `count` cotangents, then guards. Guards are the
    inputs of the layer, on which the map depends as well. They are not read, and a derivative with
    respect to them raises an error.
    """

    @staticmethod
    def forward(linear: Linear, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[0] for x in linear(*(x[None] for x in tensors[:count])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.linear, ctx.count, *tensors = inputs
        ctx.shapes = [x.shape for x in tensors[ctx.count :]]

    @staticmethod
    def vmap(info: Any, in_dims: Any, linear: Linear, count: int, *tensors: Tensor) -> Any:
        if any(dim is not None for dim in in_dims[2 + count :]):
            raise RuntimeError("cotangents are batched, but so is the forward pass they belong to")
        batched = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors[:count], in_dims[2:], strict=False)
        ]
        if len(tensors) > count:  # keep the guards, so that a second derivative still raises
            stacked = linear.stacked(info.batch_size)
            results = _Apply.apply(stacked, count, *batched, *tensors[count:])
        else:
            results = linear(*batched)
        return results, (0,) * len(results)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        moved = _Apply.apply(ctx.linear.transposed, len(tangents), *tangents)
        refused = [tangents[0].new_zeros(()).expand(shape) for shape in ctx.shapes]
        return None, None, *moved, *refused


class _Guard(_Function):
    """The identity; taking a derivative through it raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def refuse(ctx: Any, *derivatives: Any) -> Any:
        raise RuntimeError(
            "lddyn's layers have no second derivative with respect to their inputs: use "
            "attention='eager' and the model's own modules"
        )

    backward = jvp = refuse


class _Layer(_Function):
    """A layer whose value is known and whose transposed Jacobian is `linear`.

    The arguments are (linear, (value,), *inputs). The value is in a tuple: otherwise autograd would
    take it for an input, of which the output is a view.
    """

    @staticmethod
    def forward(linear: Linear, value: tuple[Tensor], *inputs: Tensor) -> Tensor:
        return value[0].detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.linear = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        guards = [_Guard.apply(x) for x in ctx.saved_tensors if ops.differentiated(x)]
        return None, None, *_Apply.apply(ctx.linear, 1, *grads, *guards)

    @staticmethod
    def jvp(ctx: Any, _linear: Any, _value: Any, *tangents: Tensor | None) -> Tensor:
        given = [
            torch.zeros_like(x) if t is None else t
            for x, t in zip(ctx.saved_tensors, tangents, strict=True)
        ]
        guards = [_Guard.apply(x) for x in ctx.saved_tensors]
        (out,) = _Apply.apply(ctx.linear.transposed, len(given), *given, *guards)
        return out  # type: ignore[no-any-return]


def _layer(linear: Linear, value: Tensor, *inputs: Tensor) -> Tensor:
    out: Tensor = _Layer.apply(linear, (value,), *inputs)
    return out


# --------------------------------------------------------------------------- attention


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Probabilities (H, T, S), the slope of the soft cap, and the output (H, T, f)."""
    with torch.no_grad():
        probabilities, slope = reference.attention(query, key, mask, scale, softcap)
        rows = probabilities.to(value.dtype).reshape(len(key), -1, key.shape[1])
        return probabilities, slope, (rows @ value).view(*query.shape[:2], -1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention of one sequence: (H, T, e), (G, S, e), (G, S, f), (1 or H, T, S) -> (H, T, f)."""
    _, _, out = _forward(query, key, value, mask, scale, softcap)
    shared = (query.detach(), key.detach(), value.detach(), mask.detach())
    linear = Linear(
        lambda g: ops.attention_pullback(*shared, g, scale, softcap),
        lambda q, k, v: (ops.attention_pushforward(*shared, q, k, v, scale, softcap),),
    )
    return _layer(linear, out, query, key, value)


_instead: ContextVar[Callable[..., Tensor] | None] = ContextVar("lddyn_attention", default=None)


class Stopped(Exception):
    """Raised by a function that was given to `intercepted`, to skip the rest of the block."""


@contextlib.contextmanager
@shielded
def intercepted(function: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block `attention` calls this function instead of its own computation.

    The function takes (query, key, value, mask, scale, softcap) and returns (1, T, H, f).
    """
    token = _instead.set(function)
    try:
        yield
    finally:
        _instead.reset(token)


class Rows:
    """Attention of c queries, each at the position of one cotangent.

    Query (H, c, e), key and value (G, S, e), mask (1 or H, c, S). The attribute `output` (H, c, f)
    is a leaf of the graph.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
    ):
        self.query, self.key, self.value, self.scale = query, key, value, scale
        self.probabilities, self.slope, output = _forward(query, key, value, mask, scale, softcap)
        self.output = output.requires_grad_(True)

    def pull(self, grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of the queries (H, c, e), and of keys and values, (c, G, S, e).

        Args:
            grads: Cotangents of the output, (H, c, f).
        """
        p, groups = self.probabilities, len(self.key)

        def grouped(x: Tensor) -> Tensor:  # (H, c, n) -> (G, H/G, c, n)
            return x.reshape(groups, -1, *x.shape[1:]).to(p.dtype)

        moved = grouped(grads) @ self.value.to(p.dtype).mT[:, None]
        moved = grouped(p) * (moved - (grouped(p) * moved).sum(-1, keepdim=True)) * self.scale
        if isinstance(self.slope, Tensor):
            moved = moved * grouped(self.slope)
        grad_query = (moved @ self.key.to(p.dtype)[:, None]).reshape(self.query.shape)
        grad_key = torch.einsum("ghcs,ghce->cgse", moved, grouped(self.query))
        grad_value = torch.einsum("ghcs,ghcf->cgsf", grouped(p), grouped(grads))
        dtype = grads.dtype
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention (B, T, H, d) as transformers' AttentionInterface calls it, and None for weights.

        O = softmax(cap(scaling Q Kᵀ) + mask) V

    Query (B, H, T, d), key and value (B, G, T, d). Grouped queries become rows of one product, so K
    and V are never repeated. Without learned sinks or a learned mask `attend` does the work: its
    pullback takes many cotangents at once, and the heads of B sequences are passed to it as the
    heads of one. Otherwise the output is made of torch's own differentiable operations.
    """
    if dropout:
        raise ValueError(f"lddyn's attention has no dropout, got {dropout}: set the config's to 0")
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    learned = attention_mask is not None and attention_mask.requires_grad
    # Without grad mode this is a trace, whose watch counts the FLOPs of the products below.
    if s_aux is None and not learned and torch.is_grad_enabled():
        instead = _instead.get()
        if instead is not None:
            with torch._C.DisableTorchFunction():
                return instead(query, key, value, attention_mask, scale, softcap or 0.0), None
        with torch._C.DisableTorchFunction():  # no parameter is used here: skip the watch
            if attention_mask is None:
                mask = query.new_zeros(1, length, key.shape[2])
            else:
                mask = _of_all_heads(attention_mask[..., : key.shape[2]], batch, heads)
            # Views only: the pullback of a selection would fill a tensor with zeros.
            q, k, v = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
            out = attend(q, k, v, mask, scale, softcap or 0.0)
            return out.unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), None
    rows = query.reshape(batch, groups, heads // groups * length, width)
    scores = torch.matmul(rows * scale, key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : scores.shape[-1]]
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(batch, -1, length, -1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=precise).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    mixed = torch.matmul(weights.view(batch, groups, -1, weights.shape[-1]), value)
    return mixed.view(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def _of_all_heads(mask: Tensor, batch: int, heads: int) -> Tensor:
    """A mask (1 or B, 1 or H, T, S) for the heads of all sequences: (1 or B H, T, S)."""
    if batch == 1 or (mask.shape[1] == 1 and torch.equal(mask, mask[:1].expand_as(mask))):
        return mask[0]
    return mask.expand(batch, heads, *mask.shape[2:]).flatten(0, 1)


# --------------------------------------------------------------------------- products


def product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int | None = None) -> Tensor:
    """The product of x (…, k) with a frozen weight (k, n), plus a frozen bias (n,).

    Args:
        x: Activations.
        weight: Not differentiated.
        bias: Not differentiated.
        rows: Rows of x that belong to one sequence, as in `ops.product`. None: all of them.
    """
    with torch.no_grad():
        out = ops.product(x.detach(), weight, rows)
        if bias is not None:
            out = out + bias
    linear = Linear(
        lambda g: (ops.product(g, weight.T, rows),),
        lambda t: (ops.product(t, weight, rows),),
    )
    return _layer(linear, out, x)


# --------------------------------------------------------------------------- norms


@dataclass(frozen=True)
class Norm:
    """What a recognised norm module computes: x̂ ∘ (shift + weight) + bias."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    shift: float
    centred: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x (…, n), differentiable for many cotangents at once, and x̂ in x's shape."""
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1]).to(precise)
            if self.centred:
                rows = rows - rows.mean(-1, keepdim=True)
            rstd = (rows.square().mean(-1) + self.eps).rsqrt()
            normalized = rows * rstd[:, None]
            if self.weight is None:
                gain = torch.ones_like(normalized[0])
            else:
                gain = self.shift + self.weight.detach().to(precise)
            out = normalized * gain
            if self.bias is not None:
                out = out + self.bias.detach().to(precise)
            out = out.to(x.dtype).view(x.shape)
            normalized, gain = normalized.to(x.dtype), gain.to(x.dtype)
        inputs = [x, *(p for p in (self.weight, self.bias) if p is not None)]
        weighted, biased, centred = self.weight is not None, self.bias is not None, self.centred

        def pull(g: Tensor) -> tuple[Tensor, ...]:
            batch = g.reshape(len(g), *normalized.shape)
            moved, grad_weight = ops.norm_pullback(normalized, rstd, gain, batch, centred)
            results = [moved.view(g.shape)]
            if weighted:
                results.append(grad_weight.to(g.dtype))
            if biased:
                results.append(batch.sum(1))
            return tuple(results)

        def push(t: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            batch = t.reshape(len(t), *normalized.shape)
            out = ops.norm_pushforward(normalized, rstd, gain, batch, centred)
            moved = list(parameters)
            if weighted:
                out = torch.addcmul(out, normalized, moved.pop(0)[:, None])
            if biased:
                out = out + moved.pop(0)[:, None]
            return (out.view(t.shape),)

        return _layer(Linear(pull, push), out, *inputs), normalized.view(x.shape)


def recognise_norm(
    module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor
) -> Norm | None:
    """The closed form that reproduces a norm module's output and gradient; None if none does.

    The module's class and name do not matter. Its parameters must be at most a gain and a bias over
    the last axis, and the outputs must agree on x and on x/16. The second input distinguishes a
    norm from the identity where x is already normalised, and a right eps from a wrong one.
    """
    parameters = dict(module.named_parameters(recurse=False))
    width = x.shape[-1]
    known = {"weight", "bias"}
    if (
        list(module.children())
        or set(parameters) - known
        or any(p.shape != (width,) for p in parameters.values())
    ):
        return None
    with torch.no_grad():
        pairs = [(probe, original(probe)) for probe in (x.detach(), x.detach() / 16)]
    if any(expected.shape != probe.shape for probe, expected in pairs):
        return None
    weight, bias = parameters.get("weight"), parameters.get("bias")
    names = ("variance_epsilon", "eps", "epsilon")
    eps = next((getattr(module, n) for n in names if isinstance(getattr(module, n, 0), float)), 0.0)
    forms = [Norm(weight, bias, eps, s, c) for c in (False, True) for s in (0.0, 1.0)]

    probe = x.detach().requires_grad_(True)
    cotangent = torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype)

    def pulled(function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            out = function(probe)
        return torch.autograd.grad(out, probe, cotangent)[0]

    expected = pulled(original)  # differs from a norm's if the module holds its statistics fixed

    @torch.no_grad()
    def value_error(norm: Norm) -> float:
        return max(float((norm(z)[0] - y).abs().max() / y.abs().max()) for z, y in pairs)

    @torch.no_grad()
    def gradient_error(norm: Norm) -> float:
        gradient = pulled(lambda z: norm(z)[0])
        # A gradient goes through more roundings than an output.
        return float((gradient - expected).abs().max() / expected.abs().max()) / 4

    # A form's error is the larger of two. Most forms are already wrong by their values, and their
    # gradients need not be known.
    limit = max(2 * torch.finfo(x.dtype).eps, 1e-5)
    values = [value_error(norm) for norm in forms]
    near = [(e, f) for e, f in zip(values, forms, strict=True) if not e > 4 * limit]
    errors = [(max(e, gradient_error(f)), f) for e, f in near]
    if not errors:
        return None
    error, best = min(errors, key=lambda fit: fit[0])
    # The other normalisation (with or without centring) must fit worse: with a gain of zero, or
    # with inputs of mean zero, the two cannot be told apart.
    rivals = [e for e, f in errors if f.centred != best.centred]
    return best if error <= limit and all(e > 4 * error for e in rivals) else None


# --------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Activated:
    """An elementwise activation: its argument a, its value φ(a), and its slope φ'(a).

    The slope is in float32, or in float64 for a float64 argument.
    """

    argument: Tensor
    value: Tensor
    slope: Tensor

    @property
    def output(self) -> Tensor:
        """φ(a), differentiable."""
        slope = self.slope

        def scaled(g: Tensor) -> tuple[Tensor]:
            return ((g * slope).to(g.dtype),)

        return _layer(Linear(scaled, scaled), self.value, self.argument)

    def gate(self, up: Tensor) -> Tensor:
        """φ(a) ∘ u, differentiable."""
        width = up.shape[-1]
        value = self.value.reshape(-1, width)
        slope = (self.slope * up.detach()).to(up.dtype).reshape(-1, width)

        def pull(g: Tensor) -> tuple[Tensor, ...]:
            results = ops.gated_pullback(value, slope, g.reshape(len(g), *value.shape))
            return tuple(x.view(g.shape) for x in results)

        def push(gate: Tensor, up: Tensor) -> tuple[Tensor]:
            rows = (x.reshape(len(x), *value.shape) for x in (gate, up))
            return (ops.gated_pushforward(value, slope, *rows).view(gate.shape),)

        out = self.value * up.detach()
        return _layer(Linear(pull, push), out, self.argument, up)


def activate(function: Callable[[Tensor], Tensor], x: Tensor) -> Activated:
    """The value and, by autograd, the slope of an elementwise function at x."""
    precise = torch.promote_types(x.dtype, torch.float32)
    with torch.enable_grad():
        leaf = x.detach().to(precise).requires_grad_(True)
        value = function(leaf)
        (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return Activated(x, value.detach().to(x.dtype), slope)


def is_elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether each entry of the output depends on the same entry of the input only.

    Half of the entries are changed; the output at the other half must keep its bits.
    """
    x = x.detach().contiguous()  # the layout must be that of x + …, or bits may differ
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    moves = (index * 0x9E3779B1 >> 16) % 2 == 1  # a pattern without a period along any axis
    with torch.no_grad():
        before = function(x)
        after = function(x + 0.5 * moves.to(x.dtype))
    return before.shape == x.shape and torch.equal(after[~moves], before[~moves])


# --------------------------------------------------------------------------- rotary embedding


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, e) by angles with cosines and sines (T, e)."""
    cos, sin = (angle.detach().to(x.dtype) for angle in (cos, sin))

    def turn(transpose: bool) -> Batched:
        return lambda g: (ops.rotary(g.flatten(0, 1), cos, sin, transpose).view(g.shape),)

    with torch.no_grad():
        out = ops.rotary(x.detach(), cos, sin, False)
    return _layer(Linear(turn(True), turn(False)), out, x)
