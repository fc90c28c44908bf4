"""What `lddyn.diagnose` finds, and every question that needs the model no more.

To first order a step of rate lr on pair j moves log π of sequence i by

    lr (w_j+ ⟨g_i, g_j+⟩ + w_j− ⟨g_i, g_j−⟩),     g = ∇θ log π(y | x),  w± = −∂L/∂ log π(y±)

so three scalars a pair, ‖g+‖², ‖g−‖² and ⟨g+, g−⟩, say what it does to itself (Yuan et al., 2024,
"gradient entanglement"), and the Gram of all sequences' gradients says what pairs do to each other.
The objective enters through w alone: all of `LOSSES` are compared without training any.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.files import replace_file
from lddyn.objectives import LOSSES, Loss
from lddyn.sets.forecast import Forecast, Run, projected, simulate
from lddyn.stats import spearman

__all__ = ["SCORES", "Diagnosis", "assemble"]

Pairs = Sequence[tuple[Example, Example]]

# What a score means; the sign of those that foretell the chosen log-prob: + if more is better.
SCORES = {
    "set_chosen": "d log π(y+) by a step on the whole set, per unit of lr",
    "own_chosen": "d log π(y+) by a step on this pair alone",
    "set_rejected": "d log π(y−) by a step on the whole set",
    "own_rejected": "d log π(y−) by a step on this pair alone",
    "gives": "mean d log π(y+) of all pairs by this pair's share of a step on the set",
    "run_chosen": "Δ log π(y+) that a run is foretold to make, nats (with run=…)",
    "run_rejected": "Δ log π(y−) likewise",
    "run_linear": "run_chosen of a model that is linear in log π, without the softmax",
    "run_gives": "this pair's part in the mean Δ log π(y+) of all pairs by it, nats",
    "norm_chosen": "‖g+‖²",
    "norm_rejected": "‖g−‖²",
    "inner": "⟨g+, g−⟩",
    "entanglement": "⟨g+, g−⟩ / ‖g+‖²: above 1, DPO's step on this pair lowers its y+",
    "lbk": "the paper's LBK between y− and y+: ‖Δ log π‖² / ‖A‖²‖G‖² of a step on y−",
    "head_inner": "the head's part of ⟨g+, g−⟩, from one forward pass (NTHR, summed)",
    "ches": "⟨S+, S−⟩ − ‖S+‖², S the sum of last hidden states (Razin et al., 2025)",
    "ches_per_token": "⟨S+, S−⟩/(|y+||y−|) − ‖S+‖²/|y+|²",
    "edit_distance": "of the tokens, over the longer length",
    "similarity": "cosine of the mean last hidden states of y+ and y−",
    "log_prob_chosen": "log π(y+), nats",
    "log_prob_rejected": "log π(y−), nats",
    "valley": "mean log π of the tokens of y−: the lower, the deeper in a valley (paper §3.3)",
    "tau": "mean ‖π‖² − π_y over y−: only tokens likelier than this gain when y− is pushed down",
    "squeeze": "of the mass that pushing y− down frees in a softmax, the share one token takes",
    "margin": "log-ratio of y+ minus that of y−, nats",
    "weight_chosen": "w+ = −∂L/∂ log π(y+)",
    "weight_rejected": "w− = −∂L/∂ log π(y−)",
}

# What is said of a token; those of a pair add up to its score of the same name.
TOKENS = {
    "own_chosen": "d log π(y+) by this token's part of a step on its pair alone, per unit of lr",
    "own_rejected": "d log π(y−) by it",
    "gives": "mean d log π(y+) of all pairs by this token's part of a step on the set",
    "nthr": "Σ_k ⟨e − π, e_k − π_k⟩⟨h, h_k⟩ over tokens k of y+ (Deng et al., 2025); over y−, the "
    "sum is head_inner",
    "ches": "its part of CHES: ⟨S+, h⟩ of a token of y−, −⟨S+, h⟩ of one of y+",
    "log_prob": "log π of the token, nats",
}


@dataclass(frozen=True)
class Touched:
    """Inner products of the gradients of a pair's tokens with directions, exact.

    Attributes:
        own: (3, M + K) ⟨∇ log π(token), d⟩ of the M tokens of y+, then the K of y−, with d = g+, g−
            and the mean g+ of all pairs.
        others: Another pair -> (its M' + K',) ⟨∇ log π(its token), g+⟩.
    """

    own: Tensor
    others: Mapping[int, Tensor]


@dataclass(frozen=True)
class Diagnosis:
    """What a preference set does to a model's belief in its own responses, to first order.

    Attributes:
        objective: Name of the loss; `parameters` are its hyper-parameters.
        parameters: Of the loss.
        pairs: The (chosen, rejected) examples, N of them.
        scores: Name -> (N,) float64; `SCORES` says what each is.
        gram: ⟨g_i, g_j⟩ (2N, 2N): all chosen, then all rejected.
        stderr: Its standard errors where it was sketched, else None.
        log_probs: (2, N) nats; `reference` those of the reference.
        reference: (2, N) nats.
        adam: J P Jᵀ, laid out as `gram`, with the diagonal P of Adam at the start, and Σ v; None
            without a run of it.
        foretold: What the run does, through the softmax; None without `run`.
        validated: What real steps on some batches did beside what was foretold; see `diagnose`.
        marks: Name -> for every pair what is said of each of its tokens by one forward pass.
        touched: Named pair -> inner products of its tokens' gradients; see `tokens`.
        unopened: Why there are none and no LBK, "" if there are.
    """

    objective: str
    parameters: Mapping[str, float]
    pairs: Pairs
    scores: Mapping[str, Tensor]
    gram: Tensor
    stderr: Tensor | None
    log_probs: Tensor
    reference: Tensor
    marks: Mapping[str, Sequence[Tensor]]
    touched: Mapping[int, Touched]
    unopened: str = ""
    adam: tuple[Tensor, float] | None = None
    foretold: Forecast | None = None
    validated: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def fate(self) -> list[str]:
        """What a step on the whole set does to each pair: chosen first, then rejected."""
        words = {True: "up", False: "down"}
        both = zip(self.scores["set_chosen"] > 0, self.scores["set_rejected"] > 0, strict=True)
        return [f"{words[bool(a)]}, {words[bool(b)]}" for a, b in both]

    def set_stderr(self) -> Tensor | None:
        """Standard errors of set_chosen and set_rejected, (2, N); None where the Gram is exact.

        Entries of the Gram are taken as independent, which simulations bear out.
        """
        if self.stderr is None:
            return None
        variance = _effects(self.stderr**2, self._weights() ** 2).sum(1)
        return variance.sqrt().view(2, -1) / len(self)

    def worst(self, count: int | None = None) -> list[int]:
        """Pairs by what they give to all chosen responses, the most harmful first.

        In the run, where one was foretold ("run_gives"); else in one step on the set ("gives").
        """
        return self.gives.argsort(stable=True)[:count].tolist()

    @property
    def gives(self) -> Tensor:
        """The score that ranks pairs, (N,): "run_gives" where there is a run, else "gives"."""
        return self.scores.get("run_gives", self.scores["gives"])

    def culprits(self, pair: int, count: int = 5) -> list[tuple[int, float]]:
        """The pairs that pull this pair's chosen log-prob down most, (pair, d log π per lr)."""
        effect = _effects(self.gram, self._weights())[: len(self)][pair] / len(self)
        order = effect.argsort(stable=True)[:count].tolist()
        return [(int(j), float(effect[j])) for j in order if effect[j] < 0]

    def falling(self, count: int | None = None) -> list[int]:
        """Pairs by what a step on the set does to their chosen response, the deepest fall first."""
        return self.scores["set_chosen"].argsort(stable=True)[:count].tolist()

    @property
    def entangled(self) -> list[int]:
        """Pairs whose own step lowers their chosen response, though the loss pulls it up."""
        lowers = self.scores["own_chosen"] < 0
        return torch.nonzero(lowers & (self.scores["weight_chosen"] >= 0)).flatten().tolist()

    @property
    def named(self) -> list[int]:
        """Pairs whose tokens were looked at: `tokens` and `culprit_tokens` answer for them."""
        return list(self.touched)

    def tokens(self, pair: int) -> list[dict[str, Any]]:
        """What every token of a named pair does, y+ first: one dict a token.

        Returns:
            Rows "response" ("chosen" or "rejected"), "index" among its counted tokens, "token" (the
            id), "text", and what `TOKENS` lists; "nthr_selects" says whether NTHR would select it:
            a token of y− whose "nthr" is above the mean "nthr" of y+ (its τ at β = 1).

        Raises:
            ValueError: If the pair is not among `named`.
        """
        own, w = self._touched(pair).own.double(), self._weights()[:, pair]
        chosen, rejected = self.pairs[pair]
        weights = torch.cat([w[0].expand(len(chosen)), w[1].expand(len(rejected))])
        columns = {
            "own_chosen": weights * own[0],
            "own_rejected": weights * own[1],
            "gives": weights * own[2] / len(self),
        } | {name: of[pair] for name, of in self.marks.items()}
        selected = columns["nthr"] > columns["nthr"][: len(chosen)].mean()
        rows = _token_rows(self.pairs[pair])
        for k, row in enumerate(rows):
            row |= {name: float(columns[name][k]) for name in TOKENS}
            row["nthr_selects"] = row["response"] == "rejected" and bool(selected[k])
        return rows

    def culprit_tokens(self, pair: int) -> list[dict[str, Any]]:
        """Tokens of other pairs that pull the chosen response of a named pair down, worst first.

        Of the pairs that `culprits` named when the diagnosis was made, three at most.

        Returns:
            Rows as of `tokens`, with "pair" and "effect": d log π(y+) of this pair by the token's
            part of a step on the set, per unit of lr. All tokens of a pair together are what
            `culprits` says of it.

        Raises:
            ValueError: If the pair is not among `named`.
        """
        found = []
        for other, inner in self._touched(pair).others.items():
            w = self._weights()[:, other] / len(self)
            for row, x in zip(_token_rows(self.pairs[other]), inner.tolist(), strict=True):
                effect = x * float(w[int(row["response"] == "rejected")])
                found.append({"pair": other, **row, "effect": effect})
        return sorted(found, key=lambda row: float(row["effect"]))

    def _touched(self, pair: int) -> Touched:
        if pair not in self.touched:
            why = self.unopened or "diagnose(…, tokens=…) looks at more"
            raise ValueError(f"tokens are known of the pairs {self.named}, got {pair}: {why}")
        return self.touched[pair]

    def under(self, objective: str, **parameters: float) -> Diagnosis:
        """The same pairs under another loss of `LOSSES`; no model is needed."""
        facts = {k: x for k, x in self.scores.items() if not k.startswith("run_")}
        return assemble(
            objective,
            parameters,
            self.pairs,
            self.gram,
            self.stderr,
            self.log_probs,
            self.reference,
            facts,
            self.marks,
            self.touched,
            self.unopened,
            self.adam,
        )

    def simulate(
        self, run: Run | None = None, leave_out: Sequence[int] = (), shares: Tensor | None = None
    ) -> Forecast:
        """A whole run on these pairs, with the gradients that there are now; needs no model.

        Weights of the objective follow the log-probs. True until gradients turn: `foretold` takes
        the softmax out of it, docs/diagnose.md says what is left of both after real runs. Adam's P
        has the shape that the diagnosis' own objective gave it, also in what `under` returns.

        Args:
            run: How it trains. Default: that of the diagnosis.
            leave_out: Pairs that are not trained on; foretold nonetheless.
            shares: Weight of each pair's loss (N,), as of `shares`. Default: 1.

        Raises:
            ValueError: If there is no run, Adam was not asked for at the diagnosis, a pair does not
                exist, none is left, or shares are not N finite numbers.

        Cost: 4 N² a step.
        """
        run = run or (self.foretold.run if self.foretold else None)
        if run is None:
            raise ValueError("run is needed: lddyn.Run(lr=…), or diagnose(…, run=…)")
        count, gone = len(self), {int(i) for i in leave_out}
        if not all(0 <= i < count for i in gone):
            raise ValueError(f"leave_out must hold pairs from 0 to {count - 1}, got {sorted(gone)}")
        kept = [i for i in range(count) if i not in gone]
        if not kept:
            raise ValueError("leave_out must leave a pair to train on, got all of them")
        given = torch.ones(count).double() if shares is None else shares.double().cpu()
        if given.shape != (count,) or not bool(given.isfinite().all()):
            raise ValueError(f"shares must be {count} finite numbers, got {tuple(given.shape)}")
        return self._simulate(run, None, kept, given)

    def _simulate(
        self,
        run: Run,
        pull: Callable[[Tensor], Tensor] | None = None,
        kept: Sequence[int] | None = None,
        shares: Tensor | None = None,
    ) -> Forecast:
        """Simulates w± = pull(log π); by default those of the objective, on all pairs."""

        def own(log_probs: Tensor) -> Tensor:
            return _weights(self.objective, self.parameters, self.pairs, log_probs, self.reference)

        if run.optimizer == "adamw" and self.adam is None:
            raise ValueError(
                "Adam's diagonal is not known: diagnose(…, run=lddyn.Run(…)) with memory for "
                "all gradients, or Run(optimizer='sgd')"
            )
        return simulate(
            self.gram,
            self.adam if run.optimizer == "adamw" else None,
            self.log_probs,
            pull or own,
            run,
            range(len(self)) if kept is None else kept,
            torch.ones(len(self)).double() if shares is None else shares,
        )

    def shares(self) -> Tensor:
        """Weights of the pairs, the least change from 1 after which no y+ is foretold to fall.

            min ‖a − 1‖²  subject to  Σ_j a_j effect of j on log π(y_i+) ≥ 0 for all i,  a ≥ 0

        scaled to a mean of 1, so that as much is trained as before. Effects are those of the run
        (`foretold`), or else of one step on the set; they are taken as they are at a = 1.

        Returns:
            (N,) float64, 0 for pairs that are better left out; all 0 if nothing else will do.
        """
        step = _effects(self.gram, self._weights())[: len(self)]
        found = projected(step if self.foretold is None else self.foretold.effects)
        return found / found.mean() if bool(found.any()) else found

    def objectives(self) -> list[dict[str, Any]]:
        """One row per loss: what a step on the set does, and with `run` what the run does.

        This diagnosis' own objective has its own parameters, the others have their defaults.
        "extend" is the paper's remedy, SFT on both responses first, for as long as the run.

        Returns:
            Rows "objective", shares "chosen_falls" and "both_fall", "chosen" and "rejected": mean
            d log π over ‖step‖, as losses differ in scale and a rate is tuned to each. With a run
            also "run_chosen", "run_rejected" (mean nats) and "run_chosen_falls", linear in log π:
            losses that begin as DPO does (DPOP) differ from it there alone.
        """
        found = []
        for name in (*LOSSES, "extend"):
            other = self if name in (self.objective, "extend") else self.under(name)
            weights = torch.ones_like(self.log_probs) if name == "extend" else other._weights()
            step = weights.flatten() / len(self)
            size = math.sqrt(max(float(step @ self.gram @ step), 0.0)) or 1.0
            up, fall = _effects(self.gram, weights).mean(1).view(2, -1)
            row = {
                "objective": name,
                "chosen_falls": float((up < 0).double().mean()),
                "both_fall": float(((up < 0) & (fall < 0)).double().mean()),
                "chosen": float(up.mean()) / size,
                "rejected": float(fall.mean()) / size,
            }
            if self.foretold is not None:
                run = self.foretold.run
                change = other._simulate(run).change
                if name == "extend":
                    change = change + self._simulate(run, torch.ones_like).change
                row |= {
                    "run_chosen": float(change[0].mean()),
                    "run_rejected": float(change[1].mean()),
                    "run_chosen_falls": float((change[0] < 0).double().mean()),
                }
            found.append(row)
        return found

    def actions(self, faults: Mapping[int, str] | None = None) -> list[dict[str, Any]]:
        """What to do with each pair, the most harmful first.

        | action | when |
        |---|---|
        | fix | `faults` names it, its responses are the same, or it is `entangled` |
        | drop | its weight of `shares` is below 0.05 |
        | reweight | that weight is below 1/2 or above 2 |
        | keep | otherwise |

        Args:
            faults: Pair -> what an audit found.

        Returns:
            Rows "pair", "action", "share" (its weight), "gives", "why".
        """
        shares, given, rows = self.shares().tolist(), dict(faults or {}), []
        entangled = set(self.entangled)
        for pair in self.worst():
            share, gives = shares[pair], float(self.gives[pair])
            chosen, rejected = self.pairs[pair]
            why = f"{'lowers' if gives < 0 else 'raises'} the chosen responses"
            if pair in given:
                action, why = "fix", given[pair]
            elif chosen.content_id == rejected.content_id:
                action, why = "fix", "chosen and rejected are the same"
            elif pair in entangled:
                action, why = "fix", "y− is too like y+: its own step lowers its y+"
            elif share < 0.05:
                action = "drop"
            elif not 0.5 <= share <= 2:
                action = "reweight"
            else:
                action = "keep"
            rows.append(
                {"pair": pair, "action": action, "share": share, "gives": gives, "why": why}
            )
        return rows

    def table(self) -> list[dict[str, Any]]:
        """One dict per pair, in order: "pair", "fate", and all scores."""
        return [
            {"pair": i, "fate": fate} | {name: float(x[i]) for name, x in self.scores.items()}
            for i, fate in enumerate(self.fate)
        ]

    def tell(self, places: Sequence[int] | None = None) -> list[str]:
        """The diagnosis in sentences; pairs are named by their rows, if `places` has them."""
        word, place = ("pair", range(len(self))) if places is None else ("row", places)
        n, up, fall = len(self), self.scores["set_chosen"], self.scores["set_rejected"]
        own, entangled = self.scores["own_chosen"], self.entangled
        past = int((self.scores["weight_chosen"] < 0).sum())
        both = int(((up < 0) & (fall < 0)).sum())
        lines = [
            f"A small {self.objective} step on all {n} pairs lowers log π(y+) of "
            f"{int((up < 0).sum())} of them, and both responses of {both}.",
            f"By its own step alone, {int((own < 0).sum())} pairs would lower their own chosen "
            "response"
            + (
                ": −w− ⟨g+, g−⟩ exceeds w+ ‖g+‖² there, what is pushed down is too like what is "
                "pulled up."
                if entangled
                else "."
            )
            + (
                f" {self.objective} itself pulls the chosen response of {past} down: they are past "
                "its target."
                if past
                else ""
            ),
        ]
        error = self.set_stderr()
        if error is not None:
            unsure = int((up.abs() < 2 * error[0]).sum())
            lines.append(
                f"Inner products between pairs are estimates: for {unsure} of {n} pairs log π(y+) "
                "may as well rise as fall, it is within two standard errors of 0. More memory, or "
                "a larger sketch, tells."
            )
        gives = self.gives
        if self.foretold is not None:
            run, change = self.foretold.run, self.foretold.change
            means = [f"{x:+.3g}" for x in change.mean(1).tolist()]
            lines.append(
                f"{run.epochs} epochs at lr {run.lr:g} ({run.optimizer}, batches of {run.batch}) "
                f"are foretold to move log π(y+) by {means[0]} and log π(y−) by {means[1]} nats; "
                f"y+ falls in {int((change[0] < 0).sum())} of {n} pairs. Trust its ranks more than "
                "its level, which is too high where y− falls far."
            )
        harmful = gives[gives < 0]
        if len(harmful):
            top = self.worst(min(max(1, n // 10), len(harmful)))
            share = float(gives[top].sum() / harmful.sum())
            named = ", ".join(str(place[i]) for i in top[:5])
            lines.append(
                f"{len(harmful)} pairs pull the chosen responses down on the whole; the worst "
                f"{len(top)} do {share:.0%} of it "
                f"({word}{'s' if len(top) > 1 else ''} {named}{' …' if len(top) > 5 else ''})."
            )
            if self.foretold is not None:
                left = torch.ones(n)
                left[top] = 0.0
                after = [float(self.foretold.weighted(x).mean()) for x in (left, self.shares())]
                lines.append(
                    f"Without these the run is foretold to move log π(y+) by {after[0]:+.3g} nats "
                    f"in the mean, with the weights of `shares` by {after[1]:+.3g}."
                )
            for pair in top[:3]:
                if pair in self.touched:
                    lines.append(f"In {word} {place[pair]} it is {self._tell_tokens(pair)}.")
        deepest = self.falling(1)[0]
        if float(up[deepest]) < 0 and deepest in self.touched:
            does = {"chosen": "pulled up", "rejected": "pushed down"}
            blamed = [
                f"{r['text']!r} of {word} {place[r['pair']]}, {does[r['response']]}"
                for r in self.culprit_tokens(deepest)[:3]
                if r["effect"] < 0
            ]
            if blamed:
                lines.append(
                    f"The chosen response of {word} {place[deepest]} falls most; tokens of others "
                    f"that do it: {'; '.join(blamed)}."
                )
        if self.unopened:
            lines.append(f"No gradients of tokens, and no LBK, of this model: {self.unopened}.")
        rows = self.objectives()
        others = [o for o in rows if o["objective"] not in ("sft", "unlikelihood", "extend")]
        best = max(others, key=lambda row: float(row["chosen"]))
        mine = next(o for o in rows if o["objective"] == self.objective)
        lines.append(
            f"Of the losses of both responses, for a step of the same length, {best['objective']} "
            f"raises the chosen responses most "
            f"({best['chosen']:+.3g} nats a unit, {best['chosen_falls']:.0%} of pairs falling; "
            f"{self.objective}: {mine['chosen']:+.3g}, {mine['chosen_falls']:.0%})."
        )
        return lines

    def _tell_tokens(self, pair: int) -> str:
        """What in a harmful pair does it."""
        harmful = [r for r in self.tokens(pair) if r["gives"] < 0]
        worst = sorted(harmful, key=lambda r: float(r["gives"]))[:4]
        said = {"chosen": "pulling up", "rejected": "pushing down"}
        parts = [
            f"{said[side]} " + ", ".join(repr(r["text"]) for r in worst if r["response"] == side)
            for side in ("rejected", "chosen")
            if any(r["response"] == side for r in worst)
        ]
        if not worst:
            return "none of its tokens in the first step"
        share = sum(r["gives"] for r in worst) / sum(r["gives"] for r in harmful)
        when = "" if self.foretold is None else " in the first step"
        return f"{' and '.join(parts)}: {share:.0%} of what it takes{when}"

    def correlations(self, measured: Tensor, seed: int = 0) -> list[dict[str, Any]]:
        """Spearman's rank correlation of every score with a measured change of log π(y+).

        Args:
            measured: (N,) nats, what training did.
            seed: Of the bootstrap over pairs (2,000 times), 95 % intervals.

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
        found: list[dict[str, Any]] = [
            {"score": name, **spearman(score, target, seed)}
            for name, score in self.scores.items()
            if bool(score.isfinite().all())
        ]
        return sorted(found, key=lambda row: -abs(row["rho"]))

    def report(
        self,
        path: str | Path,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        closeups: int = 3,
        watched: str | Path | None = None,
        measured: Tensor | None = None,
        places: Sequence[int] | None = None,
        faults: Mapping[int, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes one self-contained HTML page, and its tables as JSON beside it.

        Args:
            path: The file; diagnosis.json (`save`) goes beside it.
            model: The diagnosed one: adds token × token influence and where the probability goes,
                tokens.json beside the page. None: neither.
            tokenizer: Makes running text of token ids. None: the examples' token texts.
            closeups: So many of the most harmful pairs, with `model`.
            watched: Folder of a watched run, for its curves.
            measured: Δ log π(y+) that training did, (N,) nats, for `correlations`.
            places: The row of the data that each pair comes from.
            faults: Pair -> what an audit found, for `actions`.
            extra: Facts for the page's last table.

        Returns:
            The path written.

        Raises:
            FileNotFoundError: If `watched` is no folder of a watched run.

        Cost: seconds; a `decompose` and a `massflow` for each close-up.

        Example:
            >>> # lddyn.diagnose(model, pairs).report("diagnosis.html", model, tokenizer)
        """
        from lddyn import report

        rows = [] if watched is None else report.read_dynamics(watched)
        looked = []
        if model is not None and not self.unopened:
            looked = report.look_closer(self, model, tokenizer, self.worst(closeups))
        return report.write_diagnosis(
            self,
            path,
            closeups=looked,
            dynamics=rows,
            measured=measured,
            places=places,
            faults=faults,
            tokenizer=tokenizer,
            extra=extra,
        )

    def save(
        self,
        folder: str | Path,
        places: Sequence[int] | None = None,
        faults: Mapping[int, str] | None = None,
    ) -> Path:
        """Writes diagnosis.json (`to_dict`) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "diagnosis.json"
        text = json.dumps(self.to_dict(places, faults), indent=1, allow_nan=False)
        replace_file(path, text + "\n")
        return path

    def to_dict(
        self, places: Sequence[int] | None = None, faults: Mapping[int, str] | None = None
    ) -> dict[str, Any]:
        """Everything but the Gram, as JSON can hold it: `table`, `tell`, `objectives`, meanings.

        "run" has the run's settings, the means that it is foretold to move ("chosen", "rejected")
        and mean log π of the linear model after each step.

        Args:
            places: The row of the data that each pair comes from, for "row" in the table.
            faults: As in `actions`.
        """
        table = self.table()
        for pair, row in enumerate(table if places is not None else ()):
            row["row"] = places[pair]  # type: ignore[index]
        error = self.set_stderr()
        if error is not None:
            for row, chosen, rejected in zip(table, *error.tolist(), strict=True):
                row |= {"set_chosen_stderr": chosen, "set_rejected_stderr": rejected}
        run = None
        if self.foretold is not None:
            path = self.foretold.path.mean(2)
            means = self.foretold.change.mean(1).tolist()
            run = asdict(self.foretold.run) | {
                "chosen": means[0],
                "rejected": means[1],
                "path_chosen": path[:, 0].tolist(),
                "path_rejected": path[:, 1].tolist(),
            }
        return {
            "run": run,
            "objective": self.objective,
            "parameters": dict(self.parameters),
            "told": self.tell(places),
            "objectives": _finite(self.objectives()),
            "worst": self.worst(),
            "shares": self.shares().tolist(),
            "actions": _finite(self.actions(faults)),
            "validated": self.validated,
            "fates": dict(Counter(self.fate)),
            "pairs": _finite(table),
            "tokens": [
                {
                    "pair": pair,
                    "tokens": _finite(self.tokens(pair)),
                    "culprits": self.culprit_tokens(pair)[:20],
                }
                | ({} if places is None else {"row": places[pair]})
                for pair in self.named
            ],
            "meaning": SCORES,
            "meaning_of_tokens": TOKENS,
        }

    def _weights(self) -> Tensor:
        return torch.stack([self.scores["weight_chosen"], self.scores["weight_rejected"]])


def _token_rows(pair: tuple[Example, Example]) -> list[dict[str, Any]]:
    return [
        {"response": side, "index": k, "token": token, "text": text}
        for side, example in zip(("chosen", "rejected"), pair, strict=True)
        for k, (token, text) in enumerate(zip(example.targets, example.token_texts, strict=True))
    ]


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with None for what is not a finite number."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]


def _weights(
    objective: str,
    parameters: Mapping[str, float],
    pairs: Pairs,
    log_probs: Tensor,
    reference: Tensor,
) -> Tensor:
    """w± = −∂L/∂ log π(y±), (2, N), by autograd; a loss is of one pair, elementwise."""
    lengths = torch.tensor([[len(e) for e in pair] for pair in pairs]).T
    return -Loss(objective, **parameters).weights(log_probs, reference, lengths)


def _effects(gram: Tensor, weights: Tensor) -> Tensor:
    """D log π of sequence i by a step on pair j, (2N, N), per unit of lr."""
    n = weights.shape[1]
    return gram[:, :n] * weights[0] + gram[:, n:] * weights[1]


def assemble(
    objective: str,
    parameters: Mapping[str, float],
    pairs: Pairs,
    gram: Tensor,
    stderr: Tensor | None,
    log_probs: Tensor,
    reference: Tensor,
    facts: Mapping[str, Tensor],
    marks: Mapping[str, Sequence[Tensor]],
    touched: Mapping[int, Touched] | None = None,
    unopened: str = "",
    adam: tuple[Tensor, float] | None = None,
) -> Diagnosis:
    """The diagnosis under an objective, from what does not depend on it."""
    n = len(pairs)
    parameters = Loss(objective, **parameters).parameters
    weights = _weights(objective, parameters, pairs, log_probs, reference)
    effects = _effects(gram, weights)
    each, index = effects.mean(1), torch.arange(n)
    computed = {
        "set_chosen": each[:n],
        "own_chosen": effects[index, index],
        "set_rejected": each[n:],
        "own_rejected": effects[n + index, index],
        "gives": effects[:n].mean(0) / n,
        "norm_chosen": gram[index, index],
        "norm_rejected": gram[n + index, n + index],
        "inner": gram[index, n + index],
        "entanglement": gram[index, n + index] / gram[index, index],
        "log_prob_chosen": log_probs[0],
        "log_prob_rejected": log_probs[1],
        "margin": (log_probs - reference)[0] - (log_probs - reference)[1],
        "weight_chosen": weights[0],
        "weight_rejected": weights[1],
    }
    merged = {**facts, **computed}
    scores = {name: merged[name] for name in SCORES if name in merged}
    return Diagnosis(
        objective,
        dict(parameters),
        pairs,
        scores,
        gram,
        stderr,
        log_probs,
        reference,
        marks,
        touched or {},
        unopened,
        adam,
    )
