"""A diagnosis of single sequences: which of them move which others, in a step and in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.checks import check_log_prob
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.experts import expert_remarks
from lddyn.engine.logits import Response
from lddyn.engine.reference_policy import Reference
from lddyn.objectives.grouped import GRPO
from lddyn.objectives.like import objective_like
from lddyn.objectives.loss import Loss
from lddyn.objectives.losses import Value
from lddyn.objectives.objective import SFT, Objective
from lddyn.objectives.paired import Preference
from lddyn.objectives.unpaired import KTO
from lddyn.ranks import Ranks
from lddyn.sets.access import Access
from lddyn.sets.bar import Bar
from lddyn.sets.forecast import Forecast
from lddyn.sets.passes import Passes
from lddyn.sets.preparation import prepare, rounding_remarks
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.run import Run
from lddyn.sets.segments import predict_run
from lddyn.sets.sequence_diagnosis import SequenceDiagnosis
from lddyn.sets.sequence_set import SequenceSet, SequenceStep, response_weights
from lddyn.sets.stored import check_store, read_start
from lddyn.settings import Like, TrainerSettings
from lddyn.sketches.sketch import Sketch
from lddyn.steps.precision import has_dropout, noise_remarks

__all__ = ["as_sequences", "diagnose_sequences", "refuse_of_pairs"]


def diagnose_sequences(
    model: nn.Module | Anatomy,
    objective: Objective,
    *,
    observed: Mapping[str, Example],
    memory: int | str,
    sketch: Sketch | None,
    run: Run | None,
    refresh: int,
    budget: float | str | None,
    row_numbers: Sequence[int] | None,
    remarks: Sequence[str],
    so_far: Callable[[SequenceDiagnosis], None],
    progress: bool,
    ranks: Ranks,
    store: str | Path | None,
) -> SequenceDiagnosis:
    """The diagnosis of the sequences of an objective; arguments as of `lddyn.diagnose`.

    Raises:
        ValueError: If the objective is one of pairs, weighs tokens of a response differently, or is
            a custom one and a run is to be predicted.

    Cost: a forward and a backward pass a sequence, and N² inner products of rows; the objective's
    own reference. A run: see `predict_run`.
    """
    if isinstance(objective, Preference):
        raise ValueError(
            "a loss of pairs is diagnosed pair by pair: give the pairs (chosen, rejected), and the "
            "objective's name"
        )
    check_store(store, run)
    set_ = SequenceSet(
        tuple(objective.examples), tuple(row_numbers or ()), dict(observed), _labels(objective)
    )
    prepared = prepare(
        model,
        set_,
        run,
        memory=memory,
        sketch=sketch,
        budget=budget,
        refresh=refresh,
        progress=progress,
        ranks=ranks,
        stored=store is not None,
    )
    access, sketch = prepared.access, prepared.sketch
    shown, ranks = progress and ranks.rank == 0, prepared.ranks
    if run is not None:
        objective.subset([0])  # errors in it are raised before the work
    with closing(Bar(prepared.plan.work, shown)) as bar:
        passes = Passes(access, prepared.batching, bar, ranks)
        tokens: list[Tensor] = [torch.empty(0)] * len(set_)

        def read(number: int, response: Response) -> None:
            tokens[number] = response.log_probs.detach().double().cpu()

        rows, reading = read_start(prepared, passes, set_, run, store, read)
        tokens = _of_all(tokens, set_, ranks)
        loss = _prepared(objective, access)
        step = SequenceStep(
            loss.describe(),
            set_,
            Readings(reading.log_probs, {}, {}, reading.observed),
            Gram(torch.empty(0)) if run is not None else rows.gram(set_),  # the run's, below
            tokens,
            response_weights(loss, tokens) * len(set_),
            loss,
            (*remarks, *loss.remarks(), *_remarks(access, set_, reading.log_probs[0])),
        )
        forecast: Forecast | None = None
        if run is not None:

            def ranked(gram: Gram) -> None:
                so_far(SequenceDiagnosis(replace(step, gram=gram), None, access.unavailable))

            predicted = predict_run(
                access,
                passes,
                rows,
                step,
                run,
                segments=prepared.plan.refresh,
                sketch=sketch,
                state=prepared.state,
                ranked=ranked,
            )
            forecast, step = predicted.forecast, replace(step, gram=predicted.gram)
    diagnosis = SequenceDiagnosis(step, forecast, access.unavailable)
    so_far(diagnosis)
    return diagnosis


def as_sequences(
    rows: Objective | Sequence[Any],
    objective: str | Loss | Sequence[str] | None,
    like: Like,
    model: nn.Module | Anatomy,
    reference: Reference | None,
    parameters: Mapping[str, Value],
) -> Objective | None:
    """The objective of single sequences that rows and options mean; None: the rows are pairs.

    Raises:
        ValueError: If rows are of several kinds, or the objective is not one of theirs.
    """
    if isinstance(rows, Objective):
        if objective is not None or parameters or reference is not None:
            raise ValueError(
                f"an {type(rows).__name__} has its own loss, parameters and reference: give it "
                "alone, or give plain rows"
            )
        return rows
    single = sum(isinstance(row, Example) for row in rows)
    marks = [row[1] for row in rows if isinstance(row, tuple) and len(row) == 2]
    labelled = sum(isinstance(mark, bool) for mark in marks)
    rated = sum(isinstance(mark, int | float) for mark in marks) - labelled
    if not single and not labelled and not rated:
        return None
    if max(single, labelled, rated) != len(rows):
        raise ValueError(
            f"rows must be all of one kind, got {single} Examples, {labelled} with a label, "
            f"{rated} with a reward, and {len(rows) - single - labelled - rated} others"
        )
    if like is not None and objective is None:
        return objective_like(TrainerSettings.of(like), rows, model)
    known = "sft" if single else "kto" if labelled else "grpo"
    if objective not in (None, known):
        of = {"sft": "Examples", "kto": "rows with a label", "grpo": "rows with a reward"}[known]
        raise ValueError(
            f"{of} have the objective {known!r}, got "
            f"{objective!r}; other losses are made as an lddyn.Objective, such as lddyn.GRPO"
        )
    if single:
        return SFT(rows, **parameters)  # type: ignore[arg-type]
    examples, labels = zip(*rows, strict=True)
    if rated:
        return GRPO(examples, [float(reward) for reward in labels], **parameters)  # type: ignore[arg-type]
    return KTO(examples, labels, reference=reference or "self", **parameters)  # type: ignore[arg-type]


def refuse_of_pairs(**options: Any) -> None:
    """Raises a ValueError for options of `diagnose` that single sequences do not have."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)}: of pairs alone; single sequences have none")


def _prepared(objective: Objective, access: Access) -> Objective:
    """The objective with what it needs of models, at the present weights."""
    if access.unavailable and type(objective).prepare is Objective.prepare:
        return objective  # it needs nothing of a model
    return objective.prepare(access.anatomy)


def _of_all(tokens: list[Tensor], set_: SequenceSet, ranks: Ranks) -> list[Tensor]:
    """The log-probs of all tokens, where each process has read some sequences."""
    sizes = [len(e) for e in set_.responses]
    whole = torch.zeros(sum(sizes), dtype=torch.float64)
    for part, known in zip(whole.split(sizes), tokens, strict=True):
        if len(known):
            part.copy_(known)
    ranks.add_up(whole)
    return list(whole.split(sizes))


def _labels(objective: Objective) -> tuple[str, ...]:
    """What the data says of each sequence."""
    if isinstance(objective, KTO):
        return tuple("desirable" if label else "undesirable" for label in objective.labels)
    if isinstance(objective, GRPO):
        return tuple(
            f"group {group}, reward {reward:g}"
            for group, reward in zip(objective.groups, objective.rewards.tolist(), strict=True)
        )
    return ()


def _remarks(access: Access, set_: SequenceSet, log_probs: Tensor) -> list[str]:
    """What training does and the diagnosis leaves out, and responses that look wrong."""
    remarks = list(expert_remarks(access.model, list(access.named)))
    if has_dropout(access.model):
        remarks.append("Dropout is off: every number is that of the model in evaluation mode.")
    remarks += noise_remarks(access.model)
    remarks += rounding_remarks(access, set_)
    vocabulary = access.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    unlikely = [
        f"{set_.name(i)}: {problem}"
        for i, example in enumerate(set_.responses)
        if (problem := check_log_prob(example, float(log_probs[i]), vocabulary)) is not None
    ]
    if unlikely:
        remarks.append(
            f"{len(unlikely)} of {len(set_)} responses are less likely than random tokens; the "
            f"first is {unlikely[0]}."
        )
    return remarks
