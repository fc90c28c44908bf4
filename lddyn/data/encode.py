"""χ = [x; y] as token ids: examples, encoding, data rows, and the audit of a data set.

An `Example` is a prompt x and a response y. Response token y_k is predicted by the logit column at
position `len(prompt) - 1 + k`; `Example.positions` and `Example.targets` say exactly that, so the
shift is written down in one place. `encode` makes an example from text or chat messages, `rows` and
`encode_row` read the data formats in use with TRL, and `audit` lists what is wrong with a data set
before any dynamics are measured on it: half of the puzzles brought to finetuning are data or mask
errors.

Tokenizers are duck-typed (anything that behaves like a transformers tokenizer); neither torch nor
transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lddyn.data.example import Example
from lddyn.errors import EmptyResponseError, ExampleError

__all__ = ["encode"]

Truncation = Literal["keep_end", "keep_start"]

Message = Mapping[str, Any]

Text = str | Sequence[Message]


@dataclass(frozen=True)
class RowOptions:
    """How to encode: the keyword arguments that `encode`, `encode_row` and `audit` share."""

    add_eos: bool = True
    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation: Truncation = "keep_end"
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Any] | None = None
    assistant_only: bool = True
    texts: bool = True  # decode every token for pictures; the audit does without

    def __post_init__(self) -> None:
        """Check the values that a caller can get wrong."""
        if self.truncation not in ("keep_end", "keep_start"):
            raise ValueError(
                f'truncation must be "keep_end" or "keep_start", got {self.truncation!r}'
            )
        for name, least in (("max_length", 2), ("max_prompt_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by default."""
    return list(tokenizer(text=text)["input_ids"])


def _render(
    tokenizer: Any, messages: Sequence[Message], options: RowOptions, **kwargs: Any
) -> dict[str, Any]:
    """Token ids (and masks) of a conversation under the tokenizer's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ExampleError(
            "messages need a chat template, got a tokenizer without one: set "
            "tokenizer.chat_template, or pass prompt and response as text",
            problem="no_chat_template",
            field="prompt",
        )
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=list(options.tools) if options.tools else None,
        tokenize=True,
        return_dict=True,
        **kwargs,
        **dict(options.chat_template_kwargs or {}),
    )
    return dict(rendered)


def check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
    """Return chat messages as dicts, converting {from, value}; say which one is malformed."""
    roles = {"human": "user", "gpt": "assistant"}
    checked = []
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and "from" in message and "value" in message:
            role = str(message["from"])
            message = {"role": roles.get(role, role), "content": message["value"]}
        if not isinstance(message, Mapping) or "role" not in message:
            raise ExampleError(
                f"{name}[{index}] must be a message with a role and a content, got {message!r:.80}",
                problem="bad_message",
                field=name,
            )
        checked.append(dict(message))
    return checked


def _token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Printable text of each token: its decoded text, its piece where that is no full character."""
    known: dict[int, str] = {}
    for token in ids:
        if token in known:
            continue
        text = tokenizer.decode([token], skip_special_tokens=False)
        piece = tokenizer.convert_ids_to_tokens([token])[0]
        if isinstance(piece, str):
            if "\ufffd" in text or not text:
                text = piece
            elif piece.startswith("\u2581") and not text.startswith(" "):
                text = " " + text
        known[token] = text or f"<{token}>"
    return tuple(known[token] for token in ids)


def finish(
    tokenizer: Any,
    full: list[int],
    start: int,
    mask: list[bool] | None,
    notes: list[tuple[str, str]],
    name: str,
    options: RowOptions,
) -> Example:
    """Split at `start`, truncate, name the tokens."""
    prompt, response = full[:start], full[start:]
    limit = options.max_prompt_length
    if limit is not None and len(prompt) > limit:
        notes.append(("truncated_prompt", f"{len(prompt)} -> {limit} tokens, {options.truncation}"))
        prompt = prompt[-limit:] if options.truncation == "keep_end" else prompt[:limit]
    if options.max_length is not None and len(prompt) + len(response) > options.max_length:
        room = options.max_length - len(prompt)
        if room < 1:
            raise ExampleError(
                f"the prompt must leave room for a response within max_length "
                f"{options.max_length}, got {len(prompt)} prompt tokens: set max_prompt_length, or "
                "drop the row",
                problem="prompt_fills_max_length",
                field=name,
            )
        eos = eos_ids(tokenizer)
        if eos & set(response[room:]) and not eos & set(response[:room]):
            notes.append(("eos_lost", f"EOS at response token {len(response) - 1}, cut at {room}"))
        notes.append(("truncated_response", f"{len(response)} -> {room} tokens"))
        response = response[:room]
        mask = mask[:room] if mask is not None else None
    return Example(
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        response_mask=tuple(mask) if mask is not None else None,
        name=name,
        tokens=_token_texts(tokenizer, response) if options.texts else None,
        prompt_tokens=_token_texts(tokenizer, prompt) if options.texts else None,
        notes=tuple(notes),
    )


def eos_ids(tokenizer: Any) -> set[int]:
    """Ids that end a sequence; empty when the tokenizer has none."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list | tuple | set) else {int(eos)}


def append_eos(tokenizer: Any, full: list[int], notes: list[tuple[str, str]]) -> None:
    """Append EOS unless it is there or the tokenizer has none."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and (not full or full[-1] != eos):
        full.append(int(eos))
        notes.append(("eos_added", f"token id {eos}"))


def _encode_text(
    tokenizer: Any,
    prompt: str,
    response: str,
    name: str,
    options: RowOptions,
    siblings: Sequence[str] = (),
) -> Example:
    """Encode plain text; the response starts where tokens of prompt and prompt + response part."""
    if not response:
        raise EmptyResponseError(
            "response must have text, got '': there is no log-probability to measure; drop the row",
            field=name or "response",
        )
    notes: list[tuple[str, str]] = []
    alone = tokenize_text(tokenizer, prompt)
    full = tokenize_text(tokenizer, prompt + response)
    if options.add_eos:
        append_eos(tokenizer, full, notes)
    start = common_prefix(alone, full)
    for sibling in siblings:  # a pair shares its prompt tokens: both start at the earlier one
        start = min(start, common_prefix(alone, tokenize_text(tokenizer, prompt + sibling)))
    _note_merge(tokenizer, alone, full, start, notes)
    if start == 0:
        raise ExampleError(
            f"prompt must give at least 1 token that the response leaves alone, got "
            f"{prompt[:40]!r} ({len(alone)} tokens, all changed by the response): a first token is "
            "needed to predict from; start the prompt with the BOS token",
            problem="empty_prompt",
            field="prompt",
        )
    return finish(tokenizer, full, start, None, notes, name, options)


def _note_merge(
    tokenizer: Any, alone: list[int], full: list[int], start: int, notes: list[tuple[str, str]]
) -> None:
    """Note prompt tokens that change once the response follows (a special last token may)."""
    lost = alone[start:]
    if not lost or set(lost) <= set(getattr(tokenizer, "all_special_ids", None) or ()):
        return
    before = "".join(_token_texts(tokenizer, lost))
    after = "".join(_token_texts(tokenizer, full[start : start + max(2, len(lost))]))
    notes.append(
        (
            "boundary_merge",
            f"the last {len(lost)} prompt token(s) {before!r} become {after!r} once the response "
            "follows; they count as response",
        )
    )


def encode_chat(
    tokenizer: Any,
    prompt: list[dict[str, Any]],
    response: list[dict[str, Any]],
    name: str,
    options: RowOptions,
    siblings: Sequence[list[dict[str, Any]]] = (),
) -> Example:
    """Encode messages with the chat template; the template, not we, ends the turn."""
    if not response or not any(
        message.get("content") or message.get("tool_calls") for message in response
    ):
        raise EmptyResponseError(
            "response must have a message with content, got none: there is no log-probability to "
            "measure; drop the row",
            field=name or "response",
        )
    notes: list[tuple[str, str]] = []
    if prompt and prompt[-1]["role"] == "assistant":
        ending: dict[str, Any] = {"continue_final_message": True}
    else:
        ending = {"add_generation_prompt": True}
    alone = list(_render(tokenizer, prompt, options, **ending)["input_ids"]) if prompt else []
    messages = [*prompt, *response]
    full, mask = _render_masked(tokenizer, messages, len(prompt), options, notes)
    start = common_prefix(alone, full)
    for sibling in siblings:
        other = _render(tokenizer, [*prompt, *sibling], options)["input_ids"]
        start = min(start, common_prefix(alone, list(other)))
    _note_merge(tokenizer, alone, full, start, notes)
    start = max(start, 1)  # a conversation without a prompt: its first token is not predicted
    return finish(
        tokenizer, full, start, mask[start:] if mask is not None else None, notes, name, options
    )


def _render_masked(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    n_prompt: int,
    options: RowOptions,
    notes: list[tuple[str, str]],
) -> tuple[list[int], list[bool] | None]:
    """Token ids of a conversation and which of them the assistant wrote after the prompt.

    The mask is None when every message of the response is the assistant's.
    """
    several = any(message["role"] != "assistant" for message in messages[n_prompt:])
    if not (options.assistant_only and several):
        return list(_render(tokenizer, messages, options)["input_ids"]), None
    if "{% generation" in str(tokenizer.chat_template).replace("{%-", "{%"):
        rendered = _render(tokenizer, messages, options, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), [bool(m) for m in rendered["assistant_masks"]]
    full = list(_render(tokenizer, messages, options)["input_ids"])
    mask = [False] * len(full)
    for index in range(n_prompt, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before: list[int] = []
        if index:
            ids = _render(tokenizer, messages[:index], options, add_generation_prompt=True)
            before = list(ids["input_ids"])
        until = list(_render(tokenizer, messages[: index + 1], options)["input_ids"])
        begin, end = common_prefix(before, full), common_prefix(until, full)
        if end <= begin or (end < len(until) and index < len(messages) - 1):
            notes.append(
                (
                    "template_rewrite",
                    f"the chat template renders message {index} differently once later messages "
                    "follow; its tokens are counted only as far as they agree",
                )
            )
        mask[begin:end] = [True] * max(0, end - begin)
    return full, mask


def encode(
    tokenizer: Any,
    prompt: Text,
    response: Text,
    *,
    add_eos: bool = True,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_end",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    assistant_only: bool = True,
    name: str = "",
) -> Example:
    """Encode a prompt and a response as one `Example`.

    Prompt and prompt + response are tokenised apart; the response starts where the two part (their
    common prefix), as in TRL. So a token that merges across the boundary counts as response, and
    the merge is recorded in `Example.notes`. Messages go through the tokenizer's chat template.

    Args:
        tokenizer: A transformers tokenizer, or anything that behaves like one.
        prompt: Text, or a list of chat messages.
        response: Text, or a list of chat messages; text after a list of messages is one assistant
            message.
        add_eos: Append the EOS token to a plain-text response that does not end in it. Ignored for
            messages (the chat template ends the turn) and when the tokenizer has no EOS.
        max_length: Most tokens in all; what is over it is cut off the end of the response.
        max_prompt_length: Most prompt tokens; applied first.
        truncation: Which end of an over-long prompt to keep.
        chat_template_kwargs: Passed on to the chat template.
        tools: Tool descriptions, passed on to the chat template.
        assistant_only: In a response of several messages count only the assistant's tokens.
        name: What the response is, for example `"chosen"`.

    Returns:
        The example, with the text of every token.

    Raises:
        EmptyResponseError: If the response is empty (a lone EOS is not a response).
        ExampleError: (a ValueError) If the prompt has no token of its own, or leaves no room for a
            response within `max_length`, or messages are malformed or there is no chat template.

    Example:
        >>> import lddyn
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = {"<eos>": 0, "Is": 1, "it": 2, "red": 3, "?": 4, "Yes": 5}
        >>> tok = Tokenizer(models.WordLevel(words))
        >>> tok.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>")
        >>> ex = lddyn.encode(tok, "Is it red?", " Yes")
        >>> ex.prompt_ids, ex.response_ids
        ((1, 2, 3, 4), (5, 0))
        >>> ex.token_texts
        ('Yes', '<eos>')
    """
    options = RowOptions(
        add_eos=add_eos,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
        assistant_only=assistant_only,
    )
    return encode_with(tokenizer, prompt, response, name, options)


def encode_with(
    tokenizer: Any,
    prompt: Any,
    response: Any,
    name: str,
    options: RowOptions,
    siblings: Sequence[Any] = (),
) -> Example:
    """Tell text from messages, check the types, encode."""
    if isinstance(prompt, str) and isinstance(response, str):
        others = [sibling for sibling in siblings if isinstance(sibling, str) and sibling]
        return _encode_text(tokenizer, prompt, response, name, options, others)
    if is_messages(prompt):
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        if is_messages(response) or response == []:
            return encode_chat(
                tokenizer,
                check_messages("prompt", prompt),
                check_messages(name or "response", response),
                name,
                options,
                [check_messages(name, other) for other in siblings if is_messages(other)],
            )
    for label, value in (("prompt", prompt), (name or "response", response)):
        if not isinstance(value, str) and not is_messages(value):
            raise ExampleError(
                f"{label} must be text or a list of chat messages, got {describe(value)}",
                problem="not_text",
                field=label,
            )
    raise ExampleError(
        "prompt and response must both be text, or the prompt a list of chat messages, got "
        f"{describe(prompt)} and {describe(response)}: put the prompt in a user message",
        problem="not_text",
        field="prompt",
    )


def is_messages(value: Any) -> bool:
    """Whether a value looks like a non-empty list of chat messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )


def describe(value: Any) -> str:
    """Type and a glimpse of a value, for an error message."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
