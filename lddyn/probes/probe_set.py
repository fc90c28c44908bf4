"""The probing set of Ren & Sutherland (ICLR 2025, §4.1): prompts with responses of many types.

For each prompt x_u a probing set has about a dozen responses y: the learned response, the same in
other words, responses to other prompts, random words. Fields have the authors' names, so that
their files can be read unchanged:

    chosen, chosen_initial, chosen_selfr, chosen_gptsemantic, chosen_gptformat,
    rejected, reject_gptsemantic, reject_gptformat,
    irr_train, irr_test, irr_hum, random_permute, random_nonhum

`lddyn.probes.build` makes the types that need only the data and the model. The types that another
model writes come from a file, or from a service that the user names (`lddyn.probes.endpoint`).
`lddyn.probes.measure` measures a set in one pass.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.data.read import rows as read_rows
from lddyn.data.tokenizer import Tokenizer
from lddyn.errors import EmptyResponseError
from lddyn.files import JsonObject, replace_file

__all__ = ["LABELS", "TYPES", "Encoded", "ProbeSet", "ResponseType"]


@dataclass(frozen=True)
class ResponseType:
    """One response type.

    Attributes:
        symbol: The paper's symbol.
        group: "answers" (Y_IF: follows the instruction), "other" (Y_non-IF: language, but no
            answer to this prompt) or "noise" (Y_non-hum: not language).
        label: Name in a few words, for pictures.
        made: How it is made, in a few words.
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

LABELS = {name: kind.label for name, kind in TYPES.items()}  # field → its name in words


@dataclass(frozen=True)
class ProbeSet:
    """Prompts with their responses, as texts.

    Attributes:
        rows: One mapping per prompt: "prompt", and the text of each response that it has.
        fields: Response types that occur, in the order of `TYPES`.

    Raises:
        ValueError: If there is no row, if a row has no prompt, or if no row has a response.

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
        for index, row in enumerate(self.rows):
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(f"row {index} of the probing set has no text under 'prompt'")
            for name in TYPES:
                if not isinstance(row.get(name, ""), str):
                    raise ValueError(f"{name} of row {index} must be text, got {row[name]!r:.40}")
        fields = tuple(name for name in TYPES if any(row.get(name) for row in self.rows))
        if not fields:
            raise ValueError(f"the rows hold none of the response fields {', '.join(TYPES)}")
        object.__setattr__(self, "fields", fields)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @classmethod
    def read(cls, path: str | os.PathLike[str], limit: int | None = None) -> ProbeSet:
        """Read a JSONL, JSON or Parquet file; the authors' files need no change.

        Args:
            path: The file.
            limit: Most rows to read. None: all.

        Raises:
            ValueError: If a row cannot be used; the message names it.
        """
        return cls(read_rows(path, limit=limit))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as JSONL, which `read` reads back."""
        lines = [json.dumps(dict(row), ensure_ascii=False) for row in self.rows]
        replace_file(Path(path), "\n".join(lines) + "\n")

    def split(self, held_out: float, seed: int = 0) -> tuple[ProbeSet, ProbeSet]:
        """(train, test): two sets without a common prompt.

        Args:
            held_out: Share of the distinct prompts that goes to the test set.
            seed: Seed of the choice.

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
        tokenizer: Tokenizer,
        *,
        fields: Sequence[str] | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
    ) -> Encoded:
        """Tokenise each response that is not empty; EOS is appended.

        A sequence longer than `max_length` has its prompt cut to its last `max_prompt_length`
        tokens, and then its response cut at `max_length`. Each sequence is cut by its own length.
        (The authors' code cuts all sequences by the longest one, so that one long response changes
        the prompt of every other.)

        Args:
            tokenizer: A transformers tokenizer.
            fields: Response types to encode. None: all that occur.
            max_length: Most tokens of prompt and response.
            max_prompt_length: Most tokens of the prompt of a sequence that is cut.

        Raises:
            ValueError: If a field is unknown.

        Cost: two tokenisations per response.
        """
        names = tuple(fields) if fields is not None else self.fields
        unknown = [name for name in names if name not in TYPES]
        if unknown:
            raise ValueError(f"fields must be among {', '.join(TYPES)}, got {unknown}")
        examples, cells = [], []
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
                cells.append((i, j))
        return Encoded(examples, torch.tensor(cells).view(-1, 2), len(self.rows), names)

    def table(self) -> list[JsonObject]:
        """One row per type: "count" of responses, number of "empty" ones, mean "words" of one."""
        table = []
        for name in self.fields:
            texts = [row.get(name) or "" for row in self.rows]
            words = [len(text.split()) for text in texts if text.strip()]
            table.append(
                {
                    "type": name,
                    "symbol": TYPES[name].symbol,
                    "group": TYPES[name].group,
                    "count": len(words),
                    "empty": len(texts) - len(words),
                    "words": sum(words) / max(1, len(words)),
                }
            )
        return table


@dataclass(frozen=True, repr=False)
class Encoded:
    """A probing set as examples, each with its cell in the grid of prompts and response types.

    Attributes:
        examples: The N examples.
        cells: (N, 2) int64: index of the prompt, and of the response type, of each example.
        prompts: Number of prompts, P.
        fields: Names of the F response types.
    """

    examples: list[Example]
    cells: Tensor
    prompts: int
    fields: tuple[str, ...]

    def grid(self, values: Tensor) -> Tensor:
        """One number per example, (N,), as a grid (P, F) in float64; NaN for missing responses."""
        out = torch.full((self.prompts, len(self.fields)), float("nan"), dtype=torch.float64)
        out[self.cells[:, 0], self.cells[:, 1]] = values.double().cpu()
        return out

    def select(self, prompts: Sequence[int], fields: Sequence[str] | None = None) -> Encoded:
        """Some of the prompts and response types.

        Args:
            prompts: Indices of prompts; the result numbers them in this order.
            fields: Names of response types, in the order of the result. None: all.
        """
        names = tuple(fields) if fields is not None else self.fields
        row = {prompt: i for i, prompt in enumerate(prompts)}
        column = {self.fields.index(name): j for j, name in enumerate(names)}
        kept = sorted(
            (row[i], column[j], k)
            for k, (i, j) in enumerate(self.cells.tolist())
            if i in row and j in column
        )
        cells = torch.tensor([(i, j) for i, j, _ in kept], dtype=torch.int64).view(-1, 2)
        return Encoded([self.examples[k] for *_, k in kept], cells, len(prompts), names)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Encoded({len(self.examples)} examples: {self.prompts} prompts, types "
            f"{', '.join(self.fields)})"
        )
