"""Does leaving out the pairs that `lddyn.diagnose` names change what DPO does to chosen responses?

    python benchmarks/dropped_pairs.py MODEL PAIRS.jsonl --out benchmarks/results/dropped-pairs.json

SFT on the chosen responses, so that their log-probs are high; a diagnosis there; then DPO, in
several orders of the data: with all pairs, without the worst, without as many drawn at random,
without the best. Measured is the mean change of log π(y+) over all pairs, trained on or not.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import transformers
from record import record
from torch import Tensor

import lddyn
from lddyn.examples import encode_row, rows
from lddyn.probes import measure

Pairs = list[tuple[lddyn.Example, lddyn.Example]]


def read(path: str, tokenizer: Any, count: int, longest: int) -> Pairs:
    """The first pairs that are no longer than `longest` tokens."""
    found: Pairs = []
    for row in rows(path):
        try:
            pair = encode_row(tokenizer, {k: row[k] for k in ("prompt", "chosen", "rejected")})
        except ValueError:  # an empty response
            continue
        if max(e.length for e in pair.values()) <= longest:
            found.append((pair["chosen"], pair["rejected"]))
        if len(found) == count:
            break
    return found


def log_probs(model: Any, examples: list[lddyn.Example]) -> Tensor:
    """Sums over tokens (N,), with gradients."""
    longest = max(e.length for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    for i, e in enumerate(examples):
        ids[i, : e.length] = torch.tensor(e.ids)
    found = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return torch.stack(
        [found[i, list(e.positions), list(e.targets)].sum() for i, e in enumerate(examples)]
    )


def finetune(model: Any, pairs: Pairs, epochs: int, rate: float, seed: int, beta: float) -> None:
    """DPO against the model it begins with; SFT on the chosen responses if beta is 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    chosen, rejected = ([p[side] for p in pairs] for side in (0, 1))
    reference = [measure(model, x).log_prob for x in (chosen, rejected)]
    for _ in range(epochs):
        for part in torch.randperm(len(pairs), generator=generator).split(8):
            up = log_probs(model, [chosen[i] for i in part])
            if beta == 0:
                loss = -up.sum() / sum(len(chosen[i]) for i in part)
            else:
                down = log_probs(model, [rejected[i] for i in part])
                margin = (up - reference[0][part]) - (down - reference[1][part])
                loss = -torch.nn.functional.logsigmoid(beta * margin).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def one_step(model: Any, pairs: Pairs, beta: float, rate: float) -> dict[str, Any]:
    """A step of SGD on all pairs against what the diagnosis foretells of it."""
    found = lddyn.diagnose(model, pairs, "dpo", beta=beta)
    moved, sides = copy.deepcopy(model), [[p[side] for p in pairs] for side in (0, 1)]
    optimizer = torch.optim.SGD(moved.parameters(), lr=rate)
    before = [measure(moved, x).log_prob for x in sides]
    for part in torch.arange(len(pairs)).split(8):
        up, down = (log_probs(moved, [x[i] for i in part]) for x in sides)
        margin = (up - before[0][part]) - (down - before[1][part])
        (-torch.nn.functional.logsigmoid(beta * margin).sum() / len(pairs)).backward()
    optimizer.step()
    change = [measure(moved, x).log_prob - y for x, y in zip(sides, before, strict=True)]
    foretold = [rate * found.scores[name] for name in ("set_chosen", "set_rejected")]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(foretold, change, strict=True)]
    return {
        "pairs": len(pairs), "beta": beta, "lr": rate, "error_chosen": errors[0],
        "error_rejected": errors[1], "chosen_rise": int((change[0] > 0).sum()),
        "correlations": found.correlations(change[0]),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--drop", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--sft-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    pairs = read(args.pairs, tokenizer, args.count, 128)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    record(args.out, "one step", one_step(model, pairs, args.beta, 1e-3))
    finetune(model, pairs, args.sft_epochs, 1e-3, 0, 0.0)
    found = lddyn.diagnose(model, pairs, "dpo", beta=args.beta)
    print("\n".join(found.tell()))
    sides = [[p[side] for p in pairs] for side in (0, 1)]
    before = [measure(model, x).log_prob for x in sides]

    def change(kept: list[int], seed: int) -> tuple[Tensor, Tensor]:
        trained = copy.deepcopy(model)
        finetune(trained, [pairs[i] for i in kept], args.epochs, 1e-4, seed, args.beta)
        after = (measure(trained, x).log_prob for x in sides)
        up, down = (x - y for x, y in zip(after, before, strict=True))
        return up, down

    everything, worst = list(range(len(pairs))), set(found.worst(args.drop))
    best = set(found.scores["gives"].argsort(descending=True)[: args.drop].tolist())
    runs, moved = [], torch.zeros(len(pairs), dtype=torch.float64)
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        random = set(torch.randperm(len(pairs), generator=generator)[: args.drop].tolist())
        row: dict[str, Any] = {"seed": seed}
        for name, gone in (("none", set()), ("worst", worst), ("random", random), ("best", best)):
            up, down = change([i for i in everything if i not in gone], seed)
            row[name] = {"chosen": float(up.mean()), "rejected": float(down.mean())}
            if name == "none":
                moved += up / args.seeds
        runs.append(row)
        print({k: v["chosen"] if isinstance(v, dict) else v for k, v in row.items()}, flush=True)
    record(args.out, "dropped pairs", {
        "pairs": len(pairs), "dropped": args.drop, "beta": args.beta, "told": found.tell(),
        "sft_epochs": args.sft_epochs, "epochs": args.epochs,
        "log_prob_before": [float(x.mean()) for x in before],
        "worst": sorted(worst), "runs": runs, "correlations": found.correlations(moved),
    })  # fmt: skip


if __name__ == "__main__":
    main()
