"""One pass over many responses: log-probs, confidence and entropy of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import response_logits, tokens_of_a_pass
from lddyn.memory import is_out_of_memory, name_memory
from lddyn.probes.probe_set import Encoded

__all__ = ["Measured", "measure"]


@dataclass(frozen=True, repr=False)
class Measured:
    """What a model believes of each example: sums over its counted tokens.

    All attributes are tensors (N,), float64. y_m is a counted token, π the prediction of it, G_m =
    π − e_{y_m}, A_m = I − 1πᵀ, V the size of the vocabulary; logarithms and entropies are in nats.

    Attributes:
        tokens: Number of counted tokens.
        log_prob: Σ_m log π(y_m).
        greedy: Σ_m log max_v π(v): confidence of the greedy choice after the true prefix.
        rest: Σ_m log(1 − max_v π(v)). A logsumexp over the other tokens, finite when π saturates.
        entropy: Σ_m H(π).
        peakiness: Σ_m ‖A_m‖_F² = Σ_m (V − 2 + V ‖π‖²).
        energy: Σ_m ‖G_m‖².
    """

    tokens: Tensor
    log_prob: Tensor
    greedy: Tensor
    rest: Tensor
    entropy: Tensor
    peakiness: Tensor
    energy: Tensor

    @property
    def mean_log_prob(self) -> Tensor:
        """Mean log π(y_m) over the counted tokens of each example, (N,), nats."""
        return self.log_prob / self.tokens

    def summary(self) -> dict[str, float]:
        """Number of examples and tokens; log π, confidence and entropy per token, in nats."""
        count = float(self.tokens.sum())
        return {
            "examples": len(self.tokens),
            "tokens": int(count),
            "log_prob": float(self.log_prob.sum()) / count,
            "greedy": float(self.greedy.sum()) / count,
            "entropy": float(self.entropy.sum()) / count,
        }

    def __repr__(self) -> str:
        """One line."""
        of = self.summary() if len(self.tokens) else {}
        shown = "".join(f", {k} {of[k]:.4g}" for k in ("log_prob", "greedy", "entropy") if k in of)
        return f"Measured({len(self.tokens)} examples{shown and shown + ' nats per token'})"


_SUMS = ("log_prob", "greedy", "rest", "entropy", "peakiness", "energy")


def measure(
    model: nn.Module | Anatomy, probes: Encoded | Sequence[Example], *, tokens: int | None = None
) -> Measured:
    """Measure responses in one pass that reads equal prompts once.

    Prompts and responses are packed into sequences without padding (`lddyn.engine.logits`). Logits
    are computed at the positions of the responses only.

    Args:
        model: A causal LM of transformers, or its Anatomy. It is measured in evaluation mode.
        probes: An encoded probing set, or examples in any order.
        tokens: Most tokens in one forward pass. None: as many as keep the logits below 256 MiB.
            Where memory runs out, half as many are tried; examples that are done stay done.

    Returns:
        The sums of each example, in the order of the examples.

    Cost: 2 N FLOPs per prompt token, once per distinct prompt, and per response token.

    Example:
        >>> import lddyn, transformers
        >>> from lddyn.probes.measure import measure
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> examples = [lddyn.Example([1, 2], y) for y in ([3, 4, 5], [3, 6])]
        >>> measure(model, examples).tokens
        tensor([3., 2.], dtype=torch.float64)
    """
    model = Anatomy.module_of(model)
    examples = probes.examples if isinstance(probes, Encoded) else list(probes)
    sums = torch.zeros(len(examples), len(_SUMS), dtype=torch.float64)
    count = torch.tensor([float(len(e)) for e in examples], dtype=torch.float64)
    tokens, left = tokens or tokens_of_a_pass(model), torch.arange(len(examples))
    # Not inference mode: FSDP2 keeps the buffers of its first forward.
    with evaluating(model), torch.no_grad():  # in this order: the guard holds Ctrl-C back
        while len(left):
            try:
                _add(model, examples, tokens, left, sums, seen := torch.zeros_like(count))
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if tokens <= max(examples[i].length for i in left.tolist()):  # one at a time
                    name_memory(error, instead=_ALONE)
                    raise
                tokens //= 2
            left = left[seen[left] < count[left]]
            sums[left] = 0
    return Measured(count, *sums.unbind(1))


_ALONE = "one response at a time does not fit: give shorter ones, or a model in fewer bits"


def _add(
    model: nn.Module,
    examples: Sequence[Example],
    tokens: int,
    left: Tensor,
    sums: Tensor,
    seen: Tensor,
) -> None:
    """Adds the tokens of the examples `left` to their sums, and counts those that were added."""
    some = [examples[i] for i in left.tolist()]
    for logits, targets, owners in response_logits(model, some, tokens=tokens):
        statistics = _statistics(logits, targets).cpu()
        sums.index_add_(0, left[owners], statistics)
        seen.index_add_(0, left[owners], torch.ones(len(owners), dtype=seen.dtype))


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """The terms of the sums for each token: (n, 6) in float64, in the order of _SUMS."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    residual, log_prob, entropy, squared_norm, top = ops.residual(z, targets)
    best = top[:, :1]
    total = z.gather(1, targets[:, None]) - log_prob[:, None].to(z)  # log Σ exp z
    greedy = (z.gather(1, best) - total)[:, 0]
    # Where π saturates, 1 − max π has no correct digit: there the other tokens are summed.
    rest = torch.log1p(-greedy.exp())
    saturated = (greedy > -0.7).nonzero()[:, 0]
    others = z[saturated].scatter_(1, best[saturated], -torch.inf)
    rest[saturated] = others.logsumexp(1) - total[saturated, 0]
    vocabulary = z.shape[1]
    peakiness = vocabulary - 2 + vocabulary * squared_norm.double()
    energy = torch.linalg.vector_norm(residual, dim=1).double() ** 2
    parts = (log_prob, greedy, rest, entropy, peakiness, energy)
    return torch.stack([part.double() for part in parts], 1)
