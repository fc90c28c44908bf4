"""What `lddyn diagnose` prints about pairs whose chosen responses fall: the README's sample.

    python benchmarks/diagnosed.py MODEL PAIRS.jsonl --folder WORK --out benchmarks/results/FILE

The pairs and the SFT are those of `dropped_pairs.py --second`: SFT on the chosen responses, then
the command, in a process of its own, on the model and on the pairs that it would train on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

from pairs import BATCH, arguments, encoded_rows, finetune, load, read
from record import record

FINDING = re.compile(r"[A-Z][\w ]+: ")  # the lines before the tables
COUNT, LONGEST, SFT_EPOCHS, SFT_LR = 48, 144, 3, 1e-3
OPTIONS = f"--forecast --lr 1e-4 --epochs 4 --batch {BATCH} --memory 6GiB".split()


def main() -> None:
    """Command line."""
    args = arguments(__doc__, folder="the model after SFT, the pairs and the report").parse_args()
    model, tokenizer = load(args.model)
    pairs = read(args.pairs, tokenizer, COUNT, LONGEST, but=read(args.pairs, tokenizer, 64, 128))
    wanted = {pair[0].content_id for pair in pairs}
    texts = [
        row
        for row, pair in encoded_rows(args.pairs, tokenizer, LONGEST)
        if pair[0].content_id in wanted
    ][:COUNT]
    finetune(model, pairs, SFT_EPOCHS, SFT_LR, 0)
    tuned, data = args.folder / "SFT", args.folder / "pairs.jsonl"
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    command = [sys.executable, "-m", "lddyn", "diagnose", "--model", str(tuned)]
    command += ["--data", str(data), *OPTIONS, "--out", str(args.folder / "report")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)
    result = {
        "pairs": len(texts),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sft_epochs": SFT_EPOCHS,
        "options": OPTIONS,
        "lines": [line for line in done.stdout.splitlines() if FINDING.match(line)],
    }
    record(args.out, "diagnosed", result)


if __name__ == "__main__":
    main()
