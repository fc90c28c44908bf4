"""What a tokenizer and its chat template do at the begin and the end of a turn, for checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lddyn.data.chat import ChatTemplate
from lddyn.data.options import RowOptions
from lddyn.data.tokenizer import Tokenizer, as_ids, eos_ids, special_ids, token_texts, tokenize
from lddyn.errors import ExampleError

__all__ = ["TokenFacts"]

_ANSWER = "here"

# Role headers and end tokens of common chat formats, also where the tokenizer spells them out.
_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|endoftext|end|user|assistant|system|eot_id|start_header_id|"
    r"end_header_id|begin_of_text|end_of_text|end_of_turn)\|>|<(?:start|end)_of_turn>|"
    r"\[/?INST\]|<</?SYS>>|</s>"
)
_HEADER = re.compile(r"(?:^|\n)[# ]*(?:Human|User|Assistant|System|Instruction|Response) ?:")
# Tokens of thinking and of tools are part of an answer.
_CONTENT_TOKEN = re.compile(r"think|tool|reason|func|python|code|image|video|audio", re.IGNORECASE)


@dataclass(frozen=True)
class TokenFacts:
    """Special tokens by what they are for.

    Attributes:
        eos: EOS tokens of the tokenizer.
        model_ends: Tokens at which the model stops, by its config and generation config; empty:
            unknown.
        turn_ends: Special tokens that the chat template writes after an answer.
        bos: BOS tokens.
        adds_bos: Whether the tokenizer puts BOS before a text.
        control: Text → id of special tokens that have no place inside an answer.
    """

    eos: frozenset[int] = frozenset()
    model_ends: frozenset[int] = frozenset()
    turn_ends: frozenset[int] = frozenset()
    bos: frozenset[int] = frozenset()
    adds_bos: bool = False
    control: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer | None, options: RowOptions, model_ends: set[int]
    ) -> TokenFacts:
        """The facts of a tokenizer.

        Args:
            tokenizer: The tokenizer. None: nothing is known.
            options: Its `eos_token` and `chat_template_kwargs`.
            model_ends: As the attribute.
        """
        if tokenizer is None:
            return cls(model_ends=frozenset(model_ends))
        special = special_ids(tokenizer)
        template = ChatTemplate(tokenizer, kwargs=options.chat_template_kwargs)
        turns = [{"role": "user", "content": "there"}, {"role": "assistant", "content": _ANSWER}]
        try:
            rendered = template.render(turns) if template.source else []
        except ExampleError:
            rendered = []
        ends: set[int] = set()
        for token in reversed(rendered):
            text = tokenizer.decode([token])
            if token in special:
                ends.add(token)
            elif text.strip():
                break
        eos, bos = eos_ids(tokenizer, options.eos_token), as_ids(_id(tokenizer, "bos"))
        control = eos | bos | as_ids(_id(tokenizer, "pad")) | (special & set(rendered))
        texts = zip(token_texts(tokenizer, sorted(control)), sorted(control), strict=True)
        try:
            first = tokenize(tokenizer, "there")[:1]
        except Exception:  # a vocabulary of words without an unknown token
            first = []
        return cls(
            frozenset(eos),
            frozenset(model_ends),
            frozenset(ends),
            frozenset(bos),
            bool(bos & set(first)),
            {text: token for text, token in texts if not _CONTENT_TOKEN.search(text)},
        )

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end an answer."""
        return self.eos | self.model_ends | self.turn_ends

    def markup(self, text: str, prompt: str = "") -> str | None:
        """The first special token or role header inside an answer; None: there is none.

        Args:
            text: The answer; end tokens at its end belong there.
            prompt: The prompt: headers such as "Human:" count if it has them, too.
        """
        text = self._without_end(text)
        found = [(text.find(token), token) for token in self.control if token in text]
        match = _MARKUP.search(text)
        if match:
            found.append((match.start(), match[0]))
        headers = {header.strip() for header in _HEADER.findall(prompt)}
        for header in _HEADER.finditer(text):
            if header[0].strip() in headers:
                found.append((header.start(), header[0].strip()))
                break
        return min(found)[1] if found else None

    def _without_end(self, text: str) -> str:
        while True:
            text = text.rstrip()
            end = next((t for t in self.control if t and text.endswith(t)), None)
            if end is None:
                match = re.search(rf"(?:{_MARKUP.pattern})$", text)
                end = match[0] if match else None
            if end is None:
                return text
            text = text[: -len(end)]


def _id(tokenizer: Tokenizer, name: str) -> object:
    return getattr(tokenizer, f"{name}_token_id", None)
