"""Checking a data set for rows that would train badly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack

from lddyn.data.checks import (
    DEFAULT_MAX_LENGTH,
    check_pair,
    check_response,
    check_scores,
    swapped,
)
from lddyn.data.columns import (
    MASKS,
    REFERENCE,
    SCORES,
    Row,
    feedback_label,
    reference_log_probs,
    unread_columns,
)
from lddyn.data.context import position_limit, text_config
from lddyn.data.example import Example
from lddyn.data.findings import PROBLEMS, Audit, Finding
from lddyn.data.options import DEFAULT, RowOptions, RowSettings
from lddyn.data.prepared import ReadRow
from lddyn.data.read import Source, placed_rows
from lddyn.data.rows import read_row
from lddyn.data.token_facts import TokenFacts
from lddyn.data.tokenizer import Tokenizer, as_ids
from lddyn.errors import ExampleError

__all__ = ["Audit", "Finding", "audit"]

_SCORES = frozenset(column for columns in SCORES for column in columns)


def audit(
    tokenizer: Tokenizer | None,
    rows: Source,
    fields: Sequence[str] | Literal["all"] | None = None,
    options: RowOptions = DEFAULT,
    *,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    config: object = None,
    generation_config: object = None,
    **settings: Unpack[RowSettings],
) -> Audit:
    """List the problems of a data set, as a trainer would see it.

    Errors are rows that cannot be read or encoded: missing columns, content that is no text, empty
    responses, identical pairs, pairs of different prompts, examples that the model cannot read.

    Warnings are rows that train on something else than one thinks: columns that nobody reads,
    special tokens or role headers inside a response, double or missing BOS and EOS, a common start
    of both responses, nearly identical, tied, swapped and duplicate pairs, truncation and the EOS
    lost by it, what TRL's default `max_length` would cut, tokens that merge across the end of the
    prompt.

    Notes are worth knowing. A bad row is a finding; it never raises.

    Args:
        tokenizer: A transformers tokenizer, or an object with the same methods. None is enough for
            rows of token ids.
        rows: The data: anything that `lddyn.rows` reads.
        fields: As in `encode_row`.
        options: As in `encode_row`.
        vocab_size: Rows of the model's embedding. None: that of `config`, or not checked.
        max_positions: Longest sequence of the model. None: that of `config`, or not checked.
        config: A model's config, for `vocab_size`, `max_position_embeddings` and `eos_token_id`.
        generation_config: A model's generation config, for its `eos_token_id`.
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
    text = text_config(config)
    if vocab_size is None:
        vocab_size = getattr(text, "vocab_size", None)
    if max_positions is None:
        max_positions = position_limit(config)
    stops = as_ids(getattr(text, "eos_token_id", None))
    stops |= as_ids(getattr(generation_config, "eos_token_id", None))
    checks = _Checks(tokenizer, fields, options, (vocab_size, max_positions), stops)
    for index, (where, row) in enumerate(placed_rows(rows)):
        checks.check_row(index, "" if where == f"row {index}" else where, row)
    return checks.audit()


class _Checks:
    """The checks of one audit, with what they have counted so far.

    Attributes:
        findings: The findings in order, as keys: a fault of the prompt, which every response of a
            row meets, is one finding.
        facts: What is known of the tokens.
        counts: Numbers of an `Audit`: rows, responses, responses with EOS, tokens, counted tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        fields: Sequence[str] | str | None,
        options: RowOptions,
        limits: tuple[int | None, int | None],
        stops: set[int],
    ) -> None:
        self.tokenizer, self.fields, self.options = tokenizer, fields, options
        self.limits = limits
        self.facts = TokenFacts.of(tokenizer, options, stops)
        self.findings: dict[Finding, None] = {}
        self.counts = dict.fromkeys(("rows", "responses", "ended", "tokens", "counted"), 0)
        self._first: dict[tuple[str, ...], int] = {}  # content of a row → its first index
        self._pairs: dict[tuple[object, ...], int] = {}  # (prompt, chosen, rejected) → its row
        self._unread: set[tuple[str, ...]] = set()  # sets of columns that have been named
        self._once: set[str] = set()  # problems of the whole set that have been named
        self._row, self._where = 0, ""  # the row that is being checked

    def audit(self) -> Audit:
        """What has been found."""
        if not self.counts["rows"]:
            self._report_once("no_rows", "got 0 rows: an empty file, or a header alone")
        counts = self.counts
        return Audit(
            n_rows=counts["rows"],
            n_responses=counts["responses"],
            n_eos_counted=counts["ended"],
            n_tokens=counts["tokens"],
            n_counted=counts["counted"],
            findings=tuple(self.findings),
        )

    def check_row(self, index: int, where: str, row: Row | ExampleError) -> None:
        """Encode a row and report each problem of it.

        Args:
            index: Number of the row.
            where: File and line; `""`: not from a file.
            row: The row, or why it cannot be read.
        """
        self._row, self._where = index, where
        self.counts["rows"] += 1
        if isinstance(row, ExampleError):
            self._report_error("", row)
            return
        try:
            read = read_row(self.tokenizer, row, self.fields, self.options)
        except Exception as error:
            self._report_error("", error)
            return
        examples: dict[str, Example] = {}
        for name, encoder in read.encoders:
            try:
                examples[name] = encoder()
            except Exception as error:  # a broken tokenizer or template is a finding too
                self._report_error(name, error)
        for name, example in examples.items():
            self._check_example(name, example, row)
        for code, name, detail in read.notes:
            self._report(name, code, detail)
        if {"chosen", "rejected"} <= set(examples):
            self._check_pair(row, examples)
        if examples and len(examples) == len(read.encoders):
            content = tuple(f"{name}:{example.content_id}" for name, example in examples.items())
            first = self._first.setdefault(content, index)
            if first != index:
                self._report("", "duplicate", f"same as row {first}")
        self._check_columns(row, read)

    def _check_example(self, name: str, example: Example, row: Row) -> None:
        """Report the problems of a response that could be encoded."""
        ended = bool(self.facts.ends & set(example.targets))
        found = {
            "responses": 1,
            "ended": int(ended),
            "tokens": example.length,
            "counted": len(example),
        }
        for key, count in found.items():
            self.counts[key] += count
        for code, detail in example.notes:
            if code == "other_key":
                if (detail,) not in self._unread:
                    self._report(name, code, detail)
                self._unread.add((detail,))
            elif code in PROBLEMS:
                self._report(name, code, detail)
        is_sequence = name == "input_ids" or name.startswith("document_")
        whole = name == "text" or (is_sequence and not any(row.get(mask) for mask in MASKS))
        whole |= name == "messages" and not self.options.assistant_only
        for code, detail in check_response(example, self.facts, self.tokenizer, whole=whole):
            place = "prompt" if code in ("double_bos", "missing_bos") and "prompt" in row else name
            self._report(place, code, detail)
        self._check_turn_end(example)
        if self.options.max_length is None and example.length > DEFAULT_MAX_LENGTH:
            left = max(0, DEFAULT_MAX_LENGTH - len(example.prompt_ids))
            self._report(
                name,
                "over_default_length",
                f"{example.length} tokens; TRL's default max_length {DEFAULT_MAX_LENGTH} keeps "
                f"{left} of {len(example.response_ids)} response tokens",
            )
        vocab_size, max_positions = self.limits
        for limits in ((vocab_size, None), (None, max_positions)):
            try:
                example.check_model_limits(*limits)
            except ExampleError as error:
                self._report_error(name, error)
        if name == "messages" and self.options.assistant_only:
            self._report_once(
                "assistant_only",
                f"{len(example)} of {example.length} tokens of row {self._row} count; "
                "assistant_only=False (--counted all) counts all but the first",
            )

    def _check_turn_end(self, example: Example) -> None:
        """Report, once, turns that end in a token which is no EOS."""
        counted = set(example.targets)
        used = self.facts.turn_ends & counted
        known = self.facts.eos | self.facts.model_ends
        if self.tokenizer is None or not used or used & self.facts.eos or counted & self.facts.eos:
            return
        names = ", ".join(repr(self.tokenizer.decode([token])) for token in sorted(used))
        if not self.facts.model_ends:
            self._report_once(
                "end_of_turn",
                f"turns end in {names}, and the tokenizer's EOS is another token: the model's "
                "generation_config must list it",
            )
        elif not used & known:
            self._report_once(
                "end_of_turn_not_eos",
                f"turns end in {names}; the model stops at {sorted(self.facts.model_ends)}",
            )

    def _check_pair(self, row: Row, examples: dict[str, Example]) -> None:
        """Report the problems of a pair."""
        pair = examples["chosen"], examples["rejected"]
        for code, detail in check_pair(*pair, self.facts, self.tokenizer):
            self._report("rejected", code, detail)
        for code, detail in (*check_scores(row), *swapped(self._pairs, examples, self._row)):
            self._report("", code, detail)

    def _check_columns(self, row: Row, read: ReadRow) -> None:
        """Report columns that are not read, and those that only some losses read."""
        reads = read.reads | _SCORES | {name for name, _ in read.encoders}
        try:
            if feedback_label(row) is False and {"label", "kto_tag"} & read.reads:
                self._report_once(
                    "undesirable", f"row {self._row} and others have a label of false"
                )
            if reference_log_probs(row) is not None:
                reads |= {*REFERENCE}
                self._report_once(
                    "row_reference",
                    "ref_chosen_logps and ref_rejected_logps are used where the reference is asked "
                    "for from the rows (--reference rows)",
                )
        except ExampleError as error:
            if error.field in read.reads or error.problem == "bad_reference":
                self._report_error(error.field, error)
            reads |= {*REFERENCE}
        unread = unread_columns(row, reads)
        losing = {name: column for name, column in unread.items() if column.lost}
        for names, code in (
            (tuple(losing), "unread_column"),
            (tuple(name for name in unread if name not in losing), "other_column"),
        ):
            if names and names not in self._unread:
                self._unread.add(names)
                listed = (
                    f"{n} ({unread[n].holds})" if unread[n].holds else n for n in sorted(names)
                )
                self._report("", code, f"not read: {', '.join(listed)}")

    def _report_error(self, name: str, error: Exception) -> None:
        """Report an exception met while reading or encoding the field `name`."""
        if isinstance(error, ExampleError):
            problem = error.problem if error.problem in PROBLEMS else "invalid"
            self._report(error.field or name, problem, str(error))
        else:
            self._report(name, "invalid", f"{type(error).__name__}: {error}")

    def _report_once(self, problem: str, detail: str) -> None:
        """Report a problem of the whole set."""
        if problem not in self._once:
            self._once.add(problem)
            self.findings[Finding(-1, "", problem, detail, PROBLEMS[problem][1])] = None

    def _report(self, name: str, problem: str, detail: str) -> None:
        severity = PROBLEMS[problem][1]
        self.findings[Finding(self._row, name, problem, detail, severity, self._where)] = None
