"""The format of a row of texts or messages, recognised by its columns: TRL's and LLaMA-Factory's.

Rows of token ids are in `lddyn.data.prepared`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lddyn.data.chat import as_plain_text
from lddyn.data.columns import (
    WHOLE,
    Row,
    feedback_label,
    missing_column,
    prompt_under_another_name,
    require_columns,
)
from lddyn.data.encode import not_text
from lddyn.data.messages import (
    Messages,
    common_prefix_length,
    is_messages,
    messages_of_json,
    parse_tools,
    to_messages,
    without_weights,
)
from lddyn.data.options import RowOptions
from lddyn.errors import ExampleError, glimpse

__all__ = ["Content", "recognise"]

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Content:
    """The texts or conversations of a row.

    Attributes:
        prompt: Text or messages. None: each response is a whole text or conversation.
        responses: Text or messages of each field.
        reads: Columns of the row that the format reads.
        paired: Fields whose responses have one prompt, to the token: chosen and rejected.
        tools: Tool descriptions of the row.
        template_kwargs: Arguments of the chat template that the row asks for.
        shared: Whether the row has ShareGPT's or LLaMA-Factory's columns; then tools become text
            where the chat template knows none, as LLaMA-Factory does.
    """

    prompt: object
    responses: Mapping[str, object]
    reads: frozenset[str]
    paired: Sequence[str] = ()
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False

    def options(self, options: RowOptions) -> RowOptions:
        """The options with the row's own tools and arguments of the chat template."""
        kwargs = {**(options.chat_template_kwargs or {}), **self.template_kwargs}
        return replace(
            options, tools=self.tools or options.tools, chat_template_kwargs=kwargs or None
        )

    @property
    def uses_tools(self) -> bool:
        """Whether the row describes tools, or calls one."""
        texts = [self.prompt, *self.responses.values()]
        messages = [message for text in texts if is_messages(text) for message in text]
        return bool(self.tools) or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)

    def with_tools_as_text(self) -> Content:
        """The row with its tools and tool calls written out."""
        tools = self.tools if self.prompt is None else None
        responses = {
            name: as_plain_text(list(map(dict, value)), tools) if is_messages(value) else value
            for name, value in self.responses.items()
        }
        prompt = self.prompt
        if is_messages(prompt):
            prompt = as_plain_text(list(map(dict, prompt)), self.tools)
        return replace(self, prompt=prompt, responses=responses, tools=None)


def recognise(row: Row, fields: Sequence[str] | str | None) -> Content:
    """The content of a row of texts or messages.

    Args:
        row: The row.
        fields: As in `encode_row`.

    Raises:
        ExampleError: If a column is missing, or holds neither text nor messages.
    """
    every = fields == "all"
    named = [] if fields is None or every else [fields] if isinstance(fields, str) else list(fields)
    require_columns(row, *named)
    row = {name: messages_of_json(value) for name, value in row.items()}
    content = _recognise_given(row, named, every)
    if every and content.prompt is not None:
        named = [k for k, v in row.items() if isinstance(v, str) and k not in content.reads]
    if content.prompt is not None:
        further = {name: row[name] for name in named if name not in content.responses}
        content = replace(
            content,
            responses={**content.responses, **further},
            reads=content.reads | set(further),
        )
    own = {"tools", "chat_template_kwargs"}
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ExampleError(
            f"chat_template_kwargs must be a mapping, got {glimpse(kwargs)}",
            field="chat_template_kwargs",
        )
    return replace(
        content,
        reads=content.reads | own,
        tools=parse_tools(row.get("tools")) or content.tools,
        template_kwargs={**content.template_kwargs, **kwargs},
    )


def _recognise_given(row: Row, named: Sequence[str], every: bool) -> Content:
    """The content of a row; joined data sets leave the columns of other formats None."""
    kept = {*_SIDES} if any(row.get(side) is not None for side in _SIDES) else set()
    if any(isinstance(row.get(name), str) for name in ("completion", *_SIDES)):
        kept.add("prompt")
    given = {k: v for k, v in row.items() if v is not None or k in kept or k in named}
    if len(given) < len(row):
        try:
            return _recognise(given, named, every)
        except ExampleError as error:
            if error.problem != "missing_column":
                raise
    return _recognise(row, named, every)


def _recognise(row: Row, named: Sequence[str], every: bool) -> Content:
    """The content of a row without further fields."""
    if {"preferred_output", "non_preferred_output"} & set(row):
        return _openai_pair(row)
    if "messages" in row and "chosen" not in row:
        if "rejected_response" in row:
            return _swift_pair(row)
        if "rejected_messages" in row:
            return _message_pair(row, "messages")
    if "chosen_messages" in row or "rejected_messages" in row:
        return _message_pair(row, "chosen_messages")
    if {"query", "response"} <= set(row) and not {"prompt", "instruction"} & set(row):
        return _query(row, bool(named) or every)
    if "instruction" in row and "prompt" not in row:
        return _alpaca(row, bool(named) or every)
    if "chosen" in row or "rejected" in row:
        whole = next((c for c in ("conversations", "messages") if is_messages(row.get(c))), None)
        beside = whole is not None and "prompt" not in row
        if whole is not None and beside and not _is_whole(row.get("chosen")):
            return _shared_pair(row, whole)
        return _preference(row, one_is_enough=bool(named))
    if "completion" in row:
        require_columns(row, "prompt")
        return _completion(row)
    column = next((c for c in WHOLE if c in row), None)
    if "prompt" in row and (named or every or column is None):
        if not (named or every):
            raise missing_column("completion", row)
        if row["prompt"] is None:
            raise not_text("prompt", None)
        return Content(row["prompt"], {}, frozenset({"prompt"}))
    if column is None or named:
        raise missing_column("prompt", row)
    return _whole(row, column)


def _completion(row: Row) -> Content:
    """Prompt and completion; a label says whether the completion is desirable."""
    label = "label" if row.get("label") is not None else "kto_tag"
    feedback_label(row)  # raises for a label that is no boolean
    prompt, completion = row["prompt"], _as_messages(row["completion"])
    if prompt is None:
        raise not_text("prompt", None)
    if isinstance(prompt, str) and is_messages(completion):
        prompt = [{"role": "user", "content": prompt}]
    reads = frozenset({"prompt", "completion", label})
    return Content(prompt, {"completion": completion}, reads)


def _whole(row: Row, column: str) -> Content:
    """A whole text or conversation; one with a label is feedback on its last message."""
    value, name, reads = row[column], WHOLE[column], {column}
    if not is_messages(value):
        if name == "messages" and isinstance(value, str):
            raise ExampleError(
                f"{column} must be a list of chat messages, or its JSON, got text {value!r:.40}; a "
                "whole text is a column 'text'",
                problem="not_text",
                field=column,
            )
        return Content(None, {name: value}, frozenset(reads))
    shared = "from" in value[0]
    messages = to_messages(column, value)
    if shared:
        messages, reads = _with_system(messages, row), {column, "system"}
    label = next((c for c in ("label", "kto_tag") if _is_flag(row.get(c))), None)
    if label is None:
        content = Content(None, {name: messages}, frozenset(reads), shared=shared)
    else:
        reads.add(label)
        answer = {"completion": messages[-1:]}
        content = Content(messages[:-1], answer, frozenset(reads), shared=shared)
    parts = value[-1].get("content")
    if is_messages(parts) and "value" in parts[0]:
        thought = bool(messages[-1].get("reasoning_content"))
        content = replace(content, template_kwargs={"enable_thinking": thought})
    return content


def _alpaca(row: Row, further: bool) -> Content:
    """LLaMA-Factory's alpaca: instruction, input, output; system, history; pairs and feedback."""
    parts = []
    for column in ("instruction", "input"):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise not_text(column, value)
        parts += [value] if value else []
    if not parts:
        raise ExampleError(
            "instruction must have text, got none: there is no prompt",
            problem="empty_prompt",
            field="instruction",
        )
    turns = [*_history(row), {"role": "user", "content": "\n".join(parts)}]
    prompt = _with_system(turns, row)
    reads = {"instruction", "input", "system", "history"}
    if "chosen" in row or "rejected" in row:
        require_columns(row, *_SIDES)
        pair = {side: _as_messages(row[side]) for side in _SIDES}
        return Content(prompt, pair, frozenset({*reads, *_SIDES}), _SIDES, shared=True)
    answer = next((c for c in ("output", "completion", "response") if c in row), None)
    if answer is None:
        if further:
            return Content(prompt, {}, frozenset(reads), shared=True)
        raise missing_column("output", row)
    output = row[answer]
    reads.add(answer)
    if isinstance(output, Sequence) and not isinstance(output, str) and len(output) == 2:
        pair = dict(zip(_SIDES, output, strict=True))
        return Content(prompt, pair, frozenset(reads), _SIDES, shared=True)
    label = next((c for c in ("label", "kto_tag") if _is_flag(row.get(c))), None)
    if label is not None or not row.get("history"):
        reads |= {label} if label is not None else set()
        return Content(prompt, {answer: output}, frozenset(reads), shared=True)
    if not isinstance(output, str):
        raise not_text(answer, output)
    whole = [*prompt, {"role": "assistant", "content": output}]
    return Content(None, {answer: whole}, frozenset(reads), shared=True)


def _history(row: Row) -> Messages:
    """Earlier turns of an alpaca row, as messages."""
    messages: Messages = []
    for index, turn in enumerate(row.get("history") or ()):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise ExampleError(
                f"history[{index}] must be a pair [user's turn, assistant's turn], got "
                f"{glimpse(turn)}",
                problem="bad_message",
                field="history",
            )
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    return to_messages("history", messages)


def _shared_pair(row: Row, column: str) -> Content:
    """LLaMA-Factory's ranking rows: a conversation, and two answers to it."""
    require_columns(row, *_SIDES)
    prompt = _with_system(to_messages(column, row[column]), row)
    pair = {side: _answer(side, row[side]) for side in _SIDES}
    if prompt[-1]["role"] == "assistant":
        raise ExampleError(
            f"{column} must end with a turn of the user, as chosen and rejected are answers to it; "
            "got a turn of the assistant at its end",
            problem="bad_message",
            field=column,
        )
    return Content(prompt, pair, frozenset({column, "system", *_SIDES}), _SIDES, shared=True)


def _answer(side: str, value: object) -> Messages:
    """One answer, a text or a message, as messages."""
    value = _as_messages(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not is_messages(value):
        raise not_text(side, value)
    return to_messages(side, value)


def _query(row: Row, further: bool) -> Content:
    """ms-swift's query, response, history and system, which are alpaca's under other names."""
    alpaca = {**row, "instruction": row["query"]}
    if row.get("rejected_response") is not None:
        alpaca |= {"chosen": row["response"], "rejected": row["rejected_response"]}
    content = _alpaca(alpaca, further)
    reads = content.reads | {"query", "response", "rejected_response"}
    return replace(content, reads=reads)


def _swift_pair(row: Row) -> Content:
    """ms-swift's pairs: a whole conversation, and another last answer."""
    if not is_messages(row["messages"]):
        raise not_text("messages", row["messages"])
    whole = to_messages("messages", row["messages"])
    if whole[-1]["role"] != "assistant" or len(whole) < 2:
        raise ExampleError(
            "messages must end with the assistant's answer, as rejected_response is another one; "
            f"got the roles {', '.join(message['role'] for message in whole)}",
            problem="bad_message",
            field="messages",
        )
    pair = {
        "chosen": whole[-1:],
        "rejected": _answer("rejected_response", row["rejected_response"]),
    }
    reads = frozenset({"messages", "rejected_response"})
    return Content(whole[:-1], pair, reads, _SIDES)


def _openai_pair(row: Row) -> Content:
    """OpenAI's preference rows: input with messages and tools, and two outputs."""
    columns = ("preferred_output", "non_preferred_output")
    require_columns(row, "input", *columns)
    given = row["input"]
    if not isinstance(given, Mapping) or not is_messages(given.get("messages")):
        raise ExampleError(
            f"input must be an object with messages, got {glimpse(given)}",
            problem="not_text",
            field="input",
        )
    prompt = to_messages("input", given["messages"])
    pair = {side: _answer(name, row[name]) for side, name in zip(_SIDES, columns, strict=True)}
    reads = frozenset({"input", *columns})
    return Content(prompt, pair, reads, _SIDES, parse_tools(given.get("tools")))


def _message_pair(row: Row, chosen: str) -> Content:
    """LLaMA-Factory's v1 pairs: two whole conversations; ms-swift's, of which one is `messages`."""
    columns = (chosen, "rejected_messages")
    require_columns(row, *columns)
    for column in columns:
        if not is_messages(row[column]):
            raise not_text(column, row[column])
    whole = [to_messages(column, row[column]) for column in columns]
    prompt, *responses = split_conversations(*whole)
    # LLaMA-Factory tells the template whether the answer has been thought about.
    thought = any(message.get("reasoning_content") for message in (whole[0][-1], whole[1][-1]))
    return Content(
        prompt,
        dict(zip(_SIDES, responses, strict=True)),
        frozenset(columns),
        _SIDES,
        template_kwargs={"enable_thinking": thought},
        shared=True,
    )


def _preference(row: Row, one_is_enough: bool) -> Content:
    """Prompt, chosen and rejected; without a prompt column, their common beginning is the prompt.

    Args:
        row: A row with at least one of the columns chosen and rejected.
        one_is_enough: Whether the other one may be missing.
    """
    own = [column for column in _SIDES if column in row]
    if not one_is_enough:
        require_columns(row, *_SIDES)
    responses = {name: _as_messages(row[name]) for name in own}
    reads = frozenset({"prompt", *own})
    prompt = row.get("prompt")
    # A text beside whole conversations repeats their first turn.
    beside = isinstance(prompt, str) and all(_is_whole(value) for value in responses.values())
    if len(own) == 2 and ("prompt" not in row or beside):
        if all(isinstance(v, str) for v in responses.values()) and prompt_under_another_name(row):
            raise missing_column("prompt", row)
        shared, *split = _split_prompt(responses["chosen"], responses["rejected"])
        if beside and not _says(shared, str(prompt)):
            reads -= {"prompt"}  # named as a column that nobody reads
        return Content(shared, dict(zip(own, split, strict=True)), reads, own)
    require_columns(row, "prompt")
    if prompt is None:
        raise not_text("prompt", None)
    if isinstance(prompt, str) and any(is_messages(value) for value in responses.values()):
        prompt = [{"role": "user", "content": prompt}]
    return Content(prompt, responses, reads, own)


def _says(messages: object, text: str) -> bool:
    """Whether a turn of a conversation holds a text."""
    if not isinstance(messages, list):
        return True
    contents = [message.get("content") for message in messages]
    return any(not isinstance(c, str) or text.strip() in c for c in contents)


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
        if not shared:
            raise ExampleError(
                "row must have a column 'prompt', or chosen and rejected must begin with it; got "
                f"two texts that differ from the first character on: {chosen[:20]!r} and "
                f"{rejected[:20]!r}",
                problem="missing_column",
                field="prompt",
            )
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if is_messages(chosen) and is_messages(rejected):
        return split_conversations(to_messages("chosen", chosen), to_messages("rejected", rejected))
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str) and not is_messages(value):
            raise not_text(name, value)
    raise ExampleError(
        f"chosen and rejected must both be text or both messages, got {glimpse(chosen)} and "
        f"{glimpse(rejected)}",
        problem="not_text",
        field="rejected",
    )


def split_conversations(
    chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected) of two conversations with a common beginning.

    Raises:
        ExampleError: If they differ first in a turn that is not the assistant's, or have no turn in
            common.
    """
    # Each response has a message at least, also where one conversation begins the other.
    most = min(len(chosen), len(rejected)) - 1
    shared = common_prefix_length(without_weights(chosen[:most]), without_weights(rejected[:most]))
    roles = [side[shared]["role"] for side in (chosen, rejected)]
    if roles != ["assistant", "assistant"]:
        raise ExampleError(
            f"chosen and rejected must have one prompt, got conversations that differ first in "
            f"message {shared}, of the roles {roles[0]} and {roles[1]}",
            problem="different_prompts",
            field="rejected",
        )
    if not shared:
        raise ExampleError(
            "row must have a column 'prompt', or chosen and rejected must begin with the user's "
            "turn; got two conversations that begin with the assistant's",
            problem="missing_column",
            field="prompt",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _with_system(messages: Messages, row: Row) -> Messages:
    """The conversation with the row's system prompt, unless it has one of its own."""
    system = row.get("system")
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    if not isinstance(system, str):
        raise not_text("system", system)
    return [{"role": "system", "content": system}, *messages]


def _as_messages(value: object) -> object:
    """The value; a single message as a list of one."""
    if isinstance(value, Mapping) and {"role", "from"} & set(value):
        return [value]
    return value


def _is_whole(value: object) -> bool:
    """Whether a value is a conversation that does not begin with the assistant's turn."""
    if not is_messages(value):
        return False
    role = value[0].get("role", value[0].get("from"))
    return role not in ("assistant", "gpt", "function_call")


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or value in (0, 1)
