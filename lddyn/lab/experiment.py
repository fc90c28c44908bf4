"""How every experiment is started: one `run(out, settings, seed=0, progress=True)` for all."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from lddyn.lab.record import Lab, Results
from lddyn.lab.settings import Settings
from lddyn.memory import is_out_of_memory, name_memory

__all__ = ["Run", "experiment"]

S = TypeVar("S", bound=Settings)
_S = TypeVar("_S", bound=Settings, contravariant=True)

_COMMON = """

Args:
    out: Folder for everything. A run that was stopped continues there.
    settings: See `lddyn.lab.settings.{kind}`; None: the defaults.
    seed: Of all random numbers.
    progress: Show bars on standard error.

Returns:
    What results.json holds.

Raises:
    ValueError: If a setting is out of bounds, the data are corrupt, or the folder holds another
        experiment.
    ImportError: If a package of `lddyn[lab]` is needed and not installed.
    MemoryError: By Python, or torch's OutOfMemoryError, if memory runs out; finished steps are
        kept in the folder, and the message says what to do.
"""


# Settings that decide how much memory an experiment takes.
_SIZES = ("limit", "prompts", "batch", "train", "cases", "length")


def _after_memory(lab: Lab) -> str:
    """What to do after an experiment ran out of memory."""
    sizes = " or ".join(f"--{name}" for name in _SIZES if name in lab.options)
    smaller = f", or give another --out with a smaller {sizes}" if sizes else ""
    return (
        f"the finished steps are kept in {lab.folder}; free some memory and give the same command "
        f"again, which goes on there{smaller}"
    )


class Run(Protocol[_S]):
    """What `run` of every experiment's package is."""

    def __call__(
        self,
        out: str | os.PathLike[str],
        settings: _S | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Results:
        """Runs the experiment and returns what results.json holds."""


def experiment(name: str, kind: type[S]) -> Callable[[Callable[[Lab, S], Results]], Run[S]]:
    """Makes `run(out, settings, seed, progress)` of a function (lab, settings) → results.

    Args:
        name: Of the experiment, and of its package.
        kind: The class of its settings.
    """

    def decorate(measure: Callable[[Lab, S], Results]) -> Run[S]:
        def run(
            out: str | os.PathLike[str],
            settings: S | None = None,
            *,
            seed: int = 0,
            progress: bool = True,
        ) -> Results:
            chosen = settings or kind()
            lab = Lab(name, Path(out), seed, chosen.decisive(), progress)
            try:
                return measure(lab, chosen)
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    name_memory(error, instead=_after_memory(lab))
                raise

        run.__module__ = measure.__module__
        run.__doc__ = inspect.cleandoc(measure.__doc__ or "") + _COMMON.format(kind=kind.__name__)
        return run

    return decorate
