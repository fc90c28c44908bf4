"""One sequence χ = [x; y] as token ids, with its counted response tokens.

Response token y_k is predicted by the logit column at position `len(prompt) - 1 + k`.
`Example.positions` and `Example.targets` hold that shift, so that no other code repeats it.
"""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lddyn.errors import EmptyResponseError, ExampleError

__all__ = ["Example"]

IGNORED_LABEL = -100  # the label of a token that is not in the loss, in every trainer


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
        notes: What encoding changed or noticed, as (code, detail) pairs: `"boundary_merge"`,
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
        """Store every sequence as a tuple; raise for an example without a log-probability."""
        prompt = token_ids("prompt_ids", self.prompt_ids)
        response = token_ids("response_ids", self.response_ids)
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
        for key, value in (
            ("prompt_ids", prompt),
            ("response_ids", response),
            ("response_mask", _mask(self.response_mask, len(response))),
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

    def check_model_limits(self, vocab_size: int | None, max_positions: int | None = None) -> None:
        """Raise if a model cannot read this example.

        Args:
            vocab_size: Rows of the model's embedding, V. None: not checked.
            max_positions: Longest sequence the model was built for. None: not checked.

        Raises:
            ExampleError: (a ValueError) If a token id is not below `vocab_size`, or the example is
                longer than `max_positions`. The message names the position and both values.

        Example:
            >>> import lddyn
            >>> lddyn.Example([1, 7], [4]).check_model_limits(vocab_size=5)
            Traceback (most recent call last):
            ...
            lddyn.errors.ExampleError: ids[1] must be < vocab_size 5, got token id 7 (in the \
prompt): the tokenizer does not belong to this model, or the embedding was not resized
        """
        for position, token in enumerate(self.ids):
            if vocab_size is not None and token >= vocab_size:
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


def entries(values: Any) -> list[Any]:
    """The entries of a sequence, array or tensor as Python values."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


_LARGEST = 2**31 - 1  # what every tokenizer can decode


def token_ids(name: str, values: object) -> tuple[int, ...]:
    """Token ids as Python ints.

    Args:
        name: What the values are, for the error.
        values: A sequence, array or tensor of one dimension.

    Raises:
        ExampleError: If an entry is no integer, is negative or exceeds 2³¹ − 1; the error names
            its index.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
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
            hint = " (labels hold it; pass the input ids)" if token == IGNORED_LABEL else ""
            raise ExampleError(
                f"{name}[{index}] must be a token id >= 0, got {token}{hint}",
                problem="bad_token_id",
                field=name,
            )
        if token > _LARGEST:
            shown = token if token < 10**20 else "a longer number"
            raise ExampleError(
                f"{name}[{index}] must be a token id of at most {_LARGEST}, got {shown}",
                problem="bad_token_id",
                field=name,
            )
        ids.append(token)
    return tuple(ids)


def _mask(mask: Iterable[object] | None, count: int) -> tuple[bool, ...] | None:
    """The mask as bools, one per response token; None when every token counts."""
    if mask is None:
        return None
    counted = tuple(bool(value) for value in entries(mask))
    if len(counted) != count:
        raise ExampleError(
            f"response_mask must have {count} entries, one per response token, got {len(counted)}",
            problem="bad_mask",
            field="response_mask",
        )
    if not any(counted):
        raise ExampleError(
            f"response_mask must count at least 1 of the {count} response tokens, got all False: "
            "no token is left to measure",
            problem="bad_mask",
            field="response_mask",
        )
    return None if all(counted) else counted


def _texts(name: str, values: Iterable[object] | None, count: int) -> tuple[str, ...] | None:
    """The texts as a tuple, one per token, or None."""
    if values is None:
        return None
    texts = tuple(str(value) for value in values)
    if len(texts) != count:
        raise ExampleError(f"{name} must have {count} entries, one per token, got {len(texts)}")
    return texts
