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
import copy
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lddyn.anatomy import find_blocks, is_streamed, undisturbed
from lddyn.ledger import UnsupportedModelError
from lddyn.pullback import parse_memory

_ALIGNMENT = 64  # of a tensor in its slot, bytes
_STAGE = 4 << 20  # bytes read at a time where they are converted or sent to a device
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# --------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Piece:
    """One tensor of a safetensors file: where its bytes are, and what they mean."""

    name: str
    path: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize

    def stage(self, out: Tensor) -> int:
        """Bytes of the stage that stands between the file and `out`; 0: read into it."""
        direct = out.dtype == self.dtype and out.device.type == "cpu"
        return 0 if direct else min(_STAGE, self.size)

    def fill(self, out: Tensor) -> None:
        """Reads into a contiguous tensor of this shape, of any dtype and device."""
        flat, step = out.view(-1), self.stage(out) // self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            if not step:
                self._read(file, flat)
                return
            stage = torch.empty(step, dtype=self.dtype)
            for part in flat.split(step):
                self._read(file, stage[: part.numel()])
                part.copy_(stage[: part.numel()])

    def _read(self, file: Any, out: Tensor) -> None:
        left = out.view(torch.uint8).numpy().data
        while len(left):
            count = file.readinto(left)
            if not count:
                raise ValueError(
                    f"{self.path.name} ends inside {self.name}, {len(left)} bytes too early: it "
                    "was cut or changed since it was opened; fetch it again"
                )
            left = left[count:]


def _pieces(path: Path) -> dict[str, Piece]:
    """The tensors of a safetensors file, by its header alone."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path.name} is not a sound safetensors file: {what}; fetch it again")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise wrong(f"its header has {length} bytes, the file {size}")
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError):
            raise wrong("its header is no JSON object") from None
    header.pop("__metadata__", None)
    pieces = {}
    for name, entry in header.items():
        try:
            kind, shape = str(entry["dtype"]), torch.Size(entry["shape"])
            start, end = map(int, entry["data_offsets"])
        except (ValueError, TypeError, KeyError):
            raise wrong(f"its entry of {name} cannot be read") from None
        if kind not in _DTYPES:
            raise UnsupportedModelError(
                f"{name} in {path.name} has dtype {kind}: expected one of {', '.join(_DTYPES)} "
                "(quantised weights are not streamed)"
            )
        piece = Piece(name, path, 8 + length + start, _DTYPES[kind], shape)
        if not 0 <= start <= end <= size - 8 - length:
            raise wrong(f"{name} is at bytes {start} to {end} of {size - 8 - length}")
        if min(shape, default=0) < 0 or end - start != piece.size:
            raise wrong(f"{name} has {end - start} bytes for shape {tuple(shape)}")
        pieces[name] = piece
    return pieces


def _checkpoint(folder: Path) -> dict[str, Piece]:
    """All tensors of a model's folder: model.safetensors, or the shards its index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return _pieces(single)
        raise ValueError(
            f"{folder} has neither model.safetensors nor its index: weights are streamed from "
            "safetensors only; load the model once and save it with save_pretrained"
        )
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{index.name} has no map of weights to files: fetch it again") from None
    pieces: dict[str, Piece] = {}
    for shard in sorted(set(map(str, places.values()))):
        if shard != os.path.basename(shard) or not (folder / shard).is_file():
            raise ValueError(f"{index.name} names {shard!r}, which is no file beside it")
        pieces |= {n: p for n, p in _pieces(folder / shard).items() if places.get(n) == shard}
    absent = sorted(places.keys() - pieces.keys())
    if absent:
        raise ValueError(f"{absent[0]} is not in {places[absent[0]]}, where {index.name} has it")
    return pieces


# --------------------------------------------------------------------------- where weights are from


class Origin(Protocol):
    """What gives one or more of a model's tensors their values: name -> shape."""

    shapes: dict[str, torch.Size]

    def room(self, out: Mapping[str, Tensor]) -> int:
        """Bytes of host memory that filling these tensors takes beside them."""

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Writes the values."""


class FromFile(Origin):
    """One tensor as it is stored, but for its dtype."""

    def __init__(self, name: str, piece: Piece):
        self.name, self.piece = name, piece
        self.shapes = {name: piece.shape}

    def room(self, out: Mapping[str, Tensor]) -> int:
        """The stage, where there must be one."""
        return self.piece.stage(out[self.name])

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Reads."""
        self.piece.fill(out[self.name])


class Converted(Origin):
    """Tensors that transformers stores in another form than it computes with (packed experts)."""

    def __init__(self, name: str, model: Any, converter: Any):
        self.name, self.model, self.converter = name, model, converter
        self.parts: list[tuple[str, Piece]] = []  # with the pattern they match
        self.shapes = {}

    def _made(self, read: Callable[[Piece], Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, piece in self.parts:
            converter.add_tensor(self.name, piece.name, pattern, partial(read, piece))
        made = converter.convert(self.name, model=self.model, config=self.model.config)
        return {n: x[0] if isinstance(x, list) else x for n, x in made.items()}

    def plan(self) -> None:
        """Finds out what will be made, without reading."""
        made = self._made(lambda piece: torch.empty(piece.shape, dtype=piece.dtype, device="meta"))
        self.shapes = {name: x.shape for name, x in made.items()}

    def room(self, out: Mapping[str, Tensor]) -> int:
        """What is read, stacked and joined: three times the tensors as they are stored."""
        return 3 * sum(_aligned(piece.size) for _, piece in self.parts)

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Reads, converts and copies."""
        # One buffer: many allocations of an expert's size would stay with the allocator.
        sizes = [_aligned(piece.size) for _, piece in self.parts]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        places = {p.name: x for (_, p), x in zip(self.parts, buffer.split(sizes), strict=True)}

        def read(piece: Piece) -> Tensor:
            part: Tensor = places[piece.name][: piece.size].view(piece.dtype).view(piece.shape)
            piece.fill(part)
            return part

        for name, value in self._made(read).items():
            out[name].copy_(value)


class FromHost(Origin):
    """A tensor in host memory."""

    def __init__(self, name: str, value: Tensor):
        self.name, self.value = name, value
        self.shapes = {name: value.shape}

    def room(self, out: Mapping[str, Tensor]) -> int:
        """None."""
        return 0

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Copies."""
        out[self.name].copy_(self.value)


def _origins(model: Any, pieces: Mapping[str, Piece]) -> list[Origin]:
    """Which stored tensors make which of the model's, by transformers' own table of names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4 stores what it computes with
        return _unconverted(model, pieces)
    entries = get_model_conversion_mapping(model)
    converters = [e for e in entries if isinstance(e, WeightConverter)]
    renamings = [e for e in entries if not isinstance(e, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    first = _first_names(model)
    found: dict[str, Origin] = {}
    for stored in sorted(pieces, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = stored, None
        if name not in expected:
            continue
        name = first.get(name, name)
        if pattern is None:
            found[name] = FromFile(name, pieces[stored])
            continue
        made = found.setdefault(name, Converted(name, model, by_pattern[pattern]))
        assert isinstance(made, Converted)
        made.parts.append((pattern, pieces[stored]))
    for origin in found.values():
        if isinstance(origin, Converted):
            origin.plan()
    return list(found.values())


def _unconverted(model: Any, pieces: Mapping[str, Piece]) -> list[Origin]:
    """Names are those of the model, with or without the prefix of its body."""
    expected, prefix = model.state_dict(), f"{model.base_model_prefix}."
    first = _first_names(model)
    found: dict[str, Origin] = {}
    for stored, piece in pieces.items():
        for name in (stored, prefix + stored, stored.removeprefix(prefix)):
            if name in expected:
                name = first.get(name, name)
                found[name] = FromFile(name, piece)
                break
    return list(found.values())


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first one: tied weights have several."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


# --------------------------------------------------------------------------- the blocks


def _absent(like: Tensor, device: torch.device) -> Tensor:
    """What stands for a weight that is not in memory: one NaN, expanded."""
    return torch.full((), math.nan, dtype=like.dtype, device=device).expand(like.shape)


@dataclass
class _Block:
    """The streamed weights of one block, and their places in a slot."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    origins: list[Origin] = field(default_factory=list)
    places: dict[str, tuple[slice, torch.dtype]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)  # when they were read
    size: int = 0

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """One more weight."""
        self.parameters[name] = parameter
        size = parameter.numel() * parameter.dtype.itemsize
        self.places[name] = slice(self.size, self.size + size), parameter.dtype
        self.size += _aligned(size)

    def room(self) -> int:
        """Bytes that reading takes beside the slot."""
        return max((o.room(self.parameters) for o in self.origins), default=0)

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The weights' places in a slot."""
        return {
            name: slot[at].view(dtype).view(self.parameters[name].shape)
            for name, (at, dtype) in self.places.items()
        }


class Weights:
    """The weights of a model's blocks: a few in memory, the rest where they came from.

    Attributes:
        slots: How many blocks can be in memory at once.
        slot_bytes: Bytes of each.
        resident_bytes: What is always in memory: all that is outside the blocks.
        reads: Blocks read so far.
    """

    def __init__(self, blocks: Sequence[_Block], slots: int, resident: int, device: torch.device):
        self.blocks = list(blocks)
        self.slots, self.resident_bytes = slots, resident
        self.slot_bytes = max(b.size for b in blocks)
        self.reads = 0
        # Weights in slots, not allocated anew: a graph that outlives a block's turn (the taps of a
        # pullback hold theirs) must not keep its weights alive.
        self._free = [
            torch.empty(self.slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots)
        ]
        self._held: OrderedDict[int, Tensor] = OrderedDict()  # longest unused first
        for index, block in enumerate(blocks):
            for parameter in block.parameters.values():
                parameter.data = _absent(parameter, device)
                # By this others know a streamed weight, and can have its values.
                parameter.fetch = partial(self.load, index)  # type: ignore[attr-defined]

    def load(self, index: int) -> None:
        """Sees to it that a block's weights are in memory, until others take their place."""
        if index in self._held:
            self._held.move_to_end(index)
            return
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            slot = self._free.pop() if self._free else self._evict(next(iter(self._held)))
            block = self.blocks[index]
            places = block.views(slot)
            try:
                for origin in block.origins:
                    origin.fill(places)
                self._install(block, places)
            except BaseException:
                self._free.append(slot)
                raise
            self._held[index] = slot
            self.reads += 1

    def _install(self, block: _Block, places: Mapping[str, Tensor]) -> None:
        for name, parameter in block.parameters.items():
            place = places[name]
            if (parameter.dtype, parameter.device) != (place.dtype, place.device):
                raise RuntimeError(
                    f"{name} was converted to {parameter.dtype} on {parameter.device}, expected "
                    f"{place.dtype} on {place.device}: a streamed model cannot be converted; "
                    "give lddyn.stream the dtype and device"
                )
        for name, parameter in block.parameters.items():
            parameter.data = places[name]
            block.versions[name] = parameter._version

    def _evict(self, index: int) -> Tensor:
        block = self.blocks[index]
        for name, parameter in block.parameters.items():
            if parameter._version != block.versions[name]:
                raise RuntimeError(
                    f"{name} was changed in place, and the change would be lost: streamed weights "
                    "are read-only; train an adapter, or load the model into memory"
                )
        for parameter in block.parameters.values():
            parameter.data = _absent(parameter, parameter.device)
            increment_version(parameter)  # a graph that still needs the values raises
        return self._held.pop(index)


class _OnDemand:
    """A block's forward that reads the block's weights first."""

    def __init__(self, weights: Weights, index: int, forward: Any):
        self.weights, self.index, self.forward = weights, index, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.weights.load(self.index)
        return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnDemand:
        for name, parameter in self.weights.blocks[self.index].parameters.items():
            if memo.get(id(parameter)) is not parameter:  # the copy is to have one of its own
                raise UnsupportedModelError(
                    f"a streamed model cannot be copied, and {name} would be: open it once more "
                    "with lddyn.stream"
                )
        return _OnDemand(self.weights, self.index, copy.deepcopy(self.forward, memo))


# --------------------------------------------------------------------------- opening a model


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
        origins = _from_host(model)
    else:
        folder = _folder(source, revision, trust_remote_code)
        model = _skeleton(folder, dtype, trust_remote_code)
        _off_meta(model)
        origins = _origins(model, _checkpoint(folder))
    return _assemble(model, origins, budget, place)


def _from_host(model: nn.Module) -> list[Origin]:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or is_streamed(parameter):
            raise ValueError(
                f"{name} is on {parameter.device}, or streamed already: expected a model in host "
                "memory, as from_pretrained loads it"
            )
    return [FromHost(n, p.detach()) for n, p in model.named_parameters()]


def _off_meta(model: nn.Module) -> None:
    """Puts absent parameters in the place of those on the meta device."""
    new: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point:
            raise UnsupportedModelError(f"{name} is {parameter.dtype}, expected floating point")
        shell = _absent(parameter, torch.device("cpu"))
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
    blocks = [_Block() for _ in modules]
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
        module.forward = _OnDemand(weights, i, module.forward)
    return model  # type: ignore[no-any-return]
