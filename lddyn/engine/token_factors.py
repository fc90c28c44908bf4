"""`token_factors`: gradients of each response token as factors, for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.factors import Factors
from lddyn.engine.pullback import Pullback, segments_down


@dataclass(frozen=True)
class TokenFactor:
    """Gradients ∇ log π(y_m) of one parameter for c response tokens m, as factors.

    Attributes:
        name: Canonical parameter name; "[e]" follows for the e-th slice of packed experts.
        kind: How the gradient of the i-th token is put together. `"linear"`: Σ_t grads[i, t] ⊗
            activations[t]. `"matmul"`: its transpose. `"embedding"`: grads[i, t] is added to row
            activations[t]. `"whole"`: it is grads[i].
        tokens: Indices of the response tokens, (c,) int64.
        activations: (t, d_in). For an embedding, token ids (t,). Where each response token has a
            single row of its own, as at the head, (c, d_in). For a whole gradient, None.
        grads: (c, t, d_out), zero beyond a token's position; (c, d_out) with rows of their own.
    """

    name: str
    kind: str
    tokens: Tensor
    activations: Tensor | None
    grads: Tensor

    def dense(self, shape: Sequence[int]) -> Tensor:
        """Dense gradients (c, *shape), for a parameter of this shape."""
        x, delta = self.activations, self.grads
        if x is None:
            return delta.reshape(len(delta), *shape)
        if self.kind == "embedding":
            out = delta.new_zeros(len(delta), *shape)
            return out.index_add_(1, x, delta)
        x = x.to(delta)
        own = delta.dim() == 2
        out = delta[:, :, None] * x[:, None, :] if own else delta.mT @ x
        return out.mT if self.kind == "matmul" else out


def token_factors(
    model: nn.Module | Anatomy, example: Example, chunk: int = 16
) -> Iterator[TokenFactor]:
    """The gradients of every response token's log-prob, as factors, without forming them.

    One forward pass; all tokens are pulled back block by block, from the head down, so that only
    one block's factors exist at a time if each is used and let go. A parameter that is used twice
    (tied to the head, shared, an expert in two places) comes twice: its gradient is the sum.

    Args:
        model: A causal LM of transformers, or its Anatomy.
        example: The sequence.
        chunk: Tokens that are pulled back together, and come together.

    Yields:
        TokenFactor, for each use of each trainable parameter and each chunk.

    Raises:
        UnsupportedModelError: If the model cannot be opened.

    Cost: 2 N Σ (p_m + 1) FLOPs, N the block-linear parameters; factors of one chunk and block.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> squares = torch.zeros(3)  # ‖∇ log π(y_m)‖², over the weights of products
        >>> for factor in lddyn.token_factors(model, ex):
        ...     if factor.kind == "linear" and factor.grads.dim() == 3:
        ...         x, delta = factor.activations, factor.grads
        ...         squares[factor.tokens] += ((delta @ delta.mT) * (x @ x.T)).sum((1, 2))
        >>> bool((squares > 0).all())
        True
    """
    anatomy = Anatomy.of(model)
    trace = anatomy.trace(example)
    pull = Pullback(trace, chunk=chunk)
    head = pull.head
    if head.weight is not None:
        yield TokenFactor(head.weight, "linear", pull.selected, head.hidden, head.rows)
    if head.bias is not None:
        yield TokenFactor(head.bias, "whole", pull.selected, None, head.rows)
    for segment in segments_down(anatomy):
        with anatomy.analysis():
            chunks = list(pull.step(segment))
        for tokens, factors in chunks:
            yield from _token_factors(tokens, factors)


def _token_factors(tokens: Tensor, factors: Factors) -> Iterator[TokenFactor]:
    for tap, grads in factors.taps:
        if tap.bias is not None:
            whole = grads.sum(1) if grads.dim() == 3 else grads
            yield TokenFactor(tap.bias, "whole", tokens, None, whole)
        if tap.weight is None:
            continue
        if tap.kind == "embedding" and tap.padding is not None:
            grads = grads * tap.updated()[:, None]
        yield TokenFactor(tap.weight, tap.kind, tokens, tap.activations, grads)
    for name, gradient in factors.direct.items():
        yield TokenFactor(name, "whole", tokens, None, gradient)
