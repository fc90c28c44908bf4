"""What watching a DPO run costs: the same run with and without the callback, in turn.

python benchmarks/watched.py MODEL PAIRS.jsonl --out benchmarks/results/watched.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from record import record

from lddyn.data.read import rows
from lddyn.data.rows import encode_row
from lddyn.integrations.trl import watch


def train(name: str, data: list[dict[str, str]], tokenizer: Any, steps: int, watched: bool) -> Any:
    """Seconds of training, the weights, and the callback or None."""
    transformers.set_seed(0)
    model, reference = (transformers.AutoModelForCausalLM.from_pretrained(name) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model,
            reference,
            trl.DPOConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                learning_rate=1e-4,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        callback = watch(trainer) if watched else None
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return seconds, [p.detach() for p in model.parameters()], callback


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    data = []
    for row in rows(args.pairs, limit=400):
        pair = {k: row[k] for k in ("prompt", "chosen", "rejected")}
        try:
            longest = max(e.length for e in encode_row(tokenizer, pair).values())
        except ValueError:  # an empty response
            continue
        if longest <= 192:
            data.append(pair)
    runs: dict[bool, list[float]] = {False: [], True: []}
    kept, callback = [], None
    for watched in (False, True) * args.rounds:
        seconds, weights, found = train(args.model, data, tokenizer, args.steps, watched)
        runs[watched].append(seconds)
        kept.append(weights)
        callback = found or callback
        print("watched" if watched else "alone", f"{seconds:.1f} s", flush=True)
    assert callback is not None
    equal = all(
        torch.equal(a, b) for other in kept[1:] for a, b in zip(kept[0], other, strict=True)
    )
    record(
        args.out,
        "watched",
        {
            "steps": args.steps,
            "pairs": len(data),
            "alone_seconds": runs[False],
            "watched_seconds": runs[True],
            "ratio": min(runs[True]) / min(runs[False]),
            "passes": len(callback.rows),
            "budget": callback.budget,
            "reported": callback.overhead,
            "weights_equal_to_the_bit": equal,
        },
    )


if __name__ == "__main__":
    main()
