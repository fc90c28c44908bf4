"""Models that do not fit in memory: a block's weights are there only while the block is used.

The engine goes through a model segment by segment, and a block's weights serve every cotangent of
the pass: reading them once per segment costs little beside that. `stream` builds a model without
its weights and reads those of a block when its forward pass begins, into one of a few slots that
all blocks share; the block that was used longest ago makes room.

What lies outside the blocks (embeddings, final norm, head) stays in memory and counts. Weights are
read into the slots themselves, not mapped: a mapped page counts as resident memory too, and what is
read stays within the budget to the byte. A weight that is not in memory holds NaN in all its places
(one number, expanded): used by mistake it cannot pass for a value.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lddyn.engine.blocks import find_blocks
from lddyn.engine.guard import undisturbed
from lddyn.engine.stream.pieces import Origin, absent_tensor, checkpoint, find_origins, from_host
from lddyn.engine.stream.weights import Block, OnDemand, Weights
from lddyn.errors import UnsupportedModelError
from lddyn.memory import parse_memory


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters without values; their buffers are computed as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


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
    # What the architecture keeps in float32 whatever the rest is in.
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
    """A causal LM whose blocks' weights are read when they are used, within a budget of memory.

        resident = embeddings + final norm + head + buffers
        memory ≥ resident + slots · largest block + room to read,     slots ≥ 1

    Args:
        source: A folder with config.json and safetensors (one file, or shards and their index), the
            name of such a model on the hub, or a model in host memory whose blocks shall go to
            `device` in turn (it is moved there, like by `.to`).
        memory: Bytes of weights in memory at once, or "512MiB". Activations, factors and results
            are the workspace of what is computed, and adapters added later are beside it too.
        dtype: Of the weights in memory; default: what the config says they are stored in.
        device: Where the model computes.
        revision: Of a model on the hub.
        trust_remote_code: Whether code that comes with the model may run. Weights are never
            unpickled.

    Returns:
        The model, in evaluation mode, for `lddyn.ntk`, and for `lddyn.decompose` where only an
        adapter or what is outside the blocks trains. Its blocks' weights are read-only, and NaN
        where they are not in memory. One thread may use it at a time.

    Raises:
        ValueError: If memory is less than the least possible (the message has the numbers), a
            weight is missing or of another shape, or a file is damaged.
        UnsupportedModelError: If the weights are quantised or the model has no blocks.

    Cost: per pass over the model, one read of the blocks that are not in memory. A pullback is a
        pass, with all its cotangents; a plain backward pass computes each block's forward twice.

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
    """Weights that one block alone has -> its index."""
    users: dict[int, set[int]] = {}
    inside = {id(m) for block in modules for m in block.modules()}
    for i, block in enumerate(modules):
        for parameter in block.parameters():
            users.setdefault(id(parameter), set()).add(i)
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), set()).add(-1)
    found = {n: users[id(p)] for n, p in model.named_parameters()}
    return {name: min(of) for name, of in found.items() if len(of) == 1 and -1 not in of}


def _assemble(
    model: Any, origins: Sequence[Origin], budget: int, device: torch.device
) -> nn.Module:
    """Puts a model together: what is outside the blocks at once, the blocks on demand."""
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
            f"memory must hold {kept:,} bytes outside the blocks (embeddings, norms, head), the "
            f"largest block, {size:,}, and {room:,} to read it; got {budget:,}: give memory="
            f"{kept + size + room} or more, or a narrower dtype"
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
