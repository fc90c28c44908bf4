"""How cotangents of one response move the logits of another: the head's own part, and the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lddyn.engine.pushforward import delta_log_probs


@dataclass(frozen=True, repr=False)
class Shift:
    """K G: how cotangents G of χu move the logits of χo, the head's own part apart.

    Attributes:
        head: The head's own part, (M, V).
        body: All the rest, (M, V).
        base_logits: Logits (M, V) at which `log_probs` takes π.
    """

    head: Tensor
    body: Tensor
    base_logits: Tensor

    def __repr__(self) -> str:
        tokens, vocabulary = self.head.shape
        head, body = float(self.head.norm()), float(self.body.norm())
        return f"Shift({tokens} x {vocabulary} logits; ‖head‖ {head:.3g}, ‖body‖ {body:.3g})"

    @property
    def logits(self) -> Tensor:
        """K G (M, V)."""
        return self.head + self.body

    def log_probs(self, part: str = "all") -> Tensor:
        """A K G (M, V), A = I − 1 πᵀ: the move of all log-probs.

        Args:
            part: "all", or "head" or "body" for one part of it.

        Raises:
            ValueError: If part is none of these.
        """
        parts = {"all": self.logits, "head": self.head, "body": self.body}
        if part not in parts:
            raise ValueError(f"part must be one of {sorted(parts)}, got {part!r}")
        return delta_log_probs(parts[part], self.base_logits)
