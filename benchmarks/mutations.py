"""Random damage to the files of a saved result, for tests and for `make torture`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

Files = dict[str, bytes]

KINDS = (
    "flip one bit",
    "change one byte",
    "zero the end",
    "cut the end",
    "append bytes",
    "swap two blocks",
    "empty a file",
    "remove a file",
    "a file of another save",
    "a number in the JSON",
)


def mutate(files: Mapping[str, bytes], other: Mapping[str, bytes], rng: random.Random) -> Files:
    """One random damage; it always changes bytes.

    Args:
        files: Name → bytes of a save.
        other: The same of another save of the same kind, whose files get mixed in.
        rng: Source of randomness.

    Returns:
        Name → bytes, different from `files`.
    """
    while True:
        damaged = dict(files)
        kind, name = rng.choice(KINDS), rng.choice(sorted(files))
        if kind == "remove a file":
            del damaged[name]
        elif kind == "a file of another save":
            # Names hold digests: a file of tensors is copied over that of the other save.
            matching = [n for n in other if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            damaged[name] = other[rng.choice(matching)] if matching else b""
        else:
            damaged[name] = _DAMAGE[kind](files[name], rng)
        if damaged != dict(files):
            return damaged


def _place(data: bytes, rng: random.Random) -> int:
    return rng.randrange(max(len(data), 1))


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return (
        data[:at] + bytes(x ^ (1 << rng.randrange(8)) for x in data[at : at + 1]) + data[at + 1 :]
    )


def _byte(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _zeros(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes(len(data) - at)


def _swap(data: bytes, rng: random.Random) -> bytes:
    size = max(min(len(data) // 4, 64), 1)
    one, two = sorted((_place(data, rng), _place(data, rng)))
    two = max(two, one + size)
    return (
        data[:one]
        + data[two : two + size]
        + data[one + size : two]
        + data[one : one + size]
        + (data[two + size :])
    )


def _number(data: bytes, rng: random.Random) -> bytes:
    digits = [i for i, x in enumerate(data[:100_000]) if 48 <= x <= 57]
    if not digits:
        return _byte(data, rng)
    at = rng.choice(digits)
    return data[:at] + str(rng.randrange(10)).encode() + data[at + 1 :]


_DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip one bit": _flip,
    "change one byte": _byte,
    "zero the end": _zeros,
    "cut the end": lambda data, rng: data[: _place(data, rng)],
    "append bytes": lambda data, rng: data + rng.randbytes(rng.randrange(1, 40)),
    "swap two blocks": _swap,
    "empty a file": lambda data, rng: b"",
    "a number in the JSON": _number,
}
