"""Records which operations of a forward pass use which parameter, and the FLOPs of its products.

A `Watch` intercepts every use of a trainable parameter while a segment runs. Products such as
y = x Wᵀ become taps, from which every gradient of W is a sum of outer products; any other use is
direct. A `LedgerEntry` for each parameter records its operations and the segments they are in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lddyn.engine import layers
from lddyn.engine.quantised import is_plain
from lddyn.errors import UnsupportedModelError

FRONT, TAIL, HEAD, POST = "front", "tail", "head", "after the head"

WHOLE = "model"  # the only segment of a model that is not cut into blocks


@dataclass
class Tap:
    """One product with a trainable weight inside a segment.

    Attributes:
        kind: "linear", y = x Wᵀ + b; "matmul", y = x W + b; "embedding", y = W[ids].
        weight: Canonical name of the parameter, with "[e]" for a packed expert; None: frozen.
        bias: Likewise.
        activations: (rows, d_in), or the token ids (rows,) of an embedding.
        edge: Gradient edge of the product's output.
        shape: Shape of the output.
        padding: The embedding row that autograd never updates, if there is one.
    """

    kind: str
    weight: str | None
    bias: str | None
    activations: Tensor
    edge: GradientEdge
    shape: torch.Size
    padding: int | None = None

    @property
    def width(self) -> int:
        """Features of the output."""
        return self.shape[-1]

    def updated(self) -> Tensor:
        """Which rows of the activations an update changes: all but the padding token's, (rows,)."""
        if self.padding is None:
            return torch.ones_like(self.activations, dtype=torch.bool)
        return self.activations != self.padding


@dataclass
class Gain:
    """A norm y = x̂ ∘ w + b with trainable parameters, inside a replayed segment.

    Attributes:
        weight: Name of w, or None.
        bias: Name of b, or None.
        normalized: x̂.
        edge: Gradient edge of y.
    """

    weight: str | None
    bias: str | None
    normalized: Tensor
    edge: GradientEdge


@dataclass
class Work:
    """What the products of one segment cost in one forward pass.

    Attributes:
        linear: FLOPs of products with a matrix that all positions share.
        mixing: FLOPs of products between activations (attention).
        width: Elements of the outputs of linear products, over all positions.
        elements: Elements of the outputs of all products.
    """

    linear: int = 0
    mixing: int = 0
    width: int = 0
    elements: int = 0

    def add(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """Counts one product."""
        self.elements += result.numel()
        if op == "embedding":
            self.width += result.numel()
            return
        operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        x, other = operands[1:3] if op == "addmm" else operands[:2]
        flops = 2 * result.numel() * x.shape[-1]
        if other.dim() > 2:
            self.mixing += flops
        else:
            self.linear += flops
            self.width += result.numel()


@dataclass
class LedgerEntry:
    """How one trainable parameter is used.

    Attributes:
        parameter: Its canonical name.
        shape: Its shape.
        ops: Names of the torch functions that use it.
        segments: Where they do.
        direct: True if it is differentiated as a tensor of its own, not as factors.
    """

    parameter: str
    shape: tuple[int, ...]
    ops: set[str] = field(default_factory=set)
    segments: set[str] = field(default_factory=set)
    direct: bool = False

    @property
    def rule(self) -> str:
        """One of "factored", "direct", and "not reached (zero gradient)" by the traced inputs."""
        if not self.ops:
            return "not reached (zero gradient)"
        return "direct" if self.direct else "factored"


class Accounts(Protocol):
    """The parameters of a model, and the ledger that a watch writes into."""

    trainable_by_id: dict[int, tuple[str, nn.Parameter]]
    ledger: dict[str, LedgerEntry]
    direct: set[str]


class Watch(TorchFunctionMode):
    """Intercepts and records every use of a trainable parameter while a segment runs.

    Args:
        accounts: The model's parameters and their ledger.
        tapping: Make taps (in a replay). False: count the FLOPs of products (in a trace).
        batch: Sequences and their tokens, if a pass has several sequences.
    """

    def __init__(self, accounts: Accounts, tapping: bool, batch: tuple[int, int] | None = None):
        super().__init__()
        self.accounts = accounts
        self.tapping = tapping
        self.batch = batch
        self.active = True
        self.segment = FRONT
        self.taps: list[Tap] = []
        self.work: dict[str, Work] = {}  # what the products of each segment cost
        self.gains: list[Gain] = []
        self.routed = False  # whether tokens were picked by their values
        self.touched: set[str] = set()  # trainable parameters that were used
        # By the id of an activation's output: the output, its version, and the activation.
        self.activated: dict[int, tuple[Tensor, int, layers.Activated]] = {}
        # id -> (tensor, parameter name, suffix such as "[3]", transposed); tensors are kept alive
        # so that an id cannot be reused while we hold it.
        self.known: dict[int, tuple[Tensor, str, str, bool]] = {
            key: (parameter, name, "", False)
            for key, (name, parameter) in accounts.trainable_by_id.items()
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        self.routed |= name in _ROUTING
        if name == "scaled_dot_product_attention" and self.tapping:
            func = _attention  # some of torch's kernels have no second derivative
        if self.activated and len(args) == 2 and name in ("mul", "__mul__", "__rmul__"):
            gated = self._gate(args)
            if gated is not None:
                return gated
        if name == "detach" and self.tapping and args[0].requires_grad:
            raise UnsupportedModelError(
                f"{self.segment} stops a gradient with detach() (DoRA's weight norm does): what an "
                "update changes through it is not in its gradient, so no derivative here would "
                "predict a real step; merge or replace that adapter"
            )
        ids = {*map(id, args), *map(id, kwargs.values())}
        if self.known.keys().isdisjoint(ids):
            for a in args:
                if isinstance(a, list | tuple) and any(id(b) in self.known for b in a):
                    flat = [b for a in args if isinstance(a, list | tuple) for b in a]
                    self._direct(name, flat)
                    break
            result = self._run(func, name, args, kwargs)
        else:
            if name == "__get__":
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            result = self._use(func, name, args, kwargs)
        if name in _PRODUCTS and not self.tapping:
            self.work.setdefault(self.segment, Work()).add(name, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not watch within: the code is lddyn's own, not the model's."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def _gate(self, args: tuple[Any, ...]) -> Tensor | None:
        """The product φ(a) ∘ u as one layer, if φ(a) came from a recognised activation."""
        for output, other in (args, args[::-1]):
            if (
                id(output) in self.activated
                and isinstance(other, Tensor)
                and other.shape == output.shape
                and id(other) not in self.activated
            ):
                _, version, activated = self.activated[id(output)]
                if output._version == version:  # not changed in place since
                    with torch._C.DisableTorchFunction():
                        return activated.gate(other)
        return None

    def _run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation; a product with a frozen weight as one layer, by the faster BLAS."""
        if name == "sparse_coo_tensor":
            # Products with a sparse matrix have no second derivative (peft's SHiRA).
            indices, values, size = (*args, *kwargs.values())[:3]
            return values.new_zeros(size).index_put(tuple(indices), values, accumulate=True)
        if name in _PRODUCTS and name != "embedding":
            product = _as_product(name, args, kwargs)
            if product is not None:
                x, weight, bias, _ = product
                frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
                useful = frozen and x.requires_grad if self.tapping else not torch.is_grad_enabled()
                if useful and x.dtype == weight.dtype and is_plain(weight):
                    with torch._C.DisableTorchFunction():
                        weight = weight.T if name == "linear" else weight
                        return layers.product(x, weight, bias, self.batch and self.batch[1])
        return func(*args, **kwargs)

    def _use(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = (*args, *kwargs.values())
        self.touched |= {self.known[id(x)][1] for x in values if id(x) in self.known}
        if name in _PRODUCTS:
            product = _as_product(name, args, kwargs)
            # The weight must be a weight we know; or it is frozen and only the bias is trainable.
            if product is not None and (
                id(product[1]) in self.known or id(product[2]) in self.known
            ):
                return self._product(func, name, args, kwargs, *product)
        if name == "__getitem__" and self._is_row(args):
            return self._row(func, args)
        if name in ("T", "mT", "t", "transpose", "__getitem__", "select"):
            view = self._view(func, name, args, kwargs)
            if view is not None:
                return view
        if name in _METADATA:
            return func(*args, **kwargs)
        self._direct(name, [*args, *kwargs.values()])
        return func(*args, **kwargs)

    def _is_row(self, args: tuple[Any, ...]) -> bool:
        """Whether this picks one row of a weight, as W[3] or W[3, :]."""
        known = self.known.get(id(args[0]))
        index = args[1][0] if isinstance(args[1], tuple) and len(args[1]) == 2 else args[1]
        whole = not isinstance(args[1], tuple) or args[1][1:] == (slice(None),)
        return (
            known is not None
            and whole
            and isinstance(index, int)
            and known[0].dim() == 2
            and not known[3]
            and known[1] not in self.accounts.direct
        )

    def _row(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """One row of a weight: an embedding of one token."""
        weight, parameter, suffix, _ = self.known[id(args[0])]
        entry = self.accounts.ledger[parameter]
        entry.ops.add("__getitem__")
        entry.segments.add(self.segment)
        out: Tensor = func(*args)
        if not self.tapping:
            return out
        index = args[1][0] if isinstance(args[1], tuple) else args[1]
        leaf = out.detach().requires_grad_(True)
        edge, out = get_gradient_edge(leaf), leaf.clone()
        rows = torch.tensor([index % len(weight)], device=weight.device)
        self.taps.append(Tap("embedding", parameter + suffix, None, rows, edge, out.shape))
        return out

    def _view(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """A transposed weight or one packed expert is still a weight: follow it."""
        if id(args[0]) not in self.known:
            return None
        result: Tensor
        base, parameter, suffix, transposed = self.known[id(args[0])]
        if parameter in self.accounts.direct:
            return None
        if name in ("T", "mT", "t", "transpose") and base.dim() == 2:
            result = func(*args, **kwargs)
            self.known[id(result)] = (result, parameter, suffix, not transposed)
            return result
        if name in ("__getitem__", "select") and base.dim() == 3 and not suffix:
            index = args[1] if name == "__getitem__" else args[2]
            if name == "select" and args[1] != 0:
                return None
            if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
                result = func(*args, **kwargs)
                self.known[id(result)] = (result, parameter, f"[{int(index)}]", False)
                return result
        return None

    def _direct(self, op: str, values: list[Any]) -> None:
        for value in values:
            if id(value) in self.known:
                entry = self.accounts.ledger[self.known[id(value)][1]]
                entry.ops.add(op)
                entry.segments.add(self.segment)
                if not entry.direct:
                    entry.direct = True
                    self.accounts.direct.add(entry.parameter)
                    if self.tapping:
                        raise UnsupportedModelError(
                            f"{entry.parameter} met operation {op!r} only in a replay of "
                            f"{self.segment}, not in the forward pass: the model's code depends "
                            "on more than its inputs"
                        )

    def _product(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: int | None,
    ) -> Tensor:
        known = self.known.get(id(weight))
        if id(x) in self.known or (name == "embedding" and known is not None and known[3]):
            # A product of two parameters, or rows picked from a transposed one: no factor rule.
            self._direct(name, [x, weight, bias])
            return cast(Tensor, func(*args, **kwargs))
        if name == "embedding" and self.batch and x.dim() == 2 and len(x) == 1:
            x = x.expand(self.batch[0], -1)  # positions, of which each sequence has its own
            args = x, *args[1:]
        names: list[str | None] = [None, None]
        for slot, tensor in enumerate((weight, bias)):
            if tensor is not None and id(tensor) in self.known:
                _, parameter, suffix, _ = self.known[id(tensor)]
                entry = self.accounts.ledger[parameter]
                entry.ops.add(name)
                entry.segments.add(self.segment)
                if parameter not in self.accounts.direct:
                    names[slot] = parameter + suffix
        out: Tensor = self._run(func, name, args, kwargs)
        if not self.tapping or names == [None, None]:
            return out
        transposed = known is not None and known[3]
        linear = (name == "linear") != transposed
        kind = "embedding" if name == "embedding" else "linear" if linear else "matmul"
        rows = x.reshape(-1) if kind == "embedding" else x.detach().reshape(-1, x.shape[-1])
        if not out.requires_grad:
            # The input carries no gradient (embeddings, first layer): start the graph here.
            leaf = out.detach().requires_grad_(True)
            edge, out = get_gradient_edge(leaf), leaf.clone()
        else:
            edge = get_gradient_edge(out)
        self.taps.append(Tap(kind, names[0], names[1], rows, edge, out.shape, padding))
        return out


_PRODUCTS = frozenset(("linear", "addmm", "matmul", "__matmul__", "mm", "embedding"))

# What a mixture of experts uses to send tokens to their experts.
_ROUTING = frozenset(("topk", "nonzero", "one_hot", "index_add_", "scatter", "argsort"))

# Attribute reads and predicates that touch a parameter without using its values.
_METADATA = frozenset(
    (
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_cuda",
        "layout",
        "requires_grad",
        "grad",
        "data_ptr",
        "size",
        "dim",
        "numel",
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "element_size",
        "__len__",
        "__hash__",
        "__repr__",
        "__bool__",
        "is_leaf",
        "grad_fn",
        "_base",
        "names",
        "nelement",
        "type",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "storage_offset",
        "untyped_storage",
        "_version",
    )
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The arguments of torch's scaled_dot_product_attention, out of differentiable parts."""
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def _as_product(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, int | None] | None:
    """(x, weight, bias, padding id) of an operation that is a plain product, else None."""
    arguments = dict(enumerate(args))

    def get(position: int, *keys: str) -> Any:
        return arguments.get(position, next((kwargs[k] for k in keys if k in kwargs), None))

    if name == "linear":
        return get(0, "input"), get(1, "weight"), get(2, "bias"), None
    if name == "addmm":
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            return None
        bias, x, weight = get(0, "input"), get(1, "mat1"), get(2, "mat2")
        return (x, weight, bias, None) if bias.dim() == 1 else None
    if name == "embedding":
        padding, max_norm, scale = get(2, "padding_idx"), get(3, "max_norm"), get(5, "-")
        if max_norm is not None or scale or kwargs.get("scale_grad_by_freq"):
            return None
        weight = get(1, "weight")
        if padding is not None and padding < 0:
            padding += weight.shape[0]
        return get(0, "input"), weight, None, padding
    x, weight = get(0, "input", "self"), get(1, "other", "mat2")
    return (x, weight, None, None) if weight.dim() == 2 else None
