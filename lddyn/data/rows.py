"""One data row of any supported format to examples: the format is recognised by its columns.

Rows of token ids are in `lddyn.data.prepared`, how a text or conversation becomes token ids is in
`lddyn.data.encode`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Unpack

from lddyn.data.chat import common_prefix_length, is_messages
from lddyn.data.columns import WHOLE, Row, missing_column, require_columns
from lddyn.data.encode import encode_response, encode_whole, not_text, with_counted_prompt
from lddyn.data.example import Example
from lddyn.data.options import DEFAULT, RowOptions, RowSettings
from lddyn.data.prepared import Encoder, prepared_encoders
from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import EmptyResponseError, ExampleError, glimpse

__all__ = ["encode_row"]


def encode_row(
    tokenizer: Tokenizer | None,
    row: Row,
    fields: Sequence[str] | Literal["all"] | None = None,
    options: RowOptions = DEFAULT,
    *,
    skip_empty: bool = False,
    **settings: Unpack[RowSettings],
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
        tokenizer: A transformers tokenizer, or an object with the same methods. None is enough for
            rows of token ids.
        row: The row. Its own `tools` and `chat_template_kwargs` columns are used.
        fields: Further text columns to encode as responses to the same prompt (a probing set:
            `"irr_train"`, `"random_permute"`, ...); `"all"` for every text column. None: only the
            columns of the format.
        options: How texts become token ids, and which of them are counted.
        skip_empty: Leave out fields whose response is empty (a sampled probing set has some)
            instead of raising.
        settings: Fields of `RowOptions`, in place of those of `options`.

    Returns:
        The examples by field; the field is also the `Example.name`.

    Raises:
        ExampleError: (a ValueError) If a column is missing or holds no text, or as in `encode`;
            `error.field` is the column.

    Example:
        >>> from lddyn.data.rows import encode_row
        >>> row = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}
        >>> encode_row(None, row)["rejected"].response_ids
        (7, 2)
    """
    options = options.with_settings(settings)
    if tokenizer is None:
        options = replace(options, texts=False)
    examples = {}
    for name, encoder in row_encoders(tokenizer, row, fields, options):
        try:
            examples[name] = encoder()
        except EmptyResponseError:
            if not skip_empty:
                raise
    return examples


def row_encoders(
    tokenizer: Tokenizer | None,
    row: Row,
    fields: Sequence[str] | str | None,
    options: RowOptions,
) -> list[tuple[str, Encoder]]:
    """Recognise a row's format and return (field, encoder) of each of its responses.

    An encoder makes the field's `Example`. A field that cannot be encoded raises in its own
    encoder and leaves the others usable.

    Raises:
        ExampleError: If the format is not recognised or one of its columns is missing.
    """
    encoders = prepared_encoders(tokenizer, row, options)
    if not encoders:
        content = _recognise(row, fields)
        if tokenizer is None:
            raise ExampleError("a row of text or messages must have a tokenizer, got None")
        options = _with_row_options(options, row)
        encoders = [(name, content.encoder(tokenizer, name, options)) for name in content.responses]
    if options.completion_only:
        return encoders
    return [
        (name, partial(_count_prompt, encoder) if name == "completion" else encoder)
        for name, encoder in encoders
    ]


def _count_prompt(encoder: Encoder) -> Example:
    return with_counted_prompt(encoder())


@dataclass(frozen=True)
class _Content:
    """Texts or conversations of a row.

    Attributes:
        prompt: Text or messages. None: each response is a whole text or conversation.
        responses: Text or messages of each field.
        paired: Fields whose responses have one prompt, to the token: chosen and rejected.
    """

    prompt: object
    responses: Mapping[str, object]
    paired: Sequence[str] = ()

    def encoder(self, tokenizer: Tokenizer, name: str, options: RowOptions) -> Encoder:
        """Encoder of one field."""
        response = self.responses[name]
        if self.prompt is None:
            return partial(encode_whole, tokenizer, response, name, options)
        others = [self.responses[k] for k in self.paired if k != name and name in self.paired]
        return partial(encode_response, tokenizer, self.prompt, response, name, options, others)


def _recognise(row: Row, fields: Sequence[str] | str | None) -> _Content:
    """The content of a row of texts or messages, whose columns tell the format."""
    every = fields == "all"
    named = [] if fields is None or every else [fields] if isinstance(fields, str) else list(fields)
    require_columns(row, *named)
    if "chosen" in row or "rejected" in row:
        content = _preference(row, one_is_enough=bool(named))
    elif "completion" in row:
        require_columns(row, "prompt")
        content = _Content(row["prompt"], {"completion": row["completion"]})
    elif "prompt" in row:
        if not (named or every):
            raise missing_column("completion", row)
        content = _Content(row["prompt"], {})
    else:
        column = next((c for c in WHOLE if c in row), None)
        if column is None or named:
            raise missing_column("prompt", row)
        return _Content(None, {WHOLE[column]: row[column]})
    if content.prompt is None:
        raise not_text("prompt", None)
    if every:
        named = [name for name, value in row.items() if isinstance(value, str) and name != "prompt"]
    further = {name: row[name] for name in named if name not in content.responses}
    return replace(content, responses={**content.responses, **further})


def _preference(row: Row, one_is_enough: bool) -> _Content:
    """Prompt, chosen and rejected; without a prompt column, their common beginning is the prompt.

    Args:
        row: A row with at least one of the columns chosen and rejected.
        one_is_enough: Whether the other one may be missing.
    """
    own = [column for column in ("chosen", "rejected") if column in row]
    if not one_is_enough:
        require_columns(row, "chosen", "rejected")
    responses = {name: row[name] for name in own}
    prompt = row.get("prompt")
    # A text beside whole conversations repeats their first turn.
    beside = isinstance(prompt, str) and is_messages(responses.get("chosen"))
    if len(own) == 2 and ("prompt" not in row or beside):
        prompt, *split = _split_prompt(row["chosen"], row["rejected"])
        return _Content(prompt, dict(zip(own, split, strict=True)), own)
    require_columns(row, "prompt")
    return _Content(prompt, responses, own)


def _split_prompt(chosen: object, rejected: object) -> tuple[object, object, object]:
    """(prompt, chosen, rejected) of two whole texts or conversations with a common beginning."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if chosen == rejected:
            raise ExampleError(
                "chosen and rejected must differ when there is no prompt column, got identical "
                "text: where the prompt ends cannot be told",
                problem="identical_pair",
                field="rejected",
            )
        shared = common_prefix_length(chosen, rejected)
        if shared and chosen[shared - 1] == " ":
            shared -= 1  # the space belongs to the response's first word
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if is_messages(chosen) and is_messages(rejected):
        # Each response has a message at least, also where one conversation begins the other.
        most = min(len(chosen), len(rejected)) - 1
        shared = min(common_prefix_length(chosen, rejected), most)
        return chosen[:shared], chosen[shared:], rejected[shared:]
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str) and not is_messages(value):
            raise not_text(name, value)
    raise ExampleError(
        f"chosen and rejected must both be text or both messages, got {glimpse(chosen)} and "
        f"{glimpse(rejected)}",
        problem="not_text",
        field="rejected",
    )


def _with_row_options(options: RowOptions, row: Row) -> RowOptions:
    """Options with the row's own tools and chat_template_kwargs."""
    tools = row.get("tools") or options.tools
    if isinstance(tools, str):
        tools = json.loads(tools)
    kwargs = {**(options.chat_template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
    return replace(options, tools=tools, chat_template_kwargs=kwargs or None)
