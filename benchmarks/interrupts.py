"""Ctrl-C at chosen lines of the functions that change a model, for tests and for `make torture`."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from lddyn.engine.turns import turn_of
from lddyn.engine.undo import SHIELDED

Place = tuple[str, int]  # a function's qualified name, and a line of its file


def state(model: nn.Module) -> dict[Hashable, Any]:
    """Everything that an analysis may change of a model, of its turn, and of the thread."""
    everything: dict[Hashable, Any] = {"turn": vars(turn_of(model)) | {"lock": None}}
    for name, module in model.named_modules():
        own = {k: v if isinstance(v, bool | int | str) else id(v) for k, v in vars(module).items()}
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v}
        config = vars(module).get("config")
        everything[name] = own, hooks, None if config is None else repr(config)
    for name, parameter in model.named_parameters():
        hooks = [id(hook) for hook in (parameter._backward_hooks or {}).values()]
        everything["parameter", name] = parameter.requires_grad, hooks
    everything["thread"] = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        signal.getsignal(signal.SIGINT),
    )
    return everything


def _chosen(code: CodeType) -> bool:
    return code in SHIELDED or code.co_filename == contextlib.__file__


@contextlib.contextmanager
def _traced(call: FunctionType) -> Iterator[None]:
    """Calls a function at every line of the shielded functions, and between them and a `with`."""

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            call(frame)
        return line

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return line if _chosen(frame.f_code) else None

    # A signal that arrives while these run arrives in a frame that is not there without tracing.
    SHIELDED.update(function.__code__ for function in (line, enter, call))
    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def places(work: Callable[[], object]) -> list[Place]:
    """Every line of a shielded function that `work` runs, once for each time that it runs it."""
    lines: list[Place] = []
    with _traced(lambda frame: lines.append((frame.f_code.co_qualname, frame.f_lineno))):
        work()
    return lines


def interrupted(work: Callable[[], object], number: int) -> bool | None:
    """Runs `work` and sends Ctrl-C at the line of this number in `places(work)`.

    Returns:
        Whether `KeyboardInterrupt` came, in `work` or within a second after it; None if `work` ran
        fewer such lines this time (what is computed once, or closed by the garbage collector).
    """
    count = 0

    def send(frame: FrameType) -> None:
        nonlocal count
        count += 1
        handler = signal.getsignal(signal.SIGINT)
        if count == number + 1 and callable(handler):
            handler(signal.SIGINT, frame)  # as Python calls it between two instructions

    try:
        with _traced(send):
            work()
        if count <= number:
            return None
        for _ in range(1000):
            time.sleep(0.001)
    except KeyboardInterrupt:
        return True
    return False
