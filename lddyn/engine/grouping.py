"""Grouping responses for teacher-forced forward passes: by prompt, and by number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lddyn import ops
from lddyn.data.example import Example

# Logits (n, V) of counted tokens, their targets (n,), and the examples (n,) they belong to.
Part = tuple[Tensor, Tensor, Tensor]


def by_prompt(examples: Sequence[Example]) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> indices of its examples; short prompts first, short responses first."""
    owners: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].response_ids)):
        owners.setdefault(examples[index].prompt_ids, []).append(index)
    return dict(sorted(owners.items(), key=lambda item: len(item[0])))


def chunks(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive indices whose sizes add up to at most `most`; a larger size stands alone."""
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


BLOCK = 256  # rows of one call of `ops.product`


class LinearByProduct(TorchFunctionMode):
    """Context in which linear layers run by `ops.product`: twice as fast on some CPUs."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one torch function."""
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs:
            x, weight, *bias = args
            rows = x.reshape(-1, x.shape[-1])
            # Padded to whole blocks, which `ops.product` runs as one call.
            over = -len(rows) % BLOCK if len(rows) > BLOCK else 0
            out = ops.product(nn.functional.pad(rows, (0, 0, 0, over)), weight.T)
            out = out[: len(rows)].view(*x.shape[:-1], -1)
            return out if not bias or bias[0] is None else out + bias[0]
        return func(*args, **kwargs)
