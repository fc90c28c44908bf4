"""What a machine with a CUDA GPU can say about lddyn, in under ten minutes: `make gpu-check`.

    python3 benchmarks/gpu_check.py              # build, test, sanitize, measure, record
    python3 benchmarks/gpu_check.py --dry-run    # the plan alone

Builds into build/gpu-check for the GPU found, and runs from there: no virtual environment, nothing
installed, no network. Every step is a process with a time limit; a step that fails or cannot run
is said so in the table at the end, and the exit status is the number of failures. Figures go to
benchmarks/results/GPU.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu-check"
LIMIT = 585  # seconds for all steps
PYTHON = [sys.executable, "-P"]  # the package comes from BUILD, not from the working folder
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENGINES = {  # hidden, layers, intermediate, heads, key heads, vocabulary, tied
    "0.5B": (896, 24, 4864, 14, 2, 151_936, True),
    "7B": (4096, 32, 11_008, 32, 32, 32_000, False),
    "small": (32, 2, 48, 4, 2, 64, False),
}
# What differs for a device: norms, gates, windows, soft-capping, experts, ALiBi, packed weights.
ARCHITECTURES = ["llama", "gpt2", "gemma2", "mixtral", "falcon", "opt", "gpt_oss", "bloom"]

# --------------------------------------------------------------------------- plan


@dataclass
class Step:
    """A command, its time limit in seconds, and why it cannot run here (empty if it can)."""

    name: str
    command: list[str]
    seconds: int
    refusal: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def has(module: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(module) is not None


# Tests of the ops on a GPU; the other files of tests/ops are about the CPU's backends.
OP_TESTS = ("test_ops", "test_gram_lengths", "test_residual_gram", "test_*_ops")


def op_tests() -> list[Path]:
    """The files of OP_TESTS, sorted."""
    files = [p for pattern in OP_TESTS for p in (ROOT / "tests" / "ops").glob(f"{pattern}.py")]
    return sorted(files)


def test_step(small: bool) -> Step:
    """Runs the tests of the ops; files whose packages are not installed are left out."""
    optional = re.compile(r"^(?:from|import) (hypothesis|peft|transformers)\b", re.MULTILINE)
    lacking = [
        p for p in op_tests() if not all(has(name) for name in optional.findall(p.read_text()))
    ]
    if lacking:
        names = ", ".join(p.name for p in lacking)
        print(f"SKIPPED because packages are missing: {names}", flush=True)
    command = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(min(8, os.cpu_count() or 1))] if has("xdist") else []
    command += [str(p) for p in op_tests() if p not in lacking]
    command += ["-k", "choose"] if small else []
    refusal = "" if has("pytest") else "pytest is not installed"
    return Step("tests", command, 180, refusal, {"OMP_NUM_THREADS": "1"})


def plan(device: str, capability: str, small: bool, out: str) -> list[Step]:
    """Every step, in order."""
    me = [*PYTHON, str(Path(__file__)), "--device", device, "--out", out]
    me += ["--small"] if small else []
    cuda = {"LDDYN_CUDA": "1" if device == "cuda" else "0", "LDDYN_CUDA_ARCHS": capability}
    library = ["--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")]
    build = [sys.executable, "setup.py", "-q", "build", *library]
    sanitizer = shutil.which("compute-sanitizer") or ""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = sanitizer or shutil.which("compute-sanitizer", path=f"{home}/bin") or ""
    why = "" if sanitizer else "compute-sanitizer is not installed"
    why = why if device == "cuda" else "compute-sanitizer needs a GPU"
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", build, 240, "", cuda),
        Step("self-test", [*PYTHON, "-m", "lddyn", "env", "--selftest"], 90),
        Step("ops", [*me, "--worker", "ops"], 120),
        *(
            Step(f"engine {name}", [*me, "--worker", f"engine {name}"], 100)
            for name in (("small",) if small else ("0.5B", "7B"))
        ),
        Step("exactness", [*me, "--worker", "exactness"], 90),
        test_step(small),
        *(
            Step(
                tool,
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *me, "--worker", "probe"],
                90,
                why,
                uncached,
            )
            for tool in TOOLS
        ),
    ]


def run(steps: list[Step], limit: float = LIMIT) -> int:
    """Runs the steps; prints a table; returns the number of failures."""
    deadline, rows, failures = time.monotonic() + limit, [], 0
    for step in steps:
        start = time.monotonic()
        if step.refusal:
            verdict = f"SKIPPED: {step.refusal}"
        elif rows and rows[0][1] != "ok":
            verdict = "NOT RUN: the build failed"
        elif deadline - start < 5:
            verdict = "NOT RUN: no time is left"
        else:
            print(f"\n== {step.name}: {' '.join(step.command)}", flush=True)
            paths = filter(None, (str(BUILD), os.environ.get("PYTHONPATH")))
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | step.environment
            limit = min(step.seconds, deadline - start)
            try:
                done = subprocess.run(step.command, cwd=ROOT, env=environment, timeout=limit)
                verdict = "ok" if done.returncode == 0 else f"FAILED (exit {done.returncode})"
            except subprocess.TimeoutExpired:
                verdict = f"FAILED: not done in {limit:.0f} s"
        failures += not verdict.startswith(("ok", "SKIPPED"))
        rows.append((step.name, verdict, time.monotonic() - start))
    print("\n== summary")
    for name, verdict, seconds in rows:
        print(f"{name:14} {seconds:6.1f} s  {verdict}")
    return failures


# --------------------------------------------------------------------------- measuring


class Stopwatch:
    """Times calls on a device, and its ceilings: products in bfloat16 and copies."""

    def __init__(self, device: str, small: bool):
        import torch

        self.device, self.small = device, small
        n = 256 if small else 8192
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        self.flops = 2 * n**3 / self.seconds(lambda: a @ b)
        x = torch.randn(n * n * 4, device=device)
        y = torch.empty_like(x)
        self.bytes = 8 * x.numel() / self.seconds(lambda: y.copy_(x))

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of the calls that fit a third of a second, three or more, after two to warm up."""
        import torch

        cuda, budget = self.device == "cuda", 0.02 if self.small else 0.3
        times: list[float] = []
        begin = 0.0
        for i in range(2 + 200):
            if i == 2:
                begin = time.monotonic()
            if cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                call()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last) / 1e3)
            else:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            if i >= 4 and time.monotonic() - begin > budget:
                break
        return statistics.median(times[2:])

    def device_seconds(self, call: Callable[[], Any], calls: int = 5) -> float | None:
        """Median of a call replayed as a graph, without Python's launches; None if it fails."""
        import torch

        if self.device != "cuda":
            return None
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    call()
            return self.seconds(graph.replay) / calls
        except RuntimeError as error:
            print(f"not timed as a graph: {error}", flush=True)
            return None

    def row(self, call: Callable[[], Any], graph: bool = True, **work: float) -> dict[str, Any]:
        """Seconds of a call, and its share of a ceiling: row(call, flops=…), row(call, bytes=…).

        The share is that of the device's own time where the call can be replayed as a graph.
        """
        seconds = self.seconds(call)
        found: dict[str, Any] = {"seconds": seconds}
        device = self.device_seconds(call) if graph else None
        if device is not None:
            found["device_seconds"] = seconds = device
        for kind, amount in work.items():
            share = 100 * amount / seconds / getattr(self, kind)
            found |= {kind: amount, f"percent_of_{kind}_ceiling": round(share, 1)}
        return found


def on_backends(op: str, args: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """The op on every backend that can run these operands; the interpreter is no opponent."""
    import lddyn
    from lddyn import ops

    def call(backend: str) -> Any:
        with lddyn.backend(backend):
            return getattr(ops, op)(*args)

    x = args[0]
    return {
        backend: lambda backend=backend: call(backend)  # type: ignore[misc]
        for backend in ops.BACKENDS
        if not ops.OPS[op].refusal(backend, x.device, x.dtype)
        and not (backend == "triton" and x.device.type == "cpu")
    }


def distance(x: Any, y: Any) -> float:
    """Relative, in the norm."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def measure_gram(watch: Stopwatch) -> dict[str, Any]:
    """Against a chain of dense products (cuBLAS), with and without causal lengths."""
    import torch

    def chain(a_o: Any, g_o: Any, a_u: Any, g_u: Any, *lengths: Any) -> Any:
        pushed = torch.matmul(a_u @ a_o.T, g_o)
        return pushed.flatten(1) @ g_u.flatten(1).T

    sizes = [(512, 128, 896, 896), (512, 128, 896, 4864), (512, 128, 4864, 896)]
    sizes += [(512, 16, 896, 4864), (512, 128, 4096, 4096), (512, 128, 900, 897)]
    found = {}
    for s, m, d_in, d_out in [(8, 3, 5, 7)] if watch.small else sizes:
        shapes = ((s, d_in), (m, s, d_out), (s, d_in), (m, s, d_out))
        args = [torch.randn(x, device=watch.device).bfloat16() for x in shapes]
        lengths = torch.linspace(1, s, m, device=watch.device).long()
        beyond = torch.arange(s, device=watch.device) >= lengths[:, None]
        causal = [x.masked_fill(beyond[..., None], 0) if x.ndim == 3 else x for x in args]
        whole = 2 * (s * s * d_in + m * s * d_out * (s + m))
        total = int(lengths.sum())
        needed = 2 * (s * s * d_in + total * s * d_out + m * total * d_out)
        for kind, operands, flops in (
            ("dense", (*args,), whole),
            ("causal", (*causal, lengths, lengths), needed),
        ):
            truth = chain(*(x.float() for x in operands))
            ways = on_backends("gram", operands) | {"cuBLAS chain": lambda x=operands: chain(*x)}
            found[f"S={s} M={m} d_in={d_in} d_out={d_out} {kind}"] = {
                name: watch.row(call, flops=flops) | {"error": distance(call(), truth)}
                for name, call in ways.items()
            }
    return found


def measure_residual(watch: Stopwatch) -> dict[str, Any]:
    """Traffic: logits read once, residuals written once."""
    import torch

    found = {}
    for n, v in [(3, 100)] if watch.small else [(128, 32_000), (128, 151_936)]:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(n, v, device=watch.device).to(dtype)
            targets = torch.randint(0, v, (n,), device=watch.device)
            traffic = n * v * (logits.element_size() + 4)
            found[f"N={n} V={v} {dtype}"] = {
                name: watch.row(call, bytes=traffic)
                for name, call in on_backends("residual", (logits, targets)).items()
            }
    return found


def measure_sketch(watch: Stopwatch) -> dict[str, Any]:
    """Traffic: the cotangents, read once."""
    import torch

    found = {}
    for c, t, d in [(2, 5, 7)] if watch.small else [(64, 512, 896), (64, 512, 4096)]:
        activations = torch.randn(t, d, device=watch.device).bfloat16()
        grads = torch.randn(c, t, d, device=watch.device).bfloat16()
        args = (activations, grads, 16, 16, 4, 0)
        found[f"C={c} T={t} d={d} 4 of 16x16"] = {
            name: watch.row(call, bytes=2 * (grads.numel() + activations.numel()))
            for name, call in on_backends("sketch", args).items()
        }
    return found


def measure_attention(watch: Stopwatch) -> dict[str, Any]:
    """Many cotangents at once against a loop of backward passes through torch's fused attention."""
    import torch

    c, t, heads, groups, e = (3, 5, 4, 2, 8) if watch.small else (64, 1024, 14, 2, 64)
    make = {"device": watch.device, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(h, t, e, **make) for h in (heads, groups, groups))
    grads = torch.randn(c, heads, t, e, **make)
    mask = torch.full((1, t, t), -3e4, **make).triu(1)
    args = (q, k, v, mask, grads, 1 / math.sqrt(e), 0.0)

    leaves = [x[None].clone().requires_grad_() for x in (q, k, v)]

    def loop() -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(*leaves, is_causal=True, enable_gqa=True)
        rows = [torch.autograd.grad(out, leaves, g[None], retain_graph=True) for g in grads]
        return [torch.cat(x) for x in zip(*rows, strict=True)]

    flops = 8 * c * heads * t * t * e / 2
    ways = on_backends("attention_pullback", args) | {"SDPA, one by one": loop}
    expected = loop()[0]
    found = {}
    for name, call in ways.items():
        found[name] = watch.row(call, graph=name != "SDPA, one by one", flops=flops) | {
            "difference": distance(call()[0], expected)
        }
    return {f"C={c} T={t} H={heads} G={groups} e={e}": found}


def measure_engine(watch: Stopwatch, name: str) -> dict[str, Any]:
    """Seconds of an M x L influence table of a random Llama, and its share of the ceiling."""
    import torch
    import transformers

    import lddyn
    from lddyn.engine.gram import Side
    from lddyn.sketches.costs import gram_cost

    hidden, layers, intermediate, heads, groups, vocabulary, tied = ENGINES[name]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(watch.device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    length, response = (12, 4) if watch.small else (512, 128)
    ids = torch.randint(vocabulary, (2, length)).tolist()
    one, other = (
        lddyn.Example(prompt_ids=x[: length - response], response_ids=x[length - response :])
        for x in ids
    )
    anatomy = lddyn.Anatomy(model)
    cost = gram_cost(*([Side.log_probs(anatomy.trace(x))] for x in (one, other)))
    seconds = []
    for _ in range(3):  # the first one compiles
        start = time.perf_counter()
        table = lddyn.ntk(anatomy, one, other).gram()
        finite = bool(table.isfinite().all())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    assert finite, "the table has a NaN or an infinity"
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "M": response,
        "L": response,
        "T": length,
        "dtype": "bfloat16",
        "seconds": min(seconds[1:]),
        "seconds_of_the_first": seconds[0],
        "flops": cost.flops,
        "percent_of_flops_ceiling": round(100 * cost.flops / min(seconds[1:]) / watch.flops, 1),
    }
    if watch.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def measure_exactness(names: list[str], device: str) -> dict[str, Any]:
    """The engine on the device against itself in float64 on the CPU, for tiny architectures.

    Errors are normalised as in benchmarks/truth.py: influence by the norms of the gradients, the
    shift by its largest value. `same_bits` says whether features are equal when made twice.
    """
    import copy
    import tempfile

    import torch

    import lddyn

    sys.path.insert(0, str(ROOT / "tests"))
    import zoo

    def table(model: Any) -> tuple[Any, Any, Any]:
        pair = zoo.examples()
        step = lddyn.decompose(model, pair[0], lddyn.SFT(pair[1], reduction="sum"), lr=1.0)[0]
        norms = [lddyn.ntk(model, x, x).gram().diagonal().double().sqrt().cpu() for x in pair]
        return (
            step.influence.double().cpu(),
            step.delta_log_probs().double().cpu(),
            norms[0][:, None] * norms[1],
        )

    found: dict[str, Any] = {}
    sketch = lddyn.Sketch(k=4096, seed=3)
    for name in names:
        model = zoo.build(name).eval()
        with lddyn.true_float64():
            influence, shift, norms = table(copy.deepcopy(model).double())
        row: dict[str, Any] = {}
        for dtype in (torch.float32, torch.bfloat16):
            there = copy.deepcopy(model).to(device, dtype)
            got = table(there)
            row[str(dtype).removeprefix("torch.")] = {
                "influence": float(((got[0] - influence) / norms).abs().max()),
                "delta_log_probs": float((got[1] - shift).abs().max() / shift.abs().max()),
            }
        there = copy.deepcopy(model).to(device)
        for by in ("token", "sequence"):
            twice = [lddyn.features(there, zoo.examples(), sketch, by=by) for _ in range(2)]
            here = lddyn.features(model, zoo.examples(), sketch, by=by)
            one, other = (x.gram().value.double().cpu() for x in (twice[0], here))
            row[f"features by {by}"] = {
                "same_bits": bool((twice[0].rows == twice[1].rows).all()),
                "difference": distance(one, other),
            }
        found[name] = row
        print(name, row, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = zoo.build("llama").eval()
        model.save_pretrained(folder)
        pair = zoo.examples()
        resident = lddyn.ntk(model.to(device), *pair).gram()
        streamed = lddyn.stream(folder, "1GiB", device=device)
        equal = bool((lddyn.ntk(streamed, *pair).gram() == resident).all())
        found["stream"] = {"equal_to_the_bit": equal}
    found["failed"] = [
        name
        for name in found
        if "float32" in found[name] and not max(found[name]["float32"].values()) <= 1e-5
    ]
    found["failed"] += [] if equal else ["stream"]
    return found


def probe(device: str) -> None:
    """Every op's odd-shaped sample on every kernel of the device, for the sanitizers."""
    import torch

    from lddyn import ops

    def normal(*shape: int) -> Any:
        return torch.randn(shape, device=device).to(dtype)

    for name, op in ops.OPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            args = op.sample(normal)
            for backend, call in on_backends(name, args).items():
                if backend != "reference":
                    call()
                    print(f"{name} {backend} {dtype}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def work(what: str, device: str, small: bool, out: str) -> int:
    """One worker process: measures, prints, records. Returns the number of failures."""
    if what == "probe":
        probe(device)
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    import json

    from record import record

    watch, failures = Stopwatch(device, small), 0
    jobs: dict[str, Callable[[], Any]]
    if what.startswith("exactness"):
        names = what.split()[1:] or (["llama", "gpt2"] if small else ARCHITECTURES)
        jobs = {f"device {what}": lambda: measure_exactness(names, device)}
    elif what.startswith("engine"):
        jobs = {what: lambda: measure_engine(watch, what.removeprefix("engine "))}
    else:
        jobs = {
            "ceilings": lambda: {
                "bfloat16_flops_per_second": watch.flops,
                "copied_bytes_per_second": watch.bytes,
            },
            "gram": lambda: measure_gram(watch),
            "residual": lambda: measure_residual(watch),
            "sketch": lambda: measure_sketch(watch),
            "attention_pullback": lambda: measure_attention(watch),
        }
    for section, job in jobs.items():
        try:
            result = job()
        except Exception as error:  # the other sections still count; this one is a failure
            failures += 1
            result = {"error": f"{type(error).__name__}: {error}"}
        failures += bool(result.get("failed"))
        print(section, json.dumps(result, indent=1), flush=True)
        record(out, section, result)
    return failures


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--out", help="results file; default: benchmarks/results/GPU.json")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="the build and these steps alone")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all steps")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.device, args.small, args.out)

    import torch

    there = torch.cuda.is_available()
    name, capability = "no-gpu", "90"
    if there:
        name = torch.cuda.get_device_name()
        capability = "{}{}".format(*torch.cuda.get_device_capability())
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = args.out or str(ROOT / "benchmarks" / "results" / f"{slug}.json")
    steps = plan(args.device, capability, args.small, out)
    if args.only:
        unknown = set(args.only) - {step.name for step in steps}
        if unknown:
            parser.error(
                f"no such step: {', '.join(sorted(unknown))}; there are: "
                f"{', '.join(step.name for step in steps)}"
            )
        steps = [step for step in steps if step.name in ("build", *args.only)]
    if args.dry_run:
        for step in steps:
            print(f"{step.name}: {step.refusal or ' '.join(step.command)}")
        return 0
    if args.device == "cuda" and not there:
        print("NO CUDA GPU was found by torch: nothing was built, run or measured.")
        return 1
    return run(steps, args.limit)


if __name__ == "__main__":
    sys.exit(main())
