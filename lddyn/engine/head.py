"""The output head, z = W h + b, what adapters add to it, and products with its weight W (V, d).

An adapter on the head adds products of low rank, z = W h + b + Σ_k U_k f_k(h): LoRA has U = B and
f = s A h; trained rows of a head that is tied to the embedding have one column of the identity and
f = ⟨row − old row, h⟩ for each row. The f_k belong to the segment below: its output is widened
to [h, f_1(h), …], and the head stays one matrix [W, U_1, …], of which the parts are never joined.

W is cast to a wider dtype in parts. A whole copy of W in float32 would cost V d numbers: 2.2 GiB at
V = 152,064, d = 3,840.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from lddyn import ops
from lddyn.engine.guard import evaluate
from lddyn.engine.quantised import is_quantised
from lddyn.engine.trial import REPLAYED, close
from lddyn.engine.turns import switching
from lddyn.errors import UnsupportedModelError

_CAST = 1 << 25  # bytes of a part of W that is cast to another number type


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """H Wᵀ (n, V) in the dtype of H (n, d); W is cast in parts."""
    if weight.dtype == hidden.dtype:
        return ops.product(hidden, weight.T)
    rows = max(1, _CAST // (weight.shape[1] * hidden.element_size()))
    return torch.cat([hidden @ w.to(hidden.dtype).T for w in weight.split(rows)], dim=1)


def back_project(rows: Tensor, weight: Tensor) -> Tensor:
    """R W (n, d) in the dtype of R (n, V); W is cast in parts."""
    if weight.dtype == rows.dtype:
        return ops.product(rows, weight)
    size = max(1, _CAST // (weight.shape[1] * rows.element_size()))
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], size):
        part = weight[start : start + size].to(rows.dtype)
        out += rows[:, start : start + size] @ part
    return out


@dataclass(frozen=True)
class Term:
    """A product of low rank that an adapter adds to the head: U f(h).

    Attributes:
        inner: The matrix (r, d) of f(h) = scale (inner h − old h).
        old: A frozen matrix (r, d), or None for zero.
        scale: A number.
        outer: U (V, r).
    """

    inner: Tensor
    old: Tensor | None
    scale: float
    outer: Tensor

    def read(self, hidden: Tensor) -> Tensor:
        """f(h), (…, r), in the dtype of the adapter."""
        out = linear(hidden.to(self.inner.dtype), self.inner)
        if self.old is not None:
            out = out - linear(hidden, self.old).to(out.dtype)
        return out if self.scale == 1 else out * self.scale


class Head:
    """The layer that makes the logits.

    Args:
        module: The module whose forward makes them.
        layer: The linear layer W h + b; the module itself, where there is no adapter.

    Attributes:
        trained: Index among the parts of the matrix, W first, of the only one that trains; None:
            all are frozen.
    """

    def __init__(self, module: nn.Module, layer: nn.Linear):
        self.module, self.layer = module, layer
        training = [i for i, part in enumerate(self.parts) if part.requires_grad]
        if len(training) > 1:
            raise UnsupportedModelError(
                f"{len(training)} matrices of the head train together (the head's own weight, or "
                "several active adapters), and lddyn takes one: make one adapter active "
                "(set_adapter), or merge the others (merge_and_unload)"
            )
        self.trained = training[0] if training else None

    @property
    def terms(self) -> list[Term]:
        """What the active adapters add to W h + b."""
        return list(_terms(self.module)) if self.module is not self.layer else []

    @property
    def parts(self) -> list[Tensor]:
        """The matrices side by side that make up the head's, [W, U_1, …]."""
        return [self.layer.weight, *(term.outer for term in self.terms)]

    @property
    def weight(self) -> Tensor | None:
        """The one part of the matrix that trains, or None."""
        return None if self.trained is None else self._part(self.trained)

    def _part(self, index: int) -> Tensor | None:
        parts = self.parts
        return parts[index] if index < len(parts) else None

    @property
    def bias(self) -> Tensor | None:
        """b, or None."""
        bias: Tensor | None = self.layer.bias
        return bias

    @property
    def matrix(self) -> Tensor:
        """[W, U_1, …] (V, d + r). Cost: a copy of W where an adapter is on the head."""
        parts = [part.detach() for part in self.parts]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.layer.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where W is."""
        return self.layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of W."""
        return self.layer.weight.dtype

    def widen(self, hidden: Tensor) -> Tensor:
        """[h, f_1(h), …] (…, d + r) for hidden states (…, d)."""
        terms = self.terms
        return torch.cat([hidden, *(t.read(hidden) for t in terms)], -1) if terms else hidden

    def plain(self, widened: Tensor) -> Tensor:
        """The hidden states h (…, d) inside of widened ones."""
        return widened[..., : self.layer.weight.shape[1]]

    def own(self, widened: Tensor) -> Tensor:
        """What the part of the matrix that trains is multiplied by, (…, d) or (…, r)."""
        parts = self.parts
        if len(parts) == 1 or self.trained is None:
            return self.plain(widened)
        start = sum(part.shape[1] for part in parts[: self.trained])
        return widened[..., start : start + parts[self.trained].shape[1]]

    def project(self, widened: Tensor) -> Tensor:
        """The logits without b, (n, V), in the dtype of the widened states (n, d + r)."""
        parts = self.parts
        states = widened.split([part.shape[1] for part in parts], -1)
        outs = [project(x.contiguous(), w) for x, w in zip(states, parts, strict=True)]
        return outs[0] if len(outs) == 1 else torch.stack(outs).sum(0)

    def back_project(self, rows: Tensor) -> Tensor:
        """Cotangents (n, d + r) of the widened states, from those of the logits (n, V)."""
        outs = [back_project(rows, part) for part in self.parts]
        return torch.cat(outs, -1) if len(outs) > 1 else outs[0]


# --------------------------------------------------------------------------- finding it


def find_head(base: Any) -> Head:
    """The layer that makes the logits, inside of what adapters put around it.

    A wrapper (peft's modules_to_save) is run on one token: the layer is the only linear one that
    runs, if its output is the wrapper's. LoRA and trained tokens are taken as terms of low rank, if
    one token shows that these make the wrapper's output.

    Raises:
        UnsupportedModelError: If the head is no such layer; the message names what it is.
    """
    module = base.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(f"{type(base).__name__} has no output embedding (lm_head)")
    name = next((n for n, m in base.named_modules() if m is module), type(module).__name__)
    layer = getattr(getattr(module, "token_adapter", module), "base_layer", module)
    if is_quantised(layer):
        raise UnsupportedModelError(
            f"the head {name} is quantised ({type(layer).__name__}), and lddyn takes the head in "
            "closed form: leave it out of the quantisation (llm_int8_skip_modules, "
            "modules_to_not_convert)"
        )
    if isinstance(module, nn.Linear) and not module._modules:
        return Head(module, module)
    inside = _only_linear(module)
    if inside is not None and inside is not layer:
        return Head(inside, inside)
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(layer, nn.Linear) and layer is not module:
        head = Head(module, layer)
        if _adds_up(head):
            return head
    if any(p.requires_grad for p in module.parameters()) or layer is not module:
        raise UnsupportedModelError(
            f"the head {name} carries an adapter ({kind}) that is neither a plain LoRA nor a set "
            "of trained tokens (DoRA, a bias of LoRA's own and other families are not taken "
            f"there): leave {name} out of target_modules, train it whole "
            f"(modules_to_save=['{name}']), or merge the adapter (merge_and_unload)"
        )
    raise UnsupportedModelError(f"the head must be one linear layer, got {name} ({kind})")


def _terms(module: Any) -> Iterator[Term]:
    """What peft's active adapters on a head add to its output."""
    tokens = getattr(module, "token_adapter", module)  # of trainable_token_indices
    if any(
        getattr(m, "disable_adapters", False) or getattr(m, "merged", False)
        for m in (module, tokens)
    ):
        return
    module = tokens
    for name in getattr(module, "active_adapters", ()):
        if name in getattr(module, "trainable_tokens_delta", ()):
            weight = module.base_layer.weight
            rows = torch.tensor(module.token_indices[name], device=weight.device)
            outer = one_hot(rows, len(weight)).T.to(weight.dtype)
            yield Term(module.trainable_tokens_delta[name], weight.detach()[rows], 1.0, outer)
        elif name in getattr(module, "lora_A", ()):
            inner, outer = module.lora_A[name].weight, module.lora_B[name].weight
            yield Term(inner, None, float(module.scaling[name]), outer)


@torch.no_grad()
def _adds_up(head: Head) -> bool:
    """Whether the head's closed form is what its module computes, on one token."""
    weight = head.layer.weight
    if weight.requires_grad and any(term.old is not None for term in head.terms):
        return False
    probe = torch.linspace(-1, 1, weight.shape[1], device=weight.device).to(weight.dtype)[None]
    try:
        with switching(head.module) as undo:
            evaluate(list(head.module.modules()), undo)
            expected = head.module(probe)
            value = head.project(head.widen(probe)).to(expected.dtype)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return False
    if head.bias is not None:
        value = value + head.bias
    return close(value, expected, REPLAYED.of(expected.dtype))


def _only_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer inside a module that alone makes its output; None: there is none."""
    layers = [m for m in head.modules() if isinstance(m, nn.Linear) and not m._modules]
    if not layers:
        return None
    ran: list[tuple[nn.Linear, Tensor]] = []
    weight = layers[0].weight
    try:
        with switching(head) as undo, torch.no_grad():
            for layer in layers:
                hook = layer.register_forward_hook(lambda m, _, out: ran.append((m, out)))
                undo.add(hook.remove)
            probe = torch.linspace(-1, 1, layers[0].in_features, device=weight.device)
            out = head(probe.to(weight.dtype)[None])
    except (RuntimeError, TypeError, ValueError):
        return None
    return ran[0][0] if len(ran) == 1 and torch.equal(ran[0][1], out) else None
