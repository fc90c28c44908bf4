"""`Loss`: a loss of (chosen, rejected) pairs by its name, with values for its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lddyn.objectives.losses import ALIASES, COMMON, LOSSES, LossRow, Pairs, Score, Value

__all__ = ["Loss"]


@dataclass(frozen=True, init=False, repr=False)
class Loss:
    """A loss of (chosen, rejected) pairs by its name, with values for its parameters.

    A frozen value without examples: two are equal if names, weights and parameters are. Wherever
    lddyn takes the name of a loss, it takes a Loss.

    With r± = log π(y±) − log π_ref(y±), summed over tokens, in nats, h = r+ − r−, n± tokens, and
    p± = log π(y±):

    | name | loss of a pair | parameters (default) |
    |---|---|---|
    | sft | −p+/n+ | |
    | unlikelihood | +p−, gradient ascent on y− | |
    | dpo | −log σ(β h) | beta (0.1) |
    | cdpo | −(1 − ε) log σ(β h) − ε log σ(−β h) | beta (0.1), label_smoothing ε (0.1) |
    | robust | (−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2ε) | beta (0.1), label_smoothing ε \
(0.1) |
    | hinge | max(0, 1 − β h) | beta (0.1) |
    | ipo | (r+/n+ − r−/n− − 1/(2β))² | beta (0.1) |
    | sigmoid_norm | −log σ(β (r+/n+ − r−/n−)) | beta (0.1) |
    | exo_pair | KL of (σ(β h), σ(−β h)) to (1 − ε, ε) | beta (0.1), label_smoothing ε (0.001) |
    | nca_pair | −log σ(β r+) − ½ log σ(−β r+) − ½ log σ(−β r−) | beta (0.1) |
    | bco_pair | −log σ(β r+ − δ) − log σ(−β r− + δ) | beta (0.1), delta δ (0) |
    | sppo_hard | (r+ − 1/(2β))² + (r− + 1/(2β))² | beta (0.1) |
    | aot | −log σ(β d), d: sorted p+ − p− minus sorted p_ref+ − p_ref− | beta (0.1), \
label_smoothing ε (0) |
    | aot_unpaired | −log σ(β d), d: sorted r+ minus sorted r− | beta (0.1), label_smoothing ε (0) |
    | apo_zero | σ(−β r+) + σ(β r−) | beta (0.1) |
    | apo_down | σ(β r+) + σ(−β h) | beta (0.1) |
    | discopop | −(1 − m) log σ(β h) + m exp(−β h), m = σ(β h/τ) | beta (0.1), discopop_tau τ \
(0.05) |
    | kto | ½ λ σ(−β(r+ − z)) + ½ μ σ(−β(z − r−)) | beta (0.1), baseline z (0), \
desirable_weight λ (1), undesirable_weight μ (1) |
    | cpo | −log σ(β (p+ − p−)) + c sft | beta (0.1), label_smoothing ε (0), alpha α (0), \
cpo_alpha c (1) |
    | cpo_hinge | max(0, 1 − β (p+ − p−)) + c sft | beta (0.1), alpha α (0), cpo_alpha c (1) |
    | cpo_ipo | (p+/n+ − p−/n− − 1/(2β))² + c sft | beta (0.1), alpha α (0), cpo_alpha c (1) |
    | simpo | −log σ(β (p+/n+ − p−/n−) − γ) + c sft | beta (2), simpo_gamma γ (1), \
label_smoothing ε (0), alpha α (0), cpo_alpha c (0) |
    | orpo | −log π(x, y+)/n − β log σ(log odds of y+ − log odds of y−), odds of exp(p±/n±) | \
beta (0.1) |
    | slic | max(0, δ − (p+ − p−)) − β p+ | delta (1), beta (0.1) |
    | dpop | −log σ(β(h − λ max(0, −r+))) | beta (0.1), penalty λ (5) |
    | dpo+nll | −log σ(β h) − α p+/n+ | beta (0.1), alpha (1) |
    | cal-dpo | −log σ(h) + ½ (r+ − 1/(2β))² + ½ (r− + 1/(2β))² | beta (0.1) |

    Names are TRL's, and values, too: `docs/losses.md` says which versions were compared. "sigmoid"
    is TRL's name of dpo. Of a batch, sft and what contains it is the mean over all tokens of the
    batch's chosen responses; aot and aot_unpaired sort over the batch; orpo also learns the prompt,
    n tokens in all. sft, unlikelihood, slic, cpo…, simpo and orpo do not depend on the reference.

    Losses of TRL's DPOTrainer also take f_divergence_type ("reverse_kl", "forward_kl",
    "js_divergence", "alpha_divergence" with f_alpha_divergence_coef), which changes the gains r±,
    and ld_alpha, the weight of tokens beyond the length of the shorter response.

    Args:
        name: A name of the table, several (the loss is their weighted sum, and they share
            parameters), or a Loss whose parameters the new one starts from.
        loss_weights: Weights of several losses. Default: 1 each.
        **parameters: Values that differ from the defaults.

    Raises:
        ValueError: If a name, a parameter or its value is not one of the table's.

    Source: the losses' own papers; TRL for normalisation and names; weights in paper App. B,
    corrected by `lddyn lab objectives`.

    Example:
        >>> import lddyn
        >>> lddyn.Loss("cdpo", beta=0.2)
        Loss('cdpo', beta=0.2, label_smoothing=0.1)
        >>> lddyn.Loss("sigmoid") == lddyn.Loss("dpo", beta=0.1)
        True
        >>> lddyn.Loss(["sigmoid", "sft"], loss_weights=[1.0, 0.5]).name
        'dpo + 0.5 sft'
    """

    terms: tuple[tuple[str, float], ...]
    values: tuple[tuple[str, Value], ...]

    def __init__(
        self,
        name: str | Loss | Sequence[str],
        loss_weights: Sequence[float] | None = None,
        **parameters: Value,
    ):
        if isinstance(name, Loss):
            parameters = {**name.parameters, **parameters}
            loss_weights = name.loss_weights if loss_weights is None else loss_weights
            name = name.names
        names = [ALIASES.get(n, n) for n in ([name] if isinstance(name, str) else name)]
        unknown = [n for n in names if n not in LOSSES] or ([] if names else [""])
        if unknown:
            raise ValueError(f"objective must be one of {', '.join(LOSSES)}, got {unknown[0]!r}")
        weights = [1.0] * len(names) if loss_weights is None else [float(w) for w in loss_weights]
        if len(weights) != len(names):
            raise ValueError(f"loss_weights must be one per loss, {len(names)}, got {len(weights)}")
        object.__setattr__(self, "terms", tuple(zip(names, weights, strict=True)))
        object.__setattr__(self, "values", tuple(self._checked(parameters).items()))

    def _checked(self, parameters: Mapping[str, Value]) -> dict[str, Value]:
        """All parameters of the losses with their values, and the common ones that were given."""
        known = {key: p for row in self.rows for key, p in row.parameters.items()}
        common = COMMON if any(row.trl.startswith("DPO") for row in self.rows) else {}
        for key in parameters:
            if key not in known and key not in common:
                raise ValueError(f"{self.name} has the parameters {list(known)}, got {key!r}")
        values = {key: p.checked(key, parameters.get(key, p.default)) for key, p in known.items()}
        given = {
            key: p.checked(key, parameters[key]) for key, p in common.items() if key in parameters
        }
        kind = given.get("f_divergence_type", "reverse_kl")
        bent = [
            n
            for (n, _), row in zip(self.terms, self.rows, strict=True)
            if not row.divergence and n != "sft"
        ]
        if kind != "reverse_kl" and bent:
            raise ValueError(
                f"f_divergence_type={kind!r} is not defined for {bent[0]}: its gains do not appear "
                "as a difference"
            )
        if kind != "alpha_divergence":
            given.pop("f_alpha_divergence_coef", None)
        return values | {
            k: v for k, v in given.items() if v != common[k].default or k.endswith("coef")
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses that it sums, usually one."""
        return tuple(name for name, _ in self.terms)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weights of the losses that it sums."""
        return tuple(weight for _, weight in self.terms)

    @property
    def name(self) -> str:
        """The name of the loss, or a sum of names such as "dpo + 0.5 sft"."""
        return " + ".join(n if w == 1 else f"{w:g} {n}" for n, w in self.terms)

    @property
    def rows(self) -> tuple[LossRow, ...]:
        """The table's row of each loss that it sums."""
        return tuple(LOSSES[name] for name in self.names)

    @property
    def title(self) -> str:
        """The name as papers write it."""
        return " + ".join(
            row.title if w == 1 else f"{w:g} {row.title}"
            for row, (_, w) in zip(self.rows, self.terms, strict=True)
        )

    @property
    def parameters(self) -> dict[str, Value]:
        """All parameters with their values."""
        return dict(self.values)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on log π_ref."""
        return any(row.needs_reference for row in self.rows)

    @property
    def reads_prompt(self) -> bool:
        """Whether the trainer also learns the tokens of the prompt."""
        return any(row.reads_prompt for row in self.rows)

    @property
    def ld_alpha(self) -> float:
        """Weight of tokens beyond the length of the shorter response."""
        return float(self.parameters.get("ld_alpha", 1.0))

    @property
    def score(self) -> Score:
        """What the f-divergence makes of gains."""
        coefficient = float(self.parameters.get("f_alpha_divergence_coef", 0.5))
        return Score(str(self.parameters.get("f_divergence_type", "reverse_kl")), coefficient)

    def __call__(self, pairs: Pairs) -> Tensor:
        """N numbers whose mean is the loss of the N pairs as one batch."""
        parameters, parts = self.parameters, []
        for row, weight in zip(self.rows, self.loss_weights, strict=True):
            part = row.function(pairs, **{key: parameters[key] for key in row.parameters})
            parts.append(part if weight == 1 else weight * part)
        total: Tensor = sum(parts[1:], parts[0])
        return total

    def of(self, log_probs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each of N pairs, (N,); their mean is that of the pairs as one batch.

        Args:
            log_probs: log π of the responses, chosen in row 0, rejected in row 1: (2, N), nats.
            reference: log π_ref, likewise. A loss that needs none ignores it.
            lengths: Counted tokens, (2, N).
        """
        return self(Pairs.of(log_probs, reference, lengths, self.score))

    def weights(self, log_probs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """w± = N ∂L/∂log π(y±) of the N pairs as one batch, (2, N); negative raises the response.

        Where the loss of a batch is the mean of its pairs' own, as for most, w± is that of each
        pair's own loss.

        Args:
            log_probs: As for `of`; so are the others.
            reference: log π_ref, (2, N), nats.
            lengths: Counted tokens, (2, N).
        """
        with torch.enable_grad():
            leaf = log_probs.detach().clone().requires_grad_()
            return torch.autograd.grad(self.of(leaf, reference, lengths).sum(), leaf)[0]

    def to_dict(self) -> dict[str, Any]:
        """Names, weights and parameters, JSON-safe; `Loss(**…)` takes them."""
        return {
            "name": list(self.names),
            "loss_weights": list(self.loss_weights),
            **self.parameters,
        }

    def __repr__(self) -> str:
        several = len(self.terms) > 1 or self.loss_weights != (1.0,)
        parts = [repr(list(self.names) if several else self.name)]
        parts += [f"loss_weights={list(self.loss_weights)}"] if several else []
        parts += [f"{k}={v!r}" if isinstance(v, str) else f"{k}={v:g}" for k, v in self.values]
        return f"Loss({', '.join(parts)})"
