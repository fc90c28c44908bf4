"""Sketches of token gradients: what is kept of each parameter, and how two rows are compared.

`Sketch` says how a matrix gradient Σ_t δ[t] ⊗ x[t] is projected; `Layout` how the numbers of all
parameters make one row, and how two rows make an unbiased inner product with its standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lddyn import ops
from lddyn.estimate import Estimate
from lddyn.projections import (
    Stream,
    Term,
    dense,
    frame_moments,
    key,
    kronecker_variance,
    low_rank,
    normal_moments,
    sign_moments,
    sparse,
    tensor_sketch,
    tensor_sketch_variance,
    two_sided,
)

KINDS = ("twosided", "sjlt", "rademacher", "gaussian", "tensorsketch", "lowrank")
FORMAT = 1


@dataclass(frozen=True)
class Sketch:
    """How token gradients are projected: R independent repeats of S with E⟨S A, S B⟩ = ⟨A, B⟩.

    Attributes:
        kind: `"twosided"`: (S A S'ᵀ), S and S' random frames, from the factors alone; `"sjlt"`:
            every entry of A to one bucket of each repeat; `"rademacher"`, `"gaussian"`: dense S;
            `"tensorsketch"`: count sketches of both factors, convolved; `"lowrank"`: the best form
            of A of rank ρ, biased, with a bound on what is left out.
        k: Numbers per token for all that is sketched: all layers and repeats together. It is
            divided by the layers' shares of the squared norm (`Layout`).
        seed: Any integer. Streams are keyed by (seed, parameter name, repeat).
        repeats: R. The standard error has R − 1 degrees of freedom.
        sides: Of a two-sided sketch: `"orthogonal"` (Haar frames) or `"sign"` (the op `sketch`).
        rank: ρ of `"lowrank"`.
        exact: Vectors (biases, gains) of at most this many entries are kept as they are.

    Raises:
        ValueError: If an argument is not one of these.

    Sources: two-sided: Choe et al. 2024 (LoGra), with frames in place of its scaled normals; SJLT:
    Kane & Nelson 2014; TensorSketch: Pham & Pagh 2013; variances: `docs/sketches.md`.

    Example:
        >>> import torch, lddyn
        >>> sketch = lddyn.Sketch(k=256, seed=3)
        >>> x, grads = torch.randn(5, 16), torch.randn(2, 5, 12)
        >>> sketch.apply("layer.weight", x, grads).shape
        torch.Size([2, 8, 30])
    """

    kind: str = "twosided"
    k: int = 4096
    seed: int = 0
    repeats: int = 8
    sides: str = "orthogonal"
    rank: int = 2
    exact: int = 256

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.sides not in ("orthogonal", "sign"):
            raise ValueError(f"sides must be 'orthogonal' or 'sign', got {self.sides!r}")
        for name, least in (("repeats", 2), ("k", 1), ("rank", 1), ("exact", 0)):
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

        Two-sided: the pair that is best where one side's cosine is 1/2. TensorSketch: odd, or the
        variance has terms without a closed form. Otherwise (size, 1).
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
            grads: Cotangents at the layer's output (c, T, d_out); or (c, d_out) with own rows.
            size: Numbers of one repeat; default k // R, as if this were the only layer.

        Returns:
            (c, R, k_layer), float32 (float64 for float64); the inner product of two tokens is the
            mean over R of ⟨out[c, r], out'[c', r]⟩. "lowrank": (c, 1, ρ (d_out + d_in) + 2), to be
            compared by a `Layout`.

        Raises:
            ValueError: If shapes or dtypes disagree, or size is below 1.

        Cost: two-sided 2 T R (κ_o d_out + κ_i d_in + κ_o κ_i) FLOPs a token, the part of d_in once
        for all; others as in `docs/sketches.md`. No token's bits depend on the other tokens.
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
        if self.kind == "lowrank":
            u, v, left_over = low_rank([term], shape, self.rank)
            return torch.cat([u.flatten(1), v.flatten(1), left_over], 1)[:, None]
        return self.project(parameter_name, [term], shape, self.sizes(shape, size))

    def project(
        self, name: str, terms: Sequence[Term], shape: tuple[int, int], sizes: tuple[int, int]
    ) -> Tensor:
        """Sketches (c, R, sizes[0] sizes[1]) of sums of terms; of any kind but "lowrank"."""
        stream, size = Stream(self.seed, name, self.repeats), sizes[0]
        one_hot = any(term.left.dim() == 1 for term in terms)
        vector = shape[1] == 1
        if one_hot or vector or self.kind in ("twosided", "lowrank"):
            if self.sides == "sign" and not one_hot and not vector:
                return self._signed(stream, terms, shape, sizes)
            return two_sided(stream, terms, shape, sizes).flatten(2)
        if self.kind == "tensorsketch":
            return tensor_sketch(stream, terms, shape, size)
        if self.kind == "sjlt":
            return sparse(stream, terms, shape, size)
        return dense(stream, terms, shape, size, self.kind == "gaussian")

    def _signed(
        self, stream: Stream, terms: Sequence[Term], shape: tuple[int, int], sizes: tuple[int, int]
    ) -> Tensor:
        """By the op `sketch`, one call for all cotangents where they share their inputs."""
        seed = key(self.seed, stream.name, 0, "op")
        total: Tensor | None = None
        for term in terms:
            if term.left.dim() == 3 and term.right.dim() == 2:
                part = ops.sketch(term.right, term.left, *sizes, self.repeats, seed)
            else:
                pairs = [term.one(c) for c in range(len(term))]
                part = torch.cat(
                    [ops.sketch(r, x[None], *sizes, self.repeats, seed) for x, r in pairs]
                )
            total = part if total is None else total + part
        assert total is not None
        return total.flatten(2)

    def variance(self, one: Tensor, other: Tensor, size: int | None = None) -> float:
        """Exact variance of the estimated ⟨A, B⟩, the mean over the R repeats.

        With c = ⟨A, B⟩, N = ‖A‖²‖B‖², g = Σ A²B², and size k for one repeat:

            gaussian                (N + c²) / k
            rademacher, sjlt        (N + c² − 2g) / k
            twosided, tensorsketch  a sum over the ways in which row and column indices pair:
                                    `projections.contractions`, algorithms.md §5.1

        all divided by R.

        Args:
            one: A (rows, columns).
            other: B, of the same shape.
            size: Numbers of one repeat, as in `apply`.

        Raises:
            ValueError: If the shapes disagree, or for "lowrank", which has no variance but a bound.

        Cost: 4 rows columns (rows + columns) FLOPs in float64.
        """
        if one.shape != other.shape or one.dim() != 2:
            raise ValueError(
                "one and other must be matrices of one shape, got "
                f"{tuple(one.shape)} and {tuple(other.shape)}"
            )
        if self.kind == "lowrank":
            raise ValueError("a low-rank form has no variance: its error is bounded (Layout.bound)")
        shape = (int(one.shape[0]), int(one.shape[1]))
        sizes = self.sizes(shape, self.k // self.repeats if size is None else size)
        if self.kind == "twosided":
            sides = [
                sign_moments(n) if self.sides == "sign" else frame_moments(n, width)
                for n, width in zip(sizes, shape, strict=True)
            ]
            return kronecker_variance(one, other, *sides) / self.repeats
        if self.kind == "tensorsketch":
            return tensor_sketch_variance(one, other, sizes[0]) / self.repeats
        moments = normal_moments if self.kind == "gaussian" else sign_moments
        flat = one.reshape(-1, 1), other.reshape(-1, 1)
        return kronecker_variance(*flat, moments(sizes[0]), frame_moments(1, 1)) / self.repeats


def best_sizes(rows: int, columns: int, size: int) -> tuple[int, int]:
    """(left, right) with left right <= size: least (β_l + β_r) / 4 + β_l β_r, β = 1/size − 1/width.

    The variance over ‖A‖²‖B‖², where the squared cosine of one side's factors is 1/4.
    """
    best, found = math.inf, (1, 1)
    for left in range(1, min(rows, size) + 1):
        right = min(columns, size // left)
        beta_l, beta_r = 1 / left - 1 / rows, 1 / right - 1 / columns
        score = (beta_l + beta_r) / 4 + beta_l * beta_r
        if score < best:
            best, found = score, (left, right)
    return found


# --------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Part:
    """What a row holds of one parameter.

    Attributes:
        name: Canonical parameter name.
        kind: `"exact"`: the gradient; `"sketch"`, `"vector"` (one column), `"onehot"` (rows are
            token ids): R sketches; `"minus"`: the head's own part of a tied weight, to be taken
            off; `"head"`: h exactly and the logit cotangent v, sketched or exact, compared as
            ⟨h, h'⟩⟨v, v'⟩; `"summed head"`: its sketch, which can be summed over tokens;
            `"lowrank"`: U and V and what is left out.
        shape: The gradient as a matrix (rows, columns).
        sizes: Numbers of one repeat (left, right); of "exact" all; of "lowrank" (ρ, 2).
    """

    name: str
    kind: str
    shape: tuple[int, int]
    sizes: tuple[int, int]

    @property
    def numbers(self) -> int:
        """Numbers in a row, of one repeat where there are repeats."""
        if self.kind == "lowrank":
            return self.sizes[0] * sum(self.shape) + self.sizes[1]
        return self.sizes[0] * self.sizes[1]

    @property
    def all_logits(self) -> bool:
        """Whether a head's cotangents are kept as they are."""
        return self.kind == "head" and self.sizes[0] == self.shape[0]


_REPEATED = ("sketch", "vector", "onehot", "minus", "summed head")


@dataclass(frozen=True)
class Layout:
    """What a row of features is made of, and how two rows are compared.

    A row: the exact parts, then the sketched ones repeat by repeat, then the head's h and v, then
    low-rank forms. In each repeat r

        x_r = Σ_exact ⟨a, b⟩ + Σ_sketched ± ⟨a_r, b_r⟩ + ⟨h, h'⟩⟨v_r, v'_r⟩ + Σ_lowrank ⟨UVᵀ, U'V'ᵀ⟩

    is an estimate of the inner product of two token gradients; x = mean x_r with standard error
    sd(x_r) / √R and Student's t. Parts that are exact add nothing to it; low-rank ones add `bound`.

    Attributes:
        sketch: How the parts were made.
        parts: One or more for each trainable parameter.
        width: Numbers in a row.
        linear: Whether rows may be summed over tokens: no head product, no low-rank form.

    Made by `features`, or by `from_json` from what `to_json` wrote.

    Example:
        >>> import lddyn
        >>> from lddyn.sketch import Layout, Part
        >>> layout = Layout(lddyn.Sketch(k=64, repeats=8), (Part("w", "sketch", (6, 5), (2, 4)),))
        >>> layout.width, layout.linear, Layout.from_json(layout.to_json()) == layout
        (64, True, True)
    """

    sketch: Sketch
    parts: tuple[Part, ...]

    @functools.cached_property
    def _places(self) -> tuple[dict[tuple[str, str], int], tuple[int, int, int]]:
        starts: dict[tuple[str, str], int] = {}
        lengths = [0, 0, 0]
        for part in self.parts:
            where = 0 if part.kind == "exact" else 1 if part.kind in _REPEATED else 2
            starts[part.name, part.kind] = lengths[where]
            head = part.kind == "head"
            lengths[where] += part.shape[1] + self._logits(part) if head else part.numbers
        before = lengths[0] + self.sketch.repeats * lengths[1]
        for part in self.parts:
            if part.kind in ("head", "lowrank"):
                starts[part.name, part.kind] += before
        return starts, (lengths[0], lengths[1], lengths[2])

    @property
    def starts(self) -> dict[tuple[str, str], int]:
        """(name, kind) -> where the part starts: in the row; of repeated parts, in a repeat."""
        return self._places[0]

    def _logits(self, part: Part) -> int:
        return part.sizes[0] if part.all_logits else self.sketch.repeats * part.sizes[0]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Numbers of exact parts, of one repeat of the sketched ones, and of all the rest."""
        return self._places[1]

    @property
    def width(self) -> int:
        """Numbers (floats) in a row."""
        exact, repeated, rest = self.lengths
        return exact + self.sketch.repeats * repeated + rest

    @property
    def linear(self) -> bool:
        """Whether the sum of rows is the row of the sum."""
        return not any(part.kind in ("head", "lowrank") for part in self.parts)

    def repeated(self, rows: Tensor) -> Tensor:
        """The sketched parts (n, R, numbers of a repeat): a view."""
        exact, repeated, _ = self.lengths
        end = exact + self.sketch.repeats * repeated
        return rows[:, exact:end].view(len(rows), self.sketch.repeats, repeated)

    def head(self, rows: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """The head's h (n, d) and v (n, R or 1, numbers): views."""
        start = self.starts[part.name, "head"]
        end = start + part.shape[1]
        v = rows[:, end : end + self._logits(part)]
        return rows[:, start:end], v.unflatten(1, (-1, part.sizes[0]))

    def low_rank(self, rows: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """U (n, ρ, rows), V (n, ρ, columns), and what is left over (n, 2): views."""
        start, rank = self.starts[part.name, "lowrank"], part.sizes[0]
        u, v, left_over = rows[:, start : start + part.numbers].split(
            [rank * part.shape[0], rank * part.shape[1], 2], 1
        )
        return u.unflatten(1, (rank, -1)), v.unflatten(1, (rank, -1)), left_over

    def _check(self, **given: Tensor) -> list[Tensor]:
        for name, rows in given.items():
            if rows.dim() != 2 or rows.shape[1] != self.width:
                raise ValueError(
                    f"{name} must be (n, {self.width}) rows of this layout, got {tuple(rows.shape)}"
                )
        found = list(given.values())
        dtype = functools.reduce(torch.promote_types, [x.dtype for x in found], torch.float32)
        return [x.to(dtype) for x in found]

    def _weights(self, like: Tensor) -> Tensor:
        """±1 of each number of a repeat."""
        weights = like.new_ones(self.lengths[1])
        for part in self.parts:
            if part.kind == "minus":
                start = self.starts[part.name, "minus"]
                weights[start : start + part.numbers] = -1
        return weights

    def value(self, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        """Estimated inner products of token gradients.

        Args:
            rows_a: (n, width), any floating dtype.
            rows_b: (m, width), on the same device.

        Returns:
            (n, m), float32 (float64 if a side is).

        Raises:
            ValueError: If a row has another width.

        Cost: 2 n m width FLOPs.
        """
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        exact, repeated, _ = self.lengths
        end = exact + self.sketch.repeats * repeated
        weights = self._weights(a).repeat(self.sketch.repeats) / self.sketch.repeats
        weights = torch.cat([a.new_ones(exact), weights])
        out = (a[:, :end] * weights) @ b[:, :end].T
        for part in self.parts:
            if part.kind == "head":
                (h, v), (h_b, v_b) = self.head(a, part), self.head(b, part)
                out += (h @ h_b.T) * (v.flatten(1) @ v_b.flatten(1).T / v.shape[1])
            elif part.kind == "lowrank":
                out += self._paired(a, b, part)
        return out

    def estimate(self, rows_a: Tensor, rows_b: Tensor) -> Estimate:
        """The same with standard errors: spread over the R repeats, over √R; plus `bound`.

        Args:
            rows_a: (n, width).
            rows_b: (m, width).

        Returns:
            Estimate (n, m) with `samples` = R. Its standard error is zero where all is exact. The
            bound of low-rank forms is added to it, so that intervals hold the truth too often.

        Raises:
            ValueError: If a row has another width.

        Cost: 2 n m width FLOPs; R n m floats.
        """
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        repeats = self.sketch.repeats
        x = (self.repeated(a) * self._weights(a)).transpose(0, 1) @ self.repeated(b).permute(
            1, 2, 0
        )  # (R, n, m)
        for part in self.parts:
            if part.kind == "head" and not part.all_logits:
                (h, v), (h_b, v_b) = self.head(a, part), self.head(b, part)
                x += (h @ h_b.T) * (v.transpose(0, 1) @ v_b.permute(1, 2, 0))
        stderr = x.double().std(0) / repeats**0.5
        if any(part.kind == "lowrank" for part in self.parts):
            stderr = stderr + self.bound(a, b)
        return Estimate(self.value(a, b), stderr.to(a.dtype), repeats)

    def _paired(self, a: Tensor, b: Tensor, part: Part) -> Tensor:
        """⟨U Vᵀ, U' V'ᵀ⟩ (n, m)."""
        (u, v, _), (u_b, v_b, _) = self.low_rank(a, part), self.low_rank(b, part)
        products = (u.flatten(0, 1) @ u_b.flatten(0, 1).T) * (v.flatten(0, 1) @ v_b.flatten(0, 1).T)
        shape = len(a), part.sizes[0], len(b), part.sizes[0]
        return products.view(shape).sum((1, 3))

    def bound(self, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        """|error| of the low-rank parts is at most this, always (n, m); zero without any.

            Σ_parts min(‖A_ρ‖ τ', ‖A_ρ‖_* s') + min(τ ‖B_ρ‖, s ‖B_ρ‖_*) + τ τ'

        with A = A_ρ + E, τ = ‖E‖_F, s = ‖E‖ (operator norm), ‖·‖_* the sum of singular values.

        Raises:
            ValueError: If a row has another width.
        """
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        total = a.new_zeros(len(a), len(b))
        for part in self.parts:
            if part.kind != "lowrank":
                continue
            (u, _, left), (u_b, _, left_b) = self.low_rank(a, part), self.low_rank(b, part)
            sigma, sigma_b = u.square().sum(2), u_b.square().sum(2)
            total += torch.minimum(
                sigma.norm(dim=1)[:, None] * left_b[:, 0], sigma.sum(1)[:, None] * left_b[:, 1]
            )
            total += torch.minimum(left[:, :1] * sigma_b.norm(dim=1), left[:, 1:] * sigma_b.sum(1))
            total += left[:, :1] * left_b[:, 0]
        return total

    def to_json(self) -> dict[str, Any]:
        """Everything that defines the layout, for `from_json`."""
        parts = [[p.name, p.kind, list(p.shape), list(p.sizes)] for p in self.parts]
        return {"format": FORMAT, "sketch": dataclasses.asdict(self.sketch), "parts": parts}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` described.

        Raises:
            ValueError: If it describes no layout of this version.
        """
        try:
            if described["format"] != FORMAT:
                raise ValueError(
                    f"a layout of format {FORMAT} was expected, got {described['format']!r}: it "
                    "was made by another version of lddyn"
                )
            parts = tuple(
                Part(str(name), str(kind), (int(r), int(c)), (int(x), int(y)))
                for name, kind, (r, c), (x, y) in described["parts"]
            )
            layout = cls(Sketch(**described["sketch"]), parts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this describes no sketch layout: {error!r}") from None
        known = {"exact", "head", "lowrank", *_REPEATED}
        for part in parts:
            if part.kind not in known or min(*part.shape, *part.sizes) < 1:
                raise ValueError(f"this describes no sketch layout: {part}")
        return layout
