"""The tables of `lddyn env`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def env_parts(report: Mapping[str, Any]) -> Iterator[str | Table]:
    """What `lddyn.env` returned, as lines of text and tables."""
    from rich.table import Table

    for title in ("versions", "system", "compiled", "others", "precision", "variables"):
        table = Table("", "", title=title, show_header=False, title_justify="left")
        for name, value in report[title].items():
            if name.startswith("memory"):
                value = f"{value / 2**30:.1f} GiB"
            table.add_row(name, " ".join(value) if isinstance(value, list) else str(value))
        yield table if report[title] else f"{title}: none"
    for device in report["devices"]:
        yield f"{device['name']}, {device['capability']}, {device['memory'] / 2**30:.0f} GiB"
    if not report["devices"]:
        yield "devices: no GPU, cpu only"
    yield from _backends(report["backends"])
    for trap in report["warnings"]:
        yield f"warning {trap['name']}"
        for word, key in (("got", "got"), ("expected", "expected"), ("do this", "do")):
            yield f"  {word + ':':<9} {trap[key]}"
    if not report["warnings"]:
        yield "warnings: none"


def _backends(backends: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Iterator[str | Table]:
    """A table of which backend runs which op, and one line for each reason why one does not."""
    from rich.table import Table
    from rich.text import Text

    from lddyn import ops

    table = Table("op", "device", *ops.BACKENDS, title="backends", title_justify="left")
    reasons: dict[str, str] = {}  # the same for all ops of a device
    for op, devices in backends.items():
        for device, refusals in devices.items():
            cells = []
            for backend, reason in refusals.items():
                absent = reason.startswith(f"{op} has no")
                if reason and not absent:
                    reasons[f"no {backend} on {device}"] = reason
                yes = Text("no", "red") if reason else Text("yes", "green")
                cells.append(Text("–") if absent else yes)
            table.add_row(op, device, *cells)
    yield table
    yield from (f"{what}: {reason}" for what, reason in reasons.items())


def selftest_parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str | Table]:
    """What `lddyn.selftest` returned, as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table("op", "device", "backend", "dtype", "error", "bound", "", title="self-test")
    for row in rows:
        verdict = Text("ok", "green") if row["ok"] else Text("FAILED", "red")
        numbers = f"{row['error']:.1e}", f"{row['bound']:.0e}"
        table.add_row(row["op"], row["device"], row["backend"], row["dtype"], *numbers, verdict)
    yield table
