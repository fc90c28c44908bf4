"""A small grammar, its text, and three bigram language models of it.

In a table every context has logits of its own, so K between two contexts is exactly zero. In a
factorised model and in a network contexts share features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

KINDS = ("table", "factorised", "network")


WORDS = {
    "article": "the a this that my every",
    "adjective": "red old small bright quiet wild",
    "noun": "cat dog bird fox horse child",
    "verb": "sees finds likes hears calls follows",
    "adverb": "often never soon slowly gladly",
    "end": ".",
}


# Which kinds of word follow which, and how often.
GRAMMAR = {
    "article": {"adjective": 0.4, "noun": 0.6},
    "adjective": {"noun": 0.85, "adjective": 0.15},
    "noun": {"verb": 0.65, "end": 0.25, "adverb": 0.1},
    "verb": {"article": 0.7, "adverb": 0.2, "end": 0.1},
    "adverb": {"verb": 0.4, "article": 0.3, "end": 0.3},
    "end": {"article": 1.0},
}


def vocabulary() -> tuple[list[str], list[str]]:
    """The words, and the kind of each."""
    pairs = [(word, kind) for kind, words in WORDS.items() for word in words.split()]
    return [w for w, _ in pairs], [k for _, k in pairs]


def transitions(generator: torch.Generator) -> Tensor:
    """P(next | word), (V, V): the grammar, with a random preference of each word."""
    words, kinds = vocabulary()
    taste = 1.5 * torch.randn(len(words), len(words), generator=generator, dtype=torch.float64)
    taste = taste + 1.5 * torch.randn(len(words), generator=generator, dtype=torch.float64)
    chances = torch.zeros_like(taste)
    for i, kind in enumerate(kinds):
        for follower, share in GRAMMAR[kind].items():
            at = torch.tensor([k == follower for k in kinds])
            chances[i, at] = share * taste[i, at].softmax(0)
    return chances


def count_bigrams(chances: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """How often each pair of words occurs in a text of `length` words, (V, V)."""
    words, _ = vocabulary()
    # Uniform numbers against cumulated chances: one draw a word.
    steps = torch.rand(length, generator=generator, dtype=torch.float64).tolist()
    cumulated = chances.cumsum(1)
    counts = torch.zeros_like(chances)
    word = words.index(".")
    for step in steps:
        following = int(torch.searchsorted(cumulated[word], step, right=True))
        following = min(following, len(words) - 1)
        counts[word, following] += 1
        word = following
    return counts


class Bigram(nn.Module):
    """Logits of the next word at every context, (V, V): a table, E Uᵀ, or W₂ tanh(W₁ e)."""

    def __init__(self, kind: str, size: int, generator: torch.Generator, width: int = 16):
        super().__init__()

        def normal(*shape: int, scale: float) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(scale * drawn)

        self.kind = kind
        if kind == "table":
            self.table = nn.Parameter(torch.zeros(size, size, dtype=torch.float64))
            return
        self.embedding = normal(size, width, scale=1.0)
        if kind == "network":
            self.hidden = normal(2 * width, width, scale=width**-0.5)
            width *= 2
        self.head = normal(size, width, scale=0.5 * width**-0.5)

    def forward(self) -> Tensor:
        """Logits (context, next word)."""
        if self.kind == "table":
            return self.table
        features: Tensor = self.embedding
        if self.kind == "network":
            features = torch.tanh(features @ self.hidden.T)
        return features @ self.head.T


def train(
    model: Bigram, counts: Tensor, checkpoints: Sequence[int], rate: float = 0.02
) -> dict[int, Bigram]:
    """Adam on the whole text's cross-entropy; copies after so many steps."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    weight = counts / counts.sum()
    kept = {}
    for step in range(max(checkpoints) + 1):
        if step in checkpoints:
            kept[step] = copy.deepcopy(model)
        optimizer.zero_grad()
        (-(weight * model().log_softmax(-1)).sum()).backward()
        optimizer.step()
    return kept


def kernel(model: Bigram) -> Tensor:
    """K[c, v, c', v'] = ⟨∇ z(v | c), ∇ z(v' | c')⟩, all of it, by an explicit Jacobian."""
    parameters = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, ()))(
        {k: v.detach() for k, v in parameters.items()}
    )
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)
    return torch.einsum("cvp,dwp->cvdw", flat, flat)


def push_down(model: Bigram, context: int, label: int, strength: float) -> tuple[Bigram, Tensor]:
    """One SGD step that lowers log π(label | context), and log π of all contexts after it.

    Its learning rate is such that the pushed logit has the same influence on itself in every model:
    η ‖∇ z(label | context)‖² = strength, which in a table is η = strength.
    """
    parameters = list(model.parameters())
    logits = model()
    reach = torch.autograd.grad(logits[context, label], parameters, retain_graph=True)
    rate = strength / float(sum((g * g).sum() for g in reach))
    gradients = torch.autograd.grad(logits[context].log_softmax(-1)[label], parameters)
    pushed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, gradient in zip(pushed.parameters(), gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)
        return pushed, pushed().log_softmax(-1)
