"""When is the kernel of a trained model low-rank, and how sure and how dear are its norms?

    python benchmarks/lowrank.py --model PATH --data probes.jsonl --out benchmarks/results/NAME.json

The data is one JSON object a line, `prompt` and responses; only numbers are recorded. Figures:
spectra of F, the centred kernel below the head in an orthonormal basis of the logits; the rank that
predicts Δ log π of an SFT step to 10, 5 and 1 %; how often the intervals of `frobenius` hold the
truth; its time and memory at V = 151,936.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import record

import lddyn
from lddyn.engine.factors import BodyRows
from lddyn.engine.pushforward import delta_log_probs
from lddyn.entk.norms import Sampling, block_squares, root

RANKS = [1, 2, 4, 8, 16, 32, 64, 128]
LEVELS = [0.1, 0.05, 0.01]
TOKENS, LONGEST = 12, 70  # response tokens, and of the prompts that are taken


class Dense:
    """Everything below the head of one operator, materialised: M (M, L, d, d), for small d."""

    def __init__(self, kernel: lddyn.NTK):
        self.kernel, self.basis = kernel, kernel.products.basis(True)
        width = self.basis.vectors.shape[0]
        eye = BodyRows(torch.eye(width), torch.zeros(width, 0), self.basis.ids)
        parts = [gram.transpose(1, 2).double() for _, gram in kernel.products.blocks(eye, eye)]
        self.middle = torch.cat(parts, 1)
        self.head = kernel.products.head_multiples().double()
        scaled = self.basis.vectors * self.basis.values.sqrt()
        self.body = scaled.T @ self.middle @ scaled  # F

    def blocks(self, observed: BodyRows, updated: BodyRows):
        """Products of cotangents below the head, as the engine would return them."""
        products = observed.hidden @ self.middle @ updated.hidden.T
        yield slice(0, self.head.shape[1]), products.transpose(1, 2)

    def predict(self, body: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """A K G (M, V) with another F."""
        weight = self.kernel.updated.anatomy.head.matrix.double()
        span = (weight - weight.mean(0)) @ (self.basis.vectors / self.basis.values.sqrt())
        moved = torch.einsum("mlij,lj->mi", body, g @ span) @ span.T + self.head @ g
        return delta_log_probs(moved, self.kernel.observed.logits.double())

    def truncated(self, rank: int, whole: bool) -> torch.Tensor:
        """The best F of this rank: of all token pairs together, or of each."""
        m, count, k, _ = self.body.shape
        x = self.body.transpose(1, 2).reshape(m * k, count * k) if whole else self.body
        if not hasattr(self, f"_svd{whole}"):
            setattr(self, f"_svd{whole}", torch.linalg.svd(x, full_matrices=False))
        u, s, v = getattr(self, f"_svd{whole}")
        out = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
        return out.view(m, k, count, k).transpose(1, 2) if whole else out


def spectrum(dense: Dense) -> dict:
    """Share of ‖F‖² in the leading directions, of single blocks (median) and of all together."""
    m, count, k, _ = dense.body.shape
    single = torch.linalg.svdvals(dense.body).flatten(0, 1).pow(2)
    single = (single.cumsum(1) / single.sum(1, keepdim=True)).median(0).values
    whole = torch.linalg.svdvals(dense.body.transpose(1, 2).reshape(m * k, count * k)).pow(2)
    whole = whole.cumsum(0) / whole.sum()
    body, head = dense.body.pow(2).sum(), dense.head.pow(2).sum()
    return {
        "ranks": RANKS,
        "block": [float(single[r - 1]) for r in RANKS],
        "whole": [float(whole[r - 1]) for r in RANKS],
        "head_share": float(head * 2047 / (body + head * 2047)),
    }


def prediction(dense: Dense) -> dict:
    """Relative error of the predicted Δ log π (M, V) of an SFT step, by rank and way."""
    kernel = dense.kernel
    g = -lddyn.residual(kernel.updated.logits, kernel.updated.targets)[0]
    shift = kernel.explain(g)
    truth = shift.log_probs().double()

    def wrong(found: torch.Tensor) -> float:
        return float((found.double() - truth).norm() / truth.norm())

    errors: dict[str, list[float]] = {"exact F": [wrong(dense.predict(dense.body, g.double()))]}
    errors["head alone"] = [wrong(shift.log_probs("head"))]
    for name, whole in (("best, one rank for all pairs", True), ("best of each pair", False)):
        errors[name] = [wrong(dense.predict(dense.truncated(r, whole), g.double())) for r in RANKS]
    for span in ("random", "data"):
        errors[f"lowrank, span={span}"] = [
            wrong(delta_log_probs(kernel.lowrank(r, span=span) @ g, kernel.observed.logits))
            for r in RANKS
        ]
    needed = {
        name: [
            next((r for r, e in zip(RANKS, row, strict=True) if e <= level), None)
            for level in LEVELS
        ]
        for name, row in errors.items()
        if len(row) == len(RANKS)
    }
    return {"errors": errors, "levels": LEVELS, "needed": needed}


def coverage(dense: Dense, seeds: int) -> list[dict]:
    """How often 95 % intervals of the norms hold the truth; the estimator fed with F itself."""
    truth = dense.body.pow(2).sum((2, 3))
    truth = truth + 2 * dense.head * dense.body.diagonal(dim1=2, dim2=3).sum(-1)
    truth = (truth + dense.head.pow(2) * 2047).sqrt()
    few = slice(0, 4)  # of the tokens: a thousand seeds in seconds
    part = copy.copy(dense)
    part.middle, part.head = dense.middle[few, few], dense.head[few, few]
    rows = []
    for r, q in ((8, 8), (16, 16), (32, 16)):
        held, errors, said = [], [], []
        for seed in range(seeds):
            sampling = Sampling(0.99, r, q, seed=seed)
            norm = root(block_squares(part.blocks, dense.basis, part.head, 2047, sampling))
            low, high = norm.interval()
            held.append((low <= truth[few, few]) & (truth[few, few] <= high))
            errors.append(norm.value / truth[few, few] - 1)
            said.append(norm.stderr / norm.value)
        rows.append(
            {
                "directions": r,
                "probes": q,
                "seeds": seeds,
                "coverage": float(torch.stack(held).double().mean()),
                "error": float(torch.stack(errors).pow(2).mean().sqrt()),
                "stated": float(torch.stack(said).pow(2).mean().sqrt()),
                "bias": float(torch.stack(errors).mean()),
            }
        )
    return rows


def step(kernel: lddyn.NTK, model, observed: lddyn.Example, updated: lddyn.Example) -> dict:
    """The paper's lower bound from a real SGD step, beside the norm it bounds."""
    lr = 1e-4
    moved = copy.deepcopy(model)
    lddyn.token_log_probs(moved, [updated])  # the copy runs
    ids = torch.tensor([updated.ids])
    logits = moved(input_ids=ids).logits[0][list(updated.positions)].float()
    loss = -logits.log_softmax(-1)[range(len(logits)), list(updated.targets)].sum()
    loss.backward()

    def log_probs(m) -> torch.Tensor:
        with torch.no_grad():
            z = m(input_ids=torch.tensor([observed.ids])).logits[0]
        return z[list(observed.positions)].double().log_softmax(-1)

    before = log_probs(moved)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter -= lr * parameter.grad
    change = log_probs(moved) - before
    g = -lddyn.residual(kernel.updated.logits, kernel.updated.targets)[0]
    bound = float(lddyn.lbk(change, kernel.observed.logits, g))
    norm = kernel.frobenius(0.02, reduce="all")
    return {
        "lr": lr,
        "norm": float(norm.value),
        "norm_stderr": float(norm.stderr),
        "lower_bound": bound**0.5 / lr,
        "sign_delta": float(lddyn.sign_delta(change)),
    }


def large(vocabulary: int, hidden: int, tokens: int, prompt: int) -> dict:
    """Time and memory of `frobenius` at a vocabulary like those of today; a process of its own."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    examples = [
        lddyn.Example(
            prompt_ids=torch.randint(vocabulary, (prompt,)).tolist(),
            response_ids=torch.randint(vocabulary, (tokens,)).tolist(),
        )
        for _ in range(2)
    ]
    kernel = lddyn.ntk(model, *examples, memory="1GiB")
    kernel.gram()  # what is loaded and compiled once is not the estimate's

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    norms = kernel.frobenius()
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    high = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {
        "vocabulary": vocabulary,
        "hidden": hidden,
        "layers": 4,
        "tokens": tokens,
        "length": prompt + tokens,
        "memory": "1GiB",
        "seconds": seconds,
        "peak_bytes": max(high - before, 0),
        "weight_bytes": 4 * vocabulary * hidden,
        "process_bytes": high,
        "dense_bytes": 4 * vocabulary**2 * tokens**2,
        "error": float((norms.stderr / norms.value).max()),
        "samples": norms.samples,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--out", default="benchmarks/results/operator.json")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--part", choices=["all", "rank", "large"], default="all")
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.large:
        print(json.dumps(large(151_936, 256, 16, 32)))
        return
    if args.part != "rank":
        command = [sys.executable, __file__, "--large"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        record(args.out, "norms-large", json.loads(done.stdout.splitlines()[-1]))
        print(done.stdout, flush=True)
    if args.part == "large":
        return
    if not (args.model and args.data and Path(args.model).exists() and Path(args.data).exists()):
        print("SKIPPED: the trained model or its data is not here; give --model and --data")
        return
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    fields = ["chosen", "rejected"]
    encoded = (lddyn.encode_row(tokenizer, r, fields) for r in lddyn.rows(args.data, limit=40))
    short = [e for e in encoded if len(e["chosen"].prompt_ids) <= LONGEST]
    one, other = (
        {
            n: lddyn.Example(prompt_ids=e.prompt_ids, response_ids=e.response_ids[:TOKENS])
            for n, e in row.items()
        }
        for row in short[:2]
    )
    pairs = {
        "itself": (one["chosen"], one["chosen"]),
        "its rejected response": (one["chosen"], one["rejected"]),
        "another prompt's": (one["chosen"], other["chosen"]),
    }
    result: dict = {"tokens": TOKENS, "parameters": model.num_parameters(), "pairs": {}}
    for name, (observed, updated) in pairs.items():
        start = time.perf_counter()
        dense = Dense(lddyn.ntk(model, observed, updated))
        found: dict = {"spectrum": spectrum(dense), "prediction": prediction(dense)}
        print(name, f"{time.perf_counter() - start:.0f} s", flush=True)
        found["coverage"] = coverage(dense, args.seeds)
        found["step"] = step(dense.kernel, model, observed, updated)
        result["pairs"][name] = found
        print(name, f"{time.perf_counter() - start:.0f} s", json.dumps(found), flush=True)
    record(args.out, "lowrank", result)


if __name__ == "__main__":
    main()
