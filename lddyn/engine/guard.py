"""Changes to a model while it is analysed, and their undoing.

Every change goes through an `Undo`, which records how to reverse it before it is made. Only the
model itself is changed (attributes of its own modules), never a class or a Python module, so that
other models run undisturbed in other threads. `turns` keeps other threads from a changed model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lddyn.engine import layers
from lddyn.engine.door import device_of, replaced_forwards
from lddyn.engine.quantised import keep_layout
from lddyn.engine.turns import Gate, Hold, switching, turn
from lddyn.engine.undo import Undo, shielded
from lddyn.memory import is_out_of_memory, name_memory

_P = ParamSpec("_P")

_R = TypeVar("_R")


# --------------------------------------------------------------------------- modes of a model


@contextlib.contextmanager
@shielded
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and the model's plain, uncompiled forward; as before afterwards.

    Other threads that want the same model wait.
    """
    with switching(model) as undo:
        modules = list(model.modules())
        evaluate(modules, undo)
        implement(modules, QUIET, undo)
        strip_forwards(model, undo)
        device = device_of(model).type
        with torch.autocast(device, enabled=False), eager_code(modules):
            yield


def strip_forwards(model: nn.Module, undo: Undo) -> None:
    """Sets aside what trainers put in the place of the model's forward; see `door`."""
    for module, forward in replaced_forwards(model):
        undo.set(module, "forward", forward)


def evaluate(modules: Sequence[nn.Module], undo: Undo) -> None:
    """Puts all modules of a model in evaluation mode; quantised layers keep their layout."""
    keep_layout(modules, undo)
    for module in modules:
        if module.training:
            undo.add(functools.partial(setattr, module, "training", True))
            module.training = False


ATTENTION, EXPERTS = "_attn_implementation_internal", "_experts_implementation_internal"

# Without the outputs that nobody reads here: hidden states and attentions install hooks, a
# mixture's router logits are made into a loss, and XLNet's memories are detached, which looks like
# a gradient that is stopped. Keys of transformers' configs.
QUIET: dict[str, object] = {
    "output_hidden_states": False,
    "_output_attentions": False,
    "output_router_logits": False,
    "use_mems_eval": False,
    "return_dict": True,
}


def implement(modules: Sequence[nn.Module], names: Mapping[str, object], undo: Undo) -> None:
    """Sets keys of a model's configs, such as the name of its registered attention.

    Its modules get changed copies of their configs, because other models may share the configs.
    """
    configs = {id(c): c for c in (m.__dict__.get("config") for m in modules) if c is not None}
    if not any(getattr(c, n, v) != v for c in configs.values() for n, v in names.items()):
        return
    changed = {
        key: copy.copy(config)
        for key, config in configs.items()
        if any(hasattr(config, name) for name in names)
    }
    for config in changed.values():
        for name, value in names.items():
            if hasattr(config, name):
                setattr(config, name, value)
        for name, part in vars(config).items():
            if id(part) in changed:  # a config inside another one
                config.__dict__[name] = changed[id(part)]
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in changed:
                undo.set(module, name, changed[id(value)])


@contextlib.contextmanager
@shielded
def attending(model: nn.Module, implementation: str) -> Iterator[None]:
    """Another attention of transformers' AttentionInterface within, by its registered name."""
    with switching(model) as undo:
        implement(list(model.modules()), {ATTENTION: implementation}, undo)
        yield


def require(parameters: Iterable[Tensor], undo: Undo) -> None:
    """Switches the gradients of frozen parameters on; off again whatever they were."""
    for parameter in parameters:
        undo.add(functools.partial(parameter.requires_grad_, False))
        parameter.requires_grad_(True)


def freeze(modules: Sequence[nn.Module], undo: Undo) -> None:
    """Switches the gradients of all parameters off, and the hooks that change gradients."""
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter.requires_grad:
                undo.add(functools.partial(parameter.requires_grad_, True))
                parameter.requires_grad_(False)
            _set_hooks_aside(parameter, undo)


def _set_hooks_aside(parameter: Tensor, undo: Undo) -> None:
    """Removes the hooks of a weight but that of its turn, in place: a pass may be waiting in it."""
    hooks = parameter._backward_hooks or {}
    others = {key: hook for key, hook in hooks.items() if not isinstance(hook, Hold)}
    if not others:
        return
    undo.add(functools.partial(hooks.update, others))
    for hook in hooks.values():
        if isinstance(hook, Hold):
            undo.add(functools.partial(setattr, hook, "removed", ()))
            hook.removed = tuple(others.values())
    for key in others:
        del hooks[key]


REACHED = "max_seq_len_cached"  # the length for which a dynamic rotary embedding was scaled


def reset_scaling(model: nn.Module) -> None:
    """Sets dynamic rotary embeddings back, whose angles depend on the longest sequence so far."""
    for module in model.modules():
        start = getattr(module, "original_max_seq_len", None)
        if start is None:
            continue
        for name in [n for n in vars(module) if n.endswith(REACHED)]:
            setattr(module, name, start)
            prefix = name.removesuffix(REACHED)
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is not None:
                module._buffers[f"{prefix}inv_freq"] = original


def keep_buffers(modules: Sequence[nn.Module], undo: Undo, most: int = 1 << 16) -> None:
    """Remembers buffers of up to `most` elements: some rotary embeddings rewrite theirs."""

    def put_back(buffers: dict[str, Tensor | None], name: str, own: Tensor, values: Tensor) -> None:
        buffers[name] = own
        if not own.is_meta and not torch.equal(own, values):
            own.copy_(values)

    for module in modules:
        for name, value in vars(module).items():
            if name.endswith(REACHED):
                undo.add(functools.partial(setattr, module, name, value))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.numel() <= most:
                undo.add(functools.partial(put_back, module._buffers, name, buffer, buffer.clone()))


def register_attention() -> None:
    """Registers lddyn's attention and its mask with transformers, under the name "lddyn"."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register("lddyn", layers.attention)
    AttentionMaskInterface.register("lddyn", eager_mask)


# --------------------------------------------------------------------------- compiled code


_STANCES = threading.Lock()  # held while these two change

_eager_users = 0

_stance = contextlib.ExitStack()


@contextlib.contextmanager
@shielded
def eager_code(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Runs compiled parts of a model as plain Python, so that changes in its modules take effect.

    torch.compile has one stance for all threads. It is therefore changed only for a model with
    compiled parts, and changed back when the last of several such models is done.
    """
    global _eager_users
    if not _has_compiled_parts(modules):
        yield
        return
    with _STANCES:
        _eager_users += 1
        if _eager_users == 1:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _STANCES:
            _eager_users -= 1
            if _eager_users == 0:
                _stance.close()


def _has_compiled_parts(modules: Sequence[nn.Module]) -> bool:
    if "torch._dynamo" not in sys.modules:
        return False
    files = set()
    for module in modules:
        own = module.__dict__.get("forward")
        call = getattr(module, "_compiled_call_impl", None)
        if hasattr(module, "_orig_mod") or (call.compiled if isinstance(call, Gate) else call):
            return True
        if hasattr(own, "_torchdynamo_orig_callable"):
            return True
        files.add(type(module).__module__)
    return any(_compiles(sys.modules[file]) for file in files if file in sys.modules)


def _compiles(file: types.ModuleType) -> bool:
    """Whether a Python module has compiled functions."""
    functions = (value for value in vars(file).values() if isinstance(value, types.FunctionType))
    return any("_torchdynamo_orig_callable" in vars(function) for function in functions)


# --------------------------------------------------------------------------- modes of a thread


def undisturbed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a function outside of the caller's inference mode and autocast, in this thread's turn.

    The function's first argument holds the model whose turn it is: a module, an Anatomy, a trace,
    or an operator over traces. An error of the allocator leaves with a remedy in its message.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        model = _module_in(args[0] if args else kwargs.get("model"))
        own = contextlib.nullcontext() if model is None else turn(model)
        with own, torch.inference_mode(False), contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            try:
                return function(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    name_memory(
                        error,
                        kwargs.get("memory", getattr(args[0] if args else None, "memory", None)),
                    )
                raise

    return run


def _module_in(value: object) -> nn.Module | None:
    """The module of a model, an Anatomy, a trace, or an operator over traces; None without one."""
    for name in ("observed", "anatomy", "model"):
        if not isinstance(value, nn.Module):
            value = getattr(value, name, value)
    return value if isinstance(value, nn.Module) else None


def no_autocast(device: torch.device) -> torch.autocast:
    """A context in which operations of this device keep the dtypes of their inputs."""
    return torch.autocast(device_type=device.type, enabled=False)


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
        """Runs one torch function, with float64 in the place of float32."""
        if getattr(func, "__name__", "") == "float" and isinstance(args[0], Tensor):
            return args[0].double()

        def up(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(up, args), **{k: up(v) for k, v in (kwargs or {}).items()})
