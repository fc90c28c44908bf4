"""Chat messages of all shapes brought to one: role, text, tool calls, reasoning, weight.

Shapes that are read: {role, content} with a text or a list of parts; ShareGPT's {from, value}, and
mixtures such as {role, text}; LLaMA-Factory's parts {type, value} and its roles `function_call` and
`observation`; OpenAI's older key `function_call`; tool calls as their JSON; a whole conversation as
its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from lddyn.errors import ExampleError, glimpse

__all__ = ["Message", "Messages"]

_TEXTS = ("content", "value", "text")  # what a message may call its words

Message = Mapping[str, Any]
Messages = list[dict[str, Any]]

# Names of roles in ShareGPT, LLaMA-Factory and OpenAssistant.
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}

# Keys of a message that say how much its tokens count (`training` is Axolotl's, `loss` ms-swift's);
# chat templates do not receive them.
WEIGHTS = ("weight", "train", "loss_weight", "training", "loss")

# Keys that hold what a message says: lost if the chat template does not read them.
SAYING = (
    *("tool_calls", "reasoning_content", "reasoning", "thinking", "thought", "refusal"),
    *("images", "image", "audio", "video"),
)
DETAILS = ("train_detail", "training_detail")  # Axolotl's choice of characters that count

# Keys that link, name or date a message.
_LABELS = {"role", "content", "name", "id", "tool_call_id", "type", *WEIGHTS, *SAYING, *DETAILS}


def is_messages(value: object) -> TypeGuard[Sequence[Message]]:
    """Whether a value looks like a non-empty list of chat messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )


def messages_of_json(value: object) -> object:
    """The messages that a text holds as JSON; any other value as it is."""
    if not isinstance(value, str) or not (text := value.strip()).startswith("["):
        return value
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return value
    named = is_messages(parsed) and all({"role", "from"} & set(message) for message in parsed)
    return parsed if named else value


def unknown_keys(message: Message) -> list[str]:
    """Keys of a message that lddyn does not know and that have a value."""
    return [key for key, value in message.items() if key not in _LABELS and value not in ("", [])]


def to_messages(name: str, messages: Iterable[object]) -> Messages:
    """Messages as dicts with a role and a text; keys that a chat template may read are kept.

    Args:
        name: Column of the messages, for the error.
        messages: As the data has them.

    Raises:
        ExampleError: If a message has no role, or content that is no text; the error names the
            index of the message.
    """
    return [_to_message(f"{name}[{i}]", name, message) for i, message in enumerate(messages)]


def message_weight(message: Message) -> float:
    """How much a message's tokens count: 1, unless one of WEIGHTS says less."""
    weight = 1.0
    for key in WEIGHTS:
        value = message.get(key)
        if value is not None:
            weight = min(weight, float(value))
    return weight


def without_weights(messages: Sequence[Message]) -> Messages:
    """The messages as a chat template receives them."""
    return [{k: v for k, v in message.items() if k not in WEIGHTS} for message in messages]


def common_prefix_length(left: Sequence[object], right: Sequence[object]) -> int:
    """Number of entries that two sequences share at their beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def parse_tools(tools: object) -> list[Any] | None:
    """Tool descriptions as a list; None when there are none.

    Args:
        tools: A list, or its JSON.

    Raises:
        ExampleError: If the text is not JSON.
    """
    if isinstance(tools, str) and tools.strip():
        text = tools
        try:
            tools = json.loads(text)
        except ValueError as error:
            raise ExampleError(
                f"tools must be a list of tool descriptions, or its JSON, got {text[:40]!r} "
                f"({error})",
                problem="bad_tools",
                field="tools",
            ) from None
    if not tools:
        return None
    return list(tools) if isinstance(tools, Sequence) and not isinstance(tools, str) else [tools]


def _to_message(where: str, name: str, message: object) -> dict[str, Any]:
    """One message."""

    def refuse(reason: str, problem: str = "bad_message") -> ExampleError:
        return ExampleError(f"{where} {reason}", problem=problem, field=name)

    if not isinstance(message, Mapping):
        raise refuse(f"must be a message with a role and a content, got {glimpse(message)}")
    role_key = next((key for key in ("role", "from") if message.get(key) is not None), "role")
    text_key = next((key for key in _TEXTS if message.get(key) is not None), "content")
    role = message.get(role_key)
    if not isinstance(role, str):
        raise refuse(f"must be a message with a role and a content, got {message!r:.80}")
    made = {key: value for key, value in message.items() if value is not None}
    if text_key in made:
        made["content"] = made.pop(text_key)
    made.pop("from", None)
    if isinstance(made.get("tool_calls"), str):
        made["tool_calls"] = _calls_of_json(made["tool_calls"], refuse)
    if isinstance(made.get("function_call"), Mapping):
        made["tool_calls"] = _tool_calls(made.pop("function_call"), refuse)
    for key in WEIGHTS:
        if key in made and not isinstance(made[key], bool | int | float):
            raise refuse(f"must have a number or a boolean as {key}, got {glimpse(made[key])}")
    made["role"] = _ROLES.get(role, role)
    content = made.get("content")
    if role == "function_call":
        made |= {"role": "assistant", "content": "", "tool_calls": _tool_calls(content, refuse)}
    elif isinstance(content, Sequence) and not isinstance(content, str):
        made.pop("content")
        made |= _of_parts(content, refuse)
    elif content is None and made.get("tool_calls"):
        made["content"] = None
    elif not isinstance(content, str):
        keys = "" if content is not None else f" (its keys are {', '.join(map(str, message))})"
        raise refuse(f"must have text as its content, got {glimpse(content)}{keys}", "not_text")
    return made


def _of_parts(parts: Sequence[object], refuse: Any) -> dict[str, Any]:
    """Text, reasoning and tool calls of a content that is a list of parts."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise refuse(f"part {index} must be a part of text, got {glimpse(part)}", "not_text")
        kind = part.get("type", "text")
        value = part.get("text", part.get("value", part.get("content")))
        if kind == "tool_call":
            calls += _tool_calls(value, refuse)
        elif kind not in ("text", "reasoning") or not isinstance(value, str):
            raise refuse(
                f"part {index} must be text, got type {kind!r} with {glimpse(value)}: lddyn reads "
                "text only",
                "not_text",
            )
        else:
            (texts if kind == "text" else reasoning).append(value)
    made: dict[str, Any] = {"content": "".join(texts)}
    if reasoning:
        made["reasoning_content"] = "".join(reasoning)
    if calls:
        made["tool_calls"] = calls
    return made


def _calls_of_json(text: str, refuse: Any) -> list[Any]:
    """Tool calls of a message that has them as a text."""
    try:
        calls = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise refuse(
            f"must hold tool_calls as a list or JSON, got {text!r:.40} ({error})"
        ) from None
    return list(calls) if isinstance(calls, list) else [calls]


def _tool_calls(content: object, refuse: Any) -> list[dict[str, Any]]:
    """Tool calls, as chat templates read them, of LLaMA-Factory's JSON {name, arguments}."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise refuse(f"must hold a tool call as JSON, got {content!r:.40} ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not {"name", "arguments"} <= set(call):
            raise refuse(f"must hold a tool call with name and arguments, got {glimpse(call)}")
    return [
        {"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
        for c in calls
    ]
