"""Does what `lddyn.diagnose` says of pairs change what DPO does to chosen responses?

    python benchmarks/dropped_pairs.py MODEL PAIRS.jsonl --out benchmarks/results/dropped-pairs.json

SFT on the chosen responses, so that their log-probs are high; a diagnosis there, of the run that
follows; then DPO, in several orders of the data: with all pairs, without the worst, without as many
drawn at random, reweighted, with the same weights on other pairs. Measured is the mean change of
log π(y+) over all pairs, trained on or not. With --second on other pairs of the file, which nothing
in lddyn was tuned on.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from pairs import BATCH, Pairs, arguments, finetune, load, read
from record import record
from torch import Tensor

import lddyn
from lddyn.engine.logits import sequence_log_probs
from lddyn.objectives.loss import Loss
from lddyn.probes.measure import measure
from lddyn.stats import spearman

COMPARED = ("dpo", "ipo", "simpo", "dpop", "dpo+nll", "extend")


def one_step(model: Any, pairs: Pairs, beta: float, rate: float) -> dict[str, Any]:
    """A step of SGD on all pairs against what the diagnosis predicts of it."""
    diagnosis = lddyn.diagnose(model, pairs, "dpo", beta=beta, lbk=True)
    moved, sides = copy.deepcopy(model), [[p[side] for p in pairs] for side in (0, 1)]
    optimizer = torch.optim.SGD(moved.parameters(), lr=rate)
    before = [measure(moved, x).log_prob for x in sides]
    for part in torch.arange(len(pairs)).split(BATCH):
        up, down = (sequence_log_probs(moved, [x[i] for i in part]) for x in sides)
        margin = (up - before[0][part]) - (down - before[1][part])
        (-torch.nn.functional.logsigmoid(beta * margin).sum() / len(pairs)).backward()
    optimizer.step()
    change = [measure(moved, x).log_prob - y for x, y in zip(sides, before, strict=True)]
    predicted = [rate * diagnosis.scores[name] for name in ("set_chosen", "set_rejected")]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(predicted, change, strict=True)]
    return {
        "pairs": len(pairs),
        "beta": beta,
        "lr": rate,
        "error_chosen": errors[0],
        "error_rejected": errors[1],
        "chosen_rise": int((change[0] > 0).sum()),
        "correlations": diagnosis.correlations(change[0]),
    }


def objectives(
    model: Any, pairs: Pairs, diagnosis: lddyn.Diagnosis, run: lddyn.Run, seeds: int
) -> dict[str, Any]:
    """What `objectives` says of runs on other losses against such runs."""
    sides = [[p[side] for p in pairs] for side in (0, 1)]
    before = torch.stack([measure(model, x).log_prob for x in sides])
    told = {row["objective"]: row for row in diagnosis.objectives()}
    rows = []
    for name in COMPARED:
        change = torch.zeros_like(before)
        for seed in range(seeds):
            trained, reference = copy.deepcopy(model), before
            settings = (run.epochs, run.lr, seed)
            if name == "extend":
                finetune(trained, pairs, *settings, lambda p: -p.chosen - p.rejected)
                reference = torch.stack([measure(trained, x).log_prob for x in sides])
            loss = Loss("dpo" if name == "extend" else name)
            finetune(trained, pairs, *settings, loss, None, reference)
            after = torch.stack([measure(trained, x).log_prob for x in sides])
            change += (after - before) / seeds
        row = {
            "objective": name,
            "measured": change.mean(1).tolist(),
            "predicted": [told[name]["run_chosen"], told[name]["run_rejected"]],
            "fall": float((change[0] < 0).double().mean()),
        }
        if name != "extend":
            row |= spearman(diagnosis.under(name).simulate(run).change[0], change[0])
        rows.append(row)
        print(row, flush=True)
    return {"pairs": len(pairs), "epochs": run.epochs, "lr": run.lr, "seeds": seeds, "rows": rows}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--second", action="store_true", help="pairs that nothing was tuned on")
    parser.add_argument("--objectives", action="store_true", help="train on several losses")
    parser.add_argument(
        "--again", action="store_true", help="foretell anew; train only in ways that FILE lacks"
    )
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--drop", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sft-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    pairs = read(args.pairs, tokenizer, args.count, 128)
    if args.second:
        pairs = read(
            args.pairs, tokenizer, args.count, 144, but=read(args.pairs, tokenizer, 64, 128)
        )
    if not (args.second or args.again or args.objectives):
        record(args.out, "one step", one_step(model, pairs, args.beta, 1e-3))
    finetune(model, pairs, args.sft_epochs, 1e-3, 0)
    run = lddyn.Run(lr=args.lr, epochs=args.epochs, batch=BATCH)
    diagnosis = lddyn.diagnose(
        model, pairs, "dpo", beta=args.beta, run=run, memory="6GiB", lbk=True
    )
    print(diagnosis.explain(), flush=True)
    sides = [[p[side] for p in pairs] for side in (0, 1)]
    before = torch.stack([measure(model, x).log_prob for x in sides])

    dpo = Loss("dpo", beta=args.beta)

    def trained_on(gone: list[int], weights: Tensor, seed: int) -> Tensor:
        """What DPO without some pairs does to all of them, (2, N) nats."""
        trained, kept = copy.deepcopy(model), [i for i in range(len(pairs)) if i not in gone]
        part = [pairs[i] for i in kept]
        finetune(trained, part, args.epochs, args.lr, seed, dpo, weights[kept], before[:, kept])
        return torch.stack([measure(trained, x).log_prob for x in sides]) - before

    if args.objectives:
        record(args.out, "objectives", objectives(model, pairs, diagnosis, run, args.seeds))
        return
    even = torch.ones(len(pairs)).double()
    by_step = diagnosis.scores["contribution"].argsort(stable=True)[: args.drop].tolist()
    forecast = diagnosis.forecast
    assert forecast is not None

    def ways(seed: int) -> dict[str, tuple[list[int], Tensor]]:
        """Name -> pairs left out, weights of all."""
        generator = torch.Generator().manual_seed(100 + seed)
        random = torch.randperm(len(pairs), generator=generator)[: args.drop].tolist()
        others = diagnosis.pair_weights()[torch.randperm(len(pairs), generator=generator)]
        return {
            "none": ([], even),
            "random": (random, even),
            "worst by a step": (by_step, even),
            "worst by the run": (diagnosis.worst(args.drop), even),
            "reweighted": ([], diagnosis.pair_weights()),
            "reweighted at random": ([], others),
        }

    def expected(gone: list[int], weights: Tensor) -> dict[str, float]:
        """The mean Δ log π(y+) predicted, through the softmax and in a linear model."""
        left = weights.clone()
        left[gone] = 0.0
        linear = diagnosis.simulate(leave_out=gone, pair_weights=weights).change[0]
        return {
            "predicted": float(forecast.weighted(left).mean()),
            "linear": float(linear.mean()),
        }

    def told(change: Tensor) -> dict[str, Any]:
        return {
            "chosen": float(change[0].mean()),
            "rejected": float(change[1].mean()),
            "fall": int((change[0] < 0).sum()),
            "preferred": float((change[0] > change[1]).double().mean()),
        }

    section = "dropped pairs" if args.second else "dropped pairs, tuned on"
    if args.again:  # what is predicted anew, beside what was measured
        result = json.loads(Path(args.out).read_text())[section]["result"]
        if diagnosis.worst(args.drop) != result["worst"]:
            raise SystemExit(f"{args.out} is of another diagnosis: leave out --again")
        result["pair_weights"] = diagnosis.pair_weights().tolist()
        result["explanation"] = diagnosis.explain().splitlines()
        for row in result["runs"]:
            for name, way in ways(row["seed"]).items():
                if name not in row:
                    row[name] = told(trained_on(*way, row["seed"]))
                row[name] |= expected(*way)
                print(row["seed"], name, row[name], flush=True)
        record(args.out, section, result)
        return
    runs, moved = [], torch.zeros(2, len(pairs)).double()
    for seed in range(args.seeds):
        row: dict[str, Any] = {"seed": seed}
        for name, (gone, weights) in ways(seed).items():
            change = trained_on(gone, weights, seed)
            if name == "none":
                moved += change / args.seeds
            row[name] = told(change) | expected(gone, weights)
            print(seed, name, row[name], flush=True)
        runs.append(row)
        mean = moved * args.seeds / len(runs)
        record(
            args.out,
            section,
            {
                "pairs": len(pairs),
                "dropped": args.drop,
                "beta": args.beta,
                "explanation": diagnosis.explain().splitlines(),
                "sft_epochs": args.sft_epochs,
                "epochs": args.epochs,
                "lr": args.lr,
                "log_prob_before": before.mean(1).tolist(),
                "worst": diagnosis.worst(args.drop),
                "worst_by_step": by_step,
                "pair_weights": diagnosis.pair_weights().tolist(),
                "runs": runs,
                "predicted": forecast.change.mean(1).tolist(),
                "linear": diagnosis.simulate().change.mean(1).tolist(),
                "measured": mean.tolist(),
                "correlations": diagnosis.correlations(mean[0]),
            },
        )


if __name__ == "__main__":
    main()
