"""One data row of any supported format to examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lddyn.data.encode import (
    RowOptions,
    Truncation,
    append_eos,
    check_messages,
    common_prefix,
    describe,
    encode_chat,
    encode_with,
    finish,
    is_messages,
    tokenize_text,
)
from lddyn.data.example import IGNORED_LABEL, Example, token_ids
from lddyn.errors import EmptyResponseError, ExampleError

__all__ = ["encode_row"]

_ID_TRIPLES = (  # columns a preference trainer prepares, new and old spelling
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)

_FORMATS = (
    "{text} | {messages} | {prompt, completion} | {prompt, completion, label} | "
    "{prompt, chosen, rejected} | {chosen, rejected} | "
    "{input_ids, labels or completion_mask} | "
    "{prompt_ids, chosen_ids, rejected_ids} | {prompt, plus the columns named in fields}"
)


def encode_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    fields: Sequence[str] | Literal["all"] | None = None,
    *,
    add_eos: bool = True,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_end",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    assistant_only: bool = True,
    skip_empty: bool = False,
) -> dict[str, Example]:
    """Encode one data row, in any format that TRL takes, as a dict from field to `Example`.

    | columns | fields |
    |---|---|
    | `text` | `text`: the first token is the prompt |
    | `messages` (or `conversations`) | `messages`: up to the first assistant turn is the prompt |
    | `prompt`, `completion` (also with `label`) | `completion` |
    | `prompt`, `chosen`, `rejected` | `chosen`, `rejected` |
    | `chosen`, `rejected` | the same; the common beginning is the prompt |
    | `input_ids` with `labels`, `completion_mask` or `assistant_masks` | `input_ids`; \
`document_0`, `document_1`, ... of a packed row |
    | `prompt_ids`, `chosen_ids`, `rejected_ids` (or `prompt_input_ids`, ...) | `chosen`, \
`rejected` |

    Args:
        tokenizer: A transformers tokenizer, or anything that behaves like one.
        row: The row. Its own `tools` and `chat_template_kwargs` columns are honoured.
        fields: Further text columns to encode as responses to the same prompt (a probing set:
            `"irr_train"`, `"random_permute"`, ...); `"all"` for every text column. None: only the
            format's own.
        add_eos: As in `encode`.
        max_length: As in `encode`.
        max_prompt_length: As in `encode`.
        truncation: As in `encode`.
        chat_template_kwargs: As in `encode`.
        tools: As in `encode`.
        assistant_only: As in `encode`.
        skip_empty: Leave out fields whose response is empty (sampled probing sets have some)
            instead of raising.

    Returns:
        The examples by field; each carries its field as `Example.name`.

    Raises:
        ExampleError: (a ValueError) If a column is missing or holds no text, or as in `encode`;
            `error.field` is the column.

    Example:
        >>> from lddyn.data.rows import encode_row
        >>> row = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}
        >>> encode_row(None, row)["rejected"].response_ids
        (7, 2)
    """
    options = RowOptions(
        add_eos=add_eos,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
        assistant_only=assistant_only,
        texts=tokenizer is not None,
    )
    encoded = {}
    for name, job in row_jobs(tokenizer, row, fields, options):
        try:
            encoded[name] = job()
        except EmptyResponseError:
            if not skip_empty:
                raise
    return encoded


Jobs = list[tuple[str, Callable[[], Example]]]


def row_jobs(
    tokenizer: Any, row: Mapping[str, Any], fields: Sequence[str] | str | None, options: RowOptions
) -> Jobs:
    """Recognise the format; return (field, how to encode it), so that one failure stays one."""
    prepared = _id_jobs(tokenizer, row, options)
    if prepared:
        return prepared
    options = _row_options(row, options)
    own, extra, prompt, responses = _responses(row, fields)
    jobs: Jobs = []
    for name in (*own, *extra):
        others = [responses[other] for other in own if other != name] if name in own else []
        jobs.append((name, _text_job(tokenizer, prompt, responses[name], name, options, others)))
    return jobs


def _text_job(
    tokenizer: Any, prompt: Any, response: Any, name: str, options: RowOptions, others: list[Any]
) -> Callable[[], Example]:
    """Encode one response later; `prompt` None means the whole text or conversation is given."""

    def job() -> Example:
        if prompt is not None:
            return encode_with(tokenizer, prompt, response, name, options, others)
        if isinstance(response, str):
            return _encode_whole(tokenizer, response, name, options)
        messages = check_messages(name, response) if is_messages(response) else []
        if not messages:
            raise ExampleError(
                f"{name} must be text or a list of chat messages, got {describe(response)}",
                problem="not_text",
                field=name,
            )
        roles = [message["role"] for message in messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        return encode_chat(tokenizer, messages[:first], messages[first:], name, options)

    return job


def _encode_whole(tokenizer: Any, text: str, name: str, options: RowOptions) -> Example:
    """Encode text without a prompt: every token after the first counts."""
    notes: list[tuple[str, str]] = []
    full = tokenize_text(tokenizer, text) if text else []
    if full and options.add_eos:
        append_eos(tokenizer, full, notes)
    if len(full) < 2:
        raise EmptyResponseError(
            f"{name} must have at least 2 tokens (the first is only read), got {len(full)}: drop "
            "the row",
            field=name,
        )
    return finish(tokenizer, full, 1, None, notes, name, options)


def _row_options(row: Mapping[str, Any], options: RowOptions) -> RowOptions:
    """Options with the row's own tools and chat_template_kwargs."""
    tools = row.get("tools") or options.tools
    if isinstance(tools, str):
        tools = json.loads(tools)
    extra = row.get("chat_template_kwargs") or {}
    if tools is options.tools and not extra:
        return options
    merged = {**dict(options.chat_template_kwargs or {}), **dict(extra)}
    values = {**options.__dict__, "tools": tools, "chat_template_kwargs": merged or None}
    return RowOptions(**values)


def _missing(column: str, row: Mapping[str, Any]) -> ExampleError:
    """Error for a column that is not there."""
    return ExampleError(
        f"row must have a column {column!r}, got {sorted(map(str, row))}; formats: {_FORMATS}",
        problem="missing_column",
        field=column,
    )


def _responses(
    row: Mapping[str, Any], fields: Sequence[str] | str | None
) -> tuple[list[str], list[str], Any, dict[str, Any]]:
    """Recognise a text format: (own fields, further fields, prompt or None, response by field)."""
    every = isinstance(fields, str) and fields == "all"
    named = [] if every or fields is None else [fields] if isinstance(fields, str) else list(fields)
    for name in named:
        if name not in row:
            raise _missing(name, row)
    prompt = row.get("prompt")
    own: list[str] = []
    if "chosen" in row or "rejected" in row:
        for column in ("chosen", "rejected"):
            if column in row:
                own.append(column)
            elif not named:
                raise _missing(column, row)
        if len(own) == 2 and (
            "prompt" not in row or (isinstance(prompt, str) and is_messages(row["chosen"]))
        ):
            prompt, chosen, rejected = _split_prompt(row["chosen"], row["rejected"])
            responses = {**row, "chosen": chosen, "rejected": rejected}
        else:
            responses = dict(row)
        if prompt is None and "prompt" not in row:
            raise _missing("prompt", row)
    elif "completion" in row or ("prompt" in row and (named or every)):
        if "prompt" not in row:
            raise _missing("prompt", row)
        own, responses = (["completion"] if "completion" in row else []), dict(row)
    elif "prompt" in row:
        raise _missing("completion", row)
    else:
        for column in ("messages", "conversations", "text"):
            if column in row:
                name = "text" if column == "text" else "messages"
                if named:
                    raise _missing("prompt", row)
                return [name], [], None, {name: row[column]}
        raise _missing("prompt", row)
    if prompt is None:
        raise ExampleError(
            "prompt must be text or a list of chat messages, got None",
            problem="not_text",
            field="prompt",
        )
    if every:
        named = [name for name, value in row.items() if isinstance(value, str) and name != "prompt"]
    extra = [name for name in dict.fromkeys(named) if name not in own]
    return own, extra, prompt, responses


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two full texts or conversations at the end of their common beginning."""
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str) and not is_messages(value):
            raise ExampleError(
                f"{name} must be text or a list of chat messages, got {describe(value)}",
                problem="not_text",
                field=name,
            )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ExampleError(
            f"chosen and rejected must both be text or both messages, got {describe(chosen)} and "
            f"{describe(rejected)}",
            problem="not_text",
            field="rejected",
        )
    shared = common_prefix(chosen, rejected)
    if chosen == rejected:
        if isinstance(chosen, str):
            raise ExampleError(
                "chosen and rejected must differ when there is no prompt column, got identical "
                "text: where the prompt ends cannot be told",
                problem="identical_pair",
                field="rejected",
            )
        shared = len(chosen) - 1
    elif isinstance(chosen, str):
        if shared and chosen[shared - 1] == " ":
            shared -= 1  # the space belongs to the response's first word
    else:
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _id_jobs(tokenizer: Any, row: Mapping[str, Any], options: RowOptions) -> Jobs:
    """Recognise a pre-tokenised row; empty when it is none."""
    for prompt, chosen, rejected in _ID_TRIPLES:
        if chosen in row or rejected in row:
            for column in (prompt, chosen, rejected):
                if column not in row:
                    raise _missing(column, row)
            return [
                ("chosen", _id_job(tokenizer, row[prompt], row[chosen], None, "chosen", options)),
                (
                    "rejected",
                    _id_job(tokenizer, row[prompt], row[rejected], None, "rejected", options),
                ),
            ]
    if "completion_ids" in row:
        if "prompt_ids" not in row:
            raise _missing("prompt_ids", row)
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        return [("completion", _id_job(tokenizer, prompt, completion, None, "completion", options))]
    if "input_ids" not in row:
        return []
    ids = token_ids("input_ids", row["input_ids"])
    counted = _counted_tokens(row, ids)
    pieces = _documents(row, len(ids))
    jobs: Jobs = []
    for index, (begin, end) in enumerate(pieces):
        name = "input_ids" if len(pieces) == 1 else f"document_{index}"
        job = _masked_job(tokenizer, ids[begin:end], counted[begin:end], name, options)
        jobs.append((name, job))
    return jobs


def _id_job(
    tokenizer: Any, prompt: Any, response: Any, mask: Any, name: str, options: RowOptions
) -> Callable[[], Example]:
    """Make one example of ids later."""

    def job() -> Example:
        left, right = token_ids("prompt_ids", prompt), token_ids(f"{name}_ids", response)
        if not left or not right:  # Example says what is wrong
            return Example(left, right, name=name)
        return finish(tokenizer, [*left, *right], len(left), mask, [], name, options)

    return job


def _masked_job(
    tokenizer: Any, ids: Sequence[int], counted: Sequence[bool], name: str, options: RowOptions
) -> Callable[[], Example]:
    """Make one example of ids and their loss mask later; the prompt ends where counting begins."""

    def job() -> Example:
        chosen = [index for index, value in enumerate(counted) if value and index > 0]
        if not chosen:
            raise EmptyResponseError(
                f"{name} must count at least 1 token after the first, got none in {len(ids)}: the "
                "loss mask is empty; drop the row",
                field=name,
            )
        start, stop = chosen[0], chosen[-1] + 1  # nothing after the last counted token matters
        mask = [bool(value) for value in counted[start:stop]]
        return finish(tokenizer, list(ids[:stop]), start, mask, [], name, options)

    return job


def _counted_tokens(row: Mapping[str, Any], ids: tuple[int, ...]) -> list[bool]:
    """Which tokens of a pre-tokenised row are in the loss, from its label and mask columns."""
    columns = ("attention_mask", "labels", "completion_mask", "assistant_masks")
    counted = [True] * len(ids)
    for column in columns:
        values = row.get(column)
        if values is None:
            continue
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(values) != len(ids):
            raise ExampleError(
                f"{column} must have {len(ids)} entries, one per input id, got {len(values)}",
                problem="bad_mask",
                field=column,
            )
        if column == "labels":
            for index, (label, token) in enumerate(zip(values, ids, strict=True)):
                if label not in (IGNORED_LABEL, token):
                    raise ExampleError(
                        f"labels[{index}] must be input_ids[{index}] = {token} or {IGNORED_LABEL},"
                        f" got {label}: labels are not shifted in a data set",
                        problem="bad_mask",
                        field="labels",
                    )
            values = [label != IGNORED_LABEL for label in values]
        counted = [a and bool(b) for a, b in zip(counted, values, strict=True)]
    return counted


def _documents(row: Mapping[str, Any], length: int) -> list[tuple[int, int]]:
    """Where the documents of a packed row begin and end; one for a row that is not packed."""
    lengths, starts = row.get("seq_lengths"), row.get("position_ids")
    if lengths is not None:
        ends, total = [], 0
        for size in lengths:
            total += int(size)
            ends.append(total)
        if total != length:
            raise ExampleError(
                f"seq_lengths must add up to {length} input ids, got {total}",
                problem="bad_mask",
                field="seq_lengths",
            )
        begins = [0, *ends[:-1]]
    elif starts is not None:
        values = starts.tolist() if hasattr(starts, "tolist") else list(starts)
        begins = [index for index, value in enumerate(values) if value == 0] or [0]
        if begins[0] != 0:
            begins.insert(0, 0)
        ends = [*begins[1:], length]
    else:
        begins, ends = [0], [length]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if end > begin]
