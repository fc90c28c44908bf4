"""A user's way: TRL's DPO on their pairs, watched; `lddyn diagnose`; DPO on the pairs it keeps.

    python benchmarks/dropped_trl.py MODEL PAIRS.jsonl --folder FOLDER --out FILE.json

SFT by TRL's SFTTrainer, the command `lddyn diagnose`, then `lddyn filter --drop N`, then DPOTrainer
at its defaults with all pairs, with the kept ones, and with as many less at random, in several
orders. Measured by `watch(trainer, …)` on all pairs, trained on or not; the rows from --skip on are
taken, which no other benchmark reads. FOLDER keeps models, rows, report and runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from pairs import QUIET, arguments, dpo_trainer, encoded_rows, load
from record import record

import lddyn
from lddyn.data.read import rows
from lddyn.integrations.trl import watch


def supervised(model: str, folder: Path, data: list[dict[str, str]], epochs: int) -> None:
    """SFT on the chosen responses."""
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(folder),
            num_train_epochs=epochs,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            **QUIET,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"]} for row in data]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_model(str(folder))


def preferred(
    start: Path,
    folder: Path,
    data: list[dict[str, str]],
    probes: dict[str, list[lddyn.Example]],
    seed: int,
    args: argparse.Namespace,
) -> dict[str, float]:
    """DPO, watched; what it did to the probes, mean nats, and to how many of them."""
    trainer = dpo_trainer(
        start,
        folder,
        data,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        beta=args.beta,
        seed=seed,
        data_seed=seed,
    )
    # The last pass must be made: a run of seconds has no time to spare.
    watched = watch(trainer, probes, every=10**6, budget="10000%")
    trainer.train()
    row = watched.rows[-1]
    assert row["step"] == trainer.state.global_step
    lines = (folder / "lddyn" / "dynamics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line)["each"] for line in lines]
    moved = torch.tensor(kept[-1]).double() - torch.tensor(kept[0]).double()
    return {
        "chosen": row["change/chosen"],
        "rejected": row["change/rejected"],
        "fall": int((moved[: len(probes["chosen"])] < 0).sum()),
    }


def _lddyn(*words: object) -> bytes:
    """What a command of lddyn prints."""
    command = [sys.executable, "-m", "lddyn", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, folder="keeps models, rows, report and runs")
    parser.add_argument("--skip", type=int, default=250)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--drop", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4, help="at its start; falls to 0")
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    start = args.folder / "sft"
    tokenizer = load(args.model)[1]
    short = encoded_rows(args.pairs, tokenizer, 144, args.skip)
    data = [row for row, _ in itertools.islice(short, args.count)]
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    if not start.exists():
        transformers.set_seed(0)
        supervised(args.model, start, data, 3)
    command = [
        "diagnose",
        "--model",
        start,
        "--data",
        file,
        "--beta",
        args.beta,
        "--forecast",
        "--lr",
        args.lr,
        "--epochs",
        args.epochs,
        "--schedule",
        "linear",
        "--out",
        args.folder / "report",
        "--memory",
        "6GiB",
        "--json",
    ]
    told = json.loads(_lddyn(*command))
    print("\n".join(told["explanation"]), flush=True)
    _lddyn("filter", args.folder / "report", "--drop", args.drop, "--out", args.folder / "filtered")
    kept = list(rows(args.folder / "filtered" / "kept.jsonl"))
    encoded = [lddyn.encode_row(tokenizer, row) for row in data]
    probes = {side: [pair[side] for pair in encoded] for side in ("chosen", "rejected")}
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        some = random.Random(seed).sample(range(len(data)), len(kept))
        ways = {"none": data, "random": [data[i] for i in sorted(some)], "named": kept}
        runs.append({"seed": seed})
        for name, part in ways.items():
            folder = args.folder / f"{name}-{seed}"
            runs[-1][name] = preferred(start, folder, part, probes, seed, args)
            print(seed, name, runs[-1][name], flush=True)
        record(
            args.out,
            "dropped pairs, TRL",
            {
                "pairs": len(data),
                "dropped": len(data) - len(kept),
                "epochs": args.epochs,
                "lr": args.lr,
                "beta": args.beta,
                "trl": trl.__version__,
                "explanation": told["explanation"],
                "runs": runs,
            },
        )


if __name__ == "__main__":
    main()
