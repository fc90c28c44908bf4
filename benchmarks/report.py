"""Renders benchmarks/results/*.json: tables into the README and docs/, plots beside the results.

python benchmarks/report.py                 # rewrites each page between its markers
python benchmarks/report.py --check         # fails if a page is not what the results say
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "concepts",
            "performance",
            "kernels",
            "operator",
            "sketches",
            "backend",
            "plan",
            "diagnose",
            "report",
            "store",
            "streaming",
            "peers",
            "versions",
        )
    ),
]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def made_by(section: dict) -> str:
    """Where a section's numbers come from."""
    m = section["made_by"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['device']}; Python {m['python']}, torch "
        f"{m['torch']}, transformers {m['transformers']}; commit {m['commit']}, {m['date']}"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2g} ms"


def megabytes(value: float) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:,.0f} MB"


def influence(section: dict) -> str:
    """Time and memory of one exact influence table, by method."""
    result = section["result"]
    sizes = result["sizes"]
    rows = []
    for name, row in sorted(result["methods"].items(), key=lambda i: i[1].get("seconds", 1e9)):
        if "error" in row:
            rows.append([name, "–", "–", "–", "–", row["error"].replace("|", "/")[:80]])
            continue
        covers = row.get("covers", "all")
        rows.append(
            [
                name,
                duration(row["seconds"]),
                f"{row['times_lddyn']:.1f}×",
                megabytes(row["peak_bytes"]),
                f"{row['memory_over_lddyn']:.1f}×",
                f"{row['relative_difference']:.0e}" + ("" if covers == "all" else f" ({covers})"),
            ]
        )
    best = result["methods"]["lddyn"]
    memory = (
        f" Its peak memory is **{result['over_least_bytes']:.2f}×** the "
        f"{megabytes(result['least_bytes'])} of its inputs and one block's factors."
        if "least_bytes" in result
        else ""
    )
    rate = best.get("product_flops_per_second")
    faster = (
        f" (Its products with weights run at {rate / 1e9:.0f} GFLOP/s, by oneDNN: of that it is "
        f"{best['seconds'] * rate / best['planned_flops']:.2f}×.)"
        if rate
        else ""
    )
    truth = f" Differences are to {result['truth']}." if "truth" in result else ""
    return (
        f"d = {sizes['hidden']}, {sizes['layers']} layers, T = {sizes['length']}, M = L = "
        f"{sizes['response']}, V = {sizes['vocabulary']:,}, float32, {result['threads']} thread"
        f"{'s' if result['threads'] > 1 else ''}"
        f"{'; one sequence on both sides' if result.get('self') else ''}.{truth}\n\n"
        + table(["method", "time", "/ lddyn", "peak memory", "/ lddyn", "difference"], rows)
        + f"\n\nAgainst the planner: {best['planned_flops'] / 1e9:.3g} GFLOP at the "
        f"{best['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s of a matrix product measured in the "
        f"same process is {duration(result['planned_seconds'])}; lddyn takes "
        f"**{result['over_plan']:.2f}×** that.{faster}{memory}\n\n<sub>{made_by(section)}</sub>"
    )


def ops(section: dict) -> str:
    """What each op does, what bounds it, and how close each backend comes; its largest case."""
    result = section["result"]
    backends = ("reference", "cpp", "triton", "cuda")
    rows = []
    for op, about in result["about"].items():
        some = [c for c in result["cases"] if c["op"] == op]
        largest = max(some, key=lambda c: c["seconds"] if c["way"] == "reference" else 0)["case"]
        ways = {c["way"]: c for c in some if c["case"] == largest}
        others = [c for way, c in ways.items() if way not in backends]
        best = min(others, key=lambda c: c["seconds"], default=None)
        rows.append(
            [
                f"`{op}`",
                about.replace("|", "/"),
                largest.replace("torch.", ""),
                ways["reference"]["bound"],
                *(closeness(ways.get(way)) for way in backends),
                f"{best['way']}: {closeness(best)}" if best else "–",
            ]
        )
    header = ["op", "what it does", "case", "bound", *backends, "best opponent"]
    return (
        "The slowest case of each op: median time, and the share of the ceiling (FLOP/s of a "
        "square product, or bytes/s of a copy) measured in the same run. ✗: further from float64 "
        "than twice plain torch. All cases are in the results file.\n\n"
        f"{table(header, rows)}\n\n<sub>{made_by(section)}</sub>"
    )


def closeness(case: dict | None) -> str:
    """Time and share of the ceiling of one measured case."""
    if case is None:
        return "–"
    wrong = "" if case["match"] else " ✗"
    return f"{duration(case['seconds'])}, {case['percent_of_ceiling']:.0f} %{wrong}"


def peers(section: dict) -> str:
    """Grams of other libraries: time, memory, what is kept, errors; and position gradients."""
    result, sizes = section["result"], section["result"]["sizes"]
    titles = {
        "tokens": f"(a) {sizes['length']} loss tokens of one sequence",
        "sequences": f"(b) {sizes['count']} whole sequences",
    }
    parts = []
    for case in titles:
        content, rows = result["cases"][case], []
        ways = sorted(content["rows"].items(), key=lambda i: i[1].get("seconds", 1e9))
        for name, row in ways:
            if "error" in row:
                rows.append([name, *["–"] * 6, row["error"].replace("|", "/")[:80]])
                continue
            e = row["errors"]
            rows.append(
                [
                    name,
                    duration(row["seconds"]),
                    f"{row.get('times_base', 0):.1f}×",
                    megabytes(row["peak_bytes"]),
                    small_bytes(row["stored_bytes"] / sizes["count"]),
                    *(f"{e[k]:.2g}" if e[k] > 1e-4 else "exact" for k in ("full", "cover_scaled")),
                    row["covers"],
                ]
            )
        base = "lddyn" if case == "tokens" else "torch"
        header = [
            "method",
            "CPU time",
            f"/ {base}",
            "peak",
            "kept a row",
            "error",
            "of its share, rescaled",
            "parameters",
        ]
        cannot = "; ".join(f"{k}: {v}" for k, v in content["cannot"].items())
        parts.append(f"**{titles[case]}**\n\n{table(header, rows)}\n\nNot here: {cannot}.")
    for letter, case in zip("ab", titles, strict=True):
        ways = {n: r for n, r in result["cases"][case]["rows"].items() if "seconds" in r}
        exact = {n for n, r in ways.items() if r["errors"]["cover"] < 1e-4}
        ours = {n for n in ways if n.startswith("lddyn")}
        others = {n for n in ways if not n.startswith(("lddyn", "torch,"))}
        for kind, some in (("sketch", others - exact), ("exact Gram", others & exact)):
            # Of loss tokens lddyn's exact Gram is put against sketches, too.
            mine = ours - exact if kind == "sketch" and case == "sequences" else ours & exact
            if not some or not mine:
                continue
            time = {n: r["seconds"] for n, r in ways.items()}
            name, best = min(some, key=time.__getitem__), min(mine, key=time.__getitem__)
            error, theirs = ways[best]["errors"]["full"], ways[name]["errors"]
            parts.append(
                f"({letter}) The fastest {kind} of a library is {name}: "
                f"**{time[name] / time[best]:.1f}×** the time of {best} "
                f"({f'error {error:.2g}' if error > 1e-4 else 'exact'}); error "
                f"{theirs['full']:.2g} over all, {theirs['cover_scaled']:.2g} over its own "
                "parameters at the best scale."
            )
    c, peer = result["positions"], result["positions"].get("peer", {})
    cosine = c["cosine_of_same_token"]
    told = (
        f" bergson's own per-token Gram is that of the positions (to "
        f"{peer['error_as_positions']:.0e}) and {peer['errors']['cover']:.2f} off that of the "
        "loss tokens, over the parameters it sees."
        if "error_as_positions" in peer
        else ""
    )
    parts.append(
        f"**(c) position gradients**: their Gram is {c['gram_error']:.2f} off that of the loss "
        f"tokens, {c['gram_error_scaled']:.2f} at the best scale; correlation off the diagonal "
        f"{c['off_diagonal_correlation']:.2f}; cosine between the two gradients of a token "
        f"{cosine['least']:.2f} to {cosine['largest']:.2f}, median {cosine['median']:.2f}.{told}"
    )
    names = {n: v for found in result["versions"].values() for n, v in found.items()}
    common = ("python", "torch", "transformers", "lddyn")
    used = ", ".join(f"{n} {v}" for n, v in sorted(names.items()) if n not in common)
    return "\n\n".join([*parts, f"<sub>{used}. {made_by(section)}</sub>"])


def small_bytes(value: float) -> str:
    """Bytes in the unit that fits."""
    if value >= 1e6:
        return f"{value / 1e6:.1f} MB"
    return f"{value / 1e3:.1f} kB" if value else "–"


def scaling(section: dict) -> str:
    """Time and memory as one size changes."""
    points = section["result"]
    names = {"response": "M = L", "length": "T", "vocabulary": "V", "layers": "layers"}
    rows = []
    for key, title in names.items():
        some = [p for p in points if p["varied"] == key and "seconds" in p]
        rows.append(
            [
                title,
                " / ".join(f"{p['value']:,}" for p in some),
                " / ".join(f"{p['seconds']:.2g}" for p in some) + " s",
                " / ".join(f"{p['peak_bytes'] / 1e6:.0f}" for p in some) + " MB",
            ]
        )
    text = table(["varied", "values", "time", "peak memory"], rows)
    return (
        "Base: d = 256, 4 layers, T = 128, M = L = 32, V = 8,192, one thread. Plot: "
        "[`benchmarks/results/scaling.png`](../benchmarks/results/scaling.png).\n\n"
        f"{text}\n\n<sub>{made_by(section)}</sub>"
    )


def exactness(section: dict) -> str:
    """Largest errors by architecture."""
    points = section["result"]
    rows = []
    for name in dict.fromkeys(p["model"] for p in points):
        some = [p for p in points if p["model"] == name]

        def worst(key: str, some=some) -> str:
            return f"{max(p[key] for p in some):.1e}"

        rows.append(
            [
                name,
                worst("influence"),
                worst("pushed"),
                worst("delta_log_probs"),
                worst("bfloat16"),
                worst("bfloat16, plain torch"),
                f"{100 * min(p['covered'] for p in some):.0f} %",
            ]
        )
    header = [
        "architecture",
        "influence",
        "pushed Gram",
        "delta_log_probs",
        "bfloat16",
        "bfloat16, plain torch",
        "ledger",
    ]
    return (
        "Largest error over tied and untied, lddyn's and eager attention, with and without LoRA, "
        "against an explicit Jacobian in true float64, normalised by ‖a_m‖‖b_l‖ "
        "(`delta_log_probs`: by its largest entry).\n\n"
        + table(header, rows)
        + f"\n\n<sub>{made_by(section)}</sub>"
    )


def orders(section: dict) -> str:
    """Slopes of the error against real steps."""
    points = section["result"]
    rows = []
    for name in dict.fromkeys((p["optimizer"], p["objective"]) for p in points):
        some = {p["rule"]: p for p in points if (p["optimizer"], p["objective"]) == name}
        rows.append([*name, *(f"{some[r]['slope']:.3f}" for r in ("start", "midpoint", "simpson"))])
    return (
        "Log-log slope of ‖measured − predicted‖ against the learning rate, six step sizes, real "
        "optimizer steps in true float64 from a state with history. In parentheses: the slope that "
        "each rule should have.\n\n"
        + table(["optimizer", "objective", "start (2)", "midpoint (3)", "simpson (5)"], rows)
        + f"\n\n<sub>{made_by(section)}</sub>"
    )


def dialogue(section: dict) -> str:
    """One DPO step on a real pair: predicted against measured."""
    result = section["result"]
    step = next(s for s in result["steps"] if s["rule"] == "midpoint" and s["optimizer"] == "sgd")
    rows = [
        [
            f"`{r['name']}`",
            str(r["tokens"]),
            f"{r['logp']:.2f}",
            f"{r['y+']:+.4f}",
            f"{r['y-']:+.4f}",
            f"{r['predicted']:+.5f}",
            f"{r['measured']:+.5f}",
        ]
        for r in step["responses"]
    ]
    checks = "; ".join(
        f"{s['optimizer']} by {s['rule']} at lr {s['lr']:g}: relative error "
        f"{s['relative_error']:.0e}, slope {s['slope']:.2f} (expected {s['expected']})"
        for s in result["steps"]
    )
    header = ["response", "tokens", "log π", "from y+", "from y−", "predicted Δ", "measured Δ"]
    return (
        f"Nats, lr {step['lr']:g}, β = 0.1, plain SGD.\n\n{table(header, rows)}\n\n{checks}; "
        f"{step['seconds']:.0f} s for {sum(r['tokens'] for r in step['responses'])} observed and "
        f"{sum(r['tokens'] for r in step['responses'][:2])} update tokens.\n\n"
        f"<sub>{made_by(section)}</sub>"
    )


def store(section: dict) -> str:
    """What kills and damage did to a store, and how fast it is."""
    result = section["result"]
    killed, damaged, speed = result["killed"], result["damaged"], result["speed"]
    files = "bit-identical" if killed["bit_identical"] else "**different**"
    rows = [
        [
            f"{killed['tokens']:,} tokens, writer killed {killed['kills']} times and resumed",
            f"{killed['lost']} lost, {killed['duplicated']} duplicated; {killed['shards']} shards, "
            f"journal and manifest {files} to those of an uninterrupted run",
        ],
        [
            f"{damaged['files']:,} stores damaged in {len(damaged['kinds'])} ways, opened and read",
            f"{damaged['silently_wrong']} silently wrong, {damaged['crashes']} crashes; "
            f"{damaged['refused']:,} refused, {damaged['right']:,} read in full all the same",
        ],
        ["append, flush (synced to disk)", f"{speed['write_gib_per_second']:.2f} GiB/s"],
        ["verify every byte", f"{speed['verify_gib_per_second']:.1f} GiB/s"],
        [
            f"{speed['queries']} tokens against {killed['tokens']:,} of width {result['width']}, "
            f"top {speed['k']}",
            duration(speed["query_seconds"]),
        ],
    ]
    return table(["what", "measured"], rows) + f"\n\n<sub>{made_by(section)}</sub>"


def lowrank(section: dict) -> str:
    """Spectra, ranks that predict, cover of the norms, and the paper's bound beside the norm."""
    result = section["result"]
    pairs = result["pairs"]
    ranks = next(iter(pairs.values()))["spectrum"]["ranks"]
    shares = [
        [f"{name}, {what}", *(f"{100 * x:.0f} %" for x in pair["spectrum"][key])]
        for name, pair in pairs.items()
        for key, what in (("block", "one token pair (median)"), ("whole", "all pairs together"))
    ]
    errors = [
        [f"{name}, {way}", *(f"{100 * e:.2g} %" if e > 1e-4 else f"{e:.0e}" for e in row)]
        for name, pair in pairs.items()
        for way, row in pair["prediction"]["errors"].items()
        if len(row) == len(ranks)
    ]
    cover = [
        [
            name,
            str(c["directions"]),
            str(c["probes"]),
            f"{100 * c['error']:.1f} %",
            f"{100 * c['stated']:.1f} %",
            f"{100 * c['coverage']:.1f} %",
        ]
        for name, pair in pairs.items()
        for c in pair["coverage"]
    ]
    steps = [
        [
            name,
            f"{p['step']['norm']:.2e} ± {p['step']['norm_stderr']:.0e}",
            f"{p['step']['lower_bound']:.0f}",
            f"{p['step']['sign_delta']:+.4f}",
        ]
        for name, p in pairs.items()
    ]
    seeds = next(iter(pairs.values()))["coverage"][0]["seeds"]
    return (
        f"A trained Llama of {result['parameters'] / 1e6:.1f} M parameters (d = 192, V = 2,048), "
        f"M = L = {result['tokens']}: a response with itself, with its rejected alternative, with "
        "another prompt's.\n\nShare of ‖F‖² (centred, below the head) in the leading singular "
        f"directions:\n\n{table(['χu, spectrum of', *map(str, ranks)], shares)}\n\n"
        "Relative error of the predicted Δ log π (M x V) of an SFT step, by rank; the head is "
        f"exact:\n\n{table(['χu, form', *map(str, ranks)], errors)}\n\n"
        f"`frobenius`, {seeds:,} seeds: root-mean-square error, stated error, and how often the "
        "95 % interval holds the truth:\n\n"
        + table(["χu", "r", "q", "error", "stated", "held"], cover)
        + "\n\nThe paper's lower bound √LBK / lr from a real SGD step (lr 1e-4), beside the norm "
        "of the whole kernel that it bounds:\n\n"
        + table(["χu", "‖Π K Π‖_F", "√LBK / lr", "SignDelta, nats"], steps)
        + f"\n\n<sub>{made_by(section)}</sub>"
    )


def norms_large(section: dict) -> str:
    """Cost of all block norms at a large vocabulary."""
    r = section["result"]
    return (
        f"`frobenius()` of all {r['tokens']} x {r['tokens']} token pairs at V = "
        f"{r['vocabulary']:,} (random Llama, d = {r['hidden']}, {r['layers']} layers, T = "
        f"{r['length']}, memory = {r['memory']}), to a relative standard error of at most "
        f"{100 * r['error']:.1f} %: **{duration(r['seconds'])}** on one thread, "
        f"**{megabytes(r['peak_bytes'])}** over the loaded model and traces. Dense, the kernel "
        f"would take {r['dense_bytes'] / 1e12:.0f} TB.\n\n<sub>{made_by(section)}</sub>"
    )


def sketches(section: dict) -> str:
    """Errors of sketches by kind and size, measured, stated and predicted."""
    result, text = section["result"], []
    for name, found in result["models"].items():
        rows = []
        for kind, sizes in found["kinds"].items():
            for row in sizes:
                cells = [kind, f"{row['k']:,}", f"{row['numbers']:,}"]
                for group in ("other sequence", "itself"):
                    r = row[group]
                    cells += [f"{100 * r[x]:.2g} %" for x in ("error", "stated", "theory")]
                    cells.append(f"{100 * r['held']:.0f} %")
                rows.append(cells)
        cut = [
            [
                str(r["rank"]),
                f"{r['numbers']:,}",
                *(f"{100 * r[g]:.2g} %" for g in ("other sequence", "itself")),
            ]
            for r in found["truncated"]
        ]
        header = [
            "kind",
            "k",
            "numbers a token",
            "error",
            "stated",
            "theory",
            "held",
            "itself",
            "stated",
            "theory",
            "held",
        ]
        text.append(
            f"**{MODELS[name]}**, {found['parameters']:,} parameters, {found['tokens']} tokens. "
            f"Two tokens of different sequences: rms cosine {found['rms_cosine']:.3f}. One token's "
            f"gradient of one weight: effective rank {found['effective_rank']:.2f}, "
            f"{100 * found['share_of_rank_one']:.0f} % of its square in one direction "
            "(medians).\n\n"
            + table(header, rows)
            + "\n\nLow-rank forms alone (embedding and head exact and not counted), biased:\n\n"
            + table(["rank", "numbers a token", "other sequence", "itself"], cut)
        )
    costs = ""
    if "cost" in result:
        c = result["cost"]
        pull = c["seconds"].pop("pullback")
        each = ", ".join(f"{n} {s / pull:.2f}×" for n, s in c["seconds"].items())
        costs = (
            "\n\nTime of features at k = 4,096 over that of the pullback alone "
            f"({duration(pull)} for {c['tokens']} tokens of a sequence of {c['length']}, one "
            f"thread): {each}."
        )
    return (
        f"R = {result['repeats']}, {result['seeds']} seeds; root-mean-square over token pairs, in "
        "units of ‖a‖‖b‖: two tokens of different sequences, then a token with itself. *held*: how "
        "often the 95 % interval held the truth.\n\n"
        + "\n\n".join(text)
        + costs
        + f"\n\n<sub>{made_by(section)}</sub>"
    )


def planner(section: dict) -> str:
    """Errors that the planner expects of the sketches it proposes, and the measured ones."""
    rows = [
        [
            str(r["sequences"]),
            f"{r['tokens']:,}",
            r["kind"],
            f"{100 * r['rtol']:.0f} %",
            f"{r['k']:,}",
            f"{100 * r['expected']:.1f} %",
            f"{100 * r['measured']:.1f} %",
            f"{r['measured'] / r['expected']:.2f}",
        ]
        for r in section["result"]
    ]
    header = ["sequences", "tokens", "kind", "wanted", "k", "expected", "measured", "ratio"]
    return table(header, rows) + f"\n\n<sub>{made_by(section)}</sub>"


def correlations(result: dict) -> str:
    """Scores that vary, with their rank correlations."""
    rows = [
        [f"`{c['score']}`", f"{c['rho']:+.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]
        for c in result["correlations"]
        if not math.isnan(c["rho"]) and c["low"] < c["high"]
    ]
    return table(["score", "ρ", "95 %"], rows)


def one_step(section: dict) -> str:
    """A real step against the diagnosis."""
    r = section["result"]
    return (
        f"{r['pairs']} pairs, DPO with β = {r['beta']:g}, lr = {r['lr']:g}. Predicted and measured "
        f"Δ log π differ by {r['error_chosen']:.2%} for y+ and {r['error_rejected']:.2%} for y−; "
        f"y+ rises in {r['chosen_rise']}. Spearman's correlation with the measured Δ log π(y+), "
        f"intervals by bootstrap over pairs:\n\n{correlations(r)}\n\n<sub>{made_by(section)}</sub>"
    )


LEFT_OUT = {
    "none": "all pairs",
    "random": "without {} random pairs",
    "worst by a step": "without the {} most harmful pairs (score of one step)",
    "worst by the run": "without the {} most harmful pairs (score of the run)",
    "reweighted": "all pairs, weighted by the diagnosis",
    "reweighted at random": "all pairs, the same weights at random",
}


def dropped_pairs(section: dict) -> str:
    """What DPO did to the chosen responses, with and without the pairs a diagnosis names."""
    r = section["result"]
    header = [
        "trained on",
        "mean Δ log π(y+), nats",
        "lowest",
        "highest",
        "predicted",
        "y+ that fall",
        "mean Δ log π(y−)",
        "margins that grow",
    ]
    rows = []
    for name, label in LEFT_OUT.items():
        runs = [run[name] for run in r["runs"]]
        values = [run["chosen"] for run in runs]
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        shown = (mean["chosen"], min(values), max(values))
        rows.append(
            [
                label.format(r["dropped"]),
                *(f"{x:+.2f}" for x in shown),
                f"{mean['predicted']:+.2f}",
                f"{mean['fall'] / r['pairs']:.0%}",
                f"{mean['rejected']:+.1f}",
                f"{mean['preferred']:.0%}",
            ]
        )
    count, before = len(r["runs"]), r["log_prob_before"]
    controls = {
        "worst by a step": "random",
        "worst by the run": "random",
        "reweighted": "reweighted at random",
    }
    wins = [
        f"{LEFT_OUT[name].format(r['dropped'])}: "
        f"{sum(run[name]['chosen'] > run[control]['chosen'] for run in r['runs'])}"
        for name, control in controls.items()
    ]
    everything = sum(run["none"]["chosen"] for run in r["runs"]) / count
    lines = [
        f"{r['pairs']} pairs, log π(y+) {before[0]:.1f} and log π(y−) {before[1]:.1f} after "
        f"{r['sft_epochs']} epochs of SFT; then {r['epochs']} epochs of DPO, β = {r['beta']:g}, "
        f"AdamW, lr {r['lr']:g}, {count} orders of the data, each with other random pairs:",
        table(header, rows),
        f"Runs of {count} in which the chosen responses end higher than with the same done to "
        f"random pairs: {'; '.join(wins)}. Predicted for all pairs: {r['predicted'][0]:+.2f} nats "
        f"through the softmax and {r['linear'][0]:+.2f} in a linear model; measured "
        f"{everything:+.2f}.",
        "Spearman's correlation with the measured change of log π(y+), mean over the orders; "
        "scores taken before DPO, 95 % intervals by bootstrap over pairs:",
        correlations(r),
        f"<sub>{made_by(section)}</sub>",
    ]
    return "\n\n".join(lines)


def dropped_trl(section: dict) -> str:
    """The same by TRL and by the command, as a user would."""
    r = section["result"]
    labels = {"none": "all pairs", "random": "{} random left out", "named": "{} named left out"}
    rows = []
    for name, label in labels.items():
        runs = [run[name] for run in r["runs"]]
        chosen = [run["chosen"] for run in runs]
        rows.append(
            [
                label.format(r["dropped"]),
                f"{sum(chosen) / len(runs):+.2f} ({min(chosen):+.2f} to {max(chosen):+.2f})",
                f"{sum(run['fall'] for run in runs) / len(runs) / r['pairs']:.0%}",
                f"{sum(run['rejected'] for run in runs) / len(runs):+.1f}",
            ]
        )
    wins = sum(run["named"]["chosen"] > run["random"]["chosen"] for run in r["runs"])
    header = ["DPOTrainer on", "mean Δ log π(y+), nats", "y+ that fall", "mean Δ log π(y−)"]
    return (
        f"{r['pairs']} pairs that no other run here reads; TRL {r['trl']}: SFTTrainer, then "
        f"DPOTrainer for {r['epochs']} epochs, lr {r['lr']:g} falling to 0, β = {r['beta']:g}; "
        f"{len(r['runs'])} seeds, each with other random pairs:\n\n{table(header, rows)}\n\n"
        f"Without the named pairs the chosen responses end higher than without random ones in "
        f"{wins} of {len(r['runs'])} runs.\n\n<sub>{made_by(section)}</sub>"
    )


def dropped_pairs_in_short(section: dict) -> str:
    """The same for the README."""
    r = section["result"]
    rows = []
    for name, label in LEFT_OUT.items():
        values = [run[name]["chosen"] for run in r["runs"]]
        mean = sum(values) / len(values)
        rows.append(
            [label.format(r["dropped"]), f"{mean:+.2f} ({min(values):+.2f} to {max(values):+.2f})"]
        )
    found = {row["score"]: row for row in r["correlations"]}
    first, ches = found["run_chosen"], found["ches"]
    header = ["DPO on", f"mean Δ log π(y+), nats ({len(r['runs'])} orders of the data)"]
    return (
        f"{table(header, rows)}\n\n"
        f"Rank correlation of the predicted with the measured Δ log π(y+) of {r['pairs']} pairs, "
        f"after {r['epochs']} epochs of AdamW: **{first['rho']:.2f}** ({first['low']:.2f} to "
        f"{first['high']:.2f}). Of the literature's scores CHES is the best on this set, with "
        f"{ches['rho']:.2f}: chosen responses with a high CHES fall.\n\n"
        f"<sub>{made_by(section)}</sub>"
    )


SHOWN = ("The answer", "The step", "The planned run", "The pairs", "Other losses")


def diagnosed(section: dict) -> str:
    """Five lines that `lddyn diagnose` printed."""
    r = section["result"]
    lines = [line for line in r["lines"] if line.startswith(tuple(f"{name}: " for name in SHOWN))]
    shown = "\n".join(lines)
    return (
        f"```\n{shown}\n```\n\n"
        f"<sub>{len(lines)} of the lines that it printed for {r['pairs']} pairs of Anthropic's HH "
        f"dialogues (helpful) and a Llama of {r['parameters'] / 1e6:.1f} million parameters after "
        f"SFT on them (`benchmarks/diagnosed.py`); {made_by(section)}</sub>"
    )


def kernel_methods(section: dict) -> str:
    """What features predict for responses that were not trained on."""
    r = section["result"]
    total, each = r["ways"]["total"], r["ways"]["per token"]
    rows = [
        [
            name,
            *(
                f"{c['rho']:.2f} ({c['low']:.2f} to {c['high']:.2f})"
                for c in (total[name], each[name])
            ),
        ]
        for name in sorted(total, key=lambda n: -total[n]["rho"])
    ]
    header = ["way", "Δ log π", "Δ log π per token"]
    return (
        f"{r['learned']} pairs learned by {r['epochs']} epochs of DPO, after SFT; {r['responses']} "
        f"chosen and rejected responses to other prompts, Δ log π {r['mean']:+.1f} ± {r['sd']:.1f} "
        f"nats, mean of {r['seeds']} orders of the data (their correlation "
        f"{r['between_orders']:.2f}). Spearman's correlation of the prediction with what was "
        f"measured, 95 % intervals by bootstrap over prompts:\n\n{table(header, rows)}"
        f"\n\n<sub>{made_by(section)}</sub>"
    )


def reported(section: dict) -> str:
    """A watched run, diagnosed on its way, against the rest of it."""
    r = section["result"]
    rows = r["correlations"][:6]
    best = ", ".join(f"`{c['score']}` {c['rho']:+.2f}" for c in rows)
    sizes = {count: f"{size / 1e6:.2g} MB" for count, size in r["bytes"].items()}
    small, large = sorted(sizes, key=int)
    return (
        f"{r['pairs']} pairs, {r['steps']} steps of TRL's DPO after SFT, AdamW, β = {r['beta']:g}; "
        f"diagnosed at step {r['checkpoint']}. A small step was predicted to lower log π(y+) of "
        f"{r['chosen_falls']:.0%}; the rest of the run lowered it in {r['measured_falls']:.0%}, by "
        f"{-r['measured'][0]:.2f} nats on average. Spearman's correlation of scores with that: "
        f"{best}. The page of {small} pairs with three steps has {sizes[small]}, that of "
        f"{large} pairs without them {sizes[large]}.\n\n"
        f"<sub>{made_by(section)}</sub>"
    )


def attribution(section: dict) -> str:
    """Linear datamodeling scores of lddyn's features and of a library's own, by that library."""
    r = section["result"]
    rows = [
        [name, f"{c['lds']:.2f}", f"{c['low']:.2f} to {c['high']:.2f}"]
        for name, c in sorted(r["ways"].items(), key=lambda item: -item[1]["lds"])
    ]
    return (
        f"SFT on {r['halves']} random halves of {r['train']} responses; {r['test']} responses to "
        f"other prompts. {r['numbers']['lddyn']:,} numbers a row of lddyn's, "
        f"{r['numbers']['LoGra']:,} of LoGra's. Mean LDS, 95 % intervals by bootstrap over "
        "the responses:\n\n"
        f"{table(['scores', 'LDS', '95 %'], rows)}\n\n<sub>{made_by(section)}</sub>"
    )


def objectives(section: dict) -> str:
    """Runs on several losses, predicted and measured."""
    r = section["result"]
    rows = [
        [
            f"`{x['objective']}`",
            *(
                f"{v:+.1f}"
                for pair in zip(x["predicted"], x["measured"], strict=True)
                for v in pair
            ),
            f"{x['fall']:.0%}",
            f"{x['rho']:+.2f} ({x['low']:+.2f} to {x['high']:+.2f})" if "rho" in x else "–",
        ]
        for x in r["rows"]
    ]
    header = [
        "loss",
        "y+ predicted",
        "y+ measured",
        "y− predicted",
        "y− measured",
        "y+ that fall",
        "ρ over pairs, y+",
    ]
    orders = "one order" if r["seeds"] == 1 else f"mean over {r['seeds']} orders"
    return (
        f"{r['pairs']} pairs as above, {r['epochs']} epochs, lr {r['lr']:g}, {orders} of the data, "
        "default parameters, means over pairs, nats; `extend` is SFT on both responses for as "
        f"long, then DPO:\n\n{table(header, rows)}\n\n<sub>{made_by(section)}</sub>"
    )


def streaming(section: dict) -> str:
    """A model on disk against the same model in memory."""
    r = section["result"]
    sizes = r["sizes"]
    rows = []
    for name, row in r["ways"].items():
        rows.append(
            [
                name,
                duration(row["seconds"]),
                f"{row['seconds_over_in_memory']:.2f}×",
                f"{row['processor_seconds_over_in_memory']:.2f}×",
                megabytes(row["weights_resident_bytes"]),
                megabytes(row["peak_bytes"]),
                f"{row['bytes_read'] / 1e9:.1f} GB" if "bytes_read" in row else "–",
                "–"
                if name == "in memory"
                else "to the bit"
                if row["equal"]
                else f"{row['largest_difference']:.0e}",
            ]
        )
    some = r["ways"]["streamed"]
    header = [
        "way",
        "time",
        "/ in memory",
        "processor time",
        "parameters held",
        "peak",
        "read",
        "table equal",
    ]
    threads = "one thread" if r["threads"] == 1 else f"{r['threads']} threads"
    return (
        f"Random Llama, d = {sizes['hidden']}, {sizes['layers']} layers, V = "
        f"{sizes['vocabulary']:,}, float32: {megabytes(r['weight_bytes'])} in {r['shards']} files, "
        f"**{r['weights_over_budget']:.1f}×** the budget of {megabytes(r['budget_bytes'])} "
        f"({megabytes(some['outside_blocks_bytes'])} outside the blocks and {some['slots']} slots "
        f"of {megabytes(some['slot_bytes'])}). T = {sizes['length']}, M = L = {sizes['response']}, "
        f"{threads}, fastest of {r['rounds']} rounds.\n\n{table(header, rows)}\n\n"
        f"<sub>{made_by(section)}</sub>"
    )


MODELS = {"dialogue": "Llama trained on dialogues", "demo": "The demo's language model"}


def versions(section: dict) -> str:
    """Which versions the tests ran under, and what they said."""
    shown = ("torch", "transformers", "trl", "peft", "accelerate", "triton")
    lines, wrong = [], []
    for name, row in section["rows"].items():
        packages = [row["packages"][p].replace("not installed", "–") for p in shown]
        lines.append(
            [
                name,
                row["python"],
                *packages,
                f"{row['passed']:,}" + ("" if row["whole"] else ", then stopped"),
                str(len(row["failed"])),
                f"{row['skipped']:,}",
                "passed" if row["selftest"] else "FAILED",
                row["commit"],
                row["date"],
            ]
        )
        wrong += [f"- {name}: `{test}`" for test in row["failed"]]
    header = ["row", "Python", *shown, "passed", "failed", "skipped", "self-test", "commit", "date"]
    files = ", ".join(section["tests"])
    about = f"Test files: {files}; without tests whose names match `{section['left_out']}`."
    failures = "\n\nFailed:\n\n" + "\n".join(wrong) if wrong else ""
    return f"{table(header, lines)}{failures}\n\n{about}"


SECTIONS = {
    "sketches": sketches,
    "planner": planner,
    "one step": one_step,
    "objectives": objectives,
    "diagnosed": diagnosed,
    "dropped pairs": dropped_pairs,
    "dropped pairs, TRL": dropped_trl,
    "attribution": attribution,
    "kernel methods": kernel_methods,
    "dropped pairs, tuned on": dropped_pairs,
    "reported": reported,
    "streaming": streaming,
    "store": store,
    "dialogue": dialogue,
    "influence": influence,
    "scaling": scaling,
    "peers": peers,
    "peers-trained": peers,
    "exactness": exactness,
    "orders": orders,
    "ops": ops,
    "lowrank": lowrank,
    "norms-large": norms_large,
    "versions": versions,
}


def renderer(name: str):
    """The function that renders a section, or None."""
    return influence if name.startswith("influence-") else SECTIONS.get(name)


IN_README = {"dropped pairs": dropped_pairs_in_short}


def plot_scaling(section: dict, path: Path) -> None:
    """Time and peak memory against each size, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "response": "response tokens M = L",
        "length": "sequence length T",
        "vocabulary": "vocabulary V",
        "layers": "layers",
    }
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained", sharey="row")
    for column, (key, title) in enumerate(titles.items()):
        some = [p for p in section["result"] if p["varied"] == key and "seconds" in p]
        x = [p["value"] for p in some]
        for row, (label, values) in enumerate(
            (
                ("seconds", [p["seconds"] for p in some]),
                ("peak memory, MB", [p["peak_bytes"] / 1e6 for p in some]),
            )
        ):
            axis = axes[row, column]
            axis.loglog(x, values, "o-", color="#0b6e99", lw=2)
            guide = [values[0] * v / x[0] for v in x]
            axis.loglog(x, guide, ":", color="0.6", lw=1, label="linear")
            axis.set_xticks(x, [f"{v:,}" for v in x])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            if column == 0:
                axis.set_ylabel(label)
            if row == 0:
                axis.set_title(title, fontsize=11)
            else:
                axis.set_xlabel(title)
    axes[0, 0].legend(frameon=False)
    figure.suptitle("Exact influence table: cost as one size grows (others fixed)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_sketches(section: dict, path: Path) -> None:
    """Error against numbers a token: measured (dots), predicted (lines)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = section["result"]["models"]
    figure, axes = plt.subplots(
        len(models), 2, figsize=(11, 4.2 * len(models)), layout="constrained", squeeze=False
    )
    for line, (model, found) in zip(axes, models.items(), strict=True):
        groups = ("other sequence", "itself")
        titles = ("tokens of different sequences", "a token with itself")
        for axis, group, title in zip(line, groups, titles, strict=True):
            for i, (kind, rows) in enumerate(found["kinds"].items()):
                x = [row["numbers"] for row in rows]
                axis.loglog(x, [row[group]["theory"] for row in rows], "-", color=f"C{i}", lw=1.2)
                error = [row[group]["error"] for row in rows]
                axis.loglog(x, error, "o", color=f"C{i}", label=kind, ms=5)
            x = [row["numbers"] for row in found["truncated"]]
            error = [row[group] for row in found["truncated"]]
            axis.loglog(x, error, "x:", color="0.4", label="low rank alone, biased")
            guide = [600, 32000]
            axis.loglog(guide, [n**-0.5 for n in guide], ":", color="0.7", label="1/√numbers")
            if group == "other sequence":
                axis.axhline(found["rms_cosine"], color="0.2", lw=0.8, ls="--")
                axis.annotate(
                    "rms of the truth",
                    (guide[1], found["rms_cosine"]),
                    fontsize=8,
                    ha="right",
                    va="bottom",
                )
            axis.set_title(f"{MODELS[model]}: {title}", fontsize=10)
            axis.set_xlabel("numbers a token")
            axis.grid(alpha=0.25)
        line[0].set_ylabel("error / ‖a‖‖b‖")
    axes[0, 1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_kernel_methods(section: dict, path: Path) -> None:
    """Left: first order against what was measured; right: rank correlations of all ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    r = section["result"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    predicted, measured = zip(*((x / 1000, y) for x, y in r["points"]), strict=True)
    for side, colour, name in ((0, "#1b9e77", "chosen"), (1, "#c05a9e", "rejected")):
        left.plot(
            predicted[side::2], measured[side::2], "o", ms=4, color=colour, label=name, alpha=0.8
        )
    left.set_xlabel("first order: ⟨g, Σ (g+ − g−)⟩ / 1000, over the learned pairs")
    left.set_ylabel("measured Δ log π, nats")
    left.set_title("Responses to prompts that were not learned", fontsize=10, loc="left")
    left.legend(frameon=False)
    total, each = r["ways"]["total"], r["ways"]["per token"]
    names = sorted(total, key=lambda n: total[n]["rho"])
    for kind, shift, shade in ((total, 0.2, 1.0), (each, -0.2, 0.45)):
        for place, name in enumerate(names):
            c, colour = kind[name], "#1f5fa8" if "ridge on" not in name else "0.45"
            right.barh(place + shift, c["rho"], color=colour, height=0.36, alpha=shade)
            right.plot([c["low"], c["high"]], [place + shift] * 2, color="black", lw=1)
    right.set_yticks(range(len(names)), names)
    right.set_xlim(0, 1)
    right.set_xlabel("Spearman's ρ; pale: of the change per token")
    right.set_title("Rank correlation with what was measured", fontsize=10, loc="left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    original = dict(pages)
    for path in sorted(RESULTS.glob("*.json")):
        for name, section in json.loads(path.read_text()).items():
            start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            for page, text in pages.items():
                short = IN_README.get(name) if page.name == "README.md" else None
                render = short or renderer(name)
                if render and start in text:
                    before, rest = text.split(start, 1)
                    after = rest.split(end, 1)[1]
                    pages[page] = f"{before}{start}\n{render(section)}\n{end}{after}"
            if name == "scaling" and not args.check:
                plot_scaling(section, RESULTS / "scaling.png")
            if name == "sketches" and not args.check:
                plot_sketches(section, RESULTS / "sketches.png")
            if name == "kernel methods" and not args.check:
                plot_kernel_methods(section, RESULTS / "kernel-methods.png")
    stale = [page for page in PAGES if pages[page] != original[page]]
    for page in stale:
        if args.check:
            print(
                f"{page.relative_to(ROOT)} is not what benchmarks/results says: "
                "run benchmarks/report.py"
            )
        else:
            page.write_text(pages[page], encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
