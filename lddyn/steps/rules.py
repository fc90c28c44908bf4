"""Where along a step the observed gradients are taken, and how the error falls with the rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A quadrature rule for Δ log π(y) = ∫ ⟨∇ log π(y; θ + s Δθ), Δθ⟩ ds over s from 0 to 1.

    Attributes:
        points: (s, weight) for each gradient; weights sum to one.
        order: The error against the real step falls as lr to this power.
    """

    points: tuple[tuple[float, float], ...]
    order: int


RULES = {
    "start": Rule(((0.0, 1.0),), order=2),
    "midpoint": Rule(((0.5, 1.0),), order=3),
    "simpson": Rule(((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)), order=5),
}


def rule_named(name: str) -> Rule:
    """The rule with this name.

    Raises:
        ValueError: If there is none.
    """
    if name not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {name!r}")
    return RULES[name]
