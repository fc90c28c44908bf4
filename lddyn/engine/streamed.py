"""Access to weights that are in memory only at times, as in a streamed model (`lddyn.stream`)."""

from __future__ import annotations

from torch import Tensor


def is_streamed(parameter: Tensor) -> bool:
    """Whether a weight is in memory only while its block is used; at other times it is NaN."""
    return hasattr(parameter, "fetch")


def present(tensor: Tensor) -> Tensor:
    """The tensor itself, after the block of a streamed weight was read into memory."""
    getattr(tensor, "fetch", lambda: None)()
    return tensor
