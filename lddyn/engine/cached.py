"""Logits of many responses over a key-value cache of their prompts.

Prompts of like length are padded on the left and read together into a cache; their responses,
sorted by length, are read over copies of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.grouping import LinearByProduct, Part, by_prompt, chunks

if TYPE_CHECKING:
    from transformers import DynamicCache


def cached_logits(model: nn.Module, examples: Sequence[Example], tokens: int) -> Iterator[Part]:
    """Logits of all counted tokens; the first token of an example comes in an earlier part."""
    from transformers import DynamicCache

    config: Any = model.config
    device = next(model.parameters()).device
    owners_of = by_prompt(examples)
    prompts = list(owners_of)
    sizes = [len(p) + sum(len(examples[i].response_ids) for i in owners_of[p]) for p in prompts]
    for part in chunks(sizes, tokens):
        mine = [prompts[k] for k in part]
        longest = len(mine[-1])
        # Padded on the left, so that the responses continue all of them at one place.
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in mine], device=device)
        pads = torch.tensor([longest - len(p) for p in mine], device=device)
        at = torch.arange(longest, device=device) - pads[:, None]
        cache = DynamicCache(config=config)
        with LinearByProduct():
            first = model(
                input_ids=ids,
                attention_mask=(at >= 0).long(),
                position_ids=at.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        pairs = [(row, i) for row, p in enumerate(mine) for i in owners_of[p]]
        opening = [(row, i) for row, i in pairs if examples[i]._counted[0] == 0]
        if opening:
            rows, owners = (list(x) for x in zip(*opening, strict=True))
            targets = torch.tensor([examples[i].targets[0] for i in owners], device=device)
            yield first[rows], targets, torch.tensor(owners)
        yield from _continued(model, examples, pairs, cache, pads, longest, tokens)


def _continued(
    model: nn.Module,
    examples: Sequence[Example],
    pairs: Sequence[tuple[int, int]],
    cache: DynamicCache,
    pads: Tensor,
    longest: int,
    tokens: int,
) -> Iterator[Part]:
    """Logits of all tokens but the first, of responses to the prompts in the cache."""
    device = pads.device
    longer = [pair for pair in pairs if len(examples[pair[1]].response_ids) > 1]
    longer.sort(key=lambda pair: len(examples[pair[1]].response_ids))
    widths = [len(examples[i].response_ids) - 1 for _, i in longer]
    parts = list(_batches(widths, tokens))
    for part in parts:
        mine = [longer[k] for k in part]
        width = widths[part[-1]]
        ids = torch.zeros(len(mine), width, dtype=torch.int64)
        places, targets, owners = [], [], []
        for row, (_, i) in enumerate(mine):
            example = examples[i]
            ids[row, : len(example.response_ids) - 1] = torch.tensor(example.response_ids[:-1])
            for k, target in zip(example._counted, example.targets, strict=True):
                if k:
                    places.append(row * width + k - 1)
                    targets.append(target)
                    owners.append(i)
        own = cache if part is parts[-1] else copy.deepcopy(cache)
        which = torch.tensor([row for row, _ in mine], device=device)
        own.batch_select_indices(which)
        left = pads[which][:, None]
        at = torch.arange(longest + width, device=device) - left
        # Responses are padded on the right; no counted token attends to the padding.
        with LinearByProduct():
            logits = model(
                input_ids=ids.to(device),
                attention_mask=(at >= 0).long(),
                position_ids=at[:, longest:],
                past_key_values=own,
                use_cache=True,
            ).logits
        kept = logits.flatten(0, 1).index_select(0, torch.tensor(places, device=device))
        yield kept, torch.tensor(targets, device=device), torch.tensor(owners)


# The fixed cost of a forward pass, in tokens: padding up to that is free.
_CALL = 128


def _batches(widths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Consecutive indices of ascending widths, split where padding would cost more than a call."""
    part: list[int] = []
    read = 0
    for index, width in enumerate(widths):
        if part:
            padding = width * len(part) - read
            if padding > _CALL or width * (len(part) + 1) > tokens:
                yield part
                part, read = [], 0
        part.append(index)
        read += width
    if part:
        yield part
