"""Sections about errors: against float64, against real steps, of sketches and of low rank."""

from __future__ import annotations

from pages.markdown import duration, made_by, table


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


MODELS = {"dialogue": "Llama trained on dialogues", "demo": "The demo's language model"}


def sketches(section: dict) -> str:
    """Errors of sketches by kind and size, measured, stated and predicted."""
    result = section["result"]
    models = [sketched_model(name, model) for name, model in result["models"].items()]
    costs = f"\n\n{sketch_costs(result['cost'])}" if "cost" in result else ""
    return (
        f"R = {result['repeats']}, {result['seeds']} seeds; root-mean-square over token pairs, in "
        "units of ‖a‖‖b‖: two tokens of different sequences, then a token with itself. *held*: how "
        "often the 95 % interval held the truth.\n\n"
        + "\n\n".join(models)
        + costs
        + f"\n\n<sub>{made_by(section)}</sub>"
    )


def sketched_model(name: str, model: dict) -> str:
    """Errors on one model: a row per kind and size, then low-rank forms alone."""
    groups = ("other sequence", "itself")
    rows = []
    for kind, sizes in model["kinds"].items():
        for row in sizes:
            cells = [kind, f"{row['k']:,}", f"{row['numbers']:,}"]
            for group in groups:
                r = row[group]
                cells += [f"{100 * r[x]:.2g} %" for x in ("error", "stated", "theory")]
                cells.append(f"{100 * r['held']:.0f} %")
            rows.append(cells)
    low_rank = [
        [str(r["rank"]), f"{r['numbers']:,}", *(f"{100 * r[g]:.2g} %" for g in groups)]
        for r in model["truncated"]
    ]
    columns = ["stated", "theory", "held"]
    header = ["kind", "k", "numbers a token", "error", *columns, "itself", *columns]
    return (
        f"**{MODELS[name]}**, {model['parameters']:,} parameters, {model['tokens']} tokens. "
        f"Two tokens of different sequences: rms cosine {model['rms_cosine']:.3f}. One token's "
        f"gradient of one weight: effective rank {model['effective_rank']:.2f}, "
        f"{100 * model['share_of_rank_one']:.0f} % of its square in one direction "
        "(medians).\n\n"
        + table(header, rows)
        + "\n\nLow-rank forms alone (embedding and head exact and not counted), biased:\n\n"
        + table(["rank", "numbers a token", *groups], low_rank)
    )


def sketch_costs(cost: dict) -> str:
    """Time of features by kind, over that of the pullback."""
    seconds = dict(cost["seconds"])
    pull = seconds.pop("pullback")
    each = ", ".join(f"{kind} {s / pull:.2f}×" for kind, s in seconds.items())
    return (
        "Time of features at k = 4,096 over that of the pullback alone "
        f"({duration(pull)} for {cost['tokens']} tokens of a sequence of {cost['length']}, one "
        f"thread): {each}."
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
