"""One writer per store, by a file lock that ends with its process; one thread per Store object."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from lddyn.errors import StoreError, StoreLockedError
from lddyn.files import open_regular, write_all


class Lock:
    """The exclusive right to write a store.

    The kernel releases it when the process ends, however that happens.

    Args:
        path: The lock file.

    Raises:
        StoreLockedError: If another process holds the lock; the message names it.
        StoreError: If the file cannot be opened or locked, or the system has no file locks.
    """

    fd = -1

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise StoreError("writing a store needs a POSIX system (reading does not)") from None
        try:
            fd = open_regular(path, os.O_RDWR | os.O_CREAT)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be opened for writing: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(fd, 200).decode(errors="replace").strip() or "an unknown process"
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise StoreLockedError(
                    f'{path.parent} is being written by {owner}: wait for it, or read with mode="r"'
                ) from None
            raise StoreError(f"{path}: cannot be locked: {error}") from error
        self.fd = fd
        _LOCKS.add(self)
        with contextlib.suppress(OSError):  # only for the message above
            os.ftruncate(fd, 0)
            write_all(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode())

    def release(self) -> None:
        """Releases the lock."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)
            self.let_go()

    def let_go(self, close: Callable[[int], None] = os.close) -> None:
        """Closes the descriptor; in a forked child the parent then still holds the lock.

        Args:
            close: How; bound here, because at Python's end the module os is gone.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def __del__(self) -> None:
        self.let_go()  # a writer that was dropped must not keep others out


class Mutex:
    """Lets one thread at a time use a Store object; the same thread may enter again.

    A copy, a pickle and a forked child have one of their own, which no thread is in.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _MUTEXES.add(self)

    def __reduce__(self) -> tuple[type[Mutex], tuple[()]]:
        return Mutex, ()


class _Shared(Protocol):
    _mutex: Mutex


_S = TypeVar("_S", bound=_Shared)

_P = ParamSpec("_P")

_R = TypeVar("_R")


def exclusive(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """A method during which other threads' calls of exclusive methods of its object wait."""

    @functools.wraps(method)
    def run(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._mutex.lock:
            return method(self, *args, **kwargs)

    return run


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()

_MUTEXES: weakref.WeakSet[Mutex] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_LOCKS):
        lock.let_go()
    for mutex in list(_MUTEXES):  # another thread of the parent may have been in it
        mutex.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A data loader's worker that outlives a killed writer must not keep the lock.
    os.register_at_fork(after_in_child=_let_go_in_child)
