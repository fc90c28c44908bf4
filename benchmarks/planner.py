"""The planner's error of a sketch against the measured one, on a trained model's dialogues.

    python benchmarks/planner.py --model PATH --data probes.jsonl --out FILE

For some numbers of sequences and wanted precisions: the sketch that the plan proposes, the error it
expects (from a few tokens), and ‖Ĝ − G‖_F / ‖G‖_F over all tokens, against the exact table.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from record import record

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.sketches.layout import Layout

SEEDS = 3


def measured(anatomy, examples, layout: Layout, exact: torch.Tensor) -> float:
    """Root mean square over seeds of the relative error of the whole table."""
    squares = []
    for seed in range(1, SEEDS + 1):
        other = Layout(replace(layout.sketch, seed=seed), layout.parts)
        table = lddyn.features(anatomy, examples, layout=other).gram().value
        squares.append(float(((table.double() - exact).norm() / exact.norm()) ** 2))
    return (sum(squares) / SEEDS) ** 0.5


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results/planner.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = (lddyn.encode_row(tokenizer, r, ["chosen"]) for r in lddyn.rows(args.data, limit=60))
    examples = [row["chosen"] for row in rows if row["chosen"].length <= 256]
    anatomy, found = Anatomy(model), []
    for count in (1, 4, 24):
        some = examples[:count]
        exact = lddyn.plan(anatomy, some, memory="8GiB", sketch=lddyn.Sketch()).run().value.double()
        for kind in ("twosided", "lowrank", "tensorsketch"):
            for rtol in (0.3, 0.1, 0.05) if count < 24 else (0.3, 0.1):
                way = lddyn.plan(anatomy, some, rtol=rtol, sketch=lddyn.Sketch(kind))
                candidate = next(c for c in way.candidates if c.method == "features")
                assert candidate.layout is not None
                row = {
                    "sequences": count,
                    "tokens": len(exact),
                    "kind": kind,
                    "rtol": rtol,
                    "k": candidate.layout.sketch.k,
                    "width": candidate.layout.width,
                    "expected": candidate.error,
                    "measured": measured(anatomy, some, candidate.layout, exact),
                }
                found.append(row)
                print(json.dumps(row), flush=True)
    record(args.out, "planner", found)


if __name__ == "__main__":
    main()
