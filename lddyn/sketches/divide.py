"""Choosing a layout: how many sketch dimensions each parameter gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import undisturbed
from lddyn.errors import UnsupportedModelError
from lddyn.memory import cpu_threads
from lddyn.sketches.features import CHUNK
from lddyn.sketches.gradients import (
    Gradients,
    Room,
    base_name,
    head_sides,
    walk,
    walk_sequences,
    wide,
)
from lddyn.sketches.layout import Layout, Part, by_sequence
from lddyn.sketches.projections import (
    Stream,
    Term,
    low_rank,
    single,
    weigh,
)
from lddyn.sketches.sketch import Sketch, best_sizes

if TYPE_CHECKING:
    from torch import nn


_PILOT = 4, 8  # examples, and tokens of each, whose norms divide k


@dataclass
class _Claim:
    """What one parameter asks of k."""

    part: Part
    weight: float = 0.0  # its share: Σ ‖A‖² of the pilot's tokens; of a low-rank form, ‖A‖‖E‖
    copies: int = 1  # with a "minus", 2
    whole: int | None = None  # numbers that hold all of it, as `kept`
    kept: str = "exact"


@undisturbed
def plan_layout(
    model: nn.Module | Anatomy, examples: Sequence[Example], sketch: Sketch, by: str = "token"
) -> Layout:
    """Divides k over the parameters of a model: a layout for `features`.

    A parameter's share of k is its share of ‖gradient‖², averaged over up to 8 evenly spaced tokens
    of each of the first 4 examples, which makes the sum of the variances least; at least one number
    a repeat. What fits into its share as it is, is kept: a vector, a small matrix, or one whose
    gradients are outer products, as above the last attention. Beyond k come h of the head's v ⊗ h,
    of which v is sketched, and low-rank parts.

    By sequence, shares are those of the first 4 whole gradients. The layout is linear: the
    head is sketched like other weights, and a low rank is not looked for.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        examples: Sequences, of which the first are looked at.
        sketch: k, kind and the rest.
        by: `"token"` or `"sequence"`: what a row is.

    Returns:
        Layout; whoever shares it makes rows that can be compared.

    Raises:
        ValueError: If there is no example, `by` is neither, or k is too small for the number of
            parameters.
        UnsupportedModelError: If a parameter is used in two ways at once.

    Cost: a forward pass of 4 examples; the pullback and the materialised gradients of 32 tokens.
    """
    if not examples:
        raise ValueError("at least one example is needed to divide k over the parameters, got none")
    together = by_sequence(by)
    anatomy = Anatomy.of(model)
    squares: dict[str, float] = {}
    uses: dict[str, str] = {}
    dense: set[str] = set()  # whose gradients are not outer products
    low_rank_kind = sketch.kind == "lowrank" and not together

    def note(name: str, use: str, square: float) -> None:
        squares[name] = squares.get(name, 0.0) + square
        if uses.setdefault(name, use) != use:
            raise _mixed(name)

    def visit(rows: Tensor, found: Gradients) -> None:
        for name, terms in found.weights.items():
            base, use = base_name(name), use_of(name, terms)
            shape = int(anatomy.trainable[base].shape[-2]), int(anatomy.trainable[base].shape[-1])
            if together or name != base or not single(terms):
                dense.add(base)
            kept = None
            if low_rank_kind and use == "sketch" and not single(terms) and _alone(anatomy, base):
                stream = Stream(sketch.seed, base, sketch.repeats)
                kept = low_rank(stream, terms, shape, min(sketch.rank, *shape))
            for c in range(len(rows)):
                square = float(weigh(terms, c, shape[0]).square().sum())
                if kept is not None:  # ‖A_ρ‖² = ‖V‖², U is orthonormal
                    rest = max(square - float(kept[1][c].square().sum()), 0.0)
                    square = (square * rest) ** 0.5
                note(base, use, square)
        for name, vector in found.vectors.items():
            note(name, "vector", float(vector.square().sum()))
        if found.head is not None and (found.head.weight or found.head.bias):
            h, v = head_sides(found.head)
            if together and found.head.bias is not None:
                note(found.head.bias, "vector", float(v.sum(0).square().sum()))
                h = wide(found.head.hidden)
            both = (h @ h.T) * (v @ v.T)
            both = both if together else both.diagonal()
            squares["head"] = squares.get("head", 0.0) + float(both.sum())

    pilot = examples[: _PILOT[0]]
    if together:
        with cpu_threads(1):
            anatomy.trace(pilot[0])
            # One at a time and no graphs: a layout does not depend on what memory there is.
            walk_sequences(anatomy, pilot, None, Room(1, keep=False, least=0), visit)
        pilot = []
    for example in pilot:
        count = min(_PILOT[1], len(example))
        select = torch.linspace(0, len(example) - 1, count).round().long()
        with cpu_threads(1):
            trace = anatomy.trace(example)
            walk(trace, None, select.to(trace.positions.device), CHUNK, visit)
    # Three digits: what another device rounds differently should not move a number.
    squares = {name: float(f"{square:.3g}") for name, square in squares.items()}
    return Layout(sketch, _divide(anatomy, sketch, squares, uses, dense, together))


def _alone(anatomy: Anatomy, name: str) -> bool:
    """Whether all of a weight's gradient is seen at once: only then factors can stand for it."""
    return anatomy.trainable[name].dim() == 2 and len(anatomy.ledger[name].segments) == 1


def use_of(name: str, terms: Sequence[Term]) -> str:
    """How a parameter is used by its terms: one kind, or an error."""
    kinds = {term.one_hot for term in terms}
    if len(kinds) > 1:
        raise _mixed(name)
    return "onehot" if kinds.pop() else "sketch"


def _mixed(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is used in products and in some other way too; sketches cannot pair the two: use "
        "lddyn.ntk for this model, or freeze the parameter"
    )


def _divide(
    anatomy: Anatomy,
    sketch: Sketch,
    squares: dict[str, float],
    uses: dict[str, str],
    dense: set[str],
    together: bool,
) -> tuple[Part, ...]:
    fixed: list[Part] = []  # beyond k
    claims: list[_Claim] = []
    head = anatomy.head_weight, anatomy.head_bias
    for name, parameter in anatomy.trainable.items():
        tied = name == head[0] and anatomy.tied
        if name in head and not tied and not (together and name == head[1]):
            continue
        # A parameter that no pilot token reached may yet be reached: an expert of its own, say.
        vector = parameter.dim() not in (2, 3) or name in anatomy.direct
        lookup = "embedding" in anatomy.ledger[name].ops
        use = uses.get(name, "vector" if vector else "onehot" if lookup else "sketch")
        weight, size = squares.get(name, 0.0), parameter.numel()
        if use == "vector":
            claims.append(_Claim(Part(name, use, (size, 1), (1, 1)), weight, whole=size))
            continue
        shape = int(parameter.shape[-2]), int(parameter.shape[-1])
        claim = _Claim(Part(name, use, shape, (1, 1)), weight)
        claims.append(claim)
        if tied:
            if use != "onehot":
                raise _mixed(name)
            claim.copies = 1 if together else 2  # a sum is in the embedding's numbers
            claim.weight += 2 * (weight * squares["head"]) ** 0.5
            claim.weight += squares["head"] if together else 0.0
        elif use == "sketch" and name in uses and name not in dense and _alone(anatomy, name):
            claim.whole, claim.kept = sum(shape), "outer"
        elif (
            use == "sketch" and sketch.kind == "lowrank" and not together and _alone(anatomy, name)
        ):
            claim.copies = 2
            fixed.append(Part(name, "outer", shape, (min(sketch.rank, *shape), 1)))
        if parameter.dim() == 2 and claim.copies == 1 and size <= (claim.whole or size):
            claim.whole, claim.kept = size, "exact"
    if together and head[0] and not anatomy.tied:
        shape = anatomy.vocabulary, int(anatomy.head.weight.shape[1])
        part = Part(head[0], "summed", shape, (1, 1))
        claims.append(_Claim(part, squares["head"], whole=shape[0] * shape[1]))
    elif head != (None, None) and not together:
        width = (int(anatomy.head.weight.shape[1]) if head[0] else 0) + (1 if head[1] else 0)
        name = head[0] or head[1] or ""
        part = Part(name, "head", (anatomy.vocabulary, width), (1, 1))
        claims.append(_Claim(part, squares["head"], 1, anatomy.vocabulary, "outer"))
    return tuple(fixed + _shares(sketch, claims))


def _shares(sketch: Sketch, claims: list[_Claim]) -> list[Part]:
    """Sizes in proportion to the weights; what fits as it is leaves the rest to the others."""
    kept: dict[int, Part] = {}
    while True:
        waiting = [c for i, c in enumerate(claims) if i not in kept]
        taken = sum(claims[i].whole or 0 for i in kept)
        free = (sketch.k - taken) // sketch.repeats - sum(c.copies for c in waiting)
        if free < 0:
            least = sketch.repeats * sum(c.copies for c in claims)
            raise ValueError(
                f"k must be at least {least}, a number for each of {sketch.repeats} repeats of "
                f"{len(claims)} parameters, got {sketch.k}: raise k, lower repeats, or freeze "
                "parameters"
            )
        total = sum(c.weight for c in waiting) or 1.0
        sizes = {
            i: 1 + int(free * c.weight / total / c.copies)
            for i, c in enumerate(claims)
            if i not in kept
        }
        fits = {
            i: claims[i]
            for i, size in sizes.items()
            if claims[i].whole is not None and (claims[i].whole or 0) <= sketch.repeats * size
        }
        if not fits:
            break
        for i, claim in fits.items():
            shape = claim.part.shape
            numbers = 1 if claim.kept == "outer" else shape[0] * shape[1]
            kept[i] = Part(claim.part.name, claim.kept, shape, (numbers, 1))
    parts = []
    for i, claim in enumerate(claims):
        if i in kept:
            parts.append(kept[i])
            continue
        part, size = claim.part, sizes[i]
        if part.kind == "head":
            chosen = size, 1
        elif part.kind == "sketch":
            chosen = sketch.sizes(part.shape, size)
        else:
            chosen = best_sizes(*part.shape, size)
        parts.append(replace(part, sizes=chosen))
        if claim.copies == 2:
            parts.append(replace(part, kind="minus", sizes=chosen))
    return parts
