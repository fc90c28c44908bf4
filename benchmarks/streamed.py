"""An influence table of a model on disk whose weights are several times the memory it may take.

    python benchmarks/streamed.py --out benchmarks/results/streaming.json

Writes a random Llama as safetensors shards and computes the same M x L table by `lddyn.ntk` from
the model loaded by transformers, and from `lddyn.stream` within a budget; each way in a process of
its own, in rounds, of which the fastest counts. Memory is the resident set beyond the imports: of
the weights, once every block has been used, and at the peak of the run. "from disk" empties the
page cache of what it reads before each read, as if the file were larger than the machine's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from influence import KEYS, build, resident

SIZES = {"hidden": 1024, "layers": 24, "length": 128, "response": 64, "vocabulary": 8192}
MEMORY = "256MiB"
WAYS = ("in memory", "streamed", "streamed from disk")


def make(folder: str, sizes: dict, shard: str) -> dict:
    """Writes the model; returns its bytes and files."""
    model, _ = build(sizes)
    model.save_pretrained(folder, max_shard_size=shard)
    os.sync()
    files = list(Path(folder).glob("*.safetensors"))
    return {"weight_bytes": sum(f.stat().st_size for f in files), "shards": len(files)}


def empty_page_cache() -> None:
    """From now on, what is read comes from the disk."""
    from lddyn.engine.stream.pieces import Piece

    fill = Piece.fill

    def from_disk(piece, out) -> None:
        with piece.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), piece.offset, piece.size, os.POSIX_FADV_DONTNEED)
        fill(piece, out)

    Piece.fill = from_disk  # type: ignore[method-assign]


def worker(way: str, folder: str, sizes: dict, memory: str, threads: int) -> dict:
    """Runs one way in this process; the table goes into the folder."""
    import transformers
    from safetensors.torch import save_file

    import lddyn

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tiny = {**sizes, "hidden": 64, "layers": 1}
    model, pair = build(tiny)
    examples = [lddyn.Example(prompt_ids=x.prompt, response_ids=x.response) for x in pair]
    lddyn.ntk(model, *examples).gram()  # what the libraries allocate once
    del model

    base = resident("VmRSS")
    start = time.perf_counter()
    if way == "in memory":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    else:
        if way == WAYS[2]:
            empty_page_cache()
        model = lddyn.stream(folder, memory)
    figures = {"seconds_to_open": time.perf_counter() - start}
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    figures["weights_resident_bytes"] = resident("VmRSS") - base

    Path("/proc/self/clear_refs").write_text("5")
    weights = None if way == "in memory" else model.model.layers[0].forward.weights
    before = weights.reads if weights else 0
    start, used = time.perf_counter(), time.process_time()
    table = lddyn.ntk(model, *examples).gram()
    figures |= {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - used,
        "peak_bytes": resident("VmHWM") - base,
    }
    if weights:
        figures |= {
            "slots": weights.slots,
            "slot_bytes": weights.slot_bytes,
            "outside_blocks_bytes": weights.resident_bytes,
            "bytes_read": (weights.reads - before) * weights.slot_bytes,
        }
    save_file({"table": table.contiguous()}, f"{folder}/{way}.table")
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key in KEYS:
        parser.add_argument(f"--{key}", type=int, default=SIZES[key])
    parser.add_argument("--memory", default=MEMORY, help="budget of weights")
    parser.add_argument("--shard", default="300MB", help="largest file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="", help="where to write the model (default: /tmp)")
    parser.add_argument("--out", default="")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {key: getattr(args, key) for key in KEYS}
    if args.worker == "make":
        print(json.dumps(make(args.folder, sizes, args.shard)))
        return
    if args.worker:
        figures = worker(args.worker, args.folder, sizes, args.memory, args.threads)
        print(json.dumps(figures))
        return

    from safetensors.torch import load_file

    from lddyn.memory import parse_memory

    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:

        def run(what: str) -> dict:
            command = [
                sys.executable,
                __file__,
                "--worker",
                what,
                *sys.argv[1:],
                "--folder",
                folder,
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{what} failed with status {done.returncode}")
            figures = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{what:20s} {figures}", flush=True)
            return figures

        made = run("make")
        rounds = [{way: run(way) for way in WAYS} for _ in range(args.rounds)]
        tables = {way: load_file(f"{folder}/{way}.table")["table"] for way in WAYS}
    ways = {
        way: {
            key: (min if "seconds" in key else max)(found[way][key] for found in rounds)
            for key in rounds[0][way]
        }
        for way in WAYS
    }
    own = tables["in memory"]
    for way, figures in ways.items():
        for key in ("seconds", "processor_seconds"):
            figures[f"{key}_over_in_memory"] = figures[key] / ways["in memory"][key]
        figures["largest_difference"] = float((tables[way] - own).abs().max())
        figures["equal"] = torch.equal(tables[way], own)
    budget = parse_memory(args.memory)
    result = {
        "sizes": sizes,
        "threads": args.threads,
        "rounds": args.rounds,
        "budget_bytes": budget,
        "weights_over_budget": made["weight_bytes"] / budget,
        **made,
        "ways": ways,
    }
    if args.out:
        from record import record

        record(args.out, "streaming", result)
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
