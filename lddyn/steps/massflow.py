"""Where the probability went in one finetuning step of a model, predicted and measured.

`massflow` takes Δ log π of the whole vocabulary from the exact decomposition of the step, and from
a real step on a copy; `lddyn.steps.flow` turns both into the flow of probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.cells import Grid
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import undisturbed
from lddyn.files import json_safe
from lddyn.memory import DEFAULT_MEMORY
from lddyn.objectives.like import Update
from lddyn.results import Result, load_result, save_result
from lddyn.settings import Like
from lddyn.steps.decompose import decompose
from lddyn.steps.flow import Flow, renormalised, threshold
from lddyn.text import signed, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MassFlow", "massflow"]

KIND, FORMAT = "lddyn.MassFlow", 1
_FLOWS = ("predicted", "measured")


@dataclass(repr=False)
class MassFlow(Result):
    """The result of `massflow`: predicted and measured flow at every position of a response.

    Attributes:
        name: Name of the observed response.
        labels: Its tokens y_m, (M,) int64.
        tokens: Their texts.
        log_probs: log π before the step, (M, V) float64, in nats.
        threshold: τ = ‖π‖² − π(y_m), (M,): in a single softmax, labels above it gain, to first
            order.
        predicted: Flow of the first-order step: the logits move by the exact −η A K G.
        measured: Flow of a real step.
        settings: Objective, optimizer and learning rate of the step.
        text_of: Maps a token id to its text.
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

        Args:
            position: m.
            count: How many of each.
            measured: Whether in the real step; False: in the prediction.

        Returns:
            {"gainers": [{"token_id", "token", "change"}, …], "losers": […]}, strongest first; the
            label y_m of the position itself is in neither.
        """
        flow = self.measured if measured else self.predicted
        change = flow.change[position].clone()
        change[self.labels[position]] = 0.0
        strongest = {}
        for key, sign in (("gainers", 1), ("losers", -1)):
            values, ids = (sign * change).topk(min(count, len(change)))
            strongest[key] = [
                {"token_id": i, "token": self.text_of(i), "change": sign * v}
                for v, i in zip(values.tolist(), ids.tolist(), strict=True)
                if v > 0
            ]
        return strongest

    def summary(self) -> dict[str, Any]:
        """What happened over all positions together, JSON-safe.

        Masses are sums over positions. `argmax_gains_most` and `argmax_falls` are the fractions of
        positions at which, as measured, y* gained more than every other label, or fell.
        """
        most = self.measured.change.scatter(1, self.labels[:, None], -torch.inf).amax(1)
        result: dict[str, Any] = {
            "name": self.name,
            "positions": len(self.labels),
            **json_safe(self.settings),
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

    def _grids(self) -> list[Grid]:
        columns = ["y* (likeliest other)", "y", "y*", "other top", "rest", "y, predicted"]
        real, told, rows = self.measured, self.predicted, []
        for m, token in enumerate(self.tokens):
            moved = [float(x[m]) for x in (real.label, real.argmax, real.top, real.rest)]
            star = visible(self.text_of(int(self.argmax[m])))
            rows.append((visible(token), [star, *moved, float(told.label[m])]))
        return [Grid(f"{self.name}: change of probability in a real step", columns, rows)]

    def _caption(self) -> str:
        return repr(self)

    def to_dict(self) -> dict[str, Any]:
        """The summary and one entry per position, JSON-safe; without whole distributions."""
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

    def explain(self) -> str:
        """A table with one line per position: Δπ measured, and in brackets predicted."""
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

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"MassFlow({self.name!r}, {len(self.labels)} positions, "
            f"{settings.get('objective', 'step')} with {settings.get('optimizer')}, "
            f"lr {settings.get('lr')})\n  predicted: {self.predicted!r}\n"
            f"  measured:  {self.measured!r}"
        )

    def save(self, path: str | Path) -> None:
        """Writes `path`.json and its tensors, whole distributions included, in one commit.

        The texts of the tokens that `to_dict` names are kept; others are numbers afterwards.
        """
        tensors = {"labels": self.labels, "log_probs": self.log_probs, "threshold": self.threshold}
        for key in _FLOWS:
            flow = getattr(self, key)
            tensors |= {f"{key}.{f.name}": getattr(flow, f.name) for f in fields(Flow)}
        facts = {
            "name": self.name,
            "tokens": self.tokens,
            "settings": self.settings,
            "texts": {token: self.text_of(token) for token in sorted(self._named_tokens())},
        }
        save_result(path, KIND, FORMAT, tensors, facts)

    def _named_tokens(self) -> set[int]:
        """Ids of all tokens that a text of this result names."""
        ids = {*self.labels.tolist(), *self.leading.flatten().tolist()}
        for m in range(len(self.labels)):
            for measured in (True, False):
                for entries in self.strongest(m, measured=measured).values():
                    ids |= {entry["token_id"] for entry in entries}
        return ids

    @classmethod
    def load(cls, path: str | Path) -> MassFlow:
        """Reads what `save` wrote, to the bit.

        Raises:
            ValueError: If a file is missing, damaged or of another format.
        """
        tensors, facts = load_result(path, KIND, FORMAT)
        try:
            predicted, measured = (
                Flow(**{f.name: tensors[f"{key}.{f.name}"] for f in fields(Flow)}) for key in _FLOWS
            )
            texts: dict[str, str] = facts["texts"]
            return cls(
                name=facts["name"],
                labels=tensors["labels"],
                tokens=facts["tokens"],
                log_probs=tensors["log_probs"],
                threshold=tensors["threshold"],
                predicted=predicted,
                measured=measured,
                settings=facts["settings"],
                text_of=lambda token: texts.get(str(token), str(token)),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read as {KIND}: {error!r}") from error


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


@undisturbed
def massflow(
    model: nn.Module | Anatomy,
    example: Example,
    update: Update,
    lr: float | None = None,
    *,
    like: Like = None,
    optimizer: str | torch.optim.Optimizer | None = None,
    max_grad_norm: float | None = None,
    top: int = 10,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = torch.float64,
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
) -> MassFlow:
    """Where the probability went at every position of `example`, predicted and measured.

        predicted: π' ∝ π e^{Δ log π},  Δ log π (M, V) the exact first order −η A K G of the step
        measured: π' of a real step on a copy of the model

    The label y_m is the example's own token. With the response that the update pushes down this is
    the paper's setting: whether the mass goes to the most likely label y* is then measured.

    Args:
        model: A causal LM of transformers, with or without a LoRA adapter, or its Anatomy. Not
            changed.
        example: The response to observe, M tokens.
        update: SFT(...), DPO(...) or any Objective.
        lr: Learning rate η; may be left out when `optimizer` is an object with its own.
        like: How a run trains, as for `decompose`.
        optimizer: As for `decompose`.
        max_grad_norm: Clip the gradient's global norm first.
        top: How many labels other than y_m count as the most likely, y* included.
        tokenizer: Names tokens of the vocabulary; None: they are named by number.
        dtype: Of the copy that takes the real step; None keeps the model's own, whose rounding is
            then in the measured change.
        memory: Workspace of the decomposition.
        progress: Show progress bars.

    Returns:
        MassFlow, which prints as a table.

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
        like=like,
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
        text_of=str if tokenizer is None else _names(tokenizer),
    )


def _names(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """Maps a token id to the tokenizer's own spelling of it, or to <id> where it has none."""

    def name(token: int) -> str:
        text = tokenizer.convert_ids_to_tokens([token])[0]
        return f"<{token}>" if text is None else str(text)

    return name
