"""One data row of any supported format to examples: the format is recognised by its columns.

Rows of token ids are in `lddyn.data.prepared`, how a text or conversation becomes token ids is in
`lddyn.data.encode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Unpack

from lddyn.data.chat import ChatTemplate
from lddyn.data.columns import Row
from lddyn.data.encode import encode_response, encode_whole, with_counted_prompt
from lddyn.data.example import Example
from lddyn.data.formats import Content, recognise
from lddyn.data.options import DEFAULT, RowOptions, RowSettings
from lddyn.data.prepared import Encoder, ReadRow, read_prepared
from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import EmptyResponseError, ExampleError

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
    """Encode one data row, in any format of TRL or LLaMA-Factory: field → `Example`.

    | columns | fields |
    |---|---|
    | `text` | `text`: the first token is the prompt |
    | `messages` (or `conversations`) | `messages`: up to the first assistant turn is the prompt |
    | `messages` or `conversations` with a boolean `label` | `completion`: the last turn |
    | `prompt`, `completion` (also with `label`) | `completion` |
    | `prompt`, `chosen`, `rejected` | `chosen`, `rejected` |
    | `chosen`, `rejected` | the same; the common beginning is the prompt |
    | `conversations` or `messages`, `chosen`, `rejected` | the same; the conversation is the \
prompt |
    | `chosen_messages`, `rejected_messages` | `chosen`, `rejected` |
    | `instruction`, `input`, `output` (alpaca; also `system`, `history`) | `output` |
    | `instruction`, `input`, `chosen`, `rejected` | `chosen`, `rejected` |
    | `query`, `response` (ms-swift; also `system`, `history`) | `response` |
    | `query`, `response`, `rejected_response` | `chosen`, `rejected` |
    | `messages` with `rejected_response` or `rejected_messages` | `chosen`, `rejected` |
    | `input`, `preferred_output`, `non_preferred_output` (OpenAI) | `chosen`, `rejected` |
    | `input_ids` with `labels`, `completion_mask` or `assistant_masks` | `input_ids`; \
`document_0`, `document_1`, ... of a packed row |
    | `prompt_ids`, `completion_ids` (also `completion_input_ids`) | `completion` |
    | `prompt_ids`, `chosen_ids`, `rejected_ids` (or `prompt_input_ids`, ...) | `chosen`, \
`rejected` |

    A message is {role, content}, {from, value}, or has a list of parts as its content; one whose
    `weight`, `loss_weight`, `train`, `training` or `loss` is 0 or false does not count. Messages
    may be JSON in a text. Token ids may have masks:
    tokens whose `attention_mask` or `prompt_mask` is 0 are not read, values above 1 number the
    documents of a packed row; `labels` of -100, `completion_mask`, `assistant_masks` say which
    tokens count.

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
    for name, encoder in read_row(tokenizer, row, fields, options).encoders:
        try:
            examples[name] = encoder()
        except EmptyResponseError:
            if not skip_empty:
                raise
    return examples


def read_row(
    tokenizer: Tokenizer | None,
    row: Row,
    fields: Sequence[str] | str | None,
    options: RowOptions,
) -> ReadRow:
    """Recognise a row's format: an encoder for each of its responses, and the columns it reads.

    An encoder makes the field's `Example`. A field that cannot be encoded raises in its own
    encoder and leaves the others usable.

    Raises:
        ExampleError: If the format is not recognised or one of its columns is missing.
    """
    read = read_prepared(tokenizer, row, options)
    if read is None:
        content = recognise(row, fields)
        read = ReadRow(_content_encoders(tokenizer, content, options), set(content.reads))
    if not options.completion_only:
        read.encoders = [
            (name, partial(_count_prompt, encoder) if name == "completion" else encoder)
            for name, encoder in read.encoders
        ]
    return read


def _content_encoders(
    tokenizer: Tokenizer | None, content: Content, options: RowOptions
) -> list[tuple[str, Encoder]]:
    """(field, encoder) of each response of a row of texts or messages."""
    if tokenizer is None:
        raise ExampleError("a row of text or messages must have a tokenizer, got None")
    options = content.options(options)
    notes: tuple[tuple[str, str], ...] = ()
    template = ChatTemplate(tokenizer, kwargs=options.chat_template_kwargs)
    if content.shared and content.uses_tools and not template.reads("tool_calls"):
        content = content.with_tools_as_text()
        options = replace(options, tools=None)
        notes = (("tools_as_text", "tools and tool calls are in LLaMA-Factory's default format"),)
    return [
        (name, partial(_encode_content, tokenizer, content, name, options, notes))
        for name in content.responses
    ]


def _encode_content(
    tokenizer: Tokenizer,
    content: Content,
    name: str,
    options: RowOptions,
    notes: tuple[tuple[str, str], ...],
) -> Example:
    """The example of one field."""
    response = content.responses[name]
    if content.prompt is None:
        example = encode_whole(tokenizer, response, name, options)
    else:
        others = [content.responses[k] for k in content.paired if k != name]
        siblings = others if name in content.paired else []
        example = encode_response(tokenizer, content.prompt, response, name, options, siblings)
    return replace(example, notes=(*example.notes, *notes)) if notes else example


def _count_prompt(encoder: Encoder) -> Example:
    return with_counted_prompt(encoder())
