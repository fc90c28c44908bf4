"""Sections about preference sets: diagnoses and predictions against runs that were measured."""

from __future__ import annotations

import math

from pages.markdown import made_by, table


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
        f"by the forecast and {r['linear'][0]:+.2f} in a linear model; measured "
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


def halves(section: dict) -> str:
    """Linear datamodeling scores of methods, each in its best form; bytes of a sequence."""
    r = section["result"]
    targets = ("y+", "y−", "held out")

    def mean(row: dict) -> float:
        return sum(row[target]["lds"] for target in targets) / len(targets)

    best: dict[str, dict] = {}
    for row in r["rows"]:
        parts = row["method"].split(", ")
        form = next((i for i, x in enumerate(parts) if x in ("cosine", "inverted")), len(parts))
        name = ", ".join(parts[:form])
        row = row | {"form": ", ".join(parts[form:]) or "as it is"}
        if name not in best or mean(row) > mean(best[name]):
            best[name] = row
    rows = [
        [
            name,
            row["form"],
            f"{row['bytes'] / 1e3:,.1f} kB" if row["bytes"] else "–",
            *(f"{x['lds']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in map(row.get, targets)),
        ]
        for name, row in sorted(best.items(), key=lambda item: -mean(item[1]))
    ]
    header = ["scores", "form", "kept of a sequence", *targets]
    return (
        f"hh-llama-2m after SFT; {r['count']} pairs and {r['held']} held out; DPO with AdamW, "
        f"{r['epochs']} epochs, lr {r['lr']:g}, on {r['subsets']} random halves, mean over "
        f"{r['orders']} orders each:\n\n{table(header, rows)}\n\n<sub>{made_by(section)}</sub>"
    )


def real_llm(section: dict) -> str:
    """Runs of a real LLM, predicted and measured."""
    rows = []
    for name, part in section["result"].items():
        r = part["result"]
        if "rho" not in r:
            continue
        rho = [f"{x['rho']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in r["rho"]]
        told, seen = (" / ".join(f"{x:+.2f}" for x in r[k]) for k in ("predicted", "measured"))
        falls = f"{r['falls'][0]}, {r['falls'][1]} of {r['pairs']}"
        rows.append([name, *rho, told, seen, falls, f"{r['epochs_of_training']:.1f}", r["commit"]])
    header = ["run", "ρ of y+ (95 %)", "ρ of y−", "predicted", "measured"]
    return table([*header, "y+ falls: predicted, measured", "cost, epochs", "commit"], rows)


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
