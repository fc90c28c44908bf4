"""How a decomposition divides `memory=`: vectors of trainable values, logits, and a workspace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import graph_bytes
from lddyn.engine.stream.moved import inside_blocks, moved_bytes
from lddyn.engine.trace import Trace
from lddyn.memory import Budget
from lddyn.optimizers import optimizer_kind
from lddyn.steps.wide import is_widened


@dataclass(frozen=True)
class StepBudget:
    """What a decomposition may hold beside the model.

    Attributes:
        budget: `memory=`.
        copies: Whether the weights on the way of the step are copied; else a block at a time is.
        workspace: Bytes for the rest.
    """

    budget: Budget
    copies: bool
    workspace: int

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        optimizer: torch.optim.Optimizer,
        memory: int | str,
        observed: Collection[Example],
        updated: Collection[Example],
    ) -> StepBudget:
        """The division for one step.

        Raises:
            MemoryBudgetError: If memory is a number, and less than vectors and logits need.
        """
        budget, trainable = Budget.of(memory, anatomy.device), anatomy.trainable
        size, moved = sum(p.nbytes for p in trainable.values()), moved_bytes(anatomy)
        values = sum(p.numel() for p in trainable.values())
        held = held_bytes(trainable, optimizer)
        making = making_bytes(anatomy, trainable, optimizer)
        logits = logits_bytes(anatomy, observed, updated)
        copies = budget.holds(max(held + size, making) + logits) or not inside_blocks(anatomy)
        vectors = max(held + (size if copies else moved), making)
        what = f"a step of {values:,} trainable values with {type(optimizer).__name__}"
        remedy = "or train an adapter"
        if logits > vectors:
            tokens = sum(map(len, {*observed, *updated}))
            what = f"a step with logits of {tokens:,} response tokens over {anatomy.vocabulary:,}"
            remedy = "or give fewer or shorter responses"
        elif vectors > size + moved:
            remedy += ', or use optimizer="sgd"'
        needed = vectors + logits
        budget.require(needed, what, remedy)
        return cls(budget, copies, budget.beside(needed))

    def group(self) -> int | None:
        """Bytes of the parameters whose gradients are taken together; None: all of them."""
        return max(self.workspace // 2, 1) if self.budget.strict else None

    def recomputes(self, traces: list[Trace]) -> bool:
        """Whether backward passes of these sequences run blocks again, rather than keep graphs."""
        largest = max((graph_bytes(trace) for trace in traces), default=0)
        return self.budget.strict and largest > self.workspace


def logits_bytes(
    anatomy: Anatomy, observed: Collection[Example], updated: Collection[Example]
) -> int:
    """Bytes of what a step holds of its sequences: forward passes, logits, and their changes.

    A response of M tokens has logits (M, V), an observed one also its change of all log-probs; two
    more tables are formed of one response at a time. All are of at least float32.
    """
    head = anatomy.head
    number = max(4, head.dtype.itemsize)
    states = (len(anatomy.blocks) + 1) * head.layer.weight.shape[1] * head.dtype.itemsize
    distinct = {*observed, *updated}
    rows = sum(map(len, distinct)) + sum(map(len, observed)) + 2 * max(map(len, distinct))
    tokens = sum(example.length for example in distinct)
    return rows * head.vocabulary * number + tokens * states


def held_bytes(trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step holds throughout: Δθ, P, history, decay, and a copy of the state."""
    size = sum(p.nbytes for p in trainable.values())
    state = sum(
        value.nbytes
        for of in optimizer.state.values()
        for value in of.values()
        if isinstance(value, Tensor)
    )
    return (1 + vectors_of(optimizer)) * size + state


def making_bytes(
    anatomy: Anatomy, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Bytes at the moment at which a step is made of its gradient.

    Adam and RMSprop compute each parameter's step with three tensors of its shape. Of 16-bit
    weights they take the gradient in float32, on a copy of the model in float32; the copy is given
    up before the step.
    """
    held = held_bytes(trainable, optimizer)
    if optimizer_kind(optimizer) == "SGD":
        return held
    wide = is_widened(anatomy, optimizer)
    number = {n: 4 if wide else p.dtype.itemsize for n, p in trainable.items()}
    largest = max((number[n] * p.numel() for n, p in trainable.items()), default=0)
    if not wide:
        return held + 3 * largest
    gradient = sum(number[n] * p.numel() for n, p in trainable.items())
    copy = 4 * sum(p.numel() for p in anatomy.model.parameters())
    return max(copy + gradient, held + gradient + 3 * largest)


def states_of(optimizer: torch.optim.Optimizer) -> int:
    """Vectors of all trainable values in an optimizer's state after its step."""
    kind, groups = optimizer_kind(optimizer), optimizer.param_groups
    if kind in ("Adam", "AdamW"):
        return 2 + any(group.get("amsgrad") for group in groups)
    momentum = any(group.get("momentum") for group in groups)
    return int(momentum) + (kind == "RMSprop") + any(group.get("centered") for group in groups)


def vectors_of(optimizer: torch.optim.Optimizer) -> int:
    """Vectors of all trainable values in an optimizer's step beside Δθ: P, history, decay."""
    kind, groups = optimizer_kind(optimizer), optimizer.param_groups
    diagonal = kind != "SGD" or len({float(group["lr"]) for group in groups}) > 1
    history = any(
        key in state for state in optimizer.state.values() for key in ("momentum_buffer", "exp_avg")
    )
    decay = any(group["weight_decay"] for group in groups)
    return int(diagonal) + int(history) + int(decay)
