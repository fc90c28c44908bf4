"""Questions about a model that are answered by trying once, and the tolerances of such trials.

The engine assumes nothing of an architecture. A faster way (a norm in closed form, sequences in one
batch, responses packed into one forward pass) is tried on the model at hand, its result is compared
with the slow way's, and the answer is remembered for as long as the model lives:

    packs = Trial("responses can be packed", tolerant=True)
    ...
    if packs.passes(model, "float32", lambda: close(packed(model), alone(model), limit)):
        ...

`fallbacks(owner)` tells a user which ways a model does not fit, and why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lddyn.memory import is_out_of_memory

_Result = TypeVar("_Result")


class UnfitError(Exception):
    """A model does not fit the way that was tried; the message says why."""


# --------------------------------------------------------------------------- tolerances


@dataclass(frozen=True)
class Tolerance:
    """The largest relative difference that counts as rounding, by the dtype of a computation."""

    float64: float
    float32: float
    float16: float
    bfloat16: float

    def of(self, dtype: torch.dtype) -> float:
        """The limit for a dtype; 0 for one that is not floating point."""
        return float(getattr(self, str(dtype).removeprefix("torch."), 0.0))

    def loosest(self, tensors: Iterable[Tensor]) -> float:
        """The limit for the least precise of several tensors (a float32 LoRA on bfloat16)."""
        return max(self.of(tensor.dtype) for tensor in tensors)


# One segment, replayed on other rows or in a batch: products of other sizes.
REPLAYED = Tolerance(1e-4, 1e-4, 5e-2, 5e-2)
# Logits by lddyn's attention and by the model's own.
OWN_ATTENTION = Tolerance(1e-3, 1e-3, 0.2, 0.2)
# Logits of one token, packed and alone: eight roundings of the dtype.
PACKED = Tolerance(1e-5, 1e-5, 8 * 2**-10, 8 * 2**-7)
# Logits of one token beside other prompts: less than the rounding of a 16-bit dtype.
SEPARATE = Tolerance(1e-5, 1e-5, 1e-5, 1e-5)
# A norm in closed form and the module itself.
NORM = Tolerance(1e-5, 1e-5, 2 * 2**-10, 2 * 2**-7)
# A rotary embedding in closed form and the model's function: 64 roundings.
ROTARY = Tolerance(64 * 2**-52, 64 * 2**-23, 64 * 2**-10, 64 * 2**-7)
# The gradient of one parameter by factors and by a plain backward pass, relative to its own norm,
# and to the norm of all gradients, beside which a small one is rounding.
GRADIENT = Tolerance(1e-4, 1e-3, 1e-1, 2e-1)
GRADIENT_OF_ALL = Tolerance(1e-6, 3e-5, 5e-2, 1e-1)
# Row sums of an influence table: by factors, and by one push of the whole step.
WHOLE_STEP = Tolerance(1e-5, 1e-3, 5e-2, 2e-1)


def close(value: Tensor, expected: Tensor, limit: float, *, by_row: bool = False) -> bool:
    """Whether ‖value − expected‖ <= limit ‖expected‖; `by_row`, for every row of the last axis.

    Norms are taken in float64. NaN is not close to anything.
    """
    difference, size = (x.double() for x in (value.double() - expected.double(), expected))
    if by_row:
        return bool((difference.norm(dim=-1) <= limit * size.norm(dim=-1)).all())
    return float(difference.norm()) <= limit * float(size.norm())


# --------------------------------------------------------------------------- trials


@dataclass(frozen=True)
class _Verdict:
    passed: bool
    size: int
    reason: str


_Verdicts = dict[Hashable, _Verdict]


class Trial:
    """One question that is asked of many models, and answered once for each.

    Verdicts are kept by owner (a model, or an Anatomy) and key, and are forgotten with the owner.

    Args:
        question: What a model must fulfil, for people: "sequences keep apart in a batch".
        tolerant: Any exception of a trial means that the model does not fit; by default only
            `UnfitError` does. Running out of memory is never remembered: the answer is no for now.
    """

    _all: list[Trial] = []  # noqa: RUF012

    def __init__(self, question: str, *, tolerant: bool = False):
        self.question, self.tolerant = question, tolerant
        self._owners: weakref.WeakKeyDictionary[object, _Verdicts] = weakref.WeakKeyDictionary()
        Trial._all.append(self)

    def passes(
        self, owner: object, key: Hashable, check: Callable[[], bool], *, size: int = 0
    ) -> bool:
        """Whether the model fits; `check` runs where there is no verdict yet.

        Args:
            owner: The model, or its Anatomy.
            key: Tells one use of the question from another: a dtype, a segment.
            check: Compares both ways. It may raise `UnfitError` with the reason.
            size: A verdict also holds for smaller sizes; a larger one is tried anew.
        """
        known = self.verdicts(owner).get(key)
        if known is not None and size <= known.size:
            return known.passed
        try:
            passed, reason = check(), "the results differ"
        except Exception as error:
            if is_out_of_memory(error):
                return False
            if not (self.tolerant or isinstance(error, UnfitError)):
                raise
            passed, reason = False, f"{type(error).__name__}: {error}"
        self.settle(owner, key, passed, "" if passed else reason, size=size)
        return passed

    def attempt(self, owner: object, key: Hashable, run: Callable[[], _Result]) -> _Result | None:
        """What `run` returns; None if it raises `UnfitError`, and ever after without running."""
        known = self.verdicts(owner).get(key)
        if known is not None and not known.passed:
            return None
        try:
            result = run()
        except UnfitError as error:
            self.settle(owner, key, False, str(error))
            return None
        self.settle(owner, key, True)
        return result

    def verdict(self, owner: object, key: Hashable) -> bool | None:
        """Whether the model fits, or None if that was not tried."""
        known = self.verdicts(owner).get(key)
        return None if known is None else known.passed

    def settle(
        self, owner: object, key: Hashable, passed: bool, reason: str = "", *, size: int = 0
    ) -> None:
        """Remembers a verdict."""
        self.verdicts(owner)[key] = _Verdict(passed, size, reason)

    def verdicts(self, owner: object) -> _Verdicts:
        """All verdicts for an owner, by key."""
        return self._owners.setdefault(owner, {})


def fallbacks(owner: object) -> dict[str, str]:
    """Which faster ways a model (or Anatomy) does not fit: "question (key)" -> reason."""
    return {
        f"{trial.question} ({key})" if str(key) else trial.question: verdict.reason
        for trial in Trial._all
        for key, verdict in trial._owners.get(owner, {}).items()
        if not verdict.passed
    }
