"""The parts of a feature row, one or more per parameter, and how two rows are paired."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lddyn.estimate import Estimate
from lddyn.files import JsonObject
from lddyn.sketches.sketch import Sketch, best_sizes

FORMAT = 1

_PIECE = 1 << 12  # columns of one product


@dataclass(frozen=True)
class Part:
    """What a row stores of one parameter's gradient.

    | kind | stored |
    |---|---|
    | `"exact"` | the gradient itself |
    | `"outer"` | U and V, where the gradient, or its low-rank part, is U Vᵀ |
    | `"head"` | h itself and R count sketches of v, where the gradient is v ⊗ h |
    | `"sketch"` | R sketches of a matrix |
    | `"vector"` | R sketches of a vector |
    | `"onehot"` | R sketches of a matrix whose rows are token ids, as an embedding's |
    | `"minus"` | R sketches of what an "outer" or "head" part stores, to be subtracted |
    | `"summed"` | R sketches of a sum of outer products over tokens |

    Attributes:
        name: Canonical parameter name.
        kind: One of the above.
        shape: The gradient as a matrix (rows, columns).
        sizes: Numbers in one repeat (left, right); (all, 1) for "exact", (ρ, 1) for "outer",
            (numbers of v, 1) for "head".
    """

    name: str
    kind: str
    shape: tuple[int, int]
    sizes: tuple[int, int]


_REPEATED = ("sketch", "vector", "onehot", "minus", "summed")


@dataclass(frozen=True)
class Layout:
    """What a row of features is made of, and how two rows are compared.

    A row holds the exact parts, then the sketched ones repeat by repeat, then outer products. In
    each repeat r

        x_r = Σ_exact ⟨a, b⟩ + Σ_outer ⟨UVᵀ, U'V'ᵀ⟩ + Σ_sketched ± ⟨a_r, b_r⟩ + ⟨h, h'⟩⟨v_r, v'_r⟩

    is an unbiased estimate of the inner product of two token gradients. The estimate is the mean of
    the x_r; its standard error is sd(x_r) / √R, with Student's t of R − 1 degrees of freedom.

    Made by `choose_layout`, or by `from_dict` from what `to_dict` returned.

    Attributes:
        sketch: How gradients are projected.
        parts: One or more for each trainable parameter.
        width: Numbers in a row.
        linear: Whether the sum of rows is the row of the sum: true without outer products.

    Example:
        >>> import lddyn
        >>> from lddyn.sketches.layout import Layout, Part
        >>> layout = Layout(lddyn.Sketch(k=64, repeats=8), (Part("w", "sketch", (6, 5), (2, 4)),))
        >>> layout.width, layout.linear, Layout.from_dict(layout.to_dict()) == layout
        (64, True, True)
        >>> layout
        Layout(64 numbers a row for 1 parameters (1 sketch); twosided, k = 64, R = 8)
    """

    sketch: Sketch
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        counts = collections.Counter(part.kind for part in self.parts)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        sketch = self.sketch
        return (
            f"Layout({self.width:,} numbers a row for {len({p.name for p in self.parts})} "
            f"parameters ({kinds}); {sketch.kind}, k = {sketch.k:,}, R = {sketch.repeats})"
        )

    def explain(self) -> str:
        """How many parameters are sketched, and how many are stored without error; one line."""
        names = {part.name for part in self.parts}
        sketched = {part.name for part in self.parts if part.kind not in ("exact", "outer")}
        return (
            f"of {len(names)} parameters {len(sketched)} are sketched ({self.sketch.kind}, "
            f"k = {self.sketch.k:,} in {self.sketch.repeats} repeats) and "
            f"{len(names - sketched)} are stored without error"
        )

    @functools.cached_property
    def _lengths(self) -> tuple[int, int]:
        """(numbers of all exact parts, numbers of one repeat of all sketched parts)."""
        exact = sum(p.sizes[0] for p in self.parts if p.kind == "exact")
        return exact, sum(p.sizes[0] * p.sizes[1] for p in self.parts if p.kind in _REPEATED)

    @functools.cached_property
    def places(self) -> dict[tuple[str, str], slice]:
        """Columns of each part by (name, kind), in a repeat if sketched, else in the row."""
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
        """Whether the sum of rows is the row of the sum: true without outer products."""
        return not any(part.kind in ("head", "outer") for part in self.parts)

    def summed(self) -> Layout:
        """The layout of sums of rows over tokens; it is linear.

        Low-rank parts are dropped, because a sketch of the same gradient is in the row. Outer
        products without a sketch, such as the head's v ⊗ h, get one of k / R numbers a repeat.
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
        """Views of both factors of an outer product: U (n, ρ, rows) and V (n, ρ, columns).

        For a "head" part: the sketches of v (n, R, numbers) and h (n, 1, columns).
        """
        inside = rows[:, self.places[part.name, part.kind]]
        ranks = 1 if part.kind == "head" else part.sizes[0]
        right = ranks * part.shape[1]
        left = inside[:, right:].unflatten(
            1, (-1, part.sizes[0]) if part.kind == "head" else (ranks, part.shape[0])
        )
        return left, inside[:, :right].unflatten(1, (ranks, part.shape[1]))

    def _check(self, **given: Tensor) -> list[Tensor]:
        """The rows in one floating dtype; a ValueError if some have another width."""
        for name, rows in given.items():
            if rows.dim() != 2 or rows.shape[1] != self.width:
                raise ValueError(
                    f"{name} must be (n, {self.width}) rows of this layout, got {tuple(rows.shape)}"
                )
        dtypes = [rows.dtype for rows in given.values()]
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        return [rows.to(dtype) for rows in given.values()]

    def _signed(self, rows: Tensor) -> Tensor:
        """The sketched parts (n, R, numbers), with "minus" parts negated."""
        weights = rows.new_ones(self._lengths[1])
        for part in self.parts:
            if part.kind == "minus":
                weights[self.places[part.name, "minus"]] = -1
        return self.repeated(rows) * weights

    def _unsampled(self, a: Tensor, b: Tensor) -> Tensor:
        """The part of the estimate that is the same in every repeat (n, m)."""
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
        """The part of the estimate that differs between the repeats (R, n, m)."""
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
        """Vectors (n, width) whose plain inner product with rows is `value`, for vector indices.

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
        """The R independent estimates x_r (R, n, m), whose mean is `value`; arguments as there."""
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        return self._sampled(a, b) + self._unsampled(a, b)

    def estimate(self, rows_a: Tensor, rows_b: Tensor) -> Estimate:
        """Estimated inner products with their standard errors, the spread of the R samples over √R.

        Args:
            rows_a: (n, width).
            rows_b: (m, width).

        Returns:
            Estimate (n, m) with `samples` = R. Its standard error is 0 where nothing is sketched.

        Raises:
            ValueError: If a row has another width.

        Cost: that of `value`; R n m floats.
        """
        a, b = self._check(rows_a=rows_a, rows_b=rows_b)
        x = self._sampled(a, b)
        stderr = x.double().std(0) / self.sketch.repeats**0.5
        return Estimate(x.mean(0) + self._unsampled(a, b), stderr.to(x), self.sketch.repeats)

    def to_dict(self) -> JsonObject:
        """Everything that defines the layout, JSON-safe, for `from_dict`."""
        parts = [[p.name, p.kind, list(p.shape), list(p.sizes)] for p in self.parts]
        return {"format": FORMAT, "sketch": dataclasses.asdict(self.sketch), "parts": parts}

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Layout:
        """The layout from what `to_dict` returned.

        Raises:
            ValueError: If the content is not a layout of this format version.
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


def by_sequence(by: str) -> bool:
    """Whether a row is a whole sequence; raises ValueError for an unknown `by`."""
    if by not in ("token", "sequence"):
        raise ValueError(f"by must be 'token' or 'sequence', got {by!r}")
    return by == "sequence"
