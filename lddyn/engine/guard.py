"""Context managers that change a model for an analysis and restore it afterwards."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lddyn.engine import layers

LOCK = threading.RLock()

_P = ParamSpec("_P")

_R = TypeVar("_R")


def register_attention() -> None:
    """Registers lddyn's attention and its mask with transformers, under the name "lddyn"."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register("lddyn", layers.attention)
    AttentionMaskInterface.register("lddyn", eager_mask)


def undisturbed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a function outside of the caller's inference mode and autocast."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; every module in its own mode again afterwards. One thread a time."""
    with LOCK:
        modes = [(m, m.training) for m in model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


ATTENTION, EXPERTS = "_attn_implementation_internal", "_experts_implementation_internal"


@contextlib.contextmanager
def implemented_by(model: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
    """Other implemented_by within, by the configs' key and their registered name."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}.values()
    saved = [(c, key, getattr(c, key)) for c in configs for key in names if hasattr(c, key)]
    try:
        for config, key, _ in saved:
            setattr(config, key, names[key])
        yield
    finally:
        for config, key, before in saved:
            setattr(config, key, before)


@contextlib.contextmanager
def attending(model: nn.Module, implementation: str) -> Iterator[None]:
    """Another attention of transformers' AttentionInterface within, by its registered name."""
    with LOCK, implemented_by(model, {ATTENTION: implementation}):
        yield


class true_float64(TorchFunctionMode):
    """Context in which a `.double()` Hugging Face model really computes in float64.

    Most architectures cast norms, softmax and rotary angles to float32 whatever their weights are;
    inside this context every such cast goes to float64 instead.

    Example:
        >>> import lddyn
        >>> with lddyn.true_float64():
        ...     torch.zeros(1, dtype=torch.float64).to(torch.float32).dtype
        torch.float64
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "float" and isinstance(args[0], Tensor):
            return args[0].double()

        def up(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(up, args), **{k: up(v) for k, v in (kwargs or {}).items()})


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a module, or of a Python module, and puts back what was there."""
    missing = object()
    previous = owner.__dict__.get(name, missing)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if previous is missing:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = previous


def no_autocast(device: torch.device) -> Any:
    """A context in which operations of this device keep the dtypes of their inputs."""
    return torch.autocast(device_type=device.type, enabled=False)
