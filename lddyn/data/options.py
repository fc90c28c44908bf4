"""How rows become token sequences: one frozen value for `encode`, `encode_row`, `audit`, commands.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from lddyn.settings import TrainerSettings

__all__ = ["RowOptions", "RowSettings", "TruncationMode"]

TruncationMode = Literal["keep_start", "keep_end"]


class RowSettings(TypedDict, total=False):
    """The fields of `RowOptions`, as keywords of the functions that take it."""

    add_eos: bool
    eos_token: str | None
    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: TruncationMode
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[object] | None
    assistant_only: bool
    completion_only: bool
    texts: bool


@dataclass(frozen=True)
class RowOptions:
    """How the text or the messages of a row become token ids, and which of them are counted.

    `encode`, `encode_row` and `audit` take it as `options`; each of them also takes any field as a
    keyword, which replaces that of `options`.

    Attributes:
        add_eos: Append the EOS token to a plain-text response that does not end in it. Ignored for
            messages (the chat template ends the turn) and when the tokenizer has no EOS.
        eos_token: The EOS token, in place of the tokenizer's (TRL's `SFTConfig.eos_token`).
        max_length: Most tokens of prompt and response together. None: no limit.
        max_prompt_length: Most tokens of the prompt; a longer prompt keeps its end. Applied before
            `max_length`. None: no limit.
        max_completion_length: Most tokens of the response; a longer response keeps its start.
            Applied before `max_length`. None: no limit.
        truncation_mode: What a sequence longer than `max_length` keeps, as in TRL: `"keep_start"`
            keeps its first tokens, `"keep_end"` its last ones.
        chat_template_kwargs: Further arguments of the chat template.
        tools: Tool descriptions for the chat template.
        assistant_only: In a conversation, count the assistant's tokens only (TRL's
            `assistant_only_loss`). False: in a response of several messages count all of them; in
            a row that is one conversation count all tokens but the first, as TRL's SFTTrainer does
            by default.
        completion_only: In a row of prompt and completion, count the completion only (TRL's
            `completion_only_loss`). False: count the prompt, too.
        texts: Store the text of each token in `Example.tokens`, for pictures.

    Raises:
        ValueError: If a field is out of range; the message names it.

    Example:
        >>> import lddyn
        >>> options = lddyn.RowOptions(max_length=8)
        >>> row = {"prompt_ids": [1, 5], "completion_ids": [6, 2]}
        >>> lddyn.encode_row(None, row, options=options)["completion"].response_ids
        (6, 2)
        >>> lddyn.encode_row(None, row, options=options, max_length=3)["completion"].response_ids
        (6,)
    """

    add_eos: bool = True
    eos_token: str | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[object] | None = None
    assistant_only: bool = True
    completion_only: bool = True
    texts: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f'truncation_mode must be "keep_start" or "keep_end", got {self.truncation_mode!r}'
            )
        limits = (("max_length", 2), ("max_prompt_length", 1), ("max_completion_length", 1))
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    @classmethod
    def like(cls, settings: object) -> RowOptions:
        """The options that a trainer's settings ask for.

        Args:
            settings: What `lddyn.TrainerSettings.of` takes: a trainer, a TRL config, a
                TrainingArguments, a mapping or a file of arguments.

        Raises:
            ValueError: If it is none of these.

        Example:
            >>> import lddyn
            >>> like = lddyn.RowOptions.like({"trainer": "dpo", "max_length": 512})
            >>> like.max_length
            512
        """
        like = TrainerSettings.of(settings)
        return cls(**{f.name: getattr(like, f.name) for f in fields(cls) if hasattr(like, f.name)})

    def with_settings(self, settings: RowSettings) -> RowOptions:
        """These options, with some fields replaced."""
        return replace(self, **settings) if settings else self


DEFAULT = RowOptions()
