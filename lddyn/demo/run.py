"""`lddyn demo`: an SFT step and a DPO step, decomposed, drawn and explained in words."""

from __future__ import annotations

import copy
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.demo.world import World, build_world, falling_pair, sft

__all__ = ["run"]

_OBSERVED = (
    "chosen",
    "rejected",
    "chosen_gptsemantic",
    "reject_gptsemantic",
    "irr_train",
    "random_permute",
)

_DPO = {"steps": 6, "lr": 2e-3, "beta": 0.1, "explained": 3}

_SFT_STEP_LR = 5e-4


def run(
    out_dir: str | os.PathLike[str] = "runs/demo",
    quick: bool = False,
    progress: bool = True,
    seed: int = 0,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The whole demo: train, finetune, take DPO steps, explain one step of each, verify, tell.

    Args:
        out_dir: Gets `index.html`, summary.json, and pictures and numbers of both steps.
        quick: Little training and coarser rules: the machinery in seconds, not sensible beliefs.
        progress: Show bars, and what is being done, on standard error.
        seed: Seed of facts, data, weights and batches.
        cache_dir: Where the pretrained model is cached. Default: `cache_root()`.

    Returns:
        What summary.json holds: the sentences in `"explanation"`, both steps under `"sft"` and
        `"dpo"`, the change of y+ and y- in every DPO step under `"steps"`, `"seconds"` per stage;
        and the path of the page in `"page"`.

    Cost: about a minute and a half on two cores the first time.
    """
    from lddyn.objectives import DPO, SFT
    from lddyn.steps.decompose import decompose
    from lddyn.steps.folder import summarise, write_steps

    clock = _Clock(progress)
    clock.stage("a language, a tokenizer and a tiny Llama")
    world = build_world(cache_dir, seed, progress, steps=30 if quick else None)
    rule = "midpoint" if quick else "simpson"
    fields = _OBSERVED[:3] if quick else _OBSERVED
    # A barely trained model is steep: smaller steps there.
    sft_lr, dpo_lr = (lr * (0.1 if quick else 1.0) for lr in (_SFT_STEP_LR, float(_DPO["lr"])))

    def examples(row: dict[str, str]) -> dict[str, Example]:
        return {k: encode(world.tokenizer, row["prompt"], row[k], name=k) for k in fields}

    clock.stage("one SFT step, explained and checked against the real one")
    first = world.preference_pairs[0]
    watched = examples(first)
    taught = decompose(
        world.model,
        watched,
        SFT(watched["chosen"], reduction="sum"),
        lr=sft_lr,
        rule=rule,
        progress=progress,
    )
    lrs = [sft_lr * 2.0**-k for k in range(2 if quick else 5)]
    taught_check = taught.verify(lrs)

    clock.stage("SFT")
    tuned = sft(world, progress, steps=5 if quick else None)

    clock.stage("DPO steps, one of them explained and checked against the real one")
    policy, beta = copy.deepcopy(tuned.model), float(_DPO["beta"])
    optimizer = torch.optim.SGD(policy.parameters(), lr=dpo_lr)
    near = [row for row in tuned.preference_pairs if row["kind"] == "near"]
    count = 2 if quick else int(_DPO["steps"])
    explained = count - 1 if quick else int(_DPO["explained"])
    steps = []
    for step in range(count):
        row = near[step]
        if step == explained:
            now = replace(tuned, model=policy)
            row = now.preference_pairs[falling_pair(now, candidates=4 if quick else 32)]
            pair = examples(row)
            update = DPO(pair["chosen"], pair["rejected"], beta=beta, reference=tuned.model)
            preferred = decompose(
                policy, pair, update, optimizer=optimizer, rule=rule, progress=progress
            )
            lrs = [dpo_lr * 2.0**-k for k in range(2 if quick else 5)]
            check = preferred.verify(lrs)
            asked = row
        steps.append(_dpo_step(policy, tuned.model, optimizer, world.tokenizer, row, beta))
        steps[-1]["explained"] = step == explained

    clock.stage("pictures and page")
    opening = _opening(tuned, first, asked, steps)
    explanation = [
        *opening,
        "",
        "The SFT step:",
        *taught.explain(taught_check).splitlines(),
        "",
        "The DPO step:",
        *preferred.explain(check).splitlines(),
    ]
    facts = {
        "explanation": explanation,
        "steps": steps,
        "seed": seed,
        "quick": quick,
        "stats": tuned.stats,
        "seconds": clock.seconds,
    }
    decs = {"sft": taught, "dpo": preferred}
    checks = {"sft": taught_check, "dpo": check}
    page = write_steps(
        Path(out_dir),
        decs,
        checks,
        title="lddyn demo: one SFT step and one DPO step, explained",
        opening=opening,
        extra={"parameters": tuned.stats["parameters"], "seed": seed},
        facts=facts,
    )
    return {
        **facts,
        "page": str(page),
        **{name: summarise(dec, checks[name]) for name, dec in decs.items()},
        "seconds": dict(clock.stop()),
    }


class _Clock:
    """Says on standard error what is being done, and remembers how long it took."""

    def __init__(self, shown: bool):
        self.shown, self.seconds, self.name = shown, dict[str, float](), ""
        self.began = time.perf_counter()

    def stage(self, name: str) -> None:
        """End the stage before, begin this one."""
        self.stop()
        self.name, self.began = name, time.perf_counter()
        if self.shown:
            print(f"· {name}", file=sys.stderr, flush=True)

    def stop(self) -> dict[str, float]:
        """Seconds per stage so far."""
        if self.name:
            self.seconds[self.name] = round(time.perf_counter() - self.began, 2)
        return self.seconds


def _dpo_step(
    policy: Any, reference: Any, optimizer: Any, tokenizer: Any, row: dict[str, str], beta: float
) -> dict[str, Any]:
    """Take one real DPO step on one pair; return the change of log π of both answers, in nats."""
    pair = [encode(tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")]

    def log_probs(model: Any) -> list[torch.Tensor]:
        found = []
        for example in pair:
            logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
            logp = logits[list(example.positions)].log_softmax(-1)
            found.append(logp.gather(-1, torch.tensor(example.targets)[:, None]).sum())
        return found

    with torch.no_grad():
        fixed = log_probs(reference)
    before = log_probs(policy)
    margin = beta * ((before[0] - fixed[0]) - (before[1] - fixed[1]))
    loss = -nn.functional.logsigmoid(margin)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = log_probs(policy)
    moved = [float(a - b.detach()) for a, b in zip(after, before, strict=True)]
    return {
        "prompt": row["prompt"],
        "loss": float(loss.detach()),
        "y+": moved[0],
        "y-": moved[1],
    }


def _opening(
    world: World, taught: dict[str, str], asked: dict[str, str], steps: list[dict[str, Any]]
) -> list[str]:
    """What the demo did before the explanations, in plain words."""

    def question(row: dict[str, str]) -> str:
        return row["prompt"].removeprefix("Human: ").partition("\n")[0]

    fell = sum(step["y+"] < 0 for step in steps)
    return [
        f"A Llama of {world.stats['parameters'] / 1e6:.1f} million parameters was pretrained on "
        f"small talk made here (loss {world.stats['loss']:.2f} nats per token), finetuned on "
        f"{len(world.sft_pairs)} good answers, and given {len(steps)} DPO steps on pairs whose "
        f"rejected answer is the good one with wrong facts; y+ fell in {fell} of them.",
        f"The SFT step teaches, to ‘{question(taught)}’, the answer ‘{taught['chosen'].strip()}’.",
        f"The DPO step prefers, to ‘{question(asked)}’, y+ ‘{asked['chosen'].strip()}’ over y− "
        f"‘{asked['rejected'].strip()}’.",
    ]
