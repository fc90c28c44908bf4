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
    normal_moments,
    sign_moments,
    sparse,
    tensor_sketch,
    tensor_sketch_moments,
    two_sided,
    variance,
)

KINDS = ("twosided", "lowrank", "sjlt", "rademacher", "gaussian", "tensorsketch")
FORMAT = 1
_PIECE = 1 << 12  # columns of one product


@dataclass(frozen=True)
class Sketch:
    """How token gradients are projected: R independent repeats of S with E⟨S A, S B⟩ = ⟨A, B⟩.

    Attributes:
        kind: `"twosided"`: S A S'ᵀ with random frames S and S', from the factors alone; `"sjlt"`:
            every entry of A to one bucket of each repeat; `"rademacher"`, `"gaussian"`: dense S;
            `"tensorsketch"`: count sketches of both factors, convolved; `"lowrank"`: a part A_ρ of
            rank ρ is kept as it is, and ⟨S A, S B⟩ − ⟨S A_ρ, S B_ρ⟩, two-sided, stands for the rest
            without bias.
        k: Numbers per token for all that is sketched: all layers and repeats together. They are
            divided by the layers' shares of the squared norm (`plan_layout`).
        seed: Any integer. Streams are keyed by (seed, parameter name, use).
        repeats: R. The standard error has R − 1 degrees of freedom.
        sides: Of a two-sided sketch: `"orthogonal"` (Haar frames) or `"sign"` (the op `sketch`).
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
            mean over R of ⟨out[c, r], out'[c', r]⟩.

        Raises:
            ValueError: If shapes disagree, or size is below 1.

        Cost: two-sided 2 T R (κ_o d_out + κ_i d_in + κ_o κ_i) FLOPs a token, the part of d_in once
        for all; others as in `docs/sketches.md`.
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
        """Sketches (c, R, sizes[0] sizes[1]) of sums of terms."""
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

    def _signed(self, stream: Stream, terms: Sequence[Term], sizes: tuple[int, int]) -> Tensor:
        """By the op `sketch`, one call for all cotangents where they share their inputs."""
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
        """W (4, 4): E⟨S A, S B⟩² = Σ W[p, q] T[p, q], T the pairings of `projections.contractions`.

        The table of all variances, of one repeat; `kind` is that of a `Part`.
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
            twosided, tensorsketch  a sum over the ways in which row and column indices pair
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
        kind: `"exact"`: the gradient as it is. `"outer"`: U and V of a part U Vᵀ of it.
            R sketches: `"sketch"`, `"vector"` (one column), `"onehot"` (its rows are token ids),
            `"minus"` (of what an "outer" or "head" stands for: it is taken off again),
            `"summed"` (of outer products, for sums over tokens). `"head"`: h as it is and R count
            sketches of v, for v ⊗ h.
        shape: The gradient as a matrix (rows, columns).
        sizes: Numbers of one repeat (left, right); of "exact" (all, 1), of "outer" (ρ, 1), of
            "head" (of v, 1).
    """

    name: str
    kind: str
    shape: tuple[int, int]
    sizes: tuple[int, int]


_REPEATED = ("sketch", "vector", "onehot", "minus", "summed")


@dataclass(frozen=True)
class Layout:
    """What a row of features is made of, and how two rows are compared.

    A row: the exact parts, then the sketched ones repeat by repeat, then outer products. In each
    repeat r

        x_r = Σ_exact ⟨a, b⟩ + Σ_outer ⟨UVᵀ, U'V'ᵀ⟩ + Σ_sketched ± ⟨a_r, b_r⟩ + ⟨h, h'⟩⟨v_r, v'_r⟩

    is an unbiased estimate of the inner product of two token gradients; x = mean x_r with standard
    error sd(x_r) / √R and Student's t.

    Attributes:
        sketch: How the parts were made.
        parts: One or more for each trainable parameter.
        width: Numbers in a row.
        linear: Whether the sum of rows is the row of the sum: no outer products.

    Made by `plan_layout`, or by `from_json` from what `to_json` wrote.

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
    def _lengths(self) -> tuple[int, int]:
        """Numbers of the exact parts, and of one repeat of the sketched ones."""
        exact = sum(p.sizes[0] for p in self.parts if p.kind == "exact")
        return exact, sum(p.sizes[0] * p.sizes[1] for p in self.parts if p.kind in _REPEATED)

    @functools.cached_property
    def places(self) -> dict[tuple[str, str], slice]:
        """(name, kind) -> where a part is: in the row, or, if it is repeated, in a repeat."""
        places = {}
        exact, repeated = self._lengths
        ends = [0, 0, exact + self.sketch.repeats * repeated]
        for part in self.parts:
            (left, right), (rows, columns) = part.sizes, part.shape
            group, size = 1, left * right
            if part.kind == "exact":
                group = 0
            elif part.kind == "outer":
                group, size = 2, left * (rows + columns)
            elif part.kind == "head":
                group, size = 2, columns + self.sketch.repeats * left
            places[part.name, part.kind] = slice(ends[group], ends[group] + size)
            ends[group] += size
        return places

    @functools.cached_property
    def width(self) -> int:
        """Numbers (floats) in a row."""
        exact, repeated = self._lengths
        outer = [self.places[p.name, p.kind] for p in self.parts if p.kind in ("head", "outer")]
        rest = sum(int(s.stop) - int(s.start) for s in outer)
        return exact + self.sketch.repeats * repeated + rest

    @property
    def linear(self) -> bool:
        """Whether the sum of rows is the row of the sum."""
        return not any(part.kind in ("head", "outer") for part in self.parts)

    def summed(self) -> Layout:
        """The layout of sums of rows over tokens, which is linear.

        Low-rank parts are left to their sketch; outer products that had none, such as the head's
        v ⊗ h, are sketched with k / R numbers each.
        """
        size = max(1, self.sketch.k // self.sketch.repeats)
        corrected = {part.name for part in self.parts if part.kind == "minus"}
        parts = []
        for part in self.parts:
            if part.kind not in ("head", "outer", "minus"):
                parts.append(part)
            elif part.kind != "minus" and part.name not in corrected:
                height = part.sizes[0] if part.kind == "head" else part.shape[0]
                sizes = best_sizes(height, part.shape[1], size)
                parts.append(Part(part.name, "summed", part.shape, sizes))
        return Layout(self.sketch, tuple(parts))

    def exact(self, rows: Tensor) -> Tensor:
        """The exact parts (n, numbers): a view."""
        return rows[:, : self._lengths[0]]

    def repeated(self, rows: Tensor) -> Tensor:
        """The sketched parts (n, R, numbers of a repeat): a view."""
        exact, repeated = self._lengths
        end = exact + self.sketch.repeats * repeated
        return rows[:, exact:end].view(len(rows), self.sketch.repeats, repeated)

    def pair(self, rows: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Both factors of an outer product, views: U (n, ρ, rows), V (n, ρ, columns).

        Of the head: the sketches of v (n, R, numbers), and h (n, 1, columns).
        """
        inside = rows[:, self.places[part.name, part.kind]]
        ranks = 1 if part.kind == "head" else part.sizes[0]
        right = ranks * part.shape[1]
        left = inside[:, right:].unflatten(
            1, (-1, part.sizes[0]) if part.kind == "head" else (ranks, part.shape[0])
        )
        return left, inside[:, :right].unflatten(1, (ranks, part.shape[1]))

    def _check(self, **given: Tensor) -> list[Tensor]:
        for name, rows in given.items():
            if rows.dim() != 2 or rows.shape[1] != self.width:
                raise ValueError(
                    f"{name} must be (n, {self.width}) rows of this layout, got {tuple(rows.shape)}"
                )
        found = list(given.values())
        dtype = functools.reduce(torch.promote_types, [x.dtype for x in found], torch.float32)
        return [x.to(dtype) for x in found]

    def _signed(self, rows: Tensor) -> Tensor:
        """The sketched parts, those that are to be taken off with a minus."""
        weights = rows.new_ones(self._lengths[1])
        for part in self.parts:
            if part.kind == "minus":
                weights[self.places[part.name, "minus"]] = -1
        return self.repeated(rows) * weights

    def _unsampled(self, a: Tensor, b: Tensor) -> Tensor:
        """What every repeat has in common (n, m)."""
        # In pieces: one float32 sum over all parameters of a model would lose two digits.
        pieces = zip(self.exact(a).split(_PIECE, 1), self.exact(b).split(_PIECE, 1), strict=True)
        out = a.new_zeros(len(a), len(b))
        for one, other in pieces:
            out += one @ other.T
        for part in self.parts:
            if part.kind == "outer":
                (u, v), (u_b, v_b) = self.pair(a, part), self.pair(b, part)
                for i in range(part.sizes[0]):
                    for j in range(part.sizes[0]):
                        out += (u[:, i] @ u_b[:, j].T) * (v[:, i] @ v_b[:, j].T)
        return out

    def _sampled(self, a: Tensor, b: Tensor) -> Tensor:
        """What differs between the repeats (R, n, m)."""
        x = self._signed(a).transpose(0, 1) @ self.repeated(b).permute(1, 2, 0)
        for part in self.parts:
            if part.kind == "head":
                (v, h), (v_b, h_b) = self.pair(a, part), self.pair(b, part)
                x += (h[:, 0] @ h_b[:, 0].T) * (v.transpose(0, 1) @ v_b.permute(1, 2, 0))
        return x

    def value(self, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        """Estimated inner products of token gradients.

        Args:
            rows_a: (n, width), any floating dtype.
            rows_b: (m, width), on the same device.

        Returns:
            (n, m), float32 (float64 if a side is).

        Raises:
            ValueError: If a row has another width.

        Cost: 2 n m width FLOPs (ρ times that for outer products of rank ρ).
        """
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        out = self._signed(a).flatten(1) @ self.repeated(b).flatten(1).T
        for part in self.parts:
            if part.kind == "head":
                (v, h), (v_b, h_b) = self.pair(a, part), self.pair(b, part)
                out += (h[:, 0] @ h_b[:, 0].T) * (v.flatten(1) @ v_b.flatten(1).T)
        return out / self.sketch.repeats + self._unsampled(a, b)

    def as_query(self, rows: Tensor) -> Tensor:
        """Rows (n, width) whose plain inner product with others is `value`: for vector indices.

        Raises:
            ValueError: If the layout is not linear, or a row has another width.
        """
        if not self.linear:
            raise ValueError(
                "as_query needs a linear layout, this one holds outer products: sum the tokens of "
                "sequences (Features.per_sequence, lddyn features build --by sequence)"
            )
        (a,) = self._check(rows=rows)
        sketched = self._signed(a).flatten(1) / self.sketch.repeats
        return torch.cat([self.exact(a), sketched], 1)

    def samples(self, rows_a: Tensor, rows_b: Tensor) -> Tensor:
        """The R independent estimates x_r (R, n, m) whose mean is `value`; arguments as there."""
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        return self._sampled(a, b) + self._unsampled(a, b)

    def estimate(self, rows_a: Tensor, rows_b: Tensor) -> Estimate:
        """The same with standard errors: the spread of the R samples over √R.

        Args:
            rows_a: (n, width).
            rows_b: (m, width).

        Returns:
            Estimate (n, m) with `samples` = R. Its standard error is zero where all is exact.

        Raises:
            ValueError: If a row has another width.

        Cost: that of `value`; R n m floats.
        """
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        x = self._sampled(a, b)
        stderr = x.double().std(0) / self.sketch.repeats**0.5
        return Estimate(x.mean(0) + self._unsampled(a, b), stderr.to(x), self.sketch.repeats)

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
        known = {"exact", "head", "outer", *_REPEATED}
        for part in parts:
            if part.kind not in known or min(*part.shape, *part.sizes) < 1:
                raise ValueError(f"this describes no sketch layout: {part}")
        return layout
