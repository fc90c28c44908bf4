"""Plots of results, beside them."""

from __future__ import annotations

from pathlib import Path

from pages.exactness import MODELS


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
