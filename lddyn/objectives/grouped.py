"""GRPO and its kin: several completions of one prompt, and a reward for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.logits import token_log_probs
from lddyn.objectives.losses import NOT_NEGATIVE, POSITIVE, Parameter
from lddyn.objectives.objective import Objective, several

__all__ = ["GRPO", "advantages_of"]

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo")
_SCALES = ("group", "batch", "none")
_LEVELS = ("token", "sequence")
_FLOOR = 1e-4  # added to a standard deviation of rewards, as in TRL


def advantages_of(rewards: Tensor, groups: Sequence[int], scale_rewards: str = "group") -> Tensor:
    """Advantages A_i = (r_i − mean of the group) / (standard deviation + 10⁻⁴), (N,) float64.

    Args:
        rewards: r (N,).
        groups: The group of each completion, N numbers.
        scale_rewards: Whose standard deviation divides: of the "group", of the "batch", or "none".

    Source: Shao et al. 2024 (2402.03300); Liu et al. 2025 (2503.20783) for "none".
    """
    rewards, index = rewards.double(), torch.tensor(groups)
    spread = rewards.std() if len(rewards) > 1 else torch.zeros(()).double()
    result = torch.empty_like(rewards)
    for group in index.unique():
        of = index == group
        some = rewards[of]
        if scale_rewards == "group":
            spread = some.std() if len(some) > 1 else torch.zeros(()).double()
        scale = 1.0 if scale_rewards == "none" else spread + _FLOOR
        result[of] = (some - some.mean()) / scale
    return result


class GRPO(Objective):
    """Group-relative policy gradients on rated completions, as one batch of TRL's GRPOTrainer.

    With the ratio ρ = exp(log π − log π_old) of a token (of the mean over the completion's tokens
    for "sequence", which is GSPO), n_i counted tokens of completion i of N, and advantages A_i from
    the rewards of its group (`advantages_of`), a token has the loss

        ℓ = −min(ρ A_i, clip(ρ, 1 − ε, 1 + ε_high) A_i) + β ρ (e^δ − δ − 1),  δ = log π_ref − log π

    | loss_type | loss of the batch |
    |---|---|
    | grpo | mean over completions of Σ_l ℓ / n_i |
    | bnpo, dapo | Σ ℓ / Σ_i n_i |
    | dr_grpo | Σ ℓ / (N · max_completion_length) |
    | luspo | mean over completions of Σ_l ℓ |
    | cispo | Σ −min(ρ, ε_high) A_i log π / Σ_i n_i, with ρ not differentiated |

    Tokens that are not counted (a tool's output) are left out by `response_mask` of an Example.
    Completions whose rewards are all equal have A = 0: they move nothing.

    Args:
        examples: The completions with their prompts, as one batch.
        rewards: Reward of each completion, N numbers.
        groups: The group of each completion, N numbers. Default: one group a prompt.
        loss_type: A name of the table.
        scale_rewards: As of `advantages_of`.
        epsilon, epsilon_high: ε and ε_high. Default of ε_high: ε; of cispo it is a bound of ρ.
        importance_sampling_level: "token" or "sequence".
        max_completion_length: Tokens that dr_grpo divides by. Default: the longest completion's.
        beta: β; TRL's default is 0.
        use_bias_correction_kl: Whether the divergence is multiplied by ρ, TRL 1.16's default.
        old: log π_old of every token, one tensor (L_i,) in nats a completion; "self": the policy
            before the step, so that ρ = 1.
        reference: log π_ref of every token, likewise; read if β > 0.

    Raises:
        ValueError: If rewards or groups are not one per completion, a reward is not finite, or an
            option is none of these.

    Source: Shao et al. 2024 (2402.03300), Yu et al. 2025 (2503.14476), Liu et al. 2025
    (2503.20783), Zheng et al. 2025 (2507.18071); TRL 1.16.

    Example:
        >>> import lddyn
        >>> right, wrong = lddyn.Example([1, 2], [3]), lddyn.Example([1, 2], [4])
        >>> grpo = lddyn.GRPO([right, wrong], rewards=[1.0, 0.0], scale_rewards="none")
        >>> grpo.weights([torch.tensor([-1.0]), torch.tensor([-2.0])])[1]
        [tensor([-0.2500]), tensor([0.2500])]
    """

    name = "grpo"

    def __init__(
        self,
        examples: Example | Sequence[Example],
        rewards: Sequence[float] | Tensor,
        groups: Sequence[int] | None = None,
        *,
        loss_type: str = "grpo",
        scale_rewards: str = "group",
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        importance_sampling_level: str = "token",
        max_completion_length: int | None = None,
        beta: float = 0.0,
        use_bias_correction_kl: bool = True,
        old: str | Sequence[Tensor] = "self",
        reference: str | Sequence[Tensor] = "self",
    ):
        given = several(examples)
        self.rewards = torch.as_tensor(rewards, dtype=torch.float64).detach().cpu().view(-1)
        self.groups = _groups_of(given) if groups is None else [int(g) for g in groups]
        for what, count in {"rewards": len(self.rewards), "groups": len(self.groups)}.items():
            if count != len(given):
                raise ValueError(f"{what} must be one per completion, got {count} for {len(given)}")
        if not bool(self.rewards.isfinite().all()):
            raise ValueError(f"rewards must be finite numbers, got {self.rewards.tolist()}")
        choices = {
            "loss_type": (loss_type, LOSS_TYPES),
            "scale_rewards": (scale_rewards, _SCALES),
            "importance_sampling_level": (importance_sampling_level, _LEVELS),
        }
        for what, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        self.loss_type, self.scale_rewards = loss_type, scale_rewards
        self.importance_sampling_level = importance_sampling_level
        self.epsilon = float(Parameter(0.2, NOT_NEGATIVE).checked("epsilon", epsilon))
        high = epsilon if epsilon_high is None else epsilon_high
        self.epsilon_high = float(Parameter(0.2, NOT_NEGATIVE).checked("epsilon_high", high))
        self.beta = float(Parameter(0.0, NOT_NEGATIVE).checked("beta", beta))
        self.use_bias_correction_kl = use_bias_correction_kl
        longest = max((len(e) for e in given), default=1)
        limit = longest if max_completion_length is None else max_completion_length
        self.max_completion_length = int(
            Parameter(1, POSITIVE).checked("max_completion_length", limit)
        )
        self._take(given, [e.name or f"completion {i}" for i, e in enumerate(given)])
        self.old = _checked("old", old, given)
        self.reference = _checked("reference", reference, given)
        self.advantages = advantages_of(self.rewards, self.groups, scale_rewards)

    def subset(self, rows: Sequence[int]) -> Self:
        """The loss of some completions as one batch; their advantages stay those of the groups."""
        part = super().subset(rows)
        part.rewards, part.advantages = self.rewards[list(rows)], self.advantages[list(rows)]
        part.groups = [self.groups[i] for i in rows]
        part.old, part.reference = (
            x if isinstance(x, str) else [x[i] for i in rows] for x in (self.old, self.reference)
        )
        return part

    def prepare(self, anatomy: Anatomy) -> Self:
        """A copy that knows log π_old and log π_ref of every token."""
        prepared = super().prepare(anatomy)
        if "self" in (self.old, self.reference):
            now = [lp.detach() for lp in token_log_probs(anatomy, self.examples)]
            prepared.old = now if isinstance(self.old, str) else self.old
            prepared.reference = now if isinstance(self.reference, str) else self.reference
        return prepared

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The loss of the batch."""
        lengths = log_probs[0].new_tensor([max(1, len(lp)) for lp in log_probs])
        sums = torch.stack([self._of_completion(i, lp).sum() for i, lp in enumerate(log_probs)])
        if self.loss_type == "grpo":
            return (sums / lengths).mean()
        if self.loss_type == "luspo":
            return sums.mean()
        if self.loss_type == "dr_grpo":
            return sums.sum() / (len(sums) * self.max_completion_length)
        return sums.sum() / lengths.sum()

    def _of_completion(self, i: int, log_probs: Tensor) -> Tensor:
        """The losses of a completion's tokens (L_i,)."""
        old = log_probs.detach() if isinstance(self.old, str) else self.old[i].to(log_probs)
        ratio = log_probs - old
        if self.importance_sampling_level == "sequence":
            ratio = ratio.mean().expand_as(ratio)
        ratio, gain = ratio.exp(), float(self.advantages[i])
        if self.loss_type == "cispo":
            value = -ratio.clamp(max=self.epsilon_high).detach() * gain * log_probs
        else:
            clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
            value = -torch.minimum(ratio * gain, clipped * gain)
        if self.beta:
            known = self.reference
            kept = log_probs.detach() if isinstance(known, str) else known[i].to(log_probs)
            away = kept - log_probs
            divergence = away.exp() - away - 1
            value = value + self.beta * (
                divergence * ratio if self.use_bias_correction_kl else divergence
            )
        return value

    def describe(self) -> dict[str, Any]:
        """Name, options, rewards, groups and advantages, JSON-safe."""
        options = (
            *("loss_type", "scale_rewards", "epsilon", "epsilon_high"),
            *("importance_sampling_level", "max_completion_length", "beta"),
            *("use_bias_correction_kl", "groups"),
        )
        return {
            "objective": self.name,
            **{name: getattr(self, name) for name in options},
            "rewards": self.rewards.tolist(),
            "advantages": self.advantages.tolist(),
        }

    def remarks(self) -> list[str]:
        """A sentence on groups whose rewards are all equal, and one on groups of one completion."""
        of: dict[int, list[float]] = {}
        for group, reward in zip(self.groups, self.rewards.tolist(), strict=True):
            of.setdefault(group, []).append(reward)
        equal = [g for g, r in of.items() if len(r) > 1 and len(set(r)) == 1]
        single = [g for g, r in of.items() if len(r) == 1]
        said = []
        if equal:
            said.append(
                f"In {len(equal)} of {len(of)} groups all rewards are equal: their advantages are "
                "0, and they move nothing."
            )
        if single:
            said.append(
                f"{len(single)} of {len(of)} groups have one completion, whose advantage is 0."
            )
        return said


def _groups_of(examples: Sequence[Example]) -> list[int]:
    """One group a prompt, numbered as they appear."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(e.prompt_ids), len(numbers)) for e in examples]


def _checked(
    name: str, given: str | Sequence[Tensor], examples: Sequence[Example]
) -> str | list[Tensor]:
    """Log-probs of every token, or "self"."""
    if isinstance(given, str):
        if given != "self":
            raise ValueError(f'{name} must be "self" or log-probs of every token, got {given!r}')
        return given
    known = [torch.as_tensor(x).detach() for x in given]
    wanted = [(len(e),) for e in examples]
    if [tuple(x.shape) for x in known] != wanted:
        raise ValueError(
            f"{name} must be one tensor a completion with a number a counted token, "
            f"{wanted[:4]}…, got {[tuple(x.shape) for x in known][:4]}"
        )
    return known
