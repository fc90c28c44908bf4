"""How much resident memory an analysis of a real LLM takes beyond the model, against `memory=`.

    python benchmarks/memory.py MODEL --out benchmarks/results/memory.json
    python benchmarks/memory.py MODEL --only decompose --budget 512MiB

Each cell runs in a process of its own, with the allocator as a user has it: it loads the model,
makes one forward pass and a small analysis of another model (imports), gives freed memory back to
the system, and notes resident memory; then it runs the analysis, while the kernel counts the peak.
Afterwards it notes what the allocator kept although it was free, and what is left for good when
the answer is dropped: buffers, tables that are kept, pages of code that ran.
Cells that the results file has from this commit are not run again; the smallest budget comes first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from influence import resident
from record import provenance, record

import lddyn
from lddyn.memory import parse_memory, return_free_memory

BUDGETS = ("512MiB", "1GiB", "4GiB")
SHORT, LONG, PAIRS = 24, 128, 4  # tokens of a prompt, and of a response; pairs
RUN = lddyn.Run(lr=1e-4, epochs=1, batch=4)

Pair = tuple[lddyn.Example, lddyn.Example]


def pairs(vocabulary: int, count: int = PAIRS, length: int = SHORT) -> list[Pair]:
    """Pairs of random tokens, as many in a prompt as in a response."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    made: list[Pair] = []
    for i in range(count):
        prompt = tokens(length)
        one, other = (
            lddyn.Example(prompt, tokens(length), name=f"{side} {i}") for side in ("y+", "y-")
        )
        made.append((one, other))
    return made


def decompose(model: Any, data: list[Pair], memory: str, optimizer: str = "sgd") -> Any:
    """The decomposition of a DPO step on one pair."""
    update = lddyn.DPO(*data[0], beta=0.1)
    return lddyn.decompose(
        model, list(data[0]), update, lr=1e-4, optimizer=optimizer, memory=memory
    )


def decompose_sft(model: Any, data: list[Pair], memory: str, optimizer: str = "sgd") -> Any:
    """The decomposition of a step of SFT on one response."""
    chosen = data[0][0]
    return lddyn.decompose(
        model, chosen, lddyn.SFT(chosen), lr=1e-4, optimizer=optimizer, memory=memory
    )


def verified(model: Any, data: list[Pair], memory: str) -> Any:
    """The same, compared with real steps in float64."""
    return decompose(model, data, memory).verify()


def ntk(model: Any, data: list[Pair], memory: str) -> Any:
    """The Gram of two responses."""
    return lddyn.ntk(model, *data[0], memory=memory).gram()


def features(model: Any, data: list[Pair], memory: str, by: str) -> Any:
    """Features of 2 responses by token, or of all by sequence."""
    examples = [example for pair in data for example in pair]
    count = 2 if by == "token" else len(examples)
    return lddyn.features(model, examples[:count], lddyn.Sketch(k=4096), by=by, memory=memory)


def diagnose(model: Any, data: list[Pair], memory: str, run: lddyn.Run | None) -> Any:
    """The diagnosis of all pairs."""
    return lddyn.diagnose(model, data, memory=memory, run=run)


@dataclass(frozen=True)
class Work:
    """An analysis: the function, whether LoRA trains, the weights' type, and tokens of a prompt."""

    run: Callable[[Any, list[Pair], str], Any]
    lora: bool = False
    dtype: str = "float32"
    length: int = SHORT


WORK = {
    "ntk": Work(ntk),
    "features by token": Work(partial(features, by="token")),
    "features by sequence": Work(partial(features, by="sequence")),
    "decompose": Work(decompose),
    "decompose by Adam": Work(partial(decompose, optimizer="adam")),
    "decompose SFT, bfloat16": Work(decompose_sft, dtype="bfloat16"),
    "decompose SFT by Adam, bfloat16": Work(
        partial(decompose_sft, optimizer="adam"), dtype="bfloat16"
    ),
    "decompose and verify": Work(verified),
    "decompose SFT, long": Work(decompose_sft, length=LONG),
    "diagnose": Work(partial(diagnose, run=None)),
    "diagnose, long": Work(partial(diagnose, run=None), length=LONG),
    "diagnose with a run": Work(partial(diagnose, run=RUN)),
    "decompose, LoRA": Work(decompose, lora=True),
    "decompose and verify, LoRA": Work(verified, lora=True),
    "diagnose, LoRA": Work(partial(diagnose, run=None), lora=True),
    "diagnose with a run, LoRA": Work(partial(diagnose, run=RUN), lora=True),
}


def warm_up(work: Work) -> None:
    """Imports what the analysis imports, on a model of a few kilobytes."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
    )
    work.run(transformers.LlamaForCausalLM(config), pairs(64, 2), "256MiB")


class Stopped(Exception):
    """An analysis took longer than it was given."""


def stop(*_: object) -> None:
    """Ends an analysis by an error inside."""
    raise Stopped


def cell(path: str, name: str, memory: str, threads: int, longest: int) -> dict[str, Any]:
    """Runs one analysis in this process: seconds, and bytes before it and at its peak."""
    import gc
    import signal

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    work = WORK[name]
    warm_up(work)
    dtype = getattr(torch, work.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if work.lora:
        import peft

        targets = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, targets)
    data = pairs(model.config.vocab_size, length=work.length)
    with torch.no_grad():
        model(input_ids=torch.tensor([data[0][0].ids]))
    return_free_memory()  # what is free now shall not hide what the analysis takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, refusal = time.perf_counter(), None
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(longest)
    stopped = False
    try:
        result = work.run(model, data, memory)
    except (ValueError, MemoryError) as error:
        result, refusal = None, f"{type(error).__name__}: {error}"
    except Stopped:
        result, stopped = None, True
    signal.alarm(0)
    seconds, peak, after = time.perf_counter() - start, resident("VmHWM"), resident("VmRSS")
    budget, grown = parse_memory(memory), peak - before
    return_free_memory()
    kept = after - resident("VmRSS")
    del result
    gc.collect()
    return_free_memory()
    return {
        "work": name,
        "memory": memory,
        "budget_bytes": budget,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "largest_bytes": max(p.nbytes for p in model.parameters() if p.requires_grad),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": work.length,
        "before_bytes": before,
        "grown_bytes": grown,
        "grown_over_budget": grown / budget,
        "kept_free_bytes": kept,
        "left_bytes": resident("VmRSS") - before,
        "seconds": seconds,
        "refused": refusal,
        "stopped": stopped,
        **{key: value for key, value in provenance().items() if key in ("commit", "date")},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path(".benchmarks/memory.json"))
    parser.add_argument("--only", action="append", choices=list(WORK), help="some analyses")
    parser.add_argument("--budget", action="append", help="some budgets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--longest", type=int, default=1200, help="seconds of a cell; then stop")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.model, *args.cell, args.threads, args.longest)))
        return
    commit = provenance()["commit"]
    known = json.loads(args.out.read_text())["memory"]["result"] if args.out.exists() else {}
    cells = {(c["work"], c["memory"]): c for c in known.get("cells", [])}
    for memory in args.budget or BUDGETS:
        for name in args.only or WORK:
            if cells.get((name, memory), {}).get("commit") == commit:
                continue
            command = [sys.executable, "-W", "ignore", __file__, args.model]
            command += ["--threads", str(args.threads), "--longest", str(args.longest)]
            command += ["--cell", name, memory]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} at {memory}: {done.stderr[-600:]}", file=sys.stderr)
                continue
            made = json.loads(done.stdout.splitlines()[-1])
            cells[name, memory] = made
            print(
                f"{name:31} {memory:7} grown {made['grown_bytes'] / 2**20:7.0f} MiB "
                f"({made['grown_over_budget']:.2f}x), {made['seconds']:.0f} s "
                f"{made['refused'] or ''}{'stopped' if made['stopped'] else ''}",
                flush=True,
            )
            order = [cells[n, m] for n in WORK for m in BUDGETS if (n, m) in cells]
            sizes = {"tokens": SHORT, "long": LONG, "pairs": PAIRS}
            record(args.out, "memory", {"sizes": sizes, "threads": args.threads, "cells": order})


if __name__ == "__main__":
    main()
