"""Losses of a finetuning step, and the weight that each one puts on every token.

Every loss here is a function of the log-probabilities log π(y_l) of its sequences, so its gradient
on the logits of token l is

    G_l = w_l (e_{y_l} − π_l),     w_l = ∂L/∂log π(y_l)

A negative weight raises the token. Weights come from autograd: SFT has w = −1 per token, DPO has
w = ∓β(1 − a) (paper Eq. 5 and App. B Eq. 12-15).

`LOSSES` is the table of losses of a (chosen, rejected) pair; `Loss` is one row of it with values
for its parameters; `preference` and `DPO` apply one to examples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.reference_policy import Reference, check_reference, reference_log_probs

__all__ = ["DPO", "LOSSES", "SFT", "Loss", "Objective", "Pair", "Preference", "preference"]

LossFunction = Callable[[list[Tensor]], Tensor]

# ---------------------------------------------------------------------------------------------
# Objectives: a loss together with the sequences that it is a loss of


class Objective:
    """Any loss of the per-token log-probs of some examples.

    Args:
        fn: Maps [log π(y) of example 0 (L_0,), …] in nats to a scalar tensor, which a step lowers.
        examples: The update sequences χu, in the order in which fn receives them.
        names: One name per sequence, for tables and pictures.

    Raises:
        ValueError: If there is no example, or names are not one per example.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> mean_nll = lddyn.Objective(lambda log_probs: -log_probs[0].mean(), [ex])
        >>> mean_nll.weights([torch.tensor([-1.0, -2.0])])[1][0]
        tensor([-0.5000, -0.5000])
    """

    name = "custom loss"

    def __init__(
        self, fn: LossFunction, examples: Sequence[Example], names: Sequence[str] | None = None
    ):
        self.fn = fn
        self._take(examples, names)

    def _take(self, examples: Sequence[Example], names: Sequence[str] | None = None) -> None:
        """Keeps the examples and their names, and checks them."""
        self.examples = list(examples)
        if not self.examples:
            raise ValueError("an objective needs at least one example to update on, got none")
        self.names = list(names or [e.name or f"update {i}" for i, e in enumerate(self.examples)])
        if len(self.names) != len(self.examples):
            raise ValueError(
                f"names must be one per example, got {len(self.names)} for {len(self.examples)}"
            )

    def prepare(self, anatomy: Anatomy) -> Self:
        """A copy of this objective that needs no model any more; this one is not changed.

        What the loss needs of models (the reference log-probs of a preference loss) is computed
        here, at the parameters of this moment.

        Args:
            anatomy: The policy, before the step.
        """
        prepared = copy.copy(self)
        prepared.examples, prepared.names = list(self.examples), list(self.names)
        return prepared

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The scalar loss of per-token log-probs in nats, one (L_i,) tensor per example."""
        return self.fn(log_probs)

    def weights(self, log_probs: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss, and w_l = ∂L/∂log π(y_l) for every token: one (L_i,) tensor per example.

        Weights are in units of the loss per nat; a negative weight raises the token.

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
        """The objective's name and parameters, JSON-safe, for reports and saved results."""
        return {"objective": self.name}


class SFT(Objective):
    """Supervised finetuning: the negative log-likelihood of one or several responses.

        mean: L = −Σ_i Σ_l log π(y_il) / Σ_i L_i          sum: L = −Σ_i Σ_l log π(y_il)

    Args:
        examples: One Example, or a sequence of them as one batch.
        reduction: "mean" over all counted tokens of the batch, as TRL's SFTTrainer does, or "sum",
            which is the paper's Eq. 4.

    Raises:
        ValueError: If there is no example, or the reduction is neither.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> lddyn.SFT(ex).weights([torch.tensor([-1.0, -2.0])])
        (1.5, [tensor([-0.5000, -0.5000])])
    """

    name = "sft"

    def __init__(self, examples: Example | Sequence[Example], reduction: str = "mean"):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction
        self._take(_several(examples))

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """Negative log-likelihood in nats (per token for "mean")."""
        total = torch.stack([lp.sum() for lp in log_probs]).sum()
        count = sum(lp.numel() for lp in log_probs) if self.reduction == "mean" else 1
        return -total / count

    def describe(self) -> dict[str, Any]:
        """Name and reduction."""
        return {"objective": self.name, "reduction": self.reduction}


def _several(examples: Example | Sequence[Example]) -> list[Example]:
    return [examples] if isinstance(examples, Example) else list(examples)


# ---------------------------------------------------------------------------------------------
# The table of losses of a (chosen, rejected) pair


@dataclass(frozen=True)
class Pair:
    """What a loss of a pair sees: sequence log-probs in nats (sums over tokens), and lengths.

    Attributes:
        chosen, rejected: log π(y+) and log π(y−): scalars, or (N,) for N pairs.
        gain_chosen, gain_rejected: r± = log π(y±) − log π_ref(y±), likewise.
        chosen_length, rejected_length: |y+| and |y−|, counted tokens.
    """

    chosen: Tensor
    rejected: Tensor
    gain_chosen: Tensor
    gain_rejected: Tensor
    chosen_length: int | Tensor
    rejected_length: int | Tensor

    @property
    def margin(self) -> Tensor:
        """Gain of y+ over y−, h = r+ − r−, in nats."""
        return self.gain_chosen - self.gain_rejected


@dataclass(frozen=True)
class Bound:
    """Which values a parameter may have; every value must be finite besides."""

    text: str
    holds: Callable[[float], bool]


FINITE = Bound("finite", lambda value: True)
POSITIVE = Bound("positive", lambda value: value > 0)
NOT_NEGATIVE = Bound("at least 0", lambda value: value >= 0)
BELOW_HALF = Bound("in [0, 0.5)", lambda value: 0 <= value < 0.5)


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of a loss: its default and its bound."""

    default: float
    bound: Bound = POSITIVE


@dataclass(frozen=True)
class LossRow:
    """One loss of the table.

    Attributes:
        title: As papers write it.
        function: Maps a Pair, and the parameters by name, to the loss of each pair.
        parameters: Name → default and bound.
        needs_reference: Whether the loss depends on log π_ref.
    """

    title: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs_reference: bool = True


_log_sigmoid = torch.nn.functional.logsigmoid


def _sft(p: Pair) -> Tensor:
    return -p.chosen


def _unlikelihood(p: Pair) -> Tensor:
    return p.rejected


def _dpo(p: Pair, beta: float) -> Tensor:
    return -_log_sigmoid(beta * p.margin)


def _cdpo(p: Pair, beta: float, label_smoothing: float) -> Tensor:
    h = beta * p.margin
    return -(1 - label_smoothing) * _log_sigmoid(h) - label_smoothing * _log_sigmoid(-h)


def _ipo(p: Pair, beta: float) -> Tensor:
    return (p.margin - 1 / (2 * beta)) ** 2


def _slic(p: Pair, delta: float, beta: float) -> Tensor:
    return torch.relu(delta - (p.chosen - p.rejected)) - beta * p.chosen


def _sppo(p: Pair, eta: float) -> Tensor:
    return (p.gain_chosen - eta / 2) ** 2 + (p.gain_rejected + eta / 2) ** 2


def _kto(p: Pair, beta: float, baseline: float, desirable: float, undesirable: float) -> Tensor:
    good = torch.sigmoid(beta * (p.gain_chosen - baseline))
    bad = torch.sigmoid(beta * (baseline - p.gain_rejected))
    return desirable * (1 - good) + undesirable * (1 - bad)


def _simpo(p: Pair, beta: float, gamma: float) -> Tensor:
    averages = p.chosen / p.chosen_length - p.rejected / p.rejected_length
    return -_log_sigmoid(beta * averages - gamma)


def _dpop(p: Pair, beta: float, penalty: float) -> Tensor:
    return -_log_sigmoid(beta * (p.margin - penalty * torch.relu(-p.gain_chosen)))


def _dpo_nll(p: Pair, beta: float, alpha: float) -> Tensor:
    return -_log_sigmoid(beta * p.margin) - alpha * p.chosen / p.chosen_length


def _cal_dpo(p: Pair, beta: float) -> Tensor:
    target = 1 / (2 * beta)
    squares = (p.gain_chosen - target) ** 2 + (p.gain_rejected + target) ** 2
    return -_log_sigmoid(p.margin) + 0.5 * squares


_BETA = {"beta": Parameter(0.1)}
_KTO = {
    **_BETA,
    "baseline": Parameter(0.0, FINITE),
    "desirable": Parameter(1.0, NOT_NEGATIVE),
    "undesirable": Parameter(1.0, NOT_NEGATIVE),
}

LOSSES: dict[str, LossRow] = {
    "sft": LossRow("SFT", _sft, needs_reference=False),
    "unlikelihood": LossRow("unlikelihood", _unlikelihood, needs_reference=False),
    "dpo": LossRow("DPO", _dpo, _BETA),
    "cdpo": LossRow("cDPO", _cdpo, {**_BETA, "label_smoothing": Parameter(0.1, BELOW_HALF)}),
    "ipo": LossRow("IPO", _ipo, _BETA),
    "slic": LossRow("SLiC", _slic, {"delta": Parameter(1.0, NOT_NEGATIVE), **_BETA}, False),
    "sppo": LossRow("SPPO", _sppo, {"eta": Parameter(1.0)}),
    "kto": LossRow("KTO", _kto, _KTO),
    "simpo": LossRow(
        "SimPO", _simpo, {"beta": Parameter(2.0), "gamma": Parameter(1.0, FINITE)}, False
    ),
    "dpop": LossRow("DPOP", _dpop, {**_BETA, "penalty": Parameter(5.0, NOT_NEGATIVE)}),
    "dpo+nll": LossRow("DPO + NLL", _dpo_nll, {**_BETA, "alpha": Parameter(1.0, NOT_NEGATIVE)}),
    "cal-dpo": LossRow("Cal-DPO", _cal_dpo, _BETA),
}


@dataclass(frozen=True, init=False, repr=False)
class Loss:
    """A loss of a (chosen, rejected) pair by its name, with values for its parameters.

    A frozen value without examples: two are equal if name and parameters are. Wherever lddyn takes
    the name of a loss, it takes a Loss.

    With r± = log π(y±) − log π_ref(y±), summed over tokens, in nats, h = r+ − r−, and n± tokens:

    | name | loss of a pair | parameters (default) |
    |---|---|---|
    | sft | −log π(y+) | |
    | unlikelihood | +log π(y−), gradient ascent on y− | |
    | dpo | −log σ(β h) | beta (0.1) |
    | cdpo | −(1 − ε) log σ(β h) − ε log σ(−β h) | beta (0.1), label_smoothing ε (0.1) |
    | ipo | (h − 1/(2β))² | beta (0.1) |
    | slic | max(0, δ − log π(y+)/π(y−)) − β log π(y+) | delta (1), beta (0.1) |
    | sppo | (r+ − η/2)² + (r− + η/2)² | eta (1) |
    | kto | λ (1 − σ(β(r+ − z))) + μ (1 − σ(β(z − r−))) | beta (0.1), baseline z (0), \
desirable λ (1), undesirable μ (1) |
    | simpo | −log σ(β(log π(y+)/n+ − log π(y−)/n−) − γ) | beta (2), gamma (1) |
    | dpop | −log σ(β(h − λ max(0, −r+))) | beta (0.1), penalty λ (5) |
    | dpo+nll | −log σ(β h) − α log π(y+)/n+ | beta (0.1), alpha (1) |
    | cal-dpo | −log σ(h) + ½ (r+ − 1/(2β))² + ½ (r− + 1/(2β))² | beta (0.1) |

    sft, unlikelihood, slic and simpo do not depend on the reference.

    Args:
        name: A name of the table, or a Loss whose parameters the new one starts from.
        **parameters: Values that differ from the defaults.

    Raises:
        ValueError: If the name, a parameter or its value is not one of the table's.

    Source: the losses' own papers; weights in paper App. B, corrected by `lddyn lab objectives`.

    Example:
        >>> import lddyn
        >>> lddyn.Loss("cdpo", beta=0.2)
        Loss('cdpo', beta=0.2, label_smoothing=0.1)
        >>> lddyn.Loss("dpo") == lddyn.Loss("dpo", beta=0.1)
        True
    """

    name: str
    values: tuple[tuple[str, float], ...]

    def __init__(self, name: str | Loss, **parameters: float):
        if isinstance(name, Loss):
            parameters = {**name.parameters, **parameters}
            name = name.name
        if name not in LOSSES:
            raise ValueError(f"objective must be one of {', '.join(LOSSES)}, got {name!r}")
        known = LOSSES[name].parameters
        for key, value in parameters.items():
            if key not in known:
                raise ValueError(f"{name} has the parameters {list(known)}, got {key!r}")
            bound = known[key].bound
            if not (math.isfinite(value) and bound.holds(value)):
                raise ValueError(f"{key} must be {bound.text}, got {value}")
        chosen = {key: float(parameters.get(key, p.default)) for key, p in known.items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", tuple(chosen.items()))

    @property
    def row(self) -> LossRow:
        """The table's row."""
        return LOSSES[self.name]

    @property
    def parameters(self) -> dict[str, float]:
        """All parameters with their values."""
        return dict(self.values)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on log π_ref."""
        return self.row.needs_reference

    def __call__(self, pair: Pair) -> Tensor:
        """The loss of each pair, shaped like `pair.chosen`."""
        return self.row.function(pair, **self.parameters)

    def of(self, log_probs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each of N pairs, (N,), not averaged.

        Args:
            log_probs: log π of the responses, chosen in row 0, rejected in row 1: (2, N), nats.
            reference: log π_ref, likewise. A loss that needs none ignores it.
            lengths: Counted tokens, (2, N).
        """
        return self(Pair(*log_probs, *(log_probs - reference), *lengths))

    def weights(self, log_probs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """w± = ∂L/∂log π(y±) of each pair's own loss, (2, N); negative raises the response.

        Args:
            log_probs: As for `of`; so are the others.
            reference: log π_ref, (2, N), nats.
            lengths: Counted tokens, (2, N).
        """
        with torch.enable_grad():
            leaf = log_probs.detach().clone().requires_grad_()
            return torch.autograd.grad(self.of(leaf, reference, lengths).sum(), leaf)[0]

    def __repr__(self) -> str:
        return f"Loss({', '.join([repr(self.name), *(f'{k}={v:g}' for k, v in self.values)])})"


# ---------------------------------------------------------------------------------------------
# A loss of the table on examples


class Preference(Objective):
    """A `Loss` on one or several (chosen, rejected) pairs; made by `preference` and `DPO`.

    The loss is the mean over pairs, as in TRL's trainers. `examples` holds all chosen responses,
    then all rejected ones.
    """

    def __init__(
        self,
        loss: Loss,
        chosen: Example | Sequence[Example],
        rejected: Example | Sequence[Example],
        reference: Reference = "self",
    ):
        good, bad = _several(chosen), _several(rejected)
        if len(good) != len(bad):
            raise ValueError(
                f"chosen and rejected must be as many, got {len(good)} and {len(bad)}: one "
                "rejected response per chosen one"
            )
        self.pair_loss = loss
        self.name = loss.name
        self.reference = reference
        # (2, N) in nats, float64; None until prepare() has computed it.
        self.reference_log_probs = check_reference(reference, len(good))
        sides = ("y+", "y-")
        names = sides if len(good) == 1 else [f"{s} {i}" for s in sides for i in range(len(good))]
        self._take([*good, *bad], names)

    def prepare(self, anatomy: Anatomy) -> Self:
        """A copy whose reference log-probs are those of this moment."""
        prepared = super().prepare(anatomy)
        if self.pair_loss.needs_reference:
            prepared.reference_log_probs = reference_log_probs(
                self.reference, anatomy, self.examples
            )
        return prepared

    def loss(self, log_probs: list[Tensor]) -> Tensor:
        """The table's loss, averaged over pairs."""
        sums = torch.stack([lp.sum() for lp in log_probs]).view(2, -1)
        lengths = sums.new_tensor([lp.numel() for lp in log_probs]).view(2, -1)
        reference = self.reference_log_probs
        if not self.pair_loss.needs_reference:
            reference = torch.zeros_like(sums)
        elif reference is None:
            raise RuntimeError("call prepare() first: the reference log-probs are not known")
        return self.pair_loss.of(sums, reference.to(sums), lengths).mean()

    def describe(self) -> dict[str, Any]:
        """Name, parameters, and the reference log-probs (y+, y−) in nats (lists for a batch)."""
        described: dict[str, Any] = {"objective": self.name, **self.pair_loss.parameters}
        if self.pair_loss.needs_reference and self.reference_log_probs is not None:
            known = self.reference_log_probs.tolist()
            described["reference_log_probs"] = [k[0] if len(k) == 1 else k for k in known]
        return described


def preference(
    loss: str | Loss,
    chosen: Example | Sequence[Example],
    rejected: Example | Sequence[Example],
    *,
    reference: Reference = "self",
    **parameters: float,
) -> Preference:
    """An objective on one or several preference pairs: the mean of a loss of the table over them.

    Args:
        loss: A name of the table in `Loss`, or a Loss.
        chosen: χ+ = [x; y+], one Example or one per pair.
        rejected: χ− = [x; y−], likewise.
        reference: Where log π_ref comes from: a model; "self", the policy before the step, as in
            the first step of a run; "adapter-off", the peft model with its adapters disabled;
            "adapter:NAME", with the adapter of this name alone; or log-probs in nats: the pair
            (log π_ref(y+), log π_ref(y−)), numbers for one pair, (N,) each for N. Not computed
            for a loss without a reference.
        **parameters: Parameters of the loss that differ from its defaults.

    Returns:
        An Objective for `decompose`, `massflow` and the like.

    Raises:
        ValueError: If the loss, a parameter or its value is not one of the table's, the reference
            is none of these, or there are not as many rejected as chosen.

    Cost: the reference's log-probs, where they are not given, take one forward pass per response.

    Example:
        >>> import lddyn
        >>> chosen = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4])
        >>> rejected = lddyn.Example(prompt_ids=[1, 2], response_ids=[5])
        >>> ipo = lddyn.preference("ipo", chosen, rejected, beta=0.5, reference=(-3.0, -2.0))
        >>> loss, weights = ipo.weights([torch.tensor([-1.0, -2.0]), torch.tensor([-2.0])])
        >>> loss, weights
        (1.0, [tensor([-2., -2.]), tensor([2.])])
    """
    return Preference(Loss(loss, **parameters), chosen, rejected, reference)


class DPO(Preference):
    """Direct preference optimisation on one or several pairs (paper App. B Eq. 12-15).

    L = mean over pairs of −log a,  a = σ(β [log π(y+)/π_ref(y+) − log π(y−)/π_ref(y−)]), log-probs
    summed over tokens; hence w = −β(1 − a)/N on tokens of y+ and +β(1 − a)/N on those of y−. The
    same as `preference("dpo", …)`.

    Args:
        chosen: χ+ = [x; y+], one Example or one per pair.
        rejected: χ− = [x; y−], likewise.
        beta: Inverse temperature β.
        reference: Where log π_ref comes from, as for `preference`.
        label_smoothing: ε of cDPO; where it is not 0 the loss is the table's "cdpo".

    Raises:
        ValueError: If a parameter is out of bounds, the reference is none of those `preference`
            lists, or there are not as many rejected as chosen.
    """

    def __init__(
        self,
        chosen: Example | Sequence[Example],
        rejected: Example | Sequence[Example],
        beta: float = 0.1,
        reference: Reference = "self",
        label_smoothing: float = 0.0,
    ):
        loss = Loss("dpo", beta=beta)
        if label_smoothing != 0:
            loss = Loss("cdpo", beta=beta, label_smoothing=label_smoothing)
        super().__init__(loss, chosen, rejected, reference)
