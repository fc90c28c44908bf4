"""The empirical NTK between token logits, as a lazy operator.

    K[m, l] = (∇θ z_m(χo)) (∇θ z_l(χu))ᵀ,   V x V for each of the M x L token pairs

Nothing of size V x V is formed: K is contracted with cotangents on both sides (`gram`), by pulling
both sides back block by block and pairing their factors, or by pushing the factors of one side
through the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lddyn.cells import Grid, cell
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import Side, factored_gram, factored_push, token_gram
from lddyn.engine.guard import undisturbed
from lddyn.engine.pushforward import (
    Direction,
)
from lddyn.engine.trace import Trace
from lddyn.entk.lowrank import LowRank
from lddyn.entk.norms import (
    Sampling,
    block_squares,
    block_traces,
    pushed_squares,
    root,
    row_squares,
)
from lddyn.entk.products import KernelProducts
from lddyn.entk.range_finder import find_low_rank
from lddyn.entk.shift import Shift
from lddyn.estimate import Estimate
from lddyn.memory import DEFAULT_MEMORY
from lddyn.text import visible


class NTK:
    """The kernel K(χo, χu) as a lazy operator of shape (M, V, L, V); made by `ntk`.

    Nothing of size V x V is formed: every method contracts K with cotangents. A cotangent is a row
    vector over the vocabulary, one per response token. With raw logits W h + b, and the derivative
    D of operations after the head (soft-capping; else D = I),

        K_{m,l} = D_m (W K^h_{m,l} Wᵀ + c_{m,l} I) D_l,     c = ⟨h_m, h_l⟩ [W trains] + [b trains]

    holds exactly. A head that is tied to the embedding adds cross terms for the vocabulary tokens E
    of the two sequences: [W, E] M [W, E]ᵀ in place of W K^h Wᵀ.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> one = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> other = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 6])
        >>> K = lddyn.ntk(model, one, other)
        >>> K.restrict(K.top_tokens(4)).shape, K.diagonal([3, 6]).shape, K.trace().value.shape
        (torch.Size([3, 4, 2, 4]), torch.Size([3, 2, 2]), torch.Size([3, 2]))
        >>> shift = K.explain()  # of an SFT step on `other`
        >>> shift.log_probs("head").shape, bool((shift.logits == shift.head + shift.body).all())
        (torch.Size([3, 50]), True)
        >>> form = K.lowrank(8)
        >>> form.rank, (form @ torch.randn(2, 50)).shape, form.residual.value.shape
        (8, torch.Size([3, 50]), torch.Size([]))
    """

    def __init__(
        self,
        observed: Trace,
        updated: Trace,
        memory: int | str = DEFAULT_MEMORY,
        progress: bool = False,
    ):
        self.observed, self.updated = observed, updated
        self.memory, self.progress = memory, progress
        self.products = KernelProducts(observed, updated, memory, progress)

    def __repr__(self) -> str:
        m, vocabulary, count, _ = self.shape
        return (
            f"NTK({m} observed tokens, {count} updated tokens, vocabulary {vocabulary}; "
            f"lazy, {m * count} blocks of {vocabulary} x {vocabulary})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: both responses, and what to ask; it computes nothing."""
        sides = (("observed", self.observed), ("updated", self.updated))
        rows = [
            (name, [len(t.example), t.length, " ".join(map(visible, t.example.token_texts))[:200]])
            for name, t in sides
        ]
        ask = "K.gram() compares tokens, K @ G moves logits, K.frobenius() is its size"
        grid = Grid("Responses", ["tokens", "with the prompt", "text"], rows)
        return cell("NTK", f"{self!r}\n{ask}", [grid])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(M, V, L, V)."""
        return (*self.observed.logits.shape, *self.updated.logits.shape)

    @property
    def T(self) -> NTK:
        """K(χu, χo), with K(o, u)[m, l] = K(u, o)[l, m]ᵀ."""
        return NTK(self.updated, self.observed, self.memory, self.progress)

    @undisturbed
    def gram(
        self, v_o: Tensor | None = None, v_u: Tensor | None = None, method: str = "auto"
    ) -> Tensor:
        """v_oᵀ K v_u for every token pair: out[m, l] = v_o[m]ᵀ K_{m,l} v_u[l].

        Args:
            v_o: Cotangents (M, V) on the observed logits; default: the log-prob rows e_y − π.
            v_u: Cotangents (L, V) on the updated logits; default likewise.
            method: "paired" (both sides pulled back, factors paired), "pushed" (the updated side's
                factors pushed forward through the observed side), or "auto" (pairing, unless the
                model shares parameters between blocks).

        Returns:
            (M, L), float32 (float64 for float64 models).

        Raises:
            ValueError: If a cotangent's shape is not (tokens, vocabulary).

        Cost: 2 N (Σ p_m + Σ p_l) FLOPs paired; 2 N L (T_u + T_o) pushed.
        """
        if method not in ("auto", "paired", "pushed"):
            raise ValueError(f"method must be 'auto', 'paired' or 'pushed', got {method!r}")
        one = self._side(self.observed, v_o, "v_o")
        other = self._side(self.updated, v_u, "v_u")
        if self.observed is self.updated and (v_o is v_u):
            other = one
        if method == "pushed" or (method == "auto" and self.products.blocked):
            return factored_gram([one], [other], self.memory, self.progress)
        return token_gram([one], [other], self.memory, self.progress)

    @undisturbed
    def __matmul__(self, g: Tensor) -> Tensor:
        """K G: logit cotangents (L, V) of χu -> Σ_l K_{m,l} G_l, the move of the logits (M, V).

        Cost: one backward pass of χu, 4 N T_u FLOPs more than its forward, and one push through χo,
        6 N T_o; one gradient the size of the trainable parameters.
        """
        return self.products.product()(self._cotangents(self.updated, g, "G"))

    @undisturbed
    def block(self, m: int, token: int) -> Tensor:
        """The dense V x V block K_{m,l} of one token pair; V pullbacks, for small vocabularies.

        Raises:
            ValueError: If V > 4,096 (use gram or @ with the cotangents you need).
        """
        return self.to_dense([m], [token])[0, :, 0, :]

    @undisturbed
    def to_dense(
        self, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None
    ) -> Tensor:
        """The dense kernel (M, V, L, V), or some of its rows and columns; small V only.

        Raises:
            ValueError: If V > 4,096.
        """
        vocabulary = self.shape[1]
        if vocabulary > 4096:
            raise ValueError(
                f"a dense block has V² entries; V must be at most 4096, got {vocabulary}: use "
                "gram(v_o, v_u) or K @ G"
            )
        columns = range(self.shape[2]) if columns is None else columns
        rows = range(self.shape[0]) if rows is None else rows
        blocks = []
        for column in columns:
            one = torch.zeros_like(self.updated.logits)
            moved = []
            for v in range(vocabulary):
                one[column, v] = 1.0
                side = Side(self.updated, one)
                select = torch.tensor([column], device=one.device)
                (pushed,) = [
                    m[0][0] for _, m in factored_push([self.observed], [side], select=select)
                ]
                moved.append(pushed[list(rows)])
                one[column, v] = 0.0
            blocks.append(torch.stack(moved, dim=-1))  # (M, V, V)
        return torch.stack(blocks, dim=2)

    # ----- parts of it

    @undisturbed
    def explain(self, g: Tensor | None = None) -> Shift:
        """K G, the move of the logits of χo (M, V), in two parts.

            head: Σ_l c_{m,l} G_l, through the head's own weight and bias, in closed form
            body: W K^h Wᵀ G, through everything below the head; with tied weights it includes both
                  cross terms (embedding rows that move logits, output rows that move the input)

        Args:
            g: Logit cotangents (L, V) of χu; default: those of SFT, π − e_y.

        Returns:
            Shift. A step of plain SGD moves the logits by −lr times it.

        Raises:
            ValueError: If the shape of g is not (L, V).

        Cost: that of K @ G.
        """
        g = -Side.log_probs(self.updated).rows if g is None else g
        g = self._cotangents(self.updated, g, "G")
        total = self.products.product()(g)
        raw = g if self.updated.slope is None else g * self.updated.slope
        head = self.products.head_multiples() @ raw
        if self.observed.slope is not None:
            head = head * self.observed.slope
        return Shift(head, total - head, self.observed.logits)

    def top_tokens(self, count: int) -> Tensor:
        """The vocabulary ids (count,) with the largest Σ π over both sides' tokens, sorted.

        Raises:
            ValueError: If count is not in 1 … V.
        """
        if not 1 <= count <= self.shape[1]:
            raise ValueError(f"count must be between 1 and {self.shape[1]}, got {count}")
        masses = [side.logits.softmax(-1).sum(0) for side in (self.observed, self.updated)]
        mass = torch.stack(masses).sum(0)
        return mass.topk(count).indices.sort().values

    @undisturbed
    def restrict(
        self, tokens: Tensor | Sequence[int], updated: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """K between some tokens of the vocabulary, (M, n, L, n'), exact.

        Args:
            tokens: Vocabulary ids (n,) on the observed side, such as `top_tokens(16)`.
            updated: Vocabulary ids (n',) on the updated side; default: the same.

        Raises:
            ValueError: If an id is outside the vocabulary.
            NotImplementedError: If weights are shared between blocks (use gram).

        Cost: n pullbacks per observed and n' per updated token, at most d each (tied: d + tokens).
        """
        ids_o = self._vocabulary_ids(tokens, "tokens")
        ids_u = ids_o if updated is None else self._vocabulary_ids(updated, "updated")
        rows_o, mix_o = self.products.one_hot(ids_o)
        rows_u, mix_u = self.products.one_hot(ids_u)
        out = self.observed.logits.new_zeros(self.shape[0], len(ids_o), self.shape[2], len(ids_u))
        for at, gram in self.products.blocks(rows_o, rows_u):
            if mix_o is not None:
                gram = torch.einsum("vi,milj->mvlj", mix_o, gram)
            out[:, :, at] = gram if mix_u is None else gram @ mix_u.T
        same = (ids_o[:, None] == ids_u[None]).to(out)
        out += self.products.head_multiples()[:, None, :, None] * same[:, None]
        if self.observed.slope is not None:
            out *= self.observed.slope[:, ids_o, None, None]
        if self.updated.slope is not None:
            out *= self.updated.slope[:, ids_u]
        return out

    @undisturbed
    def diagonal(self, tokens: Tensor | Sequence[int] | None = None) -> Tensor:
        """K_{m,l}[v, v] for every token pair and some tokens of the vocabulary: (M, L, n), exact.

        Args:
            tokens: Vocabulary ids (n,); default: all V.

        Raises:
            ValueError: If an id is outside the vocabulary.
            NotImplementedError: If weights are shared between blocks (use gram).

        Cost: n pullbacks per token of both sides; for n > d (tied: d + tokens) it is d pullbacks,
        M L d² floats and 2 M L n d² FLOPs.
        """
        chosen = range(self.shape[1]) if tokens is None else tokens
        ids = self._vocabulary_ids(chosen, "tokens")
        out = self.observed.logits.new_zeros(self.shape[0], self.shape[2], len(ids))
        rows, mix = self.products.one_hot(ids)
        if mix is None:
            for start in range(0, len(ids), 8):  # pairs of different tokens are wasted work
                part = rows[torch.arange(start, min(start + 8, len(ids)), device=ids.device)]
                for at, gram in self.products.blocks(part, part):
                    out[:, at, start : start + 8] = gram.transpose(1, 2).diagonal(dim1=2, dim2=3)
        else:
            for at, gram in self.products.blocks(rows, rows):
                for m, block in enumerate(gram):  # (d, l, d)
                    out[m, at] = ((mix @ block.transpose(0, 1)) * mix).sum(-1)
        out += self.products.head_multiples()[:, :, None]
        if self.observed.slope is not None:
            out *= self.observed.slope[:, None, ids]
        if self.updated.slope is not None:
            out *= self.updated.slope[:, ids]
        return out

    def _vocabulary_ids(self, tokens: Tensor | Sequence[int], name: str) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.updated.anatomy.device)
        vocabulary = self.shape[1]
        if ids.dim() != 1 or len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(
                f"{name} must be vocabulary ids (n,) from 0 to {vocabulary - 1}, got "
                f"{ids.flatten()[:8].tolist()} of shape {tuple(ids.shape)}"
            )
        return ids

    @undisturbed
    def lowrank(
        self,
        rank: int | None = None,
        rtol: float | None = None,
        *,
        span: str = "random",
        centred: bool = True,
        probes: int = 8,
        limit: int = 256,
        seed: int = 0,
    ) -> LowRank:
        """K ≈ c I + U X Yᵀ Uᵀ: a scaled identity per token pair, and R factors for all pairs.

        A randomised range finder works below the head: the images of R cotangents are
        orthonormalised in the metric of the (centred) logits, and K is projected on them.

        Args:
            rank: R. Give rank or rtol, one of them.
            rtol: Required ‖K − K̂‖_F / ‖K̂‖_F; R is doubled from 8 until it is met.
            span: "random": Gaussian cotangents. "data": combinations of the log-prob rows of χu's
                tokens, one by one if R >= L, so that K̂ G = K G for every loss of their log-probs.
            centred: Whether Π is in the metric and the residual, as log π is blind to a common
                shift of all logits.
            probes: Random probes of the residual, 4 or more.
            limit: Largest R under rtol.
            seed: Of all random signs.

        Returns:
            LowRank, with its estimated residual.

        Raises:
            ValueError: If not exactly one of rank and rtol is given, or an argument is out of
                range.
            NotImplementedError: If rtol is given and logits are changed after the head.

        Cost: 2 R + probes backward passes and pushes, whatever M and L; a gradient the size of the
        trainable parameters, R (M + L) d floats.
        """
        if (rank is None) == (rtol is None):
            raise ValueError(f"give rank or rtol, one of them; got rank={rank}, rtol={rtol}")
        if rank is not None and rank < 0:
            raise ValueError(f"rank must be 0 or more, got {rank}")
        if span not in ("random", "data"):
            raise ValueError(f"span must be 'random' or 'data', got {span!r}")
        Sampling(0.05 if rtol is None else rtol, None, probes, limit, seed)
        if rtol is not None and self.products.bent:
            raise NotImplementedError(
                "the model changes its logits after the head: give rank, and read the residual"
            )
        most = limit if rank is None else rank
        return find_low_rank(
            self.products, centred, most, rtol, span=span, probes=probes, seed=seed
        )

    # ----- norms and traces

    @undisturbed
    def frobenius(
        self,
        rtol: float = 0.05,
        *,
        centred: bool = True,
        reduce: str = "none",
        squared: bool = False,
        directions: int | None = None,
        probes: int | None = None,
        precondition: Direction | None = None,
        limit: int = 256,
        seed: int = 0,
    ) -> Estimate:
        """‖K_{m,l}‖_F of every token pair, of every observed token, or of the whole kernel.

            none: ‖Π K_{m,l} Π‖_F (M, L)     row: (Σ_l ‖·‖²)^½ (M,)     all: (Σ_ml ‖·‖²)^½ ()

        Π = I − 11ᵀ/V (I with centred=False) removes a common shift of all logits, which does not
        change log π. The square is estimated without bias; its root has a bias of the order of
        stderr²/value, which is below the stated error.

        For "none" the leading r directions of the centred unembedding are exact on both sides, and
        random signs sample the rest ("deflated two-sided probes"); the head's identity is never
        sampled. With all directions (small d) the result is exact and its error 0. Where logits are
        changed after the head, weights are shared between blocks or K is preconditioned, whole
        logit cotangents are pushed instead. For "row" and "all" the estimator is Hutch++.

        Args:
            rtol: Required relative standard error in every entry; directions, then probes, are
                doubled until it is met.
            centred: Whether Π is applied.
            reduce: "none", "row" or "all".
            squared: Return the (unbiased) square.
            directions: r, leading directions that are exact; k of Hutch++. None: by rtol.
            probes: q random probes, 4 or more. None: by rtol.
            precondition: Diagonal P of K_P = J_o P J_uᵀ: parameter name -> tensor of its shape,
                such as AdamW's 1/(√v̂ + ε). None: P = I.
            limit: Most cotangents per token ("none") or products with K ("row", "all"). A warning
                says if rtol is not met within it.
            seed: Of the probes.

        Returns:
            Estimate in float64. Its `samples` (for intervals) allow for the probes' kurtosis.

        Raises:
            ValueError: If an argument is out of range, or precondition lacks a parameter.

        Cost: none: (r + q) pullbacks per token of χo and (r + 2q) of χu, 2 N (p + 1) FLOPs each,
        and pairing; pushed: (r + q) L pullbacks and pushes. row, all: 2k + q backward passes and
        pushes. The only tensors with V rows are W and one logit cotangent per token.

        Source: Hutchinson, 1990; Meyer et al., Hutch++, 2021; the deflated probes are lddyn's.

        Example:
            >>> import lddyn, transformers
            >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16,
            ...     intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            ...     pad_token_id=None)
            >>> model = transformers.LlamaForCausalLM(config)
            >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
            >>> norms = lddyn.ntk(model, ex, ex).frobenius()
            >>> norms.value.shape, float(norms.stderr.max())  # d = 16: exact
            (torch.Size([3, 3]), 0.0)
        """
        sampling = Sampling(rtol, directions, probes, limit, seed)
        if reduce not in ("none", "row", "all"):
            raise ValueError(f"reduce must be 'none', 'row' or 'all', got {reduce!r}")
        if precondition is not None:
            _check_precondition(precondition, self.updated.anatomy)
        anatomy = self.updated.anatomy
        if reduce != "none":
            square = row_squares(
                self.products.product(precondition),
                self.products.transposed().product(precondition),
                (self.observed.logits.shape, self.updated.logits.shape),
                centred,
                reduce == "all",
                self.updated.logits,
                sampling,
            )
        elif precondition is not None or self.products.bent or self.products.blocked:
            square = pushed_squares(
                lambda v: self.products.image_squares(v, centred, precondition),
                anatomy.head.matrix,
                self.products.basis(centred),
                centred,
                sampling,
            )
        else:
            identity = anatomy.vocabulary - int(centred)
            square = block_squares(
                self.products.blocks,
                self.products.basis(centred),
                self.products.head_multiples(),
                identity,
                sampling,
            )
        return square if squared else root(square)

    @undisturbed
    def trace(
        self,
        rtol: float | None = None,
        *,
        centred: bool = False,
        directions: int | None = None,
        probes: int | None = None,
        limit: int = 256,
        seed: int = 0,
    ) -> Estimate:
        """Traces (M, L) of K_{m,l}, or of Π K_{m,l} Π: exact, or sampled to a relative error.

        tr K = tr(K^h WᵀW) + c V; the head's part c V is exact in both cases.

        Args:
            rtol: Required relative standard error in every entry; None: exact.
            centred: Whether Π is applied.
            directions: r, leading directions that are exact; None: by rtol.
            probes: q random probes, the same on both sides; None: by rtol.
            limit: Most cotangents per token; a warning says if rtol is not met within it.
            seed: Of the probes.

        Returns:
            Estimate in float64; its standard errors are zero where it is exact.

        Raises:
            ValueError: If an argument is out of range.
            NotImplementedError: If logits are changed after the head (use diagonal), or weights
                are shared between blocks.

        Cost: exact: d pullbacks per token of both sides (tied heads: d + tokens); else r + q.
        """
        sampling = None if rtol is None else Sampling(rtol, directions, probes, limit, seed)
        if self.products.bent:
            raise NotImplementedError(
                "the model changes its logits after the head: use diagonal().sum(-1)"
            )
        return block_traces(
            self.products.blocks,
            self.products.basis(centred),
            self.products.head_multiples(),
            self.updated.anatomy.vocabulary - int(centred),
            sampling,
        )

    @classmethod
    def _side(cls, trace: Trace, rows: Tensor | None, name: str) -> Side:
        if rows is None:
            return Side.log_probs(trace)
        return Side(trace, cls._cotangents(trace, rows, name))

    @staticmethod
    def _cotangents(trace: Trace, rows: Tensor, name: str) -> Tensor:
        if rows.shape != trace.logits.shape:
            raise ValueError(
                f"{name} must be (tokens, vocabulary) = {tuple(trace.logits.shape)}, got "
                f"{tuple(rows.shape)}"
            )
        return rows.to(trace.logits)


def ntk(
    model: nn.Module | Anatomy,
    observed: Example,
    updated: Example,
    *,
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
) -> NTK:
    """The empirical NTK between the response logits of two sequences, as a lazy operator.

        K[m, l] = (∇θ z_m(χo)) (∇θ z_l(χu))ᵀ        (paper Eq. 3 and 5)

    Args:
        model: A causal LM of transformers, or its Anatomy (open it once for many pairs). Only
            parameters with requires_grad=True count.
        observed: χo, M counted response tokens.
        updated: χu, L counted response tokens.
        memory: Workspace in bytes or as "2GiB"; "auto" is 4 GiB, a third of what is free on a GPU.
        progress: Show progress bars.

    Returns:
        NTK of logical shape (M, V, L, V).

    Raises:
        UnsupportedModelError: If the model cannot be opened.
        NonFiniteError: If a weight, activation or logit is NaN or infinite.

    Cost: a forward pass of each sequence; every method of the NTK states its own.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> K = lddyn.ntk(model, ex, ex)
        >>> K.shape, K.gram().shape
        ((3, 50, 3, 50), torch.Size([3, 3]))
    """
    anatomy = Anatomy.of(model)
    first = anatomy.trace(observed)
    second = first if updated is observed else anatomy.trace(updated)
    return NTK(first, second, memory, progress)


def _check_precondition(precondition: Direction, anatomy: Anatomy) -> None:
    for name, parameter in anatomy.trainable.items():
        diagonal = precondition.get(name)
        if diagonal is None or diagonal.shape != parameter.shape:
            raise ValueError(
                f"precondition must hold a tensor {tuple(parameter.shape)} for {name}, got "
                f"{None if diagonal is None else tuple(diagonal.shape)}"
            )
