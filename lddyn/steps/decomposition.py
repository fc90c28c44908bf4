"""Results of `decompose`: per observed response, and for the whole step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from lddyn.cells import Grid
from lddyn.files import json_safe
from lddyn.report.data import ResponseData, StepData
from lddyn.results import Result, load_result, save_result
from lddyn.steps.verification import Verification
from lddyn.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND, FORMAT = "lddyn.Decomposition", 1


class Questions(Protocol):
    """Answers questions about a step after it was decomposed: `lddyn.steps.session.Session`."""

    def token_effects(self, observed: Observed, index: int) -> Tensor:
        """See `Observed.token_effects`."""

    def verify(
        self, dec: Decomposition, lrs: Sequence[float] | None, dtype: torch.dtype | None
    ) -> Verification:
        """See `Decomposition.verify`."""

    def real_step(self, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
        """Log π before and after a real step, (M, V) each, for every observed response."""


class FromDisk:
    """Refuses questions that need the model, of a decomposition that was read from disk."""

    def token_effects(self, observed: Observed, index: int) -> Tensor:
        """Raises."""
        self._refuse("token_effects")

    def verify(
        self, dec: Decomposition, lrs: Sequence[float] | None, dtype: torch.dtype | None
    ) -> Verification:
        """Raises."""
        self._refuse("verify")

    def real_step(self, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
        """Raises."""
        self._refuse("real_step")

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"{name}() needs the model: this decomposition was read from disk, which has only what "
            "was saved; decompose again"
        )


@dataclass(frozen=True)
class UpdateToken:
    """One token of the update.

    Attributes:
        sequence: Name of its update sequence.
        index: Its place among the counted tokens of that sequence.
        token_id: Its id.
        text: Its text.
        weight: w_l = ∂L/∂log π(y_l); negative raises the token.
    """

    sequence: str
    index: int
    token_id: int
    text: str
    weight: float


@dataclass(repr=False)
class Observed(Result):
    """What the step did to one observed response of M tokens, by the L update tokens, in nats.

    Attributes:
        name: Name of the response.
        token_ids: Its M counted tokens.
        tokens: Their texts.
        influence: (M, L): Δ log π(y_m) caused by update token l; positive = raised.
        history: (M,): the part that the optimizer's state made.
        weight_decay: (M,): the part that weight decay made.
        error_estimate: (M,): prediction at the start minus prediction at the midpoint of the step.
        logp: (M,): log π(y_m) before the step.
        sequences: Update sequence → its columns of `influence`.
        parameters: Parameter → part of Σ_m delta_logp that went through it.
        agreement: Largest difference between the two computations, relative to the largest row.
        vocabulary_shift: (M, V): what `delta_log_probs` returns.
    """

    name: str
    token_ids: list[int]
    tokens: list[str]
    influence: Tensor
    history: Tensor
    weight_decay: Tensor
    error_estimate: Tensor
    logp: Tensor
    sequences: dict[str, slice]
    parameters: dict[str, float]
    agreement: float
    vocabulary_shift: Tensor
    _session: Questions = field(default_factory=FromDisk, compare=False)

    @property
    def delta_logp(self) -> Tensor:
        """Predicted Δ log π(y_m), (M,) nats: row sums of influence, plus history and decay."""
        return self.influence.sum(1) + self.history + self.weight_decay

    def by_sequence(self) -> dict[str, Tensor]:
        """What each update sequence did to each observed token: name → (M,) nats.

        For DPO on one pair: "y+" and "y-", the two terms of the paper's Eq. 7. "history" and
        "weight decay" are added when the optimizer has them.
        """
        parts = {name: self.influence[:, at].sum(1) for name, at in self.sequences.items()}
        if bool(self.history.any()):
            parts["history"] = self.history
        if bool(self.weight_decay.any()):
            parts["weight decay"] = self.weight_decay
        return parts

    def delta_log_probs(self) -> Tensor:
        """Δ log π(v | χo, y_<m) for every token v of the vocabulary, (M, V) nats.

        Exact to the order of the rule, from one backward pass and one push of the whole step.
        """
        return self.vocabulary_shift

    def token_effects(self, index: int) -> Tensor:
        """What update token `index` did to every token of the vocabulary at each m: (M, V) nats.

        Summed over all update tokens (plus history and decay) this is delta_log_probs().

        Raises:
            RuntimeError: If the model has changed since, or the result was read from disk.
            IndexError: If index is not a token of the update.

        Cost: a forward and a backward pass of the update, one pullback of one cotangent, and one
        push for each point of the rule.
        """
        return self._session.token_effects(self, index)

    def by_parameter(self, level: str = "parameter") -> dict[str, float]:
        """Part of Σ_m delta_logp that went through each parameter (or block): name → nats.

        Args:
            level: "parameter" or "block" ("embedding", "block 0", …, "head and final norm").

        Raises:
            ValueError: If level is neither.
        """
        if level == "parameter":
            return dict(self.parameters)
        if level != "block":
            raise ValueError(f"level must be 'parameter' or 'block', got {level!r}")
        blocks: dict[str, float] = {}
        for name, value in self.parameters.items():
            blocks[_block_of(name)] = blocks.get(_block_of(name), 0.0) + value
        return blocks

    def summary(self) -> dict[str, Any]:
        """Totals over the response's tokens, in nats, JSON-safe."""
        return dict(
            json_safe(
                {
                    "name": self.name,
                    "tokens": len(self.token_ids),
                    "logp": float(self.logp.sum()),
                    "delta_logp": float(self.delta_logp.sum()),
                    "by_sequence": {k: float(v.sum()) for k, v in self.by_sequence().items()},
                    "by_block": self.by_parameter("block"),
                    "error_estimate": float(self.error_estimate.sum()),
                    "agreement": self.agreement,
                }
            )
        )

    def explain(self) -> str:
        """One sentence: log π before and after, and what each update sequence did to it."""
        total = float(self.delta_logp.sum())
        parts = ", ".join(f"{v.sum():+.4g} from {k}" for k, v in self.by_sequence().items())
        before = float(self.logp.sum())
        return (
            f"{self.name}: log π {before:.4f} → {before + total:.4f}, {total:+.4g} nats ({parts}); "
            f"start − midpoint {float(self.error_estimate.sum()):+.1g}"
        )

    def _grids(self) -> list[Grid]:
        sums = [(visible(t), [float(v)]) for t, v in zip(self.tokens, self.delta_logp, strict=True)]
        return [Grid(f"{self.name}: Δ log π of each token, nats", ["Δ log π"], sums, heat=True)]

    def _influence_grid(self, update_tokens: Sequence[str]) -> Grid:
        """The influence table with token texts: rows are observed tokens, columns update tokens."""
        title = f"{self.name}: Δ log π of each token by each update token, nats"
        rows = zip(map(visible, self.tokens), self.influence.tolist(), strict=True)
        columns = [visible(token, longest=10) for token in update_tokens]
        return Grid(title, columns, list(rows), heat=True)

    def to_dict(self) -> ResponseData:
        """All numbers and texts, JSON-safe, but for `vocabulary_shift` (M, V)."""
        return {
            "name": self.name,
            "token_ids": list(self.token_ids),
            "tokens": list(self.tokens),
            "logp": json_safe(self.logp.tolist()),
            "delta_logp": json_safe(self.delta_logp.tolist()),
            "influence": json_safe(self.influence.tolist()),
            "by_sequence": {k: json_safe(v.tolist()) for k, v in self.by_sequence().items()},
            "by_parameter": json_safe(self.by_parameter()),
            "by_block": json_safe(self.by_parameter("block")),
            "error_estimate": json_safe(self.error_estimate.tolist()),
            "agreement": json_safe(float(self.agreement)),
        }


def _block_of(parameter: str) -> str:
    parts = parameter.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return f"block {part}" if i else parameter
    lowered = parameter.lower()
    if "emb" in lowered or "wte" in lowered or "wpe" in lowered:
        return "embedding"
    return "head and final norm"


@dataclass(repr=False)
class Decomposition(Result):
    """The result of `decompose`: one `Observed` per observed response, by index or by name.

    Attributes:
        observed: The observed responses.
        update_tokens: The L tokens of the update, in the order of the columns of `influence`.
        loss: The loss before the step.
        lr: Learning rate.
        rule: "start", "midpoint" or "simpson".
        settings: Objective, optimizer and their parameters.
    """

    observed: list[Observed]
    update_tokens: list[UpdateToken]
    loss: float
    lr: float
    rule: str
    settings: dict[str, Any]
    _session: Questions = field(default_factory=FromDisk, compare=False)

    def __getitem__(self, key: int | str) -> Observed:
        if isinstance(key, int):
            return self.observed[key]
        for item in self.observed:
            if item.name == key:
                return item
        raise KeyError(f"no observed response {key!r}; there are {[o.name for o in self.observed]}")

    def __len__(self) -> int:
        return len(self.observed)

    def __iter__(self) -> Iterator[Observed]:
        return iter(self.observed)

    def verify(
        self, lrs: Sequence[float] | None = None, dtype: torch.dtype | None = torch.float64
    ) -> Verification:
        """Takes real optimizer steps on a copy of the model and compares.

        Args:
            lrs: Learning rates. None: this step's and five halvings.
            dtype: Of the copy. float64 shows the order of the error far below float32's rounding;
                None keeps the model's own dtype.

        Raises:
            ValueError: If a learning rate is not positive.
            RuntimeError: If the model changed since, or the decomposition was read from disk.

        Cost: per learning rate one optimizer step, one forward pass per observed response and the
        pushes of the rule; one copy of the model (in `dtype`).
        """
        return self._session.verify(self, lrs, dtype)

    def real_step(
        self, dtype: torch.dtype | None = torch.float64
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Takes this very step on a copy of the model and looks at whole distributions.

        Args:
            dtype: Of the copy, as for `verify`; None keeps the model's own.

        Returns:
            Observed response → (log π before, log π after), (M, V) float64 each, in nats.

        Raises:
            RuntimeError: If the model changed since, or the decomposition was read from disk.

        Cost: one optimizer step and two forward passes per response; two copies of the model.

        Example:
            >>> # before, after = lddyn.decompose(model, ex, update, lr).real_step()["chosen"]
        """
        names = [o.name for o in self.observed]
        return dict(zip(names, self._session.real_step(dtype), strict=True))

    def summary(self) -> dict[str, Any]:
        """Settings, and per observed response its totals and strongest causes, JSON-safe."""
        observed = [
            {
                **o.summary(),
                "strongest": [
                    {"token": t.text, "sequence": t.sequence, "index": t.index, "nats": v}
                    for t, v in self.strongest(o)
                ],
            }
            for o in self.observed
        ]
        settings = json_safe(self.settings)
        return {
            **settings,
            "loss": json_safe(self.loss),
            "lr": self.lr,
            "rule": self.rule,
            "observed": json_safe(observed),
        }

    def explain(self, verification: Verification | None = None) -> str:
        r"""The step in plain words, one sentence a line.

        Args:
            verification: Its check against real steps, `verify()`, if it was made.

        Returns:
            What the step was; what happened to each response, what caused it and through which
            tokens; what that means for y+ and y−; how far the prediction can be trusted.

        Example:
            >>> # print(lddyn.decompose(model, {"chosen": good, "rejected": bad}, update).explain())
        """
        from lddyn.report.step import explain_step

        check = None if verification is None else verification.to_dict()
        return "\n".join(explain_step(self.to_dict(), check))

    def to_dict(self) -> StepData:
        """All numbers and texts, JSON-safe, but for shifts of whole vocabularies.

        Sentences, pictures and pages are made of this: `lddyn.report.explain_step(dec.to_dict())`.
        """
        sequences = self.observed[0].sequences if self.observed else {}
        return {
            "settings": json_safe(self.settings),
            "lr": self.lr,
            "loss": self.loss,
            "rule": self.rule,
            "sequences": {name: [at.start, at.stop] for name, at in sequences.items()},
            "update_tokens": [
                {
                    "sequence": t.sequence,
                    "index": t.index,
                    "token_id": t.token_id,
                    "text": t.text,
                    "weight": t.weight,
                }
                for t in self.update_tokens
            ],
            "observed": [o.to_dict() for o in self.observed],
        }

    def _grids(self) -> list[Grid]:
        texts = [token.text for token in self.update_tokens]
        responses = []
        for one in self.observed:
            by = max(self.strongest(one, 1), key=lambda t: abs(t[1]), default=None)
            cause = "" if by is None else f"{visible(by[0].text)} of {by[0].sequence}"
            numbers = [len(one.tokens), float(one.logp.sum()), float(one.delta_logp.sum())]
            responses.append((one.name, [*numbers, cause, None if by is None else by[1]]))
        columns = ["tokens", "log π", "Δ log π", "strongest update token", "its part"]
        grids = [Grid("Responses, nats", columns, responses)]
        return [*grids, *(one._influence_grid(texts) for one in self.observed[:4])]

    def strongest(self, observed: Observed, count: int = 8) -> list[tuple[UpdateToken, float]]:
        """Update tokens with the largest total effect on a response, by magnitude, in nats."""
        totals = observed.influence.sum(0)
        order = totals.abs().argsort(descending=True)[:count].tolist()
        return [(self.update_tokens[i], float(totals[i])) for i in order]

    def __repr__(self) -> str:
        lines = [
            f"Decomposition({self.settings.get('objective', 'step')} with "
            f"{self.settings.get('optimizer')}, lr {self.lr:g}, loss {self.loss:.4g}, "
            f"rule {self.rule!r})"
        ]
        lines += [f"  {o.explain()}" for o in self.observed[:8]]
        if len(self.observed) > 8:
            lines.append(f"  … and {len(self.observed) - 8} more responses")
        return "\n".join(lines)

    def plot(self, directory: str | Path | None = None) -> list[Figure]:
        """Token x token heat maps with the texts, and one line per observed response.

        Args:
            directory: Write PNG and PDF files there as well.

        Returns:
            The matplotlib figures.
        """
        from lddyn.report.figures import plot_step

        return plot_step(self.to_dict(), directory)

    def save(self, path: str | Path) -> None:
        """Writes `path`.json (names, tokens, settings) and its tensors, in one commit."""
        tensors = {
            f"{i}.{key}": getattr(o, key) for i, o in enumerate(self.observed) for key in _TENSORS
        }
        facts = {
            "loss": self.loss,
            "lr": self.lr,
            "rule": self.rule,
            "settings": self.settings,
            "update_tokens": [asdict(t) for t in self.update_tokens],
            "observed": [
                {
                    "name": o.name,
                    "token_ids": o.token_ids,
                    "tokens": o.tokens,
                    "sequences": {k: [s.start, s.stop] for k, s in o.sequences.items()},
                    "parameters": o.parameters,
                    "agreement": o.agreement,
                }
                for o in self.observed
            ],
        }
        save_result(path, KIND, FORMAT, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Reads what `save` wrote, to the bit.

        The methods that need the model (`verify`, `real_step`, `token_effects`) raise afterwards.

        Raises:
            ValueError: If a file is missing, damaged or of another format.
        """
        tensors, facts = load_result(path, KIND, FORMAT)
        try:
            observed = [
                Observed(
                    name=o["name"],
                    token_ids=o["token_ids"],
                    tokens=o["tokens"],
                    sequences={k: slice(*v) for k, v in o["sequences"].items()},
                    parameters=o["parameters"],
                    agreement=o["agreement"],
                    influence=tensors[f"{i}.influence"],
                    history=tensors[f"{i}.history"],
                    weight_decay=tensors[f"{i}.weight_decay"],
                    error_estimate=tensors[f"{i}.error_estimate"],
                    logp=tensors[f"{i}.logp"],
                    vocabulary_shift=tensors[f"{i}.vocabulary_shift"],
                )
                for i, o in enumerate(facts["observed"])
            ]
            tokens = [UpdateToken(**t) for t in facts["update_tokens"]]
            for one in observed:
                shape = (len(one.token_ids), len(tokens))
                if one.influence.shape != shape or len(one.logp) != shape[0]:
                    raise TypeError(f"influence of {one.name!r} must have the shape {shape}")
            step = (facts["loss"], facts["lr"], facts["rule"], facts["settings"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read as {KIND}: {error!r}") from error
        return cls(observed, tokens, *step)


_TENSORS = (
    "influence",
    "history",
    "weight_decay",
    "error_estimate",
    "logp",
    "vocabulary_shift",
)
