"""Grams of 64 gradients, lddyn against the libraries in `peer_methods.py`, each in its own process.

    python benchmarks/peers.py --python peers=.venv-peers/bin/python \
        --python bergson=.venv-bergson/bin/python --python logix=.venv-logix/bin/python \
        --out benchmarks/results/peers.json
    python benchmarks/peers.py --model PATH --data probes.jsonl --section peers-trained …

`make peers` makes the environments and runs the first. Case "tokens": the 64 loss tokens of one
sequence; case "sequences": 64 whole sequences. The truth is a loop of backward passes in float64;
"full" is the error against all parameters, "cover" against those the method sees, both relative in
the Frobenius norm. Seconds are those of the processor, of one thread. Section (c) compares the
loss-token gradients with the position gradients that are called per-token elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from influence import gemm_rate, intermediate, limit_memory, resident
from peer_methods import METHODS, Row, bergson, losses_of_tokens, nbytes
from torch import Tensor, nn

SIZES = {"hidden": 256, "layers": 4, "length": 64, "count": 64, "vocabulary": 8192}
ENOUGH = 8  # processor seconds of repeats after which no other is begun
CASES = ("tokens", "sequences")
POSITIONS = "bergson, its own per-token"  # a method for section (c) alone
CANNOT = {
    "tokens": {
        "kronfluence, dattri, LogIX, TRAK, opacus, bergson, TensorSketch from one forward pass": (
            "a gradient belongs to a row of the batch: loss tokens need replicas or prefixes"
        ),
        "TensorSketch, norms": "opacus has no grad sampler for the RMSNorm of transformers",
        "TRAK, CudaProjector": "fast_jl needs a GPU",
    },
    "sequences": {
        "TRAK, CudaProjector": "fast_jl needs a GPU",
    },
}
PACKAGES = (
    "opacus",
    "torchjd",
    "dattri",
    "dattri-llm",
    "kronfluence",
    "bergson",
    "logix-ai",
    "step-decomposed-influence",
    "traker",
    "torch",
    "transformers",
    "lddyn",
)


# --------------------------------------------------------------------------- the problem


def write_problem(folder: Path, sizes: dict) -> None:
    """A random Llama and random rows; from files, so that every process sees the same bytes."""
    import transformers

    torch.manual_seed(0)
    hidden, length, count = sizes["hidden"], sizes["length"], sizes["count"]
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=hidden,
        num_hidden_layers=sizes["layers"],
        intermediate_size=-(-intermediate(hidden) // 64) * 64,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=256,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(1)
    ids = [[draw.randrange(sizes["vocabulary"]) for _ in range(length + 1)] for _ in range(count)]
    write_rows(folder, (ids[0], 1), [(row, 1) for row in ids])


def write_dialogues(folder: Path, model: str, data: str, sizes: dict) -> None:
    """A trained model and the answers of real dialogues: at most `length` tokens of each side."""
    import transformers

    import lddyn

    length, count = sizes["length"], sizes["count"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(
        folder / "model"
    )
    found = []
    for row in lddyn.rows(data, limit=8 * count):
        example = lddyn.encode_row(tokenizer, row, ["chosen"])["chosen"]
        prompt, response = list(example.prompt_ids), list(example.response_ids)
        if len(response) >= length:
            prompt = prompt[-length:]
            found.append((prompt + response[:length], len(prompt)))
    if len(found) < count:
        raise ValueError(f"only {len(found)} answers have {length} tokens, {count} are needed")
    write_rows(folder, found[0], found[:count])


def write_rows(folder: Path, sequence: tuple, sequences: list[tuple]) -> None:
    """Rows of both cases: prefixes that end in one counted token, and whole sequences."""
    ids, first = sequence
    tokens = [(ids[: m + 1], m) for m in range(first, len(ids))]
    (folder / "rows.json").write_text(json.dumps({"tokens": tokens, "sequences": sequences}))


def load_rows(folder: Path, case: str) -> list[Row]:
    """The rows of a case."""
    return [Row(*row) for row in json.loads((folder / "rows.json").read_text())[case]]


def load_model(folder: Path) -> nn.Module:
    """The model, eager attention, float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=torch.float32
    ).eval()


# --------------------------------------------------------------------------- one method


def versions() -> dict[str, str]:
    """Of whatever of PACKAGES is installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def worker(name: str, case: str, folder: Path, repeats: int, out: str) -> None:
    """Runs one method in this process; writes its figures and its Gram."""
    from safetensors.torch import save_file

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = load_rows(folder, case)
    if name == POSITIONS:
        run = bergson(0, tokens=True)
    elif METHODS[name].missing:
        Path(out).write_text(json.dumps({"error": f"{METHODS[name].needs} is not installed"}))
        return
    else:
        run = METHODS[name].run
    model = load_model(folder)
    hidden = model.config.hidden_size
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    limit_memory()
    rates, seconds, answer = [gemm_rate(hidden)], [], None
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        if seconds:  # libraries leave hooks in the model
            model = load_model(folder)
        start = time.process_time()
        answer = run(model, rows)
        seconds.append(time.process_time() - start)
        rates.append(gemm_rate(hidden))
    assert answer is not None
    save_file({"gram": answer.gram.detach().float().contiguous()}, out + ".safetensors")
    figures = {
        "seconds": min(seconds),
        "runs": len(seconds),
        "peak_bytes": resident("VmHWM") - before,
        "stored_bytes": answer.stored,
        "covers": answer.covers,
        "gemm_flops_per_second": max(rates),
        "versions": versions(),
    }
    Path(out).write_text(json.dumps(figures))


def measure(name: str, case: str, folder: Path, python: str, repeats: int, timeout: float) -> dict:
    """Runs a worker process; returns its figures, or the error it died of."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/result.json"
        command = [
            python,
            str(Path(__file__).resolve()),
            "--worker",
            name,
            "--case",
            case,
            "--folder",
            str(folder),
            "--repeats",
            str(repeats),
            "--out",
            out,
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }
        try:  # in a folder of its own: some libraries write where they stand
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment,
                cwd=scratch,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:.0f} s"}
        if done.returncode or not Path(out).exists():
            lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
            return {"error": lines[-1][:200], "stderr": done.stderr[-2000:]}
        figures = json.loads(Path(out).read_text())
        if "error" not in figures:
            figures["gram"] = load_file(out + ".safetensors")["gram"].double()
        return figures


# --------------------------------------------------------------------------- truth


class Truth:
    """Grams by parameter in float64, of the rows of a case; of tokens, also by position.

    grams: loss gradients. positions: the same total gradient cut by position instead of by loss
    token. aligned: ⟨position gradient at the position that predicts token m, gradient of token m⟩.
    """

    def __init__(self, folder: Path, case: str):
        from lddyn import true_float64

        model, rows = load_model(folder).double(), load_rows(folder, case)
        self.names = [name for name, _ in model.named_parameters()]
        self.positions: dict[str, Tensor] = {}
        self.aligned: dict[str, Tensor] = {}
        with true_float64():
            if case == "tokens":
                pieces = self._pieces(model, rows)
            kept: dict[str, list[Tensor]] = {name: [] for name in self.names}
            for loss in losses_of_tokens(model, rows):
                found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                for name, gradient in zip(self.names, found, strict=True):
                    kept[name].append(gradient.flatten())
        self.grams = {}
        for name, gradients in kept.items():
            matrix = torch.stack(gradients)
            self.grams[name] = matrix @ matrix.T
            if case == "tokens":
                self._compare(name, pieces.pop(name), matrix)

    def _pieces(self, model: nn.Module, rows: list[Row]) -> dict[str, tuple]:
        """Of each parameter: its shape's kind, and both factors at every position."""
        from opponents import unit

        ids, first = rows[-1].ids, rows[0].first
        outputs, inputs, hooks = {}, {}, []

        def hook(name):
            def keep(module, args, out):
                inputs[name], outputs[name] = args[0].detach(), out

            return keep

        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.append(module.register_forward_hook(hook(name)))
        logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, first - 1 :]
        loss = nn.functional.cross_entropy(logits, torch.tensor(ids[first:]), reduction="sum")
        deltas = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
        for handle in hooks:
            handle.remove()
        modules = dict(model.named_modules())
        self.predicting = torch.arange(first - 1, len(ids) - 1)
        pieces = {}
        for name, delta in deltas.items():
            x, module = inputs[name][0], modules[name]
            gain = not isinstance(module, (nn.Linear, nn.Embedding))
            pieces[f"{name}.weight"] = (module, unit(module, x) if gain else x, delta[0])
        return pieces

    def _compare(self, name: str, piece: tuple, matrix: Tensor) -> None:
        """Position gradients of one parameter, against each other and against the tokens'."""
        module, x, delta = piece
        at = self.predicting
        if isinstance(module, nn.Linear):
            gram = (x @ x.T) * (delta @ delta.T)
            tokens = matrix.view(len(matrix), *module.weight.shape)
            own = torch.einsum("mo,moi,mi->m", delta[at], tokens, x[at])
        elif isinstance(module, nn.Embedding):
            gram = (x[:, None] == x) * (delta @ delta.T)
            tokens = matrix.view(len(matrix), *module.weight.shape)
            own = (tokens[torch.arange(len(at)), x[at]] * delta[at]).sum(1)
        else:
            gram = (x * delta) @ (x * delta).T
            own = (matrix * (x * delta)[at]).sum(1)
        self.positions[name] = gram[at][:, at]
        self.aligned[name] = own

    def sum(self, which: str, covers: list[str] | None = None) -> Tensor:
        """Σ over parameters, or some of them."""
        found = getattr(self, which)
        return sum(found[name] for name in covers or self.names)


def relative(gram: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error."""
    return float((gram - truth).norm() / truth.norm())


def errors(gram: Tensor, truth: Truth, covers: list[str]) -> dict[str, float]:
    """Against all parameters, those covered, those after the best scale; and off the diagonal."""
    full, cover = truth.sum("grams"), truth.sum("grams", covers)
    rest = ~torch.eye(len(full), dtype=torch.bool)
    return {
        "full": relative(gram, full),
        "cover": relative(gram, cover),
        "cover_scaled": relative(gram * (gram * cover).sum() / gram.norm() ** 2, cover),
        "cover_off_diagonal": relative(gram[rest], cover[rest]),
    }


def position_section(truth: Truth) -> dict:
    """(c) Position gradients against loss-token gradients: the same total, cut another way."""
    tokens, positions = truth.sum("grams"), truth.sum("positions")
    cosines = truth.sum("aligned") / (tokens.diag() * positions.diag()).sqrt()
    rest = ~torch.eye(len(tokens), dtype=torch.bool)
    scale = (tokens * positions).sum() / positions.norm() ** 2
    stacked = torch.stack([tokens[rest], positions[rest]])
    return {
        "gram_error": relative(positions, tokens),
        "gram_error_scaled": relative(positions * scale, tokens),
        "off_diagonal_correlation": float(torch.corrcoef(stacked)[0, 1]),
        "cosine_of_same_token": {
            "least": float(cosines.min()),
            "median": float(cosines.median()),
            "largest": float(cosines.max()),
        },
        "squared_norm_over_tokens": float(positions.trace() / tokens.trace()),
    }


# --------------------------------------------------------------------------- all


def run_all(
    folder: Path, pythons: dict[str, str], repeats: int, timeout: float, methods: list[str]
) -> dict:
    """Every method on both cases, and section (c)."""
    result: dict = {"cases": {}, "versions": {}}
    for case in CASES:
        truth = Truth(folder, case)
        rows: dict[str, dict] = {}

        def take(name, env, case=case, truth=truth, rows=rows):
            if env and env not in pythons:
                row = {"error": f"no --python {env}=PATH was given"}
            else:
                row = measure(
                    name, case, folder, pythons.get(env, sys.executable), repeats, timeout
                )
            if "versions" in row:
                result["versions"][env or "lddyn"] = row.pop("versions")
            gram = row.pop("gram", None)
            if gram is not None:
                row["errors"] = errors(gram, truth, row["covers"])
                missed = [n for n in truth.names if n not in row["covers"]]
                full, lost = truth.sum("grams"), truth.sum("grams", missed) if missed else None
                row["missed_share"] = float(lost.norm() / full.norm()) if missed else 0.0
                row["covers"] = f"{len(row['covers'])} of {len(truth.names)} tensors"
            rows[name] = row
            print(f"{case} {name:26s} {row}", flush=True)
            return gram

        for name, method in METHODS.items():
            if case in method.cases and (not methods or name in methods):
                take(name, method.env)
        if "lddyn" in rows and "error" not in rows["lddyn"]:  # did the machine change meanwhile?
            first = rows["lddyn"]["seconds"]
            take("lddyn", "")
            rows["lddyn"]["seconds_first_and_last"] = [first, rows["lddyn"]["seconds"]]
            rows["lddyn"]["seconds"] = max(first, rows["lddyn"]["seconds"])  # the worse of the two
        if case == "tokens":
            result["positions"] = position_section(truth)
            if not methods or POSITIONS in methods:
                gram = take(POSITIONS, "bergson")
                row = rows.pop(POSITIONS)
                if gram is not None:
                    linear = [n for n in truth.names if "norm" not in n and "embed" not in n]
                    row["error_as_positions"] = relative(gram, truth.sum("positions", linear))
                result["positions"]["peer"] = row
            print(result["positions"], flush=True)
        base = rows.get("lddyn" if case == "tokens" else "torch, loop", {}).get("seconds")
        for row in rows.values():
            if base and "seconds" in row:
                row["times_base"] = row["seconds"] / base
            row.pop("stderr", None)
        result["cases"][case] = {"rows": rows, "cannot": CANNOT[case]}
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in SIZES.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="interpreter of an environment: peers, bergson or logix",
    )
    parser.add_argument("--model", default="", help="a trained model instead of a random one")
    parser.add_argument("--data", default="", help="its dialogues, JSONL with prompt and chosen")
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--section", default="peers")
    parser.add_argument("--out", default="")
    for hidden in ("worker", "case", "folder"):
        parser.add_argument(f"--{hidden}", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.case, Path(args.folder), args.repeats, args.out)
        return
    torch.set_num_threads(1)
    sizes = {key: getattr(args, key) for key in SIZES}
    # Absolute, as workers run elsewhere; links stay, as they are what makes an environment.
    pythons = {
        name: str(Path(path).absolute())
        for name, path in (pair.split("=", 1) for pair in args.python)
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.model:
            write_dialogues(folder, args.model, args.data, sizes)
        else:
            write_problem(folder, sizes)
        model = load_model(folder)
        result = {
            "sizes": sizes,
            "trained": bool(args.model),
            "parameters": model.num_parameters(),
            "parameter_bytes": nbytes(model.parameters()),
            **run_all(folder, pythons, args.repeats, args.timeout, args.methods),
        }
    if args.out:
        from record import record

        record(args.out, args.section, result)
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
