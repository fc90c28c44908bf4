"""Logits of many responses from packed sequences: every prompt is read once, nothing is padded.

Prompts, each followed by all of its responses, are concatenated to one sequence. With lddyn's own
attention every response attends to its prompt and to itself,

    softmax([q K_promptᵀ, q K_ownᵀ]) [V_prompt; V_own] = lerp(o_own, o_prompt, σ(λ_prompt − λ_own)),

with o and λ = logsumexp of the two parts. So prompts need no mask, and no key is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.grouping import BLOCK, LinearByProduct, Part, by_prompt, chunks
from lddyn.engine.guard import attending
from lddyn.engine.trial import UnfitError

_NAME = "lddyn-packed"  # of the attention, in transformers' interface

_SCORES = 1 << 26  # most attention scores in memory at once


@dataclass(frozen=True)
class _Forest:
    """Where prompts and responses lie in the packed sequence.

    Attributes:
        parts: Places of the prompts and responses of one length, and that length.
        trees: Places of a prompt, and of all of its responses.
    """

    parts: Sequence[tuple[slice | Tensor, int]]
    trees: Sequence[tuple[slice, slice]]


_forest: ContextVar[_Forest] = ContextVar("forest")


def packable(model: nn.Module, longest: int) -> bool:
    """Whether all attention of a model can be replaced and covers `longest` tokens."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config: Any = model.config
    text = config.get_text_config()
    names = ("sliding_window", "attention_chunk_size")
    window = min(getattr(text, name, None) or longest for name in names)
    flags = [getattr(module, "_supports_attention_backend", None) for module in model.modules()]
    if longest > window or True not in flags or False in flags:
        return False
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    return True


def packed_logits(model: nn.Module, examples: Sequence[Example], tokens: int) -> Iterator[Part]:
    """Logits of all counted tokens, at most `tokens` tokens in one packed sequence."""
    owners_of = by_prompt(examples)
    trees = []
    for prompt, owners in owners_of.items():
        sizes = [len(examples[i].response_ids) - 1 for i in owners]
        # A prompt of too many responses is read again for each part of them.
        for part in chunks(sizes, max(1, tokens - len(prompt))):
            trees.append((prompt, [owners[k] for k in part]))
    sizes = [len(p) + sum(len(examples[i].response_ids) - 1 for i in own) for p, own in trees]
    for part in chunks(sizes, tokens):
        yield _one_forward(model, examples, [trees[k] for k in part])


def _one_forward(
    model: nn.Module,
    examples: Sequence[Example],
    trees: Sequence[tuple[tuple[int, ...], list[int]]],
) -> Part:
    """Logits of one packed sequence: prompts, each with the examples that follow it."""
    device = next(model.parameters()).device
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    layout: list[tuple[slice, slice]] = []
    starts: dict[int, list[int]] = {}
    for prompt, mine in trees:
        start = len(ids)
        ids += prompt
        positions += range(len(prompt))
        stop = len(ids)
        starts.setdefault(len(prompt), []).append(start)
        for i in mine:
            example, first = examples[i], len(ids)
            ids += example.response_ids[:-1]
            positions += range(len(prompt), example.length - 1)
            starts.setdefault(len(example.response_ids) - 1, []).append(first)
            # The logits of the first response token are at the prompt's last position.
            places += [first + k - 1 if k else stop - 1 for k in example._counted]
            targets += example.targets
            owners += [i] * len(example)
        if len(ids) > stop:
            layout.append((slice(start, stop), slice(stop, len(ids))))
    parts: list[tuple[slice | Tensor, int]] = []
    starts.pop(0, None)  # responses of one token have no position of their own
    for width, where in starts.items():
        if len(where) == 1:
            parts.append((slice(where[0], where[0] + width), width))
        else:
            at = torch.tensor(where)[:, None] + torch.arange(width)
            parts.append((at.flatten().to(device), width))
    if len(ids) > BLOCK:
        padding = [0] * (-len(ids) % BLOCK)
        ids, positions = ids + padding, positions + padding
    token = _forest.set(_Forest(parts, layout))
    try:
        with attending(model, _NAME), LinearByProduct():
            logits = model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(places, device=device),
            ).logits[0]
    finally:
        _forest.reset(token)
    return logits, torch.tensor(targets, device=device), torch.tensor(owners)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of every response to its prompt and itself, as an AttentionInterface calls it."""
    if attention_mask is not None or dropout or softcap or s_aux is not None:
        raise UnfitError("the model's attention is more than softmax(q Kᵀ) V")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch._C.DisableTorchFunction():  # many short calls, none a linear layer
        return _mix(query, key, value, scale), None


def _mix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    forest = _forest.get()
    heads, groups = query.shape[1], key.shape[1]
    query, key, value = query[0], key[0], value[0]
    keys, values = (x.repeat_interleave(heads // groups, 0) for x in (key, value))
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    total = query.new_zeros(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    for at, width in forest.parts:
        q, k, v = (
            x[:, at].unflatten(1, (-1, width)).transpose(0, 1) for x in (query, keys, values)
        )
        own, weight = _attend(q, k, v, scale)
        out[:, at] = own.transpose(0, 1).flatten(1, 2)
        total[:, at] = weight.transpose(0, 1).flatten(1)
    for prompt, rows in forest.trees:
        # Without a mask, heads that share keys are rows of one product.
        q = query[:, rows].reshape(1, groups, -1, query.shape[-1])
        k, v = key[None, :, prompt], value[None, :, prompt]
        read, weight = _attend(q, k, v, scale, causal=False)
        share = torch.sigmoid(weight.reshape(heads, -1) - total[:, rows])[..., None].to(out.dtype)
        out[:, rows] = torch.lerp(out[:, rows], read.reshape(out[:, rows].shape), share)
    return out.transpose(0, 1)[None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q Kᵀ) V (B, H, T, d) and the logsumexp of the scores (B, H, T)."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return out, total
    rows = max(1, _SCORES // (key.shape[-2] * query.shape[:2].numel()))
    place = torch.arange(key.shape[-2], device=query.device)
    outs, totals = [], []
    for first, some in zip(range(0, query.shape[-2], rows), query.split(rows, -2), strict=True):
        scores = torch.matmul(some, key.transpose(-1, -2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        if causal:
            ahead = place > place[first : first + some.shape[-2], None]
            scores = scores.masked_fill(ahead, -torch.inf)
        totals.append(scores.logsumexp(-1))
        outs.append(torch.matmul((scores - totals[-1][..., None]).exp().to(value.dtype), value))
    return torch.cat(outs, -2), torch.cat(totals, -1)
