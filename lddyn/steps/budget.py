"""How a decomposition divides `memory=`: vectors of all trainable values, and a workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gram import graph_bytes
from lddyn.engine.stream.moved import inside_blocks, moved_bytes
from lddyn.engine.trace import Trace
from lddyn.memory import Budget
from lddyn.optimizers import optimizer_kind


@dataclass(frozen=True)
class StepBudget:
    """What a decomposition may hold beside the model.

    Attributes:
        budget: `memory=`.
        vectors: Bytes of the vectors that it holds throughout: Δθ, and what the optimizer adds.
        copies: Whether the weights on the way of the step are copied; else a block at a time is.
        workspace: Bytes for the rest.
    """

    budget: Budget
    vectors: int
    copies: bool
    workspace: int

    @classmethod
    def of(
        cls, anatomy: Anatomy, optimizer: torch.optim.Optimizer, memory: int | str
    ) -> StepBudget:
        """The division for one step.

        Raises:
            MemoryBudgetError: If memory is a number, and less than the vectors need.
        """
        budget = Budget.of(memory, anatomy.device)
        size = sum(p.nbytes for p in anatomy.trainable.values())
        values = sum(p.numel() for p in anatomy.trainable.values())
        count = 1 + vectors_of(optimizer)
        held, moved = count * size, moved_bytes(anatomy)
        copies = budget.holds(held + size) or not inside_blocks(anatomy)
        budget.require(
            held + (size if copies else moved),
            f"a step of {values:,} trainable values with {type(optimizer).__name__}",
            'or train an adapter, or use optimizer="sgd"' if count > 1 else "or train an adapter",
        )
        return cls(budget, held, copies, budget.beside(held + (size if copies else moved)))

    def group(self) -> int | None:
        """Bytes of the parameters whose gradients are taken together; None: all of them."""
        return max(self.workspace // 4, 1) if self.budget.strict else None

    def recomputes(self, traces: list[Trace]) -> bool:
        """Whether backward passes of these sequences run blocks again, rather than keep graphs."""
        largest = max((graph_bytes(trace) for trace in traces), default=0)
        return self.budget.strict and largest > self.workspace


def vectors_of(optimizer: torch.optim.Optimizer) -> int:
    """Vectors of all trainable values in an optimizer's step beside Δθ: P, history, decay."""
    kind, groups = optimizer_kind(optimizer), optimizer.param_groups
    diagonal = kind != "SGD" or len({float(group["lr"]) for group in groups}) > 1
    history = any(
        key in state for state in optimizer.state.values() for key in ("momentum_buffer", "exp_avg")
    )
    decay = any(group["weight_decay"] for group in groups)
    return int(diagonal) + int(history) + int(decay)
