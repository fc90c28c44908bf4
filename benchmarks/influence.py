"""Exact M x L influence tables: lddyn against the ways to get one with torch alone.

    python benchmarks/influence.py --out benchmarks/results/NAME.json    # the comparison
    python benchmarks/influence.py --scaling --out …                     # against L, T, V, depth

Every method runs in a process of its own, on the same model, sequences and threads; its peak memory
is the growth of the resident set over the loaded model. The result of each is compared with the
textbook route's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

SIZES = {"hidden": 512, "layers": 6, "length": 128, "response": 64, "vocabulary": 16384}
METHODS = {
    "lddyn": "factors of both sides, paired block by block",
    "lddyn, pushed": "factored NTK-vector product: also gives every vocabulary token",
    "torch.func eager": "vmap(vjp) Jacobian rows of log-probs, materialised, one GEMM a parameter",
    "torch.func sdpa": "the same with the model's fused attention",
    "batched grads eager": "is_grads_batched and hooks, one whole graph, factored contraction",
    "batched grads sdpa": "the same with the model's fused attention",
}


def build(sizes: dict, attention: str = "eager"):
    """A random Llama of these sizes and two sequences."""
    import transformers

    import lddyn

    torch.manual_seed(0)
    hidden = sizes["hidden"]
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=hidden, num_hidden_layers=sizes["layers"],
        intermediate_size=int(hidden * 8 / 3) // 16 * 16, num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=max(256, sizes["length"]), pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(sizes["vocabulary"], (2, sizes["length"]), generator=generator).tolist()
    split = sizes["length"] - sizes["response"]
    pair = [lddyn.Example(prompt_ids=i[:split], response_ids=i[split:]) for i in ids]
    return model, pair


def log_probs(model, example, parameters=None) -> Tensor:
    """log π(y_m) of the response tokens by a plain forward."""
    ids = torch.tensor([example.ids])
    arguments = {"use_cache": False, "logits_to_keep": torch.tensor(list(example.positions))}
    if parameters is None:
        out = model(input_ids=ids, **arguments)
    else:
        out = torch.func.functional_call(model, parameters, (ids,), arguments)
    return out.logits[0].log_softmax(-1).gather(1, torch.tensor(example.targets)[:, None])[:, 0]


def textbook(model, pair) -> Tensor:
    """Per-token Jacobian rows by vmap(vjp); the Gram of the rows, parameter by parameter.

    One side's rows are materialised; the other's come 16 at a time, which halves the memory.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    pulls = [
        torch.func.vjp(lambda p, e=example: log_probs(model, e, p), parameters) for example in pair
    ]
    rows = torch.func.vmap(pulls[0][1])(torch.eye(len(pulls[0][0])))[0]
    columns = []
    for part in torch.eye(len(pulls[1][0])).split(16):
        other = torch.func.vmap(pulls[1][1])(part)[0]
        columns.append(sum(rows[n].flatten(1) @ other[n].flatten(1).T for n in parameters))
    return torch.cat(columns, dim=1)


def batched_grads(model, pair) -> Tensor:
    """One whole graph per sequence, hooks on every module with weights, is_grads_batched."""
    sides = []
    for example in pair:
        captured: list[tuple[str, torch.nn.Module, Tensor, Tensor]] = []
        gains = {n: p for n, p in model.named_parameters() if "norm" in n}
        hooks = [
            module.register_forward_hook(
                lambda m, args, out, name=name, at=captured: at.append(
                    (name, m, args[0].detach(), out)
                )
            )
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and name != "lm_head"
        ]
        head: list[Tensor] = []
        hooks.append(
            model.lm_head.register_forward_hook(lambda m, args, out, at=head: at.append(args[0]))
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in (*gains.values(), model.model.embed_tokens.weight):
            parameter.requires_grad_(True)
        values = log_probs(model, example)
        for hook in hooks:
            hook.remove()
        targets = [c[3] for c in captured] + list(gains.values())
        gradients = torch.autograd.grad(
            values, targets, torch.eye(len(values)), is_grads_batched=True
        )
        with torch.no_grad():
            h = head[0][0]
            logits = h @ model.lm_head.weight.T
            v = -logits.softmax(-1)
            v[torch.arange(len(v)), list(example.targets)] += 1
        factors = {c[0]: (c[2].reshape(-1, *c[2].shape[2:]), g[:, 0])
                   for c, g in zip(captured, gradients, strict=False)}  # fmt: skip
        direct = dict(zip(gains, gradients[len(captured) :], strict=True))
        sides.append((factors, direct, h.detach(), v))
    (fo, do, ho, vo), (fu, du, hu, vu) = sides
    total = (ho @ hu.T) * (vo @ vu.T)
    for name, (a_o, g_o) in fo.items():
        a_u, g_u = fu[name]
        same = (a_o[:, None] == a_u[None]).float() if a_o.dim() == 1 else a_o @ a_u.T
        pushed = torch.matmul(same.T, g_o)
        total += pushed.flatten(1) @ g_u.flatten(1).T
    for name in do:
        total += do[name].flatten(1) @ du[name].flatten(1).T
    return total


def gemm_rate(hidden: int) -> float:
    """FLOP/s of a product like the pullback's: 2048 rows through an MLP weight, float32."""
    a, b = torch.randn(2048, hidden), torch.randn(int(hidden * 8 / 3) // 16 * 16, hidden)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b.T
        best = max(best, 2 * a.shape[0] * b.numel() / (time.perf_counter() - start))
    return best


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]


def worker(method: str, sizes: dict, threads: int, repeats: int, path: str) -> None:
    """Runs one method in this process and writes its figures and its table."""
    torch.set_num_threads(threads)
    model, pair = build(sizes, "sdpa" if method.endswith("sdpa") else "eager")
    figures: dict = {}
    if method.startswith("lddyn"):
        from lddyn import ntk
        from lddyn.plan import gram_cost

        def run() -> Tensor:
            how = "pushed" if method.endswith("pushed") else "paired"
            return lddyn_ntk(model, *pair).gram(method=how)

        import lddyn

        lddyn_ntk = lddyn.ntk
        anatomy = lddyn.Anatomy(model)
        sides = [ntk_side(anatomy, e) for e in pair]
        figures["planned_flops"] = gram_cost(sides[:1], sides[1:]).flops
        del sides, anatomy, ntk
    else:

        def run() -> Tensor:
            return (textbook if method.startswith("torch.func") else batched_grads)(model, pair)

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds, rates, table = [], [gemm_rate(sizes["hidden"])], None
    for _ in range(repeats):
        start = time.perf_counter()
        table = run()
        seconds.append(time.perf_counter() - start)
        rates.append(gemm_rate(sizes["hidden"]))
    figures |= {
        "seconds": min(seconds),
        "peak_bytes": resident("VmHWM") - before,
        "gemm_flops_per_second": max(rates),
    }
    assert table is not None
    from safetensors.torch import save_file

    save_file({"table": table.detach().float().contiguous()}, path + ".safetensors")
    Path(path).write_text(json.dumps(figures))


def ntk_side(anatomy, example):
    """The log-prob rows of one example."""
    from lddyn.ntk import Side

    return Side.log_probs(anatomy.trace(example))


def measure(method: str, sizes: dict, threads: int, repeats: int, timeout: float) -> dict:
    """Runs a worker process; returns its figures, or the error it died of."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/result.json"
        command = [sys.executable, __file__, "--worker", method, "--threads", str(threads),
                   "--repeats", str(repeats), "--worker-out", path,
                   *[str(x) for k, v in sizes.items() for x in (f"--{k}", v)]]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=environment
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:.0f} s"}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
            return {"error": lines[-1][:200]}
        figures = json.loads(Path(path).read_text())
        figures["table"] = load_file(path + ".safetensors")["table"]
        return figures


def compare(sizes: dict, threads: int, repeats: int, timeout: float) -> dict:
    """All methods on one problem; ratios are to lddyn."""
    rows: dict[str, dict] = {}
    for method in METHODS:
        rows[method] = measure(method, sizes, threads, repeats if "lddyn" in method else 1, timeout)
        shown = {k: v for k, v in rows[method].items() if k != "table"}
        print(f"{method:22s} {shown}", flush=True)
    textbooks = [r["table"] for n, r in rows.items() if "torch.func" in n and "table" in r]
    truth = textbooks[0] if textbooks else rows["lddyn"]["table"]
    best = rows["lddyn"]
    for row in rows.values():
        table = row.pop("table", None)
        if table is not None:
            row["relative_difference"] = float((table - truth).norm() / truth.norm())
            row["times_lddyn"] = row["seconds"] / best["seconds"]
            row["memory_over_lddyn"] = row["peak_bytes"] / best["peak_bytes"]
    planned = best["planned_flops"] / best["gemm_flops_per_second"]
    return {
        "sizes": sizes, "threads": threads, "methods": rows,
        "planned_seconds": planned, "over_plan": best["seconds"] / planned,
    }  # fmt: skip


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
            row = measure("lddyn", sizes, threads, 2, timeout)
            row.pop("table", None)
            points.append({"varied": key, "value": value, **row})
            print(points[-1], flush=True)
    return points


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in SIZES.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker-out", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {key: getattr(args, key) for key in SIZES}
    if args.worker:
        worker(args.worker, sizes, args.threads, args.repeats, args.worker_out)
        return
    key = "scaling" if args.scaling else "influence"
    result = (
        scaling(args.threads, args.timeout)
        if args.scaling
        else compare(sizes, args.threads, args.repeats, args.timeout)
    )
    if args.out:
        from record import record

        record(args.out, key, result)
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
