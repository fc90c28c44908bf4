"""Memory budgets in bytes, what counts as running out of memory, and CPU threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from lddyn.errors import MemoryBudgetError

DEFAULT_MEMORY = "auto"

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_GIB = _UNITS["GIB"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the CPU, could not be allocated."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def name_memory(error: BaseException, memory: object = None, *, instead: str | None = None) -> None:
    """Adds to the message of an allocator's error what the caller can do; once for an error.

    Args:
        error: The error; `is_out_of_memory` is true of it.
        memory: The `memory=` of the analysis, if it is known.
        instead: What the caller can do, where that is something else; it takes the place of what
            an analysis inside has said.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    first, said, _ = lines[0].partition(_RAN_OUT)
    if said and instead is None:
        return
    given = "" if memory is None else f" (it was {memory!r})"
    remedy = instead or (
        f"give a smaller memory= (--memory){given}, fewer or shorter sequences (--limit), or train "
        "an adapter (--adapter)"
    )
    lines[0] = f"{first.rstrip('.: ')}{_RAN_OUT}{remedy}"
    error.args = ("\n".join(lines),)


_RAN_OUT = ": the machine's memory ran out: "


def parse_memory(memory: int | str, device: torch.device | None = None) -> int:
    """Bytes of a budget such as "2GiB", "500MB", a plain number of bytes, or "auto".

    Args:
        memory: The budget. "auto" is 4 GiB; on a GPU, whose kernels want many rows, a third of its
            free memory where that is more.
        device: Where the memory is; only "auto" depends on it.

    Raises:
        ValueError: If the budget is not a positive number followed by a unit, or a text without a
            unit of less than 64 KiB: "1" is rather meant as 1 GiB.

    Example:
        >>> parse_memory("2GiB")
        2147483648
    """
    if memory == "auto":
        cuda = device is not None and device.type == "cuda"
        return max(4 * _GIB, torch.cuda.mem_get_info(device)[0] // 3 if cuda else 0)
    if isinstance(memory, int) and not isinstance(memory, bool):
        value = memory
    else:
        text = str(memory).strip().upper().replace(" ", "")
        digits = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = text[len(digits) :] or "B"
        try:
            value = int(float(digits) * _UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            raise ValueError(
                f"memory must look like '2GiB', '500MB' or 'auto', got {memory!r:.60}"
            ) from None
        if digits == text and 0 < value < 1 << 16:
            raise ValueError(
                f"memory must be at least 64KiB, got {memory!r:.60}, which is {value:,} bytes: "
                "give a unit, as in '2GiB'"
            )
    if value <= 0:
        raise ValueError(f"memory must be positive, got {memory!r:.60}")
    return value


FLOOR = 256 << 20  # bytes that an analysis may take beyond 1.25 times its budget


@dataclass(frozen=True)
class Budget:
    """The memory that an analysis may take beyond the model and its answer.

    Vectors of all trainable values (a gradient, a step, a moved copy of the weights) count where
    the budget is a number. "auto" is a workspace beside them and refuses nothing.

    Attributes:
        total: Bytes.
        strict: Whether the vectors count.
    """

    total: int
    strict: bool

    @classmethod
    def of(cls, memory: int | str, device: torch.device | None = None) -> Budget:
        """The budget that `memory=` names; arguments and errors as of `parse_memory`."""
        return cls(parse_memory(memory, device), memory != "auto")

    def beside(self, vectors: int) -> int:
        """Bytes of workspace beside vectors of so many bytes: at least an eighth of the budget."""
        if not self.strict:
            return self.total
        return max(self.total - vectors, self.total // 8, 1)

    def holds(self, vectors: int) -> bool:
        """Whether these vectors fit, or are small; a workspace is then beside them."""
        return not self.strict or vectors <= max(self.total, FLOOR // 4)

    def require(self, vectors: int, what: str, remedy: str) -> None:
        """Raises a MemoryBudgetError, before the work, where vectors alone break the promise.

        Args:
            vectors: Their bytes.
            what: What needs them: "this decomposition", with a reason.
            remedy: What the caller can do besides giving more memory.
        """
        if self.strict and vectors > self.total + self.total // 4 + FLOOR // 2:
            raise MemoryBudgetError(
                f"memory: {what} needs {in_gib(vectors + FLOOR // 2)} beyond the model, memory "
                f"allows {in_gib(self.total)}: give memory='{-(-vectors >> 20)}MiB' "
                f"(--memory) or more, {remedy}"
            )


def return_free_memory() -> None:
    """Gives memory that this process has freed back to the system, where the C library can.

    glibc keeps freed memory between blocks that are in use: in a step on SmolLM2 under a tight
    budget that was 150 MiB. It takes milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


_Item = TypeVar("_Item")


def tidied(items: Iterable[_Item], workspace: int) -> Iterator[_Item]:
    """Yields the items; where the workspace is small, freed memory is returned between them.

    That is where it is smaller than what the C library may keep (`FLOOR`), and at most twice a
    second: pages that are needed again have to be mapped again.
    """
    last = time.monotonic()
    for item in items:
        yield item
        if workspace < FLOOR and time.monotonic() - last > 0.5:
            return_free_memory()
            last = time.monotonic()


def in_gib(count: int) -> str:
    """A number of bytes for people: in GiB with three digits, and in bytes where that is little.

    Example:
        >>> in_gib(3 * 2**30), in_gib(1_500_000), in_gib(900)
        ('3.00 GiB', '0.00140 GiB', '900 bytes')
    """
    if count < 2**20:
        return f"{count:,} bytes"
    value = count / _GIB
    return f"{value:.0f} GiB" if value >= 100 else f"{value:#.3g} GiB"


_THREADS = threading.Lock()  # held while the two below change

_users = 0  # of the number of threads that is set

_before = 0  # torch's number of threads when the first of them came


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Runs torch with this many CPU threads within; None leaves their number as it is.

    Products that are split over another number of threads are rounded otherwise. torch has one
    number for the whole process: it is reset when the last of several users leaves.
    """
    global _before, _users
    if count is None:
        yield
        return
    with _THREADS:
        if not _users:
            _before = torch.get_num_threads()
        _users += 1
        outer = torch.get_num_threads()
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _THREADS:
            _users -= 1
            torch.set_num_threads(outer if _users else _before)
