"""Random projections of matrices given as sums of outer products, and their exact variances.

A token's gradient with respect to one weight is A = Σ_t l_t ⊗ r_t, (rows, columns) as the weight. A
projection S maps it to k numbers, such that ⟨S A, S B⟩ has the mean ⟨A, B⟩ and a known variance.
Random numbers come from SplitMix64 with a key of (seed, parameter, stream): the same on any device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lddyn import ops
from lddyn.reference import words

_BLOCK = 1 << 22  # numbers of a dense projection that are made at a time


@dataclass(frozen=True)
class Term:
    """A sum of outer products Σ_t left[t] ⊗ right[t] for each of c cotangents.

    Attributes:
        left: (T, rows), shared by all cotangents, or (c, T, rows). Integers (T,) or (c, T) are the
            row indices of a one-hot matrix, such as token ids.
        right: (T, columns), shared by all cotangents, or (c, T, columns).
    """

    left: Tensor
    right: Tensor

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds the row indices of a one-hot matrix."""
        return not self.left.is_floating_point()

    @property
    def apart(self) -> bool:
        """Whether cotangents share neither side: then each has the same bits as alone."""
        return self.left.dim() == 3 - self.one_hot and self.right.dim() == 3

    def __len__(self) -> int:
        """Number of cotangents."""
        return len(self.left) if self.left.dim() == 3 else len(self.right)

    def one(self, c: int) -> tuple[Tensor, Tensor]:
        """(left, right) of cotangent c."""
        left = self.left[c] if self.left.dim() == 3 - self.one_hot else self.left
        return left, self.right[c] if self.right.dim() == 3 else self.right

    def dense(self, c: int, rows: int) -> Tensor:
        """The matrix (rows, columns) of cotangent c."""
        left, right = self.one(c)
        out = right.new_zeros(rows, right.shape[1])
        return out.index_add_(0, left, right) if self.one_hot else out.addmm_(left.T, right)


def weigh(terms: Sequence[Term], c: int, rows: int) -> Tensor:
    """The matrix (rows, columns) of cotangent c, the sum of all its terms."""
    out = terms[0].dense(c, rows)
    for term in terms[1:]:
        out = out + term.dense(c, rows)
    return out


# --------------------------------------------------------------------------- numbers from a counter


def key(seed: int, name: str, stream: str) -> int:
    """A signed 64-bit key: SHA-256 of the arguments, independent for each of them."""
    text = f"{seed}\0{name}\0{stream}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def _uniform(k: int, count: int) -> Tensor:
    """Uniform float64 numbers (count,) in (0, 1)."""
    return ((words(k, count) >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)


def normals(k: int, count: int) -> Tensor:
    """Standard normal float64 numbers (count,), by Box and Muller."""
    u = _uniform(k, count + count % 2).view(-1, 2)
    radius, angle = u[:, 0].log().mul_(-2).sqrt_(), u[:, 1] * (2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[:count]


def signs(k: int, count: int) -> Tensor:
    """Random signs ±1 (count,) float64, 64 from each word."""
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
    made = normals(key(seed, name, stream), repeats * size * width)
    q, triangle = torch.linalg.qr(made.view(repeats, width, size))
    frames: Tensor = q * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    with torch._C.DisableTorchFunction():  # `true_float64` would keep the last bits
        return (frames.mT * math.sqrt(width / size)).float().contiguous()


@functools.lru_cache(maxsize=512)
def hashed(
    seed: int, name: str, stream: str, repeats: int, size: int, width: int
) -> tuple[Tensor, Tensor]:
    """Buckets and signs (repeats, width) of independent count sketches."""
    where, sign = buckets(key(seed, name, stream), repeats * width, size)
    return where.view(repeats, width), sign.float().view(repeats, width)


@functools.lru_cache(maxsize=512)
def _bags(
    seed: int, name: str, stream: str, repeats: int, size: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`hashed` as bags for `embedding_bag`: columns sorted by bucket, their signs, bag starts."""
    where, sign = hashed(seed, name, stream, repeats, size, width)
    bucket = (where + size * torch.arange(repeats, device="cpu")[:, None]).flatten()
    order = bucket.argsort(stable=True)
    counts = torch.bincount(bucket, minlength=repeats * size)
    return order % width, sign.flatten()[order], counts.cumsum(0) - counts


# --------------------------------------------------------------------------- projections


@dataclass(frozen=True)
class Stream:
    """Which random numbers a projection uses."""

    seed: int
    name: str
    repeats: int


def count_sketch(stream: Stream, vectors: Tensor, size: int, use: str = "hash") -> Tensor:
    """Count sketches (c, R, size) of vectors (c, n); each use has a hash of its own.

    Computed as sums of rows of the transposed vectors: the entries of one bucket are whole rows.
    """
    table = _bags(stream.seed, stream.name, use, stream.repeats, size, vectors.shape[1])
    columns, sign, starts = (x.to(vectors.device) for x in table)
    rows = vectors.T.contiguous()
    out = torch.nn.functional.embedding_bag(
        columns, rows, starts, mode="sum", per_sample_weights=sign.to(rows)
    )
    sketches: Tensor = out.T.unflatten(1, (stream.repeats, size))
    return sketches


def two_sided(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], sizes: tuple[int, int]
) -> Tensor:
    """Two-sided sketches Σ_t (S l_t) ⊗ (S' r_t), (c, R, sizes[0], sizes[1]).

    S and S' are Haar frames. For one-hot rows S is a count sketch, which is exact on each of them.
    """
    repeats, (size, size_r) = stream.repeats, sizes
    out = terms[0].right.new_zeros(len(terms[0]), repeats, size, size_r)
    for term in terms:
        right = _onto(stream, "right", term.right, size_r, term.apart)  # (·, R, t, size_r)
        if not term.one_hot:
            out += _onto(stream, "left", term.left, size, term.apart).mT @ right
            continue
        where, sign = hashed(stream.seed, stream.name, "left hash", repeats, size, shape[0])
        # (R, t), or of own rows (R, c, t); every cotangent and repeat has its own places in `out`.
        where, sign = (x.to(right.device)[:, term.left] for x in (where, sign.to(right)))
        if where.dim() == 2:
            where, sign = where[:, None], sign[:, None]
        first = torch.arange(len(right) * repeats, device=right.device).view(-1, repeats, 1)
        places = where.transpose(0, 1) + first * size
        signed = right * sign.transpose(0, 1)[..., None]
        out.view(-1, size_r).index_add_(0, places.flatten(), signed.flatten(0, 2))
    return out


def two_sided_matrix(stream: Stream, matrix: Tensor, sizes: tuple[int, int]) -> Tensor:
    """`two_sided` of one matrix (rows, columns) that is not given by factors: (1, R, ·, ·).

    Cost: 2 R sizes[0] rows columns FLOPs.
    """
    left, right = (
        haar(stream.seed, stream.name, side, stream.repeats, size, width).to(matrix)
        for side, size, width in zip(("left", "right"), sizes, matrix.shape, strict=True)
    )
    projected = (left.flatten(0, 1) @ matrix).unflatten(0, left.shape[:2])
    both: Tensor = projected @ right.mT
    return both[None]


def _onto(stream: Stream, side: str, x: Tensor, size: int, apart: bool = False) -> Tensor:
    """Projects rows (·, t, n) onto the frames of one side: (·, R, t, size)."""
    frames = haar(stream.seed, stream.name, side, stream.repeats, size, x.shape[-1])
    across = frames.to(x).flatten(0, 1).T
    projected = ops.product(x, across, x.shape[-2] if apart else None)
    by_repeat: Tensor = projected.unflatten(-1, (stream.repeats, size))
    return by_repeat.transpose(-3, -2)


def hashed_rows(
    stream: Stream,
    left: Tensor,
    right: Tensor,
    sizes: tuple[int, int],
    whole: bool = False,
) -> Tensor:
    """`two_sided` of Σ_t left[t] ⊗ right[t] with the hash of one-hot rows.

    Args:
        stream: Which random numbers.
        left: (c, t, rows).
        right: (c, t, columns).
        sizes: Numbers of one repeat (left, right).
        whole: Whether there is a number for each row, so that rows are not hashed.
    """
    projected = _onto(stream, "right", right, sizes[1])
    if whole:
        return left.mT[:, None] @ projected
    pushed = count_sketch(stream, left.flatten(0, 1), sizes[0], "left hash")
    both: Tensor = pushed.unflatten(0, left.shape[:2]).permute(0, 2, 3, 1) @ projected
    return both


def dense(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], size: int, gaussian: bool
) -> Tensor:
    """Sketches (c, R, size): inner products with random matrices of independent entries.

    Cost: 2 c R size rows columns FLOPs, and drawing R size rows columns random numbers.
    """
    draw = normals if gaussian else signs
    count = shape[0] * shape[1]
    whole = torch.stack([weigh(terms, c, shape[0]).flatten() for c in range(len(terms[0]))])
    out = whole.new_empty(len(whole), stream.repeats, size)
    block = max(1, _BLOCK // count)
    for repeat in range(stream.repeats):
        for lo in range(0, size, block):
            rows = min(block, size - lo)
            at = key(stream.seed, stream.name, f"dense {repeat} {lo}")
            matrix = draw(at, rows * count).view(rows, count).to(whole)
            for c, vector in enumerate(whole):
                out[c, repeat, lo : lo + rows] = matrix @ vector
    return out.div_(size**0.5)


def sparse(stream: Stream, terms: Sequence[Term], shape: tuple[int, int], size: int) -> Tensor:
    """Sketches (c, R, size): each entry is added, with a sign, to one bucket of each repeat.

    The repeats together are the block form of SJLT (Kane & Nelson 2014) with R nonzeros a column.
    Cost: 2 T rows columns FLOPs to materialise a gradient, R rows columns additions, and drawing as
    many random numbers.
    """
    count = shape[0] * shape[1]
    whole = torch.stack([weigh(terms, c, shape[0]).flatten() for c in range(len(terms[0]))])
    out = whole.new_zeros(len(whole), stream.repeats, size)
    for repeat in range(stream.repeats):  # tables as large as the weight are not kept
        where, sign = buckets(key(stream.seed, stream.name, f"hash {repeat}"), count, size)
        out[:, repeat].index_add_(1, where.to(whole.device), whole * sign.to(whole))
    return out


def tensor_sketch(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], size: int
) -> Tensor:
    """TensorSketches (c, R, size), size odd: entry (i, j) is added to bucket h(i) + h'(j) mod size.

    Computed as Σ_t of circular convolutions of two count sketches, by FFT. Source: Pham and Pagh
    2013.
    """
    outs, sides = [], ("left", "right")

    def moved(x: Tensor, side: str) -> Tensor:
        """Spectra (T, R, size // 2 + 1) of the count sketches of rows (T, n)."""
        spectra: Tensor = torch.fft.rfft(count_sketch(stream, x, size, side))
        return spectra

    shared = [
        [
            moved(x, side) if x.dim() == 2 else None
            for x, side in zip((term.left, term.right), sides, strict=True)
        ]
        for term in terms
    ]
    for c in range(len(terms[0])):
        total: Tensor | None = None
        for term, known in zip(terms, shared, strict=True):
            left, right = (
                moved(x, side) if have is None else have
                for x, side, have in zip(term.one(c), sides, known, strict=True)
            )
            part = (left * right).sum(0)
            total = part if total is None else total + part
        outs.append(torch.fft.irfft(total, n=size))
    return torch.stack(outs)


def low_rank(
    stream: Stream, terms: Sequence[Term], shape: tuple[int, int], rank: int
) -> tuple[Tensor, Tensor]:
    """A nearly best part U Vᵀ of rank ρ of each matrix A.

    U spans (A Aᵀ)² A Ω for normal Ω, and V = Aᵀ U. A single outer product is returned as it is.

    Returns:
        U (c, ρ, rows), orthonormal, and V (c, ρ, columns).

    Cost: 12 ρ T (rows + columns) FLOPs a cotangent.
    """
    if rank == 1 and single(terms):
        return terms[0].left, terms[0].right.expand(len(terms[0]), 1, -1)
    start = normals(key(stream.seed, stream.name, "low rank"), shape[1] * rank)
    right = start.view(shape[1], rank).to(terms[0].right)
    for _ in range(3):
        onto = torch.stack([t.left.mT @ (t.right @ right) for t in terms]).sum(0)
        onto = torch.linalg.qr(onto).Q
        right = torch.stack([t.right.mT @ (t.left @ onto) for t in terms]).sum(0)
    return onto.mT, right.mT


def single(terms: Sequence[Term]) -> bool:
    """Whether each gradient is one outer product."""
    return len(terms) == 1 and terms[0].left.dim() == 3 and terms[0].left.shape[1] == 1


# --------------------------------------------------------------------------- variances
#
# ⟨S A, S B⟩⟨S C, S D⟩ has the mean Σ W[p, q] T[p, q]. T[p, q] pairs the rows of the four matrices
# by pattern p and their columns by pattern q; W[p, q] is the factor of a projection for this pair.

_PATTERNS = (("ii", "kk"), ("ik", "ik"), ("ik", "ki"), ("ii", "ii"))  # rows of (A, B), (C, D)


def contractions(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """T (4, 4) float64: Σ a b c d over rows and columns that pair as AB|CD, AC|BD, AD|BC, ABCD.

    Cost: 16 contractions of at most 4 rows columns min(rows, columns) FLOPs each.
    """
    given = [x.double().cpu().numpy() for x in (a, b, c, d)]
    table = torch.empty(4, 4, dtype=torch.float64)
    for p, row in enumerate(_PATTERNS):
        for q, column in enumerate(_PATTERNS):
            columns = "".join(column).translate(str.maketrans("ik", "jl"))
            names = [i + j for i, j in zip("".join(row), columns, strict=True)]
            table[p, q] = float(np.einsum(",".join(names) + "->", *given, optimize="optimal"))
    return table


def frame_moments(size: int, width: int) -> Tensor:
    """E[M_ij M_kl] of M = SᵀS for a Haar frame: weights of ij|kl, ik|jl, il|jk, all equal."""
    if size >= width:
        return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    beta = width * (width - size) / (size * (width - 1) * (width + 2))
    alpha = width / size - beta * (width + 1)
    return torch.tensor([alpha, beta, beta, 0.0], dtype=torch.float64)


def sign_moments(size: int) -> Tensor:
    """`frame_moments` of independent signs, and of a count sketch."""
    return torch.tensor([1.0, 1 / size, 1 / size, -2 / size], dtype=torch.float64)


def normal_moments(size: int) -> Tensor:
    """`frame_moments` of independent normals."""
    return torch.tensor([1.0, 1 / size, 1 / size, 0.0], dtype=torch.float64)


def tensor_sketch_moments(size: int) -> Tensor:
    """W (4, 4) of a TensorSketch of odd size: the probability that a pattern's entries collide."""
    # "All equal" is part of the other three; made disjoint, every pattern has one chance.
    disjoint = torch.eye(4, dtype=torch.float64)
    disjoint[:3, 3] = -1
    chance = torch.full((4, 4), 1 / size, dtype=torch.float64)
    chance[0, 0] = chance[0, 3] = chance[3, 0] = chance[3, 3] = 1
    chance[1, 2] = chance[2, 1] = 1 / size**2
    return disjoint.T @ chance @ disjoint


def variance(moments: Tensor, pairs: Sequence[tuple[float, Tensor, Tensor]]) -> float:
    """Var Σ sign ⟨S A, S B⟩ over pairs (sign, A, B) that share S, with W = `moments` (4, 4)."""
    total = 0.0
    for sign, a, b in pairs:
        for other, c, d in pairs:
            table = contractions(a, b, c, d)
            total += sign * other * float((moments * table).sum() - table[0, 0])
    return max(total, 0.0)
