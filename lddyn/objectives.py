"""Losses on response log-probs and the cotangents they put on each token.

Every loss here is a function of the per-token log-probs log π(y_l) of its sequences, so its
gradient on the logits of token l is

    G_l = w_l (e_{y_l} − π_l),     w_l = ∂L / ∂log π(y_l)

and w comes from autograd on `loss(log_probs)`: SFT gives w = −1, DPO w = ∓β(1 − a) (paper Eq. 5
and App. B Eq. 12-15), and any other loss gives what it gives.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.data.example import Example

if TYPE_CHECKING:
    from torch import nn

LossFunction = Callable[[list[Tensor]], Tensor]
LogProbs = Callable[[Any, Sequence[Example]], list[Tensor]]


class Objective:
    """Any loss of the per-token log-probs of some examples.

    Args:
        fn: Maps [log π(y) of example 0 (L_0,), …] in nats to a scalar tensor to be minimised.
        examples: The update sequences χu, in the order in which fn receives them.
        names: One name per sequence for tables and pictures.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> mean_nll = lddyn.Objective(lambda log_probs: -log_probs[0].mean(), [ex])
        >>> mean_nll.weights([torch.tensor([-1.0, -2.0])])[1][0]
        tensor([-0.5000, -0.5000])
    """

    title = "custom loss"

    def __init__(
        self, fn: LossFunction, examples: Sequence[Example], names: Sequence[str] | None = None
    ):
        self.fn = fn
        self.examples = list(examples)
        if not self.examples:
            raise ValueError("an objective needs at least one example to update on, got none")
        self.names = list(names or [e.name or f"update {i}" for i, e in enumerate(self.examples)])
        if len(self.names) != len(self.examples):
            raise ValueError(
                f"names must be one per example, got {len(self.names)} for {len(self.examples)}"
            )

    def prepare(self, model: nn.Module, log_probs: LogProbs) -> None:
        """Computes what the loss needs of other models; called once by `decompose`."""

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The scalar loss in nats (times the loss's own units)."""
        return self.fn(log_probs)

    def weights(self, log_probs: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss and w_l = ∂L/∂log π(y_l) for every token of every sequence.

        Raises:
            TypeError: If the loss is not a tensor.
            ValueError: If it is not a scalar, not finite, or does not depend on the log-probs.
        """
        leaves = [lp.detach().clone().requires_grad_(True) for lp in log_probs]
        with torch.enable_grad():
            loss = self.loss(leaves)
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"the loss must be a scalar tensor made of the log-probs, got "
                    f"{type(loss).__name__}: keep it in torch (no .item(), no float())"
                )
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss must be a scalar, got shape {tuple(loss.shape)}: add .sum() or "
                    ".mean()"
                )
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on the log-probs it was given: nothing to update"
                )
            gradients = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
        weights = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(leaves, gradients, strict=True)
        ]
        if not bool(torch.isfinite(loss)) or not all(
            bool(torch.isfinite(w).all()) for w in weights
        ):
            raise ValueError(
                f"the loss ({float(loss.detach())}) or its gradient is not finite: check the "
                "log-probs (is a response token masked out by the model?) and the loss"
            )
        return float(loss.detach()), weights

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, for reports and saved results."""
        return {"objective": self.title}


class SFT(Objective):
    """Supervised finetuning: L = −Σ_l log π(y_l) over one or several examples (paper Eq. 4).

    Args:
        examples: One Example or several; several are one batch.
        reduction: "sum" (the paper's) or "mean" (over all response tokens, as trainers do).
    """

    title = "SFT"

    def __init__(self, examples: Example | Sequence[Example], reduction: str = "sum"):
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction
        several = [examples] if isinstance(examples, Example) else list(examples)
        super().__init__(self.loss, several)

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """Negative log-likelihood in nats."""
        total = torch.stack([lp.sum() for lp in log_probs]).sum()
        count = sum(lp.numel() for lp in log_probs) if self.reduction == "mean" else 1
        return -total / count

    def describe(self) -> dict[str, Any]:
        """Name and reduction."""
        return {"objective": self.title, "reduction": self.reduction}


class _Pairwise(Objective):
    """A chosen and a rejected response, and log π_ref of both."""

    needs_reference = True

    def __init__(self, chosen: Example, rejected: Example, reference: Any):
        pair = isinstance(reference, tuple | list)
        if pair and (len(reference) != 2 or not all(math.isfinite(float(r)) for r in reference)):
            raise ValueError(
                "reference log-probs must be two finite numbers (y+, y−) in nats, got "
                f"{reference!r}"
            )
        if isinstance(reference, str) and reference not in ("self", "adapter-off"):
            raise ValueError(
                f"reference must be a model, 'adapter-off', 'self' or a pair of log-probs, got "
                f"{reference!r}"
            )
        self.reference = reference
        self.reference_log_probs: tuple[float, float] | None = (
            (float(reference[0]), float(reference[1])) if pair else None
        )
        super().__init__(self.loss, [chosen, rejected], ["y+", "y-"])

    def prepare(self, model: nn.Module, log_probs: LogProbs) -> None:
        """Computes log π_ref of both responses, unless they were given or are not needed."""
        if isinstance(self.reference, tuple | list) or not self.needs_reference:
            return
        if self.reference == "self":
            values = log_probs(model, self.examples)
        elif self.reference == "adapter-off":
            if not hasattr(model, "disable_adapter"):
                raise ValueError(
                    "reference='adapter-off' needs a peft model with adapters, got "
                    f"{type(model).__name__}"
                )
            disable: Any = model.disable_adapter
            flags = [(p, p.requires_grad) for p in model.parameters()]
            try:
                with disable():
                    values = log_probs(model, self.examples)
            finally:  # leaving disable_adapter makes every adapter weight trainable
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
        else:
            values = log_probs(self.reference, self.examples)
        self.reference_log_probs = (float(values[0].sum()), float(values[1].sum()))

    def _reference(self) -> tuple[float, float]:
        if self.reference_log_probs is None:
            raise RuntimeError("call prepare() first: the reference log-probs are not known")
        return self.reference_log_probs


class DPO(_Pairwise):
    """Direct preference optimisation on one pair (paper App. B Eq. 12-15).

    L = −log a,  a = σ(β [log π(y+)/π_ref(y+) − log π(y−)/π_ref(y−)]), log-probs summed over tokens;
    hence G+ = β(1 − a)(π − y+) and G− = −β(1 − a)(π − y−).

    Args:
        chosen: χ+ = [x; y+].
        rejected: χ− = [x; y−].
        beta: Inverse temperature β.
        reference: What π_ref is: a model, "adapter-off" (the peft model with its adapters
            disabled), "self" (the policy before the step, as in the first step of a run), or the
            pair (log π_ref(y+), log π_ref(y−)) in nats.
        label_smoothing: ε of cDPO; 0 is DPO.

    Raises:
        ValueError: If beta is not positive or the reference is none of these.
    """

    title = "DPO"

    def __init__(
        self,
        chosen: Example,
        rejected: Example,
        beta: float = 0.1,
        reference: Any = "self",
        label_smoothing: float = 0.0,
    ):
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.beta, self.label_smoothing = beta, label_smoothing
        super().__init__(chosen, rejected, reference)

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """−log a, smoothed, in nats."""
        chosen, rejected = self._reference()
        margin = self.beta * ((log_probs[0].sum() - chosen) - (log_probs[1].sum() - rejected))
        smooth = self.label_smoothing
        log_sigmoid = torch.nn.functional.logsigmoid
        return -(1 - smooth) * log_sigmoid(margin) - smooth * log_sigmoid(-margin)

    def describe(self) -> dict[str, Any]:
        """Name, β, label smoothing and the reference log-probs in nats."""
        return {
            "objective": self.title,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "reference_log_probs": self.reference_log_probs,
        }


# ---------------------------------------------------------------------------------------------
# Other losses of a pair, as one table


@dataclass(frozen=True)
class Pair:
    """What a loss of a pair sees: sequence log-probs in nats (sums over tokens), and lengths.

    Attributes:
        chosen, rejected: log π(y+) and log π(y−): scalars, or (N,) for as many pairs.
        gain_chosen, gain_rejected: r± = log π(y±) − log π_ref(y±), likewise.
        chosen_length, rejected_length: |y+| and |y−|, tokens.
    """

    chosen: Tensor
    rejected: Tensor
    gain_chosen: Tensor
    gain_rejected: Tensor
    chosen_length: int | Tensor
    rejected_length: int | Tensor

    @property
    def margin(self) -> Tensor:
        """Gain of y+ over y−, h = r+ − r−."""
        return self.gain_chosen - self.gain_rejected


_log_sigmoid = torch.nn.functional.logsigmoid


def _sft(p: Pair) -> Tensor:
    return -p.chosen


def _unlikelihood(p: Pair) -> Tensor:
    return p.rejected


def _dpo(p: Pair, beta: float = 0.1) -> Tensor:
    return -_log_sigmoid(beta * p.margin)


def _cdpo(p: Pair, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    h = beta * p.margin
    return -(1 - label_smoothing) * _log_sigmoid(h) - label_smoothing * _log_sigmoid(-h)


def _ipo(p: Pair, beta: float = 0.1) -> Tensor:
    return (p.margin - 1 / (2 * beta)) ** 2


def _slic(p: Pair, delta: float = 1.0, beta: float = 0.1) -> Tensor:
    return torch.relu(delta - (p.chosen - p.rejected)) - beta * p.chosen


def _sppo(p: Pair, eta: float = 1.0) -> Tensor:
    return (p.gain_chosen - eta / 2) ** 2 + (p.gain_rejected + eta / 2) ** 2


def _kto(
    p: Pair,
    beta: float = 0.1,
    baseline: float = 0.0,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Tensor:
    good = torch.sigmoid(beta * (p.gain_chosen - baseline))
    bad = torch.sigmoid(beta * (baseline - p.gain_rejected))
    return desirable * (1 - good) + undesirable * (1 - bad)


def _simpo(p: Pair, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    averages = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    return -_log_sigmoid(beta * averages - gamma)


def _dpop(p: Pair, beta: float = 0.1, penalty: float = 5.0) -> Tensor:
    return -_log_sigmoid(beta * (p.margin - penalty * torch.relu(-p.gain_chosen)))


def _dpo_nll(p: Pair, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    return -_log_sigmoid(beta * p.margin) - alpha * p.chosen / p.chosen_length


def _cal_dpo(p: Pair, beta: float = 0.1) -> Tensor:
    target = 1 / (2 * beta)
    squares = (p.gain_chosen - target) ** 2 + (p.gain_rejected + target) ** 2
    return -_log_sigmoid(p.margin) + 0.5 * squares


# Name -> loss; its keyword arguments and their defaults are the objective's.
PREFERENCES: dict[str, Callable[..., Tensor]] = {
    "sft": _sft,
    "unlikelihood": _unlikelihood,
    "dpo": _dpo,
    "cdpo": _cdpo,
    "ipo": _ipo,
    "slic": _slic,
    "sppo": _sppo,
    "kto": _kto,
    "simpo": _simpo,
    "dpop": _dpop,
    "dpo+nll": _dpo_nll,
    "cal-dpo": _cal_dpo,
}
_WITHOUT_REFERENCE = ("sft", "unlikelihood", "slic", "simpo")
_NONNEGATIVE = ("delta", "desirable", "undesirable", "penalty", "alpha")


class Preference(_Pairwise):
    """A loss of `PREFERENCES` on one pair; made by `preference`."""

    def __init__(
        self,
        name: str,
        chosen: Example,
        rejected: Example,
        reference: Any,
        parameters: dict[str, float],
    ):
        self.name, self.parameters = name, parameters
        self.title = name
        self.needs_reference = name not in _WITHOUT_REFERENCE
        super().__init__(chosen, rejected, reference)

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The table's loss of the two sequences."""
        chosen, rejected = (lp.sum() for lp in log_probs)
        reference = self._reference() if self.needs_reference else (0.0, 0.0)
        pair = Pair(
            chosen,
            rejected,
            chosen - reference[0],
            rejected - reference[1],
            log_probs[0].numel(),
            log_probs[1].numel(),
        )
        return PREFERENCES[self.name](pair, **self.parameters)

    def describe(self) -> dict[str, Any]:
        """Name, hyper-parameters and the reference log-probs in nats."""
        found: dict[str, Any] = {"objective": self.title, **self.parameters}
        if self.needs_reference:
            found["reference_log_probs"] = self.reference_log_probs
        return found


def preference(
    name: str, chosen: Example, rejected: Example, *, reference: Any = "self", **parameters: float
) -> Preference:
    """An objective on one pair by its name, with r± = log π(y±) − log π_ref(y±) and h = r+ − r−.

    | name | loss | parameters |
    |---|---|---|
    | sft | −log π(y+) | |
    | unlikelihood | +log π(y−), gradient ascent on y− | |
    | dpo | −log σ(β h) | beta |
    | cdpo | −(1 − ε) log σ(β h) − ε log σ(−β h) | beta, label_smoothing ε |
    | ipo | (h − 1/(2β))² | beta |
    | slic | max(0, δ − log π(y+)/π(y−)) − β log π(y+) | delta, beta |
    | sppo | (r+ − η/2)² + (r− + η/2)² | eta |
    | kto | λ+ (1 − σ(β(r+ − z₀))) + λ− (1 − σ(β(z₀ − r−))) | beta, baseline z₀, desirable λ+, … |
    | simpo | −log σ(β(log π(y+)/|y+| − log π(y−)/|y−|) − γ) | beta, gamma |
    | dpop | −log σ(β(h − λ max(0, −r+))) | beta, penalty λ |
    | dpo+nll | −log σ(β h) − α log π(y+)/|y+| | beta, alpha |
    | cal-dpo | −log σ(h) + ½ (r+ − 1/(2β))² + ½ (r− + 1/(2β))² | beta |

    Args:
        name: One of the above.
        chosen: χ+ = [x; y+].
        rejected: χ− = [x; y−].
        reference: What π_ref is, as for `DPO`; not computed where the loss has none.
        **parameters: Hyper-parameters; the defaults are those of `PREFERENCES`.

    Returns:
        An Objective for `decompose`, `massflow`, …

    Raises:
        ValueError: If the name, a parameter or its value is not one of the loss's.

    Cost: as DPO.

    Source: the losses' own papers; residuals in paper App. B, corrected by `lddyn lab objectives`.

    Example:
        >>> import lddyn
        >>> chosen = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> rejected = lddyn.Example(prompt_ids=[1, 2], response_ids=[5])
        >>> ipo = lddyn.preference("ipo", chosen, rejected, beta=0.5, reference=(-3.0, -2.0))
        >>> loss, weights = ipo.weights([torch.tensor([-1.0, -2.0]), torch.tensor([-2.0])])
        >>> loss, weights
        (1.0, [tensor([-2., -2.]), tensor([2.])])
    """
    return Preference(name, chosen, rejected, reference, hyperparameters(name, parameters))


def hyperparameters(name: str, given: Mapping[str, float]) -> dict[str, float]:
    """All hyper-parameters of a loss of `PREFERENCES`: those given, else its defaults.

    Raises:
        ValueError: If the name, a parameter or its value is not one of the loss's.
    """
    if name not in PREFERENCES:
        raise ValueError(f"objective must be one of {', '.join(PREFERENCES)}, got {name!r}")
    known = list(inspect.signature(PREFERENCES[name]).parameters.values())[1:]
    found = {p.name: float(p.default) for p in known}
    for key, value in given.items():
        if key not in found:
            raise ValueError(f"{name} has the parameters {list(found)}, got {key!r}")
        number = float(value)
        good = math.isfinite(number)
        if key in ("beta", "eta"):
            good, wanted = good and number > 0, "positive"
        elif key in _NONNEGATIVE:
            good, wanted = good and number >= 0, "at least 0"
        elif key == "label_smoothing":
            good, wanted = 0 <= number < 0.5, "in [0, 0.5)"
        else:
            wanted = "finite"
        if not good:
            raise ValueError(f"{key} must be {wanted}, got {value}")
        found[key] = number
    return found
