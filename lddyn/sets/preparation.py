"""What every diagnosis begins with: the model as passes use it, the sketch, and the plan."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.data.context import position_limit
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import evaluating
from lddyn.files import digest_of
from lddyn.memory import Budget
from lddyn.ranks import ALONE, Ranks
from lddyn.sets.access import Access, trainable_parameters
from lddyn.sets.plan import SetPlan, parse_budget, plan_within, vector_bytes
from lddyn.sets.rows import exact_bytes
from lddyn.sets.run import Run
from lddyn.sets.training_set import TrainingSet
from lddyn.sketches.sketch import Sketch
from lddyn.steps.precision import rounding_error
from lddyn.steps.wide import coarse

__all__ = ["NUMBERS", "Preparation", "prepare", "rounding_remarks"]

NUMBERS = 16384  # of a sketched sequence: 64 KiB; inner products err by 0.8 % of √(K_ii K_jj)


@dataclass(frozen=True)
class Preparation:
    """A model that is ready for passes over a set.

    Attributes:
        access: The model.
        workspace: Bytes for batches.
        sketch: How gradients are sketched; None: they fit, and inner products are exact.
        plan: What the diagnosis will take.
    """

    access: Access
    workspace: int
    sketch: Sketch | None
    plan: SetPlan


def prepare(
    model: nn.Module | Anatomy,
    set_: TrainingSet,
    run: Run | None,
    *,
    memory: int | str,
    sketch: Sketch | None,
    budget: float | str | None,
    refresh: int,
    close_ups: int = 0,
    lbk: bool = False,
    progress: bool = False,
    ranks: Ranks = ALONE,
    stored: bool = False,
) -> Preparation:
    """Checks a model against a set, and plans the work; arguments as of `diagnose`.

    `stored` says that rows go to a store, and so are sketched.

    Raises:
        ValueError: If `run` is no Run, the budget is too small, or an example is too long for the
            model.
        MemoryBudgetError: If memory is a number, and less than the vectors of a run need.
    """
    epochs = parse_budget(budget)
    if run is not None and not isinstance(run, Run):
        raise ValueError(f"run must be a lddyn.Run, got {type(run).__name__}")
    if refresh < 1:
        raise ValueError(f"refresh must be at least 1, got {refresh}")
    _check_limits(Anatomy.module_of(model), set_)
    parameters = trainable_parameters(model)
    size, first = sum(p.numel() for p in parameters), parameters[0]
    allowed = Budget.of(memory, first.device)
    number = torch.promote_types(first.dtype, torch.float32).itemsize
    needed = exact_bytes(len(set_.sequences), size, number, run is not None)
    if allowed.strict:
        needed += vector_bytes(size, number, run, close_ups, lbk)
    if sketch is None and (needed > allowed.total or stored):
        sketch = Sketch(k=NUMBERS)
    made = partial(SetPlan.of, set_, size, number, sketch, run, processes=ranks.world)
    plan = plan_within(epochs, made, refresh, close_ups, lbk, allowed)
    access = Access(model, set_.examples[0])  # passes, after what is refused is refused
    if ranks.world > 1:
        total = sum(float(p.detach().double().sum()) for p in access.model.parameters())
        ids = "".join(example.content_id for example in set_.sequences)
        ranks.check_alike("model and rows", [repr(total), digest_of(ids.encode())])
    if progress and ranks.rank == 0:
        tqdm.write(f"diagnosis: {plan.explain()}", file=sys.stderr)
    # A pass over a batch also makes the gradient of one parameter at a time.
    largest = max(p.numel() for p in parameters) * number
    workspace = allowed.beside(plan.rows + plan.vectors + largest)
    return Preparation(access, workspace, sketch, plan)


def rounding_remarks(access: Access, set_: TrainingSet) -> list[str]:
    """A sentence on 16-bit weights: how their log π is rounded, on the longest response."""
    dtype = coarse(dict(enumerate(access.parameters)))
    if dtype is None or access.unavailable:
        return []
    longest = max(set_.examples, key=len)
    with evaluating(access.model):
        error = rounding_error(access.anatomy.trace(longest), longest)
    name = str(dtype).removeprefix("torch.")
    return [
        f"The weights are {name}: log π of a response of {len(longest)} tokens is rounded by about "
        f"±{error:.2g} nats, and a real step leaves weights as they are that "
        "it would change by less than half of their last bit; smaller effects cannot be measured "
        "on this model. `lddyn.decompose` says how many weights a step moves."
    ]


def _check_limits(model: nn.Module, set_: TrainingSet) -> None:
    """Whether every example fits into the model's vocabulary and context."""
    config: Any = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    context = position_limit(config)
    for example in set_.sequences:
        example.check_model_limits(vocabulary, context)
