"""Chat messages: recognised, brought to one form, rendered to token ids by the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import ExampleError

__all__ = ["ChatTemplate"]

Message = Mapping[str, Any]

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def is_messages(value: object) -> TypeGuard[Sequence[Message]]:
    """Whether a value looks like a non-empty list of chat messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )


def to_messages(name: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as dicts with a role; ShareGPT's {from, value} becomes {role, content}.

    Args:
        name: Column of the messages, for the error.
        messages: As the data has them.

    Raises:
        ExampleError: If a message has no role; the error names its index.
    """
    converted = []
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and "from" in message and "value" in message:
            role = str(message["from"])
            message = {"role": _ROLES.get(role, role), "content": message["value"]}
        if not isinstance(message, Mapping) or "role" not in message:
            raise ExampleError(
                f"{name}[{index}] must be a message with a role and a content, got {message!r:.80}",
                problem="bad_message",
                field=name,
            )
        converted.append(dict(message))
    return converted


def common_prefix_length(left: Sequence[object], right: Sequence[object]) -> int:
    """Number of entries that two sequences share at their beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


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

    def render(self, messages: Sequence[Message], **how: bool) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: The conversation.
            how: Arguments of `apply_chat_template`, such as `add_generation_prompt=True`.

        Raises:
            ExampleError: If the tokenizer has no chat template.
        """
        return list(self._apply(messages, **how)["input_ids"])

    def render_prompt(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, with the assistant's turn opened (or its last one continued)."""
        if not prompt:
            return []
        if prompt[-1]["role"] == "assistant":
            return self.render(prompt, continue_final_message=True)
        return self.render(prompt, add_generation_prompt=True)

    def render_counted(
        self, messages: Sequence[Message], first: int, notes: list[tuple[str, str]]
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the assistant wrote.

        A template with `{% generation %}` marks them itself. Of any other template the conversation
        is rendered up to before and after each of the assistant's messages.

        Args:
            messages: The conversation.
            first: Index of the first message of the response; earlier ones are not counted.
            notes: Receives "template_rewrite" when the template renders a turn differently once
                later turns follow.
        """
        if "{% generation" in str(self.tokenizer.chat_template).replace("{%-", "{%"):
            rendered = self._apply(messages, return_assistant_tokens_mask=True)
            return list(rendered["input_ids"]), [bool(m) for m in rendered["assistant_masks"]]
        ids = self.render(messages)
        counted = [False] * len(ids)
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True) if index else []
            until = self.render(messages[: index + 1])
            begin, end = common_prefix_length(before, ids), common_prefix_length(until, ids)
            if end <= begin or (end < len(until) and index < len(messages) - 1):
                notes.append(
                    (
                        "template_rewrite",
                        f"the chat template renders message {index} differently once later "
                        "messages follow; its tokens are counted only as far as they agree",
                    )
                )
            counted[begin:end] = [True] * max(0, end - begin)
        return ids, counted

    def _apply(self, messages: Sequence[Message], **how: bool) -> Mapping[str, Sequence[int]]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ExampleError(
                "messages need a chat template, got a tokenizer without one: set "
                "tokenizer.chat_template, or pass prompt and response as text",
                problem="no_chat_template",
                field="prompt",
            )
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(self.tools) if self.tools else None,
            tokenize=True,
            return_dict=True,
            **how,
            **dict(self.kwargs or {}),
        )
