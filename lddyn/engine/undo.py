"""Changes of a model, and how they are reversed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch
from torch.amp.autocast_mode import autocast
from torch.overrides import TorchFunctionMode

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Functions that change a model or a thread's modes, or change them back.
SHIELDED: set[CodeType] = {
    method.__code__
    for kind in (
        TorchFunctionMode,
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        autocast,
    )
    for method in (kind.__enter__, kind.__exit__)
}


def shielded(function: _Function) -> _Function:
    """Marks a function that changes a model: Ctrl-C waits while it is on the main thread's stack.

    A generator under `contextlib.contextmanager` is on the stack while it enters and leaves. It is
    not while the body of its `with` runs, which stays interruptible.
    """
    SHIELDED.add(function.__code__)
    return function


class Undo:
    """Changes, and how to reverse them: the last one first, each of them once.

    An action is recorded before its change is made, and forgotten after it has run. Actions set
    fixed values, so that running one twice, or without its change, does no harm: after an
    interruption, `restore()` can be called again and continues where it was.
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def add(self, action: Callable[[], object]) -> None:
        """Records how to reverse a change that is about to be made."""
        self._actions.append(action)

    @shielded
    def set(self, owner: object, name: str, value: object) -> None:
        """Sets an attribute of one object, in its own `__dict__`, until `restore()`."""
        attributes = owner.__dict__
        if name in attributes:
            self.add(functools.partial(attributes.__setitem__, name, attributes[name]))
        else:
            self.add(functools.partial(attributes.pop, name, None))
        attributes[name] = value

    @shielded
    def restore(self) -> None:
        """Reverses all changes; raises the first error of an action after all have run."""
        failed: Exception | None = None
        while self._actions:
            try:
                self._actions[-1]()
            except Exception as error:
                failed = failed or error
            self._actions.pop()
        if failed is not None:
            raise failed

    def __enter__(self) -> Undo:
        return self

    @shielded
    def __exit__(self, *exception: object) -> None:
        self.restore()
