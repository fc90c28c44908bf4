"""FOLDER/dynamics.jsonl: the rows of a watched run, one line per pass."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lddyn.files import JsonObject, append_text, replace_file, sealed
from lddyn.probes.probe_set import Encoded
from lddyn.report.dynamics import read_lines

__all__ = ["DynamicsFile"]

# One pass: "step", and numbers by name; NaN where there is nothing to average.
Row = dict[str, float]


class DynamicsFile:
    """The rows of one run in its folder.

    A line is the row, "each" (log-prob of each example, nats), "probes" (digest of the probes) and
    "digest" (of the line).

    Args:
        folder: Folder of the run; it is made.
        probes: What the run measures.
    """

    def __init__(self, folder: Path, probes: Encoded) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "dynamics.jsonl"
        self._probes = _digest(probes)
        self._written: tuple[int, int] | None = None  # the file as this run left it

    def resume(self, step: int) -> tuple[list[Row], Tensor | None]:
        """Keep the rows up to a checkpoint; those after it belong to steps that were undone.

        A file of another run, one with rows of other probes, or a damaged one is first renamed to
        dynamics-1.jsonl, dynamics-2.jsonl, …

        Args:
            step: Steps before the run goes on; 0 begins a new run.

        Returns:
            The rows, and the log-prob of each example in the first of them, (N,).
        """
        kept: list[JsonObject] = []
        foreign = False
        if self.path.exists():
            try:
                rows = read_lines(self.path) if step else []
                foreign = not step or any(row.get("probes") != self._probes for row in rows)
                kept = [row for row in rows if row["step"] <= step and not foreign]
            except ValueError as error:
                foreign = True
                warnings.warn(f"{error}; it is set aside", stacklevel=2)
        if foreign:
            self._set_aside()
        replace_file(self.path, "".join(sealed(row, indent=None) for row in kept))
        self._written = self._now()
        rows = [
            {k: _number(v) for k, v in row.items() if k not in ("each", "probes")} for row in kept
        ]
        if not kept:
            return rows, None
        return rows, torch.tensor([_number(v) for v in kept[0]["each"]], dtype=torch.float64)

    def append(self, row: Mapping[str, float], each: Sequence[float]) -> None:
        """Write the row of one pass.

        Args:
            row: The row.
            each: Log-prob of each example, nats.

        Raises:
            ValueError: If another run has begun to write there.
        """
        if self._written not in (None, self._now()):
            raise ValueError(
                f"{self.path}: another run writes there, too; give each run a folder of its own"
            )
        line = {**row, "each": [round(x, 4) for x in each], "probes": self._probes}
        append_text(self.path, sealed(line, indent=None))
        self._written = self._now()

    def _now(self) -> tuple[int, int]:
        """Which file is there, and how long it is."""
        about = self.path.stat()
        return about.st_ino, about.st_size

    def _set_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"dynamics-{number}.jsonl")).exists():
            number += 1
        self.path.replace(aside)


def _number(value: float | None) -> float:
    """A number of a line; JSON has null for NaN."""
    return math.nan if value is None else value


def _digest(probes: Encoded) -> str:
    """Digest of examples and fields: a run goes on only with rows of the same probes."""
    parts = [*probes.fields, *(e.content_id for e in probes.examples), str(probes.cells.tolist())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
