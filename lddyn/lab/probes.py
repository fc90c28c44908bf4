"""The probing set, built or read, and its pass against the authors' (§4.1)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.lab.drawing import GROUP_COLOURS, axes_grid, tidy
from lddyn.lab.record import Claim, Lab
from lddyn.lab.setting import Setting, load, must_be_positive, one_thread
from lddyn.probes.endpoint import Endpoint, write
from lddyn.probes.measure import Measured, measure
from lddyn.probes.probe_set import TYPES, Encoded

__all__ = ["compare", "one_by_one", "run"]

_WANTED = 4.0  # times faster


def run(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool = True,
    model: str | None = None,
    data: str | None = None,
    rows: int = 248,
    prompts: int = 40,
    endpoint: str = "",
    endpoint_model: str = "",
    key_variable: str = "",
) -> dict[str, Any]:
    """Builds or reads a probing set, reports on it, and times the pass.

    Args:
        out: Folder for everything; probes.jsonl is the set.
        seed: Of all random numbers.
        progress: Show bars.
        model: Name or folder of a causal LM. None: the demo's.
        data: Rows with prompt and chosen, or a probing set. None: the demo's.
        rows: How many are read.
        prompts: How many prompts the set has.
        endpoint: Address of a service with OpenAI's interface that writes the responses which need
            a language model. Empty: nothing is sent anywhere.
        endpoint_model: The model's name there.
        key_variable: Environment variable that holds the key.

    Returns:
        What results.json holds.

    Cost: the default 40 seconds of one core.
    """
    must_be_positive(rows=rows, prompts=prompts)
    options = {
        "model": model,
        "data": data,
        "rows": rows,
        "prompts": prompts,
        "endpoint": endpoint,
        "endpoint_model": endpoint_model,
    }
    lab = Lab("probes", Path(out), seed, options, progress)
    setting = load(lab, model, data, rows=rows, prompts=prompts)
    probes = setting.probes
    if endpoint:
        service = Endpoint(endpoint, endpoint_model, key_variable)
        probes = write(probes, service, lab.path("written.jsonl"), progress=lab.bar)
    probes.save(lab.path("probes.jsonl"))
    fields = [name for name in probes.fields if name != "chosen_selfr"]
    encoded = probes.encode(setting.tokenizer, fields=fields)
    with one_thread():
        found = lab.once("compare", lambda: compare(setting.model, encoded))
        by_type = lab.once("types", lambda: _by_type(setting, encoded, probes.table()))
    lab.table("types", by_type)
    lab.table("pass", [found])
    lab.figure(
        "types",
        _draw(by_type),
        "Mean log-prob per token of every response type before any finetuning.",
    )
    return _conclude(lab, setting, found, by_type)


def _by_type(
    setting: Setting, encoded: Encoded, report: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    measured = measure(setting.model, encoded)
    grids = {
        name: encoded.grid(getattr(measured, name) / measured.tokens)
        for name in ("log_prob", "greedy", "entropy", "peakiness", "energy")
    }
    count = encoded.grid(measured.tokens)
    for row in report:
        if row["type"] not in encoded.fields:
            continue
        column = encoded.fields.index(row["type"])
        row["tokens"] = float(count[:, column].nanmean())
        for name, grid in grids.items():
            row[name] = float(grid[:, column].nanmean())
    return report


# ---------------------------------------------------------------------------------------------
# The authors' pass


@torch.no_grad()
def one_by_one(
    model: nn.Module, examples: Sequence[Example], *, corrected: bool = True
) -> Measured:
    """What the authors' evaluation computes, as it does: one forward per response, no sharing.

    Their loop over types, with evaluation batches of one: float32 logits of all positions, and over
    all of them log-softmax, softmax, argmax, the one-hot targets and two norms. Written anew.

    Args:
        model: In evaluation mode.
        examples: The responses.
        corrected: Take log(1 − max π) from a logsumexp in float64, and entropies, which they do not
            have. False: only what they compute, for a fair time.
    """
    sums = []
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()[:, :-1]
        counted = torch.zeros(1, logits.shape[1])
        counted[0, list(example.positions)] = 1
        targets = ids[:, 1:]
        log_probs = logits.log_softmax(-1)
        log_prob = log_probs.gather(2, targets[..., None])[..., 0]
        greedy = log_probs.gather(2, logits.argmax(-1, keepdim=True))[..., 0]
        probs = logits.softmax(-1)
        rest, entropy = torch.log(1 - greedy.exp() + 1e-100), torch.zeros_like(greedy)
        if corrected:
            precise = logits.double()
            others = precise.scatter(2, logits.argmax(-1, keepdim=True), -torch.inf)
            rest = others.logsumexp(-1) - precise.logsumexp(-1)
            entropy = -(probs * log_probs).sum(-1)
        vocabulary = logits.shape[-1]
        peakiness = vocabulary - 2 + vocabulary * torch.linalg.vector_norm(probs, dim=-1) ** 2
        one_hot = nn.functional.one_hot(targets, vocabulary)
        energy = torch.linalg.vector_norm(probs - one_hot, dim=-1) ** 2
        parts = (log_prob, greedy, rest, entropy, peakiness, energy)
        sums.append(torch.stack([(p.double() * counted).sum() for p in parts]))
    count = torch.tensor([float(len(e)) for e in examples], dtype=torch.float64)
    return Measured(count, *torch.stack(sums).unbind(1))


def compare(model: nn.Module, encoded: Encoded, repeats: int = 3) -> dict[str, Any]:
    """Both passes over the same probes on one thread, in turns: seconds of CPU, largest difference.

    Differences are relative to the larger of 1 and the number itself.
    """
    seconds: dict[str, list[float]] = {"one by one": [], "shared": []}
    truth, ours = one_by_one(model, encoded.examples), measure(model, encoded.examples)
    for _ in range(repeats):
        start = time.process_time()
        one_by_one(model, encoded.examples, corrected=False)
        middle = time.process_time()
        measure(model, encoded.examples)
        seconds["one by one"].append(middle - start)
        seconds["shared"].append(time.process_time() - middle)

    def difference(name: str) -> float:
        a: Tensor = getattr(truth, name)
        b: Tensor = getattr(ours, name)
        return float(((a - b).abs() / a.abs().clamp(min=1)).max())

    names = ("log_prob", "greedy", "rest", "entropy", "peakiness", "energy")
    prompts = {example.prompt_ids for example in encoded.examples}
    response_tokens = sum(len(e.response_ids) for e in encoded.examples)
    return {
        "responses": len(encoded.examples),
        "tokens one by one": sum(e.length for e in encoded.examples),
        "tokens shared": response_tokens + sum(map(len, prompts)),
        "seconds one by one": min(seconds["one by one"]),
        "seconds shared": min(seconds["shared"]),
        "times faster": min(seconds["one by one"]) / min(seconds["shared"]),
        "times faster, each repeat": [
            a / b for a, b in zip(seconds["one by one"], seconds["shared"], strict=True)
        ],
        "largest difference": {name: difference(name) for name in names},
    }


# ---------------------------------------------------------------------------------------------
# Page


def _draw(by_type: Sequence[dict[str, Any]]) -> Any:
    shown = [row for row in by_type if "log_prob" in row]
    figure, grid = axes_grid("types", 1, 2, 9.6, 0.9 + 0.28 * len(shown))
    for axes, key, title in (
        (grid[0], "log_prob", "log π per token, nats"),
        (grid[1], "entropy", "entropy per token, nats"),
    ):
        for at, row in enumerate(shown):
            axes.barh(at, row[key], color=GROUP_COLOURS[row["group"]], height=0.72)
            axes.annotate(
                f"{row[key]:.2f}".replace("-", "−"),
                (row[key], at),
                fontsize=7.5,
                va="center",
                xytext=(-3 if row[key] < 0 else 3, 0),
                textcoords="offset points",
                ha="right" if row[key] < 0 else "left",
            )
        axes.set_yticks(range(len(shown)), [TYPES[row["type"]].label for row in shown])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_title(title, fontsize=9.5, loc="left")
        tidy(axes)
    grid[1].set_yticklabels([])
    return figure


def _conclude(
    lab: Lab, setting: Setting, found: dict[str, Any], by_type: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    faster, worst = found["times faster"], max(found["largest difference"].values())
    enough = faster >= _WANTED and worst <= 1e-5
    each = found["times faster, each repeat"]
    lab.claim(
        Claim(
            "pass",
            "A probe pass with shared prompts is at least 4 times faster than the authors' with "
            "batches of one, with the same numbers to 1e-5.",
            "§4.4 of the protocol; our own requirement",
            "no time is published; evaluation must run with batches of one",
            f"{faster:.2f} times faster ({found['seconds one by one']:.2f} s → "
            f"{found['seconds shared']:.2f} s of CPU on one thread, the fastest of {len(each)} "
            f"turns, which are {min(each):.2f} to {max(each):.2f} times apart; "
            f"{found['responses']} responses), largest relative difference {worst:.1e}",
            "agrees" if enough else "disagrees",
            f"{found['tokens one by one'] / found['tokens shared']:.2f} times fewer tokens are "
            "read; the rest is fewer calls, and products by the faster BLAS",
            value=faster,
        )
    )
    empty = sum(row["empty"] for row in by_type)
    return lab.finish(
        [
            "Of every prompt about a dozen responses, from what is learned to noise; a pass over "
            "them that costs little beside training.",
        ],
        [
            f"{len(setting.probes)} prompts of {setting.title}, {len(by_type)} response types, "
            f"{empty} responses empty; the training rows and the {len(setting.test)} held-out rows "
            "share no prompt.",
            f"The shared pass took {found['seconds shared']:.2f} s of CPU where one response at a "
            f"time took {found['seconds one by one']:.2f} s: {faster:.2f} times faster, largest "
            f"relative difference {worst:.1e}.",
        ],
    )
