"""What `lddyn.diagnose` returns for single sequences, and the questions it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lddyn.cells import Grid
from lddyn.data.example import Example
from lddyn.files import json_safe
from lddyn.results import Result, load_result, save_result
from lddyn.sets.forecast import Forecast, least_falls
from lddyn.sets.observed import observed_rows
from lddyn.sets.readings import Readings
from lddyn.sets.saved import (
    example_facts,
    forecast_facts,
    forecast_tensors,
    gram_tensors,
    read_forecast,
    read_gram,
)
from lddyn.sets.sequence_set import SequenceSet, SequenceStep

__all__ = ["SOURCES", "SequenceDiagnosis"]

KIND, FORMAT = "lddyn.SequenceDiagnosis", 1


# What moves a sequence: itself, others to its prompt by what the loss wants, and the rest.
SOURCES = ("own", "raised, same prompt", "lowered, same prompt", "other prompts")


@dataclass(frozen=True, repr=False)
class SequenceDiagnosis(Result):
    """What training on single sequences does to their log-probs, and to those of others.

    The sequences are demonstrations (SFT), responses with a label (KTO), or completions with a
    reward (GRPO). Which of them the loss raises or lowers is the sign of its weight.

    Attributes:
        step: One small step on the whole set, to first order.
        forecast: What the run does; None without `run`.
        unavailable: Reason why the model has no Anatomy; empty if it has one.
    """

    step: SequenceStep
    forecast: Forecast | None = None
    unavailable: str = ""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.step)

    @property
    def sequences(self) -> SequenceSet:
        """The sequences, with the data's row numbers and labels."""
        return self.step.sequences

    @property
    def objective(self) -> str:
        """Name of the loss."""
        return str(self.step.described["objective"])

    @property
    def gram(self) -> Tensor:
        """Inner products ⟨g_i, g_j⟩ of gradients of log π, (N, N) float64."""
        return self.step.gram.value

    @property
    def stderr(self) -> Tensor | None:
        """Standard errors of `gram` where it was sketched, else None."""
        return self.step.gram.stderr

    @property
    def log_probs(self) -> Tensor:
        """Log π of the sequences, (N,) nats."""
        return self.step.readings.log_probs[0]

    # ----- which sequences

    @property
    def target(self) -> str:
        """What `contribution` is measured on, in words."""
        if self.sequences.observed:
            return "the observed sequences"
        return "the sequences that the loss raises" if self._raised.any() else "all sequences"

    @property
    def _raised(self) -> Tensor:
        return self.step.wanted > 0

    @cached_property
    def effects(self) -> Tensor:
        """Effect of each sequence (columns) on each (rows), (N, N).

        Nats of the run, or with no run per unit of lr of a step on the set.
        """
        if self.forecast is not None:
            return self.forecast.effects
        return self.step.effects / len(self)

    @cached_property
    def observed_effects(self) -> Tensor:
        """Effect of each sequence on each observed one, (M, N), likewise."""
        if self.forecast is not None and self.forecast.observed_effects is not None:
            return self.forecast.observed_effects
        return self.step.observed_effects / len(self)

    @cached_property
    def contribution(self) -> Tensor:
        """Each sequence's part of the mean Δ log π of the target, (N,), in units of `effects`."""
        if self.sequences.observed:
            return self.observed_effects.mean(0)
        of = self._raised if bool(self._raised.any()) else torch.ones(len(self)).bool()
        return self.effects[of].mean(0)

    @property
    def change(self) -> Tensor:
        """Δ log π (N,): nats of the run, or per unit of lr of a step on the set."""
        return self.step.change[0] if self.forecast is None else self.forecast.change[0]

    @property
    def against(self) -> list[int]:
        """Sequences that move against the loss, the farthest first.

        They fall although the loss raises them, or rise although it lowers them.
        """
        along = self.change * self.step.wanted
        return [i for i in along.argsort(stable=True).tolist() if along[i] < 0]

    def worst(self, count: int | None = None) -> list[int]:
        """Sequences by `contribution`, the most harmful first."""
        return self.contribution.argsort(stable=True)[:count].tolist()

    def row_weights(self) -> Tensor:
        """Weights near 1 under which sequences move little against the loss.

        As `Diagnosis.pair_weights`, with the effects on the sequences that the loss raises, the
        negative effects on those that it lowers, and the effects on observed ones.

        Returns:
            (N,) float64, 0 for sequences that are better left out; their mean is 1.
        """
        wanted = self.step.wanted
        moved = (wanted[:, None] * self.effects)[wanted != 0]
        return least_falls(torch.cat([moved, self.observed_effects]))

    def lowered_by(self, sequence: int, count: int = 5) -> list[tuple[int, float]]:
        """The other sequences that lower this one most: (sequence, part in units of `effects`)."""
        effects = self.effects[sequence].clone()
        effects[sequence] = 0.0
        order = effects.argsort(stable=True)[:count].tolist()
        return [(j, x) for j in order if (x := float(effects[j])) < 0]

    def sources(self, of: Sequence[int] | None = None) -> dict[str, float]:
        """Mean change of some sequences by source (`SOURCES`), in units of `effects`.

        Args:
            of: Their numbers. Default: the sequences that the loss raises, or else all.
        """
        if of is None:
            raised = torch.nonzero(self._raised).flatten().tolist()
            of = raised or list(range(len(self)))
        prompts = self._prompts
        totals = dict.fromkeys(SOURCES, 0.0)
        every = torch.arange(len(self))
        for i in of:
            effects, own = self.effects[i], every == i
            same = (prompts == prompts[i]) & ~own
            parts = {
                "own": own,
                "raised, same prompt": same & self._raised,
                "lowered, same prompt": same & ~self._raised,
                "other prompts": prompts != prompts[i],
            }
            for name, mask in parts.items():
                totals[name] += float(effects[mask].sum()) / max(1, len(of))
        return totals

    @cached_property
    def _prompts(self) -> Tensor:
        """One number a prompt, (N,)."""
        numbers: dict[tuple[int, ...], int] = {}
        found = [
            numbers.setdefault(tuple(e.prompt_ids), len(numbers)) for e in self.sequences.responses
        ]
        return torch.tensor(found)

    def observed(self, count: int = 5) -> list[dict[str, Any]]:
        """What training does to each observed sequence, and which sequences of the set do it.

        Returns:
            Rows as of `lddyn.Diagnosis.observed`.
        """
        return observed_rows(self.step, self.forecast, count)

    # ----- words, tables, pages, files

    def summary(self) -> dict[str, Any]:
        """The few numbers that `explain` is made of, JSON-safe.

        "unit" is the learning rate of the unit step, which moves log π of the sequences by one nat
        on average; step numbers are nats of that step.
        """
        step, unit = self.step, self.step.unit_lr
        wanted, change = step.wanted, step.change[0]
        error = step.stderr
        scale = unit if self.forecast is None else 1.0
        harmful = [i for i in self.worst() if float(self.contribution[i]) < 0]
        return {
            "objective": self.objective,
            "sequences": len(self),
            "prompts": int(self._prompts.max()) + 1,
            "observed": len(self.sequences.observed),
            "unit_lr": unit,
            "exact": self.stderr is None,
            "raised": int((wanted > 0).sum()),
            "lowered": int((wanted < 0).sum()),
            "idle": int((wanted == 0).sum()),
            "raised_falls": int(((wanted > 0) & (change < 0)).sum()),
            "lowered_rises": int(((wanted < 0) & (change > 0)).sum()),
            "uncertain": None if error is None else int((change.abs() < 2 * error[0]).sum()),
            "sources": {k: v * scale for k, v in self.sources().items()},
            "sources_unit": "nats of the unit step" if self.forecast is None else "nats of the run",
            "target": self.target,
            "target_change": float(self.contribution.sum()) * scale,
            "harmful": len(harmful),
            "worst": [self.sequences.name(i) for i in harmful[:6]],
            "against": [self.sequences.name(i) for i in self.against[:6]],
            "run": self._run_summary(),
            "remarks": list(step.remarks),
        }

    def _run_summary(self) -> dict[str, Any] | None:
        run, wanted = self.forecast, self.step.wanted
        if run is None:
            return None
        change = run.change[0]
        return {
            **asdict(run.run),
            "segments": run.segments,
            "change": float(change.mean()),
            "raised_falls": int(((wanted > 0) & (change < 0)).sum()),
            "lowered_rises": int(((wanted < 0) & (change > 0)).sum()),
            "observed": None if run.observed is None else float(run.observed.mean()),
        }

    def explain(self) -> str:
        """What training does to the sequences, and which of them do it: a sentence a line."""
        from lddyn.report.explain import lines
        from lddyn.report.sequences import explain_sequences

        return "\n".join(lines(explain_sequences(self.summary())))

    def _grids(self) -> list[Grid]:
        table = self.table()
        columns = ["contribution", "log_prob", "wanted", "set_change", "own_change"]
        columns += ["run_change"] if self.forecast is not None else []
        rows = []
        for i in self.contribution.argsort(stable=True)[:12].tolist():
            one = table[i]
            text = "".join(self.sequences.responses[i].token_texts)[:60]
            name = f"row {one['row']}" if "row" in one else f"sequence {i}"
            rows.append((name, [*(one[column] for column in columns), one["label"], text]))
        title = "Sequences that harm most (nats; changes by a step per unit of lr)"
        return [Grid(title, [*columns, "label", "begins"], rows)]

    def table(self) -> list[dict[str, Any]]:
        """One dict per sequence, in order.

        Returns:
            Rows "sequence", "row" where it is known, "label", "tokens", "log_prob" (nats),
            "weight" (∂L/∂ log π, negative raises), "wanted" (1, −1 or 0), "set_change" and
            "own_change" (d log π by a step on the set, and on it alone, per unit of lr),
            "contribution", "lowered_by" ((sequence, part), …); "stderr" of "set_change" where it is
            sketched; "run_change" (nats) with a run.
        """
        step, rows = self.step, []
        error = step.stderr
        for i in range(len(self)):
            row: dict[str, Any] = {"sequence": i}
            if self.sequences.row_numbers:
                row["row"] = self.sequences.row_numbers[i]
            row |= {
                "label": self.sequences.labels[i] if self.sequences.labels else "",
                "tokens": len(self.sequences.responses[i]),
                "log_prob": float(self.log_probs[i]),
                "weight": float(step.weights[0, i]),
                "wanted": int(step.wanted[i]),
                "set_change": float(step.change[0, i]),
                "own_change": float(step.effects[i, i]),
                "contribution": float(self.contribution[i]),
                "lowered_by": self.lowered_by(i, 3),
            }
            if error is not None:
                row["stderr"] = float(error[0, i])
            if self.forecast is not None:
                row["run_change"] = float(self.forecast.change[0, i])
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything except the Gram, JSON-safe."""
        document = {
            "objective": dict(self.step.described),
            "summary": self.summary(),
            "explanation": self.explain().splitlines(),
            "worst": self.worst(),
            "row_weights": self.row_weights().tolist(),
            "sequences": self.table(),
            "observed": self.observed(),
        }
        return dict(json_safe(document))

    def report(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
        """Writes one self-contained HTML page, and diagnosis.json with its tensors beside it.

        Args:
            path: The file.
            extra: Rows of the page's last table.

        Returns:
            The path written.
        """
        from lddyn.environment import env
        from lddyn.report.sequences import write_sequences_page

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [
            ("".join(e.prompt_texts), "".join(e.token_texts)) for e in self.sequences.responses
        ]
        write_sequences_page(
            self.to_dict(),
            path,
            texts=texts,
            environment=env(),
            extra={str(k): str(v) for k, v in (extra or {}).items()},
        )
        self.save(path.parent / "diagnosis")
        return path

    def save(self, path: str | Path) -> None:
        """Writes `path`.json (with `to_dict`, for people) and its tensors, in one commit."""
        step, readings = self.step, self.step.readings
        state: dict[str, Any] = {
            "sequences": [example_facts(e) for e in self.sequences.responses],
            "observed": {name: example_facts(e) for name, e in self.sequences.observed.items()},
            "row_numbers": list(self.sequences.row_numbers),
            "labels": list(self.sequences.labels),
            "remarks": list(step.remarks),
            "unavailable": self.unavailable,
        }
        tensors = gram_tensors(step.gram) | {
            "log_probs": readings.log_probs,
            "observed": readings.observed,
            "token_log_probs": torch.cat(list(step.token_log_probs)),
            "weights": step.weights,
        }
        if self.forecast is not None:
            state["forecast"] = forecast_facts(self.forecast)
            tensors |= forecast_tensors(self.forecast)
        save_result(path, KIND, FORMAT, tensors, {**self.to_dict(), "state": state})

    @classmethod
    def load(cls, path: str | Path) -> SequenceDiagnosis:
        """Reads what `save` wrote; everything but other weights of the loss works as before.

        Raises:
            ValueError: If a file is missing, damaged, or of another kind or format.
        """
        tensors, facts = load_result(path, KIND, FORMAT)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            return _assemble(facts["state"], facts["objective"], tensors)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read as {KIND}: {error!r}") from error

    def __repr__(self) -> str:
        s = self.summary()
        gram = "exact" if s["exact"] else "sketched"
        run = "" if self.forecast is None else f";\n  {self.forecast!r}"
        return (
            f"SequenceDiagnosis({s['objective']}: {s['sequences']} sequences, {gram} Gram; a small "
            f"step lowers {s['raised_falls']} of {s['raised']} that the loss raises, and raises "
            f"{s['lowered_rises']} of {s['lowered']} that it lowers{run})"
        )


def _assemble(
    meta: dict[str, Any], described: Mapping[str, Any], tensors: dict[str, Tensor]
) -> SequenceDiagnosis:
    responses = tuple(Example(**facts) for facts in meta["sequences"])
    set_ = SequenceSet(
        responses,
        tuple(meta["row_numbers"]),
        {name: Example(**facts) for name, facts in meta["observed"].items()},
        tuple(meta["labels"]),
    )
    step = SequenceStep(
        described,
        set_,
        Readings(tensors["log_probs"], {}, {}, tensors["observed"]),
        read_gram(tensors),
        tensors["token_log_probs"].split([len(e) for e in responses]),
        tensors["weights"],
        remarks=tuple(meta["remarks"]),
    )
    return SequenceDiagnosis(step, read_forecast(meta, tensors), str(meta["unavailable"]))
