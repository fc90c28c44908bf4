"""Why do my chosen log-probs fall? Which pairs of a preference set do it, under which objective.

A diagnosis is made in phases, each with a type of its own:

    pairs         PairSet       the set, checked
    passes        Passes        batched passes over its sequences           (passes.py)
    rows          SetRows       gradients, or sketches of them              (rows.py)
    Gram          Gram          inner products of all gradients             (rows.py)
    effects       SetStep       one small step under the objective          (step.py)
    forecast      Forecast      a whole run                     (forecast.py, segments.py)
    close-ups     CloseUp       the tokens of some pairs                    (close_ups.py)
    Diagnosis                   all of it, and the questions it answers     (diagnosis.py)

Single sequences (SFT, KTO, GRPO) go through the same passes, rows and forecasts, and end in a
SequenceDiagnosis (diagnose_sequences.py, sequence_set.py, sequence_diagnosis.py).

Nothing grows like pairs times parameters: gradients are kept where they fit into the memory that is
given, and else sketched one layer at a time as they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from lddyn.data.checks import check_log_prob
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.experts import expert_remarks
from lddyn.engine.guard import undisturbed
from lddyn.engine.reference_policy import Reference, check_reference, describe_reference
from lddyn.memory import DEFAULT_MEMORY
from lddyn.objectives.like import loss_like, reference_like, row_remarks
from lddyn.objectives.loss import Loss
from lddyn.objectives.losses import Value
from lddyn.objectives.objective import Objective
from lddyn.ranks import ALONE, Ranks
from lddyn.sets.access import Access
from lddyn.sets.bar import Bar
from lddyn.sets.close_ups import lbk_of_pairs, look_at_tokens
from lddyn.sets.diagnose_sequences import as_sequences, diagnose_sequences, refuse_of_pairs
from lddyn.sets.diagnosis import Diagnosis
from lddyn.sets.flat import Flat
from lddyn.sets.pairs import Pair, PairSet
from lddyn.sets.passes import Passes
from lddyn.sets.preparation import prepare, rounding_remarks
from lddyn.sets.readings import Readings
from lddyn.sets.rows import (
    Gram,
    PairReader,
    SetRows,
)
from lddyn.sets.run import Run
from lddyn.sets.segments import predict_run
from lddyn.sets.sequence_diagnosis import SequenceDiagnosis
from lddyn.sets.step import SetStep
from lddyn.sets.stored import check_store, read_start
from lddyn.sets.validate import validate as compare_with_steps
from lddyn.settings import Like, TrainerSettings, router_remark
from lddyn.sketches.sketch import Sketch
from lddyn.steps.precision import has_dropout, noise_remarks
from lddyn.steps.setup import named_examples

__all__ = ["diagnose"]


Sequences = Objective | Iterable[Example] | Iterable[tuple[Example, bool | float]]


@overload
def diagnose(
    model: nn.Module | Anatomy,
    rows: Iterable[Pair],
    objective: str | Loss | Sequence[str] | None = ...,
    **options: Any,
) -> Diagnosis: ...


@overload
def diagnose(
    model: nn.Module | Anatomy,
    rows: Sequences,
    objective: str | None = ...,
    **options: Any,
) -> SequenceDiagnosis: ...


@undisturbed
def diagnose(
    model: nn.Module | Anatomy,
    rows: Iterable[Pair] | Sequences,
    objective: str | Loss | Sequence[str] | None = None,
    *,
    observe: Example | Sequence[Example] | Mapping[str, Example] | None = None,
    like: Like = None,
    reference: Reference | None = None,
    memory: int | str = DEFAULT_MEMORY,
    sketch: Sketch | None = None,
    run: Run | None = None,
    refresh: int = 2,
    close_ups: int = 4,
    lbk: bool = False,
    validate: int = 0,
    budget: float | str | None = None,
    row_numbers: Sequence[int] | None = None,
    faults: Mapping[int, str] | None = None,
    so_far: Callable[[Any], None] = lambda diagnosis: None,
    progress: bool = False,
    ranks: Ranks = ALONE,
    store: str | Path | None = None,
    **parameters: Value,
) -> Diagnosis | SequenceDiagnosis:
    """What a step, or a run, on a set does to log-probs, and which of its rows do it.

    A set of pairs is diagnosed as one: what happens to chosen and rejected responses, which pairs
    and tokens do it, and under which loss. Single sequences are demonstrations (`lddyn.SFT`, or
    Examples), responses with labels (`lddyn.KTO`, or (Example, bool)), completions with rewards
    (`lddyn.GRPO`), or any `lddyn.Objective` of them.

    Args:
        model: A causal LM of transformers, or its Anatomy; only parameters with
            requires_grad=True move.
        rows: (chosen, rejected) examples; or an Objective with its sequences as one batch; or
            Examples, for "sft"; or (Example, label), for "kto"; or (Example, reward), for "grpo".
        objective: A loss of pairs, `lddyn.Loss("dpo", beta=0.1)`, or its name: dpo, ipo, simpo, …
            Default: that of `like`, else dpo. Of single sequences "sft" or "kto", or nothing.
        observe: Other sequences, by name: what a step on the pairs, and the run, do to them, and
            which pairs do it (`Diagnosis.observed`). A held-out set, refusals, a probing set.
        like: How a run trains: a TRL config, a trainer, a file of arguments …, as for `decompose`.
            Objective and reference are its own where they are not given here.
        reference: The reference: a model, log-probs (2, N) in nats, "adapter-off" or
            "adapter:NAME". Default: the model itself, as when training begins.
        memory: What the diagnosis may take beyond the model: gradients of all sequences, vectors of
            all trainable values, a batch. Where the gradients fit, inner products are exact;
            elsewhere they are estimated from sketches, with standard errors. Close-ups and LBK are
            left out where a number does not hold their vectors, and the plan says so.
        sketch: The sketch of these estimates. Default: `Sketch(k=16384)`. With a sketch they are
            estimated even where gradients fit.
        run: How you will train: `Diagnosis.forecast` is what that run does, `Diagnosis.simulate`
            what other runs do.
        refresh: Segments of the predicted run: gradients are taken anew at the start of each.
        close_ups: Number of the most harmful pairs whose tokens are looked at, and as many of the
            pairs whose chosen response falls most. Exact in any case.
        lbk: Compute the score "lbk" for every pair, not only for those of the close-ups.
        validate: Number of real steps of SGD, each on a batch of pairs drawn without repeats and
            from the same start, on a copy of the model; `Diagnosis.validation` holds the rank
            correlations of all scores with the measured changes.
        budget: Most epochs of the explained training that the diagnosis may take, by its plan: LBK,
            close-ups and segments are left out until it fits. None: no limit.
        row_numbers: Row of the data set that each pair comes from; sentences and tables name pairs
            by it.
        faults: Pair -> the problem that an audit of the data found in it.
        so_far: Gets the diagnosis as soon as the pairs are ranked by a step, and again when the run
            is predicted.
        progress: Show bars over sequences.
        ranks: Processes that divide the passes, of `lddyn.ranks.Ranks.of_torchrun()`; each has the
            same model and rows, and gets the same diagnosis.
        store: Folder of a store of sketched rows. Rows that it has are read, others are added as
            they are made: an interrupted diagnosis goes on there, and another objective or subset
            finds them. Without a run, whose rows are those of Adam's metric.
        **parameters: Hyper-parameters of the loss, where `objective` is a name.

    Returns:
        Diagnosis of N pairs, or SequenceDiagnosis of N sequences, which has no close-ups, LBK and
        validation; scores in float64.

    Raises:
        ValueError: If there is no row, the loss or a parameter is unknown, `close_ups` is
            negative, `refresh` is below 1, the budget is too small, or an example is too long for
            the model.
        MemoryBudgetError: If memory is a number, and less than the vectors of a run need.

    Cost: a forward and a backward pass a sequence, and (2N)² inner products of rows. A run: see
    `predict_run`. Each close-up about 40 forward passes, LBK eight a pair. Memory beyond the
    model: rows of all sequences, at most `memory`; with a run three vectors of all trainable
    values where gradients are sketched, as AdamW's training has, and seven where they are exact.

    Source: paper Eq. 6-7; Yuan et al. 2024 (2410.13828); Razin et al. 2025 (2410.08847); Deng et
    al. 2025 (2505.18830).

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> pairs = [(lddyn.Example([1, 2], [3, 4]), lddyn.Example([1, 2], [3, 5])),
        ...          (lddyn.Example([6, 2], [7, 4]), lddyn.Example([6, 2], [8, 9]))]
        >>> diagnosis = lddyn.diagnose(model, pairs, beta=0.1)
        >>> len(diagnosis), len(diagnosis.outcomes), diagnosis.gram.shape
        (2, 2, torch.Size([4, 4]))
        >>> sft = lddyn.diagnose(model, [chosen for chosen, _ in pairs], "sft", observe=pairs[0][1])
        >>> len(sft), sft.target, len(sft.observed())
        (2, 'the observed sequences', 1)
    """
    named = {} if observe is None else named_examples(observe)
    given = rows if isinstance(rows, Objective) else list(rows)
    sequences = as_sequences(given, objective, like, model, reference, parameters)
    if sequences is not None:
        refuse_of_pairs(lbk=lbk, validate=validate, faults=faults)
        return diagnose_sequences(
            model,
            sequences,
            observed=named,
            memory=memory,
            sketch=sketch,
            run=run,
            refresh=refresh,
            budget=budget,
            row_numbers=row_numbers,
            remarks=() if like is None else TrainerSettings.of(like).remarks,
            so_far=so_far,
            progress=progress,
            ranks=ranks,
            store=store,
        )
    set_ = PairSet.of(given, row_numbers, faults, named)  # type: ignore[arg-type]
    _check(set_, close_ups, validate)
    check_store(store, run)
    settings = None if like is None else TrainerSettings.of(like)
    loss = Loss(_objective(objective, settings), None, **parameters)
    module = Anatomy.module_of(model)
    if reference is None:
        reference = "self" if settings is None else reference_like(settings, model, len(set_))
    check_reference(reference, len(set_))  # errors in it are raised before the work
    prepared = prepare(
        model,
        set_,
        run,
        memory=memory,
        sketch=sketch,
        budget=budget,
        refresh=refresh,
        close_ups=close_ups,
        lbk=lbk,
        progress=progress,
        ranks=ranks,
        stored=store is not None,
    )
    access, sketch, plan = prepared.access, prepared.sketch, prepared.plan
    shown, ranks = progress and ranks.rank == 0, prepared.ranks
    if validate and access.shards.split:
        raise ValueError("validate takes steps on a copy, and split weights (FSDP 2) have none")
    refresh, close_ups, lbk = plan.refresh, plan.close_ups, plan.lbk
    with closing(Bar(plan.work, shown)) as bar:
        passes = Passes(access, prepared.batching, bar, ranks)
        reader = PairReader(set_)
        kept, reading = read_start(prepared, passes, set_, run, store, reader)
        readings = reader.readings(reading, ranks)
        if lbk:
            readings = readings.with_fact("lbk", lbk_of_pairs(access, set_, bar, ranks))
        known = _reference_log_probs(reference, set_, access, readings, ranks)
        remarks = (
            *_remarks(module, loss, settings),
            *expert_remarks(access.model, list(access.named)),
            *row_remarks(settings, set_.examples),
            *rounding_remarks(access, set_),
        )
        described = describe_reference(reference)
        gram = Gram(torch.empty(0)) if run is not None else kept.gram(set_)  # the run's, below
        step = SetStep(loss, set_, readings, gram, known, described, remarks)
        step = replace(step, remarks=(*step.remarks, *_data_remarks(module, set_, step)))
        mean = _mean_chosen(access, passes, set_, kept) if close_ups else torch.empty(0)
        forecast, adam = None, None
        if run is None:
            so_far(Diagnosis(step, unavailable=access.unavailable))
        else:

            def ranked(gram: Gram) -> None:
                so_far(Diagnosis(replace(step, gram=gram), unavailable=access.unavailable))

            predicted = predict_run(
                access,
                passes,
                kept,
                step,
                run,
                segments=refresh,
                sketch=sketch,
                state=prepared.state,
                ranked=ranked,
            )
            forecast, adam = predicted.forecast, predicted.adam
            step = replace(step, gram=predicted.gram)
        diagnosis = Diagnosis(step, adam, forecast, unavailable=access.unavailable)
        if run is not None:
            so_far(diagnosis)
        seen = look_at_tokens(access, set_, mean, _wanted(diagnosis, close_ups), bar, ranks)
    validation = None
    if validate:
        batch = 8 if run is None else run.batch
        validation = compare_with_steps(
            module,
            step,
            diagnosis.scores,
            steps=validate,
            batch=batch,
            progress=progress,
            ranks=ranks,
        )
    return replace(diagnosis, close_ups=seen, validation=validation)


def _mean_chosen(access: Access, passes: Passes, pairs: PairSet, rows: SetRows) -> Tensor:
    """The mean gradient of the chosen responses (P,)."""
    n = len(pairs)
    if rows.dense.exact:
        return rows.dense.rows[:n].mean(0)
    mean = Flat(access.named)
    passes.bar.say("mean gradient")
    passes.sum_gradients(pairs.examples[:n], torch.full((n,), 1 / n), mean)
    return mean.vector


def _objective(
    given: str | Loss | Sequence[str] | None, settings: TrainerSettings | None
) -> str | Loss | Sequence[str]:
    """The loss that is asked for, or the trainer's, or DPO."""
    if given is not None:
        return given
    return "dpo" if settings is None else loss_like(settings)


def _remarks(model: nn.Module, loss: Loss, settings: TrainerSettings | None) -> tuple[str, ...]:
    """What training does and the diagnosis leaves out, in sentences."""
    remarks = [] if settings is None else list(settings.remarks)
    if loss.reads_prompt:
        remarks.append(
            f"{loss.title}'s trainer also learns the tokens of the prompt; here its first term is "
            "the mean over the tokens of y+ alone."
        )
    if loss.ld_alpha != 1.0:
        remarks.append(
            "ld_alpha weighs single tokens of a response; here whole responses have one weight."
        )
    if has_dropout(model):
        remarks.append("Dropout is off: every number is that of the model in evaluation mode.")
    remarks += noise_remarks(model)
    routers = router_remark(model.config, settings)
    return (*remarks, *([routers] if routers else []))


def _data_remarks(model: nn.Module, pairs: PairSet, step: SetStep) -> list[str]:
    """Pairs of two prompts, and responses less likely than random tokens, in a sentence each."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    name = pairs.row_numbers or range(len(pairs))
    apart = [i for i, (y, other) in enumerate(pairs.pairs) if y.prompt_ids != other.prompt_ids]
    remarks = []
    if apart:
        remarks.append(
            f"In {len(apart)} of {len(pairs)} pairs chosen and rejected have different prompts; "
            f"the first is pair {name[apart[0]]}."
        )
    unlikely = []
    for i, pair in enumerate(pairs.pairs):
        for side, example in enumerate(pair):
            log_prob = float(step.readings.log_probs[side, i])
            problem = check_log_prob(example, log_prob, vocabulary)
            if problem is not None:
                unlikely.append(f"{('chosen', 'rejected')[side]} of pair {name[i]}: {problem}")
    if unlikely:
        remarks.append(
            f"{len(unlikely)} of {2 * len(pairs)} responses are less likely than random tokens; "
            f"the first is {unlikely[0]}."
        )
    return remarks


def _check(pairs: PairSet, close_ups: int, validate: int) -> None:
    if validate < 0 or (validate and len(pairs) < 4):
        raise ValueError(
            f"validate must be a number of steps, on 4 pairs or more, got {validate} on "
            f"{len(pairs)} pairs"
        )
    if close_ups < 0:
        raise ValueError(f"close_ups must be a number of pairs, 0 or more, got {close_ups}")


def _reference_log_probs(
    reference: Reference, pairs: PairSet, access: Access, readings: Readings, ranks: Ranks
) -> Tensor:
    """Log π_ref of all responses, (2, N) float64, nats."""
    if isinstance(reference, str) and reference == "self":
        return readings.log_probs
    known = check_reference(reference, len(pairs))
    if known is not None:
        return known
    return access.reference_log_probs(reference, pairs.examples, ranks)


def _wanted(diagnosis: Diagnosis, count: int) -> dict[int, list[int]]:
    """Pairs to look at, and for each the other pairs that lower its chosen response most."""
    pairs = dict.fromkeys(diagnosis.worst(count) + diagnosis.falling(count))
    return {i: [j for j, _ in diagnosis.culprits(i, 4) if j != i][:3] for i in pairs}
