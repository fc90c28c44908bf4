"""What `lddyn.diagnose` returns, and every question that it answers without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.cells import Grid
from lddyn.files import json_safe
from lddyn.objectives.loss import Loss
from lddyn.objectives.losses import Value
from lddyn.results import Result
from lddyn.sets.close_ups import CloseUp
from lddyn.sets.forecast import Forecast, least_falls, simulate
from lddyn.sets.motion import AdamMetric
from lddyn.sets.pairs import Pair, PairSet
from lddyn.sets.run import Run
from lddyn.sets.scores import SCORES, TOKENS
from lddyn.sets.step import SetStep
from lddyn.stats import spearman

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lddyn.engine.anatomy import Anatomy
    from lddyn.sets.pair_steps import PairStep

__all__ = ["Diagnosis"]


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What training on a preference set does to the model's log-probs of its own responses.

    Attributes:
        step: One small step on the whole set, to first order: weights, effects of each pair on
            each, the Gram that they are made of.
        adam: Adam's diagonal at the start; None where no run of Adam was predicted.
        forecast: What the run does, with gradients taken anew along it; None without `run`.
        close_ups: Pair -> inner products of its tokens' gradients; see `tokens`.
        validation: Comparison with real steps on some batches; None without `validate`.
        unavailable: Reason why token gradients and LBK are unavailable; empty if they are
            available.
    """

    step: SetStep
    adam: AdamMetric | None = None
    forecast: Forecast | None = None
    close_ups: Mapping[int, CloseUp] = field(default_factory=dict)
    validation: Mapping[str, Any] | None = None
    unavailable: str = ""

    # ----- the set and the loss

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.step)

    @property
    def loss(self) -> Loss:
        """The objective: a loss with its parameters."""
        return self.step.loss

    @property
    def objective(self) -> str:
        """Name of the loss."""
        return self.loss.name

    @property
    def parameters(self) -> Mapping[str, Value]:
        """Hyper-parameters of the loss."""
        return self.loss.parameters

    @property
    def pairs(self) -> PairSet:
        """The (chosen, rejected) examples, N of them, with the data's row numbers and faults."""
        return self.step.pairs

    @property
    def gram(self) -> Tensor:
        """Inner products ⟨g_i, g_j⟩ (2N, 2N) float64: all chosen first, then all rejected."""
        return self.step.gram.value

    @property
    def stderr(self) -> Tensor | None:
        """Standard errors of `gram` where it was sketched, else None."""
        return self.step.gram.stderr

    @property
    def log_probs(self) -> Tensor:
        """Log π(y+) and log π(y−), (2, N) nats."""
        return self.step.readings.log_probs

    @property
    def reference(self) -> Tensor:
        """Log π_ref(y+) and log π_ref(y−), (2, N) nats."""
        return self.step.reference

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Name -> (N,) float64; `lddyn.sets.scores.SCORES` says what each is."""
        scores = dict(self.step.scores)
        if "lbk" not in scores and self.close_ups:
            scores["lbk"] = torch.full((len(self),), math.nan, dtype=torch.float64)
            for pair, seen in self.close_ups.items():
                scores["lbk"][pair] = seen.lbk
        if self.forecast is not None:
            change = self.forecast.change
            scores |= {
                "run_chosen": change[0],
                "run_rejected": change[1],
                "run_contribution": self.forecast.contribution,
            }
        return {name: scores[name] for name in SCORES if name in scores}

    # ----- which pairs

    @property
    def outcomes(self) -> list[str]:
        """What a step on the whole set does to each pair: "up, down" is y+ up and y− down."""
        words = {True: "up", False: "down"}
        both = zip(*(change > 0 for change in self.step.change), strict=True)
        return [f"{words[bool(a)]}, {words[bool(b)]}" for a, b in both]

    def set_stderr(self) -> Tensor | None:
        """Standard errors of set_chosen and set_rejected, (2, N); None where the Gram is exact.

        Errors of different entries of the Gram are taken as independent, which simulations bear
        out.
        """
        return self.step.stderr

    @property
    def contribution(self) -> Tensor:
        """The score that ranks pairs, (N,): "run_contribution" with a run, else "contribution"."""
        return self.scores.get("run_contribution", self.scores["contribution"])

    def worst(self, count: int | None = None) -> list[int]:
        """Pairs ordered by `contribution`, the most harmful first.

        A pair's contribution is its effect on the mean log π(y+) of all pairs: in the run where one
        was predicted, else in one step on the set.
        """
        return self.contribution.argsort(stable=True)[:count].tolist()

    def culprits(self, pair: int, count: int = 5) -> list[tuple[int, float]]:
        """The pairs that lower this pair's chosen log-prob most: (pair, d log π per lr)."""
        return self.step.culprits(pair, count)

    def falling(self, count: int | None = None) -> list[int]:
        """Pairs by what a step on the set does to their chosen response, the deepest fall first."""
        return self.step.falling(count)

    @property
    def entangled(self) -> list[int]:
        """Pairs whose own step lowers their chosen response, although the loss raises it."""
        return self.step.entangled

    # ----- which tokens

    def tokens(self, pair: int) -> list[dict[str, Any]]:
        """Effects of every token of a pair in `close_ups`, y+ first: one dict a token.

        Returns:
            Rows "response" ("chosen" or "rejected"), "index" among its counted tokens, "token" (the
            id), "text", and the scores of `lddyn.sets.scores.TOKENS`; "nthr_selects" says whether
            NTHR would select it: a token of y− whose "nthr" is above the mean "nthr" of y+ (its τ
            at β = 1).

        Raises:
            ValueError: If the pair is not in `close_ups`.
        """
        own, pull = self._close_up(pair).own.double(), -self.step.weights[:, pair]
        chosen, rejected = self.pairs[pair]
        pulls = torch.cat([pull[0].expand(len(chosen)), pull[1].expand(len(rejected))])
        facts = self.step.readings.token_facts
        columns = {
            "own_chosen": pulls * own[0],
            "own_rejected": pulls * own[1],
            "contribution": pulls * own[2] / len(self),
        } | {name: of[pair] for name, of in facts.items()}
        selected = columns["nthr"] > columns["nthr"][: len(chosen)].mean()
        rows = _token_rows(self.pairs[pair])
        for k, row in enumerate(rows):
            row |= {name: float(columns[name][k]) for name in TOKENS}
            row["nthr_selects"] = row["response"] == "rejected" and bool(selected[k])
        return rows

    def culprit_tokens(self, pair: int) -> list[dict[str, Any]]:
        """Tokens of other pairs that lower the chosen response of a pair, the worst first.

        Only tokens of the (at most three) pairs that `culprits` names for it.

        Returns:
            Rows as of `tokens`, with "pair" and "effect": d log π(y+) of this pair by the token's
            part of a step on the set, per unit of lr. The effects of a pair's tokens add up to its
            number in `culprits`.

        Raises:
            ValueError: If the pair is not in `close_ups`.
        """
        rows = []
        for other, inner in self._close_up(pair).others.items():
            pull = -self.step.weights[:, other] / len(self)
            for row, x in zip(_token_rows(self.pairs[other]), inner.tolist(), strict=True):
                effect = x * float(pull[int(row["response"] == "rejected")])
                rows.append({"pair": other, **row, "effect": effect})
        return sorted(rows, key=lambda row: float(row["effect"]))

    def _close_up(self, pair: int) -> CloseUp:
        if pair not in self.close_ups:
            why = self.unavailable or "diagnose(…, close_ups=…) looks at more"
            raise ValueError(
                f"tokens are known of the pairs {list(self.close_ups)}, got {pair}: {why}"
            )
        return self.close_ups[pair]

    # ----- sequences that are not trained on

    def observed(self, count: int = 5) -> list[dict[str, Any]]:
        """What training on the pairs does to each observed sequence, and which pairs do it.

        Args:
            count: Pairs that are named for each.

        Returns:
            Rows "name", "tokens", "log_prob" (nats); "set_change", d log π by a step on the set per
            unit of lr, with its "stderr" (0 where inner products are exact); with a run
            "run_change" (nats). "lowered_by" and "raised_by" are [pair, part] of that pairs' part,
            the largest first: nats of the run, or per unit of lr without one.
        """
        from lddyn.sets.observed import observed_rows

        return observed_rows(self.step, self.forecast, count)

    # ----- other objectives, runs and weights

    def under(self, objective: str | Loss | Sequence[str], **parameters: Value) -> Diagnosis:
        """The diagnosis of the same pairs under another loss, without a forecast; needs no model.

        Gradients do not depend on the loss, so only the weights ∂L/∂ log π are computed again.

        Raises:
            ValueError: If the loss or a parameter is unknown.
        """
        step = replace(self.step, loss=Loss(objective, None, **parameters))
        return replace(self, step=step, forecast=None, validation=None)

    def simulate(
        self,
        run: Run | None = None,
        leave_out: Sequence[int] = (),
        pair_weights: Tensor | None = None,
    ) -> Forecast:
        """A whole run on these pairs, predicted with the gradients at the start; needs no model.

        The weights ∂L/∂ log π follow the predicted log-probs; the gradients stay as they are at the
        start, so the prediction becomes less reliable the more gradients change. The result is
        linear in log π; `forecast` takes gradients anew along the run. docs/diagnose.md compares
        both with real runs. After `under`, Adam's diagonal P is still that of the diagnosed loss.
        The rest of a resumed run begins with a cold optimizer here.

        Args:
            run: How it trains. Default: the run of the diagnosis.
            leave_out: Pairs that are not trained on; they are predicted nonetheless.
            pair_weights: Weight of each pair's loss (N,). Default: 1.

        Raises:
            ValueError: If there is no run, Adam was not part of the diagnosis, a pair does not
                exist, none is left, or weights are not N finite numbers.

        Cost: 8 N² a step.
        """
        run = run or (self.forecast.run if self.forecast else None)
        if run is None:
            raise ValueError("run is needed: lddyn.Run(lr=…), or diagnose(…, run=…)")
        count, gone = len(self), {int(i) for i in leave_out}
        if not all(0 <= i < count for i in gone):
            raise ValueError(f"leave_out must hold pairs from 0 to {count - 1}, got {sorted(gone)}")
        kept = [i for i in range(count) if i not in gone]
        if not kept:
            raise ValueError("leave_out must leave a pair to train on, got all of them")
        ones = torch.ones(count).double()
        weights = ones if pair_weights is None else torch.as_tensor(pair_weights).double().cpu()
        if weights.shape != (count,) or not bool(weights.isfinite().all()):
            got = tuple(weights.shape)
            raise ValueError(f"pair_weights must be {count} finite numbers, got {got}")
        adam = self._adam(run)
        step = self.step
        return simulate(self.gram, adam, self.log_probs, step.weights_at, run, kept, weights)

    def _adam(self, run: Run) -> AdamMetric | None:
        if run.optimizer != "adamw":
            return None
        if self.adam is None:
            raise ValueError(
                "Adam's diagonal is not known: diagnose(…, run=lddyn.Run(…)) with memory for "
                "all gradients, or Run(optimizer='sgd')"
            )
        return self.adam

    def pair_weights(self) -> Tensor:
        """Pair weights near 1 under which y+ are predicted to fall little.

            min Σ_j (a_j − 1)² + 100 Σ_i min(0, Σ_j a_j E_ij / max_j |E_ij|)²,  a ≥ 0,  Σ a = N

        E_ij is the effect of pair j on log π(y_i+) in the run (`forecast`), or else in one step on
        the set, as it is at a = 1. The mean is 1, so that as much is trained as before.

        Returns:
            (N,) float64, 0 for pairs that are better left out.
        """
        n = len(self)
        effects = self.step.effects[:n] if self.forecast is None else self.forecast.effects
        return least_falls(effects)

    def objectives(self) -> list[dict[str, Any]]:
        """One row per loss: what a step on the set does, and with `run` what the run does.

        This diagnosis' own objective has its own parameters, the others have their defaults.
        "extend" is the paper's remedy, SFT on both responses first, for as long as the run.

        Returns:
            Rows "objective"; "alike": losses whose step has the same direction, as those of the
            margin alone have where policy and reference are equal; parts of the pairs
            "chosen_falls" and "both_fall"; "chosen" and "rejected": mean Δ log π per unit of ‖Δθ‖,
            because losses differ in scale and a rate is tuned to each. With a run also
            "run_chosen", "run_rejected" (mean nats) and
            "run_chosen_falls" of the linear model, without the softmax. Where the reference is the
            model itself, DPOP equals DPO at the start, so it differs only in the run_* columns.
        """
        from lddyn.sets.compare import compare_objectives

        return compare_objectives(self)

    def actions(self) -> list[dict[str, Any]]:
        """What to do with each pair, the most harmful first.

        | action | when |
        |---|---|
        | fix | an audit found a fault in it, its responses are the same, or it is `entangled` |
        | drop | its weight in `pair_weights` is below 0.05 |
        | reweight | that weight is below 1/2 or above 2 |
        | keep | otherwise |

        Returns:
            Rows "pair", "action", "weight", "contribution", "why".
        """
        from lddyn.sets.actions import choose_actions

        return choose_actions(self)

    # ----- what training did

    def correlations(self, measured: Tensor, seed: int = 0) -> list[dict[str, Any]]:
        """Spearman's rank correlation of every score with a measured change of log π(y+).

        Args:
            measured: Δ log π(y+) of training, (N,) nats.
            seed: Seed of the bootstrap over pairs (2,000 times), 95 % intervals.

        Returns:
            Rows "score", "rho", "low", "high", by |rho|, falling; without scores that are not
            finite.

        Raises:
            ValueError: If `measured` is not one finite number per pair.
        """
        target = measured.double().cpu()
        if target.shape != (len(self),) or not bool(target.isfinite().all()):
            raise ValueError(
                f"measured must be {len(self)} finite numbers, one per pair, got shape "
                f"{tuple(target.shape)}, {int((~target.isfinite()).sum())} of them not finite"
            )
        rows: list[dict[str, Any]] = [
            {"score": name, **spearman(score, target, seed)}
            for name, score in self.scores.items()
            if bool(score.isfinite().all())
        ]
        return sorted(rows, key=lambda row: -abs(row["rho"]))

    # ----- words, tables, pages, files

    def summary(self) -> dict[str, Any]:
        """The few numbers that `explain` is made of, JSON-safe; nats are those of the unit step.

        The unit step moves the margins log π(y+) − log π(y−) by one nat on average.
        """
        from lddyn.sets.summary import summarise

        return summarise(self)

    def explain(self) -> str:
        """Why the chosen log-probs fall, or do not: one sentence a line, with how sure it is."""
        from lddyn.report.explain import explain_diagnosis, lines

        return "\n".join(lines(explain_diagnosis(self.summary())))

    def _grids(self) -> list[Grid]:
        numbers, run = self.pairs.row_numbers, self.forecast
        rows = []
        for i in self.worst(12):
            chosen, rejected = self.pairs.pairs[i]
            texts = ["".join(e.token_texts)[:60] for e in (chosen, rejected)]
            changes = [float(self.scores[f"set_{side}"][i]) for side in ("chosen", "rejected")]
            told = [] if run is None else [float(x[i]) for x in run.change]
            name = f"row {numbers[i]}" if numbers else f"pair {i}"
            rows.append((name, [float(self.contribution[i]), *changes, *told, *texts]))
        part = "its part in mean log π(y+), " + ("nats per lr" if run is None else "nats")
        columns = [part, "y+ by a step, nats per lr", "y−"]
        columns += [] if run is None else ["y+ by the run, nats", "y−"]
        return [Grid("Pairs that lower y+ most", [*columns, "y+ begins", "y− begins"], rows)]

    def table(self) -> list[dict[str, Any]]:
        """One dict per pair, in order: "pair", "outcome", all scores, and "row" where it is known.

        With a sketched Gram also "set_chosen_stderr" and "set_rejected_stderr".
        """
        rows: list[dict[str, Any]] = [
            {"pair": i, "outcome": outcome} | {name: float(x[i]) for name, x in self.scores.items()}
            for i, outcome in enumerate(self.outcomes)
        ]
        error = self.set_stderr()
        for i, row in enumerate(rows):
            if self.pairs.row_numbers:
                row["row"] = self.pairs.row_numbers[i]
            if error is not None:
                row["set_chosen_stderr"], row["set_rejected_stderr"] = error[:, i].tolist()
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything except the Gram, JSON-safe: `summary`, `explain`, `table`, `objectives`, ….

        "run" has the run's settings, the mean changes that are predicted ("chosen", "rejected",
        nats) and mean log π of the linear model after each step.
        """
        run = None
        if self.forecast is not None:
            path = self.forecast.path.mean(2)
            run = self.forecast.summary() | {
                "path_chosen": path[:, 0].tolist(),
                "path_rejected": path[:, 1].tolist(),
            }
        document = {
            "run": run,
            "objective": self.objective,
            "parameters": dict(self.parameters),
            "summary": self.summary(),
            "explanation": self.explain().splitlines(),
            "objectives": self.objectives(),
            "worst": self.worst(),
            "pair_weights": self.pair_weights().tolist(),
            "actions": self.actions(),
            "validation": self.validation,
            "outcomes": {name: self.outcomes.count(name) for name in sorted({*self.outcomes})},
            "pairs": self.table(),
            "tokens": [self._tokens_to_dict(pair) for pair in self.close_ups],
            "observed": self.observed(),
            "meaning": SCORES,
            "meaning_of_tokens": TOKENS,
        }
        return dict(json_safe(document))

    def _tokens_to_dict(self, pair: int) -> dict[str, Any]:
        row = {"row": self.pairs.row_numbers[pair]} if self.pairs.row_numbers else {}
        tokens, culprits = self.tokens(pair), self.culprit_tokens(pair)[:20]
        return {"pair": pair, "tokens": tokens, "culprits": culprits, **row}

    def report(
        self,
        path: str | Path,
        model: nn.Module | Anatomy | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        pair_steps: int | Sequence[PairStep] = 3,
        watched: str | Path | None = None,
        measured: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes one self-contained HTML page, and its tables as JSON beside it.

        Args:
            path: The file; diagnosis.json and its tensors (`save`) go beside it.
            model: The diagnosed one: adds token × token influence and where the probability goes,
                and tokens.json beside the page. Default: neither.
            tokenizer: Makes running text of token ids. Default: the examples' token texts.
            pair_steps: Number of the most harmful pairs whose own step is taken apart, with
                `model`; or what `lddyn.sets.pair_steps.take_apart` returned.
            watched: Folder of a watched run, for its curves.
            measured: Δ log π(y+) of the training that followed, (N,) nats, for `correlations`.
            extra: Rows of the page's last table.

        Returns:
            The path written.

        Raises:
            FileNotFoundError: If `watched` is no folder of a watched run.

        Cost: seconds; a `decompose` and a `massflow` for each pair step.

        Example:
            >>> # lddyn.diagnose(model, pairs).report("report/index.html", model, tokenizer)
        """
        from lddyn.report.dynamics import read_dynamics
        from lddyn.sets.page import write_page
        from lddyn.sets.pair_steps import take_apart

        rows = [] if watched is None else read_dynamics(watched)
        steps: Sequence[PairStep] = ()
        if not isinstance(pair_steps, int):
            steps = pair_steps
        elif model is not None and not self.unavailable:
            steps = take_apart(self, model, tokenizer, self.worst(pair_steps))
        return write_page(
            self,
            path,
            pair_steps=steps,
            dynamics=rows,
            measured=measured,
            tokenizer=tokenizer,
            extra=extra,
        )

    def save(self, path: str | Path) -> None:
        """Writes `path`.json (with `to_dict`, for people) and its tensors, in one commit."""
        from lddyn.sets.saved import write

        write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Diagnosis:
        """Reads what `save` wrote; everything except `report(model=…)` works as before.

        Raises:
            ValueError: If a file is missing, damaged, or of another kind or format.
        """
        from lddyn.sets.saved import read

        return read(path)

    def __repr__(self) -> str:
        up, down = self.step.change < 0
        gram = "exact" if self.stderr is None else "sketched"
        text = (
            f"Diagnosis({self.loss!r}: {len(self)} pairs, {gram} Gram; a small step "
            f"lowers log π(y+) of {int(up.sum())} and both responses of {int((up & down).sum())}"
        )
        run = "" if self.forecast is None else f";\n  {self.forecast!r}"
        return f"{text}{run})"


def _token_rows(pair: Pair) -> list[dict[str, Any]]:
    return [
        {"response": side, "index": k, "token": token, "text": text}
        for side, example in zip(("chosen", "rejected"), pair, strict=True)
        for k, (token, text) in enumerate(zip(example.targets, example.token_texts, strict=True))
    ]
