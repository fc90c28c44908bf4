"""A vector of all trainable values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lddyn.engine.sharded import local

__all__ = ["Flat"]


class Flat:
    """A vector of all trainable values, float32 or wider, with a view of every parameter's shape.

    Of parameters that are split over processes it has this process's parts.

    Attributes:
        vector: (P,) on the model's device.
        views: Name → tensor of the parameter's shape.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        parameters = {name: local(p) for name, p in parameters.items()}
        first = next(iter(parameters.values()))
        sizes = [p.numel() for p in parameters.values()]
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.vector = torch.zeros(sum(sizes), device=first.device, dtype=dtype)
        parts = zip(parameters.items(), self.vector.split(sizes), strict=True)
        self.views = {name: part.view(p.shape) for (name, p), part in parts}

    def copy(self, values: Mapping[str, Tensor]) -> None:
        """Takes the values of some parameters, or of tensors of their shapes."""
        for name, value in values.items():
            self.views[name].copy_(local(value.detach()))
