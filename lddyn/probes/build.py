"""Building a probing set from data, and from samples of the model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.context import position_limit
from lddyn.data.tokenizer import Tokenizer, eos_ids, tokenize
from lddyn.engine.guard import evaluating
from lddyn.probes.probe_set import TYPES, ProbeSet

__all__ = ["build", "sample"]

Rows = Sequence[Mapping[str, str]]

_REPHRASE = (
    "Please rephrase the following sentence: \n@@@ Original Sentence: {text}\n@@@ Rephrase: "
)


def build(
    pairs: Rows,
    held_out: Rows,
    *,
    model: nn.Module | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> ProbeSet:
    """Make the response types that need only the data, a seed and the model.

    From the data: irr_train (chosen of another row), irr_test (chosen of a held-out row),
    random_permute (the chosen words in another order) and random_nonhum (as many random words of
    the data). With a model: chosen_initial (sampled) and chosen_selfr (sampled after a request to
    rephrase). A field that a row has already is kept. Types that another model must write are left
    out; `lddyn.probes.endpoint.write` adds them.

    Args:
        pairs: Rows with "prompt" and "chosen", usually "rejected".
        held_out: Rows whose "chosen" irr_test is drawn from; none of their prompts is in `pairs`.
        model: Causal LM of transformers before training, θ_0. None: nothing is sampled.
        tokenizer: Its tokenizer.
        seed: Seed of every random choice.
        max_new_tokens: Most tokens of a sampled response.

    Returns:
        A set with one row for each of `pairs`.

    Raises:
        ValueError: If there are too few rows, if a held-out prompt is in `pairs`, or if a model
            comes without its tokenizer.

    Cost: two sampled responses per row; without a model, none worth mentioning.

    Example:
        >>> from lddyn.probes.build import build
        >>> rows = [{"prompt": f"Q{i}:", "chosen": f" the answer {i}"} for i in range(3)]
        >>> probes = build(rows[:2], rows[2:])
        >>> probes.rows[0]["irr_train"], probes.rows[0]["irr_test"]
        (' the answer 1', ' the answer 2')
    """
    learned = {row["chosen"] for row in pairs}
    if len(learned) < 2:
        raise ValueError("pairs must have two different chosen responses or more")
    shared = {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    if not held_out or shared:
        raise ValueError(
            f"held_out must be rows with prompts of their own, got {len(held_out)} rows, "
            f"{len(shared)} of whose prompts are in pairs"
        )
    unseen = [row["chosen"] for row in held_out if row["chosen"] not in learned]
    if not unseen:
        raise ValueError("held_out must have a chosen response that is not among those of pairs")
    words = sorted({word for row in (*pairs, *held_out) for word in row["chosen"].split()})
    rows: list[dict[str, str]] = []
    for index, row in enumerate(pairs):
        rng = random.Random(f"lddyn probes {seed} {index}")
        shuffled = row["chosen"].split()
        rng.shuffle(shuffled)
        others = sorted(learned - {row["chosen"]})
        from_data = {
            "irr_train": rng.choice(others),
            "irr_test": rng.choice(unseen),
            "random_permute": joined_like(row["chosen"], shuffled),
            "random_nonhum": joined_like(row["chosen"], rng.choices(words, k=len(shuffled))),
        }
        rows.append({**from_data, **row})
    if model is not None:
        if tokenizer is None:
            raise ValueError("sampling from a model needs its tokenizer, got None")
        _sample_fields(rows, model, tokenizer, seed, max_new_tokens)
    return ProbeSet([{k: row[k] for k in ("prompt", *TYPES, *row) if row.get(k)} for row in rows])


def joined_like(text: str, words: Sequence[str]) -> str:
    """The words as one text, with a leading space if `text` has one: it decides the first token."""
    return (" " if text[:1].isspace() else "") + " ".join(words)


def _sample_fields(
    rows: list[dict[str, str]],
    model: nn.Module,
    tokenizer: Tokenizer,
    seed: int,
    max_new_tokens: int,
) -> None:
    """Sample `chosen_initial` and `chosen_selfr` of the rows that lack them."""
    for name, template in (("chosen_initial", "{prompt}"), ("chosen_selfr", _REPHRASE)):
        missing = [row for row in rows if not row.get(name)]
        digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        prompts = [
            template.format(prompt=row["prompt"], text=row["chosen"].strip()) for row in missing
        ]
        texts = sample(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, generator=generator
        )
        for row, text in zip(missing, texts, strict=True):
            row[name] = text


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    generator: torch.Generator | None = None,
    stop: str = "\n\nHuman:",
    batch: int = 64,
) -> list[str]:
    """Sample a response to each prompt at temperature 1, or take the greedy ones.

    Args:
        model: A causal LM of transformers with a key-value cache.
        tokenizer: Its tokenizer.
        prompts: Texts. Prompts with the same number of tokens are continued together. A prompt too
            long for the model's positions keeps its end.
        max_new_tokens: Most tokens of a response.
        generator: Random numbers. None: the most probable token each time.
        stop: A response ends before this text, or at EOS if the tokenizer has one.
        batch: Most prompts at once.

    Returns:
        One text per prompt; it may be empty.

    Cost: one forward pass per token and batch.
    """
    config: Any = model.config
    positions = position_limit(config) or 1 << 30
    most = max(1, positions - max_new_tokens)
    ids = [tokenize(tokenizer, text)[-most:] for text in prompts]
    ends = torch.tensor(sorted(eos_ids(tokenizer)), dtype=torch.int64)
    texts = [""] * len(prompts)
    with evaluating(model), torch.inference_mode():
        for indices in _equally_long([len(i) for i in ids], batch):
            tokens = _continue(
                model,
                torch.tensor([ids[i] for i in indices]),
                max_new_tokens,
                ends,
                generator,
            )
            for i, row in zip(indices, tokens.tolist(), strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = text.partition(stop)[0]
    return texts


def _continue(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    ends: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """New tokens (n, ≤ max_new_tokens) after prompts (n, T).

    Args:
        model: The model.
        ids: The prompts.
        max_new_tokens: Most new tokens.
        ends: Ids that end a response; the first of them fills up those that have ended.
        generator: As in `sample`.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    cache, tokens = DynamicCache(config=model.config), []
    step, running = ids.to(device), torch.ones(len(ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
        last = logits[:, -1].float().cpu()
        if generator is None:
            token = last.argmax(-1)
        else:
            token = torch.multinomial(last.softmax(-1), 1, generator=generator)[:, 0]
        if len(ends):
            token = torch.where(running, token, ends[0])
            running &= ~torch.isin(token, ends)
        tokens.append(token)
        if not running.any():
            break
        step = token[:, None].to(device)
    return torch.stack(tokens, 1)


def _equally_long(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of equal lengths, in batches of at most so many."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), most):
            yield indices[start : start + most]
