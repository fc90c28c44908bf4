"""Frozen weights that a quantiser holds in fewer bits: bitsandbytes, HQQ, torchao, quanto.

Such a layer is no product that the watch knows, so it runs as it is, and autograd's backward of
the layer is its derivative: results equal autograd of the same model. What is left to do here: keep
a layer from changing under the analysis, know how precisely it computes, and put plain weights in
its place where a copy of the model is to compute in float64.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lddyn.engine.undo import Undo

# What bitsandbytes logs at every product with 8-bit weights.
_CHATTER = "bitsandbytes.autograd._functions"


def keep_layout(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for inference, and unpacks packed ones.

    On a CPU with AVX512-BF16, a layer in evaluation mode packs its weight in its first pass without
    a gradient. The packed layer has no backward: all gradients below it are lost, also in training
    afterwards. Unpacking is for good, as training needs it; the layer packs again by itself.
    """
    unpacked, seen = 0, False
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            undo.set(module, "support_avx512bf16_for_cpu", False)
        weight = module._parameters.get("weight")
        seen |= type(module).__module__.startswith("bitsandbytes.")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            _unpack(weight)
            unpacked += 1
    if seen:
        undo.set(logging.getLogger(_CHATTER), "disabled", True)
    if unpacked:
        warnings.warn(
            f"bitsandbytes had packed {unpacked} 4-bit weights for inference on this CPU, in an "
            "earlier pass in evaluation mode; no gradient flows through packed weights, in "
            "training either. lddyn unpacked them; their scales stay rounded to bfloat16",
            stacklevel=2,
        )


def _unpack(weight: Any) -> None:
    from bitsandbytes import functional

    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
        weight.data, weight.quant_state
    )


def shared_state(model: nn.Module) -> Iterator[object]:
    """Objects besides parameters that hold the frozen weights of layers: a copy can share them."""
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if module._modules or not own or any(p.requires_grad for p in own):
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, int | float | str | torch.dtype | None):
                continue
            held = vars(value).values() if hasattr(value, "__dict__") else [value]
            if any(isinstance(x, Tensor) for x in held):
                yield value


def computing_dtypes(model: nn.Module) -> Iterator[Tensor]:
    """An empty tensor of every number type that layers compute in, whatever their weights have."""
    named = {getattr(m, "compute_dtype", None) for m in model.modules()}
    named |= {torch.float16 for m in model.modules() if type(m).__name__ == "Linear8bitLt"}
    for dtype in named:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            yield torch.empty(0, dtype=dtype)


# --------------------------------------------------------------------------- plain weights


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is none of a quantiser's own class."""
    return type(tensor) in (Tensor, nn.Parameter)


def plain_values(tensor: Tensor) -> Tensor:
    """The values of a tensor as a plain tensor; those of torchao and quanto are dequantised."""
    values = tensor.detach()
    return values.dequantize() if hasattr(values, "__tensor_flatten__") else values


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a frozen linear layer that has no plain matrix for its weight."""
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    own = [p for p in module._parameters.values() if p is not None]
    if None in shape or module._modules or any(p.requires_grad for p in own):
        return False
    weight = module._parameters.get("weight")
    return (
        weight is None
        or not (is_plain(weight) and weight.is_floating_point())
        or tuple(weight.shape) != shape
    )


def dequantised(module: nn.Module, rows: int = 1024) -> nn.Linear:
    """The frozen linear layer that has the value of a quantised one at 0, and its derivative.

    The weight is what the layer's own backward multiplies by, so it serves every quantiser.

    Args:
        module: A quantised layer, see `is_quantised`.
        rows: Rows of the weight that are read in one pass.

    Cost: a forward and a backward pass over `out_features` tokens.
    """
    device = next(module.parameters()).device
    height, width = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    linear = nn.Linear(width, height, device=device, dtype=torch.float32).requires_grad_(False)
    for start in range(0, height, rows):
        count = min(rows, height - start)
        x = torch.zeros(1, count, width, device=device, requires_grad=True)
        picked = torch.zeros(1, count, height, device=device)
        picked[0, :, start : start + count] = torch.eye(count, device=device)
        with torch.enable_grad():
            out: Tensor = module(x)
        (gradient,) = torch.autograd.grad(out, x, picked.to(out.dtype))
        linear.weight[start : start + count] = gradient[0]
        linear.bias[:] = out[0, 0].detach()
    return linear


def dequantise(model: nn.Module) -> None:
    """Puts plain linear layers in the place of a model's quantised ones."""
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if is_quantised(module):
                parent, _, own = name.rpartition(".")
                model.get_submodule(parent)._modules[own] = dequantised(module)
