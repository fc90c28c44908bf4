"""What an audit found: findings, their severity, and how they are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lddyn.results import Result, load_result, save_result

__all__ = ["PROBLEMS", "Audit", "Finding"]

_KIND, _FORMAT = "lddyn.Audit", 2  # of saved audits

Severity = Literal["error", "warning", "note"]

_MARKS = {"error": "error", "warning": "warn ", "note": "note "}  # in the order of the report

_ERRORS = {
    "no_rows": "the data has no row",
    "unreadable_row": "the row cannot be read",
    "missing_column": "a column is missing",
    "not_text": "None, or content that is no text",
    "bad_message": "a chat message without a role, or an ill-formed one",
    "bad_tools": "tools that are no JSON",
    "bad_label": "a label that is no boolean",
    "bad_reference": "reference log-probs that are none",
    "no_chat_template": "messages, but the tokenizer has no chat template",
    "template_error": "the chat template cannot render the messages",
    "tool_calls_unknown": "tool calls that the chat template does not know",
    "bad_token_id": "a token id that is negative, too large or no integer",
    "bad_mask": "labels or masks that do not fit the ids, or count nothing",
    "invalid": "cannot be encoded",
    "empty_prompt": "no prompt token to predict from",
    "empty_response": "no response token; a trainer would train on a lone EOS",
    "identical_pair": "chosen and rejected are the same: the gradient is exactly 0",
    "different_prompts": "chosen and rejected answer different prompts",
    "prompt_fills_max_length": "the prompt leaves no room for a response",
    "over_context": "longer than the model's context",
    "token_out_of_range": "a token id that the model has no embedding for",
}

_WARNINGS = {
    "swapped_pair": "chosen is what a score, or another row, says is worse",
    "tied_pair": "chosen and rejected have the same score",
    "near_identical": "chosen and rejected differ in a few tokens only",
    "common_start": "chosen and rejected begin with the same markup: these tokens cancel",
    "special_in_response": "special tokens or role headers inside a response",
    "prompt_in_response": "a response that repeats the prompt",
    "template_text": "the chat template writes text in front of the answer",
    "double_bos": "BOS twice: the text has it, and the tokenizer adds it",
    "missing_bos": "no BOS, though the tokenizer adds it to a text",
    "double_eos": "more than one end token",
    "blank_response": "the response is only white space",
    "truncated_prompt": "the prompt is cut",
    "truncated_response": "the response is cut",
    "over_default_length": "longer than TRL's default max_length: a trainer would cut it",
    "eos_lost": "truncation removed the EOS: the model is not taught to stop",
    "eos_not_counted": "no EOS among the counted tokens: the model is not taught to stop",
    "end_of_turn_not_eos": "turns end in a token that is no EOS of the model: it will not stop",
    "pad_is_eos": "pad and EOS are one token, and a mask leaves out the EOS with the padding",
    "pad_counted": "padding in the loss",
    "mask_hole": "an attention mask that is 0 between tokens that it attends to",
    "positions": "position_ids that lddyn does not follow: it counts from 0 in each document",
    "packed_attention": "packed documents that attend to each other",
    "partial_weight": "a message's weight between 0 and 1 counts as 1",
    "not_rendered": "the chat template leaves out a part of a message",
    "unread_column": "columns that change training are not read",
    "boundary_merge": "tokens merge across the end of the prompt",
    "template_rewrite": "the chat template renders earlier turns differently later",
    "duplicate": "the same prompt and responses as an earlier row",
}

_NOTES = {
    "other_column": "columns that are not read",
    "other_key": "keys of messages that are not read",
    "shared_start": "chosen and rejected begin with the same text: these tokens cancel",
    "undesirable": "label is false: a loss without label raises these responses, too",
    "row_reference": "the rows hold log π_ref",
    "assistant_only": "only the assistant's tokens count; TRL's SFTTrainer counts all by default",
    "open_end": "the conversation ends with a message that is not the assistant's",
    "late_system": "a system message that is not the first: templates move it, or refuse it",
    "packed_hint": "BOS after EOS within a sequence: packed documents?",
    "end_of_turn": "turns end in another token than the tokenizer's EOS",
    "tools_as_text": "tools are text, as LLaMA-Factory writes them for a template without tools",
}

# Code of each problem: (its meaning, its severity).
PROBLEMS: dict[str, tuple[str, Severity]] = {
    **{code: (meaning, "error") for code, meaning in _ERRORS.items()},
    **{code: (meaning, "warning") for code, meaning in _WARNINGS.items()},
    **{code: (meaning, "note") for code, meaning in _NOTES.items()},
}


@dataclass(frozen=True)
class Finding:
    """One problem of one row.

    Attributes:
        row: Index of the row, from 0; -1 when the problem concerns the whole data set.
        field: Column at fault, `""` for the whole row.
        problem: Code of the problem.
        detail: The values at fault.
        severity: `"error"`: the row cannot be used. `"warning"`: it can, and does something else
            than one thinks. `"note"`: worth knowing, nothing is wrong.
        where: File and line of the row; `""` for rows that are not from a file.
    """

    row: int
    field: str
    problem: str
    detail: str
    severity: str = "warning"
    where: str = ""

    @property
    def place(self) -> str:
        """Row (or file and line) and field, in words."""
        place = "whole set" if self.row < 0 else f"row {self.row}"
        if self.where:
            place += f" ({self.where})"
        return f"{place} {self.field}" if self.field else place


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """The problems of a data set: a table of findings, with the counts behind its shares.

    Attributes:
        n_rows: Rows read, unreadable ones included.
        n_responses: Responses that could be encoded.
        n_eos_counted: Number of these with an end token among the counted tokens.
        n_tokens: Tokens of these responses with their prompts.
        n_counted: Tokens that are in the loss.
        findings: The table, in row order.
    """

    n_rows: int
    n_responses: int
    n_eos_counted: int
    n_tokens: int
    n_counted: int
    findings: tuple[Finding, ...]

    def __len__(self) -> int:
        """Number of findings."""
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        """Iterate over the findings."""
        return iter(self.findings)

    @property
    def unusable(self) -> tuple[int, ...]:
        """Indices of the rows that cannot be used, ascending."""
        return tuple(sorted({f.row for f in self.findings if f.severity == "error" and f.row >= 0}))

    @property
    def ok(self) -> bool:
        """Whether there are no errors and no warnings."""
        return all(finding.severity == "note" for finding in self.findings)

    def of(self, problem: str) -> tuple[Finding, ...]:
        """Findings with the given code."""
        return tuple(f for f in self.findings if f.problem == problem)

    def counts(self) -> dict[str, int]:
        """Number of rows with each problem (1 for a problem of the whole data set).

        Errors come first, then warnings, then notes; of each the more frequent first.
        """
        rows: dict[str, set[int]] = {}
        for finding in self.findings:
            rows.setdefault(finding.problem, set()).add(finding.row)
        ranks = list(_MARKS)
        order = sorted(rows, key=lambda code: (ranks.index(PROBLEMS[code][1]), -len(rows[code])))
        return {problem: len(rows[problem]) for problem in order}

    def summary(self) -> dict[str, int]:
        """Numbers of rows, responses, tokens, unusable rows, warnings and notes."""
        severities = [finding.severity for finding in self.findings]
        return {
            "rows": self.n_rows,
            "responses": self.n_responses,
            "eos_counted": self.n_eos_counted,
            "tokens": self.n_tokens,
            "counted": self.n_counted,
            "unusable": len(self.unusable),
            "warnings": severities.count("warning"),
            "notes": severities.count("note"),
        }

    def explain(self) -> str:
        """The counts, then each problem with its meaning, number of rows and first occurrence."""
        lines = [self._headline()]
        for problem, count in self.counts().items():
            meaning, severity = PROBLEMS[problem]
            first = self.of(problem)[0]
            lines.append(f"  {_MARKS[severity]} {problem:<25}{count:>6}  {meaning}")
            lines.append(f"          first: {first.place}: {first.detail}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of the audit, JSON-safe; `from_dict` reads it back."""
        return {
            "n_rows": self.n_rows,
            "n_responses": self.n_responses,
            "n_eos_counted": self.n_eos_counted,
            "n_tokens": self.n_tokens,
            "n_counted": self.n_counted,
            "unusable": list(self.unusable),
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Audit:
        """The audit that `to_dict` described."""
        findings = tuple(Finding(**finding) for finding in content["findings"])
        counts = ("n_rows", "n_responses", "n_eos_counted", "n_tokens", "n_counted")
        return cls(**{name: content[name] for name in counts}, findings=findings)

    def save(self, path: str | Path) -> None:
        """Write the audit to `path`.json."""
        save_result(path, _KIND, _FORMAT, {}, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is missing or damaged, or holds something else.
        """
        return cls.from_dict(load_result(path, _KIND, _FORMAT)[1])

    def _headline(self) -> str:
        text = f"audit: {self.n_rows} rows, {self.n_responses} responses"
        if self.n_responses:
            text += f", EOS counted in {100.0 * self.n_eos_counted / self.n_responses:.1f} %"
        text += f", {len(self.unusable)} rows unusable"
        return text + "; no problems" if self.ok else text
