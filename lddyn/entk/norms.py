"""Norms and traces of a kernel that is never formed: sampled, with standard errors.

Below the head a logit cotangent v acts only through Uᵀ v, with U = W, or U = [W, E] for a head that
is tied to the embedding (E: the tokens of both sequences, whose embedding rows move). With an
orthonormal basis of the centred span, Π U = Q̃ Λ^½ Vᵀ,

    Π K_{m,l} Π = Q̃ F_{m,l} Q̃ᵀ + c_{m,l} Π,     F of d x d (tied: d + tokens),
    ‖Π K Π‖² = ‖F‖² + 2 c tr F + (V − 1) c²

and c is known in closed form. ‖F‖² splits by the r leading directions of the basis: the part
between these directions is exact, and random signs in their complement sample the rest ("deflated
two-sided probes"). The estimators take the products that they need as functions; `NTK` supplies
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.engine.factors import BodyRows
from lddyn.estimate import Estimate

PROBES = 16

DIRECTIONS = 16

# Cotangents below the head of both sides -> the products (M, n_o, l, n_u) of some updated tokens.
Blocks = Callable[[BodyRows, BodyRows], Iterator[tuple[slice, Tensor]]]

# One logit cotangent (V,) put on every updated token in turn -> something (M, L) of its images.
Images = Callable[[Tensor], Tensor]

Product = Callable[[Tensor], Tensor]

# --------------------------------------------------------------------------- the head's span


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of the logits in the span of U = [W, E], centred or not.

    Attributes:
        values: Eigenvalues λ of Uᵀ Π U (without Π if not centred), largest first, (k,) float64.
        vectors: Its eigenvectors, (d + n, k) float64.
        ids: Tokens of E, (n,).
    """

    values: Tensor
    vectors: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, coordinates: Tensor) -> BodyRows:
        """Cotangents with these coordinates (n, k), pulled back through the head."""
        full = (coordinates.to(self.values) * self.values.sqrt()) @ self.vectors.T
        width = full.shape[1] - len(self.ids)
        return BodyRows(full[:, :width], full[:, width:], self.ids)

    def leading(self, count: int) -> Tensor:
        """Coordinates (count, k) of the leading directions."""
        return torch.eye(count, len(self), dtype=self.values.dtype, device=self.values.device)

    def signs(self, count: int, skip: int, generator: torch.Generator) -> Tensor:
        """Coordinates (count, k): random signs on all but the leading `skip` directions."""
        drawn = torch.randint(0, 2, (count, len(self)), generator=generator) * 2.0 - 1.0
        drawn[:, :skip] = 0.0
        return drawn.to(self.values)


def span_basis(weight: Tensor, ids: Tensor, centred: bool, chunk: int = 8192) -> Basis:
    """The basis of `weight` (V, d) and the tokens `ids` (n,) of the vocabulary.

    Cost: 2 V d² FLOPs and an eigendecomposition of (d + n)², in float64; no matrix with V rows.
    """
    vocabulary, width = weight.shape
    second = weight.new_zeros(width, width, dtype=torch.float64)
    total = weight.new_zeros(width, dtype=torch.float64)
    for part in weight.detach().split(chunk):
        wide = part.double()
        second += wide.T @ wide
        total += wide.sum(0)
    own = weight.detach()[ids].double()
    corner = torch.eye(len(ids), dtype=torch.float64, device=weight.device)
    if centred:
        second -= total[:, None] * total[None] / vocabulary
        own = own - total / vocabulary
        corner = corner - 1 / vocabulary
    gram = torch.cat([torch.cat([second, own.T], 1), torch.cat([own, corner], 1)])
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > values[:1].clamp(min=0) * len(values) * 1e-13
    return Basis(values[kept], vectors[:, kept], ids)


# --------------------------------------------------------------------------- standard errors


def effective_samples(*influences: Tensor) -> int:
    """Number of normal samples that a standard error is worth: 1 + (q − 1)/(1 + κ/2).

    A sample variance of q values of excess kurtosis κ has a relative variance of about
    (2 + κ)/(q − 1), not 2/(q − 1). Squares of projections are far from normal, so Student's t with
    q − 1 degrees would cover too rarely. κ is pooled over all entries: the sum of fourth cumulants
    over the sum of squared variances, both unbiased. Half an entry with κ = 12 (the square of one
    normal value) is added, because few entries say little about κ.

    Args:
        influences: What each probe adds to each estimate, (…, q) with q >= 4.

    Source: Satterthwaite, Biometrics Bulletin, 1946.
    """
    fourth = square = 0.0
    for values in influences:
        n = values.shape[-1]
        away = (values - values.mean(-1, keepdim=True)).double()
        two, four = away.pow(2).sum(-1), away.pow(4).sum(-1)
        k2 = two / (n - 1)
        k4 = (n * (n + 1) * four / (n - 1) - 3 * two.pow(2)) / ((n - 2) * (n - 3))
        fourth += float(k4.sum())
        square += float(((k2.pow(2) - k4 / n) * (n - 1) / (n + 1)).sum())
    entries = sum(values[..., 0].numel() for values in influences)
    kurtosis = min(max(fourth / square, 0.0), 12.0) if square > 0 else 0.0
    kurtosis = (entries * kurtosis + 0.5 * 12.0) / (entries + 0.5)
    return 1 + max(1, round((influences[0].shape[-1] - 1) / (1 + kurtosis / 2)))


def root(square: Estimate) -> Estimate:
    """The norm from its square: √x with standard error s/(2√x); 0 where the square came out < 0."""
    value = square.value.clamp(min=0).sqrt()
    error = torch.where(
        square.value > square.stderr, square.stderr / (2 * value), square.stderr.sqrt()
    )
    return Estimate(value, error, square.samples)


def relative(square: Estimate) -> float:
    """Largest relative standard error of the norms."""
    norm = root(square)
    return float((norm.stderr / norm.value.clamp(min=1e-300)).nan_to_num(0.0).max())


@dataclass(frozen=True)
class Sampling:
    """How precise an estimate must be, and what it may cost.

    Attributes:
        rtol: Required relative standard error in every entry.
        directions: r; None: as rtol requires.
        probes: q; None: as rtol requires.
        limit: Most cotangents per token, or products with the kernel.
        seed: Of the random signs.

    Raises:
        ValueError: If a number is out of range.
    """

    rtol: float = 0.05
    directions: int | None = None
    probes: int | None = None
    limit: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol must be between 0 and 1, got {self.rtol}")
        if self.directions is not None and self.directions < 0:
            raise ValueError(f"directions must be 0 or more, got {self.directions}")
        if self.probes is not None and self.probes < 4:
            raise ValueError(
                f"probes must be 4 or more (a standard error needs them), got {self.probes}"
            )
        if self.limit < 8:
            raise ValueError(f"limit must be 8 or more, got {self.limit}")

    def generator(self) -> torch.Generator:
        """The source of the random signs; on the CPU, so that every device draws the same."""
        return torch.Generator().manual_seed(self.seed)

    def missed(self, error: float, r: int, q: int, why: str) -> None:
        """Warns that rtol was not met."""
        warnings.warn(
            f"the largest relative standard error is {error:.3g}, above rtol = {self.rtol:g}, with "
            f"{r} directions and {q} probes ({why}): give more of them, raise limit, or use the "
            "estimate with its stated error",
            stacklevel=6,
        )


def _refine(
    sample: Callable[[int, int], Estimate],
    error_of: Callable[[Estimate], float],
    rank: int,
    cost: Callable[[int, int], int],
    exact: bool,
    sampling: Sampling,
) -> Estimate:
    """An estimate with an error of at most rtol, sampled with more directions or probes until then.

    The number of directions is raised first; the number of probes, if that of directions is fixed.

    Args:
        sample: (r, q) → an estimate.
        error_of: Its relative standard error.
        rank: Number of all directions.
        cost: (r, q) → cotangents, or products with the kernel.
        exact: Whether all `rank` directions leave nothing to sample.
        sampling: Precision and limits.
    """
    directions, probes, limit = sampling.directions, sampling.probes, sampling.limit
    r = min(DIRECTIONS if directions is None else directions, rank)
    q = PROBES if probes is None else probes
    while cost(r, q) > limit and directions is None and r > 0:
        r //= 2
    while cost(r, q) > limit and probes is None and q > 4:
        q //= 2
    while True:
        affordable = directions is None and rank <= limit
        if exact and (r == rank or (affordable and cost(r, q) >= rank)):
            return sample(rank, 0)  # as cheap as sampling
        estimate = sample(r, q)
        error = error_of(estimate)
        if error <= sampling.rtol:
            return estimate
        more = (r, q)
        if directions is None and r < rank:
            # The error falls a little slower than 1/r: if it is far above rtol, double r twice.
            grown = r * (2 if error <= 1.4 * sampling.rtol or cost(4 * r, q) > limit else 4)
            more = (min(grown, rank) if r else 4, q)
            if probes is None and error <= 1.3 * sampling.rtol and 2 * q <= r:
                more = (r, 2 * q)  # 1/√2 of the error is enough, and for fewer rows
        elif probes is None:
            more = (r, 2 * q)
        if more == (r, q) or cost(*more) > limit:
            if exact and affordable:
                r = rank
                continue
            sampling.missed(error, r, q, "given" if more == (r, q) else f"limit = {limit}")
            return estimate
        r, q = more


# --------------------------------------------------------------------------- all token pairs


def block_squares(
    blocks: Blocks,
    basis: Basis,
    head: Tensor,
    identity: int,
    sampling: Sampling,
) -> Estimate:
    """‖K_{m,l}‖_F² (M, L) by deflated two-sided probes; unbiased.

    Args:
        blocks: Products of cotangents below the head.
        basis: Directions of the logits, r leading ones of which are exact.
        head: c (M, L), the multiple of the identity.
        identity: ‖Π‖² = V − 1, or V uncentred.
        sampling: Precision; r directions, q probes per side.

    With G the products of r directions and q probes on either side, v ⊥ for u:

        ‖F‖² ≈ Σ G_rr² + mean_a Σ_i G_ai² + mean_b Σ_i G_ib² + mean_ab G_ab²
        tr F ≈ Σ G_ii + mean_a G_aa     (the observed side's probes on the updated side too)

    Its variance is that of a two-way table: (Var_a + Var_b)/q of what each probe adds, less the
    interaction of the probes, which both terms count.
    """
    generator = sampling.generator()
    paired = bool((head != 0).any())

    def sample(r: int, q: int) -> Estimate:
        top = basis.leading(r)
        one, other = (basis.signs(q, r, generator) for _ in range(2))
        observed = basis.rows(torch.cat([top, one]))
        updated = basis.rows(torch.cat([top, other, *([one] if paired else [])]))
        value = head.double().pow(2) * identity
        adds_o, adds_u = (value.new_zeros(*value.shape, q) for _ in range(2))
        twice = torch.zeros_like(value)
        for at, gram in blocks(observed, updated):
            gram, c = gram.double().transpose(1, 2), head[:, at].double()  # (M, l, n_o, n_u)
            inner = gram[:, :, :r, :r]
            value[:, at] += inner.pow(2).sum((2, 3))
            value[:, at] += 2 * c * inner.diagonal(dim1=2, dim2=3).sum(-1)
            if q == 0:
                continue
            between = gram[:, :, r:, r : r + q].pow(2)
            left, right = gram[:, :, r:, :r].pow(2).sum(3), gram[:, :, :r, r : r + q].pow(2).sum(2)
            if paired:
                same = gram[:, :, r:, r + q :].diagonal(dim1=2, dim2=3)
                left = left + 2 * c[..., None] * same
            value[:, at] += left.mean(-1) + right.mean(-1) + between.mean((2, 3))
            rows, columns = between.mean(3), between.mean(2)
            adds_o[:, at], adds_u[:, at] = left + rows, right + columns
            own = between - rows[..., None] - columns[..., None, :] + rows.mean(-1)[..., None, None]
            twice[:, at] = own.pow(2).sum((2, 3)) / (q * (q - 1)) ** 2
        if q == 0:
            return Estimate(value, torch.zeros_like(value))
        variance = (adds_o.var(-1) + adds_u.var(-1)) / q
        error = torch.maximum(variance - twice, variance / 2).sqrt()
        return Estimate(value, error, effective_samples(adds_o, adds_u))

    def cost(r: int, q: int) -> int:
        return r + (2 if paired else 1) * q

    rank = len(basis)
    return _refine(sample, relative, rank, cost, True, sampling)


def pushed_squares(
    images: Images,
    weight: Tensor,
    basis: Basis,
    centred: bool,
    sampling: Sampling,
) -> Estimate:
    """‖K_{m,l}‖_F² (M, L) from images of logit cotangents: Σ_i ‖K u_i‖² + mean_b ‖K ω_b‖².

    u are r orthonormal directions of the head, ω random signs over the vocabulary, made orthogonal
    to them. This holds for every kernel: operations after the head, and a preconditioner, are part
    of the images.

    Args:
        images: v (V,) -> ‖K_{m,l} v‖² (M, L), centred if `centred`.
        weight: The head's weight (V, d).
        basis: Its directions.
        centred: Whether probes sum to zero.
        sampling: Precision; r directions, q probes.
    """
    generator = sampling.generator()
    exact: list[Tensor] = []  # images of the directions so far; every round needs them again
    span = weight.new_zeros(0, len(weight), dtype=torch.float64)

    def direction(i: int) -> Tensor:
        width = weight.shape[1]
        coordinates = basis.vectors[:width, i] / basis.values[i].sqrt()
        v = torch.cat([w.double() @ coordinates for w in weight.detach().split(8192)])
        v[basis.ids] += basis.vectors[width:, i] / basis.values[i].sqrt()
        return v - v.mean() if centred else v

    def sample(r: int, q: int) -> Estimate:
        nonlocal span
        for i in range(len(exact), r):
            span = torch.cat([span, direction(i)[None]])
            exact.append(images(span[i]))
        drawn = []
        for _ in range(q):
            signs = torch.randint(0, 2, (len(weight),), generator=generator) * 2.0 - 1.0
            v = signs.to(span)
            v = v - v.mean() if centred else v
            drawn.append(images(v - span[:r].T @ (span[:r] @ v)))
        adds = torch.stack(drawn, -1).double()
        value = adds.mean(-1)
        for part in exact[:r]:
            value = value + part
        return Estimate(value, (adds.var(-1) / q).sqrt(), effective_samples(adds))

    def cost(r: int, q: int) -> int:
        return r + q

    rank = len(basis)
    return _refine(sample, relative, rank, cost, False, sampling)


def block_traces(
    blocks: Blocks,
    basis: Basis,
    head: Tensor,
    identity: int,
    sampling: Sampling | None,
) -> Estimate:
    """Traces (M, L) of K_{m,l}: Σ_i G_ii + mean_a G_aa + c tr Π; q paired probes.

    Args:
        blocks: Products of cotangents below the head.
        basis: Directions of the logits.
        head: c (M, L).
        identity: tr Π.
        sampling: Precision; None: exact, by all directions.
    """
    generator = torch.Generator() if sampling is None else sampling.generator()
    rank = len(basis)

    def diagonals(coordinates: Tensor) -> Tensor:
        rows = basis.rows(coordinates)
        out = head.new_zeros(*head.shape, len(coordinates), dtype=torch.float64)
        for at, gram in blocks(rows, rows):
            out[:, at] = gram.transpose(1, 2).diagonal(dim1=2, dim2=3).double()
        return out

    def sample(r: int, q: int) -> Estimate:
        value = head.double() * identity
        for part in basis.leading(r).split(8):  # pairs of different directions are wasted work
            value = value + diagonals(part).sum(-1)
        if q == 0:
            return Estimate(value, torch.zeros_like(value))
        adds = diagonals(basis.signs(q, r, generator))
        error = (adds.var(-1) / q).sqrt()
        return Estimate(value + adds.mean(-1), error, effective_samples(adds))

    if sampling is None:
        return sample(rank, 0)

    def error(estimate: Estimate) -> float:
        return float((estimate.stderr / estimate.value.abs().clamp(min=1e-300)).max())

    def cost(r: int, q: int) -> int:
        return r + q

    return _refine(sample, error, rank, cost, True, sampling)


# --------------------------------------------------------------------------- rows, and all of it


def row_squares(
    product: Product,
    transposed: Product,
    shapes: tuple[torch.Size, torch.Size],
    centred: bool,
    whole: bool,
    like: Tensor,
    sampling: Sampling,
) -> Estimate:
    """Σ_l ‖K_{m,l}‖_F² (M,), or its sum over m, by Hutch++: ‖K‖² = ‖K Q‖² + E ‖K (I − Q Qᵀ) ω‖².

    Q spans Kᵀ times random signs (k of them; k = 0 is Hutchinson's estimate); ω are random signs on
    all tokens and the whole vocabulary, independent of Q, so that the estimate is unbiased.

    Args:
        product: K: cotangents (L, V) -> (M, V).
        transposed: Kᵀ: cotangents (M, V) -> (L, V).
        shapes: (M, V) and (L, V).
        centred: Whether Π is on both sides.
        whole: Whether to sum over m.
        like: A tensor of the dtype and device of the cotangents.
        sampling: Precision: k directions (default 8), q probes (default: by the variance of the
            first 8), and a limit on the number of products with K or Kᵀ, 2 k + q; a small limit
            lowers both defaults.
    """
    generator = sampling.generator()
    probes, rtol, limit = sampling.probes, sampling.rtol, sampling.limit
    k = min(8, limit // 4) if sampling.directions is None else sampling.directions
    pilot = max(4, min(8, limit - 2 * k))

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if centred else x

    def signs(shape: torch.Size) -> Tensor:
        return (torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0).to(like)

    out, inner = shapes
    ranged = [centre(transposed(centre(signs(out)))).flatten() for _ in range(k)]
    span = torch.linalg.qr(torch.stack(ranged, 1))[0] if k else like.new_zeros(inner.numel(), 0)

    def image(v: Tensor) -> Tensor:
        # Centred here: where K has a lower rank than k, QR completes Q by vectors that are not.
        return centre(product(centre(v.view(inner)))).double().pow(2).sum(-1)

    fixed = like.new_zeros(out[0], dtype=torch.float64)
    for column in span.T:
        fixed = fixed + image(column)
    adds: list[Tensor] = []

    def estimate(count: int) -> Estimate:
        while len(adds) < count:
            v = signs(inner).flatten()
            adds.append(image(v - span @ (span.T @ v)))
        rows = torch.stack(adds, -1)
        samples = effective_samples(rows)
        total = rows.sum(0) if whole else rows
        value = (fixed.sum() if whole else fixed) + total.mean(-1)
        return Estimate(value, (total.var(-1) / count).sqrt(), samples)

    result = estimate(pilot if probes is None else probes)
    error = relative(result)
    if probes is None and error > rtol:
        # The pilot decides once. Adding probes until the error looks small would prefer samples
        # whose error looks smaller than it is.
        required = int(len(adds) * (error / rtol) ** 2 * 1.2) + 1
        result = estimate(max(pilot, min(required, limit - 2 * k)))
        error = relative(result)
    if error > 1.25 * rtol:
        sampling.missed(error, k, len(adds), "given" if probes else f"limit = {limit}")
    return result
