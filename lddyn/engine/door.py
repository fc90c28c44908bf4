"""Models as trainers hold them: what is around the causal LM, and what was done to its forward.

A trainer wraps the model (torch.compile, DistributedDataParallel, peft), replaces the `forward` of
the instance (TRL's fused head, accelerate's autocast), and splits or offloads its weights.
Everything that lddyn computes begins here:

    unwrapped         the module inside wrappers that add no computation of their own
    shells            the module, its adapters, and the transformers model inside
    check_whole       refuses weights that are not in this process's memory
    device_of         where a model takes its token ids
    check_unmerged    refuses trainable adapters that are merged into their layers
    check_separate    refuses trainable parameters that are views of the same memory
    replaced_forwards instance forwards to set aside while the model is analysed
    copied            a copy of a model that runs its own weights
    frozen_shared     one that shares what does not train
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.engine.quantised import is_plain, shared_state
from lddyn.engine.trial import REPLAYED, Trial, close
from lddyn.engine.undo import Undo, shielded
from lddyn.errors import UnrepeatableModelError, UnsupportedModelError

_SAME_FORWARD = Trial("the forward of the class computes what the instance's does", tolerant=True)

Forward = Callable[..., Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, (Distributed)DataParallel, DeepSpeed's engine and averages.

    A wrapper is recognised by the one submodule it is made around, `module` or `_orig_mod`, and by
    having no output embeddings of its own.
    """
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and not hasattr(type(model), "get_output_embeddings"):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def inside_adapters(model: nn.Module) -> nn.Module:
    """The transformers model inside of wrappers and of peft's adapters."""
    inner: Any = unwrapped(model)
    while hasattr(type(inner), "get_base_model"):
        inner = unwrapped(inner.get_base_model())
    return inner  # type: ignore[no-any-return]


def shells(model: nn.Module) -> list[nn.Module]:
    """The module, the peft modules inside of it, and the transformers model, from outside in."""
    outer, inner = unwrapped(model), inside_adapters(model)
    tuner = getattr(outer, "base_model", None) if outer is not inner else None
    middle = [tuner] if isinstance(tuner, nn.Module) and tuner is not inner else []
    return [outer, *middle, inner] if outer is not inner else [inner]


def check_whole(
    model: nn.Module, *, allow_fsdp2: bool = False, allow_offloaded: bool = False
) -> None:
    """Refuses a model whose weights are not whole in this process's memory.

    Args:
        model: The model.
        allow_fsdp2: Accept weights that `fully_shard` splits: plain passes gather them.
        allow_offloaded: Accept frozen weights that accelerate offloads: plain passes load them.

    Raises:
        UnsupportedModelError: The message says what splits or offloads them, and what to use.
    """
    for module in model.modules():
        if "_fsdp_wrapped_module" in module._modules:
            raise UnsupportedModelError(
                "the model is sharded by FullyShardedDataParallel (FSDP 1), expected whole "
                "parameters or fully_shard: use FSDP 2 (fsdp_version: 2)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                f"parameter {name} is sharded by DeepSpeed ZeRO-3, expected whole parameters: use "
                "ZeRO-2, or FSDP 2"
            )
        if hasattr(parameter, "placements") and not allow_fsdp2:
            raise UnsupportedModelError(
                f"parameter {name} is split over processes by FSDP 2 (fully_shard): save the model "
                "and analyse the saved one, or watch the run with lddyn.integrations, whose passes "
                "gather the weights"
            )
        if parameter.is_meta and parameter.requires_grad and allow_offloaded:
            raise UnsupportedModelError(
                f"parameter {name} trains and is offloaded (accelerate's device_map put it on CPU "
                "or disk), where no optimizer moves it: keep it in memory, or freeze the model and "
                "train an adapter on it (peft), whose weights stay in memory"
            )
        if parameter.is_meta and not allow_offloaded:
            raise UnsupportedModelError(
                f"parameter {name} is on the meta device, as accelerate leaves the weights that it "
                "offloads to CPU or disk: lddyn.stream(folder) reads the weights of a model that "
                "does not fit into memory"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its first parameter that is in memory."""
    devices = [p.device for p in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])


def misplaced(model: nn.Module, device: torch.device) -> str:
    """Which parameters and buffers are on another device, in words; empty: none is.

    Args:
        model: The model.
        device: That of its head, where token ids go.
    """
    tensors = itertools.chain(
        (("parameter", name, p) for name, p in model.named_parameters()),
        (("buffer", name, b) for name, b in model.named_buffers()),
    )
    others = [f"{kind} {name} is on {x.device}" for kind, name, x in tensors if x.device != device]
    if not others:
        return ""
    more = f", as are {len(others) - 1} more," if len(others) > 1 else ""
    return (
        f"{others[0]}{more} and the head on {device}: move the whole model to one device "
        f'(model.to("{device}")), or load it with device_map'
    )


def check_unmerged(model: nn.Module) -> None:
    """Refuses adapters that train and are merged: the layers do not read them, K would be zero.

    Raises:
        UnsupportedModelError: The message names the first of them.
    """
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None) and any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            raise UnsupportedModelError(
                f"the adapter of {name} is merged into its layer, so that no step of it changes "
                "anything: call model.unmerge_adapter() first"
            )


def check_separate(model: nn.Module) -> None:
    """Refuses trainable parameters that overlap in memory: a step moves that memory for each.

    Raises:
        UnsupportedModelError: The message names two of them.
    """
    extents = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_plain(parameter) and parameter.numel():
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            start = parameter.data_ptr()
            extents.append((start, start + (last + 1) * parameter.element_size(), name))
    extents.sort()
    for (start, stop, name), (begin, _, other) in itertools.pairwise(extents):
        if start and begin < stop:
            raise UnsupportedModelError(
                f"the trainable parameters {name} and {other} are views of the same memory (peft "
                "ties LoRA on embedding and head so, with ensure_weight_tying=True), which an "
                "optimizer moves once for each of them, and lddyn takes them for two: leave "
                "lm_head and embed_tokens out of target_modules, or ensure_weight_tying out"
            )


def check_repeatable(logits: Callable[[], Tensor]) -> None:
    """Runs a model twice on the same token ids.

    Args:
        logits: Runs it, in evaluation mode.

    Raises:
        UnrepeatableModelError: If the logits differ.
    """
    with torch.no_grad():
        one, other = logits(), logits()
    if not close(other, one, REPLAYED.of(one.dtype)):
        raise UnrepeatableModelError(
            "two forward passes over the same token ids return different logits: something in the "
            "model draws random numbers in evaluation mode, or keeps a state (a noise hook on the "
            "embeddings does): remove it, or make it depend on module.training"
        )


# --------------------------------------------------------------------------- forwards


def replaced_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """Modules whose own `forward` was replaced, each with the plain forward to run in its place.

    accelerate keeps what it wrapped in autocast as `_original_forward`. Any other replacement
    (TRL's fused head) is set aside where a trial shows that it returns the logits of the class's
    forward.

    Cost: two forward passes over eight tokens, once for each replaced forward.
    """
    for shell in shells(model):
        replaced = shell.__dict__.get("forward")
        if replaced is None:
            continue
        given = shell.__dict__.get("_original_forward", replaced)
        plain = types.MethodType(type(shell).forward, shell)
        if "_hf_hook" not in shell.__dict__ and _same(shell, given, plain):
            yield shell, plain
        elif given is not replaced:
            yield shell, given


def _same(shell: nn.Module, given: Forward, plain: types.MethodType) -> bool:
    function = getattr(given, "__func__", given)
    if function is plain.__func__:
        return True
    key = f"{type(shell).__name__}, {getattr(function, '__qualname__', '')}", id(function)

    @torch.no_grad()
    def check() -> bool:
        embedding: Any = shell.get_input_embeddings()  # type: ignore[operator]
        weight: Tensor = embedding.weight
        ids = torch.arange(3, 11, device=weight.device)[None] % weight.shape[0]
        own, other = (f(input_ids=ids, use_cache=False).logits for f in (plain, given))
        return close(other, own, REPLAYED.of(own.dtype))

    return _SAME_FORWARD.passes(shell, key, check)


def foreign_forward(model: nn.Module) -> str:
    """Explains a forward of the instance that may run another model's modules; "" without one."""
    forward = model.__dict__.get("forward")
    if forward is None:
        return ""
    name = getattr(forward, "__qualname__", type(forward).__name__)
    return (
        f" (the instance has a forward of its own, {name}; in a copy of a model such a function "
        "still runs the original's modules: delete it with `del model.forward`)"
    )


@shielded
def frozen_shared(model: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """A copy of a model that shares frozen parameters and buffers, without gradients.

    Args:
        model: A model, not changed.
        memo: Id of an object → what stands in its place in the copy.

    Raises:
        UnsupportedModelError: As `copied`.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    shared |= {id(b): b for b in [*model.buffers(), *shared_state(model)]}
    with Undo() as undo:
        for parameter in model.parameters():  # gradients are not copied
            undo.add(functools.partial(setattr, parameter, "grad", parameter.grad))
            parameter.grad = None
        return copied(model, shared | dict(memo or {}))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model, without replaced forwards, which would run the original's weights.

    Args:
        model: A model, not changed.
        memo: As in `copy.deepcopy`: objects that the copy shares, besides frozen quantised weights.

    Raises:
        UnsupportedModelError: If another module's forward was replaced by a plain function.
    """
    set_aside = [shell for shell, _ in replaced_forwards(model)]
    shared: dict[int, Any] = {} if memo is None else memo
    # Not every quantiser's class of tensors can be copied.
    shared |= {id(p): p for p in model.parameters() if not (p.requires_grad or is_plain(p))}
    for module in model.modules():  # RecurrentGemma keeps the states of its last pass
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                shared[id(value)] = value.detach()
    moved = copy.deepcopy(model, shared)
    for parameter, own in zip(model.parameters(), moved.parameters(), strict=True):
        hooks = parameter._backward_hooks or {}  # not copied with a parameter
        # Without that of `turns`, which torch.save leaves out, too.
        kept = [i for i in hooks.items() if not hasattr(i[1], "__torch_unserializable__")]
        own._backward_hooks = OrderedDict(kept) if kept else None
    for (name, old), new in zip(model.named_modules(), moved.modules(), strict=True):
        if old in set_aside:
            own = new.__dict__.pop("_original_forward", None)
            del new.__dict__["forward"]
            if "_hf_hook" in old.__dict__:
                new.__dict__["forward"] = own
            continue
        own = old.__dict__.get("forward")
        if own is not None and new.__dict__["forward"] is own:
            raise UnsupportedModelError(
                f"the forward of {name or type(model).__name__} was replaced by a plain function, "
                "which in a copy of the model would still run the original's weights: use "
                "types.MethodType or functools.partial"
            )
    return moved
