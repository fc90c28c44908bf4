"""Checking a data set for rows that would train badly."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack

from lddyn.data.columns import Row
from lddyn.data.example import Example
from lddyn.data.options import DEFAULT, RowOptions, RowSettings
from lddyn.data.read import rows_or_errors
from lddyn.data.rows import row_encoders
from lddyn.data.tokenizer import Tokenizer, eos_ids
from lddyn.errors import ExampleError
from lddyn.results import Result, load_result, save_result

__all__ = ["Audit", "Finding", "audit"]

_KIND, _FORMAT = "lddyn.Audit", 1  # of saved audits

# Code of each problem: (its meaning, whether the row cannot be used).
_PROBLEMS: dict[str, tuple[str, bool]] = {
    "unreadable_row": ("the row cannot be read", True),
    "missing_column": ("a column is missing", True),
    "not_text": ("None, or neither text nor messages", True),
    "bad_message": ("a chat message without a role", True),
    "no_chat_template": ("messages, but the tokenizer has no chat template", True),
    "bad_token_id": ("a token id that is negative or no integer", True),
    "bad_mask": ("labels or masks that do not fit the ids, or count nothing", True),
    "invalid": ("cannot be encoded", True),
    "empty_prompt": ("no prompt token to predict from", True),
    "empty_response": ("no response token; a trainer would train on a lone EOS", True),
    "identical_pair": ("chosen and rejected are the same: the gradient is exactly 0", True),
    "prompt_fills_max_length": ("the prompt leaves no room for a response", True),
    "over_context": ("longer than the model's context", True),
    "token_out_of_range": ("a token id that the model has no embedding for", True),
    "blank_response": ("the response is only white space", False),
    "truncated_prompt": ("the prompt is cut", False),
    "truncated_response": ("the response is cut", False),
    "eos_lost": ("truncation removed the EOS: the model is not taught to stop", False),
    "eos_not_counted": ("no EOS among the counted tokens: the model is not taught to stop", False),
    "pad_is_eos": ("pad and EOS are one token: a collator that masks pad masks EOS too", False),
    "boundary_merge": ("tokens merge across the end of the prompt", False),
    "template_rewrite": ("the chat template renders earlier turns differently later", False),
    "duplicate": ("the same prompt and responses as an earlier row", False),
}


@dataclass(frozen=True)
class Finding:
    """One problem of one row.

    Attributes:
        row: Index of the row, from 0; -1 when the problem concerns the whole data set.
        field: Column at fault, `""` for the whole row.
        problem: Code of the problem.
        detail: The values at fault.
        severity: `"error"` when the row cannot be used, `"warning"` when it can.
    """

    row: int
    field: str
    problem: str
    detail: str
    severity: str = "warning"


@dataclass(frozen=True, repr=False)
class Audit(Result):
    """The problems of a data set: a table of findings, with the counts behind its shares.

    Attributes:
        n_rows: Rows read, unreadable ones included.
        n_responses: Responses that could be encoded.
        n_eos_counted: Number of these with an EOS among the counted tokens.
        findings: The table, in row order.
    """

    n_rows: int
    n_responses: int
    n_eos_counted: int
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
        """Whether there are no findings."""
        return not self.findings

    def of(self, problem: str) -> tuple[Finding, ...]:
        """Findings with the given code."""
        return tuple(f for f in self.findings if f.problem == problem)

    def counts(self) -> dict[str, int]:
        """Number of rows with each problem (1 for a problem of the whole data set).

        Errors come first, then the more frequent problems.
        """
        rows: dict[str, set[int]] = {}
        for finding in self.findings:
            rows.setdefault(finding.problem, set()).add(finding.row)
        order = sorted(rows, key=lambda problem: (not _PROBLEMS[problem][1], -len(rows[problem])))
        return {problem: len(rows[problem]) for problem in order}

    def summary(self) -> dict[str, int]:
        """Rows, responses, responses with EOS, unusable rows, and findings, as numbers."""
        return {
            "rows": self.n_rows,
            "responses": self.n_responses,
            "eos_counted": self.n_eos_counted,
            "unusable": len(self.unusable),
            "findings": len(self.findings),
        }

    def explain(self) -> str:
        """The counts, then each problem with its meaning, number of rows and first occurrence."""
        lines = [self._headline()]
        for problem, count in self.counts().items():
            meaning, is_error = _PROBLEMS[problem]
            first = self.of(problem)[0]
            place = "whole set" if first.row < 0 else f"row {first.row}"
            if first.field:
                place += f" {first.field}"
            mark = "error" if is_error else "warn "
            lines.append(f"  {mark} {problem:<25}{count:>6}  {meaning}")
            lines.append(f"          first: {place}: {first.detail}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of the audit, JSON-safe; `from_dict` reads it back."""
        return {
            "n_rows": self.n_rows,
            "n_responses": self.n_responses,
            "n_eos_counted": self.n_eos_counted,
            "unusable": list(self.unusable),
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Audit:
        """The audit that `to_dict` described."""
        findings = tuple(Finding(**finding) for finding in content["findings"])
        return cls(content["n_rows"], content["n_responses"], content["n_eos_counted"], findings)

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
        return text if self.findings else text + "; no problems"


def audit(
    tokenizer: Tokenizer | None,
    rows: str | os.PathLike[str] | Iterable[Row],
    fields: Sequence[str] | Literal["all"] | None = None,
    options: RowOptions = DEFAULT,
    *,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    config: object = None,
    **settings: Unpack[RowSettings],
) -> Audit:
    """List the problems of a data set, as a trainer would see it.

    Reported are rows that cannot be read or encoded, empty and blank responses, identical and
    duplicate pairs, truncation and the EOS lost by it, responses whose EOS is not in the loss, a
    pad token that is also EOS, tokens that merge across the end of the prompt, and examples that
    the model cannot read. A bad row is a finding; it never raises.

    Args:
        tokenizer: A transformers tokenizer, or an object with the same methods. None is enough for
            rows of token ids.
        rows: The data: anything that `lddyn.rows` reads.
        fields: As in `encode_row`.
        options: As in `encode_row`.
        vocab_size: Rows of the model's embedding. None: that of `config`, or not checked.
        max_positions: Longest sequence of the model. None: that of `config`, or not checked.
        config: A model's config, for `vocab_size` and `max_position_embeddings`.
        settings: Fields of `RowOptions`, in place of those of `options`.

    Returns:
        The findings. Print it, or use `counts()`, `unusable`, `to_dict()`.

    Cost: two tokenisations per response.

    Example:
        >>> from lddyn.data.audit import audit
        >>> table = [{"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [6, 2]}]
        >>> audit(None, table).counts()
        {'identical_pair': 1}
    """
    options = replace(options.with_settings(settings), texts=False)
    if config is not None:
        text_config = getattr(config, "text_config", None) or config
        if vocab_size is None:
            vocab_size = getattr(text_config, "vocab_size", None)
        if max_positions is None:
            max_positions = getattr(text_config, "max_position_embeddings", None)
    checks = _Checks(tokenizer, fields, options, vocab_size, max_positions)
    for index, row in enumerate(rows_or_errors(rows)):
        checks.check_row(index, row)
    return Audit(checks.n_rows, checks.n_responses, checks.n_eos_counted, tuple(checks.findings))


class _Checks:
    """The checks of one audit, with what they have counted so far.

    Attributes:
        findings: The findings in order, as keys: a fault of the prompt, which every response of a
            row meets, is one finding.
        n_rows: As in `Audit`.
        n_responses: As in `Audit`.
        n_eos_counted: As in `Audit`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        fields: Sequence[str] | str | None,
        options: RowOptions,
        vocab_size: int | None,
        max_positions: int | None,
    ) -> None:
        self.tokenizer, self.fields, self.options = tokenizer, fields, options
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.findings: dict[Finding, None] = {}
        self.n_rows = self.n_responses = self.n_eos_counted = 0
        self._eos = eos_ids(tokenizer)
        self._first: dict[tuple[str, ...], int] = {}  # content of a row → its first index
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad in self._eos:
            self._report(-1, "tokenizer", "pad_is_eos", f"token id {pad} is both")

    def check_row(self, index: int, row: Row | ExampleError) -> None:
        """Encode a row and report each problem of it."""
        self.n_rows += 1
        if isinstance(row, ExampleError):
            self._report_error(index, "", row)
            return
        try:
            encoders = row_encoders(self.tokenizer, row, self.fields, self.options)
        except Exception as error:
            self._report_error(index, "", error)
            return
        examples: dict[str, Example] = {}
        for name, encoder in encoders:
            try:
                examples[name] = encoder()
            except Exception as error:  # a broken tokenizer or template is a finding too
                self._report_error(index, name, error)
        for name, example in examples.items():
            self._check_example(index, name, example)
        pair = [examples[name].content_id for name in ("chosen", "rejected") if name in examples]
        if len(pair) == 2 and pair[0] == pair[1]:
            self._report(index, "rejected", "identical_pair", "chosen and rejected are the same")
        if examples and len(examples) == len(encoders):
            content = tuple(f"{name}:{example.content_id}" for name, example in examples.items())
            first = self._first.setdefault(content, index)
            if first != index:
                self._report(index, "", "duplicate", f"same as row {first}")

    def _check_example(self, index: int, name: str, example: Example) -> None:
        """Report the problems of a response that could be encoded."""
        ended = bool(self._eos & set(example.targets))
        self.n_responses += 1
        self.n_eos_counted += ended
        notes = dict(example.notes)
        for code, detail in example.notes:
            if code in _PROBLEMS:
                self._report(index, name, code, detail)
        if self.tokenizer is not None:
            text = self.tokenizer.decode([t for t in example.targets if t not in self._eos])
            if not text.strip():
                self._report(index, name, "blank_response", f"{text!r}")
        if self._eos and not ended and "eos_lost" not in notes:
            last = example.response_ids[-1]
            detail = f"the response ends in token id {last}, not in EOS {sorted(self._eos)}"
            self._report(index, name, "eos_not_counted", detail)
        for vocab_size, max_positions in ((self.vocab_size, None), (None, self.max_positions)):
            try:
                example.check_model_limits(vocab_size, max_positions)
            except ExampleError as error:
                self._report_error(index, name, error)

    def _report_error(self, index: int, name: str, error: Exception) -> None:
        """Report an exception met while reading or encoding the field `name`."""
        if isinstance(error, ExampleError):
            problem = error.problem if error.problem in _PROBLEMS else "invalid"
            self._report(index, error.field or name, problem, str(error))
        else:
            self._report(index, name, "invalid", f"{type(error).__name__}: {error}")

    def _report(self, index: int, name: str, problem: str, detail: str) -> None:
        severity = "error" if _PROBLEMS[problem][1] else "warning"
        self.findings[Finding(index, name, problem, detail, severity)] = None
