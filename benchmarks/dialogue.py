"""One DPO step of a trained model on a real preference pair: predicted against measured.

    python benchmarks/dialogue.py --model PATH --data probes.jsonl --out results/NAME.json

The data is one JSON object a line: `prompt` and one field per response. Only numbers are recorded.
"""

from __future__ import annotations

import argparse
import time

from record import record

import lddyn

FIELDS = ["chosen", "rejected", "chosen_gptsemantic", "irr_train", "random_permute"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    row = lddyn.rows(args.data, limit=args.row + 1)[args.row]
    examples = lddyn.encode_row(tokenizer, row, FIELDS)
    update = lddyn.DPO(examples["chosen"], examples["rejected"], beta=0.1)
    result = {"row": args.row, "lr": args.lr, "parameters": model.num_parameters(), "steps": []}
    for optimizer, rule in (("sgd", "start"), ("sgd", "midpoint"), ("adamw", "midpoint")):
        lr = args.lr if optimizer == "sgd" else args.lr / 10
        start = time.perf_counter()
        dec = lddyn.decompose(
            model, {f: examples[f] for f in FIELDS}, update, lr=lr, optimizer=optimizer, rule=rule
        )
        seconds = time.perf_counter() - start
        check = dec.verify([lr * 2.0**-k for k in range(5)])
        sizes = [len(o.token_ids) for o in dec]
        measured = [float(part.sum()) for part in check.measured[0].split(sizes)]
        result["steps"].append(
            {
                "optimizer": optimizer,
                "rule": rule,
                "lr": lr,
                "seconds": seconds,
                "slope": check.slope,
                "expected": check.expected,
                "relative_error": check.relative_error,
                "responses": [
                    {
                        "name": o.name,
                        "tokens": size,
                        "logp": float(o.logp.sum()),
                        "predicted": float(o.delta_logp.sum()),
                        "measured": value,
                        **{k: float(v.sum()) for k, v in o.by_sequence().items()},
                    }
                    for o, size, value in zip(dec, sizes, measured, strict=True)
                ],
            }
        )
        print(dec, check, f"{seconds:.1f} s", sep="\n")
    record(args.out, "dialogue", result)


if __name__ == "__main__":
    main()
