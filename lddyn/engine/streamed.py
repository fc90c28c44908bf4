"""Parameters whose values are read when they are used (`lddyn.stream`)."""

from __future__ import annotations

from torch import Tensor


def is_streamed(parameter: Tensor) -> bool:
    """Whether a weight is in memory only while its block is used (see `stream`), else NaN."""
    return hasattr(parameter, "fetch")


def present(tensor: Tensor) -> Tensor:
    """A weight or buffer with its values in memory: the block of a streamed one is read."""
    getattr(tensor, "fetch", lambda: None)()
    return tensor
