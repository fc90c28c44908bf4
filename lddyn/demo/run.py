"""`lddyn demo`: an SFT step and a DPO step, decomposed, checked, drawn and explained in words."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.demo.world import World, build_world, falling_pair, sft
from lddyn.engine.logits import own_response
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from lddyn.steps.decomposition import Decomposition
    from lddyn.steps.verification import Verification

__all__ = ["run"]

_BETA = 0.1


@dataclass(frozen=True)
class Scale:
    """How much the demo does.

    Attributes:
        pretraining: Steps of pretraining. None: all.
        sft: Steps of SFT. None: all.
        steps: Steps of DPO.
        explained: Which of them is decomposed, from 0.
        candidates: Pairs among which the one for that step is looked for.
        sft_lr: Learning rate of the SFT step.
        dpo_lr: Learning rate of the DPO steps.
        halvings: How many learning rates the real steps take, each half of the one before.
        rule: Where on the step kernels are taken.
        observed: Response fields that are watched.
    """

    pretraining: int | None
    sft: int | None
    steps: int
    explained: int
    candidates: int
    sft_lr: float
    dpo_lr: float
    halvings: int
    rule: str
    observed: tuple[str, ...]

    def lrs(self, lr: float) -> list[float]:
        """Learning rates at which a step is checked."""
        return [lr * 2.0**-k for k in range(self.halvings)]


_FULL = Scale(
    pretraining=None,
    sft=None,
    steps=6,
    explained=3,
    candidates=32,
    sft_lr=5e-4,
    dpo_lr=2e-3,
    halvings=5,
    rule="simpson",
    observed=(
        "chosen",
        "rejected",
        "chosen_gptsemantic",
        "reject_gptsemantic",
        "irr_train",
        "random_permute",
    ),
)

# The loss of a barely trained model is steep: smaller steps there.
_QUICK = replace(
    _FULL,
    pretraining=30,
    sft=5,
    steps=2,
    explained=1,
    candidates=4,
    sft_lr=5e-5,
    dpo_lr=2e-4,
    halvings=2,
    rule="midpoint",
    observed=_FULL.observed[:3],
)


@dataclass(frozen=True)
class ExplainedStep:
    """A step that was decomposed, and the row of data that it learned from."""

    row: dict[str, str]
    decomposition: Decomposition
    check: Verification


def run(
    out_dir: str | os.PathLike[str] = "runs/demo",
    quick: bool = False,
    progress: bool = True,
    seed: int = 0,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> JsonObject:
    """The whole demo: train, finetune, take DPO steps, and explain one step of each kind.

    Args:
        out_dir: Gets `index.html`, summary.json, and pictures and numbers of both steps.
        quick: Train little and use coarser rules: the machinery in seconds, not sensible beliefs.
        progress: Show bars, and what is being done, on standard error.
        seed: Seed of facts, data, weights and batches.
        cache_dir: Where the pretrained model is cached. Default: see `build_world`.

    Returns:
        What summary.json holds: the sentences in `"explanation"`, both steps under `"sft"` and
        `"dpo"`, the change of y+ and y- in every DPO step under `"steps"`, `"seconds"` per stage;
        and the path of the page in `"page"`.

    Cost: about a minute and a half on two cores the first time.
    """
    from lddyn.steps.folder import summarise, write_steps

    scale, clock = (_QUICK if quick else _FULL), _Clock(progress)
    clock.stage("a language, a tokenizer and a tiny Llama")
    world = build_world(cache_dir, seed, progress, steps=scale.pretraining)
    clock.stage("one SFT step, explained and checked against the real one")
    taught = _explain_sft(world, scale, progress)
    clock.stage("SFT")
    tuned = sft(world, progress, steps=scale.sft)
    clock.stage("DPO steps, one of them explained and checked against the real one")
    preferred, steps = _dpo_steps(tuned, scale, progress)
    clock.stage("pictures and page")
    opening = _opening(tuned, taught.row, preferred.row, steps)
    explained = {"sft": taught, "dpo": preferred}
    facts = {
        "explanation": _explanation(opening, explained),
        "steps": steps,
        "seed": seed,
        "quick": quick,
        "stats": tuned.stats,
        "seconds": clock.seconds,
    }
    page = write_steps(
        Path(out_dir),
        {name: step.decomposition for name, step in explained.items()},
        {name: step.check for name, step in explained.items()},
        title="lddyn demo: one SFT step and one DPO step, explained",
        opening=opening,
        extra={"parameters": tuned.stats["parameters"], "seed": seed},
        facts=facts,
    )
    summaries = {
        name: summarise(step.decomposition, step.check) for name, step in explained.items()
    }
    return {**facts, "page": str(page), **summaries, "seconds": dict(clock.stop())}


def _explain_sft(world: World, scale: Scale, progress: bool) -> ExplainedStep:
    """An SFT step on the chosen answer of the first row."""
    from lddyn.objectives.objective import SFT
    from lddyn.steps.decompose import decompose

    row = world.preference_pairs[0]
    watched = _examples(world, row, scale)
    dec = decompose(
        world.model,
        watched,
        SFT(watched["chosen"], reduction="sum"),
        lr=scale.sft_lr,
        rule=scale.rule,
        progress=progress,
    )
    return ExplainedStep(row, dec, dec.verify(scale.lrs(scale.sft_lr)))


def _dpo_steps(
    tuned: World, scale: Scale, progress: bool
) -> tuple[ExplainedStep, list[JsonObject]]:
    """Some real DPO steps, one pair each; before one of them, that step is explained."""
    from lddyn.objectives.paired import DPO
    from lddyn.steps.decompose import decompose

    policy = copy.deepcopy(tuned.model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=scale.dpo_lr)
    near = [row for row in tuned.preference_pairs if row["kind"] == "near"]
    steps: list[JsonObject] = []
    explained: ExplainedStep | None = None
    for step, row in enumerate(near[: scale.steps]):
        if step == scale.explained:
            now = replace(tuned, model=policy)
            row = now.preference_pairs[falling_pair(now, candidates=scale.candidates)]
            pair = _examples(tuned, row, scale)
            update = DPO(pair["chosen"], pair["rejected"], beta=_BETA, reference=tuned.model)
            dec = decompose(
                policy, pair, update, optimizer=optimizer, rule=scale.rule, progress=progress
            )
            explained = ExplainedStep(row, dec, dec.verify(scale.lrs(scale.dpo_lr)))
        taken = _take_dpo_step(policy, tuned.model, optimizer, tuned.tokenizer, row)
        steps.append({**taken, "explained": step == scale.explained})
    if explained is None:
        raise ValueError(f"the demo needs {scale.steps} near pairs, got {len(near)}")
    return explained, steps


def _examples(world: World, row: Mapping[str, str], scale: Scale) -> dict[str, Example]:
    """The watched responses of a row."""
    return {k: encode(world.tokenizer, row["prompt"], row[k], name=k) for k in scale.observed}


def _take_dpo_step(
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerFast,
    row: Mapping[str, str],
) -> JsonObject:
    """Takes a real DPO step on one pair: the change of log π of both answers, in nats.

    The model's own forward pass and torch's optimizer take it; the demo compares its explanation
    with this.
    """
    pair = [encode(tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")]
    with torch.no_grad():
        chosen_reference, rejected_reference = _log_probs(reference, pair)
    before = _log_probs(policy, pair)
    margin = (before[0] - chosen_reference) - (before[1] - rejected_reference)
    loss = -nn.functional.logsigmoid(_BETA * margin)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = _log_probs(policy, pair)
    chosen, rejected = (float(a - b.detach()) for a, b in zip(after, before, strict=True))
    return {
        "prompt": row["prompt"],
        "loss": float(loss.detach()),
        "y+": chosen,
        "y-": rejected,
    }


def _log_probs(model: LlamaForCausalLM, examples: list[Example]) -> list[Tensor]:
    """Log π of each response by the model's own forward pass, with its graph, in nats."""
    return [own_response(model, example).log_probs.sum() for example in examples]


def _opening(
    world: World,
    taught: Mapping[str, str],
    preferred: Mapping[str, str],
    steps: list[JsonObject],
) -> list[str]:
    """What the demo did before the explanations."""

    def question(row: Mapping[str, str]) -> str:
        return row["prompt"].removeprefix("Human: ").partition("\n")[0]

    fell = sum(step["y+"] < 0 for step in steps)
    return [
        f"A Llama of {world.stats['parameters'] / 1e6:.1f} million parameters was pretrained on "
        f"small talk made here (loss {world.stats['loss']:.2f} nats per token), finetuned on "
        f"{len(world.sft_pairs)} good answers, and given {len(steps)} DPO steps on pairs whose "
        f"rejected answer is the good one with wrong facts; y+ fell in {fell} of them.",
        f"The SFT step teaches, to ‘{question(taught)}’, the answer ‘{taught['chosen'].strip()}’.",
        f"The DPO step prefers, to ‘{question(preferred)}’, y+ ‘{preferred['chosen'].strip()}’ "
        f"over y− ‘{preferred['rejected'].strip()}’.",
    ]


def _explanation(opening: list[str], explained: Mapping[str, ExplainedStep]) -> list[str]:
    """The demo in words, a sentence or heading each."""
    lines = list(opening)
    for name, step in explained.items():
        lines += ["", f"The {name.upper()} step:"]
        lines += step.decomposition.explain(step.check).splitlines()
    return lines


class _Clock:
    """Says on standard error what is being done, and remembers how long it took."""

    def __init__(self, shown: bool):
        self.shown, self.seconds, self.name = shown, dict[str, float](), ""
        self.began = time.perf_counter()

    def stage(self, name: str) -> None:
        """Ends the stage before and begins this one."""
        self.stop()
        self.name, self.began = name, time.perf_counter()
        if self.shown:
            print(f"· {name}", file=sys.stderr, flush=True)

    def stop(self) -> dict[str, float]:
        """Seconds per stage so far."""
        if self.name:
            self.seconds[self.name] = round(time.perf_counter() - self.began, 2)
        return self.seconds
