"""Checking a data set for rows that would train badly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lddyn.data.encode import RowOptions, Truncation, eos_ids
from lddyn.data.example import Example
from lddyn.data.read import iter_rows
from lddyn.data.rows import row_jobs
from lddyn.errors import ExampleError

__all__ = ["Audit", "Finding", "audit"]

# problem: (what it means, whether the row cannot be used)
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
    "truncated_prompt": ("the prompt was cut", False),
    "truncated_response": ("the response was cut", False),
    "eos_lost": ("truncation removed the EOS: the model is not taught to stop", False),
    "eos_not_counted": ("no EOS among the counted tokens: the model is not taught to stop", False),
    "pad_is_eos": ("pad and EOS are one token: a collator that masks pad masks EOS too", False),
    "boundary_merge": ("tokens merge across the end of the prompt", False),
    "template_rewrite": ("the chat template renders earlier turns differently later", False),
    "duplicate": ("the same prompt and responses as an earlier row", False),
}


@dataclass(frozen=True)
class Finding:
    """One line of the audit: what is wrong, and where.

    Attributes:
        row: Index of the row, from 0; -1 when it concerns the whole data set.
        field: Column at fault, `""` for the whole row.
        problem: Code of the problem.
        detail: What was found.
        severity: `"error"` when the row cannot be used, `"warning"` when it can.
    """

    row: int
    field: str
    problem: str
    detail: str
    severity: str = "warning"


@dataclass(frozen=True)
class Audit:
    """What `audit` found in a data set: a table of findings, and the counts behind the shares.

    Attributes:
        n_rows: Rows read, unreadable ones included.
        n_responses: Responses that could be encoded.
        n_eos_counted: Of these, how many have an EOS among the counted tokens.
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
        """Whether nothing was found."""
        return not self.findings

    def of(self, problem: str) -> tuple[Finding, ...]:
        """Findings with the given code."""
        return tuple(f for f in self.findings if f.problem == problem)

    def summary(self) -> dict[str, int]:
        """Number of rows with each problem (1 for a problem of the whole set), worst first.

        Errors come first, then the more frequent.
        """
        affected: dict[str, set[int]] = {}
        for finding in self.findings:
            affected.setdefault(finding.problem, set()).add(finding.row)
        counts = Counter({problem: len(found) for problem, found in affected.items()})
        order = sorted(counts, key=lambda problem: (not _PROBLEMS[problem][1], -counts[problem]))
        return {problem: counts[problem] for problem in order}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the audit as JSON text; `from_json` reads it back."""
        payload = {
            "n_rows": self.n_rows,
            "n_responses": self.n_responses,
            "n_eos_counted": self.n_eos_counted,
            "unusable": list(self.unusable),
            "summary": self.summary(),
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(payload, ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Audit:
        """Read back what `to_json` wrote."""
        payload = json.loads(text)
        findings = tuple(Finding(**finding) for finding in payload["findings"])
        return cls(payload["n_rows"], payload["n_responses"], payload["n_eos_counted"], findings)

    def __str__(self) -> str:
        """The table, one line per problem with its first occurrence."""
        head = f"audit: {self.n_rows} rows, {self.n_responses} responses"
        if self.n_responses:
            share = 100.0 * self.n_eos_counted / self.n_responses
            head += f", EOS counted in {share:.1f} %"
        head += f", {len(self.unusable)} rows unusable"
        if not self.findings:
            return head + "; nothing found"
        lines = [head]
        for problem, count in self.summary().items():
            meaning, error = _PROBLEMS[problem]
            first = self.of(problem)[0]
            place = "whole set" if first.row < 0 else f"row {first.row}"
            if first.field:
                place += f" {first.field}"
            mark = "error" if error else "warn "
            lines.append(f"  {mark} {problem:<24}{count:>7}  {meaning}")
            lines.append(f"          first: {place}: {first.detail}")
        return "\n".join(lines)


def audit(
    tokenizer: Any,
    rows: Any,
    fields: Sequence[str] | Literal["all"] | None = None,
    *,
    add_eos: bool = True,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_end",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    assistant_only: bool = True,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    config: Any = None,
) -> Audit:
    """List what is wrong with a data set, as the trainer would see it; a bad row is a line.

    Looks for rows that cannot be read or encoded, empty and blank responses, identical and
    duplicate pairs, truncation and the EOS lost by it, responses whose EOS is not in the loss, pad
    = EOS, tokens that merge across the end of the prompt, and examples that a model cannot read.

    Args:
        tokenizer: A transformers tokenizer, or anything that behaves like one.
        rows: The data, in anything that `lddyn.data.read.rows` reads.
        fields: As in `encode_row`.
        add_eos: As in `encode`.
        max_length: As in `encode`.
        max_prompt_length: As in `encode`.
        truncation: As in `encode`.
        chat_template_kwargs: As in `encode`.
        tools: As in `encode`.
        assistant_only: As in `encode`.
        vocab_size: Rows of the model's embedding. Default: from `config`, else not checked.
        max_positions: The model's context. Default: from `config`, else not checked.
        config: A model's config, for `vocab_size` and `max_position_embeddings`.

    Returns:
        The table; print it, or use `summary()`, `unusable`, `to_json()`.

    Cost: two tokenisations per response.

    Example:
        >>> from lddyn.data.audit import audit
        >>> table = [{"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [6, 2]}]
        >>> audit(None, table).summary()
        {'identical_pair': 1}
    """
    options = RowOptions(
        add_eos=add_eos,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
        assistant_only=assistant_only,
        texts=False,
    )
    if config is not None:
        text_config = getattr(config, "text_config", None) or config
        if vocab_size is None:
            vocab_size = getattr(text_config, "vocab_size", None)
        if max_positions is None:
            max_positions = getattr(text_config, "max_position_embeddings", None)
    eos = eos_ids(tokenizer)
    findings: dict[Finding, None] = {}  # ordered; the prompt's fault is one, not one a response

    def report(row: int, name: str, problem: str, detail: str) -> None:
        severity = "error" if _PROBLEMS[problem][1] else "warning"
        findings[Finding(row, name, problem, detail, severity)] = None

    if eos and getattr(tokenizer, "pad_token_id", None) in eos:
        report(-1, "tokenizer", "pad_is_eos", f"token id {tokenizer.pad_token_id} is both")
    n_rows = n_responses = n_eos = 0
    seen: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(iter_rows(rows)):
        n_rows += 1
        examples: dict[str, Example] = {}
        try:
            if isinstance(row, ExampleError):
                raise row
            jobs = row_jobs(tokenizer, row, fields, options)
        except Exception as error:
            report(index, *_as_finding(error, ""))
            continue
        for name, job in jobs:
            try:
                examples[name] = job()
            except Exception as error:  # a broken tokenizer or template is a finding too
                report(index, *_as_finding(error, name))
        for name, example in examples.items():
            n_responses += 1
            n_eos += bool(eos & set(example.targets))
            for problem, detail in _check_example(tokenizer, example, eos):
                report(index, name, problem, detail)
            for vocabulary, context in ((vocab_size, None), (None, max_positions)):
                try:
                    example.check_model_limits(
                        vocabulary if vocabulary is not None else 2**63, context
                    )
                except ExampleError as error:
                    report(index, name, error.problem, str(error))
        pair = [examples[name].content_id for name in ("chosen", "rejected") if name in examples]
        if len(pair) == 2 and pair[0] == pair[1]:
            report(index, "rejected", "identical_pair", "chosen and rejected are the same")
        if examples and len(examples) == len(jobs):
            key = tuple(f"{name}:{example.content_id}" for name, example in examples.items())
            first = seen.setdefault(key, index)
            if first != index:
                report(index, "", "duplicate", f"same as row {first}")
    return Audit(n_rows, n_responses, n_eos, tuple(findings))


def _as_finding(error: Exception, name: str) -> tuple[str, str, str]:
    """(field, problem, detail) of an exception met while encoding `name`."""
    if isinstance(error, ExampleError):
        problem = error.problem if error.problem in _PROBLEMS else "invalid"
        return error.field or name, problem, str(error)
    return name, "invalid", f"{type(error).__name__}: {error}"


def _check_example(tokenizer: Any, example: Example, eos: set[int]) -> Iterator[tuple[str, str]]:
    """Yield (problem, detail) of an example that could be encoded."""
    codes = set()
    for code, detail in example.notes:
        codes.add(code)
        if code in _PROBLEMS:
            yield code, detail
    if tokenizer is not None:
        text = tokenizer.decode([t for t in example.targets if t not in eos])
        if not text.strip():
            yield "blank_response", f"{text!r}"
    if eos and "eos_lost" not in codes and not eos & set(example.targets):
        yield (
            "eos_not_counted",
            f"the response ends in token id {example.response_ids[-1]}, not in EOS {sorted(eos)}",
        )
