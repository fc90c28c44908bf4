"""The paper's remedy (§4.3): SFT on both responses before DPO, against SFT on the chosen one.

Then identical DPO after both; beside it two remedies within DPO: a gate on the negative term, and
the negative log-likelihood of y+ added to it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lddyn.lab.dpo import mass_of_run, shares_of_mass, unrelated
from lddyn.lab.drawing import axes_grid, curves, tidy
from lddyn.lab.dynamics import Preference, Supervised
from lddyn.lab.record import Claim, Lab
from lddyn.lab.setting import (
    Curves,
    Recipe,
    Setting,
    checkpoint,
    finetune,
    load,
    must_be_positive,
    one_thread,
)
from lddyn.probes.build import sample
from lddyn.probes.measure import measure
from lddyn.report.canvas import INK
from lddyn.stats import bootstrap

__all__ = ["degeneration", "run"]

_BETA = 0.1
_GATE = (20.0, 0.3)  # sharpness, and the geometric mean probability at which the gate is half open
_LOSSES = {
    "DPO": Preference(_BETA),
    "DPO, gate": Preference(_BETA, gate=_GATE),
    "DPO+NLL": Preference(_BETA, nll=1.0),
}
_COLOURS = {
    "y+ only": "#d55e00",
    "both": "#0072b2",
    "y+ only, gate": "#cc79a7",
    "y+ only, NLL": "#009e73",
}


def run(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool = True,
    model: str | None = None,
    data: str | None = None,
    rows: int = 248,
    prompts: int = 40,
    sft_updates: int = 300,
    updates: int = 200,
    every: int = 20,
    sft_lr: float = 5e-5,
    lr: float = 2e-5,
    new_tokens: int = 40,
) -> dict[str, Any]:
    """SFT on y+ or on both, then DPO; what it does to probes, to samples, and to held-out pairs.

    Args:
        out: Folder for everything.
        seed: Of all random numbers.
        progress: Show bars.
        model: Name or folder of a causal LM. None: the demo's.
        data: Rows in the authors' format. None: the demo's.
        rows: How many are read; a fifth is held out.
        prompts: How many of the others are probes.
        sft_updates: Steps of SFT; both ways pass over y+ equally often.
        updates: Steps of DPO.
        every: Updates between probe passes.
        sft_lr: Rate of SFT.
        lr: Rate of DPO.
        new_tokens: Most tokens of a greedy answer.

    Returns:
        What results.json holds.

    Cost: the default about 3 minutes of one core.
    """
    must_be_positive(
        rows=rows,
        prompts=prompts,
        sft_updates=sft_updates,
        updates=updates,
        every=every,
        sft_lr=sft_lr,
        lr=lr,
        new_tokens=new_tokens,
    )
    options = {
        "model": model,
        "data": data,
        "rows": rows,
        "prompts": prompts,
        "sft_updates": sft_updates,
        "updates": updates,
        "every": every,
        "sft_lr": sft_lr,
        "lr": lr,
        "new_tokens": new_tokens,
    }
    lab = Lab("extend", Path(out), seed, options, progress)
    setting = load(lab, model, data, rows=rows, prompts=prompts)
    pairs = setting.pairs(setting.train, ("chosen", "rejected"))
    tuned: dict[str, Curves] = {}
    for name, terms in (("y+ only", ("chosen",)), ("both", ("chosen", "rejected"))):
        recipe = Recipe(Supervised(terms), sft_updates, sft_lr, every=every)
        tuned[name] = finetune(lab, _file("sft", name), setting, setting.fresh(), pairs, recipe)

    plan = {
        "y+ only": ("y+ only", "DPO"),
        "both": ("both", "DPO"),
        "y+ only, gate": ("y+ only", "DPO, gate"),
        "y+ only, NLL": ("y+ only", "DPO+NLL"),
    }
    found: dict[str, Curves] = {}
    after: dict[str, dict[str, Any]] = {}
    for name, (start, loss) in plan.items():
        before: nn.Module = checkpoint(lab, _file("sft", start), setting.fresh())
        policy: nn.Module = checkpoint(lab, _file("sft", start), setting.fresh())
        recipe = Recipe(_LOSSES[loss], updates, lr, every=every)
        found[name] = finetune(
            lab, _file("dpo", name), setting, policy, pairs, recipe, reference=before
        )
        with one_thread():
            after[name] = lab.once(
                _file("after", name),
                partial(_examine, setting, before, policy, new_tokens),
            )
    lab.table(
        "curves",
        [
            {k: v for k, v in row.items() if k in ("run", "update", "type", "log_prob", "greedy")}
            for stage, runs in (("SFT", tuned), ("DPO", found))
            for name, curve in runs.items()
            for row in curve.rows(f"{stage}: {name}")
        ],
    )
    summary = _summary(found, after)
    lab.table("summary", summary)
    lab.figure("sft", _draw_sft(tuned), "SFT on y+ only (left) and on both (right).")
    lab.figure("dpo", _draw_dpo(found), "The same DPO after each, and two remedies within it.")
    lab.figure("summary", _draw_summary(summary), "At the end of DPO.")
    _claims(lab, tuned, found, after)
    return _finish(lab, setting, summary)


def _file(stage: str, name: str) -> str:
    return f"{stage}-{name}".replace(" ", "-").replace("+", "plus").replace(",", "")


# ---------------------------------------------------------------------------------------------
# After DPO


def _examine(
    setting: Setting, before: nn.Module, after: nn.Module, new_tokens: int
) -> dict[str, Any]:
    """Held-out preferences, greedy answers to held-out prompts, where the mass of y− went."""
    prompts = sorted({row["prompt"] for row in setting.test.rows})
    texts = {
        when: sample(model, setting.tokenizer, prompts, max_new_tokens=new_tokens)
        for when, model in (("before", before), ("after", after))
    }
    held_out = setting.encode(setting.test, ("chosen", "rejected"))
    grids = {
        when: held_out.grid(measure(model, held_out).log_prob).numpy()
        for when, model in (("before", before), ("after", after))
    }
    margins = grids["after"] - grids["before"]
    right = margins[:, 0] > margins[:, 1]
    usable = ~np.isnan(margins).any(1)
    return {
        "right": right[usable].astype(float).tolist(),
        "mass": mass_of_run(setting, before, after),
        "degeneration": {when: degeneration(found) for when, found in texts.items()},
        "examples": [
            {"prompt": p, "before": a, "after": b}
            for p, a, b in zip(prompts[:3], texts["before"], texts["after"], strict=False)
        ],
    }


def degeneration(texts: Sequence[str]) -> dict[str, float]:
    """Signs of degenerate answers.

    Returns:
        "distinct 1", "distinct 2": share of different words, and pairs of words, among all of them;
        "repeated": share of a text's three-word runs that occurred in it before, mean over texts;
        "words": mean length.

    Example:
        >>> degeneration(["a b a b a b a"])["repeated"]
        0.6
    """
    words = [text.split() for text in texts]

    def distinct(n: int) -> float:
        grams = Counter(tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1))
        return len(grams) / max(1, sum(grams.values()))

    def repeated(w: Sequence[str]) -> float:
        runs = [tuple(w[i : i + 3]) for i in range(len(w) - 2)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    return {
        "distinct 1": distinct(1),
        "distinct 2": distinct(2),
        "repeated": float(np.mean([repeated(w) for w in words])) if words else 0.0,
        "words": float(np.mean([len(w) for w in words])) if words else 0.0,
    }


def _summary(
    found: Mapping[str, Curves], after: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for name, curve in found.items():
        shares = shares_of_mass(after[name]["mass"])
        end = after[name]["degeneration"]
        rows.append(
            {
                "run": name,
                "y+": float(np.nanmean(curve.change("chosen"))),
                "y-": float(np.nanmean(curve.change("rejected"))),
                "unrelated": float(np.nanmean(unrelated(curve))),
                "greedy": float(np.nanmean(curve.change("chosen", "greedy"))),
                "squeeze ratio": shares["likeliest other"],
                "held-out accuracy": float(np.mean(after[name]["right"])),
                "repeated": end["after"]["repeated"],
                "repeated before": end["before"]["repeated"],
                "distinct 2": end["after"]["distinct 2"],
                "distinct 2 before": end["before"]["distinct 2"],
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Pictures


def _draw_sft(tuned: Mapping[str, Curves]) -> Any:
    figure, grid = axes_grid("sft", 1, 2, 11, 4.4, sharey=True)
    for axes, (name, curve) in zip(grid, tuned.items(), strict=True):
        lines = {n: curve.mean(n) - curve.mean(n)[0] for n in curve.fields}
        curves(axes, curve.updates, lines, f"SFT on {name}", "Δ log π, nats")
    return figure


def _draw_dpo(found: Mapping[str, Curves]) -> Any:
    figure, grid = axes_grid("dpo", 1, 4, 14, 3.8)
    panels = {
        "y+": ("log_prob", ("chosen",)),
        "y−": ("log_prob", ("rejected",)),
        "answers to other prompts": ("log_prob", ("irr_train", "irr_test", "irr_hum")),
        "greedy confidence of y+": ("greedy", ("chosen",)),
    }
    for axes, (title, (kind, names)) in zip(grid, panels.items(), strict=True):
        ends = {}
        for name, curve in found.items():
            y = np.mean([curve.mean(n, kind) for n in names if n in curve.fields], axis=0)
            y = y - y[0]
            axes.plot(curve.updates, y, color=_COLOURS[name], linewidth=1.8)
            ends[name] = float(y[-1])
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.set_title(f"Δ log π of DPO: {title}", fontsize=9, loc="left")
        axes.set_xlabel("updates", fontsize=8)
        axes.margins(y=0.1)
        tidy(axes)
    figure.legend(
        grid[0].lines[: len(found)],
        [f"SFT on {name}" for name in found],
        labelcolor="linecolor",
        loc="outside upper left",
        ncols=len(found),
        frameon=False,
        fontsize=8,
    )
    return figure


def _draw_summary(rows: Sequence[Mapping[str, Any]]) -> Any:
    shown = ("unrelated", "greedy", "squeeze ratio", "held-out accuracy", "repeated", "distinct 2")
    titles = (
        "unrelated, nats",
        "greedy, nats",
        "y−'s mass to the likeliest",
        "held-out accuracy",
        "repeated runs",
        "distinct pairs",
    )
    figure, grid = axes_grid("summary", 1, len(shown), 15, 2.2)
    for axes, key, title in zip(grid, shown, titles, strict=True):
        for at, row in enumerate(rows):
            axes.barh(at, row[key], color=_COLOURS[row["run"]], height=0.7)
            if f"{key} before" in row:
                axes.plot([row[f"{key} before"]] * 2, [at - 0.35, at + 0.35], color=INK)
            axes.annotate(
                f"{row[key]:.2f}".replace("-", "−"),
                (row[key], at),
                fontsize=7,
                va="center",
                xytext=(3 if row[key] >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if row[key] >= 0 else "right",
            )
        names = [f"SFT on {row['run']}" for row in rows] if axes is grid[0] else [""] * len(rows)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.margins(x=0.28)
        axes.set_title(title, fontsize=9, loc="left")
        tidy(axes)
    return figure


# ---------------------------------------------------------------------------------------------
# Claims


def _claims(
    lab: Lab,
    tuned: Mapping[str, Curves],
    found: Mapping[str, Curves],
    after: Mapping[str, Mapping[str, Any]],
) -> None:
    def interval(name: str, values: np.ndarray) -> tuple[float, tuple[float, float]]:
        return bootstrap(values, generator=lab.generator("bootstrap", name))

    one, both = tuned["y+ only"], tuned["both"]
    raised, raised_range = interval("raised", both.change("rejected") - one.change("rejected"))
    same, same_range = interval("same", both.change("chosen") - one.change("chosen"))
    gain = float(np.nanmean(one.change("chosen")))
    lab.claim(
        Claim(
            "extend 1",
            "SFT on both raises y− much more, and y+ as much as SFT on y+ does.",
            "§4.3, Fig. 5",
            "y− −97.1 → −60.6, y+ −122.8 → −79.2 (Qwen-1.8B)",
            f"y− {raised:+.2f} nats more, y+ {same:+.2f} (95 %: {same_range[0]:+.2f} to "
            f"{same_range[1]:+.2f}) where SFT on y+ gives it {gain:+.2f}",
            "agrees" if raised_range[0] > 0 and abs(same) < 0.2 * abs(gain) else "disagrees",
            "as much: within a fifth",
            value=raised,
            interval=raised_range,
        )
    )
    base, extended = found["y+ only"], found["both"]
    slower, slower_range = interval("slower", unrelated(extended) - unrelated(base))
    lab.claim(
        Claim(
            "extend 2",
            "After it the same DPO lets other responses decay less.",
            "§4.3, Fig. 5",
            "others decay slower",
            f"unrelated {np.nanmean(unrelated(extended)):+.2f} against "
            f"{np.nanmean(unrelated(base)):+.2f} nats",
            "agrees" if slower_range[0] > 0 else "disagrees",
            "per prompt, same rows in the same order",
            value=slower,
            interval=slower_range,
        )
    )
    less, less_range = interval(
        "less", extended.change("chosen", "greedy") - base.change("chosen", "greedy")
    )
    peak_range = interval("peak", base.change("chosen", "greedy"))[1]
    lab.claim(
        Claim(
            "extend 3",
            "Greedy confidence rises less.",
            "§4.3, Fig. 5",
            "rises less",
            f"{np.nanmean(extended.change('chosen', 'greedy')):+.2f} against "
            f"{np.nanmean(base.change('chosen', 'greedy')):+.2f} nats",
            "not testable at this scale"
            if peak_range[0] <= 0
            else "agrees"
            if less_range[1] < 0
            else "disagrees",
            "of y+'s own prefix; to be tested it must rise after SFT on y+ only",
            corrected="the published greedy is that of random words; in a fork's extend run it "
            "stays at about −39",
            value=less,
            interval=less_range,
        )
    )
    right = [np.array(after[name]["right"]) for name in ("both", "y+ only")]
    better, better_range = interval("better", right[0] - right[1])
    lab.claim(
        Claim(
            "extend 4",
            "Its answers are preferred.",
            "§4.3, Table 1",
            "judged win rates 0.65 to 0.69 (ChatGPT), 0.52 to 0.60 (Claude 3) after DPO; one order "
            "of answers only",
            f"no judge here; held-out preference accuracy {right[0].mean():.2f} against "
            f"{right[1].mean():.2f}",
            "not testable at this scale",
            "a win rate needs a judge and answers worth judging; accuracy of the implicit reward "
            "is another thing",
            value=better,
            interval=better_range,
        )
    )
    before = after["y+ only"]["degeneration"], after["both"]["degeneration"]
    repeats = [d["after"]["repeated"] - d["before"]["repeated"] for d in before]
    lab.claim(
        Claim(
            "extend 5",
            "It reduces degenerate answers after DPO.",
            "§4.3; App. F",
            "“reduced degenerate responses”",
            f"repeated three-word runs change by {repeats[1]:+.3f} against {repeats[0]:+.3f}, "
            f"distinct pairs {before[1]['after']['distinct 2']:.2f} against "
            f"{before[0]['after']['distinct 2']:.2f}",
            "not testable at this scale"
            if max(map(abs, repeats)) < 0.02
            else "agrees"
            if repeats[1] < repeats[0]
            else "disagrees",
            "greedy answers to held-out prompts; below 0.02 neither run degenerates",
            value=repeats[1] - repeats[0],
        )
    )
    for key, name in (("gate", "y+ only, gate"), ("NLL", "y+ only, NLL")):
        helped, helped_range = interval(key, unrelated(found[name]) - unrelated(base))
        saved, saved_range = interval(
            f"{key} y+", found[name].change("chosen") - base.change("chosen")
        )
        lab.claim(
            Claim(
                f"{key}",
                "A gate on y−'s term keeps other responses."
                if key == "gate"
                else "NLL of y+ beside DPO keeps y+.",
                "follow-up: Gate-DPO" if key == "gate" else "RPO, DPO+NLL",
                "others −27.6 → −1.4 nats (pythia-410m)" if key == "gate" else "y+ no longer falls",
                f"unrelated {helped:+.2f} nats against plain DPO, y+ {saved:+.2f}; held-out "
                f"accuracy {np.mean(after[name]['right']):.2f} against {right[1].mean():.2f}",
                "agrees"
                if (helped_range if key == "gate" else saved_range)[0] > 0
                else "disagrees",
                f"σ({_GATE[0]:g} (p − {_GATE[1]:g})), p the geometric mean of y−'s probabilities; "
                "it also pushes y− less"
                if key == "gate"
                else "weight 1, per token of y+",
                value=helped if key == "gate" else saved,
                interval=helped_range if key == "gate" else saved_range,
            )
        )


def _finish(lab: Lab, setting: Setting, summary: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return lab.finish(
        [
            "SFT on both lifts y− out of its valley, so that the same push squeezes less: others "
            "decay less, greedy confidence rises less, answers degenerate less.",
        ],
        [
            f"{setting.title}; DPO after SFT on {row['run']}: y+ {row['y+']:+.2f}, y− "
            f"{row['y-']:+.2f}, unrelated {row['unrelated']:+.2f}, greedy {row['greedy']:+.2f} "
            f"nats; {100 * row['squeeze ratio']:.0f} % of y−'s lost mass to the likeliest other "
            f"token; held-out accuracy {row['held-out accuracy']:.2f}."
            for row in summary
        ],
    )
