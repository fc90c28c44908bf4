"""Where the tensors of a streamed model are stored: safetensors files, or host memory.

A `Piece` is one tensor of a file. An `Origin` fills one or more tensors of the model with their
values, from a piece, from several (packed experts), or from host memory.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lddyn.engine.streamed import is_streamed
from lddyn.errors import UnsupportedModelError
from lddyn.files import LARGEST_RECORD, open_regular, read_regular

_ALIGNMENT = 64  # of a tensor in its slot, bytes

_STAGE = 4 << 20  # bytes read at a time, if they are converted or sent to a device

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def aligned(size: int) -> int:
    """The size in bytes, rounded up to the alignment of a tensor in its slot."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """One tensor of a safetensors file: the place of its bytes, their dtype and shape."""

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
        """Bytes of a buffer between the file and `out`; 0 where the file is read into `out`."""
        direct = out.dtype == self.dtype and out.device.type == "cpu"
        return 0 if direct else min(_STAGE, self.size)

    def fill(self, out: Tensor) -> None:
        """Reads into a contiguous tensor of this shape, of any dtype and device."""
        flat, step = out.view(-1), self.stage(out) // self.dtype.itemsize
        with os.fdopen(open_regular(self.path), "rb", buffering=0) as file:
            file.seek(self.offset)
            if not step:
                self._read(file, flat)
                return
            stage = torch.empty(step, dtype=self.dtype)
            for part in flat.split(step):
                self._read(file, stage[: part.numel()])
                part.copy_(stage[: part.numel()])

    def _read(self, file: RawIOBase, out: Tensor) -> None:
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
    with os.fdopen(open_regular(path), "rb") as file:
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


def checkpoint(folder: Path) -> dict[str, Piece]:
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
        places = dict(json.loads(read_regular(index, limit=LARGEST_RECORD))["weight_map"])
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


class Origin(Protocol):
    """Fills one or more tensors of a model with their values.

    Attributes:
        shapes: The tensors' names -> their shapes.
    """

    shapes: dict[str, torch.Size]

    def room(self, out: Mapping[str, Tensor]) -> int:
        """Bytes of host memory that filling these tensors takes besides them."""

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Writes the values."""


class FromFile(Origin):
    """One tensor as it is stored, but for its dtype."""

    def __init__(self, name: str, piece: Piece):
        self.name, self.piece = name, piece
        self.shapes = {name: piece.shape}

    def room(self, out: Mapping[str, Tensor]) -> int:
        """Bytes of the buffer between file and tensor; 0 if none is needed."""
        return self.piece.stage(out[self.name])

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Reads the file into the tensor."""
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
        """Finds the names and shapes of the tensors that will be made, without reading."""
        made = self._made(lambda piece: torch.empty(piece.shape, dtype=piece.dtype, device="meta"))
        self.shapes = {name: x.shape for name, x in made.items()}

    def room(self, out: Mapping[str, Tensor]) -> int:
        """Three times the stored tensors: they are read, stacked and joined."""
        return 3 * sum(aligned(piece.size) for _, piece in self.parts)

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Reads the stored tensors, converts them, and copies the results."""
        # One buffer: many allocations of an expert's size would stay with the allocator.
        sizes = [aligned(piece.size) for _, piece in self.parts]
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
        """0: values are copied directly."""
        return 0

    def fill(self, out: Mapping[str, Tensor]) -> None:
        """Copies the tensor."""
        out[self.name].copy_(self.value)


def find_origins(model: Any, pieces: Mapping[str, Piece]) -> list[Origin]:
    """The origins of a model's tensors, by transformers' own table of stored names."""
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
    origins: dict[str, Origin] = {}
    converted: dict[str, Converted] = {}
    for stored in sorted(pieces, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = stored, None
        if name not in expected:
            continue
        name = first.get(name, name)
        if pattern is None:
            origins[name] = FromFile(name, pieces[stored])
            continue
        made = converted.get(name)
        if made is None:
            made = origins[name] = converted[name] = Converted(name, model, by_pattern[pattern])
        made.parts.append((pattern, pieces[stored]))
    for origin in converted.values():
        origin.plan()
    return list(origins.values())


def _unconverted(model: Any, pieces: Mapping[str, Piece]) -> list[Origin]:
    """The origins where stored names are the model's, with or without its body's prefix."""
    expected, prefix = model.state_dict(), f"{model.base_model_prefix}."
    first = _first_names(model)
    origins: dict[str, Origin] = {}
    for stored, piece in pieces.items():
        for name in (stored, prefix + stored, stored.removeprefix(prefix)):
            if name in expected:
                name = first.get(name, name)
                origins[name] = FromFile(name, piece)
                break
    return list(origins.values())


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first one: tied weights have several."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def absent_tensor(like: Tensor, device: torch.device) -> Tensor:
    """A stand-in for a weight that is not in memory: one NaN, expanded to its shape."""
    return torch.full((), math.nan, dtype=like.dtype, device=device).expand(like.shape)


def from_host(model: nn.Module) -> list[Origin]:
    """One origin per parameter of a model that is in host memory."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or is_streamed(parameter):
            raise ValueError(
                f"{name} is on {parameter.device}, or streamed already: expected a model in host "
                "memory, as from_pretrained loads it"
            )
    return [FromHost(n, p.detach()) for n, p in model.named_parameters()]
