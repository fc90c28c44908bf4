"""The probing set of Ren & Sutherland (ICLR 2025, §4.1), and one fast pass over it.

A probing set asks, for every prompt x_u, about a dozen responses y: what was learned, the same said
otherwise, answers to other questions, words without grammar. Fields have the authors' names, so
that their files are read as they are:

    chosen, chosen_initial, chosen_selfr, chosen_gptsemantic, chosen_gptformat,
    rejected, reject_gptsemantic, reject_gptformat,
    irr_train, irr_test, irr_hum, random_permute, random_nonhum

`build` makes the free ones offline: permutations, other prompts' answers, random words, samples of
the model. Those that another model writes come from a file, or from an endpoint that the user names
(`write`); nothing is sent anywhere otherwise.

`measure` is the pass: every prompt is read once (`lddyn.engine.logits`).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.data.read import rows as read_rows
from lddyn.errors import EmptyResponseError
from lddyn.files import replace_file

__all__ = ["LABELS", "TYPES", "Encoded", "ProbeSet", "ResponseType"]


@dataclass(frozen=True)
class ResponseType:
    """One kind of response.

    Attributes:
        symbol: The paper's.
        group: "answers" (Y_IF: follows the instruction), "other" (Y_non-IF: language, but no
            answer to this prompt) or "noise" (Y_non-hum: not language).
        label: A few words for pictures.
        made: How.
    """

    symbol: str
    group: str
    label: str
    made: str


TYPES: dict[str, ResponseType] = {
    "chosen": ResponseType("y+", "answers", "chosen", "the data's"),
    "chosen_initial": ResponseType("y_init", "answers", "sampled at start", "sampled, theta_0"),
    "chosen_selfr": ResponseType("y_selfr+", "answers", "self-rephrased", "rephrased by theta_0"),
    "chosen_gptsemantic": ResponseType("y_gpts+", "answers", "chosen, reworded", "other words"),
    "chosen_gptformat": ResponseType("y_gptf+", "answers", "chosen, other facts", "same format"),
    "rejected": ResponseType("y-", "answers", "rejected", "the data's"),
    "reject_gptsemantic": ResponseType("y_gpts-", "answers", "rejected, reworded", "other words"),
    "reject_gptformat": ResponseType("y_gptf-", "answers", "rejected, other facts", "same format"),
    "irr_train": ResponseType("y_j!=u+", "other", "chosen of another", "another row's chosen"),
    "irr_test": ResponseType("y_test+", "other", "chosen of a test row", "a held-out chosen"),
    "irr_hum": ResponseType("y_hum", "other", "human sentence", "a sentence about anything"),
    "random_permute": ResponseType("y_urnd+", "noise", "chosen, permuted", "words permuted"),
    "random_nonhum": ResponseType("y_rnd", "noise", "random words", "random words"),
}

LABELS = {name: kind.label for name, kind in TYPES.items()}  # type -> its name in words


@dataclass(frozen=True)
class ProbeSet:
    """Prompts with their responses.

    Attributes:
        rows: One mapping per prompt: "prompt", and the text of each field that it has.
        fields: The response types that occur, in the order of `TYPES`.

    Example:
        >>> from lddyn.probes.probe_set import ProbeSet
        >>> ProbeSet([{"prompt": "Q:", "rejected": " b", "chosen": " a"}]).fields
        ('chosen', 'rejected')
    """

    rows: Sequence[Mapping[str, str]]
    fields: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a probing set needs at least one row, got none")
        for at, row in enumerate(self.rows):
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(f"row {at} of the probing set has no text under 'prompt'")
            for name in TYPES:
                if not isinstance(row.get(name, ""), str):
                    raise ValueError(f"{name} of row {at} must be text, got {row[name]!r:.40}")
        found = tuple(name for name in TYPES if any(row.get(name) for row in self.rows))
        if not found:
            raise ValueError(f"the rows hold none of the response fields {', '.join(TYPES)}")
        object.__setattr__(self, "fields", found)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @classmethod
    def read(cls, path: str | os.PathLike[str], limit: int | None = None) -> ProbeSet:
        """Reads JSONL, JSON or Parquet; the authors' files as they are.

        Raises:
            ValueError: If a row cannot be used; names it.
        """
        return cls(read_rows(path, limit=limit))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSONL that `read` reads."""
        lines = [json.dumps(dict(row), ensure_ascii=False) for row in self.rows]
        replace_file(Path(path), "\n".join(lines) + "\n")

    def split(self, held_out: float, seed: int = 0) -> tuple[ProbeSet, ProbeSet]:
        """Train and test prompts: equal prompts go to the same side.

        Args:
            held_out: Share of the distinct prompts that is kept for the test.
            seed: Which.

        Raises:
            ValueError: If one side would be empty.
        """
        prompts = sorted({row["prompt"] for row in self.rows})
        random.Random(f"lddyn probes split {seed}").shuffle(prompts)
        count = round(held_out * len(prompts))
        if not 0 < count < len(prompts):
            raise ValueError(
                f"held_out must leave prompts on both sides, got {held_out} of {len(prompts)}"
            )
        test = set(prompts[:count])
        sides = [[r for r in self.rows if (r["prompt"] in test) == side] for side in (False, True)]
        return ProbeSet(sides[0]), ProbeSet(sides[1])

    def encode(
        self,
        tokenizer: Any,
        *,
        fields: Sequence[str] | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
    ) -> Encoded:
        """Tokenises every response that is not empty; EOS is appended.

        Whether the prompt is cut is decided for every response by its own length: prompt, then
        response, are cut where both together are longer than max_length. (The authors' code decides
        by the longest of all responses, so that a long probe changes what all others are given.)

        Args:
            tokenizer: Of transformers.
            fields: Which types. None: all that occur.
            max_length: Most tokens in all.
            max_prompt_length: Tokens of a prompt that are kept, from its end, where it is cut.

        Raises:
            ValueError: If a field is unknown.
        """
        names = tuple(fields) if fields is not None else self.fields
        unknown = [name for name in names if name not in TYPES]
        if unknown:
            raise ValueError(f"fields must be among {', '.join(TYPES)}, got {unknown}")
        examples, at = [], []
        for i, row in enumerate(self.rows):
            for j, name in enumerate(names):
                try:
                    ex = encode(tokenizer, row["prompt"], row.get(name) or "", name=name)
                except EmptyResponseError:
                    continue
                if ex.length > max_length:
                    ex = encode(
                        tokenizer,
                        row["prompt"],
                        row[name],
                        name=name,
                        max_length=max_length,
                        max_prompt_length=max_prompt_length,
                    )
                examples.append(ex)
                at.append((i, j))
        return Encoded(examples, torch.tensor(at).view(-1, 2), len(self.rows), names)

    def report(self) -> list[dict[str, Any]]:
        """Per type: how many, how many empty, mean number of words."""
        found = []
        for name in self.fields:
            texts = [row.get(name) or "" for row in self.rows]
            words = [len(text.split()) for text in texts if text.strip()]
            found.append(
                {
                    "type": name,
                    "symbol": TYPES[name].symbol,
                    "group": TYPES[name].group,
                    "count": len(words),
                    "empty": len(texts) - len(words),
                    "words": sum(words) / max(1, len(words)),
                }
            )
        return found


@dataclass(frozen=True)
class Encoded:
    """Examples of a probing set, and which prompt and type each is.

    Attributes:
        examples: N of them.
        at: (N, 2) int64: prompt and field.
        prompts: Number of prompts P.
        fields: Names of the F types.
    """

    examples: list[Example]
    at: Tensor
    prompts: int
    fields: tuple[str, ...]

    def grid(self, values: Tensor) -> Tensor:
        """(N,) → (P, F) in float64, NaN where a prompt has no such response."""
        out = torch.full((self.prompts, len(self.fields)), float("nan"), dtype=torch.float64)
        out[self.at[:, 0], self.at[:, 1]] = values.double().cpu()
        return out

    def select(self, prompts: Sequence[int], fields: Sequence[str] | None = None) -> Encoded:
        """Some prompts, renumbered in this order, and some types."""
        names = tuple(fields) if fields is not None else self.fields
        row = {prompt: i for i, prompt in enumerate(prompts)}
        column = {self.fields.index(name): j for j, name in enumerate(names)}
        kept = [
            (row[i], column[j], k)
            for k, (i, j) in enumerate(self.at.tolist())
            if i in row and j in column
        ]
        kept.sort()
        at = torch.tensor([k[:2] for k in kept], dtype=torch.int64).view(-1, 2)
        return Encoded([self.examples[k] for *_, k in kept], at, len(prompts), names)
