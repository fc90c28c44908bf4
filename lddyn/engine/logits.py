"""Log π of responses: of one response, of a padded batch, and of many that share prompts.

`token_log_probs` opens the model and uses lddyn's attention, as every decomposition does.
`own_response` and `sequence_log_probs` run the model's own forward pass, with its graph; they need
no seams, so any causal LM will do.

`response_logits` reads many responses without a graph, and every prompt once. It takes the fastest
of three ways that returns the model's own logits in a trial:

    packed   prompts and their responses in one sequence (`packed`): any model whose attention can
             be replaced
    cached   responses over a key-value cache (`cached`): sliding windows shorter than the
             sequences, capped scores, sinks, ALiBi
    alone    one response at a time, as in training: models whose tokens also interact outside of
             attention (state spaces, convolutions, chosen keys), or whose positions depend on the
             longest sequence

The trial runs once for each model, and again for sequences longer than any before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.cached import cached_logits
from lddyn.engine.door import device_of
from lddyn.engine.grouping import Part
from lddyn.engine.packed import packable, packed_logits
from lddyn.engine.realised import realised_log_probs
from lddyn.engine.skeleton import first_stream
from lddyn.engine.trial import PACKED, SEPARATE, Trial, UnfitError, close
from lddyn.engine.turns import switching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Response",
    "own_response",
    "response_logits",
    "sequence_log_probs",
    "token_log_probs",
]

# --------------------------------------------------------------------------- one response


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


@dataclass(frozen=True)
class Response:
    """What one forward pass of the model itself says of the counted tokens of a response.

    Attributes:
        logits: (M, V), at least float32.
        hidden: The head's inputs, (M, d).
        targets: The realised tokens, (M,).
    """

    logits: Tensor
    hidden: Tensor
    targets: Tensor

    @cached_property
    def log_probs(self) -> Tensor:
        """Log π(y_m) (M,), in nats."""
        return realised_log_probs(self.logits, self.targets)


def own_response(model: nn.Module | Anatomy, example: Example) -> Response:
    """One forward pass of the model itself, in the mode it is in, with its graph.

    Cost: one forward pass, with logits at every position.
    """
    model = Anatomy.module_of(model)
    device = device_of(model)
    captured: list[Tensor] = []
    # Not output_hidden_states=True, for which transformers leaves hooks on the blocks.
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    with switching(model) as undo:
        undo.add(head.register_forward_pre_hook(lambda _, args: captured.append(args[0])).remove)
        out = model(input_ids=torch.tensor([example.ids], device=device), use_cache=False)
    at = list(example.positions)
    logits = out.logits[0, at]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.tensor(list(example.targets), device=logits.device)
    return Response(logits, first_stream(captured[-1])[0, at], targets)


# --------------------------------------------------------------------------- a padded batch


def padded_logits(model: nn.Module, examples: Sequence[Example]) -> Part:
    """Logits of all counted tokens by one padded forward pass of the model itself, with its graph.

    Examples are padded on the right; in a causal model no counted token attends to the padding.

    Returns:
        Logits (n, V) in float32, targets (n,), and the examples (n,) they belong to.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(len(examples), max(e.length for e in examples), dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : example.length] = torch.tensor(example.ids)
    rows = [row for row, example in enumerate(examples) for _ in example.positions]
    columns = [p for example in examples for p in example.positions]
    targets = [t for example in examples for t in example.targets]
    owners, places, realised = (torch.tensor(x, device=device) for x in (rows, columns, targets))
    logits = model(input_ids=ids.to(device), use_cache=False).logits[owners, places].float()
    return logits, realised, owners


def sequence_log_probs(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Σ_m log π(y_m) of each example, (B,) nats, by one padded forward pass, with its graph."""
    logits, targets, owners = padded_logits(model, examples)
    each = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    total: Tensor = each.new_zeros(len(examples)).index_add(0, owners, each)
    return total


# --------------------------------------------------------------------------- many responses


def response_logits(
    model: nn.Module | Anatomy, examples: Sequence[Example], *, tokens: int | None = None
) -> Iterator[Part]:
    """Logits of all counted tokens, part by part, without a graph; equal prompts are read once.

    Args:
        model: A causal LM of transformers, in evaluation mode, without gradients.
        examples: In any order.
        tokens: Most tokens in one forward pass. None: so many that logits stay below 0.25 GiB.

    Yields:
        Logits (n, V), targets (n,) and owning examples (n,). The tokens of one example come in
        order.

    Cost: 2 N FLOPs for each prompt token, once per distinct prompt (again where its responses fill
    another forward pass), and for each response token. The trial reads nine times the longest.
    """
    model = Anatomy.module_of(model)
    tokens = tokens_of_a_pass(model) if tokens is None else tokens
    longest = max((example.length for example in examples), default=0)
    return fastest(model, longest)(model, examples, tokens)


def tokens_of_a_pass(model: nn.Module) -> int:
    """The most tokens in one forward pass by default: their logits take at most 0.25 GiB."""
    return max(256, min(4096, (1 << 26) // int(_text_config(model).vocab_size)))


Way = Callable[[nn.Module, Sequence[Example], int], Iterator[Part]]

_CAN_PACK = Trial("responses and their prompts can be packed into one sequence", tolerant=True)
_CAN_CACHE = Trial("responses can be read over a key-value cache", tolerant=True)


def fastest(model: nn.Module, longest: int) -> Way:
    """The fastest way that passes its trial, for sequences of up to `longest` tokens."""
    longest = max(9, longest)
    for trial, way in ((_CAN_PACK, packed_logits), (_CAN_CACHE, cached_logits)):

        def check(way: Way = way) -> bool:
            return _returns_own_logits(way, model, longest)

        if trial.passes(model, "", check, size=longest):
            return way
    return alone_logits


def alone_logits(model: nn.Module, examples: Sequence[Example], tokens: int) -> Iterator[Part]:
    """Logits of one example at a time, by the model's own forward pass."""
    device = next(model.parameters()).device
    for i, example in enumerate(examples):
        logits = model(input_ids=torch.tensor([example.ids], device=device), use_cache=False).logits
        targets = torch.tensor(example.targets, device=logits.device)
        yield logits[0, list(example.positions)], targets, torch.full_like(targets, i).cpu()


def _returns_own_logits(way: Way, model: nn.Module, longest: int) -> bool:
    """Compares one way with the model's own forward pass, on sequences of up to `longest` tokens.

    Packed, an example must also have the same logits beside other prompts.
    """
    text = _text_config(model)
    # At random weights, keys chosen among padding would not be told from rounding.
    if (getattr(text, "index_topk", None) or longest) < longest:
        raise UnfitError(f"attention picks {text.index_topk} keys of {longest}")
    ids = tuple((3 + 7 * k) % text.vocab_size for k in range(longest))
    start = longest - min(longest // 2, 32)
    prompts = ids[:start], ids[4:6], ids[4 : 4 + start // 2]
    first = Example(prompts[0], ids[start:])
    examples = [first, *(Example(prompt, ids[1:4]) for prompt in prompts)]
    if way is packed_logits and not packable(model, longest):
        raise UnfitError("its attention cannot be replaced, or a window is shorter than this")
    logits = _in_order(way(model, examples, 4 * longest))
    if way is packed_logits:
        # `first` lies behind the other examples: what these say must not matter to it.
        reworded = [first, *(Example(prompt, ids[2:5]) for prompt in prompts)]
        again = _in_order(way(model, reworded, 4 * longest))
        one, other = again[: len(first)], logits[: len(first)]
        if not close(one, other, SEPARATE.of(one.dtype), by_row=True):
            raise UnfitError("the logits of one response depend on the others")
    own = _in_order(alone_logits(model, examples, 0))
    return close(logits, own, PACKED.of(own.dtype), by_row=True)


def _in_order(parts: Iterator[Part]) -> Tensor:
    """All logits, by example."""
    logits, _, owners = (torch.cat(x) for x in zip(*parts, strict=True))
    return logits[owners.argsort(stable=True).to(logits.device)]


def _text_config(model: nn.Module) -> Any:
    pretrained = cast("PreTrainedModel", model)
    return pretrained.config.get_text_config()
