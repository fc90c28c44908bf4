"""The kernel as a scaled identity and factors of low rank.

    K_{m,l} ≈ c_{m,l} I + U X_m Y_lᵀ Uᵀ,     X (M, d, R), Y (L, d, R)

with U = W (tied heads: [W, E], see `norms`), and one rank R for all token pairs together.
`range_finder` makes the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lddyn import ops
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.head import back_project, project
from lddyn.engine.trace import Trace
from lddyn.entk.norms import span_basis
from lddyn.estimate import Estimate
from lddyn.files import JsonObject, json_safe
from lddyn.results import Result, load_result, save_result

KIND, FORMAT = "lddyn.LowRank", 1
_SIDES = ("observed", "updated")


@dataclass
class Ends:
    """What the cotangents of one sequence of M tokens need.

    Attributes:
        logits: (M, V).
        targets: The response's own tokens, (M,).
        slope: Derivative (M, V) of what follows the head (soft-capping); None: nothing does.
    """

    logits: Tensor
    targets: Tensor
    slope: Tensor | None

    @classmethod
    def of(cls, trace: Trace) -> Ends:
        """Those of a traced sequence."""
        return cls(trace.logits, trace.targets, trace.slope)

    def cotangents(self, given: Tensor | None, name: str) -> Tensor:
        """Cotangents (M, V) on the raw logits W h + b; None: those of log-probs, e_y − π."""
        if given is None:
            given = ops.residual(self.logits, self.targets)[0]
        if given.shape != self.logits.shape:
            raise ValueError(
                f"{name} must be (tokens, vocabulary) = {tuple(self.logits.shape)}, got "
                f"{tuple(given.shape)}"
            )
        given = given.to(self.logits)
        return given if self.slope is None else given * self.slope


@dataclass(repr=False, eq=False)
class LowRank(Result):
    """K as a scaled identity and factors of rank R; made by `NTK.lowrank`.

    It belongs to the parameters, sequences and head weight that it was made of.

    Attributes:
        left: X (M, d, R), coordinates of the images in U = W, or U = [W, E] for a tied head.
        right: Y (L, d, R), likewise.
        head: c (M, L).
        weight: W (V, d), the weight of the model's head.
        ids: Tokens of E; empty where the head is not tied.
        ends: The cotangents' side of both sequences.
        residual: ‖Π (K − K̂) Π‖_F over all token pairs, an Estimate ().
        centred: Whether Π was in the metric of the projection and of the residual.
    """

    left: Tensor
    right: Tensor
    head: Tensor
    weight: Tensor
    ids: Tensor
    ends: tuple[Ends, Ends]
    residual: Estimate
    centred: bool

    @property
    def rank(self) -> int:
        """R."""
        return int(self.left.shape[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(M, V, L, V)."""
        return (*self.ends[0].logits.shape, *self.ends[1].logits.shape)

    @property
    def T(self) -> LowRank:
        """The transpose, K̂(χu, χo)."""
        return LowRank(
            self.right,
            self.left,
            self.head.T,
            self.weight,
            self.ids,
            (self.ends[1], self.ends[0]),
            self.residual,
            self.centred,
        )

    def _below(self, v: Tensor) -> Tensor:
        """Uᵀ v (n, d) of cotangents on the raw logits (n, V)."""
        return torch.cat([back_project(v, self.weight), v[:, self.ids]], 1)

    def _above(self, y: Tensor) -> Tensor:
        """U y (n, V)."""
        width = self.weight.shape[1]
        return project(y[:, :width], self.weight).index_add(1, self.ids, y[:, width:])

    def __matmul__(self, g: Tensor) -> Tensor:
        """K̂ G: logit cotangents (L, V) -> (M, V). Cost: 2 V d (M + L) + 2 d R (M + L) FLOPs."""
        v = self.ends[1].cotangents(g, "G")
        weights = torch.einsum("ldr,ld->r", self.right, self._below(v))
        moved = self._above(self.left @ weights) + self.head @ v
        slope = self.ends[0].slope
        return moved if slope is None else moved * slope

    def gram(self, v_o: Tensor | None = None, v_u: Tensor | None = None) -> Tensor:
        """v_oᵀ K̂ v_u for every token pair (M, L); default: the log-prob rows, as in NTK.gram."""
        one = self.ends[0].cotangents(v_o, "v_o")
        other = self.ends[1].cotangents(v_u, "v_u")
        left = torch.einsum("mdr,md->mr", self.left, self._below(one))
        right = torch.einsum("ldr,ld->lr", self.right, self._below(other))
        return left @ right.T + self.head * (one @ other.T)

    def frobenius(self) -> Tensor:
        """‖Π K̂_{m,l} Π‖_F (M, L), exact for K̂; without Π where `centred` is False.

        Raises:
            NotImplementedError: If the model changes its logits after the head.

        Cost: 2 V d² FLOPs, then (M + L) d² R + M L R².
        """
        if self.ends[0].slope is not None or self.ends[1].slope is not None:
            raise NotImplementedError(
                "the model changes its logits after the head: use NTK.frobenius"
            )
        basis = span_basis(self.weight, self.ids, self.centred)
        left, right = (
            torch.einsum("dk,mdr->mkr", basis.vectors * basis.values.sqrt(), x.double())
            for x in (self.left, self.right)
        )
        own = torch.einsum("mkr,mks->mrs", left, left), torch.einsum("mkr,mks->mrs", right, right)
        square = torch.einsum("mrs,lrs->ml", *own)
        head = self.head.double()
        square += 2 * head * torch.einsum("mkr,lkr->ml", left, right)
        square += head.pow(2) * (self.shape[1] - int(self.centred))
        return square.clamp(min=0).sqrt()

    def summary(self) -> JsonObject:
        """Rank, tokens of both sides, vocabulary, residual with its standard error, centred."""
        return {
            "rank": self.rank,
            "observed_tokens": self.shape[0],
            "updated_tokens": self.shape[2],
            "vocabulary": self.shape[1],
            "residual": json_safe(float(self.residual.value)),
            "residual_stderr": json_safe(float(self.residual.stderr)),
            "centred": self.centred,
        }

    def explain(self) -> str:
        """Its rank, and how far it is from the kernel."""
        m, vocabulary, count, _ = self.shape
        metric = "seen by log-probs" if self.centred else "of raw logits"
        return (
            f"rank {self.rank} and a scaled identity for {m} x {count} token pairs, vocabulary "
            f"{vocabulary}; distance ‖K − K̂‖_F {metric}: {self.residual.explain()}"
        )

    def to_dict(self) -> JsonObject:
        """The summary and all factors as nested lists, JSON-safe; not the head and the logits."""
        factors = {"left": self.left, "right": self.right, "head": self.head, "ids": self.ids}
        return {
            **self.summary(),
            "residual": self.residual.to_dict(),
            **{name: json_safe(factor.tolist()) for name, factor in factors.items()},
        }

    def save(self, path: str | Path) -> None:
        """Writes `path`.json and its tensors: all but the weight of the model's head."""
        tensors = {
            "left": self.left,
            "right": self.right,
            "head": self.head,
            "ids": self.ids,
            "residual": self.residual.value,
            "residual_stderr": self.residual.stderr,
        }
        for name, end in zip(_SIDES, self.ends, strict=True):
            tensors |= {f"{name}.logits": end.logits, f"{name}.targets": end.targets}
            if end.slope is not None:
                tensors[f"{name}.slope"] = end.slope
        facts = {
            "samples": self.residual.samples,
            "centred": self.centred,
            "weight": _fingerprint(self.weight),
        }
        save_result(path, KIND, FORMAT, tensors, facts)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | Anatomy) -> LowRank:
        """Reads what `save` wrote; the head's weight is taken from the model.

        Args:
            path: As for `save`.
            model: The model that the factors were made of, at that step.

        Raises:
            ValueError: If a file is missing, damaged or of another format, or the model's head is
                not the one that the factors belong to.
        """
        weight = Anatomy.of(model, allow_frozen=True).head.matrix
        held, facts = load_result(path, KIND, FORMAT, device=str(weight.device))
        own = _fingerprint(weight)
        if own != facts["weight"]:
            raise ValueError(
                f"the head's weight (shape, sum, norm) must be {facts['weight']}, got {own}: load "
                "with the model, at the step, that the factors were made of"
            )
        observed, updated = (
            Ends(held[f"{n}.logits"], held[f"{n}.targets"], held.get(f"{n}.slope")) for n in _SIDES
        )
        residual = Estimate(held["residual"], held["residual_stderr"], facts["samples"])
        return cls(
            held["left"],
            held["right"],
            held["head"],
            weight,
            held["ids"],
            (observed, updated),
            residual,
            facts["centred"],
        )


def _fingerprint(weight: Tensor) -> list[Any]:
    wide = weight.detach().double()
    return [list(weight.shape), float(wide.sum()), float(wide.norm())]
