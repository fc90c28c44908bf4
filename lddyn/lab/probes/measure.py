"""The pass over a probing set, ours against the authors', and means by response type."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.lab.record import Row
from lddyn.lab.setting import Setting
from lddyn.probes.measure import Measured, measure
from lddyn.probes.probe_set import Encoded


def by_type(setting: Setting, encoded: Encoded, report: list[Row]) -> list[Row]:
    """Adds means per token to the rows of a probing set's report."""
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


@torch.no_grad()
def one_by_one(
    model: nn.Module, examples: Sequence[Example], *, corrected: bool = True
) -> Measured:
    """The authors' evaluation, computed as they do: one forward pass for each response.

    A loop over response types with batches of one: float32 logits of all positions, and over all
    of them log-softmax, softmax, argmax, one-hot targets and two norms. This is our own code.

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


def compare(model: nn.Module, encoded: Encoded, repeats: int = 3) -> Row:
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
