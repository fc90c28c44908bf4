"""Linear datamodeling score: do scores of pairs order the runs on random halves of a set?

    python benchmarks/lds.py MODEL PAIRS.jsonl --folder WORK --out benchmarks/results/lds.json \
        --python peers=.venv-peers/bin/python --python bergson=.venv-bergson/bin/python

The score τ_ij of pair j for a target i predicts Σ_{j ∈ S} τ_ij for a run of DPO on the subset S.
The model is trained on random halves of the pairs, in several orders of each. The linear
datamodeling score of a target is Spearman's ρ over the halves of the prediction with the measured
log π(y_i) after the run; reported is the mean over targets. Targets are y+ and y− of the pairs, and
y+ of pairs that are never trained on. The interval resamples halves and targets.

Methods that know gradients alone score τ_ij = ⟨g_i, −∇ℓ_j⟩ with their own estimate of the inner
products; "inverted" ones put (K + λ)⁻¹ of the pairs' gradients between, as TRAK does, with the best
λ of a list, which favours them.

Runs that WORK has are not made again.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import BATCH, Pairs, arguments, finetune, load, read
from record import provenance, record
from scipy.stats import rankdata
from torch import Tensor

import lddyn
from lddyn.objectives.loss import Loss
from lddyn.probes.measure import measure

SFT_EPOCHS, SFT_RATE, BETA = 3, 1e-3, 0.1
DAMPING = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # λ / mean squared length of a gradient
PEERS = {
    "bergson, 8 × 8": "bergson",
    "bergson, 45 × 45": "bergson",
    "dattri, LoGra 64": "peers",
    "dattri, LoGra 2025": "peers",
    "TRAK, 2048": "peers",
    "lddyn, two-sided 1920": "",
    "lddyn, two-sided 60000": "",
}


def linear_datamodeling(outcomes: Tensor, members: Tensor, tau: Tensor) -> dict[str, Any]:
    """Mean over targets of ρ over subsets, with a 95 % interval.

    Args:
        outcomes: Measured (subsets, targets).
        members: Which pairs a subset has, 0 or 1 (subsets, N).
        tau: Scores (targets, N).
    """
    predicted = (members @ tau.T).numpy()

    def mean_rho(subsets: Any, targets: Any) -> float:
        a, b = (
            rankdata(x[np.ix_(subsets, targets)], axis=0) for x in (predicted, outcomes.numpy())
        )
        a, b = a - a.mean(0), b - b.mean(0)
        return float(((a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))).mean())

    generator = np.random.default_rng(0)
    count, targets = outcomes.shape
    drawn = [
        mean_rho(generator.integers(count, size=count), generator.integers(targets, size=targets))
        for _ in range(500)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {
        "lds": mean_rho(np.arange(count), np.arange(targets)),
        "low": float(low),
        "high": float(high),
    }


def gradient_scores(gram: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Scores of a Gram of all sequences (y+, y−, held out): as it is, as cosines, and inverted.

    Args:
        gram: Inner products of all sequences with those of the pairs (2N + M, 2N).
        weights: −∂L/∂ log π of y+ and y−, (2, N).
    """
    n = weights.shape[1]
    mix = torch.cat([torch.diag(weights[0]), torch.diag(weights[1])]).to(gram)  # (2N, N)
    mixed = gram @ mix  # ⟨g_i, −∇ℓ_j⟩
    pairs = mix.T @ mixed[: 2 * n]
    # Ranks of a target do not depend on the length of its own gradient.
    scores = {"": mixed, ", cosine": mixed / pairs.diagonal().sqrt()}
    for damping in DAMPING:
        eye = damping * pairs.diagonal().mean() * torch.eye(n).to(pairs)
        scores[f", inverted, λ = {damping:g}"] = torch.linalg.solve(pairs + eye, mixed.T).T
    return scores


def retrained(
    model: Any, pairs: Pairs, held: Pairs, members: Tensor, args: Any, reference: Tensor
) -> Tensor:
    """log π of all targets after a run on each subset, the mean over orders, (subsets, targets)."""
    dpo, outcomes = Loss("dpo", beta=BETA), []
    targets = [[p[0] for p in pairs], [p[1] for p in pairs], [p[0] for p in held]]
    for number, member in enumerate(members):
        kind = f"{args.count}-{args.orders}-{args.epochs}-{args.lr:g}"
        path = args.folder / f"subset-{kind}-{number}.json"
        if not path.exists():
            kept = member.nonzero().flatten().tolist()
            part, values = [pairs[i] for i in kept], []
            for seed in range(args.orders):
                trained = copy.deepcopy(model)
                settings = (args.epochs, args.lr, 1000 * number + seed)
                finetune(trained, part, *settings, dpo, None, reference[:, kept])
                values.append(torch.cat([measure(trained, x).log_prob for x in targets]).tolist())
            path.write_text(json.dumps(values))
            print(f"{number + 1} of {len(members)}", flush=True)
        outcomes.append(torch.tensor(json.loads(path.read_text())).double().mean(0))
    return torch.stack(outcomes)


def peer_gram(method: str, python: str, folder: Path) -> tuple[Tensor, float]:
    """The Gram of a method by its own interpreter, and the bytes that it keeps of a row."""
    script, place = Path(__file__).with_name("peer_methods.py"), folder.resolve()
    command = [python, str(script.resolve()), method, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
    kept = json.loads(done.stdout.strip().splitlines()[-1])["bytes_per_row"]
    return torch.from_numpy(np.load(folder / "gram.npy")), kept


def all_scores(
    model: Any, pairs: Pairs, held: Pairs, args: Any
) -> Iterator[tuple[str, float, Tensor]]:
    """Name, bytes kept of a sequence (0: not said) and scores (targets, N) of every method."""
    run = lddyn.Run(lr=args.lr, epochs=args.epochs, batch=BATCH)
    observe = {f"held out {i}": pair[0] for i, pair in enumerate(held)}
    observe |= {f"y- {i}": pair[1] for i, pair in enumerate(pairs)}
    diagnosis = lddyn.diagnose(
        model, pairs, "dpo", beta=BETA, run=run, memory="6GiB", observe=observe, lbk=False
    )
    forecast = diagnosis.forecast
    assert forecast is not None and forecast.observed_effects is not None
    of_held, of_rejected = forecast.observed_effects.split([len(held), len(pairs)])
    yield "lddyn, run", 0.0, torch.cat([forecast.effects, of_rejected, of_held])
    ches = diagnosis.scores["ches"]
    yield "CHES, the same for all targets", 0.0, -ches.expand(2 * len(pairs) + len(held), -1)
    gram = torch.cat([diagnosis.gram, diagnosis.step.gram.observed[: len(held)]])
    weights = -diagnosis.step.weights_at(diagnosis.log_probs)
    for name, tau in gradient_scores(gram, weights).items():
        yield "gradients, exact" + name, 4.0 * model.num_parameters(), tau
    pythons = {"": sys.executable, **dict(x.split("=", 1) for x in args.python)}
    for method, environment in PEERS.items():
        if environment not in pythons:
            print(f"{method}: no --python {environment}=PATH was given")
            continue
        gram, kept = peer_gram(method, pythons[environment], args.folder)
        for name, tau in gradient_scores(gram[:, : 2 * len(pairs)], weights).items():
            yield method + name, kept, tau


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, folder="runs, the model and the rows")
    parser.add_argument("--count", type=int, default=48, help="pairs")
    parser.add_argument("--held", type=int, default=16, help="pairs whose y+ is only looked at")
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--orders", type=int, default=2, help="runs of each subset")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument(
        "--again", action="store_true", help="lddyn's prediction anew, other methods from FILE"
    )
    parser.add_argument("--python", action="append", default=[], metavar="ENV=PATH")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args.model)
    pairs = read(args.pairs, tokenizer, args.count + args.held, 144)
    pairs, held = pairs[: args.count], pairs[args.count :]
    finetune(model, pairs, SFT_EPOCHS, SFT_RATE, 0)
    model.save_pretrained(args.folder / "model")
    examples = [x for x, _ in pairs] + [y for _, y in pairs] + [x for x, _ in held]
    rows = [[list(e.ids), len(e.prompt_ids)] for e in examples]
    (args.folder / "rows.json").write_text(json.dumps(rows))
    generator = torch.Generator().manual_seed(1)
    members = torch.zeros(args.subsets, args.count).double()
    for member in members:
        member[torch.randperm(args.count, generator=generator)[: args.count // 2]] = 1.0
    sides = [[p[side] for p in pairs] for side in (0, 1)]
    reference = torch.stack([measure(model, x).log_prob for x in sides])
    outcomes = retrained(model, pairs, held, members, args, reference)
    groups = {
        "y+": slice(0, args.count),
        "y−": slice(args.count, 2 * args.count),
        "held out": slice(2 * args.count, None),
    }
    table = []
    every = all_scores(model, pairs, held, args)
    for name, kept, tau in islice(every, 1) if args.again else every:
        row = {
            target: linear_datamodeling(outcomes[:, at], members, tau[at].double())
            for target, at in groups.items()
        }
        commit = provenance()["commit"]
        table.append({"method": name, "bytes": kept, "commit": commit, **row})
        print(name, {k: round(v["lds"], 3) for k, v in row.items()}, flush=True)
    if args.again:
        table += json.loads(Path(args.out).read_text())["halves"]["result"]["rows"][1:]
    settings = {k: getattr(args, k) for k in ("count", "held", "subsets", "orders", "epochs", "lr")}
    record(args.out, "halves", {**settings, "commit": provenance()["commit"], "rows": table})


if __name__ == "__main__":
    main()
