"""Threads and interrupts around a model that is being changed.

Analyses of one model take turns (`turn`). While one of them has switched the model (evaluation
mode, another attention, replaced forwards), a forward pass in any other thread stops at the next
module that it enters, and goes on when the model is whole again (`switching`). Other models run
undisturbed. Ctrl-C is postponed while a guard changes the model or changes it back (`guard`).

No hook stays on a model. A module's `__call__` first asks for the instance's `_compiled_call_impl`,
which torch leaves out of copies and pickles; a gate stands there for as long as the model is
switched. A forward pass that began before it is seen on its thread's stack, and is let finish the
module that it is in.

A backward pass of another thread would lose the gradients of weights that an analysis has frozen.
It waits, too: at the first weight that it reaches, in a hook (`Hold`) for as long as the model is
switched. An optimizer of another thread cannot be stopped; the analysis then raises an error.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.engine.door import inside_adapters
from lddyn.engine.streamed import is_streamed
from lddyn.engine.undo import SHIELDED, Undo, shielded

# --------------------------------------------------------------------------- interrupts


def _changes_a_model(frame: FrameType | None) -> bool:
    """Whether the code that a signal interrupted is inside of a guard, and does not only wait."""
    if frame is not None and frame.f_code.co_filename == contextlib.__file__:
        return True  # between a guard and its `with`
    while frame is not None:
        if frame.f_code is _pause.__code__:
            return False
        if frame.f_code in SHIELDED:
            return True
        frame = frame.f_back
    return False


class _Interrupts:
    """The handler of SIGINT while a model may be changed, around the one that was there before."""

    def __init__(self, before: Callable[[int, FrameType | None], Any]):
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _changes_a_model(frame):
            _thread.start_new_thread(_again, (number,))  # takes no lock of Python's
        else:
            self.before(number, frame)


def _again(number: int) -> None:
    """Sends the main thread a signal that came at a bad moment once more."""
    time.sleep(0.001)
    signal.pthread_kill(threading.main_thread().ident or 0, number)  # also ends a wait in C


@contextlib.contextmanager
@shielded
def _interrupts_wait() -> Iterator[None]:
    """Postpones Ctrl-C within guards; does nothing outside of the main thread."""
    before = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread()
    if not mine or not callable(before) or isinstance(before, _Interrupts):
        yield
        return
    try:
        signal.signal(signal.SIGINT, _Interrupts(before))
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------------------------- turns


class _Turn:
    """Which thread analyses a model, and how often it has switched it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None
        self.depth = 0
        self.switched = 0
        self.moved = False

    @property
    def mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self.owner == threading.get_ident()

    def take(self) -> bool:
        """Takes the turn if it is free."""
        if not self.lock.acquire(blocking=False):
            return False
        self.owner = threading.get_ident()
        return True


_TURNS: weakref.WeakKeyDictionary[nn.Module, _Turn] = weakref.WeakKeyDictionary()

_REGISTRY = threading.Lock()  # held while `_TURNS` is read or written

_WANTS: dict[int, _Turn] = {}  # thread → the turn that it waits for


def turn_of(model: nn.Module) -> _Turn:
    """The turn of a model: one for a model, its adapters and its wrappers."""
    with _REGISTRY:
        return _TURNS.setdefault(inside_adapters(model), _Turn())


@contextlib.contextmanager
@shielded
def turn(model: nn.Module) -> Iterator[None]:
    """Other threads that analyse this model wait until this thread is done.

    Raises:
        RuntimeError: If two threads would wait for each other's models for ever.
    """
    with _interrupts_wait():
        state = turn_of(model)
        if not state.mine:
            _wait(state, state.take)
        first = not state.depth
        state.depth += 1
        try:
            before = _versions(model) if first else []
            yield
            if not state.moved and any(p._version != version for p, version in before):
                raise RuntimeError(
                    "the model's weights were changed while it was analysed, by another thread: "
                    "do not take optimizer steps on a model beside an analysis of it"
                )
        finally:
            state.depth -= 1
            if not state.depth:
                state.owner, state.moved = None, False
                state.lock.release()


def _versions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Each weight that trains, with the number of its changes in place.

    Not streamed ones, which are read-only and come and go; of the frozen ones, peft's LoRA on
    packed experts sets some anew in every forward pass. None of RWKV, which scales its weights
    itself in its first pass in another mode.
    """
    if any("layers_are_rescaled" in vars(module) for module in model.modules()):
        return []
    return [
        (weight, weight._version)
        for weight in model.parameters()
        if weight.requires_grad and not weight.is_inference() and not is_streamed(weight)
    ]


@contextlib.contextmanager
@shielded
def switching(model: nn.Module, *, moves: bool = False) -> Iterator[Undo]:
    """This thread's turn; passes of others wait, so that the model may be changed.

    Args:
        model: The model.
        moves: Whether the weights are changed, too.

    Yields:
        An Undo, whose changes are reversed on exit.
    """
    with turn(model), Undo() as undo:
        state = turn_of(model)
        undo.add(functools.partial(setattr, state, "switched", state.switched))
        state.switched += 1
        state.moved |= moves
        if state.switched == 1:
            modules = {id(module): module for module in (model, *inside_adapters(model).modules())}
            modules |= {id(module): module for module in model.modules()}
            for module in modules.values():
                own = module.__dict__.get("_compiled_call_impl")
                undo.set(module, "_compiled_call_impl", Gate(state, module, own))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    undo.add(parameter.register_hook(Hold(state, parameter)).remove)
            _wait(state, lambda: not _others_inside(modules))
        yield undo


class Gate:
    """What a module's `__call__` runs while its model is switched: other threads wait here."""

    def __init__(self, state: _Turn, module: nn.Module, compiled: Callable[..., Any] | None):
        self.state, self.compiled = state, compiled
        self.module = weakref.ref(module)  # no cycle of references

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Waits for the turn's owner, unless it is the one that calls; then calls the module."""
        state = self.state
        if not state.mine:
            _wait(state, lambda: not state.switched)
        module: Any = self.module()
        return (self.compiled or module._call_impl)(*args, **kwargs)


class Hold:
    """A weight's hook while its model is switched: backward passes of other threads wait here.

    Attributes:
        removed: Hooks of the weight that the analysis has set aside; such a pass needs them.
    """

    __torch_unserializable__ = True  # torch.save of a weight leaves it out without a warning

    def __init__(self, state: _Turn, parameter: Tensor):
        self.state, self.parameter = state, weakref.ref(parameter)
        self.removed: tuple[Callable[[Tensor], Tensor | None], ...] = ()

    def __call__(self, gradient: Tensor) -> Tensor:
        """Waits, unless the pass is that of the turn's owner; returns the gradient to add."""
        state, parameter = self.state, self.parameter()
        # A GPU's backward runs in threads of its own; the owner's reaches no frozen weight.
        on_cpu = gradient.device.type == "cpu"
        if parameter is None or state.mine or (not on_cpu and parameter.requires_grad):
            return gradient
        removed = self.removed
        _wait(state, lambda: not state.switched or (not on_cpu and parameter.requires_grad))
        for hook in removed:
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient


# --------------------------------------------------------------------------- waiting


def _pause() -> None:
    """Waits a moment. A thread that is in here changes nothing and asks again afterwards."""
    time.sleep(0.001)


def _wait(state: _Turn, ready: Callable[[], bool]) -> None:
    """Waits until `ready`, unless that can never be."""
    me, pauses = threading.get_ident(), 0
    try:
        while not ready():
            _WANTS[me] = state
            _pause()
            pauses += 1
            if pauses % 256 == 0 and _in_a_circle(me):
                raise RuntimeError(
                    "two threads analyse two models, and each needs the model of the other one (as "
                    "its reference, for instance): run these two analyses one after the other"
                )
    finally:
        _WANTS.pop(me, None)


def _in_a_circle(thread: int) -> bool:
    """Whether the turn that a thread waits for is held by one that waits for this thread."""
    holder: int | None = thread
    for _ in range(len(_WANTS) + 1):
        wanted = _WANTS.get(holder) if holder is not None else None
        holder = wanted.owner if wanted is not None else None
        if holder == thread:
            return True
    return False


_CALLS = {nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__}


def _others_inside(modules: dict[int, nn.Module]) -> bool:
    """Whether another thread is in a forward pass of one of these modules, or in a backward pass.

    Which weights a backward pass reaches is not known; analyses themselves run none that adds up
    gradients (`torch.autograd.grad` is another function).
    """
    me = threading.get_ident()
    return any(
        _is_inside(frame, modules)
        for thread, frame in sys._current_frames().items()
        if thread != me
    )


def _is_inside(frame: FrameType | None, modules: dict[int, nn.Module]) -> bool:
    inside = False
    while frame is not None:
        if frame.f_code is _pause.__code__:
            return False  # it asks again before it goes on
        if frame.f_code in _CALLS:
            inside |= id(frame.f_locals.get("self")) in modules
        inside |= frame.f_code is torch.autograd.backward.__code__
        frame = frame.f_back
    return inside
