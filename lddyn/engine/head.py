"""The output head, a linear layer z = W h + b, and products with its weight W (V, d).

W is cast to a wider dtype in parts. A whole copy of W in float32 would cost V d numbers: 2.2 GiB at
V = 152,064, d = 3,840.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lddyn import ops
from lddyn.engine.quantised import is_quantised
from lddyn.engine.turns import switching
from lddyn.errors import UnsupportedModelError


def project(hidden: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """H Wᵀ (n, V) in the dtype of H (n, d); W is cast in parts of at most `budget` bytes."""
    if weight.dtype == hidden.dtype:
        return ops.product(hidden, weight.T)
    rows = max(1, budget // (weight.shape[1] * hidden.element_size()))
    return torch.cat([hidden @ w.to(hidden.dtype).T for w in weight.split(rows)], dim=1)


def back_project(rows: Tensor, weight: Tensor, budget: int = 1 << 28) -> Tensor:
    """R W (n, d) in the dtype of R (n, V); W is cast in parts of at most `budget` bytes."""
    if weight.dtype == rows.dtype:
        return ops.product(rows, weight)
    size = max(1, budget // (weight.shape[1] * rows.element_size()))
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], size):
        part = weight[start : start + size].to(rows.dtype)
        out += rows[:, start : start + size] @ part
    return out


# --------------------------------------------------------------------------- finding it


def linear_head(base: Any) -> nn.Linear:
    """The linear layer that makes the logits, inside of what adapters put around it.

    A wrapper (peft's modules_to_save) is run on one token: the layer is the only linear one that
    runs, if its output is the wrapper's.

    Raises:
        UnsupportedModelError: If the head is no such layer; the message names what it is.
    """
    head = base.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(base).__name__} has no output embedding (lm_head)")
    if is_quantised(head):
        raise UnsupportedModelError(
            f"the head is quantised ({type(head).__name__}), and lddyn takes the head in closed "
            "form: leave lm_head out of the quantisation (llm_int8_skip_modules, "
            "modules_to_not_convert)"
        )
    if isinstance(head, nn.Linear) and not head._modules:
        return head
    inside = _only_linear(head)
    if inside is not None:
        return inside
    kind = f"{type(head).__module__}.{type(head).__name__}"
    if "trainable_tokens" in kind.lower() or "TrainableTokens" in kind:
        raise UnsupportedModelError(
            f"the head shares the trained tokens of the embedding ({kind}, trainable_token_indices "
            "on tied weights), and lddyn takes the head as one matrix: train the whole embedding "
            "(modules_to_save=['embed_tokens'], ensure_weight_tying=True), or untie the head"
        )
    if any(p.requires_grad for p in head.parameters()) or hasattr(head, "base_layer"):
        raise UnsupportedModelError(
            f"the head carries an adapter ({kind}), and lddyn takes the head as one matrix: leave "
            "lm_head out of target_modules, train it whole (modules_to_save=['lm_head']), or merge "
            "the adapter (merge_and_unload)"
        )
    raise UnsupportedModelError(f"the head must be one linear layer, got {kind}")


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
