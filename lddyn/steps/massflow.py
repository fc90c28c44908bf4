"""Where probability goes in one finetuning step, predicted and measured: nothing is presumed.

At a position with prediction π and label y, a step that moves the logits by Δz moves

    Δ log π(v) = Δz_v − log Σ_u π_u e^{Δz_u},        Δπ(v) = π(v) (e^{Δ log π(v)} − 1)        (nats)

In a single softmax whose logits are the parameters, one step with coefficients c (c_y = −η on a
label that is pushed down, +η on one that is pulled up) has Δz = c − (Σc) π. This is Lemma 1 of the
paper, and says that a label v ≠ y gains from a push on y, to first order, if and only if

    π_v > τ = ‖π‖² − π_y.

In a model, Δz has other causes too, shared features and other positions, so that τ is a guess
there; `massflow` takes Δ log π from the exact decomposition of the step and from a real step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.memory import DEFAULT_MEMORY
from lddyn.objectives import Objective
from lddyn.steps.decompose import decompose
from lddyn.text import signed, visible

__all__ = ["Flow", "MassFlow", "massflow", "softmax_step", "threshold"]

# ---------------------------------------------------------------------------------------------
# One softmax


def softmax_step(logits: Tensor, coefficients: Tensor) -> Tensor:
    """Δ log π after one gradient step on logits that are the parameters: Lemma 1, exactly.

        Δz = c − (Σ_l c_l) π,        Δ log π_i = Δz_i − log Σ_j π_j e^{Δz_j}

    Args:
        logits: z, shape (..., V).
        coefficients: c, shape (..., V): η' times minus the weight of each label's log-probability
            in the loss. One label y with c_y = −|η'| is the paper's negative gradient, c_y = +|η'|
            a step of SFT; several labels are one step on all of them.

    Returns:
        Δ log π in nats, shape (..., V), float64. Of full relative precision where it is small.

    Raises:
        ValueError: If the two have different numbers of labels.

    Cost: O(V) per row.

    Source: paper App. E, Lemma 1: π'_i / π_i = 1 / Σ_j β_j π_j.

    Example:
        >>> from lddyn.steps.massflow import softmax_step
        >>> logits, push = torch.tensor([2.0, 1, 0, -1, -2]), torch.tensor([-0.5, 0, 0, 0, 0])
        >>> after = (logits.double().log_softmax(-1) + softmax_step(logits, push)).exp()
        >>> [round(float(p), 4) for p in after]
        [0.572, 0.2837, 0.0969, 0.0347, 0.0126]
    """
    if logits.shape[-1] != coefficients.shape[-1]:
        raise ValueError(
            f"coefficients must have one column per logit, {logits.shape[-1]}, got "
            f"{coefficients.shape[-1]}"
        )
    log_probs = logits.double().log_softmax(-1)
    pushed = coefficients.double()
    return renormalised(log_probs, pushed - pushed.sum(-1, keepdim=True) * log_probs.exp())


def threshold(log_probs: Tensor, labels: Tensor) -> Tensor:
    """τ = ‖π‖² − π_y: what a label's probability must exceed to gain when y is pushed down.

    Args:
        log_probs: log π, shape (..., V), in nats.
        labels: y, shape (...), int64.

    Returns:
        τ, shape (...), float64; negative where every other label gains.

    Cost: O(V) per row.

    Source: first order of Lemma 1 in the step, Δ log π_i = |η'| (π_i − [i = y] − τ).

    Example:
        >>> from lddyn.steps.massflow import threshold
        >>> round(threshold(torch.tensor([0.75, 0.25]).log(), torch.tensor(1)).item(), 4)
        0.375
    """
    probs = log_probs.double().exp()
    return (probs * probs).sum(-1) - _at(probs, labels)


def renormalised(log_probs: Tensor, shift: Tensor) -> Tensor:
    """The change of log π, (..., V) float64, when the logits move by `shift`."""
    log_probs, shift = log_probs.double(), shift.double()
    # Small moves: log1p keeps every digit. Large ones: expm1 could overflow, logsumexp cannot.
    small = torch.log1p((log_probs.exp() * torch.expm1(shift.clamp(max=1.0))).sum(-1, keepdim=True))
    large = torch.logsumexp(log_probs + shift, -1, keepdim=True)
    return shift - torch.where(shift.abs().amax(-1, keepdim=True) < 1.0, small, large)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[..., index]: one entry of every row."""
    return values.gather(-1, index[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------
# What a change of predictions did


@dataclass(frozen=True)
class Flow:
    """Where probability went: one row per prediction, float64.

    label + argmax + top + rest = 0 in every row.

    Attributes:
        leading: The most likely labels other than y before the step, (M, top), likeliest first; y*
            is column 0.
        likeliest: Whether y was as likely as y* or more before the step, (M,) bool.
        change: Δπ of every label, (M, V).
        label: Δπ of the row's own label y, (M,).
        argmax: Δπ of y*, (M,).
        top: Δπ of the next most likely ones together, up to the number asked for, (M,).
        rest: Δπ of all others together, (M,).
        gainers, losers: How many labels other than y rose and fell, (M,) int64.
        gained, lost: Δπ of these together, (M,); gained ≥ 0 ≥ lost.
        ratio: Squeeze ratio Δπ(y*) / −Δπ(y), (M,); NaN where y did not fall. Above 1, y* takes
            from other labels as well.
        entropy: Change of −Σ π log π, (M,), in nats.
    """

    leading: Tensor
    likeliest: Tensor
    change: Tensor
    label: Tensor
    argmax: Tensor
    top: Tensor
    rest: Tensor
    gainers: Tensor
    losers: Tensor
    gained: Tensor
    lost: Tensor
    ratio: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, delta: Tensor, labels: Tensor, top: int = 10) -> Flow:
        """Follows the mass of predictions whose log π changes by `delta`.

        Args:
            log_probs: log π before, shape (M, V), in nats.
            delta: Δ log π, shape (M, V); e^{log π + Δ log π} must sum to one.
            labels: y, shape (M,), int64.
            top: How many labels other than y count as the most likely, y* included.

        Returns:
            The Flow; differences are never taken of rounded probabilities.

        Cost: a few passes over (M, V) float64.

        Example:
            >>> from lddyn.steps.massflow import Flow, softmax_step
            >>> logits, label = torch.tensor([[4.0, 1, 0, 0]]), torch.tensor([3])
            >>> step = softmax_step(logits, torch.tensor([[0, 0, 0, -1.0]]))
            >>> flow = Flow.of(logits.log_softmax(-1), step, label)
            >>> bool(flow.argmax > 0), bool(flow.top < 0), bool(flow.ratio > 1)
            (True, True, True)
        """
        log_probs, delta = log_probs.double(), delta.double()
        probs = log_probs.exp()
        change = probs * torch.expm1(delta)
        entropy = -(change * log_probs + (probs + change) * delta).sum(-1)
        return cls._sorted(log_probs, delta, change, entropy, labels, top)

    @classmethod
    def first_order(cls, log_probs: Tensor, shift: Tensor, labels: Tensor, top: int = 10) -> Flow:
        """The same to first order in a move Δz of the logits: Δπ = π (Δz − ⟨π, Δz⟩).

        Linear in Δz: the flows of a step's terms add up to the flow of the step.

        Args:
            log_probs: log π before, shape (M, V), in nats.
            shift: Δz, shape (M, V).
            labels: y, shape (M,), int64.
            top: As above.

        Example:
            >>> from lddyn.steps.massflow import Flow
            >>> logits, label = torch.tensor([[4.0, 1, 0, 0]]), torch.tensor([3])
            >>> flow = Flow.first_order(logits.log_softmax(-1), -0.1 * logits, label)
            >>> round(float(flow.argmax), 4), round(float(flow.label), 4)
            (-0.0251, 0.0063)
        """
        log_probs, shift = log_probs.double(), shift.double()
        delta = shift - (log_probs.exp() * shift).sum(-1, keepdim=True)
        change = log_probs.exp() * delta
        return cls._sorted(log_probs, delta, change, -(change * log_probs).sum(-1), labels, top)

    @classmethod
    def _sorted(
        cls,
        log_probs: Tensor,
        delta: Tensor,
        change: Tensor,
        entropy: Tensor,
        labels: Tensor,
        top: int,
    ) -> Flow:
        own = torch.zeros_like(change, dtype=torch.bool).scatter_(-1, labels[:, None], True)
        order = leading(log_probs, labels, top)
        in_top = torch.zeros_like(own).scatter_(-1, order, True)
        rose, fell = (delta > 0) & ~own, (delta < 0) & ~own
        label, argmax = _at(change, labels), _at(change, order[:, 0])
        return cls(
            leading=order,
            likeliest=_at(log_probs, labels) >= _at(log_probs, order[:, 0]),
            change=change,
            label=label,
            argmax=argmax,
            top=change.gather(-1, order[:, 1:]).sum(-1),
            rest=(change * ~(own | in_top)).sum(-1),
            gainers=rose.sum(-1),
            losers=fell.sum(-1),
            gained=(change * rose).sum(-1),
            lost=(change * fell).sum(-1),
            ratio=torch.where(label < 0, argmax / -label, torch.nan),
            entropy=entropy,
        )


def leading(log_probs: Tensor, labels: Tensor, count: int) -> Tensor:
    """The most likely labels other than each row's own, (M, count), likeliest first."""
    others = log_probs.scatter(-1, labels[:, None], -torch.inf)
    return others.topk(min(count, log_probs.shape[-1] - 1), dim=-1).indices


# ---------------------------------------------------------------------------------------------
# In a model


@dataclass
class MassFlow:
    """The answer of `massflow`: predicted and measured flow at every position of a response.

    Attributes:
        name: Of the observed response.
        labels: Its tokens y_m, (M,) int64.
        tokens: Their texts.
        log_probs: log π before the step, (M, V) float64, in nats.
        threshold: τ = ‖π‖² − π(y_m), (M,): who gains in a single softmax, to first order.
        predicted: Flow of the first-order step: the logits move by the exact −η A K G.
        measured: Flow of a real step.
        settings: Of the decomposition: objective, optimizer, learning rate.
    """

    name: str
    labels: Tensor
    tokens: list[str]
    log_probs: Tensor
    threshold: Tensor
    predicted: Flow
    measured: Flow
    settings: dict[str, Any]
    text_of: Callable[[int], str] = str

    @property
    def leading(self) -> Tensor:
        """The most likely labels other than y_m, (M, top), likeliest first; y* is column 0."""
        return self.measured.leading

    @property
    def argmax(self) -> Tensor:
        """y*: the most likely label other than y_m before the step, (M,)."""
        return self.leading[:, 0]

    def strongest(self, position: int, count: int = 5, *, measured: bool = True) -> dict[str, Any]:
        """Labels that gained and lost most probability at a position.

        Returns:
            {"gainers": [{"token_id", "token", "change"}, …], "losers": […]}, strongest first; the
            label y_m of the position itself is in neither.
        """
        flow = self.measured if measured else self.predicted
        change = flow.change[position].clone()
        change[self.labels[position]] = 0.0
        found = {}
        for key, sign in (("gainers", 1), ("losers", -1)):
            values, ids = (sign * change).topk(min(count, len(change)))
            found[key] = [
                {"token_id": i, "token": self.text_of(i), "change": sign * v}
                for v, i in zip(values.tolist(), ids.tolist(), strict=True)
                if v > 0
            ]
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: what happened over all positions together.

        Masses are sums over positions. `argmax_gains_most` and `argmax_falls` are shares of
        positions at which, as measured, y* gained more than every other label, or fell.
        """
        most = self.measured.change.scatter(1, self.labels[:, None], -torch.inf).amax(1)
        result: dict[str, Any] = {
            "name": self.name,
            "positions": len(self.labels),
            **self.settings,
            "argmax_gains_most": _mean((self.measured.argmax >= most) & (self.measured.argmax > 0)),
            "argmax_falls": _mean(self.measured.argmax < 0),
        }
        for key, flow in (("predicted", self.predicted), ("measured", self.measured)):
            fell = flow.label < 0
            lost = float(-flow.label[fell].sum())
            result[key] = {
                "label": float(flow.label.sum()),
                "argmax": float(flow.argmax.sum()),
                "top": float(flow.top.sum()),
                "rest": float(flow.rest.sum()),
                "entropy": float(flow.entropy.sum()),
                "squeeze_ratio": float(flow.argmax[fell].sum()) / lost if lost > 0 else None,
                "share_of_labels_that_gain": _mean(flow.gainers / (self.log_probs.shape[1] - 1)),
            }
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything but whole distributions, for JSON: the summary and one entry per position."""
        others = self.log_probs.scatter(1, self.labels[:, None], -torch.inf)
        above = (others > self.threshold[:, None].clamp(min=0).log()).sum(1)
        entries = []
        for m, token in enumerate(self.tokens):
            star = int(self.argmax[m])
            entry: dict[str, Any] = {
                "token_id": int(self.labels[m]),
                "token": token,
                "probability": float(self.log_probs[m, self.labels[m]].exp()),
                "argmax": star,
                "argmax_token": self.text_of(star),
                "argmax_probability": float(self.log_probs[m, star].exp()),
                "top": self.leading[m].tolist(),
                "threshold": float(self.threshold[m]),
                "above_threshold": int(above[m]),
            }
            for key, flow in (("predicted", self.predicted), ("measured", self.measured)):
                ratio = float(flow.ratio[m])
                entry[key] = {
                    "label": float(flow.label[m]),
                    "argmax": float(flow.argmax[m]),
                    "top": float(flow.top[m]),
                    "rest": float(flow.rest[m]),
                    "squeeze_ratio": ratio if ratio == ratio else None,
                    "entropy": float(flow.entropy[m]),
                    "gainers": int(flow.gainers[m]),
                    "losers": int(flow.losers[m]),
                    "gained": float(flow.gained[m]),
                    "lost": float(flow.lost[m]),
                    "strongest": self.strongest(m, measured=key == "measured"),
                }
            entries.append(entry)
        return {"summary": self.summary(), "by_position": entries}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: Δπ measured (predicted), one line per position",
            f"{'y':>12} {'π(y)':>8} {'y*':>12} {'π(y*)':>8} {'τ':>8}  {'Δπ(y)':>19} "
            f"{'into y*':>19} {'next likely':>19} {'the rest':>19} {'gainers':>8} {'ΔH':>8}",
        ]
        real, first = self.measured, self.predicted
        for m, token in enumerate(self.tokens):
            star = int(self.argmax[m])
            pairs = [
                f"{signed(float(getattr(real, key)[m]))} ({signed(float(getattr(first, key)[m]))})"
                for key in ("label", "argmax", "top", "rest")
            ]
            lines.append(
                f"{visible(token, 12):>12} {float(self.log_probs[m, self.labels[m]].exp()):8.2g} "
                f"{visible(self.text_of(star), 12):>12} "
                f"{float(self.log_probs[m, star].exp()):8.2g} {float(self.threshold[m]):8.2g}  "
                + " ".join(f"{pair:>19}" for pair in pairs)
                + f" {int(real.gainers[m]):8d} {signed(float(real.entropy[m])):>8}"
            )
        return "\n".join(lines)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def massflow(
    model: nn.Module | Anatomy,
    example: Example,
    update: Objective,
    lr: float | None = None,
    *,
    optimizer: str | torch.optim.Optimizer = "sgd",
    max_grad_norm: float | None = None,
    top: int = 10,
    tokenizer: Any = None,
    dtype: torch.dtype | None = torch.float64,
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
) -> MassFlow:
    """Where the probability went at every position of `example`, predicted and measured.

        predicted: π' ∝ π e^{Δ log π},  Δ log π (M, V) the exact first order −η A K G of the step
        measured: π' of a real step on a copy of the model

    The label y_m is the example's own token: observe the response that the update pushes down and
    this is the paper's setting. That the mass goes to the most likely label y* is a result, or not.

    Args:
        model: A causal LM of transformers, with or without a LoRA adapter. Not changed.
        example: The response to observe, M tokens.
        update: SFT(...), DPO(...) or any Objective.
        lr: Learning rate η; may be left out when `optimizer` is an object with its own.
        optimizer: As for `decompose`.
        max_grad_norm: Clip the gradient's global norm first.
        top: How many labels other than y_m count as the most likely, y* included.
        tokenizer: Names tokens of the vocabulary; None: they are named by number.
        dtype: Of the copy that takes the real step; None keeps the model's own, whose rounding is
            then in the measured change.
        memory: Workspace of the decomposition.
        progress: Show progress bars.

    Returns:
        MassFlow; printing it gives a table.

    Raises:
        ValueError: If top is not positive, or as `decompose` says; its other errors too.

    Cost: that of `decompose`, one real step on a copy in `dtype`, and about 8 arrays of (M, V)
        float64.

    Source: paper §3.3 and App. E.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> good = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5], name="chosen")
        >>> bad = lddyn.Example(prompt_ids=[1, 2], response_ids=[6, 7], name="rejected")
        >>> flow = lddyn.massflow(model, bad, lddyn.DPO(good, bad), lr=1e-2)
        >>> flow.measured.change.shape, bool((flow.measured.label < 0).all())
        (torch.Size([2, 50]), True)
        >>> sorted(flow.summary()["measured"])[:3]
        ['argmax', 'entropy', 'label']
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    dec = decompose(
        model,
        example,
        update,
        lr,
        optimizer=optimizer,
        max_grad_norm=max_grad_norm,
        memory=memory,
        progress=progress,
    )
    observed = dec[0]
    before, after = dec.real_step(dtype)[observed.name]
    labels = torch.tensor(observed.token_ids, device=before.device)
    first_order = renormalised(before, observed.delta_log_probs())
    return MassFlow(
        name=observed.name,
        labels=labels,
        tokens=observed.tokens,
        log_probs=before,
        threshold=threshold(before, labels),
        predicted=Flow.of(before, first_order, labels, top),
        measured=Flow.of(before, after - before, labels, top),
        settings={"lr": dec.lr, **dec.settings},
        text_of=str
        if tokenizer is None
        else lambda token: str(tokenizer.convert_ids_to_tokens([token])[0]),
    )
