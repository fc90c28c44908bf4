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

import hashlib
import json
import operator
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Audit",
    "EmptyResponseError",
    "Example",
    "ExampleError",
    "Finding",
    "audit",
    "encode",
    "encode_row",
    "rows",
]

Truncation = Literal["keep_end", "keep_start"]
Message = Mapping[str, Any]
Text = str | Sequence[Message]

_IGNORED_LABEL = -100  # the value that masks a label out of the loss, everywhere in the ecosystem
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


class ExampleError(ValueError):
    """A sequence or data row that cannot become an `Example`.

    Attributes:
        problem: Short code of the problem, as in the table of `audit` (`"empty_prompt"`, ...).
        field: The argument or column at fault, `""` when the whole row is.
    """

    def __init__(self, message: str, *, problem: str = "invalid", field: str = "") -> None:
        """Keep the message with the code and the field it is about."""
        super().__init__(message)
        self.problem = problem
        self.field = field


class EmptyResponseError(ExampleError):
    """The response has no tokens: there is no log-probability to measure."""

    def __init__(self, message: str, *, field: str = "response_ids") -> None:
        """Keep the message; the code is always `"empty_response"`."""
        super().__init__(message, problem="empty_response", field=field)


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Return `values` as a tuple of non-negative Python ints, or say which entry is not one."""
    if hasattr(values, "tolist"):  # tensor, array
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ExampleError(
            f"{name} must be a sequence of token ids, got {type(values).__name__}: tokenise text "
            "first (lddyn.encode)",
            problem="bad_token_id",
            field=name,
        )
    ids = []
    for index, value in enumerate(values):
        try:
            if isinstance(value, bool):
                raise TypeError
            token = operator.index(value)
        except TypeError:
            raise ExampleError(
                f"{name}[{index}] must be an integer token id, got {value!r} "
                f"({type(value).__name__})",
                problem="bad_token_id",
                field=name,
            ) from None
        if token < 0:
            hint = " (labels hold it; pass the input ids)" if token == _IGNORED_LABEL else ""
            raise ExampleError(
                f"{name}[{index}] must be a token id >= 0, got {token}{hint}",
                problem="bad_token_id",
                field=name,
            )
        ids.append(token)
    return tuple(ids)


def _texts(name: str, values: Any, count: int) -> tuple[str, ...] | None:
    """Return printable texts as a tuple of the right length, or None."""
    if values is None:
        return None
    texts = tuple(str(value) for value in values)
    if len(texts) != count:
        raise ExampleError(f"{name} must have {count} entries, one per token, got {len(texts)}")
    return texts


@dataclass(frozen=True)
class Example:
    """A prompt and a response as token ids, χ = [x; y].

        log π(y | x) = sum_k log softmax(z[positions[k]])[targets[k]]

    Args:
        prompt_ids: Token ids of the prompt x, at least one (the first response token is predicted
            from the last prompt token; use the BOS token when there is no prompt).
        response_ids: Token ids of the response y, at least one.
        response_mask: Which response tokens count, one bool per response token. None: all. The
            others are still read by the model (the user's turns in a multi-turn response).
        name: What the response is, for example `"chosen"`.
        tokens: Printable text of each response token, for pictures. None: unknown.
        prompt_tokens: Printable text of each prompt token. None: unknown.
        notes: What happened on the way here, as (code, detail) pairs: `"boundary_merge"`,
            `"truncated_prompt"`, `"truncated_response"`, `"eos_lost"`, `"eos_added"`,
            `"template_rewrite"`. Not part of equality or of `content_id`.

    Raises:
        EmptyResponseError: If there are no response tokens.
        ExampleError: (a ValueError) If the prompt is empty, an id is negative or not an integer,
            or the mask has the wrong length or counts no token.

    Example:
        >>> import lddyn
        >>> ex = lddyn.Example(prompt_ids=[1, 7], response_ids=[4, 5, 2])
        >>> ex.positions, ex.targets
        ((1, 2, 3), (4, 5, 2))
        >>> len(ex), ex.length
        (3, 5)
        >>> ex = lddyn.Example([1, 7], [4, 5, 2], response_mask=[True, False, True])
        >>> ex.positions, ex.targets
        ((1, 3), (4, 2))
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    response_mask: tuple[bool, ...] | None = None
    name: str = ""
    tokens: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    prompt_tokens: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    notes: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """Normalise every sequence to a tuple and refuse what has no log-probability."""
        prompt = _token_ids("prompt_ids", self.prompt_ids)
        response = _token_ids("response_ids", self.response_ids)
        if not prompt:
            raise ExampleError(
                "prompt_ids must have at least 1 token, got 0: a first token is needed to predict "
                "from; use the BOS token",
                problem="empty_prompt",
                field="prompt_ids",
            )
        if not response:
            raise EmptyResponseError(
                "response_ids must have at least 1 token, got 0: there is no log-probability to "
                "measure; drop the row"
            )
        mask = self.response_mask
        if mask is not None:
            values = mask.tolist() if hasattr(mask, "tolist") else mask
            mask = tuple(bool(value) for value in values)
            if len(mask) != len(response):
                raise ExampleError(
                    f"response_mask must have {len(response)} entries, one per response token, "
                    f"got {len(mask)}",
                    problem="bad_mask",
                    field="response_mask",
                )
            if not any(mask):
                raise ExampleError(
                    f"response_mask must count at least 1 of the {len(response)} response tokens, "
                    "got all False: no token is left to measure",
                    problem="bad_mask",
                    field="response_mask",
                )
            if all(mask):
                mask = None
        for key, value in (
            ("prompt_ids", prompt),
            ("response_ids", response),
            ("response_mask", mask),
            ("tokens", _texts("tokens", self.tokens, len(response))),
            ("prompt_tokens", _texts("prompt_tokens", self.prompt_tokens, len(prompt))),
            ("notes", tuple((str(code), str(detail)) for code, detail in self.notes)),
        ):
            object.__setattr__(self, key, value)

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids, prompt then response."""
        return self.prompt_ids + self.response_ids

    @property
    def length(self) -> int:
        """Number of tokens the model reads: T."""
        return len(self.prompt_ids) + len(self.response_ids)

    def __len__(self) -> int:
        """Number of counted response tokens: M (or L)."""
        return len(self.targets)

    @cached_property
    def _counted(self) -> tuple[int, ...]:
        """Indices into the response of the tokens that count."""
        if self.response_mask is None:
            return tuple(range(len(self.response_ids)))
        return tuple(k for k, counted in enumerate(self.response_mask) if counted)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Logit columns that predict the counted tokens: `len(prompt) - 1 + k`."""
        first = len(self.prompt_ids) - 1
        return tuple(first + k for k in self._counted)

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """Ids of the counted response tokens, aligned with `positions`."""
        return tuple(self.response_ids[k] for k in self._counted)

    @property
    def token_texts(self) -> tuple[str, ...]:
        """Printable text of each counted token, aligned with `targets`; the id when unknown."""
        texts = self.tokens or tuple(map(str, self.response_ids))
        return tuple(texts[k] for k in self._counted)

    @property
    def prompt_texts(self) -> tuple[str, ...]:
        """Printable text of each prompt token; the id when unknown."""
        return self.prompt_tokens or tuple(map(str, self.prompt_ids))

    @cached_property
    def content_id(self) -> str:
        """Hash of ids and mask, 32 hex digits: the same content has the same id on any machine."""
        counts = array("q", [len(self.prompt_ids), len(self.response_ids), len(self)])
        digest = hashlib.blake2b(digest_size=16)
        for part in (counts, array("q", self.ids), array("q", self.positions)):
            if array("H", [1]).tobytes() != b"\x01\x00":  # pragma: no cover - big-endian machine
                part.byteswap()
            digest.update(part.tobytes())
        return digest.hexdigest()

    def check_model_limits(self, vocab_size: int, max_positions: int | None = None) -> None:
        """Raise if a model cannot read this example.

        Args:
            vocab_size: Rows of the model's embedding, V.
            max_positions: Longest sequence the model was built for. None: not checked.

        Raises:
            ExampleError: (a ValueError) If a token id is not below `vocab_size`, or the example is
                longer than `max_positions`. The message names the position and both values.

        Example:
            >>> import lddyn
            >>> lddyn.Example([1, 7], [4]).check_model_limits(vocab_size=5)
            Traceback (most recent call last):
            ...
            lddyn.examples.ExampleError: ids[1] must be < vocab_size 5, got token id 7 (in the \
prompt): the tokenizer does not belong to this model, or the embedding was not resized
        """
        for position, token in enumerate(self.ids):
            if token >= vocab_size:
                part = "prompt" if position < len(self.prompt_ids) else "response"
                raise ExampleError(
                    f"ids[{position}] must be < vocab_size {vocab_size}, got token id {token} (in "
                    f"the {part}): the tokenizer does not belong to this model, or the embedding "
                    "was not resized",
                    problem="token_out_of_range",
                    field=self.name,
                )
        if max_positions is not None and self.length > max_positions:
            raise ExampleError(
                f"length must be <= {max_positions}, the model's context, got {self.length} tokens "
                f"(prompt {len(self.prompt_ids)} + response {len(self.response_ids)}): encode with "
                "max_length",
                problem="over_context",
                field=self.name,
            )


# ---------------------------------------------------------------------------------------------
# Encoding


@dataclass(frozen=True)
class _Options:
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


def _common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by default."""
    return list(tokenizer(text=text)["input_ids"])


def _render(
    tokenizer: Any, messages: Sequence[Message], options: _Options, **kwargs: Any
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


def _check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
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


def _finish(
    tokenizer: Any,
    full: list[int],
    start: int,
    mask: list[bool] | None,
    notes: list[tuple[str, str]],
    name: str,
    options: _Options,
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
        eos = _eos_ids(tokenizer)
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


def _eos_ids(tokenizer: Any) -> set[int]:
    """Ids that end a sequence; empty when the tokenizer has none."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list | tuple | set) else {int(eos)}


def _add_eos(tokenizer: Any, full: list[int], notes: list[tuple[str, str]]) -> None:
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
    options: _Options,
    siblings: Sequence[str] = (),
) -> Example:
    """Encode plain text; the response starts where tokens of prompt and prompt + response part."""
    if not response:
        raise EmptyResponseError(
            "response must have text, got '': there is no log-probability to measure; drop the row",
            field=name or "response",
        )
    notes: list[tuple[str, str]] = []
    alone = _tokenize(tokenizer, prompt)
    full = _tokenize(tokenizer, prompt + response)
    if options.add_eos:
        _add_eos(tokenizer, full, notes)
    start = _common_prefix(alone, full)
    for sibling in siblings:  # a pair shares its prompt tokens: both start at the earlier one
        start = min(start, _common_prefix(alone, _tokenize(tokenizer, prompt + sibling)))
    _note_merge(tokenizer, alone, full, start, notes)
    if start == 0:
        raise ExampleError(
            f"prompt must give at least 1 token that the response leaves alone, got "
            f"{prompt[:40]!r} ({len(alone)} tokens, all changed by the response): a first token is "
            "needed to predict from; start the prompt with the BOS token",
            problem="empty_prompt",
            field="prompt",
        )
    return _finish(tokenizer, full, start, None, notes, name, options)


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


def _encode_chat(
    tokenizer: Any,
    prompt: list[dict[str, Any]],
    response: list[dict[str, Any]],
    name: str,
    options: _Options,
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
    start = _common_prefix(alone, full)
    for sibling in siblings:
        other = _render(tokenizer, [*prompt, *sibling], options)["input_ids"]
        start = min(start, _common_prefix(alone, list(other)))
    _note_merge(tokenizer, alone, full, start, notes)
    start = max(start, 1)  # a conversation without a prompt: its first token is not predicted
    return _finish(
        tokenizer, full, start, mask[start:] if mask is not None else None, notes, name, options
    )


def _render_masked(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    n_prompt: int,
    options: _Options,
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
        begin, end = _common_prefix(before, full), _common_prefix(until, full)
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
    options = _Options(
        add_eos=add_eos,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
        assistant_only=assistant_only,
    )
    return _encode(tokenizer, prompt, response, name, options)


def _encode(
    tokenizer: Any,
    prompt: Any,
    response: Any,
    name: str,
    options: _Options,
    siblings: Sequence[Any] = (),
) -> Example:
    """Tell text from messages, check the types, encode."""
    if isinstance(prompt, str) and isinstance(response, str):
        others = [sibling for sibling in siblings if isinstance(sibling, str) and sibling]
        return _encode_text(tokenizer, prompt, response, name, options, others)
    if _is_messages(prompt):
        if isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        if _is_messages(response) or response == []:
            return _encode_chat(
                tokenizer,
                _check_messages("prompt", prompt),
                _check_messages(name or "response", response),
                name,
                options,
                [_check_messages(name, other) for other in siblings if _is_messages(other)],
            )
    for label, value in (("prompt", prompt), (name or "response", response)):
        if not isinstance(value, str) and not _is_messages(value):
            raise ExampleError(
                f"{label} must be text or a list of chat messages, got {_describe(value)}",
                problem="not_text",
                field=label,
            )
    raise ExampleError(
        "prompt and response must both be text, or the prompt a list of chat messages, got "
        f"{_describe(prompt)} and {_describe(response)}: put the prompt in a user message",
        problem="not_text",
        field="prompt",
    )


def _is_messages(value: Any) -> bool:
    """Whether a value looks like a non-empty list of chat messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(message, Mapping) for message in value)
    )


def _describe(value: Any) -> str:
    """Type and a glimpse of a value, for an error message."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"


# ---------------------------------------------------------------------------------------------
# Rows


def rows(source: Any, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Read data rows from a file, a data set, or any iterable of mappings.

    Args:
        source: Path of a JSONL, JSON (a list) or Parquet file; or a list of dicts, a
            `datasets.Dataset`, a pandas data frame, any iterable of mappings.
        limit: Most rows to read. None: all.

    Returns:
        The rows as dicts, in order.

    Raises:
        ExampleError: (a ValueError) If a row cannot be read; names file, line and problem.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from lddyn.examples import rows
        >>> rows([{"prompt": "Is it red?", "completion": " Yes"}])
        [{'prompt': 'Is it red?', 'completion': ' Yes'}]
    """
    read: list[dict[str, Any]] = []
    for row in _iter_rows(source):
        if limit is not None and len(read) >= limit:
            break
        if isinstance(row, ExampleError):
            raise row
        read.append(row)
    return read


def _unreadable(where: str, problem: str) -> ExampleError:
    """Error for one row that cannot be read."""
    return ExampleError(f"{where}: {problem}", problem="unreadable_row")


def _iter_rows(source: Any) -> Iterator[dict[str, Any] | ExampleError]:
    """Yield rows, and an error in the place of each row that cannot be read."""
    if isinstance(source, str | os.PathLike):
        yield from _read_file(Path(source))
        return
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # data frame
        source = source.to_dict("records")
    if isinstance(source, Mapping):
        raise ExampleError(
            f"source must be an iterable of rows, got one mapping with keys "
            f"{sorted(map(str, source))[:8]}: choose a split, or put the row in a list",
            problem="unreadable_row",
        )
    if not isinstance(source, Iterable):
        raise TypeError(f"source must be a path or an iterable of rows, got {_describe(source)}")
    for index, row in enumerate(source):
        yield _as_row(row, f"row {index}")


def _as_row(row: Any, where: str) -> dict[str, Any] | ExampleError:
    """Return a row as a dict, or the error that says why it is none."""
    if not isinstance(row, Mapping):
        return _unreadable(where, f"a row must be a mapping of columns, got {_describe(row)}")
    return {str(key): value for key, value in row.items()}


def _read_file(path: Path) -> Iterator[dict[str, Any] | ExampleError]:
    """Yield the rows of a JSONL, JSON or Parquet file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a .jsonl, .json or .parquet file"
            + (" (this is a directory)" if path.is_dir() else "")
        )
    if path.suffix.lower() == ".parquet":
        yield from _read_parquet(path)
        return
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        try:
            table = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise _unreadable(str(path), f"not a JSON list ({error})") from error
        for index, row in enumerate(table):
            yield _as_row(row, f"{path}, entry {index}")
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}, line {number}"
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield _unreadable(where, f"not UTF-8 ({error.reason} at byte {error.start})")
            except json.JSONDecodeError as error:
                yield _unreadable(where, f"not JSON ({error.msg} at column {error.colno})")
            except RecursionError:
                yield _unreadable(where, "not JSON (nested too deep)")
            else:
                yield _as_row(row, where)


def _read_parquet(path: Path) -> Iterator[dict[str, Any] | ExampleError]:
    """Yield the rows of a Parquet file, batch by batch."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or give JSONL"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), f"not a Parquet file ({error})") from error


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
        >>> from lddyn.examples import encode_row
        >>> row = {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}
        >>> encode_row(None, row)["rejected"].response_ids
        (7, 2)
    """
    options = _Options(
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
    for name, job in _jobs(tokenizer, row, fields, options):
        try:
            encoded[name] = job()
        except EmptyResponseError:
            if not skip_empty:
                raise
    return encoded


Jobs = list[tuple[str, Callable[[], Example]]]


def _jobs(
    tokenizer: Any, row: Mapping[str, Any], fields: Sequence[str] | str | None, options: _Options
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
    tokenizer: Any, prompt: Any, response: Any, name: str, options: _Options, others: list[Any]
) -> Callable[[], Example]:
    """Encode one response later; `prompt` None means the whole text or conversation is given."""

    def job() -> Example:
        if prompt is not None:
            return _encode(tokenizer, prompt, response, name, options, others)
        if isinstance(response, str):
            return _encode_whole(tokenizer, response, name, options)
        messages = _check_messages(name, response) if _is_messages(response) else []
        if not messages:
            raise ExampleError(
                f"{name} must be text or a list of chat messages, got {_describe(response)}",
                problem="not_text",
                field=name,
            )
        roles = [message["role"] for message in messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        return _encode_chat(tokenizer, messages[:first], messages[first:], name, options)

    return job


def _encode_whole(tokenizer: Any, text: str, name: str, options: _Options) -> Example:
    """Encode text without a prompt: every token after the first counts."""
    notes: list[tuple[str, str]] = []
    full = _tokenize(tokenizer, text) if text else []
    if full and options.add_eos:
        _add_eos(tokenizer, full, notes)
    if len(full) < 2:
        raise EmptyResponseError(
            f"{name} must have at least 2 tokens (the first is only read), got {len(full)}: drop "
            "the row",
            field=name,
        )
    return _finish(tokenizer, full, 1, None, notes, name, options)


def _row_options(row: Mapping[str, Any], options: _Options) -> _Options:
    """Options with the row's own tools and chat_template_kwargs."""
    tools = row.get("tools") or options.tools
    if isinstance(tools, str):
        tools = json.loads(tools)
    extra = row.get("chat_template_kwargs") or {}
    if tools is options.tools and not extra:
        return options
    merged = {**dict(options.chat_template_kwargs or {}), **dict(extra)}
    values = {**options.__dict__, "tools": tools, "chat_template_kwargs": merged or None}
    return _Options(**values)


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
            "prompt" not in row or (isinstance(prompt, str) and _is_messages(row["chosen"]))
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
        if not isinstance(value, str) and not _is_messages(value):
            raise ExampleError(
                f"{name} must be text or a list of chat messages, got {_describe(value)}",
                problem="not_text",
                field=name,
            )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ExampleError(
            f"chosen and rejected must both be text or both messages, got {_describe(chosen)} and "
            f"{_describe(rejected)}",
            problem="not_text",
            field="rejected",
        )
    shared = _common_prefix(chosen, rejected)
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


def _id_jobs(tokenizer: Any, row: Mapping[str, Any], options: _Options) -> Jobs:
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
    ids = _token_ids("input_ids", row["input_ids"])
    counted = _counted_tokens(row, ids)
    pieces = _documents(row, len(ids))
    jobs: Jobs = []
    for index, (begin, end) in enumerate(pieces):
        name = "input_ids" if len(pieces) == 1 else f"document_{index}"
        job = _masked_job(tokenizer, ids[begin:end], counted[begin:end], name, options)
        jobs.append((name, job))
    return jobs


def _id_job(
    tokenizer: Any, prompt: Any, response: Any, mask: Any, name: str, options: _Options
) -> Callable[[], Example]:
    """Make one example of ids later."""

    def job() -> Example:
        left, right = _token_ids("prompt_ids", prompt), _token_ids(f"{name}_ids", response)
        if not left or not right:  # Example says what is wrong
            return Example(left, right, name=name)
        return _finish(tokenizer, [*left, *right], len(left), mask, [], name, options)

    return job


def _masked_job(
    tokenizer: Any, ids: Sequence[int], counted: Sequence[bool], name: str, options: _Options
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
        return _finish(tokenizer, list(ids[:stop]), start, mask, [], name, options)

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
                if label not in (_IGNORED_LABEL, token):
                    raise ExampleError(
                        f"labels[{index}] must be input_ids[{index}] = {token} or {_IGNORED_LABEL},"
                        f" got {label}: labels are not shifted in a data set",
                        problem="bad_mask",
                        field="labels",
                    )
            values = [label != _IGNORED_LABEL for label in values]
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


# ---------------------------------------------------------------------------------------------
# Audit

# problem: (what it means, whether the row cannot be used)
_PROBLEMS: dict[str, tuple[str, bool]] = {
    "unreadable_row": ("the row cannot be read", True),
    "missing_column": ("a column is missing", True),
    "not_text": ("None, or neither text nor messages", True),
    "bad_message": ("a chat message without a role", True),
    "no_chat_template": ("messages, but the tokenizer has no chat template", True),
    "bad_token_id": ("a token id that is negative or no integer", True),
    "bad_mask": ("labels or masks that do not fit the ids, or count nothing", True),
    "invalid": ("cannot be encoded", True),
    "empty_prompt": ("no prompt token to predict from", True),
    "empty_response": ("no response token; a trainer would train on a lone EOS", True),
    "identical_pair": ("chosen and rejected are the same: the gradient is exactly 0", True),
    "prompt_fills_max_length": ("the prompt leaves no room for a response", True),
    "over_context": ("longer than the model's context", True),
    "token_out_of_range": ("a token id that the model has no embedding for", True),
    "blank_response": ("the response is only white space", False),
    "truncated_prompt": ("the prompt was cut", False),
    "truncated_response": ("the response was cut", False),
    "eos_lost": ("truncation removed the EOS: the model is not taught to stop", False),
    "eos_not_counted": ("no EOS among the counted tokens: the model is not taught to stop", False),
    "pad_is_eos": ("pad and EOS are one token: a collator that masks pad masks EOS too", False),
    "boundary_merge": ("tokens merge across the end of the prompt", False),
    "template_rewrite": ("the chat template renders earlier turns differently later", False),
    "duplicate": ("the same prompt and responses as an earlier row", False),
}


@dataclass(frozen=True)
class Finding:
    """One line of the audit: what is wrong, and where.

    Attributes:
        row: Index of the row, from 0; -1 when it concerns the whole data set.
        field: Column at fault, `""` for the whole row.
        problem: Code of the problem.
        detail: What was found.
        severity: `"error"` when the row cannot be used, `"warning"` when it can.
    """

    row: int
    field: str
    problem: str
    detail: str
    severity: str = "warning"


@dataclass(frozen=True)
class Audit:
    """What `audit` found in a data set: a table of findings, and the counts behind the shares.

    Attributes:
        n_rows: Rows read, unreadable ones included.
        n_responses: Responses that could be encoded.
        n_eos_counted: Of these, how many have an EOS among the counted tokens.
        findings: The table, in row order.
    """

    n_rows: int
    n_responses: int
    n_eos_counted: int
    findings: tuple[Finding, ...]

    def __len__(self) -> int:
        """Number of findings."""
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        """Iterate over the findings."""
        return iter(self.findings)

    @property
    def unusable(self) -> tuple[int, ...]:
        """Indices of the rows that cannot be used, ascending."""
        return tuple(sorted({f.row for f in self.findings if f.severity == "error" and f.row >= 0}))

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def of(self, problem: str) -> tuple[Finding, ...]:
        """Findings with the given code."""
        return tuple(f for f in self.findings if f.problem == problem)

    def summary(self) -> dict[str, int]:
        """Number of rows with each problem (1 for a problem of the whole set), worst first.

        Errors come first, then the more frequent.
        """
        affected: dict[str, set[int]] = {}
        for finding in self.findings:
            affected.setdefault(finding.problem, set()).add(finding.row)
        counts = Counter({problem: len(found) for problem, found in affected.items()})
        order = sorted(counts, key=lambda problem: (not _PROBLEMS[problem][1], -counts[problem]))
        return {problem: counts[problem] for problem in order}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the audit as JSON text; `from_json` reads it back."""
        payload = {
            "n_rows": self.n_rows,
            "n_responses": self.n_responses,
            "n_eos_counted": self.n_eos_counted,
            "unusable": list(self.unusable),
            "summary": self.summary(),
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(payload, ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Audit:
        """Read back what `to_json` wrote."""
        payload = json.loads(text)
        findings = tuple(Finding(**finding) for finding in payload["findings"])
        return cls(payload["n_rows"], payload["n_responses"], payload["n_eos_counted"], findings)

    def __str__(self) -> str:
        """The table, one line per problem with its first occurrence."""
        head = f"audit: {self.n_rows} rows, {self.n_responses} responses"
        if self.n_responses:
            share = 100.0 * self.n_eos_counted / self.n_responses
            head += f", EOS counted in {share:.1f} %"
        head += f", {len(self.unusable)} rows unusable"
        if not self.findings:
            return head + "; nothing found"
        lines = [head]
        for problem, count in self.summary().items():
            meaning, error = _PROBLEMS[problem]
            first = self.of(problem)[0]
            place = "whole set" if first.row < 0 else f"row {first.row}"
            if first.field:
                place += f" {first.field}"
            mark = "error" if error else "warn "
            lines.append(f"  {mark} {problem:<24}{count:>7}  {meaning}")
            lines.append(f"          first: {place}: {first.detail}")
        return "\n".join(lines)


def audit(
    tokenizer: Any,
    rows: Any,
    fields: Sequence[str] | Literal["all"] | None = None,
    *,
    add_eos: bool = True,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_end",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    assistant_only: bool = True,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    config: Any = None,
) -> Audit:
    """List what is wrong with a data set, as the trainer would see it; a bad row is a line.

    Looks for rows that cannot be read or encoded, empty and blank responses, identical and
    duplicate pairs, truncation and the EOS lost by it, responses whose EOS is not in the loss, pad
    = EOS, tokens that merge across the end of the prompt, and examples that a model cannot read.

    Args:
        tokenizer: A transformers tokenizer, or anything that behaves like one.
        rows: The data, in anything that `lddyn.examples.rows` reads.
        fields: As in `encode_row`.
        add_eos: As in `encode`.
        max_length: As in `encode`.
        max_prompt_length: As in `encode`.
        truncation: As in `encode`.
        chat_template_kwargs: As in `encode`.
        tools: As in `encode`.
        assistant_only: As in `encode`.
        vocab_size: Rows of the model's embedding. Default: from `config`, else not checked.
        max_positions: The model's context. Default: from `config`, else not checked.
        config: A model's config, for `vocab_size` and `max_position_embeddings`.

    Returns:
        The table; print it, or use `summary()`, `unusable`, `to_json()`.

    Cost: two tokenisations per response.

    Example:
        >>> from lddyn.examples import audit
        >>> table = [{"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [6, 2]}]
        >>> audit(None, table).summary()
        {'identical_pair': 1}
    """
    options = _Options(
        add_eos=add_eos,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
        assistant_only=assistant_only,
        texts=False,
    )
    if config is not None:
        text_config = getattr(config, "text_config", None) or config
        if vocab_size is None:
            vocab_size = getattr(text_config, "vocab_size", None)
        if max_positions is None:
            max_positions = getattr(text_config, "max_position_embeddings", None)
    eos = _eos_ids(tokenizer)
    findings: dict[Finding, None] = {}  # ordered; the prompt's fault is one, not one a response

    def report(row: int, name: str, problem: str, detail: str) -> None:
        severity = "error" if _PROBLEMS[problem][1] else "warning"
        findings[Finding(row, name, problem, detail, severity)] = None

    if eos and getattr(tokenizer, "pad_token_id", None) in eos:
        report(-1, "tokenizer", "pad_is_eos", f"token id {tokenizer.pad_token_id} is both")
    n_rows = n_responses = n_eos = 0
    seen: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(_iter_rows(rows)):
        n_rows += 1
        examples: dict[str, Example] = {}
        try:
            if isinstance(row, ExampleError):
                raise row
            jobs = _jobs(tokenizer, row, fields, options)
        except Exception as error:
            report(index, *_as_finding(error, ""))
            continue
        for name, job in jobs:
            try:
                examples[name] = job()
            except Exception as error:  # a broken tokenizer or template is a finding too
                report(index, *_as_finding(error, name))
        for name, example in examples.items():
            n_responses += 1
            n_eos += bool(eos & set(example.targets))
            for problem, detail in _check_example(tokenizer, example, eos):
                report(index, name, problem, detail)
            for vocabulary, context in ((vocab_size, None), (None, max_positions)):
                try:
                    example.check_model_limits(
                        vocabulary if vocabulary is not None else 2**63, context
                    )
                except ExampleError as error:
                    report(index, name, error.problem, str(error))
        pair = [examples[name].content_id for name in ("chosen", "rejected") if name in examples]
        if len(pair) == 2 and pair[0] == pair[1]:
            report(index, "rejected", "identical_pair", "chosen and rejected are the same")
        if examples and len(examples) == len(jobs):
            key = tuple(f"{name}:{example.content_id}" for name, example in examples.items())
            first = seen.setdefault(key, index)
            if first != index:
                report(index, "", "duplicate", f"same as row {first}")
    return Audit(n_rows, n_responses, n_eos, tuple(findings))


def _as_finding(error: Exception, name: str) -> tuple[str, str, str]:
    """(field, problem, detail) of an exception met while encoding `name`."""
    if isinstance(error, ExampleError):
        problem = error.problem if error.problem in _PROBLEMS else "invalid"
        return error.field or name, problem, str(error)
    return name, "invalid", f"{type(error).__name__}: {error}"


def _check_example(tokenizer: Any, example: Example, eos: set[int]) -> Iterator[tuple[str, str]]:
    """Yield (problem, detail) of an example that could be encoded."""
    codes = set()
    for code, detail in example.notes:
        codes.add(code)
        if code in _PROBLEMS:
            yield code, detail
    if tokenizer is not None:
        text = tokenizer.decode([t for t in example.targets if t not in eos])
        if not text.strip():
            yield "blank_response", f"{text!r}"
    if eos and "eos_lost" not in codes and not eos & set(example.targets):
        yield (
            "eos_not_counted",
            f"the response ends in token id {example.response_ids[-1]}, not in EOS {sorted(eos)}",
        )
