"""The table of losses of (chosen, rejected) pairs, one function a loss.

A function maps `Pairs`, and the loss's parameters by name, to N numbers whose mean is the loss of
the N pairs as one batch. Names, normalisation and parameters are TRL's wherever TRL has the loss;
`tests/objectives/test_trl_losses.py` compares each of them with TRL's trainers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["ALIASES", "COMMON", "LOSSES", "LossRow", "Pairs", "Parameter", "Value"]

Value: TypeAlias = float | str


@dataclass(frozen=True)
class Pairs:
    """What a loss sees of N pairs: log-probs of whole responses in nats, and lengths; (N,) each.

    Attributes:
        chosen, rejected: log π(y+) and log π(y−), sums over counted tokens.
        gain_chosen, gain_rejected: r± = log π(y±) − log π_ref(y±).
        chosen_length, rejected_length: |y+| and |y−|, counted tokens.
        score_chosen, score_rejected: f′(exp r±) of the f-divergence; r± for the usual one.
        sequence: log π of all tokens of prompt and y+ but the first; None: not known.
        sequence_length: Number of those tokens.
    """

    chosen: Tensor
    rejected: Tensor
    gain_chosen: Tensor
    gain_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    score_chosen: Tensor
    score_rejected: Tensor
    sequence: Tensor | None = None
    sequence_length: Tensor | None = None

    @classmethod
    def of(
        cls, log_probs: Tensor, reference: Tensor, lengths: Tensor, score: Score | None = None
    ) -> Pairs:
        """From (2, N) tensors: log π, log π_ref and lengths, chosen in row 0, rejected in row 1."""
        gains = log_probs - reference
        scores = gains if score is None else score(gains)
        return cls(*log_probs, *gains, *lengths, *scores)

    @property
    def margin(self) -> Tensor:
        """Gain of y+ over y−, h = r+ − r−, in nats; of scores, where a divergence is given."""
        return self.score_chosen - self.score_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean log π a token, of y+ and of y−."""
        return self.chosen / self.chosen_length, self.rejected / self.rejected_length


@dataclass(frozen=True)
class Bound:
    """Which values a parameter may have; a number must be finite besides."""

    text: str
    holds: Callable[[float], bool]


FINITE = Bound("finite", lambda value: True)
POSITIVE = Bound("positive", lambda value: value > 0)
NOT_NEGATIVE = Bound("at least 0", lambda value: value >= 0)
BELOW_HALF = Bound("in [0, 0.5)", lambda value: 0 <= value < 0.5)
WITHIN_HALF = Bound("in (0, 0.5)", lambda value: 0 < value < 0.5)
SHARE = Bound("in [0, 1]", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter of a loss: its default, and its bound or the words that it may be."""

    default: Value
    bound: Bound = POSITIVE
    words: tuple[str, ...] = ()

    def checked(self, name: str, value: Value) -> Value:
        """The value, a number as a float.

        Raises:
            ValueError: If it is out of bounds.
        """
        if self.words:
            if value not in self.words:
                raise ValueError(f"{name} must be one of {', '.join(self.words)}, got {value!r}")
            return value
        if (
            isinstance(value, str)
            or not math.isfinite(float(value))
            or not self.bound.holds(float(value))
        ):
            raise ValueError(f"{name} must be {self.bound.text}, got {value}")
        return float(value)


@dataclass(frozen=True)
class LossRow:
    """One loss of the table.

    Attributes:
        title: As papers write it.
        function: Maps Pairs, and the parameters by name, to N numbers whose mean is the loss.
        parameters: Name → default and bound.
        needs_reference: Whether the loss depends on log π_ref.
        trl: TRL's trainer and loss_type, such as "DPO sigmoid"; empty: TRL has no such loss.
        divergence: Whether TRL lets f_divergence_type change the gains of this loss.
        of_batch: Whether the loss of a batch is not the mean of its pairs' own losses.
        reads_prompt: Whether the trainer also learns the tokens of the prompt.
    """

    title: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs_reference: bool = True
    trl: str = ""
    divergence: bool = False
    of_batch: bool = False
    reads_prompt: bool = False


_log_sigmoid = torch.nn.functional.logsigmoid
_sigmoid = torch.sigmoid


def _token_mean(sums: Tensor, lengths: Tensor) -> Tensor:
    """N numbers whose mean is Σ sums / Σ lengths, the mean over all tokens of the batch."""
    return sums * (sums.numel() / lengths.sum())


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(h) − ε log σ(−h)."""
    right, wrong = -_log_sigmoid(logits), -_log_sigmoid(-logits)
    return (1 - label_smoothing) * right + label_smoothing * wrong


# ----- SFT and its opposite


def _sft(p: Pairs) -> Tensor:
    return -_token_mean(p.chosen, p.chosen_length)


def _unlikelihood(p: Pairs) -> Tensor:
    return p.rejected


# ----- losses of TRL's DPOTrainer


def _dpo(p: Pairs, beta: float) -> Tensor:
    return -_log_sigmoid(beta * p.margin)


def _cdpo(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    return _smoothed(beta * p.margin, label_smoothing)


def _robust(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    h = beta * p.margin
    clean, flipped = -_log_sigmoid(h), -_log_sigmoid(-h)
    loss = (1 - label_smoothing) * clean - label_smoothing * flipped
    return loss / (1 - 2 * label_smoothing)


def _hinge(p: Pairs, beta: float) -> Tensor:
    return torch.relu(1 - beta * p.margin)


def _ipo(p: Pairs, beta: float) -> Tensor:
    mean = p.score_chosen / p.chosen_length - p.score_rejected / p.rejected_length
    return (mean - 1 / (2 * beta)) ** 2


def _sigmoid_norm(p: Pairs, beta: float) -> Tensor:
    mean = p.score_chosen / p.chosen_length - p.score_rejected / p.rejected_length
    return -_log_sigmoid(beta * mean)


def _exo_pair(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    h = beta * p.margin
    won = _sigmoid(h) * (_log_sigmoid(h) - math.log1p(-label_smoothing))
    lost = _sigmoid(-h) * (_log_sigmoid(-h) - math.log(label_smoothing))
    return won + lost


def _nca_pair(p: Pairs, beta: float) -> Tensor:
    up, down = beta * p.gain_chosen, beta * p.gain_rejected
    return -_log_sigmoid(up) - 0.5 * _log_sigmoid(-up) - 0.5 * _log_sigmoid(-down)


def _bco_pair(p: Pairs, beta: float, delta: float) -> Tensor:
    up, down = beta * p.gain_chosen - delta, beta * p.gain_rejected - delta
    return -_log_sigmoid(up) - _log_sigmoid(-down)


def _sppo_hard(p: Pairs, beta: float) -> Tensor:
    return (p.gain_chosen - 0.5 / beta) ** 2 + (p.gain_rejected + 0.5 / beta) ** 2


def _aot(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    reference = (p.chosen - p.gain_chosen) - (p.rejected - p.gain_rejected)
    ratios = (p.chosen - p.rejected).reshape(-1).sort().values
    return _smoothed(beta * (ratios - reference.reshape(-1).sort().values), label_smoothing)


def _aot_unpaired(p: Pairs, beta: float, label_smoothing: float) -> Tensor:
    up, down = (x.reshape(-1).sort().values for x in (p.gain_chosen, p.gain_rejected))
    return _smoothed(beta * (up - down), label_smoothing)


def _apo_zero(p: Pairs, beta: float) -> Tensor:
    return _sigmoid(-beta * p.gain_chosen) + _sigmoid(beta * p.gain_rejected)


def _apo_down(p: Pairs, beta: float) -> Tensor:
    margin = p.gain_chosen - p.gain_rejected
    return _sigmoid(beta * p.gain_chosen) + _sigmoid(-beta * margin)


def _discopop(p: Pairs, beta: float, discopop_tau: float) -> Tensor:
    h = beta * p.margin
    mix = _sigmoid(h / discopop_tau)
    return -_log_sigmoid(h) * (1 - mix) + torch.exp(-h) * mix


# ----- KTO on paired rows, which TRL's KTOTrainer unpairs


def kto_desirable(gain: Tensor, beta: float, baseline: float) -> Tensor:
    """1 − σ(β (gain − baseline)), KTO's term of a desirable response with its gain in nats."""
    return _sigmoid(-beta * (gain - baseline))


def kto_undesirable(gain: Tensor, beta: float, baseline: float) -> Tensor:
    """1 − σ(β (baseline − gain)), KTO's term of an undesirable response."""
    return _sigmoid(-beta * (baseline - gain))


def _kto(
    p: Pairs, beta: float, baseline: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    good = desirable_weight * kto_desirable(p.gain_chosen, beta, baseline)
    bad = undesirable_weight * kto_undesirable(p.gain_rejected, beta, baseline)
    return (good + bad) / 2


# ----- losses without a reference: TRL's CPOTrainer and ORPOTrainer


def _rewards(p: Pairs, alpha: float, mean: bool) -> Tensor:
    """Reward of y+ minus that of y−: log π, or AlphaPO's (1 − π^−α)/α; of means, if asked."""
    pair = p.means if mean else (p.chosen, p.rejected)
    up, down = pair if not alpha else (-torch.expm1(-alpha * x) / alpha for x in pair)
    return up - down


def _with_nll(p: Pairs, loss: Tensor, cpo_alpha: float) -> Tensor:
    """The loss + cpo_alpha × the mean −log π of all tokens of chosen responses."""
    return loss + cpo_alpha * _sft(p) if cpo_alpha else loss


def _cpo(p: Pairs, beta: float, label_smoothing: float, alpha: float, cpo_alpha: float) -> Tensor:
    loss = _smoothed(beta * _rewards(p, alpha, mean=False), label_smoothing)
    return _with_nll(p, loss, cpo_alpha)


def _cpo_hinge(p: Pairs, beta: float, alpha: float, cpo_alpha: float) -> Tensor:
    return _with_nll(p, torch.relu(1 - beta * _rewards(p, alpha, mean=False)), cpo_alpha)


def _cpo_ipo(p: Pairs, beta: float, alpha: float, cpo_alpha: float) -> Tensor:
    return _with_nll(p, (_rewards(p, alpha, mean=True) - 1 / (2 * beta)) ** 2, cpo_alpha)


def _simpo(
    p: Pairs,
    beta: float,
    simpo_gamma: float,
    label_smoothing: float,
    alpha: float,
    cpo_alpha: float,
) -> Tensor:
    logits = beta * _rewards(p, alpha, mean=True) - simpo_gamma
    return _with_nll(p, _smoothed(logits, label_smoothing), cpo_alpha)


def _orpo(p: Pairs, beta: float) -> Tensor:
    # −log σ(log odds ratio) = log(A(1−B) + B(1−A)) − log A − log(1−B) with A, B = exp of the mean
    # log-probs: finite, and with a finite slope, even where y+ is certain (A = 1).
    a, b = p.means
    top = torch.maximum(a, b).detach()
    mixed = torch.exp(a - top) * -torch.expm1(b) + torch.exp(b - top) * -torch.expm1(a)
    odds = top + torch.log(mixed) - a - _log1mexp(b)
    if p.sequence is not None and p.sequence_length is not None:
        nll = -_token_mean(p.sequence, p.sequence_length)
    else:
        nll = _sft(p)
    return nll + beta * odds


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, by the form that is accurate on either side of −log 2."""
    near = x > -math.log(2)
    close = torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -1.0))))
    far = torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x)))
    return torch.where(near, close, far)


# ----- losses of papers that TRL does not have


def _slic(p: Pairs, delta: float, beta: float) -> Tensor:
    return torch.relu(delta - (p.chosen - p.rejected)) - beta * p.chosen


def _dpop(p: Pairs, beta: float, penalty: float) -> Tensor:
    return -_log_sigmoid(beta * (p.margin - penalty * torch.relu(-p.gain_chosen)))


def _dpo_nll(p: Pairs, beta: float, alpha: float) -> Tensor:
    return -_log_sigmoid(beta * p.margin) - alpha * p.chosen / p.chosen_length


def _cal_dpo(p: Pairs, beta: float) -> Tensor:
    target = 1 / (2 * beta)
    squares = (p.gain_chosen - target) ** 2 + (p.gain_rejected + target) ** 2
    return -_log_sigmoid(p.margin) + 0.5 * squares


_BETA = {"beta": Parameter(0.1)}
_SMOOTH = {"label_smoothing": Parameter(0.0, BELOW_HALF)}
_SMOOTHED = {"label_smoothing": Parameter(0.1, BELOW_HALF)}
_ALPHA = {"alpha": Parameter(0.0, FINITE)}
_KTO = {
    **_BETA,
    "baseline": Parameter(0.0, FINITE),
    "desirable_weight": Parameter(1.0, NOT_NEGATIVE),
    "undesirable_weight": Parameter(1.0, NOT_NEGATIVE),
}
_SIMPO = {
    "beta": Parameter(2.0),
    "simpo_gamma": Parameter(1.0, FINITE),
    **_SMOOTH,
    **_ALPHA,
    "cpo_alpha": Parameter(0.0, NOT_NEGATIVE),
}
_NLL = {"cpo_alpha": Parameter(1.0, NOT_NEGATIVE)}


def _row(title: str, function: Callable[..., Tensor], *parts: Mapping[str, Parameter]) -> LossRow:
    """A loss of TRL's DPOTrainer whose gains an f-divergence may change."""
    parameters = {key: value for part in parts for key, value in part.items()}
    trl = "DPO " + function.__name__.strip("_")
    return LossRow(title, function, parameters, trl=trl, divergence=True)


LOSSES: dict[str, LossRow] = {
    "sft": LossRow("SFT", _sft, needs_reference=False, trl="DPO sft", of_batch=True),
    "unlikelihood": LossRow("unlikelihood", _unlikelihood, needs_reference=False),
    "dpo": LossRow("DPO", _dpo, _BETA, trl="DPO sigmoid", divergence=True),
    "cdpo": LossRow("cDPO", _cdpo, {**_BETA, **_SMOOTHED}, divergence=True),
    "robust": _row("robust DPO", _robust, _BETA, _SMOOTHED),
    "hinge": _row("hinge", _hinge, _BETA),
    "ipo": _row("IPO", _ipo, _BETA),
    "sigmoid_norm": _row("DPO of means", _sigmoid_norm, _BETA),
    "exo_pair": _row("EXO", _exo_pair, _BETA, {"label_smoothing": Parameter(1e-3, WITHIN_HALF)}),
    "nca_pair": LossRow("NCA", _nca_pair, _BETA, trl="DPO nca_pair"),
    "bco_pair": LossRow(
        "BCO", _bco_pair, {**_BETA, "delta": Parameter(0.0, FINITE)}, trl="DPO bco_pair"
    ),
    "sppo_hard": LossRow("SPPO", _sppo_hard, _BETA, trl="DPO sppo_hard"),
    "aot": LossRow("AOT", _aot, {**_BETA, **_SMOOTH}, trl="DPO aot", of_batch=True),
    "aot_unpaired": LossRow(
        "AOT unpaired", _aot_unpaired, {**_BETA, **_SMOOTH}, trl="DPO aot_unpaired", of_batch=True
    ),
    "apo_zero": LossRow("APO-zero", _apo_zero, _BETA, trl="DPO apo_zero"),
    "apo_down": LossRow("APO-down", _apo_down, _BETA, trl="DPO apo_down"),
    "discopop": _row("DiscoPOP", _discopop, _BETA, {"discopop_tau": Parameter(0.05)}),
    "kto": LossRow("KTO", _kto, _KTO, trl="KTO kto"),
    "cpo": LossRow(
        "CPO",
        _cpo,
        {**_BETA, **_SMOOTH, **_ALPHA, **_NLL},
        needs_reference=False,
        trl="CPO sigmoid",
        of_batch=True,
    ),
    "cpo_hinge": LossRow(
        "CPO hinge", _cpo_hinge, {**_BETA, **_ALPHA, **_NLL}, False, "CPO hinge", of_batch=True
    ),
    "cpo_ipo": LossRow(
        "CPO IPO", _cpo_ipo, {**_BETA, **_ALPHA, **_NLL}, False, "CPO ipo", of_batch=True
    ),
    "simpo": LossRow("SimPO", _simpo, _SIMPO, False, "CPO simpo"),
    "orpo": LossRow(
        "ORPO",
        _orpo,
        _BETA,
        needs_reference=False,
        trl="ORPO",
        of_batch=True,
        reads_prompt=True,
    ),
    "slic": LossRow("SLiC", _slic, {"delta": Parameter(1.0, NOT_NEGATIVE), **_BETA}, False),
    "dpop": LossRow("DPOP", _dpop, {**_BETA, "penalty": Parameter(5.0, NOT_NEGATIVE)}),
    "dpo+nll": LossRow("DPO + NLL", _dpo_nll, {**_BETA, "alpha": Parameter(1.0, NOT_NEGATIVE)}),
    "cal-dpo": LossRow("Cal-DPO", _cal_dpo, _BETA),
}

# Another name → the loss of the table.
ALIASES = {"sigmoid": "dpo"}


# ---------------------------------------------------------------------------------------------
# What TRL's DPOTrainer can do to the gains of several losses

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# Parameters that losses of TRL's DPOTrainer have besides their own; left out where not given.
COMMON: dict[str, Parameter] = {
    "f_divergence_type": Parameter("reverse_kl", words=DIVERGENCES),
    "f_alpha_divergence_coef": Parameter(0.5, FINITE),
    "ld_alpha": Parameter(1.0, SHARE),
}


@dataclass(frozen=True)
class Score:
    """Maps gains log t to f′(t), the score of a divergence f (Wang et al. 2023, 2309.16240).

    Attributes:
        kind: One of `DIVERGENCES`.
        coefficient: α of "alpha_divergence".
    """

    kind: str
    coefficient: float

    def __call__(self, gains: Tensor) -> Tensor:
        """The scores."""
        if self.kind == "forward_kl":
            return 1 - torch.exp(-gains)
        if self.kind == "js_divergence":
            return math.log(2) + _log_sigmoid(gains)
        alpha = self.coefficient - 1
        if self.kind == "reverse_kl" or abs(alpha) < 1e-6:
            return gains
        return torch.expm1((alpha * gains).clamp(max=80.0)) / alpha


def discounted(log_probs: Sequence[Tensor], ld_alpha: float) -> Tensor:
    """Sums of log-probs (2 N,) with LD-DPO's weight ld_alpha on tokens beyond the shorter response.

    Args:
        log_probs: Per token, all chosen responses, then all rejected ones.
        ld_alpha: Weight of the tokens of a response beyond the length of the other one.
    """
    half = len(log_probs) // 2
    sums = []
    for i, values in enumerate(log_probs):
        shared = min(len(values), len(log_probs[(i + half) % len(log_probs)]))
        sums.append(values[:shared].sum() + ld_alpha * values[shared:].sum())
    return torch.stack(sums)
