"""Log-probs of every response of a probing set, each prompt read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import response_logits
from lddyn.probes.probe_set import Encoded

__all__ = ["Measured", "measure"]


@dataclass(frozen=True)
class Measured:
    """Sums over the counted tokens of each example, (N,), float64; nats.

    Attributes:
        tokens: Number of counted tokens.
        log_prob: Σ log π(y_m).
        greedy: Σ log max_v π: confidence of the greedy choice along the teacher-forced prefix.
        rest: Σ log(1 − max_v π), from a logsumexp over the others: finite when π saturates.
        entropy: Σ H(π).
        peakiness: ‖A‖_F² = Σ (V − 2 + V ‖π‖²).
        energy: ‖G‖_F² = Σ ‖π − e_y‖².
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
        """Per token."""
        return self.log_prob / self.tokens


_SUMS = ("log_prob", "greedy", "rest", "entropy", "peakiness", "energy")


@torch.no_grad()  # not inference mode: FSDP2 keeps the buffers of its first forward
def measure(
    model: nn.Module, probes: Encoded | Sequence[Example], *, tokens: int | None = None
) -> Measured:
    """One teacher-forced pass over many responses, whose equal prompts are read once.

    Prompts and responses are packed into sequences without padding, see `lddyn.engine.logits`.
    The head sees the response's positions only.

    Args:
        model: A causal LM of transformers; taken in evaluation mode.
        probes: A probing set, encoded, or examples in any order.
        tokens: Most tokens in one forward. None: so many that logits stay below a quarter GiB.

    Returns:
        Measured, aligned with the examples.

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
    examples = probes.examples if isinstance(probes, Encoded) else list(probes)
    sums = torch.zeros(len(examples), len(_SUMS), dtype=torch.float64)
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for logits, targets, owners in response_logits(model, examples, tokens=tokens):
            sums.index_add_(0, owners, _statistics(logits, targets).cpu())
    count = torch.tensor([float(len(e)) for e in examples], dtype=torch.float64)
    return Measured(count, *sums.unbind(1))


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, 6) in float64, in the order of _SUMS."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    residual, log_prob, entropy, squared_norm, top = ops.residual(z, targets)
    best = top[:, :1]
    total = z.gather(1, targets[:, None]) - log_prob[:, None].to(z)  # log Σ exp z
    greedy = (z.gather(1, best) - total)[:, 0]
    # 1 − max π has no digits left where π saturates: there it is summed over the others.
    rest = torch.log1p(-greedy.exp())
    near = (greedy > -0.7).nonzero()[:, 0]
    others = z[near].scatter_(1, best[near], -torch.inf)
    rest[near] = others.logsumexp(1) - total[near, 0]
    vocabulary = z.shape[1]
    peakiness = vocabulary - 2 + vocabulary * squared_norm.double()
    energy = torch.linalg.vector_norm(residual, dim=1).double() ** 2
    parts = (log_prob, greedy, rest, entropy, peakiness, energy)
    return torch.stack([part.double() for part in parts], 1)
