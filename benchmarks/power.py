"""Losses of power, simulated: what a disk may hold if the machine stops between two system calls.

`recorded` runs a piece of work and notes its system calls on files. `after` makes a folder as a
disk could show it after a loss of power before call k:

    data       what was written before the last fsync of the file is there; each later write is
               there, missing, half there, or zeros
    names      creations, renames and removals before the last fsync of the folder hold; of the
               later ones the first few hold, as journaling file systems order them
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Call = tuple[Any, ...]  # name, inode or path, arguments


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[list[Call]]:
    """Notes the calls of `os` that change files of a folder, in their order."""
    calls: list[Call] = []
    real = {
        n: getattr(os, n) for n in ("open", "pwrite", "fsync", "replace", "unlink", "ftruncate")
    }

    numbers: dict[int, int] = {}  # inode → number of a file made here: inodes are used again

    def inode(fd: int) -> int:
        own = os.fstat(fd).st_ino
        return numbers.get(own, own)

    def opened(path: Any, flags: int, *mode: Any, **more: Any) -> int:
        new = not os.path.lexists(path)
        fd: int = real["open"](path, flags, *mode, **more)
        if new and Path(path).parent == folder:
            numbers[os.fstat(fd).st_ino] = -1 - len(calls)
            calls.append(("create", Path(path).name, inode(fd)))
        return fd

    def written(fd: int, data: Any, offset: int) -> int:
        count: int = real["pwrite"](fd, data, offset)
        calls.append(("write", inode(fd), offset, bytes(data[:count])))
        return count

    def cut(fd: int, size: int) -> None:
        real["ftruncate"](fd, size)
        calls.append(("cut", inode(fd), size))

    def synced(fd: int) -> None:
        real["fsync"](fd)
        is_folder = os.path.samestat(os.fstat(fd), os.stat(folder))
        calls.append(("sync names",) if is_folder else ("sync", inode(fd)))

    def replaced(old: Any, new: Any) -> None:
        real["replace"](old, new)
        calls.append(("rename", Path(old).name, Path(new).name))

    def unlinked(path: Any, **more: Any) -> None:
        real["unlink"](path, **more)
        calls.append(("remove", Path(path).name))

    fakes = (opened, written, synced, replaced, unlinked, cut)
    try:
        for name, fake in zip(real, fakes, strict=True):
            setattr(os, name, fake)
        yield calls
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def after(
    before: dict[str, bytes], inodes: dict[str, int], calls: list[Call], k: int, rng: random.Random
) -> dict[str, bytes]:
    """The files of the folder after a loss of power before call k.

    Args:
        before: Name → bytes of the folder before the work, which are safely on disk.
        inodes: Name → inode of these files.
        calls: What `recorded` noted.
        k: Number of the first call that did not happen.
        rng: Chooses among the states that are possible.
    """
    names = dict(inodes)
    data = {inodes[name]: bytearray(content) for name, content in before.items()}
    done = calls[:k]
    safe_names = max((i for i, c in enumerate(done) if c[0] == "sync names"), default=-1)
    kinds = ("create", "rename", "remove")
    later = [i for i, c in enumerate(done) if i > safe_names and c[0] in kinds]
    dropped = set(later[rng.randint(0, len(later)) :])
    for i, call in enumerate(done):
        if call[0] in kinds and i not in dropped:
            _rename(names, call)
        elif call[0] in ("write", "cut"):
            safe = any(c[0] == "sync" and c[1] == call[1] for c in done[i:])
            _change(data.setdefault(call[1], bytearray()), call, "there" if safe else "", rng)
    return {name: bytes(data.get(inode, b"")) for name, inode in names.items()}


def _rename(names: dict[str, int], call: Call) -> None:
    if call[0] == "create":
        names[call[1]] = call[2]
    elif call[0] == "remove":
        names.pop(call[1], None)
    elif call[1] in names:
        names[call[2]] = names.pop(call[1])


def _change(content: bytearray, call: Call, fate: str, rng: random.Random) -> None:
    fate = fate or rng.choice(("there", "missing", "half", "zeros"))
    if call[0] == "cut":
        if fate != "missing":
            del content[call[2] :]
        return
    offset, part = call[2], call[3]
    if fate == "missing":
        return
    part = part[: len(part) // 2] if fate == "half" else part
    part = bytes(len(part)) if fate == "zeros" else part
    content.extend(bytes(max(0, offset + len(part) - len(content))))
    content[offset : offset + len(part)] = part
