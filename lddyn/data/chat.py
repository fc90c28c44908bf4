"""Chat messages to token ids by the tokenizer's chat template, and which of the tokens count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lddyn.data.messages import (
    DETAILS,
    SAYING,
    Message,
    Messages,
    common_prefix_length,
    message_weight,
    unknown_keys,
    without_weights,
)
from lddyn.data.template_limits import check_work
from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import ExampleError

__all__ = ["ChatTemplate"]

# Stands for a message's text when the place of the text in a rendered conversation is looked for.
_STAND_IN = "\u2603 here \u2603"

Notes = list[tuple[str, str]]  # (code, detail) pairs, as in `Example.notes`


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the arguments that each rendering receives.

    Attributes:
        tokenizer: The tokenizer.
        tools: Tool descriptions. None: no tools.
        kwargs: Further arguments of the template.
    """

    tokenizer: Tokenizer
    tools: Sequence[object] | None = None
    kwargs: Mapping[str, Any] | None = None

    @property
    def source(self) -> str:
        """The Jinja template, all of them where the tokenizer has several; `""`: there is none."""
        own = (self.kwargs or {}).get("chat_template")
        return str(own or getattr(self.tokenizer, "chat_template", None) or "")

    def reads(self, key: str) -> bool:
        """Whether the template mentions a key of a message, such as "tool_calls"."""
        return key in self.source

    def render(self, messages: Sequence[Message], **how: bool) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: The conversation.
            how: Arguments of `apply_chat_template`, such as `add_generation_prompt=True`.

        Raises:
            ExampleError: If the tokenizer has no chat template, or the template raises.
        """
        return list(self._apply(messages, **how)["input_ids"])

    def render_prompt(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, with the assistant's turn opened (or its last one continued)."""
        if not prompt:
            return []
        if prompt[-1]["role"] == "assistant":
            return self.render(prompt, continue_final_message=True)
        return self.render(prompt, add_generation_prompt=True)

    def check(self, name: str, messages: Sequence[Message], notes: Notes | None = None) -> None:
        """Note what the template leaves out of some messages.

        Args:
            name: Column of the messages.
            messages: The messages.
            notes: Receives "not_rendered" and "other_key". None: nothing is noted.

        Raises:
            ExampleError: If a message has tool calls and no content, and the template knows no tool
                calls: it would print "None", or fail.
        """
        lost = dict.fromkeys(SAYING, 0)
        others: dict[str, None] = {}
        for index, message in enumerate(messages):
            unknown = bool(message.get("tool_calls")) and not self.reads("tool_calls")
            if unknown and message.get("content") is None:
                raise ExampleError(
                    f"{name}[{index}] has tool_calls and no content, and the chat template "
                    "does not know tool_calls: use a template that renders them, or write the "
                    "call into the content",
                    problem="tool_calls_unknown",
                    field=name,
                )
            for key in lost:
                lost[key] += bool(message.get(key)) and not self.reads(key)
            others |= dict.fromkeys(key for key in unknown_keys(message) if not self.reads(key))
        for key, count in lost.items():
            if count:
                _note_unrendered(notes, f"{key} of {count} message{'s' if count > 1 else ''}")
        if self.tools and not self.reads("tools"):
            _note_unrendered(notes, "tools")
        detailed = sum(any(message.get(key) for key in DETAILS) for message in messages)
        if detailed and notes is not None:
            text = "the detail of what to train on is not read; these messages count whole"
            notes.append(("partial_weight", f"{text}: {detailed}"))
        if others and notes is not None:
            keys = ", ".join(sorted(others))
            notes.append(("other_key", f"nobody reads the keys {keys} of messages"))

    def render_counted(
        self, messages: Messages, first: int, notes: Notes
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them count: those that the assistant wrote.

        A template with `{% generation %}` marks them itself. Of any other template the conversation
        is rendered up to before and after each of the assistant's messages. A message with weight 0
        does not count.

        Args:
            messages: The conversation.
            first: Index of the first message of the response; earlier ones are not counted.
            notes: Receives "template_rewrite" when the template renders a turn differently once
                later turns follow.
        """
        replies = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        muted = [i for i in replies if message_weight(messages[i]) == 0]
        if self.reads("{% generation") or self.reads("{%- generation"):
            rendered = self._apply(messages, return_assistant_tokens_mask=True)
            ids = list(rendered["input_ids"])
            counted = [bool(m) for m in rendered["assistant_masks"]]
            for index in muted:
                begin, end = self._place(messages, index, ids, notes)
                counted[begin:end] = [False] * (end - begin)
            return ids, counted
        ids = self.render(messages)
        counted = [False] * len(ids)
        for index in replies:
            if index not in muted:
                begin, end = self._place(messages, index, ids, notes)
                counted[begin:end] = [True] * (end - begin)
        return ids, counted

    def _place(
        self, messages: Messages, index: int, ids: list[int], notes: Notes
    ) -> tuple[int, int]:
        """(begin, end) of a message in the token ids of its conversation, its end of turn included.

        Args:
            messages: The conversation.
            index: Which message.
            ids: Token ids of the conversation.
            notes: As in `render_counted`.
        """
        before = self.render(messages[:index], add_generation_prompt=True) if index else []
        until = self.render(messages[: index + 1])
        begin, end = common_prefix_length(before, ids), common_prefix_length(until, ids)
        if end > begin and (end == len(until) or index == len(messages) - 1):
            return begin, end
        notes.append(
            (
                "template_rewrite",
                f"the chat template renders message {index} differently once later messages "
                "follow; its tokens are counted as they stand in the whole conversation",
            )
        )
        # Another text in its place changes exactly the tokens of the message.
        others = [*messages[:index], {"role": "assistant", "content": _STAND_IN}]
        whole = self.render([*others, *messages[index + 1 :]])
        begin = common_prefix_length(whole, ids)
        rest = min(len(whole), len(ids)) - begin
        end = len(ids) - min(rest, common_prefix_length(whole[::-1], ids[::-1]))
        alone = self.render(others)
        tail = alone[len(alone) - common_prefix_length(alone[::-1], until[::-1]) :]
        return begin, end + common_prefix_length(tail, ids[end:])

    def _apply(self, messages: Sequence[Message], **how: bool) -> Mapping[str, Sequence[int]]:
        if not self.source:
            raise ExampleError(
                "messages need a chat template, got a tokenizer without one: set "
                "tokenizer.chat_template, or pass prompt and response as text",
                problem="no_chat_template",
                field="prompt",
            )
        plain = without_weights(messages)
        try:
            self._check_work(plain, how)
            return self.tokenizer.apply_chat_template(
                plain,
                tools=list(self.tools) if self.tools else None,
                tokenize=True,
                return_dict=True,
                **how,
                **dict(self.kwargs or {}),
            )
        except ExampleError:
            raise
        except Exception as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ExampleError(
                f"the chat template cannot render messages of the roles {roles}: "
                f"{type(error).__name__}: {error}",
                problem="template_error",
            ) from error

    def _check_work(self, messages: Sequence[Message], how: Mapping[str, bool]) -> None:
        """Refuses a template that prints or computes too much, before the tokenizer runs it."""
        given, choose = dict(self.kwargs or {}), getattr(self.tokenizer, "get_chat_template", None)
        tools = list(self.tools) if self.tools else None
        source = given.pop("chat_template", None)
        if choose is not None:
            source = choose(source, tools)
        if isinstance(source, str):
            special = getattr(self.tokenizer, "special_tokens_map", {})
            check_work(
                source,
                {
                    **special,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    **how,
                    **given,
                },
            )


def as_plain_text(messages: Messages, tools: Sequence[Any] | None) -> Messages:
    """Tool calls and tools as text, in LLaMA-Factory's default format.

    LLaMA-Factory renders them so for every model whose template has no format of its own. Results
    of tools become user turns.

    Args:
        messages: The conversation.
        tools: Tool descriptions, written into the system turn.
    """
    made: Messages = []
    for message in messages:
        message = dict(message)
        calls = [call["function"] for call in message.pop("tool_calls", None) or ()]
        if calls:
            lines = (
                f"Action: {call['name']}\nAction Input: "
                f"{json.dumps(call['arguments'], ensure_ascii=False)}"
                for call in calls
            )
            message["content"] = (message.get("content") or "") + "\n".join(lines)
        message["role"] = "user" if message["role"] == "tool" else message["role"]
        made.append(message)
    if not tools:
        return made
    system = made.pop(0) if made and made[0]["role"] == "system" else {"content": ""}
    text = system["content"] + _describe_tools(tools)
    return [{"role": "system", "content": text}, *made]


def _describe_tools(tools: Sequence[Any]) -> str:
    """The system prompt's part on tools, in LLaMA-Factory's default format."""
    lines, names = [], []
    for tool in tools:
        tool = tool.get("function", tool)
        parameters = tool.get("parameters") or {}
        lines.append(
            f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}"
        )
        lines.append("Tool Args:")
        for name, about in (parameters.get("properties") or {}).items():
            required = ", required" if name in (parameters.get("required") or ()) else ""
            text = f"  - {name} ({about.get('type', '')}{required}): {about.get('description', '')}"
            if about.get("enum"):
                text += f", should be one of [{', '.join(map(str, about['enum']))}]"
            if about.get("items"):
                text += f", where each item should be {about['items'].get('type', '')}"
            lines.append(text)
        lines.append("")
        names.append(tool["name"])
    return (
        "You have access to the following tools:\n"
        + "".join(line + "\n" for line in lines)
        + "Use the following format if using a tool:\n```\n"
        + f"Action: tool name (one of [{', '.join(names)}])\n"
        + "Action Input: the input to the tool, in a JSON format representing the kwargs "
        + '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _note_unrendered(notes: Notes | None, what: str) -> None:
    if notes is not None:
        notes.append(("not_rendered", f"the chat template does not render {what}"))
