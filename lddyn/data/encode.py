"""A prompt and a response, as text or chat messages, to one `Example`.

Prompt and prompt + response are tokenised apart. The response begins at the first token in which
the two differ, as in TRL. The response is never tokenised on its own, so no token boundary is
invented.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from lddyn.data.chat import ChatTemplate, Notes
from lddyn.data.example import Example
from lddyn.data.messages import (
    Message,
    Messages,
    common_prefix_length,
    is_messages,
    message_weight,
    to_messages,
)
from lddyn.data.options import DEFAULT, RowOptions, RowSettings
from lddyn.data.tokenizer import Tokenizer, eos_ids, special_ids, token_texts, tokenize
from lddyn.errors import EmptyResponseError, ExampleError, glimpse

__all__ = ["encode"]

Text = str | Sequence[Message]


def encode(
    tokenizer: Tokenizer,
    prompt: Text,
    response: Text,
    options: RowOptions = DEFAULT,
    *,
    name: str = "",
    **settings: Unpack[RowSettings],
) -> Example:
    """Encode a prompt and a response as one `Example`.

    Prompt and prompt + response are tokenised apart; the response begins at the first token in
    which the two differ, as in TRL. A token that merges across the boundary therefore counts as
    response, and `Example.notes` records the merge. Messages go through the tokenizer's chat
    template.

    Args:
        tokenizer: A transformers tokenizer, or an object with the same methods.
        prompt: Text, or a list of chat messages.
        response: Text, or a list of chat messages. After a list of messages, text is one assistant
            message.
        options: How the texts become token ids, and which of them are counted.
        name: What the response is, for example `"chosen"`.
        settings: Fields of `RowOptions`, in place of those of `options`.

    Returns:
        The example, with the text of each token.

    Raises:
        EmptyResponseError: If the response is empty (a lone EOS is not a response).
        ExampleError: (a ValueError) If the prompt has no token of its own, if truncation leaves no
            prompt or no response, if messages are malformed, or if there is no chat template.

    Cost: two tokenisations.

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
    options = options.with_settings(settings)
    return encode_response(tokenizer, prompt, response, name, options)


def encode_response(
    tokenizer: Tokenizer,
    prompt: object,
    response: object,
    name: str,
    options: RowOptions,
    siblings: Sequence[object] = (),
) -> Example:
    """Encode a response to a prompt; both are checked here.

    Args:
        tokenizer: The tokenizer.
        prompt: Text or chat messages.
        response: Text or chat messages.
        name: Field of the response, for `Example.name` and for errors.
        options: How to encode.
        siblings: Other responses to the prompt, as a rejected one is to a chosen one. All of them
            begin where the first of them differs from the prompt, so that a pair has one prompt.

    Raises:
        ExampleError: If prompt or response is neither text nor messages, or as in `encode`.
    """
    if isinstance(prompt, str) and isinstance(response, str):
        texts = [sibling for sibling in siblings if isinstance(sibling, str) and sibling]
        return _encode_text(tokenizer, prompt, response, name, options, texts)
    if is_messages(prompt):
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        if is_messages(response) or response == []:
            return _encode_messages(
                tokenizer,
                to_messages("prompt", prompt),
                to_messages(name or "response", response),
                name,
                options,
                [other for other in siblings if is_messages(other)],
            )
    for label, value in (("prompt", prompt), (name or "response", response)):
        if not isinstance(value, str) and not is_messages(value):
            raise not_text(label, value)
    raise ExampleError(
        "prompt and response must both be text, or the prompt a list of chat messages, got "
        f"{glimpse(prompt)} and {glimpse(response)}: put the prompt in a user message",
        problem="not_text",
        field="prompt",
    )


def encode_whole(tokenizer: Tokenizer, content: object, name: str, options: RowOptions) -> Example:
    """Encode a text or conversation that has no prompt of its own.

    Of a text the first token is the prompt and all others count. Of a conversation the messages
    before the assistant's first are the prompt, unless all messages count.

    Args:
        tokenizer: The tokenizer.
        content: Text or chat messages.
        name: Field of the content, for `Example.name` and for errors.
        options: How to encode.

    Raises:
        EmptyResponseError: If a text has fewer than two tokens.
        ExampleError: If the content is neither text nor messages, or as in `encode`.
    """
    if is_messages(content):
        messages = to_messages(name, content)
        roles = [message["role"] for message in messages]
        if options.assistant_only and "assistant" not in roles:
            raise EmptyResponseError(
                f"{name} must have a message of the assistant, got the roles "
                f"{', '.join(dict.fromkeys(roles))}: there is nothing to learn; rename the role, "
                "or drop the row",
                field=name,
            )
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        first = first if options.assistant_only else 0
        return _encode_messages(tokenizer, messages[:first], messages[first:], name, options)
    if not isinstance(content, str):
        raise not_text(name, content)
    notes: Notes = []
    ids = tokenize(tokenizer, content) if content else []
    if ids and options.add_eos:
        _append_eos(tokenizer, ids, options, notes)
    if len(ids) < 2:
        raise EmptyResponseError(
            f"{name} must have at least 2 tokens (the first is only read), got {len(ids)}: drop "
            "the row",
            field=name,
        )
    return make_example(tokenizer, ids[:1], ids[1:], None, notes, name, options)


def with_counted_prompt(example: Example) -> Example:
    """The example with its prompt counted, all but the first token, as in a text without prompt."""
    tokens = None if example.tokens is None else (*example.prompt_texts, *example.tokens)
    mask = example.response_mask or (True,) * len(example.response_ids)
    return replace(
        example,
        prompt_ids=example.ids[:1],
        response_ids=example.ids[1:],
        response_mask=(True,) * (len(example.prompt_ids) - 1) + mask,
        prompt_tokens=None if tokens is None else tokens[:1],
        tokens=None if tokens is None else tokens[1:],
    )


def not_text(name: str, value: object) -> ExampleError:
    """Error for a value that is neither text nor chat messages."""
    return ExampleError(
        f"{name} must be text or a list of chat messages, got {glimpse(value)}",
        problem="not_text",
        field=name,
    )


def make_example(
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    response: Sequence[int],
    mask: Sequence[bool] | None,
    notes: Notes,
    name: str,
    options: RowOptions,
) -> Example:
    """Cut ids to the limits of the options, note what was cut, and make the example."""
    begin, end = len(prompt), len(prompt) + len(response)
    read, kept = cut_to_length(range(begin), range(begin, end), options, name)
    if len(read) < begin or read[0] >= begin:
        left = len(range(read[0], begin))
        notes.append(("truncated_prompt", f"{begin} -> {left} tokens, end kept"))
    if len(kept) < end - begin:
        eos = eos_ids(tokenizer, options.eos_token)
        if eos & set(response) and not eos & {response[place - begin] for place in kept}:
            last = max(place for place, token in enumerate(response) if token in eos)
            notes.append(("eos_lost", f"EOS at response token {last}, cut at {len(kept)}"))
        side = ", end kept" if kept[0] > begin else ""
        notes.append(("truncated_response", f"{end - begin} -> {len(kept)} tokens{side}"))
    mask = None if mask is None else [mask[place - begin] for place in kept]
    ids = (*prompt, *response)
    prompt, response = [ids[place] for place in read], [ids[place] for place in kept]
    named = tokenizer if options.texts else None
    return Example(
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        response_mask=None if mask is None else tuple(mask),
        name=name,
        tokens=None if named is None else token_texts(named, response),
        prompt_tokens=None if named is None else token_texts(named, prompt),
        notes=tuple(notes),
    )


def cut_to_length(
    prompt: Sequence[int], response: Sequence[int], options: RowOptions, name: str = ""
) -> tuple[Sequence[int], Sequence[int]]:
    """Prompt and response, cut as TRL's collator cuts a long sequence.

    Where `truncation_mode` "keep_end" leaves no token of the prompt, the first token that is left
    of the response becomes the prompt: it is read and not counted, as in TRL.

    Args:
        prompt: Token ids.
        response: Token ids.
        options: Most tokens of the prompt, of the response and of both, and which ones are kept.
        name: Field of the response, for errors.

    Raises:
        ExampleError: If nothing of the response is left.
    """
    if options.max_prompt_length is not None:
        prompt = prompt[-options.max_prompt_length :]
    if options.max_completion_length is not None:
        response = response[: options.max_completion_length]
    max_length = options.max_length
    if max_length is None or len(prompt) + len(response) <= max_length:
        return prompt, response
    excess = len(prompt) + len(response) - max_length
    if options.truncation_mode == "keep_end":
        if excess < len(prompt):
            return prompt[excess:], response
        begin = len(response) - max_length
        return response[begin : begin + 1], response[begin + 1 :]
    if excess >= len(response):
        raise ExampleError(
            f"the prompt must leave room for a response within max_length {max_length}, got "
            f"{len(prompt)} prompt tokens: set max_prompt_length, or drop the row",
            problem="prompt_fills_max_length",
            field=name,
        )
    return prompt, response[: len(response) - excess]


def _append_eos(tokenizer: Tokenizer, ids: list[int], options: RowOptions, notes: Notes) -> None:
    """Append the EOS token unless it is there or the tokenizer has none."""
    ends = eos_ids(tokenizer, options.eos_token)
    if ends and (not ids or ids[-1] not in ends):
        ids.append(min(ends))
        notes.append(("eos_added", f"token id {ids[-1]}"))


def _encode_text(
    tokenizer: Tokenizer,
    prompt: str,
    response: str,
    name: str,
    options: RowOptions,
    siblings: Sequence[str],
) -> Example:
    """Encode plain text."""
    if not response:
        raise EmptyResponseError(
            "response must have text, got '': there is no log-probability to measure; drop the row",
            field=name or "response",
        )
    notes: Notes = []
    alone = tokenize(tokenizer, prompt)
    ids = tokenize(tokenizer, prompt + response)
    if options.add_eos:
        _append_eos(tokenizer, ids, options, notes)
    start = common_prefix_length(alone, ids)
    for sibling in siblings:
        start = min(start, common_prefix_length(alone, tokenize(tokenizer, prompt + sibling)))
    _note_merge(tokenizer, alone, ids, start, notes)
    if start == 0:
        reason = (
            "the prompt is empty"
            if not prompt
            else (f"got {prompt[:40]!r}, whose {len(alone)} token(s) all merge with the response")
        )
        raise ExampleError(
            "prompt must have at least 1 token that the response does not change, as the first "
            f"token of the response is predicted from it; {reason}: begin the prompt with the BOS "
            "token, or drop the row",
            problem="empty_prompt",
            field="prompt",
        )
    return make_example(tokenizer, ids[:start], ids[start:], None, notes, name, options)


def _encode_messages(
    tokenizer: Tokenizer,
    prompt: Messages,
    response: Messages,
    name: str,
    options: RowOptions,
    siblings: Sequence[Sequence[Message]] = (),
) -> Example:
    """Encode messages with the chat template; the template ends the turn, so no EOS is appended."""
    written = [
        m for m in response if any(m.get(k) for k in ("content", "tool_calls", "reasoning_content"))
    ]
    if not written:
        raise EmptyResponseError(
            "response must have a message with content, got none: there is no log-probability to "
            "measure; drop the row",
            field=name or "response",
        )
    notes: Notes = []
    template = ChatTemplate(tokenizer, options.tools, options.chat_template_kwargs)
    template.check("prompt", prompt)
    template.check(name or "response", response, notes)
    messages = [*prompt, *response]
    _note_turns(messages, notes)
    try:
        alone = template.render_prompt(prompt)
        ids, counted = _render_response(template, messages, len(prompt), options, notes)
    except ExampleError as error:
        error.field = error.field or name
        raise
    start = common_prefix_length(alone, ids)
    for sibling in siblings:
        try:
            other = template.render([*prompt, *to_messages(name, sibling)])
        except ExampleError:
            continue  # it is reported where it is encoded
        start = min(start, common_prefix_length(alone, other))
    _note_merge(tokenizer, alone, ids, start, notes)
    if counted is None:
        _note_template_text(tokenizer, response[0], ids[max(start, 1) :], notes)
    start = max(start, 1)  # without a prompt the first token cannot be predicted
    mask = None if counted is None else counted[start:]
    if mask is not None and not any(mask):
        raise EmptyResponseError(
            f"{name} must count at least 1 token, got none: no message of the assistant has a "
            "weight above 0; drop the row",
            field=name or "response",
        )
    return make_example(tokenizer, ids[:start], ids[start:], mask, notes, name, options)


def _note_turns(messages: Messages, notes: Notes) -> None:
    """Note an end without an answer, and a system message that is not the first."""
    if messages[-1]["role"] != "assistant":
        detail = f"the conversation ends with a message of {messages[-1]['role']!r}"
        notes.append(("open_end", f"{detail}: no answer is learned from it"))
    late = [i for i, m in enumerate(messages) if i and m["role"] == "system"]
    if late:
        notes.append(("late_system", f"message {late[0]} of {len(messages)} is a system message"))


def _render_response(
    template: ChatTemplate, messages: Messages, first: int, options: RowOptions, notes: Notes
) -> tuple[list[int], list[bool] | None]:
    """Token ids of a conversation, and which of them count; None: all from `first` on.

    Args:
        template: The chat template.
        messages: The conversation.
        first: Index of the first message of the response.
        options: Whether the assistant's messages alone count.
        notes: Receives what was noticed.
    """
    response = messages[first:]
    weights = [message_weight(m) for m in response if m["role"] == "assistant"]
    parts = sorted({weight for weight in weights if weight not in (0, 1)})
    if parts:
        notes.append(
            (
                "partial_weight",
                f"messages with weight {', '.join(f'{x:g}' for x in parts)} count as with weight 1",
            )
        )
    mixed = any(message["role"] != "assistant" for message in response)
    if options.assistant_only and (mixed or 0 in weights):
        return template.render_counted(messages, first, notes)
    return template.render(messages), None


def _note_template_text(
    tokenizer: Tokenizer, message: Message, ids: list[int], notes: Notes
) -> None:
    """Note text that the chat template writes between the prompt and the assistant's words."""
    content = (message.get("content") or "").strip()
    if message["role"] != "assistant" or not content or message.get("reasoning_content"):
        return
    before, found, _ = tokenizer.decode(ids).partition(content[:40])
    if not found or not before.strip():
        return
    count = next(
        (n for n in range(1, len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= len(before)), 0
    )
    notes.append(
        (
            "template_text",
            f"the chat template writes {before!r} ({count} tokens) in front of the answer, and not "
            "at the end of the prompt; it counts as response",
        )
    )


def _note_merge(
    tokenizer: Tokenizer, alone: list[int], ids: list[int], start: int, notes: Notes
) -> None:
    """Note prompt tokens that change once the response follows; a special last token may."""
    lost = alone[start:]
    if not lost or set(lost) <= special_ids(tokenizer):
        return
    before = list(token_texts(tokenizer, lost))
    if ids[start : len(alone)] == lost:
        detail = f"{before} merge with the other response of the pair; they count as response"
        notes.append(("boundary_merge", f"the last {len(lost)} prompt token(s) {detail}"))
        return
    after: list[str] = []
    # The tokens that cover the same characters.
    length = len("".join(before))
    for token in ids[start:]:
        if len("".join(after)) >= length:
            break
        after += token_texts(tokenizer, [token])
    notes.append(
        (
            "boundary_merge",
            f"the last {len(lost)} prompt token(s) {before} become {after} once the response "
            "follows; they count as response",
        )
    )
