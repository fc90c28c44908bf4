"""The decoder blocks of a model: where they are, and the arguments that pass between them.

A block's call is split into the hidden state, which the engine follows, and the other arguments
(masks, rotary angles, position ids), which a replay passes on unchanged, cut to the rows or the
prefix that it runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.errors import UnsupportedModelError


class SeamError(UnsupportedModelError):
    """A model cannot be replayed block by block; as a whole it can."""


def at_rows(value: Any, length: int, rows: Tensor) -> Any:
    """A block's arguments for some of its `length` positions: angles, queries of masks, ids."""
    if isinstance(value, Tensor):
        axis = {1: 0, 2: 1, 3: 1, 4: 2}.get(value.dim())
        if axis is None or value.shape[axis] != length:
            return value
        return value.index_select(axis, rows)
    if isinstance(value, dict):
        return {k: at_rows(v, length, rows) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(at_rows(v, length, rows) for v in value)
    return value


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the ModuleList that holds most of the parameters; empty without one."""
    candidates = [
        (sum(p.numel() for p in m.parameters()), -depth, m)
        for depth, (name, m) in enumerate(model.named_modules())
        if isinstance(m, nn.ModuleList) and len(m) > 0
    ]
    if not candidates:
        return []
    layers = max(candidates, key=lambda c: (c[0], c[1]))[2]
    depth = getattr(model.config, "num_hidden_layers", len(layers))
    return list(layers)[:depth]


# Runs block i in place of its own forward: (i, original forward, args, kwargs) -> its result.
RunBlock = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# The arguments of one block besides the hidden state.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def bind_block(block: RunBlock, i: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of block i that calls `block(i, original, args, kwargs)`."""
    return lambda *args, **kwargs: block(i, original, args, kwargs)


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden state and the other arguments of a block call."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


def join_hidden(x: Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments of a block whose hidden state is x."""
    return (x, *args)


def check_side_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises if an argument besides the hidden state carries a gradient: it would be lost.

    Raises:
        SeamError: With the argument's name or place.
    """
    for key, value in [*enumerate(args), *kwargs.items()]:
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise SeamError(
                    f"argument {key!r} of the blocks depends on trainable parameters of the "
                    "front; lddyn follows the hidden state only"
                )


def is_slice(short: Any, whole: Any) -> bool:
    """Whether nested arguments are those of a longer call, cut to their own sizes."""
    if isinstance(short, Tensor):
        if not isinstance(whole, Tensor) or short.dim() != whole.dim():
            return False
        cut = whole[tuple(slice(0, n) for n in short.shape)]
        if not short.is_floating_point() or short.numel() == 0:
            return torch.equal(short, cut)
        return torch.allclose(short, cut, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(short, dict):
        return all(is_slice(v, whole.get(k)) for k, v in short.items())
    if isinstance(short, tuple | list):
        same = isinstance(whole, tuple | list) and len(short) == len(whole)
        return same and all(is_slice(a, b) for a, b in zip(short, whole, strict=True))
    return True
