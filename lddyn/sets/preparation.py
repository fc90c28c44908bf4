"""What every diagnosis begins with: the model as passes use it, the sketch, and the plan."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn.data.context import position_limit
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.door import check_whole
from lddyn.engine.guard import evaluating
from lddyn.engine.sharded import is_sharded, local, reshard, whole
from lddyn.files import digest_of
from lddyn.memory import Budget
from lddyn.ranks import ALONE, Ranks
from lddyn.sets.access import Access, trainable_parameters
from lddyn.sets.passes import batching_of
from lddyn.sets.plan import SetPlan, parse_budget, plan_within, vector_bytes
from lddyn.sets.resumed import OptimizerState
from lddyn.sets.rows import exact_bytes
from lddyn.sets.run import Run
from lddyn.sets.training_set import TrainingSet
from lddyn.sketches.gradients import Batching
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
        batching: How many sequences share a pass.
        sketch: How gradients are sketched; None: they fit, and inner products are exact.
        plan: What the diagnosis will take.
        ranks: Processes that divide the passes; this one alone where weights are split over
            processes, which make every pass together.
        state: What the run's optimizer remembers of steps before it; None: it is fresh.
    """

    access: Access
    workspace: int
    batching: Batching
    sketch: Sketch | None
    plan: SetPlan
    ranks: Ranks
    state: OptimizerState | None


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
    steps = 1 if run is None else len(run.batches(range(len(set_))))
    refresh, close_ups = min(refresh, max(steps, 1)), min(close_ups, len(set_))
    module = Anatomy.module_of(model)
    _check_limits(module, set_)
    check_whole(module, allow_fsdp2=True, allow_offloaded=True)
    reshard(module)
    trainable = trainable_parameters(model)
    parameters = [local(p) for p in trainable]
    size, first = sum(p.numel() for p in parameters), parameters[0]
    allowed, shown = Budget.of(memory, first.device), progress and not ranks.rank
    with _together(module, ranks) as every:
        _check_alike(module, set_, every)
        told = every.gather([size, allowed.total])  # so that all of them choose the same
    size, total = max(one for one, _ in told), min(other for _, other in told)
    if is_sharded(module):
        close_ups, lbk, ranks = 0, False, ALONE
    number = torch.promote_types(first.dtype, torch.float32).itemsize
    needed = exact_bytes(len(set_.sequences), size, number, run is not None)
    if allowed.strict:
        needed += vector_bytes(size, number, run, True, close_ups, lbk)
    if sketch is None and (needed > total or stored):
        sketch = Sketch(k=NUMBERS)
    if sketch is not None and not stored and sketch.k >= sum(p.numel() for p in trainable):
        sketch = None  # whole gradients are not larger
    made = partial(SetPlan.of, set_, size, number, sketch, run, processes=ranks.world)
    plan = plan_within(epochs, made, refresh, close_ups, lbk, allowed)
    access = Access(model, set_.examples[0])  # passes, after what is refused is refused
    state = None
    if run is not None and run.optimizer_state is not None:
        source = run.optimizer_state
        state = OptimizerState.of(source, run.optimizer, access.named, access.model)
    if progress:
        seconds = plan.work * _forward_seconds(module, set_, first.device) / ranks.world
        plan = replace(plan, seconds=seconds)
    # A pass over a batch also makes the gradient of one parameter at a time.
    largest = max(p.numel() for p in parameters) * number
    workspace = allowed.beside(plan.rows + plan.vectors + largest)
    batching = batching_of(access, max(set_.sequences, key=len), workspace)
    plan = replace(plan, batch=batching.bytes_of(len(set_.sequences)) + largest)
    if shown:
        tqdm.write(f"diagnosis: {plan.explain()}", file=sys.stderr)
    return Preparation(access, workspace, batching, sketch, plan, ranks, state)


def _forward_seconds(model: nn.Module, set_: TrainingSet, device: torch.device) -> float:
    """Seconds of a sequence's forward pass: measured on one of about the mean length."""
    mean = sum(e.length for e in set_.sequences) / len(set_.sequences)
    one = min(set_.sequences, key=lambda e: abs(e.length - mean))
    ids = torch.tensor([one.ids], device=device)
    seconds = math.inf
    with evaluating(model), torch.no_grad():
        for _ in range(2):  # the first one may have to warm up
            start = time.perf_counter()
            model(input_ids=ids)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = min(seconds, time.perf_counter() - start)
    return seconds * mean / one.length


def _together(model: nn.Module, ranks: Ranks) -> contextlib.AbstractContextManager[Ranks]:
    """The processes that work together: those that divide the passes, or hold parts of a model."""
    return Ranks.of_torchrun() if is_sharded(model) else contextlib.nullcontext(ranks)


def _check_alike(model: nn.Module, set_: TrainingSet, ranks: Ranks) -> None:
    """Raises a RuntimeError if processes that work together differ in their weights or rows."""
    if ranks.world == 1:
        return
    sums = (whole(p.detach().double().sum()) for p in model.parameters() if not p.is_meta)
    ids = "".join(example.content_id for example in set_.sequences)
    value = [repr(sum(map(float, sums))), digest_of(ids.encode())]
    ranks.check_alike("model and rows", value)


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
