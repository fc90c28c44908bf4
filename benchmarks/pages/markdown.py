"""Markdown of numbers: tables, durations, sizes, where a result comes from."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def made_by(section: dict) -> str:
    """Where a section's numbers come from."""
    m = section["made_by"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['device']}; Python {m['python']}, torch "
        f"{m['torch']}, transformers {m['transformers']}; commit {m['commit']}, {m['date']}"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2g} ms"


def megabytes(value: float) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:,.0f} MB"


def small_bytes(value: float) -> str:
    """Bytes in the unit that fits."""
    if value >= 1e6:
        return f"{value / 1e6:.1f} MB"
    return f"{value / 1e3:.1f} kB" if value else "–"
