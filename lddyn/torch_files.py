"""Reads what `torch.save` wrote, without unpickling: tensors and plain values, nothing else.

A file of `torch.save` is a zip of one pickle, `data.pkl`, and of raw numbers, `data/KEY`. A pickle
is a program that may name any function. `pickletools.genops` says what it would do and does
nothing; `_Reader` follows the few of its operations that make plain values and tensors, and refuses
all others. So nothing in the file is called or imported.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lddyn.files import open_regular

__all__ = ["read_torch_file"]

_DAMAGED = (
    *(zipfile.BadZipFile, EOFError, struct.error),
    *(LookupError, ArithmeticError, TypeError, RuntimeError, OSError),
)
_PROGRAM = 64 << 20  # bytes of a data.pkl that is read at all

_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
# Keys of dicts: to hash a tuple of tuples may take for ever, or overflow the stack.
_KEYS = (str, int, float, bool, type(None))
_TENSOR, _DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"


class _Name(NamedTuple):
    """A name that the file mentions; nothing is looked up."""

    name: str


class _Storage(NamedTuple):
    """Raw numbers of the file."""

    dtype: torch.dtype
    key: str
    numbers: int


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`: dicts, lists, tuples, numbers, text and tensors.

    Args:
        path: The file, of torch 1.6 or later.

    Returns:
        The value that was saved; tensors are on the CPU.

    Raises:
        ValueError: If the file is damaged, or holds anything else; the message names the file.
        FileNotFoundError: If there is none.

    Cost: memory of the tensors.
    """
    with open(open_regular(path), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _Reader(archive, os.fstat(file.fileno()).st_size).read()
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged, or not a file of torch.save: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive = archive
        names = archive.namelist()
        programs = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"it has {len(programs)} programs (data.pkl), expected one")
        total = sum(info.file_size for info in archive.infolist())
        if total > size or len({*names}) < len(names):
            raise ValueError("its entries overlap or have one name")
        self.prefix = programs[0].removesuffix("data.pkl")
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[_Storage, Tensor] = {}

    def _bytes(self, name: str, most: int) -> bytes:
        """An entry that is stored as it is and not larger than `most` bytes."""
        info = self.archive.getinfo(self.prefix + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
            raise ValueError(f"{name} has {info.file_size} bytes, expected {most} at most")
        return self.archive.read(info)

    def read(self) -> Any:
        """The value of the program."""
        try:
            order = self._bytes("byteorder", 16)
        except KeyError:
            order = b"little"
        if order != b"little":
            raise ValueError(f"its numbers are {order.decode('ascii', 'replace')}-endian")
        for operation, argument, _ in pickletools.genops(self._bytes("data.pkl", _PROGRAM)):
            if operation.name == "STOP":
                (value,) = self.stack
                return value
            self._do(operation.name, argument)
        raise ValueError("its program has no end")

    def _do(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "GLOBAL":
            self.stack.append(_Name(argument))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its program has the operation {name}, which makes no plain value")

    def marked(self) -> list[Any]:
        """What is on the stack since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        """The top of the stack, which something is added to."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"its program adds to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def append(self, values: list[Any]) -> None:
        """Adds values to a list."""
        self._top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Adds keys and values to a dict."""
        if not all(type(key) in _KEYS for key in values[::2]):
            raise ValueError("a dict has keys other than text and numbers")
        self._top(dict).update(zip(values[::2], values[1::2], strict=True))

    def last(self, count: int) -> list[Any]:
        """Takes the last values from the stack."""
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def storage(self) -> None:
        """Names raw numbers: ("storage", type, key, device, count)."""
        kind, named, key, _, count = self.stack.pop()
        whole = type(kind) is type(key) is str and type(count) is int
        if not whole or kind != "storage" or type(named) is not _Name:
            raise ValueError("it holds numbers that are no storage of torch")
        if named.name not in _STORAGES:
            raise ValueError(f"it holds numbers of an unknown type, {named.name!r:.80}")
        self.stack.append(_Storage(_STORAGES[named.name], key, count))

    def call(self) -> None:
        """Makes a tensor, or an empty ordered dict, which is a dict here."""
        arguments, named = self.stack.pop(), self.stack.pop()
        name = named.name if type(named) is _Name else type(named).__name__
        if name == _DICT and arguments == ():
            self.stack.append({})
        elif name == _TENSOR and type(arguments[0]) is _Storage:
            self.stack.append(self._tensor(*arguments[:4]))
        else:
            raise ValueError(f"it calls {name!r:.80}")

    def _tensor(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> Tensor:
        steps = [*zip(size, stride, strict=True)]
        last = offset + sum((n - 1) * step for n, step in steps)
        if min([offset, *size, *stride], default=0) < 0 or (
            0 not in size and last >= storage.numbers
        ):
            raise ValueError(
                f"a tensor of shape {tuple(size)} leaves its {storage.numbers} numbers"
            )
        if 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        return self._numbers(storage).as_strided(tuple(size), tuple(stride), offset)

    def _numbers(self, storage: _Storage) -> Tensor:
        """A storage's numbers, which tensors share as they did when they were saved."""
        if storage not in self.storages:
            expected = storage.numbers * storage.dtype.itemsize
            data = bytearray(self._bytes(f"data/{storage.key}", expected))
            if len(data) < expected:
                raise ValueError(f"data/{storage.key} has {len(data)} bytes, expected {expected}")
            self.storages[storage] = torch.frombuffer(data, dtype=storage.dtype)
        return self.storages[storage]


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_STEPS: dict[str, Callable[[_Reader], None]] = {
    "TUPLE": lambda reader: reader.stack.append(tuple(reader.marked())),
    "TUPLE1": lambda reader: reader.stack.append(tuple(reader.last(1))),
    "TUPLE2": lambda reader: reader.stack.append(tuple(reader.last(2))),
    "TUPLE3": lambda reader: reader.stack.append(tuple(reader.last(3))),
    "APPEND": lambda reader: reader.append(reader.last(1)),
    "APPENDS": lambda reader: reader.append(reader.marked()),
    "SETITEM": lambda reader: reader.set_items(reader.last(2)),
    "SETITEMS": lambda reader: reader.set_items(reader.marked()),
    "BINPERSID": _Reader.storage,
    "REDUCE": _Reader.call,
}
