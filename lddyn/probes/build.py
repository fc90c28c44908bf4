"""Building a probing set from data and from samples of the model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lddyn.engine.guard import evaluating
from lddyn.probes.probe_set import TYPES, ProbeSet

__all__ = ["build", "sample"]

_REPHRASE = (
    "Please rephrase the following sentence: \n@@@ Original Sentence: {text}\n@@@ Rephrase: "
)


def build(
    pairs: Sequence[Mapping[str, str]],
    held_out: Sequence[Mapping[str, str]],
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> ProbeSet:
    """Makes every response type that needs nothing but the data, a seed and the model itself.

    Fields that a row has already are kept. Made are: irr_train (chosen of another row), irr_test
    (chosen of a held-out row), random_permute (the chosen words in another order), random_nonhum
    (as many words of the data at random); with a model chosen_initial (sampled) and chosen_selfr
    (sampled after a request to rephrase). What another model must write (`write`) is left out.

    Args:
        pairs: Rows with "prompt" and "chosen", usually "rejected".
        held_out: Rows whose "chosen" irr_test is drawn from; none of their prompts in `pairs`.
        model: theta_0, a causal LM of transformers. None: nothing is sampled.
        tokenizer: Its tokenizer.
        seed: Of every choice.
        max_new_tokens: Most tokens of a sample.

    Raises:
        ValueError: If there are too few rows, or held-out prompts are among the others.

    Cost: without a model none worth mentioning; with one, two samples per row.

    Example:
        >>> from lddyn.probes.build import build
        >>> rows = [{"prompt": f"Q{i}:", "chosen": f" the answer {i}"} for i in range(3)]
        >>> made = build(rows[:2], rows[2:])
        >>> made.rows[0]["irr_train"], made.rows[0]["irr_test"]
        (' the answer 1', ' the answer 2')
    """
    if len({row["chosen"] for row in pairs}) < 2:
        raise ValueError("pairs must have two different chosen responses or more")
    shared = {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    if not held_out or shared:
        raise ValueError(
            f"held_out must be rows with prompts of their own, got {len(held_out)} rows, "
            f"{len(shared)} of whose prompts are in pairs"
        )
    learned = {row["chosen"] for row in pairs}
    unseen = [row["chosen"] for row in held_out if row["chosen"] not in learned]
    if not unseen:
        raise ValueError("held_out must have a chosen response that is not among those of pairs")
    words = sorted({word for row in (*pairs, *held_out) for word in row["chosen"].split()})
    made: list[dict[str, str]] = []
    for index, row in enumerate(pairs):
        rng = random.Random(f"lddyn probes {seed} {index}")
        shuffled = row["chosen"].split()
        rng.shuffle(shuffled)
        others = sorted({other["chosen"] for other in pairs} - {row["chosen"]})
        free = {
            "irr_train": rng.choice(others),
            "irr_test": rng.choice(unseen),
            "random_permute": like(row["chosen"], shuffled),
            "random_nonhum": like(row["chosen"], rng.choices(words, k=len(shuffled))),
        }
        made.append({**free, **row})
    if model is not None:
        _sample_fields(made, model, tokenizer, seed, max_new_tokens)
    names = ("prompt", *TYPES)
    return ProbeSet([{k: row[k] for k in (*names, *row) if row.get(k)} for row in made])


def like(text: str, words: Sequence[str]) -> str:
    """Words with the leading space that the text has: it decides the first token."""
    return (" " if text[:1].isspace() else "") + " ".join(words)


def _sample_fields(
    rows: list[dict[str, str]], model: nn.Module, tokenizer: Any, seed: int, most: int
) -> None:
    for name, template in (("chosen_initial", "{prompt}"), ("chosen_selfr", _REPHRASE)):
        missing = [row for row in rows if not row.get(name)]
        digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        prompts = [
            template.format(prompt=row["prompt"], text=row["chosen"].strip()) for row in missing
        ]
        texts = sample(model, tokenizer, prompts, max_new_tokens=most, generator=generator)
        for row, text in zip(missing, texts, strict=True):
            row[name] = text


@torch.inference_mode()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    generator: torch.Generator | None = None,
    stop: str = "\n\nHuman:",
    batch: int = 64,
) -> list[str]:
    """Samples a response to every prompt, at temperature 1, or takes the greedy ones.

    Args:
        model: A causal LM of transformers with a key-value cache.
        tokenizer: Its tokenizer.
        prompts: Texts. Those of equal length in tokens are continued together.
        max_new_tokens: Most tokens of a response; fewer where the model's positions end.
        generator: Of the random numbers. None: the most probable token every time.
        stop: Text at which a response is cut, besides EOS.
        batch: Most prompts at once.

    Returns:
        One text per prompt; it may be empty.

    Cost: one forward per token and batch.
    """
    from transformers import DynamicCache

    config: Any = model.config
    room = getattr(config, "max_position_embeddings", None) or 1 << 30
    ids = [tokenizer(text)["input_ids"][-max(1, room - max_new_tokens) :] for text in prompts]
    texts = [""] * len(prompts)
    with evaluating(model):
        for at in _together([len(i) for i in ids], batch):
            device = next(model.parameters()).device
            given = torch.tensor([ids[i] for i in at], device=device)
            cache, drawn = DynamicCache(config=config), []
            running = torch.ones(len(at), dtype=torch.bool)
            for _ in range(max_new_tokens):
                logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits
                last = logits[:, -1].float().cpu()
                if generator is None:
                    token = last.argmax(-1)
                else:
                    token = torch.multinomial(last.softmax(-1), 1, generator=generator)[:, 0]
                token = torch.where(running, token, tokenizer.eos_token_id)
                drawn.append(token)
                running &= token != tokenizer.eos_token_id
                if not running.any():
                    break
                given = token[:, None].to(device)
            for i, row in zip(at, torch.stack(drawn, 1).tolist(), strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = text.partition(stop)[0]
    return texts


def _together(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of equal length, at most so many at once."""
    equal: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        equal.setdefault(length, []).append(index)
    for _, found in sorted(equal.items()):
        for start in range(0, len(found), most):
            yield found[start : start + most]
