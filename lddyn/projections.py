"""Random projections of matrices given as sums of outer products, and their exact variances.

A token's gradient of one weight is A = Σ_t l_t ⊗ r_t, a x b in the weight's own shape. A projection
S keeps k numbers of it, such that ⟨S A, S B⟩ has the mean ⟨A, B⟩ and a known variance. All numbers
come from SplitMix64 under a key of (seed, parameter, repeat, stream): the same on any device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.reference import words

_BLOCK = 1 << 22  # numbers of a dense projection that are made at a time


@dataclass(frozen=True)
class Term:
    """Σ_t left[t] ⊗ right[t] for each of c cotangents.

    left, right: (T, size), which all cotangents share, or (c, T, size). left may be the rows (T,)
    of a one-hot matrix instead, as token ids are.
    """

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        """Cotangents."""
        return len(self.left) if self.left.dim() == 3 else len(self.right)

    def one(self, c: int) -> tuple[Tensor, Tensor]:
        """Both sides of one cotangent."""
        left = self.left[c] if self.left.dim() == 3 else self.left
        return left, self.right[c] if self.right.dim() == 3 else self.right

    def dense(self, c: int, rows: int) -> Tensor:
        """The matrix of one cotangent, materialised (rows, b)."""
        left, right = self.one(c)
        if left.dim() == 1:
            out = right.new_zeros(rows, right.shape[1])
            return out.index_add_(0, left, right)
        return left.T @ right


def weigh(terms: Sequence[Term], c: int, rows: int) -> Tensor:
    """One cotangent's matrix (rows, b), from all its terms."""
    out = terms[0].dense(c, rows)
    for term in terms[1:]:
        out = out + term.dense(c, rows)
    return out


# --------------------------------------------------------------------------- numbers from a counter


def key(seed: int, name: str, repeat: int, stream: str) -> int:
    """A signed 64-bit key, independent for every argument; SHA-256, not Python's hash."""
    text = f"{seed}\0{name}\0{repeat}\0{stream}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def _uniform(k: int, count: int) -> Tensor:
    """Uniform float64 in (0, 1)."""
    return ((words(k, count) >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)


def normals(k: int, count: int) -> Tensor:
    """Standard normal float64 by Box and Muller."""
    half = -(-count // 2)
    u = _uniform(k, 2 * half)
    radius = u[:half].log().mul_(-2).sqrt_()
    angle = u[half:] * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def signs(k: int, count: int) -> Tensor:
    """Signs ±1 float64: 64 of each word."""
    word = words(k, -(-count // 64))
    bit = (word[:, None] >> torch.arange(64, device="cpu")) & 1
    return (1 - 2 * bit).flatten()[:count].double()


def buckets(k: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """A bucket in [0, size) and a sign ±1 for each index, int64 and float64.

    The bucket is the high half of a word times the size, shifted: uniform to within size / 2³².
    """
    word = words(k, count)
    bucket = (((word >> 32) & 0xFFFFFFFF) * size) >> 32
    return bucket, (1 - 2 * (word & 1)).double()


@functools.lru_cache(maxsize=512)
def haar(seed: int, name: str, stream: str, repeats: int, size: int, width: int) -> Tensor:
    """Independent random frames (repeats, size, width) float32: E SᵀS = I, S Sᵀ = (width/size) I.

    The first rows of a Haar orthogonal matrix: QR of a normal matrix in float64, on the CPU, with
    the signs of the diagonal taken out (Mezzadri 2007); then rounded, so that another LAPACK's last
    bits do not show.
    """
    made = [normals(key(seed, name, r, stream), size * width) for r in range(repeats)]
    q, triangle = torch.linalg.qr(torch.stack(made).view(repeats, width, size))
    q = q * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return (q.mT * math.sqrt(width / size)).float().contiguous()


@functools.lru_cache(maxsize=512)
def hashed(
    seed: int, name: str, stream: str, repeats: int, size: int, width: int
) -> tuple[Tensor, Tensor]:
    """Buckets and signs (repeats, width) of independent count sketches."""
    made = [buckets(key(seed, name, r, stream), width, size) for r in range(repeats)]
    return torch.stack([b for b, _ in made]), torch.stack([s for _, s in made]).float()


# --------------------------------------------------------------------------- projections
#
# Each takes one cotangent at a time: the bits of a token's sketch do not depend on its neighbours.


@dataclass(frozen=True)
class Stream:
    """Which numbers a projection uses."""

    seed: int
    name: str
    repeats: int


def count_sketch(stream: Stream, vectors: Tensor, size: int) -> Tensor:
    """Count sketches (c, R, size) of vectors (c, n)."""
    c, n = vectors.shape
    where, sign = hashed(stream.seed, stream.name, "hash", stream.repeats, size, n)
    where, sign = where.to(vectors.device), sign.to(vectors)
    out = vectors.new_zeros(c, stream.repeats, size)
    for repeat in range(stream.repeats):
        out[:, repeat].index_add_(1, where[repeat], vectors * sign[repeat])
    return out


def two_sided(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], sizes: tuple[int, int]
) -> Tensor:
    """Σ_t (S l_t) ⊗ (S' r_t) (c, R, sizes[0], sizes[1]); S and S' orthogonal sides.

    One-hot rows take a count sketch for S: it is exact on each of them.
    """
    repeats, (size, size_r) = stream.repeats, sizes
    right = haar(stream.seed, stream.name, "right", repeats, size_r, shape[1])
    out = terms[0].right.new_zeros(len(terms[0]), repeats, size, size_r)
    for term in terms:
        right_flat = right.to(term.right).flatten(0, 1).T
        project: Tensor | None = None
        if term.left.dim() > 1:
            frame = haar(stream.seed, stream.name, "left", repeats, size, shape[0])
            project = frame.to(term.left).flatten(0, 1).T
        shared_left = _onto(term.left, project) if term.left.dim() == 2 else None
        shared_right = term.right @ right_flat if term.right.dim() == 2 else None
        for c, result in enumerate(out):
            left, other = term.one(c)
            r = other @ right_flat if shared_right is None else shared_right
            r = r.view(-1, repeats, size_r).transpose(0, 1)
            if project is None:
                result += _scattered(stream, left, r, shape[0], size)
                continue
            a = _onto(left, project) if shared_left is None else shared_left
            result += a.view(-1, repeats, size).permute(1, 2, 0) @ r
    return out


def _onto(x: Tensor, project: Tensor | None) -> Tensor:
    assert project is not None
    return x @ project


def _scattered(stream: Stream, ids: Tensor, right: Tensor, rows: int, size: int) -> Tensor:
    """Σ_t (S e_t) ⊗ right[r, t] with count sketches S of the ids: (R, size, ·)."""
    where, sign = hashed(stream.seed, stream.name, "left hash", stream.repeats, size, rows)
    where, sign = where.to(ids.device)[:, ids], sign.to(right)[:, ids]
    out = right.new_zeros(len(right), size, right.shape[2])
    for repeat, result in enumerate(out):
        result.index_add_(0, where[repeat], right[repeat] * sign[repeat][:, None])
    return out


def hashed_rows(
    stream: Stream, left: Tensor, right: Tensor, sizes: tuple[int, int], width: int
) -> Tensor:
    """`two_sided` of dense vectors over one-hot rows: left (c, rows) ⊗ right (c, b), one each."""
    where, sign = hashed(
        stream.seed, stream.name, "left hash", stream.repeats, sizes[0], left.shape[1]
    )
    where, sign = where.to(left.device), sign.to(left)
    frame = haar(stream.seed, stream.name, "right", stream.repeats, sizes[1], width).to(right)
    out = left.new_zeros(len(left), stream.repeats, *sizes)
    for repeat in range(stream.repeats):
        pushed = left.new_zeros(len(left), sizes[0])
        pushed.index_add_(1, where[repeat], left * sign[repeat])
        out[:, repeat] = pushed[:, :, None] * (right @ frame[repeat].T)[:, None, :]
    return out


def dense(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], size: int, gaussian: bool
) -> Tensor:
    """(c, R, size): every number is the inner product with a random matrix of independent entries.

    Cost: 2 c R size a b FLOPs, and making R size a b random numbers.
    """
    draw = normals if gaussian else signs
    count = shape[0] * shape[1]
    whole = torch.stack([weigh(terms, c, shape[0]).flatten() for c in range(len(terms[0]))])
    out = whole.new_empty(len(whole), stream.repeats, size)
    block = max(1, _BLOCK // count)
    for repeat in range(stream.repeats):
        for lo in range(0, size, block):
            rows = min(block, size - lo)
            at = key(stream.seed, stream.name, repeat, f"dense {lo}")
            matrix = draw(at, rows * count).view(rows, count).to(whole)
            for c, vector in enumerate(whole):
                out[c, repeat, lo : lo + rows] = matrix @ vector
    return out.div_(size**0.5)


def sparse(stream: Stream, terms: Sequence[Term], shape: tuple[int, int], size: int) -> Tensor:
    """(c, R, size): each entry of the matrix goes to one bucket of each repeat, with a sign.

    The repeats together are the block form of SJLT (Kane & Nelson 2014) with R nonzeros a column.
    Cost: 2 T a b FLOPs to materialise a gradient, and R a b additions.
    """
    whole = [weigh(terms, c, shape[0]).flatten()[None] for c in range(len(terms[0]))]
    return torch.cat([count_sketch(stream, x, size) for x in whole])


def tensor_sketch(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], size: int
) -> Tensor:
    """(c, R, size) with size odd: entry (i, j) goes to bucket h(i) + h'(j) mod size (Pham & Pagh).

    Σ_t of circular convolutions of two count sketches, by FFT.
    """
    repeats, outs = stream.repeats, []
    tables = [
        hashed(stream.seed, stream.name, side, repeats, size, width)
        for side, width in zip(("left", "right"), shape, strict=True)
    ]

    def moved(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Spectra (T, R, size // 2 + 1) of the count sketches of rows (T, n)."""
        where, sign = table[0].to(x.device), table[1].to(x)
        buffer = x.new_zeros(len(x), repeats, size)
        for repeat in range(repeats):
            buffer[:, repeat].index_add_(1, where[repeat], x * sign[repeat])
        return torch.fft.rfft(buffer)

    shared = [
        [
            moved(x, table) if x.dim() == 2 else None
            for x, table in zip((term.left, term.right), tables, strict=True)
        ]
        for term in terms
    ]
    for c in range(len(terms[0])):
        total: Tensor | None = None
        for term, known in zip(terms, shared, strict=True):
            left, right = (
                moved(x, table) if have is None else have
                for x, table, have in zip(term.one(c), tables, known, strict=True)
            )
            part = (left * right).sum(0)
            total = part if total is None else total + part
        outs.append(torch.fft.irfft(total, n=size))
    return torch.stack(outs)


def low_rank(
    terms: Sequence[Term], shape: tuple[int, int], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-ρ form U Vᵀ of each matrix: U (c, ρ, a), V (c, ρ, b), and what is left.

    The singular vectors are weighted by √σ. left over (c, 2): ‖A − U Vᵀ‖_F and σ_{ρ+1}, rounded up.
    Through a T x T Gram of the factors in float64: 2 T² (a + b) FLOPs and one eigh of T each; a
    residual below 1e-7 of the norm is rounding, and the stated one is at least that.
    """
    count = len(terms[0])
    first = terms[0].right
    u = first.new_zeros(count, rank, shape[0])
    v = first.new_zeros(count, rank, shape[1])
    left_over = first.new_zeros(count, 2)
    for c in range(count):
        pairs = [term.one(c) for term in terms]
        left = torch.cat([x for x, _ in pairs]).double()
        right = torch.cat([y for _, y in pairs]).double()
        if len(right) < shape[1]:
            q, triangle = torch.linalg.qr(right.T)  # rightᵀ = q triangle
            core = left.T @ triangle.T  # A = core qᵀ
        else:
            q, core = None, left.T @ right
        values, vectors = torch.linalg.eigh(core.T @ core)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        kept = min(rank, len(values))
        sigma = values[:kept].sqrt()
        top = vectors[:, :kept]
        root = sigma.sqrt()
        safe = torch.where(root > 0, root, torch.ones_like(root))
        onto = core @ top / safe * (root > 0)
        u[c, :kept] = onto.T.to(u)
        v[c, :kept] = ((top if q is None else q @ top) * root).T.to(v)
        # float32 factors: their own rounding belongs to what is left over.
        floor = 2e-7 * float(values.sum().sqrt())
        left_over[c, 0] = float(values[kept:].sum().sqrt()) * (1 + 1e-6) + floor
        left_over[c, 1] = float(values[kept].sqrt() if len(values) > kept else 0) + floor
    return u, v, left_over


# --------------------------------------------------------------------------- variances

_EQUAL = 3  # the index of "all four equal" in a table of contractions


def contractions(a: Tensor, b: Tensor) -> Tensor:
    """Table (4, 4) of ⟨S A, S B⟩²'s second moments' contractions, by how indices pair.

    Of the four row indices of A, B, A, B, and of the four column indices: AB|AB, AA|BB, A B'|B A',
    or all equal.
    """
    a, b = a.double(), b.double()
    columns, rows = a.T @ b, a @ b.T  # AᵀB, ABᵀ
    inner, g = (a * b).sum(), (a * a * b * b).sum()
    p, q = columns.square().sum(), (columns * columns.T).sum()
    p_, q_ = rows.square().sum(), (rows * rows.T).sum()
    n = a.square().sum() * b.square().sum()
    column_diagonal = columns.diagonal().square().sum()
    row_diagonal = rows.diagonal().square().sum()
    column_norms = (a.square().sum(0) * b.square().sum(0)).sum()
    row_norms = (a.square().sum(1) * b.square().sum(1)).sum()
    return torch.stack([
        torch.stack([inner**2, p, q, column_diagonal]),
        torch.stack([p_, n, p_, column_norms]),
        torch.stack([q_, p, inner**2, column_diagonal]),
        torch.stack([row_diagonal, row_norms, row_diagonal, g]),
    ])  # fmt: skip


def frame_moments(size: int, width: int) -> Tensor:
    """E[M_ij M_kl] of M = SᵀS for a Haar frame: weights of ij|kl, ik|jl, il|jk, all equal."""
    if size >= width:
        return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    beta = width * (width - size) / (size * (width - 1) * (width + 2))
    return torch.tensor(
        [width / size - beta * (width + 1), beta, beta, 0.0], dtype=torch.float64
    )  # fmt: skip


def sign_moments(size: int) -> Tensor:
    """The same for independent signs, or for a count sketch."""
    return torch.tensor([1.0, 1 / size, 1 / size, -2 / size], dtype=torch.float64)


def normal_moments(size: int) -> Tensor:
    """The same for independent normals."""
    return torch.tensor([1.0, 1 / size, 1 / size, 0.0], dtype=torch.float64)


def kronecker_variance(a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> float:
    """Var ⟨S A S'ᵀ, S B S'ᵀ⟩ of sides with these moments."""
    table = contractions(a, b)
    return max(float(left @ table @ right - table[0, 0]), 0.0)


def tensor_sketch_variance(a: Tensor, b: Tensor, size: int) -> float:
    """Exact, for an odd size: every pattern of indices, made disjoint, by its chance to collide."""
    table = contractions(a, b)
    # Contractions over patterns that exclude "all equal", which is a pattern of its own.
    disjoint = table.clone()
    disjoint[:_EQUAL] -= table[_EQUAL]
    disjoint[:, :_EQUAL] -= disjoint[:, _EQUAL:]
    chance = torch.full((4, 4), 1 / size, dtype=torch.float64)
    for row in (0, _EQUAL):
        for column in (0, _EQUAL):
            chance[row, column] = 1.0
    chance[1, 2] = chance[2, 1] = 1 / size**2
    return max(float((chance * disjoint).sum() - table[0, 0]), 0.0)
