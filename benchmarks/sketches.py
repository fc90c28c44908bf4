"""Error against size of every sketch, on trained models, beside what the variance formulas say.

    python benchmarks/sketches.py --model PATH --data probes.jsonl --out FILE

Truth: plain backward passes of each token, which also feed the formulas; the sketches go through
`lddyn.features`. The demo's own language model is measured too. Only numbers are recorded.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from record import record

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.pullback import Pullback, segments_down
from lddyn.sketches.allocation import choose_layout
from lddyn.sketches.layout import Layout
from lddyn.sketches.projections import Stream, Term, contractions, low_rank

REPEATS, SEEDS = 8, 12
SIZES = {
    "twosided": [512, 1024, 2048, 4096, 8192, 16384, 32768],
    "lowrank": [512, 2048, 8192],
    "lowrank, rank 2": [512, 2048, 8192],
    "sjlt": [512, 2048, 8192],
    "tensorsketch": [512, 2048, 8192],
    "rademacher": [512],
    "gaussian": [512],
}
TOKENS, SEQUENCES, PAIRS, LONGEST = 8, 4, 24, 70


def cut(example: lddyn.Example) -> lddyn.Example:
    return lddyn.Example(prompt_ids=example.prompt_ids, response_ids=example.response_ids[:TOKENS])


def token_gradients(model, examples) -> list[dict[str, torch.Tensor]]:
    """{parameter: matrix} of every token of every example."""
    found, names = [], [n for n, _ in model.named_parameters()]
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        values = logits[list(example.positions), list(example.targets)]
        for value in values:
            gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            found.append(
                {
                    n: g if g.dim() == 2 else g[:, None]
                    for n, g in zip(names, gradients, strict=True)
                }
            )
    return found


class Theory:
    """Predicted variances of pairs of tokens, from their dense gradients."""

    def __init__(self, gradients):
        self.gradients = gradients
        self.tables: dict = {}
        self.kept: dict = {}

    def table(self, name, a, b, c, d):
        """Contractions of gradients, or of low-rank parts of them, of one parameter."""
        key = name, *((x[0], x[1]) for x in (a, b, c, d))
        if key not in self.tables:
            self.tables[key] = contractions(*(x[2] for x in (a, b, c, d)))
        return self.tables[key]

    def low_rank(self, sketch, name, token):
        key = name, token, sketch.rank
        if key not in self.kept:
            whole = self.gradients[token][name]
            u, v = low_rank(
                Stream(sketch.seed, name, sketch.repeats),
                [Term(torch.eye(len(whole)), whole[None])],
                tuple(whole.shape),
                sketch.rank,
            )
            self.kept[key] = (sketch.rank, token, u[0].T @ v[0])
        return self.kept[key]

    def variance(self, layout, i, j) -> float:
        """Of the mean over the repeats: independent parameters add."""
        sketch, total = layout.sketch, 0.0
        minus = {p.name for p in layout.parts if p.kind == "minus"}
        for part in layout.parts:
            if part.kind in ("exact", "outer", "minus"):
                continue
            name = part.name
            a, b = ((0, t, self.gradients[t][name]) for t in (i, j))
            if part.kind == "head":  # v ⊗ h: ⟨h, h'⟩² Var⟨v, v'⟩
                sides = [rank_one(x[2]) for x in (a, b)]
                h = float(sides[0][1] @ sides[1][1]) ** 2
                v, w = (x[0].double() for x in sides)
                inner, size = float(v @ w), part.sizes[0]
                quartic = float((v * v * w * w).sum())
                spread = float(v @ v) * float(w @ w) + inner**2 - 2 * quartic
                total += h * spread / size
                continue
            pairs = [(1.0, a, b)]
            if name in minus:
                kept = (self.low_rank(sketch, name, t) for t in (i, j))
                pairs.append((-1.0, *kept))
            moments = sketch.moments(part.kind, part.shape, part.sizes)
            for sign, one, other in pairs:
                for sign_, third, fourth in pairs:
                    table = self.table(name, one, other, third, fourth)
                    total += sign * sign_ * float((moments * table).sum() - table[0, 0])
        return max(total, 0.0) / REPEATS


def rank_one(matrix):
    """v, h of v ⊗ h."""
    column = matrix.norm(dim=0).argmax()
    v = matrix[:, column]
    return v, matrix.T @ v / (v @ v)


def truncated(gradients, gram, norms, groups) -> list[dict]:
    """Errors of low-rank forms alone, without a sketch of the rest: biased, no error bar.

    Embedding and head are exact here; their numbers (a row of the embedding, h and v) are not
    counted.
    """
    names = [
        n
        for n, m in gradients[0].items()
        if m.shape[1] > 1 and "embed" not in n and "lm_head" not in n
    ]
    forms = {}
    for name in names:
        u, s, v = torch.linalg.svd(torch.stack([g[name] for g in gradients]), full_matrices=False)
        forms[name] = u[..., :16].mT * s[:, :16, None].sqrt(), v[:, :16] * s[:, :16, None].sqrt()
    exact = torch.zeros_like(gram)
    for name in names:
        whole = torch.stack([g[name].flatten() for g in gradients]).double()
        exact += whole @ whole.T
    rows = []
    for rank in (1, 2, 4, 8, 16):
        kept = torch.zeros_like(gram)
        for u, v in forms.values():
            u, v = u[:, :rank].double(), v[:, :rank].double()
            products = torch.einsum("nra,msa->nmrs", u, u) * torch.einsum("nra,msa->nmrs", v, v)
            kept += products.sum((2, 3))
        numbers = rank * sum(sum(gradients[0][n].shape) for n in names)
        row: dict = {"rank": rank, "numbers": numbers}
        for name, pairs in groups.items():
            i, j = (torch.tensor(x) for x in zip(*pairs, strict=True))
            error = (kept - exact)[i, j] / (norms[i] * norms[j])
            row[name] = float(error.square().mean().sqrt())
        rows.append(row)
    return rows


def cost(model, example) -> dict:
    """Processor seconds of the features of one sequence, over those of its pullback alone."""
    anatomy = Anatomy(model)

    def pull():
        trace = anatomy.trace(example)
        with anatomy.analysis():
            down = Pullback(trace)
            for segment in segments_down(anatomy):
                for _ in down.step(segment):
                    pass

    calls = {"pullback": pull}
    for kind in ("twosided", "lowrank", "tensorsketch", "sjlt"):
        layout = choose_layout(anatomy, [example], lddyn.Sketch(kind))
        calls[kind] = partial(lddyn.features, anatomy, [example], layout=layout)
    seconds = {}
    for name, call in calls.items():
        call()
        runs = []
        for _ in range(5):
            start = time.process_time()
            call()
            runs.append(time.process_time() - start)
        seconds[name] = min(runs)
    return {"tokens": len(example), "length": len(example.ids), "seconds": seconds}


def measure(model, examples) -> dict:
    """Errors of all kinds and sizes on one model."""
    gradients = token_gradients(model, examples)
    flat = torch.stack([torch.cat([m.flatten() for m in g.values()]) for g in gradients]).double()
    gram = flat @ flat.T
    norms = gram.diagonal().sqrt()
    owner = [i for i, e in enumerate(examples) for _ in range(len(e))]
    generator = torch.Generator().manual_seed(0)
    every = [(i, j) for i in range(len(flat)) for j in range(i) if owner[i] != owner[j]]
    some = torch.randperm(len(every), generator=generator)[:PAIRS].tolist()
    groups = {
        "other sequence": [every[i] for i in some],
        "itself": [(i, i) for i in range(0, len(flat), len(flat) // (PAIRS // 3))],
    }
    cosine = gram / norms[:, None] / norms[None]
    ranks = [
        (
            m.square().sum() ** 2 / (m.T @ m).square().sum(),
            (torch.linalg.svdvals(m)[0] ** 2) / m.square().sum(),
        )
        for g in gradients[:: len(gradients) // 8]
        for n, m in g.items()
        if m.shape[1] > 1 and "embed" not in n and "lm_head" not in n and bool(m.any())
    ]
    result: dict = {
        "parameters": model.num_parameters(),
        "tokens": len(flat),
        "rms_cosine": float(cosine[tuple(zip(*every, strict=True))].square().mean().sqrt()),
        "effective_rank": float(torch.stack([r for r, _ in ranks]).median()),
        "share_of_rank_one": float(torch.stack([s for _, s in ranks]).median()),
        "kinds": {},
    }
    result["truncated"] = truncated(gradients, gram, norms, groups)
    print(json.dumps(result), flush=True)
    theory = Theory(gradients)
    for label, sizes in SIZES.items():
        kind, _, more = label.partition(", rank ")
        rows = []
        for k in sizes:
            start = time.perf_counter()
            sketch = lddyn.Sketch(kind, k=k, rank=int(more or 1))
            layout = choose_layout(model, examples, sketch)
            wide = Layout(replace(sketch, k=k * SEEDS, repeats=REPEATS * SEEDS), layout.parts)
            feats = lddyn.features(model, examples, layout=wide)
            samples = wide.samples(feats.rows, feats.rows).double()
            samples = samples.view(SEEDS, REPEATS, len(flat), len(flat))
            estimate = lddyn.Estimate(samples.mean(1), samples.std(1) / REPEATS**0.5, REPEATS)
            low, high = estimate.interval()
            row: dict = {"k": k, "numbers": layout.width}
            for name, pairs in groups.items():
                i, j = (torch.tensor(x) for x in zip(*pairs, strict=True))
                scale = norms[i] * norms[j]
                error = (estimate.value - gram)[:, i, j] / scale
                said = estimate.stderr[:, i, j] / scale
                held = (low <= gram) & (gram <= high)
                predicted = torch.tensor([theory.variance(layout, *p) for p in pairs]).double()
                row[name] = {
                    "error": float(error.square().mean().sqrt()),
                    "stated": float(said.square().mean().sqrt()),
                    "theory": float((predicted / scale.square()).mean().sqrt()),
                    "held": float(held[:, i, j].double().mean()),
                }
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            print(label, json.dumps(row), flush=True)
        result["kinds"][label] = rows
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--out", default="benchmarks/results/sketches.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"repeats": REPEATS, "seeds": SEEDS, "models": {}}
    if args.model and args.data and Path(args.model).exists() and Path(args.data).exists():
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        rows = (lddyn.encode_row(tokenizer, r, ["chosen"]) for r in lddyn.rows(args.data, limit=60))
        short = [cut(r["chosen"]) for r in rows if len(r["chosen"].prompt_ids) <= LONGEST]
        first = lddyn.encode_row(tokenizer, next(iter(lddyn.rows(args.data, limit=1))), ["chosen"])
        result["cost"] = cost(model, first["chosen"])
        print(result["cost"], flush=True)
        result["models"]["dialogue"] = measure(model, short[:SEQUENCES])
    else:
        print("SKIPPED: the trained model or its data is not here; give --model and --data")
    from lddyn.demo.world import build_world

    world = build_world(progress=False)
    pairs = world.preference_pairs[: 2 * SEQUENCES : 2]
    examples = [cut(lddyn.encode(world.tokenizer, p["prompt"], p["chosen"])) for p in pairs]
    result["models"]["demo"] = measure(world.model.eval(), examples)
    record(args.out, "sketches", result)


if __name__ == "__main__":
    main()
