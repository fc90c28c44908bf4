"""Renders benchmarks/results/*.json: tables into the README, plots beside the results.

python benchmarks/report.py                 # rewrites README.md between its markers
python benchmarks/report.py --check         # fails if the README is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
        rows.append([
            name, f"{row['seconds']:.1f} s", f"{row['times_lddyn']:.1f}×",
            megabytes(row["peak_bytes"]), f"{row['memory_over_lddyn']:.1f}×",
            f"{row['relative_difference']:.0e}",
        ])  # fmt: skip
    best = result["methods"]["lddyn"]
    return (
        f"d = {sizes['hidden']}, {sizes['layers']} layers, T = {sizes['length']}, M = L = "
        f"{sizes['response']}, V = {sizes['vocabulary']:,}, float32, {result['threads']} thread"
        f"{'s' if result['threads'] > 1 else ''}.\n\n"
        + table(["method", "time", "/ lddyn", "peak memory", "/ lddyn", "difference"], rows)
        + f"\n\nAgainst the planner: {best['planned_flops'] / 1e9:.0f} GFLOP at the "
        f"{best['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s of a matrix product measured in the "
        f"same process is {result['planned_seconds']:.1f} s; lddyn takes "
        f"**{result['over_plan']:.2f}×** that.\n\n<sub>{made_by(section)}</sub>"
    )


def scaling(section: dict) -> str:
    """Time and memory as one size changes."""
    points = section["result"]
    names = {"response": "M = L", "length": "T", "vocabulary": "V", "layers": "layers"}
    rows = []
    for key, title in names.items():
        some = [p for p in points if p["varied"] == key and "seconds" in p]
        rows.append([
            title, " / ".join(f"{p['value']:,}" for p in some),
            " / ".join(f"{p['seconds']:.2g}" for p in some) + " s",
            " / ".join(f"{p['peak_bytes'] / 1e6:.0f}" for p in some) + " MB",
        ])  # fmt: skip
    text = table(["varied", "values", "time", "peak memory"], rows)
    return (
        "Base: d = 256, 4 layers, T = 128, M = L = 32, V = 8,192, one thread. Plot: "
        "[`benchmarks/results/scaling.png`](benchmarks/results/scaling.png).\n\n"
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

        rows.append([
            name, worst("influence"), worst("pushed"), worst("delta_log_probs"),
            worst("bfloat16"), worst("bfloat16, plain torch"),
            f"{100 * min(p['covered'] for p in some):.0f} %",
        ])  # fmt: skip
    header = ["architecture", "influence", "pushed Gram", "delta_log_probs", "bfloat16",
              "bfloat16, plain torch", "ledger"]  # fmt: skip
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
        "optimizer steps in true float64 from a state with history.\n\n"
        + table(["optimizer", "objective", "start (2)", "midpoint (3)", "simpson (5)"], rows)
        + f"\n\n<sub>{made_by(section)}</sub>"
    )


def dialogue(section: dict) -> str:
    """One DPO step on a real pair: predicted against measured."""
    result = section["result"]
    step = next(s for s in result["steps"] if s["rule"] == "midpoint" and s["optimizer"] == "sgd")
    rows = [
        [f"`{r['name']}`", str(r["tokens"]), f"{r['logp']:.2f}", f"{r['y+']:+.4f}",
         f"{r['y-']:+.4f}", f"{r['predicted']:+.5f}", f"{r['measured']:+.5f}"]
        for r in step["responses"]
    ]  # fmt: skip
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


SECTIONS = {
    "dialogue": dialogue,
    "influence": influence,
    "scaling": scaling,
    "exactness": exactness,
    "orders": orders,
}


def plot_scaling(section: dict, path: Path) -> None:
    """Time and peak memory against each size, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"response": "response tokens M = L", "length": "sequence length T",
              "vocabulary": "vocabulary V", "layers": "layers"}  # fmt: skip
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained", sharey="row")
    for column, (key, title) in enumerate(titles.items()):
        some = [p for p in section["result"] if p["varied"] == key and "seconds" in p]
        x = [p["value"] for p in some]
        for row, (label, values) in enumerate(
            (("seconds", [p["seconds"] for p in some]),
             ("peak memory, MB", [p["peak_bytes"] / 1e6 for p in some]))
        ):  # fmt: skip
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


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = original = readme.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        for name, section in json.loads(path.read_text()).items():
            start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            if name in SECTIONS and start in text:
                before, rest = text.split(start, 1)
                after = rest.split(end, 1)[1]
                text = f"{before}{start}\n{SECTIONS[name](section)}\n{end}{after}"
            if name == "scaling" and not args.check:
                plot_scaling(section, RESULTS / "scaling.png")
    if args.check:
        if text != original:
            print("README.md is not what benchmarks/results says: run benchmarks/report.py")
        return int(text != original)
    readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
