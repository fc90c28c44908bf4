"""What lddyn needs of a tokenizer: the ids of a text, its end tokens, the text of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lddyn.errors import ExampleError

__all__ = ["Tokenizer"]

LONGEST_TEXT = 1 << 24  # characters of a prompt or response


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that lddyn calls; an object that has it will do.

    Attributes:
        eos_token_id: Id, or ids, of the token that ends a sequence. None: the tokenizer has none.
        pad_token_id: Id of the padding token. None: the tokenizer has none.
        chat_template: Jinja template that renders messages. None: messages cannot be encoded.
    """

    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    chat_template: str | None

    def __call__(self, *, text: str) -> Mapping[str, Sequence[int]]:
        """`{"input_ids": token ids}` of a text, special tokens included."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the tokens."""
        ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> Sequence[str | None]:
        """Vocabulary entry of each token."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Id of a vocabulary entry; called for `RowOptions.eos_token` only."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], **kwargs: Any
    ) -> Mapping[str, Sequence[int]]:
        """`{"input_ids": token ids}` of a conversation; `assistant_masks` too if required."""
        ...


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by default.

    Raises:
        ExampleError: If the text has more than 2^24 characters, which would take minutes.
    """
    if len(text) > LONGEST_TEXT:
        raise ExampleError(
            f"a text must have at most {LONGEST_TEXT:,} characters, got {len(text):,}: no model "
            "reads so long a row"
        )
    return list(tokenizer(text=text)["input_ids"])


def eos_ids(tokenizer: Tokenizer | None, eos_token: str | None = None) -> set[int]:
    """Ids that end a sequence; empty when the tokenizer has none.

    Args:
        tokenizer: The tokenizer.
        eos_token: As in `RowOptions`.

    Raises:
        ValueError: If the vocabulary does not have `eos_token`.
    """
    if tokenizer is not None and eos_token is not None:
        token = tokenizer.convert_tokens_to_ids(eos_token)
        if token is None or token == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(f"eos_token must be in the tokenizer's vocabulary, got {eos_token!r}")
        return {token}
    return as_ids(getattr(tokenizer, "eos_token_id", None))


def special_ids(tokenizer: Tokenizer | None) -> set[int]:
    """Ids of special tokens: those with a name, and those that were added as special."""
    named = set(getattr(tokenizer, "all_special_ids", None) or ())
    added: Mapping[int, object] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return named | {i for i, token in added.items() if getattr(token, "special", False)}


def as_ids(value: object) -> set[int]:
    """The ids of a field such as `eos_token_id`, which holds one id, several, or None."""
    if value is None:
        return set()
    return {int(v) for v in value} if isinstance(value, list | tuple | set) else {int(str(value))}


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Printable text of each token.

    The decoded text; the vocabulary entry where a token is a part of a character, or nothing.
    """
    texts: dict[int, str] = {}
    for token in ids:
        if token in texts:
            continue
        text = tokenizer.decode([token], skip_special_tokens=False)
        piece = tokenizer.convert_ids_to_tokens([token])[0]
        if isinstance(piece, str):
            if "\ufffd" in text or not text:
                text = piece
            elif piece.startswith("\u2581") and not text.startswith(" "):
                text = " " + text  # SentencePiece drops the space of a token decoded alone
        texts[token] = text or f"<{token}>"
    return tuple(texts[token] for token in ids)
