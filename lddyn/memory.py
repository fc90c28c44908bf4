"""Memory budgets in bytes, what counts as out of memory, and CPU threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocator's refusal, on GPU or CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


# 4 GiB; on a GPU, whose kernels want many rows, a third of what is free.
DEFAULT_MEMORY = "auto"

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_memory(memory: int | str, device: torch.device | None = None) -> int:
    """Bytes of a budget such as "2GiB", "500MB" or a plain number of bytes.

    "auto" is 4 GiB, or a third of the free memory of a GPU where that is more.

    Raises:
        ValueError: If the text is not a positive number followed by a unit.

    Example:
        >>> parse_memory("2GiB")
        2147483648
    """
    if memory == "auto":
        cuda = device is not None and device.type == "cuda"
        return max(_UNITS["GIB"] * 4, torch.cuda.mem_get_info(device)[0] // 3 if cuda else 0)
    if isinstance(memory, int) and not isinstance(memory, bool):
        value = memory
    else:
        text = str(memory).strip().upper().replace(" ", "")
        digits = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = text[len(digits) :] or "B"
        try:
            value = int(float(digits) * _UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            raise ValueError(f"memory must look like '2GiB' or '500MB', got {memory!r}") from None
    if value <= 0:
        raise ValueError(f"memory must be positive, got {memory!r}")
    return value


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Products that are split over more threads round in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
