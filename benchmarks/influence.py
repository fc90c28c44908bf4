"""Exact M x L influence tables: lddyn against the other ways to get one (`opponents.py`).

    python benchmarks/influence.py --preset d512 --out benchmarks/results/NAME.json
    python benchmarks/influence.py --all --out …       # every preset, both tasks: 35 minutes
    python benchmarks/influence.py --scaling --out …     # against L, T, V, depth

Every method runs in a process of its own, on the same model, sequences and threads; its peak memory
is the growth of the resident set over the loaded model. The result of each is compared with that of
the hand-written engine in float64. With --self one sequence is on both sides: what libraries that
give the Gram of a batch with itself can do. --peers names another Python, for the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from opponents import METHODS as OPPONENTS
from opponents import Tokens

KEYS = ("hidden", "layers", "length", "response", "vocabulary")
PRESETS = {  # sizes, and seconds an opponent may take
    "toy": ((64, 2, 32, 16, 512), 60),
    "small": ((256, 4, 64, 32, 8192), 60),
    "d512": ((512, 6, 128, 64, 16384), 180),
    "d768": ((768, 6, 256, 128, 32768), 150),
    "t512": ((256, 4, 512, 32, 8192), 120),
}
ALL = (
    ("toy", False),
    ("small", False),
    ("small", True),
    ("t512", False),
    ("d512", False),
    ("d512", True),
    ("d768", False),
)
OWN = {
    "lddyn": "factors of both sides, paired block by block",
    "lddyn, pushed": "factored NTK-vector product: also gives every vocabulary token",
}
OWN_TIMEOUT = 600
TRUTH = "hand-written Llama in float64"
ENOUGH = 20  # seconds of repeats after which no other is begun


def intermediate(hidden: int) -> int:
    """Width of the MLP."""
    return int(hidden * 8 / 3) // 16 * 16


def build(sizes: dict, attention: str = "eager"):
    """A random Llama of these sizes and two sequences."""
    import transformers

    torch.manual_seed(0)
    hidden = sizes["hidden"]
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=hidden,
        num_hidden_layers=sizes["layers"],
        intermediate_size=intermediate(hidden),
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=max(256, sizes["length"]),
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(sizes["vocabulary"], (2, sizes["length"]), generator=generator).tolist()
    split = sizes["length"] - sizes["response"]
    return model, [Tokens(i[:split], i[split:]) for i in ids]


def least_bytes(sizes: dict, own: bool = False) -> int:
    """What the algorithm must hold beyond the model: its inputs, and one block's factors.

    Inputs: the stored inputs of the blocks, logits and cotangents (M + L, V), states (M + L, T, d).
    Factors: (M + L) T Σ d_out of a block's weights. float32; `own`: one sequence on both sides.
    """
    hidden, layers, length, response, vocabulary = (sizes[k] for k in KEYS)
    sides = 1 if own else 2
    rows = sides * response
    inputs = sides * (layers + 1) * length * hidden
    inputs += 2 * rows * vocabulary + rows * length * hidden
    widths = 5 * hidden + 2 * intermediate(hidden)  # q, k, v, o, down; gate, up
    return 4 * (inputs + rows * length * widths)


def gemm_rate(hidden: int, product=torch.matmul) -> float:
    """FLOP/s of a product like the pullback's: 2048 rows through an MLP weight, float32."""
    a, b = torch.randn(2048, hidden), torch.randn(intermediate(hidden), hidden)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        product(a, b.T)
        best = max(best, 2 * a.shape[0] * b.numel() / (time.perf_counter() - start))
    return best


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]


def lddyn_run(model, pair: list[Tokens], method: str):
    """lddyn's table as a function of nothing, and the FLOPs of its plan."""
    import lddyn
    from lddyn.engine.gram import Side
    from lddyn.sketches.costs import gram_cost

    made = {id(x): lddyn.Example(prompt_ids=x.prompt, response_ids=x.response) for x in pair}
    one, other = (made[id(x)] for x in pair)
    anatomy = lddyn.Anatomy(model)
    sides = {id(x): Side.log_probs(anatomy.trace(x)) for x in made.values()}
    flops = gram_cost([sides[id(one)]], [sides[id(other)]]).flops
    how = "pushed" if method.endswith("pushed") else "paired"
    return (lambda: lddyn.ntk(model, one, other).gram(method=how)), flops


def limit_memory() -> None:
    """An allocation beyond what the machine has fails here, and does not end another process."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    size = resident("VmSize") + int(0.92 * free * 1024)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def worker(method: str, sizes: dict, own: bool, threads: int, repeats: int, path: str) -> None:
    """Runs one method in this process and writes its figures and its table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    figures: dict = {}
    opponent = OPPONENTS.get(method.removesuffix(" in float64"))
    if opponent and opponent.missing:
        Path(path).write_text(json.dumps({"error": "not installed"}))
        return
    model, pair = build(sizes, opponent.attention if opponent else "eager")
    pair = [pair[0], pair[0]] if own else pair
    if method == TRUTH:
        model.double()
    if not opponent:
        ours, figures["planned_flops"] = lddyn_run(model, pair, method)

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    limit_memory()
    seconds, rates, table = [], [gemm_rate(sizes["hidden"])], None
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        if seconds and opponent and opponent.needs:  # libraries leave hooks in the model
            model = build(sizes, opponent.attention)[0]
        start = time.perf_counter()
        table = opponent.run(model, *pair) if opponent else ours()
        seconds.append(time.perf_counter() - start)
        rates.append(gemm_rate(sizes["hidden"]))
    figures |= {
        "seconds": min(seconds),
        "peak_bytes": resident("VmHWM") - before,
        "gemm_flops_per_second": max(rates),
        "covers": opponent.covers if opponent else "all",
    }
    if not opponent:
        from lddyn.ops import product

        figures["product_flops_per_second"] = gemm_rate(sizes["hidden"], product)
    assert table is not None
    from safetensors.torch import save_file

    save_file({"table": table.detach().float().contiguous()}, path + ".safetensors")
    Path(path).write_text(json.dumps(figures))


def measure(
    method: str,
    sizes: dict,
    *,
    own: bool,
    threads: int,
    repeats: int,
    timeout: float,
    python: str = sys.executable,
) -> dict:
    """Runs a worker process; returns its figures, or the error it died of."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/result.json"
        command = [
            python,
            __file__,
            "--worker",
            method,
            "--threads",
            str(threads),
            "--repeats",
            str(repeats),
            "--worker-out",
            path,
            *(["--self"] if own else []),
            *[str(x) for k, v in sizes.items() for x in (f"--{k}", v)],
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:.0f} s"}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
            short = "DefaultCPUAllocator" in done.stderr or "MemoryError" in done.stderr
            return {"error": "out of memory" if short else lines[-1][:200]}
        figures = json.loads(Path(path).read_text())
        if "error" not in figures:
            figures["table"] = load_file(path + ".safetensors")["table"]
        return figures


def compare(
    sizes: dict,
    *,
    own: bool,
    threads: int,
    repeats: int,
    timeout: float,
    peers: str,
    methods: list[str],
) -> dict:
    """All methods, or some, on one problem; ratios are to lddyn."""
    rows: dict[str, dict] = {}
    for method in (*OWN, *OPPONENTS):
        opponent = OPPONENTS.get(method)
        if opponent and ((opponent.self_only and not own) or (methods and method not in methods)):
            continue
        long = not opponent or method.startswith("hand-written")
        rows[method] = measure(
            method,
            sizes,
            own=own,
            threads=threads,
            repeats=repeats,
            timeout=OWN_TIMEOUT if long else timeout,
            python=peers if opponent and opponent.needs else sys.executable,
        )
        shown = {k: v for k, v in rows[method].items() if k != "table"}
        print(f"{method:28s} {shown}", flush=True)
    best = rows["lddyn"]
    if "error" in best:
        raise RuntimeError(f"lddyn failed: {best['error']}")
    # Shares no code with lddyn, and fits where Jacobians do not; `bench_opponents.py` holds it to
    # the textbook's in float64.
    exact = measure(TRUTH, sizes, own=own, threads=threads, repeats=1, timeout=OWN_TIMEOUT)
    if "error" in exact:
        raise RuntimeError(f"no truth: {exact['error']}")
    truth = exact["table"]
    for row in rows.values():
        table = row.pop("table", None)
        if table is not None:
            row["relative_difference"] = float((table - truth).norm() / truth.norm())
            row["times_lddyn"] = row["seconds"] / best["seconds"]
            row["memory_over_lddyn"] = row["peak_bytes"] / best["peak_bytes"]
    planned = best["planned_flops"] / best["gemm_flops_per_second"]
    return {
        "sizes": sizes,
        "self": own,
        "threads": threads,
        "methods": rows,
        "truth": TRUTH,
        "planned_seconds": planned,
        "over_plan": best["seconds"] / planned,
        "least_bytes": least_bytes(sizes, own),
        "over_least_bytes": best["peak_bytes"] / least_bytes(sizes, own),
    }


def scaling(threads: int, timeout: float) -> list[dict]:
    """Time and peak memory of lddyn as one size at a time changes."""
    base = {"hidden": 256, "layers": 4, "length": 128, "response": 32, "vocabulary": 8192}
    sweep = {
        "response": [8, 16, 32, 64, 96],
        "length": [64, 128, 256, 512],
        "vocabulary": [2048, 8192, 32768, 131072],
        "layers": [2, 4, 8, 16],
    }
    points = []
    for key, values in sweep.items():
        for value in values:
            sizes = {**base, key: value}
            row = measure("lddyn", sizes, own=False, threads=threads, repeats=2, timeout=timeout)
            row.pop("table", None)
            points.append({"varied": key, "value": value, **row})
            print(points[-1], flush=True)
    return points


def section(preset: str, own: bool) -> str:
    """Name in the results file; the README shows "influence"."""
    name = "influence" if preset == "d512" else f"influence-{preset}"
    return f"{name}-self" if own else name


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="d512")
    for key in KEYS:
        parser.add_argument(f"--{key}", type=int, help="instead of the preset's")
    parser.add_argument("--methods", nargs="*", default=[], help="of the opponents, only these")
    parser.add_argument("--self", action="store_true", help="one sequence on both sides")
    parser.add_argument("--all", action="store_true", help="every preset, both tasks")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, help="seconds an opponent may take")
    parser.add_argument(
        "--peers",
        default=os.environ.get("LDDYN_PEERS", sys.executable),
        metavar="PYTHON",
        help="interpreter that has torchjd, opacus and dattri-llm (default: this one)",
    )
    parser.add_argument("--out", default="")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    own, given = args.self, {k: getattr(args, k) for k in KEYS}

    def sizes_of(preset: str) -> dict:
        defaults = dict(zip(KEYS, PRESETS[preset][0], strict=True))
        return {k: given[k] or defaults[k] for k in KEYS}

    def save(name: str, result) -> None:
        if args.out:
            from record import record

            record(args.out, name, result)
        else:
            print(json.dumps({name: result}, indent=1))

    if args.worker:
        sizes = sizes_of(args.preset)
        worker(args.worker, sizes, own, args.threads, args.repeats, args.worker_out)
    elif args.scaling:
        save("scaling", scaling(args.threads, args.timeout or OWN_TIMEOUT))
    else:
        start = time.perf_counter()
        for preset, both in ALL if args.all else ((args.preset, own),):
            print(f"-- {section(preset, both)}", flush=True)
            result = compare(
                sizes_of(preset),
                own=both,
                threads=args.threads,
                peers=args.peers,
                repeats=args.repeats,
                timeout=args.timeout or PRESETS[preset][1],
                methods=args.methods,
            )
            save(section(preset, both), result)
            print(f"   {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
