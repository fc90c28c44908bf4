"""`stream`: a model whose blocks' weights are in memory only while they are used.

The engine goes through a model segment by segment, and a block's weights serve all cotangents of
the pass, so that reading them once for each segment costs little. `stream` builds a model without
its weights. A block's weights are read when its forward pass begins, into one of a few slots that
all blocks share; the block that was used longest ago makes room.

Embeddings, final norm and head stay in memory, and count. Weights are read into the slots, not
mapped, because mapped pages are resident memory too; so the budget is kept to the byte. A weight
that is not in memory holds NaN in all its places (one number, expanded), so that using it by
mistake cannot go unnoticed.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lddyn.engine.blocks import find_blocks
from lddyn.engine.guard import undisturbed
from lddyn.engine.stream.pieces import Origin, absent_tensor, checkpoint, find_origins, from_host
from lddyn.engine.stream.weights import Block, OnDemand, Weights
from lddyn.errors import UnsupportedModelError
from lddyn.memory import in_gib, parse_memory

_on_meta: ContextVar[bool] = ContextVar("on_meta", default=False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built within have parameters without values; their buffers are computed as usual.

    Other threads build their modules as ever.
    """
    _install_hook()
    token = _on_meta.set(True)
    try:
        yield
    finally:
        _on_meta.reset(token)


@functools.cache
def _install_hook() -> None:
    """Registers torch's hook for new parameters, once; it is idle outside of the context above."""

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not _on_meta.get() or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]


def _skeleton(folder: Path, dtype: torch.dtype | None, trust: bool) -> Any:
    """The model of a folder's config, its parameters on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "the weights are quantised (config.quantization_config), expected floating-point ones: "
            "stream the model they were made of"
        )
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    # Some architectures keep a few weights in float32, whatever the others' dtype.
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    stored = model.state_dict()
    for pattern, kept in plan.items():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored and re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)
    return model.eval()


def _folder(source: str | Path, revision: str | None, trust: bool) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or folder.is_absolute():
        raise FileNotFoundError(f"{folder} is no folder: give one with config.json and weights")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", *(["*.py"] if trust else [])]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


@undisturbed
def stream(
    source: str | Path | nn.Module,
    memory: int | str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Builds a causal LM that reads its blocks' weights when it uses them, within a budget.

        resident = embeddings + final norm + head + buffers
        memory ≥ resident + slots · largest block + room to read,     slots ≥ 1

    Args:
        source: A folder with config.json and safetensors (one file, or shards and their index), the
            name of such a model on the hub, or a model in host memory whose blocks shall go to
            `device` in turn (it is moved there, like by `.to`).
        memory: Most bytes of weights in memory at once, or a text such as "8GiB". Activations,
            factors and results are not part of it, nor are adapters that are added later.
        dtype: Dtype of the weights in memory; default: the dtype of the model's config.
        device: Where the model computes.
        revision: Revision of a model on the hub.
        trust_remote_code: Whether code that comes with the model may run. Weights are never
            unpickled.

    Returns:
        The model, in evaluation mode. `lddyn.ntk` takes it as any other model; `lddyn.decompose`
        takes it if only an adapter, or parameters outside the blocks, are trainable. Its blocks'
        weights are read-only, and NaN while they are not in memory. One thread may use it at a
        time.

    Raises:
        ValueError: If memory is less than the least possible (the message has the numbers), a
            weight is missing or of another shape, or a file is damaged.
        UnsupportedModelError: If the weights are quantised or the model has no blocks.

    Cost: one read of the blocks that are not in memory, for each pass over the model. A pullback of
        any number of cotangents is one pass; a plain backward pass runs each block's forward twice.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=96,
        ...     num_hidden_layers=4, num_attention_heads=2, pad_token_id=None)
        >>> transformers.LlamaForCausalLM(config).save_pretrained("tiny")
        >>> model = lddyn.stream("tiny", memory="1MiB")
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> lddyn.ntk(model, ex, ex).gram().shape
        torch.Size([3, 3])
    """
    budget, place = parse_memory(memory), torch.device(device)
    model: Any = source
    if isinstance(source, nn.Module):
        if place.type == "cpu":
            raise ValueError(
                "a model in host memory is streamed to a device, got device='cpu', where it is "
                "already: give device='cuda', or the folder of its weights"
            )
        if dtype is not None:
            raise ValueError(f"dtype is that of the model in memory, got {dtype}: leave it out")
        origins = from_host(model)
    else:
        folder = _folder(source, revision, trust_remote_code)
        model = _skeleton(folder, dtype, trust_remote_code)
        _off_meta(model)
        origins = find_origins(model, checkpoint(folder))
    return _assemble(model, origins, budget, place)


def _off_meta(model: nn.Module) -> None:
    """Puts absent parameters in the place of those on the meta device."""
    new: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point:
            raise UnsupportedModelError(f"{name} is {parameter.dtype}, expected floating point")
        shell = absent_tensor(parameter, torch.device("cpu"))
        new[id(parameter)] = nn.Parameter(shell, parameter.requires_grad)
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = new[id(old)]


def _streamed(model: nn.Module, modules: Sequence[nn.Module]) -> dict[str, int]:
    """Names of the weights that belong to a single block -> the index of the block."""
    users: dict[int, set[int]] = {}
    inside = {id(m) for block in modules for m in block.modules()}
    for i, block in enumerate(modules):
        for parameter in block.parameters():
            users.setdefault(id(parameter), set()).add(i)
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), set()).add(-1)
    named = {name: users[id(p)] for name, p in model.named_parameters()}
    return {name: min(of) for name, of in named.items() if len(of) == 1 and -1 not in of}


def _assemble(
    model: Any, origins: Sequence[Origin], budget: int, device: torch.device
) -> nn.Module:
    """Reads the weights outside the blocks, and makes the blocks read theirs when they run."""
    modules = find_blocks(model)
    home = _streamed(model, modules)
    if not home:
        raise UnsupportedModelError(
            f"no block of {type(model).__name__} has weights of its own: load it into memory"
        )
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    blocks = [Block() for _ in modules]
    for name, index in home.items():
        blocks[index].add(name, parameters[name])
    outside: list[Origin] = []
    missing = set(parameters)
    for origin in origins:
        for name, shape in origin.shapes.items():
            expected = parameters.get(name, buffers.get(name))
            if expected is None:
                raise UnsupportedModelError(
                    f"the files give {name}, which is no weight of {type(model).__name__}: load "
                    "the model into memory"
                )
            if tuple(shape) != tuple(expected.shape):
                raise ValueError(
                    f"{name} is stored with shape {tuple(shape)}, expected {tuple(expected.shape)} "
                    "by the config: they are not of one model"
                )
        missing -= origin.shapes.keys()
        homes = {home.get(name) for name in origin.shapes}
        if len(homes) > 1:
            raise UnsupportedModelError(
                f"{', '.join(origin.shapes)} are stored as one, but are not of one block: load the "
                "model into memory"
            )
        (place,) = homes
        (outside if place is None else blocks[place].origins).append(origin)
    if missing:
        raise ValueError(
            f"{len(missing)} weights are not in the model's files, {min(missing)} first: they "
            "would be random; fetch the files again, or save the model with save_pretrained"
        )
    resident = {n: p for n, p in parameters.items() if n not in home}
    kept = sum(x.numel() * x.dtype.itemsize for x in (*resident.values(), *buffers.values()))
    size, room = max(b.size for b in blocks), max(b.room() for b in blocks)
    if budget < kept + size + room:
        raise ValueError(
            f"memory must hold {in_gib(kept)} outside the blocks (embeddings, norms, head), "
            f"{in_gib(size)} of the largest block, and {in_gib(room)} to read it; got "
            f"{in_gib(budget)}: give memory={kept + size + room} (bytes) or more, or a narrower "
            "dtype"
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    buffers = dict(model.named_buffers())
    for origin in outside:
        out = {
            n: torch.empty(shape, dtype=(parameters | buffers)[n].dtype, device=device)
            for n, shape in origin.shapes.items()
        }
        origin.fill(out)
        for name, value in out.items():
            if name in parameters:
                parameters[name].data = value
            else:
                buffers[name].copy_(value)
    slots = min(len(blocks), (budget - kept - room) // size)
    weights = Weights(blocks, slots, kept, device)
    for i, module in enumerate(modules):
        module.forward = OnDemand(weights, i, module.forward)
    return model  # type: ignore[no-any-return]
