"""Numbers in words, as sentences and pages of a diagnosis have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lddyn.text import signed

__all__ = ["count", "distinct", "moves", "named", "percent", "size", "true_minus"]


def true_minus(text: str) -> str:
    """The text with real minus signs."""
    return text.replace("-", "−")


def size(value: float) -> str:
    """A magnitude: "0.42 nats"."""
    return f"{signed(abs(value), 2).lstrip('+')} nat{'' if f'{abs(value):.2g}' == '1' else 's'}"


def moves(value: float) -> str:
    """A change: "rises by 0.42 nats"."""
    if abs(value) < 5e-7:
        return "stays"
    return f"{'rises' if value > 0 else 'falls'} by {size(value)}"


def count(number: float, of: str = "pair") -> str:
    """A number of things: "3 pairs", "no pair"."""
    return f"{number or 'no'} {of}{'' if number <= 1 else 's'}"


def percent(part: float) -> str:
    """A part of 1: "42%"."""
    return true_minus(f"{100 * part:.0f}%")


def named(numbers: Sequence[int], noun: str, most: int = 5) -> str:
    """Pairs by their numbers: "rows 3, 5 …"."""
    shown = ", ".join(map(str, numbers[:most])) + (" …" if len(numbers) > most else "")
    return f"{noun}{'' if len(numbers) == 1 else 's'} {shown}"


def distinct(losses: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of losses without those that are `alike` to one before."""
    told: set[str] = set()
    kept = []
    for row in losses:
        if row["objective"] not in told:
            kept.append(row)
            told.update(row["alike"])
    return kept
