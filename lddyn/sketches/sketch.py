"""How a matrix gradient Σ_t δ[t] ⊗ x[t] is projected to a few numbers: kinds, sizes, variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn import ops
from lddyn.sketches.projections import (
    Stream,
    Term,
    dense,
    frame_moments,
    key,
    normal_moments,
    sign_moments,
    sparse,
    tensor_sketch,
    tensor_sketch_moments,
    two_sided,
    two_sided_matrix,
    variance,
)

KINDS = ("twosided", "lowrank", "sjlt", "rademacher", "gaussian", "tensorsketch")


@dataclass(frozen=True)
class Sketch:
    """How token gradients are projected: R independent repeats of S with E⟨S A, S B⟩ = ⟨A, B⟩.

    | kind | S A |
    |---|---|
    | `"twosided"` | S A S'ᵀ with random frames S and S', computed from the factors δ and x alone |
    | `"lowrank"` | A_ρ, the part of rank ρ, is stored; the rest is estimated, without bias, by \
⟨S A, S B⟩ − ⟨S A_ρ, S B_ρ⟩, two-sided |
    | `"sjlt"` | every entry of A is added, with a sign, to one bucket of each repeat |
    | `"rademacher"`, `"gaussian"` | a dense random matrix S times A |
    | `"tensorsketch"` | count sketches of both factors, convolved |

    Attributes:
        kind: One of the above.
        k: Numbers per token for all sketched gradients, all layers and repeats together.
            `choose_layout` divides them in proportion to the layers' squared gradient norms.
        seed: Any integer. Random streams are keyed by (seed, parameter name, use).
        repeats: R. The standard error has R − 1 degrees of freedom.
        sides: Frames of two-sided sketches: `"orthogonal"` (Haar frames) or `"sign"` (the op
            `sketch`).
        rank: ρ of `"lowrank"`.

    Raises:
        ValueError: If an argument is not one of these.

    Sources: two-sided: Choe et al. 2024 (LoGra), with frames in place of its scaled normals; SJLT:
    Kane & Nelson 2014; TensorSketch: Pham & Pagh 2013. Variances and when to use which:
    `docs/sketches.md`.

    Example:
        >>> import torch, lddyn
        >>> sketch = lddyn.Sketch(k=256, seed=3)
        >>> x, grads = torch.randn(5, 16), torch.randn(2, 5, 12)
        >>> sketch.apply("layer.weight", x, grads).shape
        torch.Size([2, 8, 32])
    """

    kind: str = "twosided"
    k: int = 4096
    seed: int = 0
    repeats: int = 8
    sides: str = "orthogonal"
    rank: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.sides not in ("orthogonal", "sign"):
            raise ValueError(f"sides must be 'orthogonal' or 'sign', got {self.sides!r}")
        for name, least in (("repeats", 2), ("k", 1), ("rank", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.k < self.repeats:
            raise ValueError(
                f"k counts all {self.repeats} repeats, so it must be at least {self.repeats}, got "
                f"{self.k}"
            )

    def sizes(self, shape: Sequence[int], size: int) -> tuple[int, int]:
        """Numbers of one repeat for a (rows, columns) gradient, as (left, right); at most `size`.

        Two-sided: the pair with the least variance where the cosine of one side's factors is 1/2.
        TensorSketch: an odd number, because only then all of the variance has a closed form.
        Otherwise (size, 1).
        """
        rows, columns = shape
        if self.kind == "tensorsketch" and columns > 1:
            return max(1, (size - 1) // 2 * 2 + 1), 1
        if self.kind not in ("twosided", "lowrank"):
            return size, 1
        return best_sizes(rows, columns, size)

    def apply(
        self, parameter_name: str, activations: Tensor, grads: Tensor, size: int | None = None
    ) -> Tensor:
        """Sketches of the gradients Σ_t grads[c, t] ⊗ activations[t] of one weight.

        Args:
            parameter_name: Canonical name; every layer must have its own.
            activations: Layer input (T, d_in); or (c, d_in), each cotangent's own row.
            grads: Cotangents at the layer's output (c, T, d_out); or (c, d_out) where each
                cotangent has its own row.
            size: Numbers of one repeat; default k // R, as if this were the only layer.

        Returns:
            (c, R, k_layer), float32 (float64 for float64); the inner product of two tokens is the
            mean over R of ⟨out[c, r], out'[c', r]⟩.

        Raises:
            ValueError: If shapes disagree, or size is below 1.

        Cost: two-sided 2 T R (κ_o d_out + κ_i d_in + κ_o κ_i) FLOPs a token, of which the term with
        d_in is shared by all tokens; other kinds as in `docs/sketches.md`.
        """
        own_rows = grads.dim() == 2
        if activations.dim() != 2 or grads.dim() not in (2, 3):
            raise ValueError(
                "activations must be (T, d_in) and grads (c, T, d_out), or (c, d_in) and "
                f"(c, d_out); got {tuple(activations.shape)} and {tuple(grads.shape)}"
            )
        count = grads.shape[0] if own_rows else grads.shape[1]
        if len(activations) != count:
            raise ValueError(
                f"activations have {len(activations)} rows, grads {count}: both must come from the "
                "same layer and sequence"
            )
        size = self.k // self.repeats if size is None else size
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        dtype = torch.promote_types(grads.dtype, torch.float32)
        left, right = grads.to(dtype), activations.to(dtype)
        term = Term(left[:, None], right[:, None]) if own_rows else Term(left, right)
        shape = left.shape[-1], right.shape[-1]
        return self.project(parameter_name, [term], shape, self.sizes(shape, size))

    def project(
        self, name: str, terms: Sequence[Term], shape: tuple[int, int], sizes: tuple[int, int]
    ) -> Tensor:
        """Sketches (c, R, sizes[0] sizes[1]) of the gradients that are sums of these terms.

        Args:
            name: Parameter name, the key of the random streams.
            terms: Terms of each of c gradients.
            shape: (rows, columns) of a gradient.
            sizes: Numbers of one repeat (left, right); see `sizes`.
        """
        stream, size = Stream(self.seed, name, self.repeats), sizes[0]
        one_hot = any(term.one_hot for term in terms)
        vector = shape[1] == 1
        if one_hot or vector or self.kind in ("twosided", "lowrank"):
            if self.sides == "sign" and not one_hot and not vector:
                return self._signed(stream, terms, sizes)
            return two_sided(stream, terms, shape, sizes).flatten(2)
        if self.kind == "tensorsketch":
            return tensor_sketch(stream, terms, shape, size)
        if self.kind == "sjlt":
            return sparse(stream, terms, shape, size)
        return dense(stream, terms, shape, size, self.kind == "gaussian")

    def project_matrix(self, name: str, matrix: Tensor, sizes: tuple[int, int]) -> Tensor:
        """`project` of one gradient (rows, columns) that is not given by factors, (1, R, ·).

        Raises:
            ValueError: If the sketch's kind needs factors.

        Cost: two-sided 2 R sizes[0] rows columns FLOPs.
        """
        stream = Stream(self.seed, name, self.repeats)
        if matrix.shape[1] > 1 and self.kind in ("twosided", "lowrank") and self.sides != "sign":
            return two_sided_matrix(stream, matrix, sizes).flatten(2)
        if matrix.shape[1] > 1 and self.kind not in ("sjlt", "rademacher", "gaussian"):
            raise ValueError(
                "preconditioned gradients are no sums of few outer products: the sketch must be "
                f"'twosided' with orthogonal sides, 'sjlt', 'rademacher' or 'gaussian', got {self}"
            )
        identity = torch.eye(matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
        term = Term(matrix.T[None], identity[None])
        shape = int(matrix.shape[0]), int(matrix.shape[1])
        return self.project(name, [term], shape, sizes)

    def _signed(self, stream: Stream, terms: Sequence[Term], sizes: tuple[int, int]) -> Tensor:
        """Sketches by the op `sketch`: one call for all cotangents that share their inputs."""
        seed = key(self.seed, stream.name, "op")
        parts = []
        for term in terms:
            if term.left.dim() == 3 and term.right.dim() == 2:
                parts.append(ops.sketch(term.right, term.left, *sizes, self.repeats, seed))
            else:
                pairs = [term.one(c) for c in range(len(term))]
                each = [ops.sketch(y, x[None], *sizes, self.repeats, seed) for x, y in pairs]
                parts.append(torch.cat(each))
        return torch.stack(parts).sum(0).flatten(2)

    def moments(self, kind: str, shape: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
        """W (4, 4) with E⟨S A, S B⟩² = Σ W[p, q] T[p, q] in one repeat, T of `contractions`.

        Args:
            kind: Kind of a `Part`.
            shape: (rows, columns) of A and B.
            sizes: Numbers of one repeat (left, right).
        """
        if kind in ("onehot", "head", "summed"):
            left, right = sign_moments(sizes[0]), frame_moments(sizes[1], shape[1])
        elif kind == "vector" or (self.kind in ("twosided", "lowrank") and self.sides != "sign"):
            left, right = frame_moments(sizes[0], shape[0]), frame_moments(sizes[1], shape[1])
        elif self.kind in ("twosided", "lowrank"):
            left, right = sign_moments(sizes[0]), sign_moments(sizes[1])
        elif self.kind == "tensorsketch":
            return tensor_sketch_moments(sizes[0])
        else:  # of A as one long vector
            of = normal_moments if self.kind == "gaussian" else sign_moments
            return of(sizes[0]).diag()
        return left[:, None] * right[None, :]

    def variance(self, one: Tensor, other: Tensor, size: int | None = None) -> float:
        """Exact variance of the estimated ⟨A, B⟩, the mean over the R repeats.

        With c = ⟨A, B⟩, N = ‖A‖²‖B‖², g = Σ A²B², and size k for one repeat:

            gaussian                (N + c²) / k
            rademacher, sjlt        (N + c² − 2g) / k
            twosided, tensorsketch  a sum over the pairings of row and column indices
                                    (`docs/sketches.md`)

        all divided by R.

        Args:
            one: A (rows, columns).
            other: B, of the same shape.
            size: Numbers of one repeat, as in `apply`.

        Raises:
            ValueError: If the shapes disagree.

        Cost: 16 contractions, 4 rows columns min(rows, columns) FLOPs each, in float64.
        """
        if one.shape != other.shape or one.dim() != 2:
            raise ValueError(
                "one and other must be matrices of one shape, got "
                f"{tuple(one.shape)} and {tuple(other.shape)}"
            )
        shape = (int(one.shape[0]), int(one.shape[1]))
        sizes = self.sizes(shape, self.k // self.repeats if size is None else size)
        kind = "vector" if shape[1] == 1 else "sketch"
        return variance(self.moments(kind, shape, sizes), [(1.0, one, other)]) / self.repeats


def best_sizes(rows: int, columns: int, size: int) -> tuple[int, int]:
    """(left, right) with left × right <= size and the least two-sided variance.

    The variance over ‖A‖²‖B‖² is (β_l + β_r) / 4 + β_l β_r with β = 1/size − 1/width, where the
    squared cosine of one side's factors is 1/4.
    """
    least, best = math.inf, (1, 1)
    for left in range(1, min(rows, size) + 1):
        right = min(columns, size // left)
        beta_l, beta_r = 1 / left - 1 / rows, 1 / right - 1 / columns
        score = (beta_l + beta_r) / 4 + beta_l * beta_r
        if score < least:
            least, best = score, (left, right)
    return best
