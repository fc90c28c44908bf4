"""The kernel as a scaled identity and a low-rank rest, found by a randomised range finder.

    K_{m,l} ≈ c_{m,l} I + U X_m Y_lᵀ Uᵀ,     X (M, d, R), Y (L, d, R)

with U = W (tied heads: [W, E], see `norms`). One rank R for all token pairs together: the M d x L d
matrix of everything below the head is projected on the span of R of its images. An image is one
backward pass and one push, however many tokens there are, so that rank R costs 2 R of these pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn import ops
from lddyn.engine.factors import BodyRows
from lddyn.engine.gradient import gradient_of_hidden
from lddyn.engine.head import back_project, project
from lddyn.engine.pushforward import AlongDirection, Pushforward
from lddyn.engine.trace import Trace
from lddyn.entk.norms import Basis, effective_samples, root, span_basis
from lddyn.estimate import Estimate

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Ends:
    """What one side's cotangents are made of: logits, slopes (M, V) or None, targets (M,)."""

    logits: Tensor
    targets: Tensor
    slope: Tensor | None

    @classmethod
    def of(cls, trace: Trace) -> Ends:
        """Of a traced sequence."""
        return cls(trace.logits, trace.targets, trace.slope)

    def cotangents(self, given: Tensor | None, name: str) -> Tensor:
        """Cotangents (M, V) on the raw logits W h + b; default: of the log-prob rows e_y − π."""
        if given is None:
            given = ops.residual(self.logits, self.targets)[0]
        if given.shape != self.logits.shape:
            raise ValueError(
                f"{name} must be (tokens, vocabulary) = {tuple(self.logits.shape)}, got "
                f"{tuple(given.shape)}"
            )
        given = given.to(self.logits)
        return given if self.slope is None else given * self.slope


class LowRank:
    """K as a scaled identity and rank-R factors; made by `NTK.lowrank`.

    Attributes:
        left: X (M, d, R), coordinates of the images in U = W, or U = [W, E] for a tied head.
        right: Y (L, d, R), likewise.
        head: c (M, L).
        residual: ‖Π (K − K̂) Π‖_F over all token pairs, an Estimate ().
        centred: Whether Π was in the metric of the projection and of the residual.

    K̂ is what it was found for: the parameters, sequences and head weight of that moment.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        head: Tensor,
        weight: Tensor,
        ids: Tensor,
        ends: tuple[Ends, Ends],
        residual: Estimate,
        centred: bool,
    ):
        self.left, self.right, self.head = left, right, head
        self.weight, self.ids, self.ends = weight, ids, ends
        self.residual, self.centred = residual, centred

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
        """‖Π K̂_{m,l} Π‖_F (M, L), exact for K̂ (without Π if it was found without).

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

    def save(self, path: str | Path) -> None:
        """Writes `path`.safetensors and `path`.json: all but the weight of the model's head."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "left": self.left,
            "right": self.right,
            "head": self.head,
            "ids": self.ids,
            "residual": self.residual.value,
            "residual_stderr": self.residual.stderr,
        }
        for name, end in zip(("observed", "updated"), self.ends, strict=True):
            tensors |= {f"{name}.logits": end.logits, f"{name}.targets": end.targets}
            if end.slope is not None:
                tensors[f"{name}.slope"] = end.slope
        save_file(
            {n: t.clone().contiguous() for n, t in tensors.items()},
            path.with_name(path.name + ".safetensors"),
        )
        meta = {
            "kind": "lddyn.LowRank",
            "samples": self.residual.samples,
            "centred": self.centred,
            "weight": _fingerprint(self.weight),
        }
        path.with_name(path.name + ".json").write_text(json.dumps(meta), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> LowRank:
        """Reads what `save` wrote; the head's weight is taken from the model.

        Raises:
            ValueError: If the model's head is not the one that the factors belong to.
        """
        from safetensors.torch import load_file

        path = Path(path)
        meta = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
        embeddings: Any = model
        weight = embeddings.get_output_embeddings().weight.detach()
        found = _fingerprint(weight)
        if found != meta["weight"]:
            raise ValueError(
                f"the head's weight (shape, sum, norm) must be {meta['weight']}, got {found}: load "
                "with the model, at the step, that the factors were made of"
            )
        held = load_file(path.with_name(path.name + ".safetensors"), device=str(weight.device))
        ends = [
            Ends(held[f"{n}.logits"], held[f"{n}.targets"], held.get(f"{n}.slope"))
            for n in ("observed", "updated")
        ]
        residual = Estimate(held["residual"], held["residual_stderr"], meta["samples"])
        return cls(
            held["left"],
            held["right"],
            held["head"],
            weight,
            held["ids"],
            (ends[0], ends[1]),
            residual,
            meta["centred"],
        )


def _fingerprint(weight: Tensor) -> list[Any]:
    wide = weight.detach().double()
    return [list(weight.shape), float(wide.sum()), float(wide.norm())]


def body_product(push: Pushforward, updated: Trace, rows: BodyRows) -> Tensor:
    """Images (M, d + n) below the head of one cotangent per updated token, summed over them.

    Σ_l of everything but the head's product with itself: the move of the head's input, and with
    tied weights that of the embedding rows that are also output rows.

    Cost: one backward pass and one push; one gradient the size of the trainable parameters.
    """
    anatomy, precise, observed = updated.anatomy, updated.logits.dtype, push.trace
    direction = gradient_of_hidden(anatomy, updated.example, rows.hidden.to(precise))
    moved_rows = observed.hidden.new_zeros(len(observed.hidden), 0).to(precise)
    if anatomy.tied:
        assert anatomy.head_weight is not None
        embedding = direction[anatomy.head_weight]
        moved_rows = observed.hidden.to(precise) @ embedding[rows.ids].to(precise).T
        through_head = rows.picked.to(precise).T @ updated.hidden.to(precise)
        direction[anatomy.head_weight] = embedding.index_add(
            0, rows.ids, through_head.to(embedding)
        )
    with push.anatomy.analysis():
        hidden = push.hidden(AlongDirection(direction))[0].to(precise)
    return torch.cat([hidden, moved_rows], 1)


@dataclass
class _Range:
    """An orthonormal basis of images, grown one by one, and what its transpose has of K."""

    push: Pushforward  # through χo
    back: Pushforward  # through χu
    basis: Basis
    coordinates: list[Tensor]  # q_i, orthonormal in the metric of the logits, (M k,)
    left: list[Tensor]  # the same as combinations of images (M, d + n)
    right: list[Tensor]  # Fᵀ q_i, as images (L, d + n)

    def _metric(self, image: Tensor) -> Tensor:
        return ((image.double() @ self.basis.vectors) * self.basis.values.sqrt()).flatten()

    def grow(self, rows: BodyRows) -> bool:
        """Adds the image of one more cotangent per updated token; False if it is nothing new."""
        image = body_product(self.push, self.back.trace, rows).double()
        q = self._metric(image)
        size = float(q.norm())
        for _ in range(2):  # once is not enough where it nearly lies in the span
            for known, combined in zip(self.coordinates, self.left, strict=True):
                share = float(known @ q)
                q, image = q - share * known, image - share * combined
        if float(q.norm()) <= 1e-5 * size:
            return False
        image, q = image / q.norm(), q / q.norm()
        self.coordinates.append(q)
        self.left.append(image)
        rows = self.basis.rows(q.view(-1, len(self.basis)))
        self.right.append(body_product(self.back, self.push.trace, rows).double())
        return True


def find_low_rank(
    push: Pushforward,
    back: Pushforward,
    basis: Basis,
    head: Tensor,
    centred: bool,
    product: Callable[[Tensor], Tensor],
    *,
    rank: int | None,
    rtol: float | None,
    span: str,
    probes: int,
    limit: int,
    seed: int,
) -> LowRank:
    """The range finder behind `NTK.lowrank`; pushes through χo and χu, `product` is K @ G."""
    generator = torch.Generator().manual_seed(seed)
    observed, updated = push.trace, back.trace
    ends = Ends.of(observed), Ends.of(updated)
    tokens, weight = len(updated.positions), updated.anatomy.head.weight.detach()
    found = _Range(push, back, basis, [], [], [])
    data = ends[1].cotangents(None, "G")
    given = BodyRows(back_project(data, weight), data[:, basis.ids], basis.ids)
    drawn = 0

    def next_rows() -> BodyRows:
        nonlocal drawn
        drawn += 1
        if span == "data":
            if most >= tokens:  # one token at a time: all that the data can ask
                if drawn <= tokens:
                    scale = torch.eye(tokens)[drawn - 1].to(data)[:, None]
                    return BodyRows(given.hidden * scale, given.picked * scale, given.ids)
            else:
                scale = torch.randn(tokens, 1, generator=generator).to(data)
                return BodyRows(given.hidden * scale, given.picked * scale, given.ids)
        return basis.rows(torch.randn(tokens, len(basis), generator=generator))

    def assemble() -> LowRank:
        dtype = updated.logits.dtype

        def stack(parts: list[Tensor], rows: int) -> Tensor:
            width = weight.shape[1] + len(basis.ids)
            empty = head.new_zeros(rows, width, 0)
            return torch.stack(parts, -1).to(dtype) if parts else empty.to(dtype)

        form = LowRank(
            stack(found.left, len(observed.positions)),
            stack(found.right, tokens),
            head,
            weight,
            basis.ids,
            ends,
            Estimate(head.new_zeros(()), head.new_zeros(())),
            centred,
        )
        form.residual = _residual(form, product, generator, probes)
        return form

    most = limit if rank is None else rank
    # Random rows that bring nothing new four times in a row have found all there is; tokens that
    # are asked one by one have not.
    patience = tokens if span == "data" and most >= tokens else 4
    target = min(8, most) if rank is None else rank
    while True:
        stalled = 0
        while len(found.left) < target and stalled < patience:
            stalled = 0 if found.grow(next_rows()) else stalled + 1
        form = assemble()
        if rank is not None or target >= most or stalled:
            return form
        assert rtol is not None
        # ‖K‖² = ‖K̂‖² + ‖K − K̂‖² for a projection, up to the cross term of the residual with c I.
        norm = float(form.frobenius().pow(2).sum().sqrt())
        if float(form.residual.value) <= rtol * norm:
            return form
        target = min(2 * target, most)


def _residual(
    form: LowRank, product: Callable[[Tensor], Tensor], generator: torch.Generator, probes: int
) -> Estimate:
    """‖K − K̂‖_F by Hutchinson's probes over all tokens and the whole vocabulary."""

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if form.centred else x

    like = form.ends[1].logits
    rows = []
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1.0
        v = centre(signs.to(like))
        rows.append(centre(product(v) - form @ v).double().pow(2).sum(-1))
    adds = torch.stack(rows, -1)
    total = adds.sum(0)
    error = (total.var() / probes).sqrt()
    return root(Estimate(total.mean(), error, effective_samples(adds)))
