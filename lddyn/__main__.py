"""The program `lddyn`, also as `python -m lddyn` for launchers such as torchrun.

Ctrl-C ends it with one line and status 130 at any moment: while modules are imported, too, where
Python and libraries in C++ print tracebacks, go on, or abort.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command line; the entry point of the `lddyn` script."""
    _open_closed_streams()
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not behind a shell's "&"
    if ours:
        signal.signal(signal.SIGINT, _end)
    from lddyn.cli.app import main as run

    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        run()
    finally:
        if ours:
            signal.signal(signal.SIGINT, _end)  # Python takes its time to end


def _open_closed_streams() -> None:
    """Opens standard streams that a shell closed (`>&-`), as a file could take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(fd, "r" if number == 0 else "w", encoding="utf-8"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt within a command; ends the program while a module is imported.

    Files survive that: lddyn writes them so that a kill leaves the old one or the new one.
    """
    within, at = False, frame
    while at is not None:
        file = at.f_code.co_filename
        if file.startswith("<frozen importlib"):
            _end(number, frame)
        within = within or (at.f_code.co_name == "invoke" and file.endswith("cli/command.py"))
        at = at.f_back
    if not within:
        _end(number, frame)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the program at once."""
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
