"""Logits of many responses, teacher-forced; every prompt is read once.

Packed: prompts, each followed by all of its responses, lie one after the other in one sequence
without padding, and an attention of ours lets every response see its prompt and itself,

    softmax([q K_promptᵀ, q K_ownᵀ]) [V_prompt; V_own] = lerp(o_own, o_prompt, σ(λ_prompt − λ_own)),

o and λ = logsumexp being those of the two parts. So prompts need no mask, and no key is copied.

Cached: prompts of like length are read together into a key-value cache, and their responses,
sorted by length, over copies of it. That is for models whose attention is not to be replaced:
sliding windows shorter than the sequences, capped scores, sinks, ALiBi.

Alone: one response at a time, as in training. That is for models whose tokens meet elsewhere too
(state spaces, convolutions, chosen keys), or whose positions depend on the longest sequence.

A trial tells, once per model, and again for sequences longer than any before.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import attending

__all__ = ["response_logits"]

_Part = tuple[Tensor, Tensor, Tensor]

_Way = Callable[[nn.Module, Sequence[Example], int], Iterator[_Part]]


def response_logits(
    model: nn.Module, examples: Sequence[Example], *, tokens: int | None = None
) -> Iterator[_Part]:
    """Logits of all counted tokens, part by part.

    Args:
        model: A causal LM of transformers, in evaluation mode, without gradients.
        examples: In any order; those of equal prompts share it.
        tokens: Most tokens in one forward. None: so many that logits stay below a quarter GiB.

    Yields:
        Logits (n, V), targets (n,) and owning examples (n,). The tokens of one example come in
        order.

    Cost: 2 N FLOPs per prompt token, once per distinct prompt (and again for so many responses
    that they fill another forward), and per response token. The trial reads nine times the longest.
    """
    config: Any = model.config
    text = config.get_text_config()
    if tokens is None:
        tokens = max(256, min(4096, (1 << 26) // text.vocab_size))
    longest = max((example.length for example in examples), default=0)
    return _way(model, longest)(model, examples, tokens)


_ways: weakref.WeakKeyDictionary[nn.Module, tuple[int, _Way]] = weakref.WeakKeyDictionary()


def _way(model: nn.Module, longest: int) -> _Way:
    """The fastest way that gives a trial of sequences up to this length the model's own logits."""
    tried, way = _ways.get(model, (0, _alone))
    if longest > tried:
        way = _trial(model, longest)
        _ways[model] = longest, way
    return way


def _trial(model: nn.Module, longest: int) -> _Way:
    config: Any = model.config
    text = config.get_text_config()
    size = text.vocab_size
    longest = max(9, longest)
    # Keys are chosen among padding, too: at random weights too little to tell it from rounding.
    if (getattr(text, "index_topk", None) or longest) < longest:
        return _alone
    ids = tuple((3 + 7 * k) % size for k in range(longest))
    start = longest - min(longest // 2, 32)
    prompts = ids[:start], ids[4:6], ids[4 : 4 + start // 2]
    first = Example(prompts[0], ids[start:])
    examples = [first, *(Example(prompt, ids[1:4]) for prompt in prompts)]
    # The first comes last where they are packed: what the others say must not matter to it.
    reworded = [first, *(Example(prompt, ids[2:5]) for prompt in prompts)]
    own = _in_order(_alone(model, examples, 0))
    try:
        if _attends(model, longest):
            packed = _in_order(_packed(model, examples, 4 * longest))
            again = _in_order(_packed(model, reworded, 4 * longest))
            same = _agree(again[: len(first)], packed[: len(first)], exactly=True)
            if same and _agree(packed, own):
                return _packed
    except Exception:  # whatever it was: if it is the model's own fault, the others meet it too
        pass
    try:
        return _cached if _agree(_in_order(_cached(model, examples, 4 * longest)), own) else _alone
    except Exception:
        return _alone


def _agree(found: Tensor, own: Tensor, exactly: bool = False) -> bool:
    """Whether every row differs by rounding; exactly: not even by that of a 16-bit format."""
    limit = 1e-5 if exactly else max(1e-5, 8 * torch.finfo(own.dtype).eps)
    distance, size = (x.float().norm(dim=-1) for x in (found - own, own))
    return bool((distance <= limit * size).all())


def _in_order(parts: Iterator[_Part]) -> Tensor:
    """All logits, by example."""
    logits, _, owners = (torch.cat(x) for x in zip(*parts, strict=True))
    return logits[owners.argsort(stable=True).to(logits.device)]


def _alone(model: nn.Module, examples: Sequence[Example], tokens: int) -> Iterator[_Part]:
    """Logits of one example at a time."""
    device = next(model.parameters()).device
    for i, example in enumerate(examples):
        logits = model(input_ids=torch.tensor([example.ids], device=device), use_cache=False).logits
        targets = torch.tensor(example.targets, device=logits.device)
        yield logits[0, list(example.positions)], targets, torch.full_like(targets, i).cpu()


def _by_prompt(examples: Sequence[Example]) -> dict[tuple[int, ...], list[int]]:
    """Indices of examples by prompt, short prompts first, short responses first."""
    owners: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].response_ids)):
        owners.setdefault(examples[index].prompt_ids, []).append(index)
    return dict(sorted(owners.items(), key=lambda item: len(item[0])))


def _chunks(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive indices whose sizes add up to `most`, or one that alone is larger."""
    part: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(index)
        total += size
    if part:
        yield part


# ---------------------------------------------------------------------------------------------
# Packed


@dataclass(frozen=True)
class _Forest:
    """Where prompts and responses lie in the packed sequence.

    Attributes:
        parts: Places of prompts and responses of equal length, and that length.
        trees: Places of a prompt, and of all of its responses.
    """

    parts: Sequence[tuple[slice | Tensor, int]]
    trees: Sequence[tuple[slice, slice]]


_forest: ContextVar[_Forest] = ContextVar("forest")


class _UnpackableError(Exception):
    """The attention of this model is more than softmax(q Kᵀ) V."""


def _packed(model: nn.Module, examples: Sequence[Example], tokens: int) -> Iterator[_Part]:
    """Logits by packed sequences."""
    owners_of = _by_prompt(examples)
    trees = []
    for prompt, owners in owners_of.items():
        sizes = [len(examples[i].response_ids) - 1 for i in owners]
        # A prompt of too many responses is read again for each part of them.
        for part in _chunks(sizes, max(1, tokens - len(prompt))):
            trees.append((prompt, [owners[k] for k in part]))
    sizes = [len(p) + sum(len(examples[i].response_ids) - 1 for i in own) for p, own in trees]
    for part in _chunks(sizes, tokens):
        yield _one_forward(model, examples, [trees[k] for k in part])


def _one_forward(
    model: nn.Module,
    examples: Sequence[Example],
    trees: Sequence[tuple[tuple[int, ...], list[int]]],
) -> _Part:
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
            # Token 0 is told by the prompt's last position.
            places += [first + k - 1 if k else stop - 1 for k in example._counted]
            targets += example.targets
            owners += [i] * len(example)
        if len(ids) > stop:
            layout.append((slice(start, stop), slice(stop, len(ids))))
    parts: list[tuple[slice | Tensor, int]] = []
    starts.pop(0, None)  # of responses that the prompt's last position tells alone
    for width, where in starts.items():
        if len(where) == 1:
            parts.append((slice(where[0], where[0] + width), width))
        else:
            at = torch.tensor(where)[:, None] + torch.arange(width)
            parts.append((at.flatten().to(device), width))
    if len(ids) > _BLOCK:
        padding = [0] * (-len(ids) % _BLOCK)
        ids, positions = ids + padding, positions + padding
    token = _forest.set(_Forest(parts, layout))
    try:
        with attending(model, _NAME), _Products():
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
    """Every response sees its prompt and itself; for transformers' AttentionInterface."""
    if attention_mask is not None or dropout or softcap or s_aux is not None:
        raise _UnpackableError
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
    """softmax(scale Q Kᵀ) V and the logsumexp of scores; (B, H, T, d) -> and (B, H, T)."""
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


_SCORES = 1 << 26  # of attention at once, where they are held

_NAME = "lddyn-packed"


def _attends(model: nn.Module, longest: int) -> bool:
    """Whether all attention of a model can be replaced, and sees sequences of this length whole."""
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


# ---------------------------------------------------------------------------------------------
# Cached


def _cached(model: nn.Module, examples: Sequence[Example], tokens: int) -> Iterator[_Part]:
    """Logits by a key-value cache; an example's first token comes in a part before the others."""
    from transformers import DynamicCache

    config: Any = model.config
    device = next(model.parameters()).device
    owners_of = _by_prompt(examples)
    prompts = list(owners_of)
    sizes = [len(p) + sum(len(examples[i].response_ids) for i in owners_of[p]) for p in prompts]
    for part in _chunks(sizes, tokens):
        mine = [prompts[k] for k in part]
        longest = len(mine[-1])
        # Padded on the left, so that the responses continue all of them at one place.
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in mine], device=device)
        pads = torch.tensor([longest - len(p) for p in mine], device=device)
        at = torch.arange(longest, device=device) - pads[:, None]
        cache = DynamicCache(config=config)
        with _Products():
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
            rows, found = (list(x) for x in zip(*opening, strict=True))
            targets = torch.tensor([examples[i].targets[0] for i in found], device=device)
            yield first[rows], targets, torch.tensor(found)
        yield from _continued(model, examples, pairs, cache, pads, longest, tokens)


def _continued(
    model: nn.Module,
    examples: Sequence[Example],
    pairs: Sequence[tuple[int, int]],
    cache: Any,
    pads: Tensor,
    longest: int,
    tokens: int,
) -> Iterator[_Part]:
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
        # Padding of the responses is on the right, where no counted token sees it.
        with _Products():
            logits = model(
                input_ids=ids.to(device),
                attention_mask=(at >= 0).long(),
                position_ids=at[:, longest:],
                past_key_values=own,
                use_cache=True,
            ).logits
        kept = logits.flatten(0, 1).index_select(0, torch.tensor(places, device=device))
        yield kept, torch.tensor(targets, device=device), torch.tensor(owners)


# A forward costs as much as reading some tokens, whatever it reads: padding up to that is free.
_CALL = 128


def _batches(widths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Consecutive indices of ascending widths: split where padding costs more than a call."""
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


# ---------------------------------------------------------------------------------------------
# Products

_BLOCK = 256


class _Products(TorchFunctionMode):
    """Linear layers by `ops.product` within: twice as fast on some CPUs, the same elsewhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Dispatches one torch function."""
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs:
            x, weight, *bias = args
            rows = x.reshape(-1, x.shape[-1])
            # Whole blocks of rows are one call there.
            over = -len(rows) % _BLOCK if len(rows) > _BLOCK else 0
            out = ops.product(nn.functional.pad(rows, (0, 0, 0, over)), weight.T)
            out = out[: len(rows)].view(*x.shape[:-1], -1)
            return out if not bias or bias[0] is None else out + bias[0]
        return func(*args, **kwargs)


@overload
def token_log_probs(model: nn.Module | Anatomy, examples: Example) -> Tensor: ...


@overload
def token_log_probs(model: nn.Module | Anatomy, examples: Sequence[Example]) -> list[Tensor]: ...


def token_log_probs(
    model: nn.Module | Anatomy, examples: Example | Sequence[Example]
) -> Tensor | list[Tensor]:
    """Log π(y_m) of every counted response token, in nats, without a graph.

    Args:
        model: A causal LM of transformers, or its Anatomy. It may be frozen.
        examples: One Example, or several.

    Returns:
        For one example a tensor (M,), for several a list of them; float32, or float64 for a
        float64 model.

    Raises:
        UnsupportedModelError: If the model cannot be opened.
        NonFiniteError: If a weight or a logit is NaN or infinite.

    Cost: one forward pass for each example.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> example = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5])
        >>> lddyn.token_log_probs(model, example).shape
        torch.Size([3])
    """
    anatomy = Anatomy.of(model, allow_frozen=True)
    if isinstance(examples, Example):
        return anatomy.trace(examples).log_probs()
    return [anatomy.trace(example).log_probs() for example in examples]
