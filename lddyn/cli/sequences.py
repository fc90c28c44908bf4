"""Rows of single responses as a set: demonstrations, feedback with labels, rated completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lddyn.cli.pairs import encode_rows, warn_of_first
from lddyn.data.read import PlacedRow
from lddyn.errors import ExampleError
from lddyn.files import JsonObject
from lddyn.text import signed

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.audit import Audit
    from lddyn.data.example import Example
    from lddyn.data.options import RowOptions
    from lddyn.objectives.objective import Objective
    from lddyn.sets.sequence_diagnosis import SequenceDiagnosis
    from lddyn.settings import TrainerSettings

Kind = Literal["pairs", "sft", "kto", "grpo"]

_COMPLETIONS, _REWARDS = ("completions", "responses", "outputs"), ("rewards", "reward", "scores")
_PAIR = {"chosen", "rejected", "chosen_messages", "rejected_messages", "rejected_response"}
_PAIR |= {"preferred_output", "non_preferred_output", "chosen_ids", "rejected_ids"}
_PAIR |= {"chosen_input_ids", "rejected_input_ids"}


@dataclass(frozen=True)
class Responses:
    """The rows of a file that are single responses.

    Attributes:
        kind: "sft", "kto" or "grpo".
        examples: Their token sequences.
        rows: The number of each one's row; empty where a row holds several.
        marks: Their labels (kto) or rewards (grpo); empty for sft.
        skipped: Rows that are left out, with the reason.
        audit: The audit of all responses.
    """

    kind: Kind
    examples: list[Example]
    rows: list[int]
    marks: list[Any]
    skipped: list[tuple[int, str]]
    audit: Audit

    def objective(
        self, settings: TrainerSettings | None, beta: float | None, reference: Any, model: Any
    ) -> Objective:
        """The loss of all of them as one batch.

        Args:
            settings: Of --like, or None.
            beta: Of --beta, or None.
            reference: Of --reference; None: that of the settings.
            model: The policy.
        """
        from lddyn.objectives.grouped import GRPO
        from lddyn.objectives.like import objective_like
        from lddyn.objectives.objective import SFT
        from lddyn.objectives.unpaired import KTO

        given: dict[str, Any] = {} if beta is None else {"beta": beta}
        if self.kind == "grpo" and settings is None:
            return GRPO(self.examples, self.marks, **given)
        if settings is not None:
            if self.kind == "grpo":  # --beta is before the file's
                settings = replace(settings, parameters={**settings.parameters, **given})
            labelled: Any = list(zip(self.examples, self.marks, strict=True)) if self.marks else ()
            return objective_like(settings, labelled or self.examples, model)
        if self.kind == "kto":
            return KTO(self.examples, self.marks, reference=reference or "self", **given)
        if given:
            raise ValueError("--beta is of losses with a reference; sft has none")
        return SFT(self.examples)


def kind_of(content: Sequence[PlacedRow], objective: str | None) -> Kind:
    """What most rows of a file are, by the columns that they have.

    Args:
        content: The rows.
        objective: Of --objective; None: not given.

    Raises:
        ValueError: If the objective is not one of such rows.
    """
    rows = [placed.row for placed in content if isinstance(placed.row, Mapping)]
    counts: dict[Kind, int] = {"pairs": 0, "kto": 0, "grpo": 0, "sft": 0}
    for row in rows:
        counts[_kind(row)] += 1
    kind = max(counts, key=lambda name: counts[name]) if rows else "pairs"
    if kind != "pairs" and objective not in (None, kind):
        raise ValueError(
            f"--objective {objective} is a loss of pairs (chosen, rejected) or of other rows; "
            f"these rows are single responses, whose loss is {kind}"
        )
    return kind


def _kind(row: Mapping[str, Any]) -> Kind:
    """What a row is."""
    held = {name for name, value in row.items() if value is not None}
    if held & _PAIR:
        return "pairs"
    if _completions(row) or (held & {*_REWARDS} and held & {"completion", "completion_ids"}):
        return "grpo"
    return "kto" if held & {"label", "kto_tag"} else "sft"


def _completions(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row's completions and rewards; None: it holds one response."""
    for name in _COMPLETIONS:
        if isinstance(row.get(name), list):
            for rewards in _REWARDS:
                if isinstance(row.get(rewards), list):
                    return name, rewards
    return None


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    config: object,
    content: Sequence[PlacedRow],
    options: RowOptions,
    kind: Kind,
) -> Responses:
    """The responses of rows as token sequences, with what is left out of them."""
    from lddyn.data.audit import audit
    from lddyn.data.columns import feedback_label

    parts = [(number, p) for number, placed in enumerate(content) for p in _responses(placed)]
    numbers, flat = [number for number, _ in parts], [part for _, part in parts]
    examples, rows, marks, skipped = [], [], [], []
    for place, encoded in encode_rows(tokenizer, config, flat, options):
        row = flat[place].row
        if isinstance(encoded, str) or isinstance(row, ExampleError):
            skipped.append((numbers[place], str(encoded)))
            continue
        try:
            mark: bool | float | None = None
            if kind == "kto":
                mark = feedback_label(row)
                if mark is None:
                    raise ValueError("label: missing, and KTO learns from it")
            elif kind == "grpo":
                mark = _reward(row)
        except ValueError as error:
            skipped.append((numbers[place], f"{flat[place].where}: {error}"))
            continue
        examples.append(encoded.get("completion") or next(iter(encoded.values())))
        rows.append(numbers[place])
        marks += [] if kind == "sft" else [mark]
    if not examples:
        why = f" ({skipped[0][1]})" if skipped else ""
        raise ValueError(f"no row has a response that can be diagnosed{why}")
    lines = [f"row {number} is not diagnosed: {why}" for number, why in skipped]
    warn_of_first(lines, "responses in all are not diagnosed")
    several = len({*rows}) < len(rows)
    audited = audit(tokenizer, flat, options=options, config=config)
    return Responses(kind, examples, [] if several else rows, marks, skipped, audited)


def _responses(placed: PlacedRow) -> list[PlacedRow]:
    """A row of several completions as a row for each of them; any other row as it is."""
    row = placed.row
    columns = None if isinstance(row, ExampleError) else _completions(row)
    if columns is None or isinstance(row, ExampleError):
        return [placed]
    name, rewards = columns
    if len(row[name]) != len(row[rewards]):
        problem = f"{rewards} must be one per completion, got {len(row[rewards])} for "
        return [PlacedRow(placed.where, ExampleError(f"{problem}{len(row[name])}", field=rewards))]
    rest = {k: v for k, v in row.items() if k not in columns}
    return [
        PlacedRow(f"{placed.where}, completion {i}", {**rest, "completion": text, "reward": reward})
        for i, (text, reward) in enumerate(zip(row[name], row[rewards], strict=True))
    ]


def _reward(row: Mapping[str, Any]) -> float:
    """The reward of a completion.

    Raises:
        ValueError: If it has none, or one that is no finite number.
    """
    name = next((n for n in _REWARDS if row.get(n) is not None), "reward")
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def explain(
    document: JsonObject, diagnosis: SequenceDiagnosis, page: object
) -> Iterator[str | Table]:
    """The diagnosis in sentences, and its tables."""
    yield from document["explanation"]
    yield _worst(document, diagnosis)
    if document["observed"]:
        yield _observed(document, diagnosis)
    if page is not None:
        yield f"page: {page} (open it in a browser; its tables are beside it)"


def _worst(document: JsonObject, diagnosis: SequenceDiagnosis, count: int = 10) -> Table:
    """The most harmful sequences."""
    from rich.table import Table

    unit, run = diagnosis.step.unit_lr, diagnosis.forecast is not None
    ahead = ("run: Δ log π",) if run else ()
    noun = "row" if diagnosis.sequences.row_numbers else "sequence"
    heads = ("label", "the loss", "log π", "effect on the target", *ahead, "step: Δ log π")
    table = Table(noun, *heads, "lowered most by")
    scale = 1.0 if run else unit
    for i in diagnosis.worst(count):
        row = document["sequences"][i]
        cells = [row["label"], {1: "raises", -1: "lowers", 0: "leaves"}[row["wanted"]]]
        cells += [f"{row['log_prob']:+.3g}", signed(row["contribution"] * scale, 3)]
        if run:
            cells.append(signed(row["run_change"], 3))
        cells.append(signed(row["set_change"] * unit, 3))
        named = [str(diagnosis.sequences.name(j)) for j, _ in row["lowered_by"]]
        table.add_row(str(diagnosis.sequences.name(i)), *cells, ", ".join(named))
    return table


def _observed(document: JsonObject, diagnosis: SequenceDiagnosis, count: int = 10) -> Table:
    """The observed responses, those that fall most first."""
    from rich.table import Table

    unit, run = diagnosis.step.unit_lr, diagnosis.forecast is not None
    ahead = ("run: Δ log π",) if run else ()
    table = Table("observed", "log π", "unit step: Δ log π", *ahead, "lowered most by", "raised by")
    of = "run_change" if run else "set_change"
    for row in sorted(document["observed"], key=lambda row: float(row[of]))[:count]:
        error = f" ± {row['stderr'] * unit:.2g}" if row["stderr"] else ""
        cells = [f"{row['log_prob']:+.3g}", f"{signed(row['set_change'] * unit, 3)}{error}"]
        if run:
            cells.append(signed(row["run_change"], 3))
        for side in ("lowered_by", "raised_by"):
            cells.append(", ".join(str(diagnosis.sequences.name(j)) for j, _ in row[side][:3]))
        table.add_row(row["name"], *cells)
    return table
