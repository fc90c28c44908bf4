"""Norms, activations and rotary embeddings of a model, replaced by their closed forms in `layers`.

A module is recognised by what it computes, not by its name: in the first replay its output is
compared with the closed form, and the module is not replaced if they differ.

Norms and activations are replaced by a `forward` of their instance. A rotary embedding is a Python
function that the attention's `forward` finds among the globals of its file; the instance gets a
copy of `forward` with other globals, so that other models of the same class do not see it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lddyn.engine import layers
from lddyn.engine.ledger import Gain, Watch
from lddyn.engine.trial import ROTARY, Trial, UnfitError
from lddyn.engine.undo import Undo

_ROTATION = "apply_rotary_pos_emb"  # what transformers' files call their rotary embedding

ELEMENTWISE = Trial("an activation acts on every element by itself")

ROTATES = Trial("a rotary embedding turns halves of each head")

Forward = Callable[..., Any]


class _Owner:
    """Owns the verdicts of a Recogniser's trials.

    It refers to nothing, so that no cycle of references keeps a model in memory.
    """


class Recogniser:
    """What the modules of one model were recognised as.

    Args:
        names: Trainable parameters by id: their canonical names.

    Attributes:
        norms: Each norm-like module's closed form; None: it is run as it is.
        owner: Owns the verdicts on activations (by module) and rotary embeddings (by file).
    """

    def __init__(self, names: dict[int, str]):
        self._names = names
        self.owner = _Owner()
        self.norms: dict[nn.Module, layers.Norm | None] = {}
        self._turned: dict[types.FunctionType, types.FunctionType | None] = {}

    def inherit(self, other: Recogniser, copies: Mapping[nn.Module, nn.Module]) -> None:
        """Takes over what another model's modules were recognised as, for copies of them."""
        self.norms = {copies[m]: form for m, form in other.norms.items() if m in copies}
        for trial in (ELEMENTWISE, ROTATES):
            own = trial.verdicts(self.owner)
            for key, verdict in trial.verdicts(other.owner).items():
                own[copies.get(key, key) if isinstance(key, nn.Module) else key] = verdict

    def replace(
        self, modules: Iterable[nn.Module], head: nn.Module, watch: Watch, undo: Undo
    ) -> None:
        """Replaces modules without children, except the head, by closed forms until `undo`."""
        for module in modules:
            self._replace_rotation(module, undo)
            if module is head or list(module.children()):
                continue
            forward: Forward | None = None
            parameters = list(module.parameters())
            kind = type(module).__module__.split(".")[-1]
            if kind in ("activation", "activations") and not parameters:
                forward = self._activation(module, module.forward, watch)
            elif all(p.dim() == 1 for p in parameters):
                forward = self._norm(module, module.forward, watch)
            if forward is not None:
                undo.set(module, "forward", forward)

    # ----- norms

    def _norm(self, module: nn.Module, original: Forward, watch: Watch) -> Forward:
        def norm(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(x, Tensor) or x.numel() == 0:
                return original(*args, **kwargs)  # type: ignore[no-any-return]
            if module not in self.norms:
                used = _parameters_used(original, x, watch)
                own = {self._names.get(id(p), "") for p in module.parameters()}
                with watch.paused():
                    form = layers.recognise_norm(module, original, x) if used <= own else None
                self.norms[module] = form
            form = self.norms[module]
            if form is None:
                return original(x)  # type: ignore[no-any-return]
            # The parameters may have been replaced since.
            weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
            form = replace(form, weight=weight, bias=bias)
            with torch._C.DisableTorchFunction():
                out, normalized = form(x)
                if out.requires_grad and watch.active:
                    name, bias_name = (self._names.get(id(p)) for p in (weight, bias))
                    edge = get_gradient_edge(out)
                    watch.gains.append(Gain(name, bias_name, normalized, edge))
                return out

        return norm

    # ----- activations

    def _activation(self, module: nn.Module, original: Forward, watch: Watch) -> Forward:
        def activation(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() < 2:
                return original(*args, **kwargs)  # type: ignore[no-any-return]

            def check() -> bool:
                if _parameters_used(original, x, watch):
                    raise UnfitError(f"{type(module).__name__} uses a trainable parameter")
                with watch.paused():
                    return layers.is_elementwise(original, x)

            if not ELEMENTWISE.passes(self.owner, module, check):
                return original(x)  # type: ignore[no-any-return]
            with watch.paused():
                activated = layers.activate(original, x)
            with torch._C.DisableTorchFunction():
                out = activated.output
            watch.activated[id(out)] = (out, out._version, activated)
            return out

        return activation

    # ----- rotary embeddings

    def _replace_rotation(self, module: nn.Module, undo: Undo) -> None:
        own = module.__dict__
        for name in ("forward", "_old_forward"):  # accelerate keeps a forward under that name
            method = own.get(name)
            if name in own:
                function = method.__func__ if isinstance(method, types.MethodType) else None
            else:
                function = getattr(type(module), name, None)
            if isinstance(function, types.FunctionType):
                turned = self._turned_copy(function)
                if turned is not None:
                    undo.set(module, name, types.MethodType(turned, module))

    def _turned_copy(self, function: types.FunctionType) -> types.FunctionType | None:
        if function not in self._turned:
            rotation = functools.partial(_rotation, self.owner)
            self._turned[function] = with_global(function, _ROTATION, rotation)
        return self._turned[function]


def _rotation(owner: _Owner, original: Callable[..., Any], file: str) -> Callable[..., Any]:
    def rotation(*args: Any, **more: Any) -> Any:
        if more or len(args) != 4 or not all(isinstance(x, Tensor) for x in args):
            return original(*args, **more)
        q, k, cos, sin = args
        verdict = ROTATES.verdict(owner, file)
        plain = (
            verdict is not False
            and q.dim() == k.dim() == 4
            and q.shape[0] == k.shape[0]
            and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
            and k.shape[2:] == q.shape[2:]
        )
        # Angles of zero, as of a single first token, fit every convention of pairs.
        if not plain or (verdict is None and not bool(sin.any())):
            return original(q, k, cos, sin)
        with torch._C.DisableTorchFunction():
            turned = tuple(layers.rotate(x, cos[0], sin[0]) for x in (q, k))
        if verdict is None:
            expected = original(q, k, cos, sin)
            limit = ROTARY.of(q.dtype)
            fits = all(
                bool(((x - y).abs().max() <= limit * y.abs().max()).item())
                for x, y in zip(turned, expected, strict=True)
            )
            ROTATES.settle(owner, file, fits, "" if fits else "its values differ")
            if not fits:
                return expected
        return turned

    return rotation


def _parameters_used(original: Forward, x: Tensor, watch: Watch) -> set[str]:
    """Trainable parameters that a module uses, its own or another's; the watch may raise here."""
    before, watch.touched = watch.touched, set()
    taps = len(watch.taps)
    original(x)
    del watch.taps[taps:]
    used, watch.touched = watch.touched, before
    return used


# --------------------------------------------------------------------------- functions


class _Overlay(dict[str, Any]):
    """Globals of a function copy: a few names of its own, and all others as they are in a file."""

    def __init__(self, file: dict[str, Any], own: dict[str, Any]):
        super().__init__(own)
        self._file = file

    def __missing__(self, name: str) -> Any:
        return self._file[name]


def with_global(
    function: types.FunctionType, name: str, value: Callable[[Callable[..., Any], str], Any]
) -> types.FunctionType | None:
    """A copy of a function, and of those it wraps, that finds another value for a global name.

    Args:
        function: The function; it is not changed.
        name: The global name.
        value: Makes the new value from the one in the function's file, and the file's name.

    Returns:
        The copy; None if neither the function nor one that it wraps uses the name.
    """
    code, file = function.__code__, function.__globals__
    uses = name in code.co_names and callable(file.get(name))
    inner = getattr(function, "__wrapped__", None)
    copied = with_global(inner, name, value) if isinstance(inner, types.FunctionType) else None
    cells = function.__closure__ or ()
    held = [copied is not None and _contents(cell) is inner for cell in cells]
    if not uses and not any(held):
        return None
    closure = tuple(
        types.CellType(copied) if inside else cell for cell, inside in zip(cells, held, strict=True)
    )
    if uses:
        changed = value(file[name], str(file.get("__name__")))
        file = _Overlay(file, {name: changed, "__builtins__": file["__builtins__"]})
    copy = types.FunctionType(
        code,
        file,
        function.__name__,
        function.__defaults__,
        closure or None,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
