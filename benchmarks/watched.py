"""What watching a DPO run costs: the same run with and without the callback, in turn.

python benchmarks/watched.py MODEL PAIRS.jsonl --out benchmarks/results/watched.json
"""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any

import torch
from pairs import arguments, dpo_trainer, encoded_rows, load
from record import record

from lddyn.integrations.trl import watch


def train(name: str, data: list[dict[str, str]], steps: int, watched: bool) -> Any:
    """Seconds of training, the weights, and the callback or None."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_trainer(name, folder, data, max_steps=steps, learning_rate=1e-4)
        callback = watch(trainer) if watched else None
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return seconds, [p.detach() for p in trainer.model.parameters()], callback


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    tokenizer = load(args.model)[1]
    data = [row for row, _ in itertools.islice(encoded_rows(args.pairs, tokenizer, 192), 400)]
    runs: dict[bool, list[float]] = {False: [], True: []}
    kept, callback = [], None
    for watched in (False, True) * args.rounds:
        seconds, weights, watcher = train(args.model, data, args.steps, watched)
        runs[watched].append(seconds)
        kept.append(weights)
        callback = watcher or callback
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
