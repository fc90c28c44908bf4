"""SFT, watched (§4.1, Fig. 3): every response type over training, with K measured.

The four results of the poster, with the statistic that decides each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lddyn.lab.drawing import (
    COLOURS,
    GROUP_COLOURS,
    axes_grid,
    curves,
    heat_map,
    label,
    label_ends,
    tidy,
)
from lddyn.lab.dynamics import Explained, Supervised, influence, train
from lddyn.lab.record import Claim, Lab, Verdict
from lddyn.lab.setting import (
    PAPER_LR,
    Curves,
    Recipe,
    Setting,
    batches,
    finetune,
    load,
    must_be_positive,
    one_thread,
)
from lddyn.lab.shares import verdict
from lddyn.optimizers import make_optimizer
from lddyn.probes.probe_set import TYPES
from lddyn.report.canvas import INK
from lddyn.stats import bootstrap

__all__ = ["bell", "explained_share", "kernel_grid", "over_prompts", "run"]

_SIMILAR = ("rejected", "chosen_gptsemantic", "chosen_gptformat", "irr_test", "irr_hum")
_NOISE = ("random_permute", "random_nonhum")


def run(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool = True,
    model: str | None = None,
    data: str | None = None,
    rows: int = 248,
    prompts: int = 40,
    updates: int = 400,
    every: int = 20,
    lr: float = 5e-5,
    kernel_points: int = 3,
    kernel_prompts: int = 4,
    explained: int = 8,
    accuracy_steps: int = 3,
) -> dict[str, Any]:
    """Finetunes on the chosen responses and watches every type.

    Args:
        out: Folder for everything.
        seed: Of all random numbers.
        progress: Show bars.
        model: Name or folder of a causal LM. None: the demo's.
        data: Rows in the authors' format. None: the demo's.
        rows: How many are read; a fifth is held out.
        prompts: How many of the others are probes.
        updates: Steps of RMSprop, 4 rows each.
        every: Updates between probe passes.
        lr: Its rate.
        kernel_points: How often K is measured.
        kernel_prompts: For how many prompts; four or more give intervals.
        explained: How many updates are predicted to first order.
        accuracy_steps: Updates of each run that tests the first order at other rates; 0: none.

    Returns:
        What results.json holds.

    Cost: the default about 3 minutes of one core, two thirds of it for K.
    """
    must_be_positive(rows=rows, prompts=prompts, updates=updates, every=every, lr=lr)
    options = {
        "model": model,
        "data": data,
        "rows": rows,
        "prompts": prompts,
        "updates": updates,
        "every": every,
        "lr": lr,
        "kernel_points": kernel_points,
        "kernel_prompts": kernel_prompts,
        "explained": explained,
        "accuracy_steps": accuracy_steps,
    }
    lab = Lab("sft", Path(out), seed, options, progress)
    setting = load(lab, model, data, rows=rows, prompts=prompts)
    learned = setting.pairs(setting.train, ("chosen",))
    points = np.unique(np.linspace(0, updates, kernel_points).round().astype(int)).tolist()
    apart = np.unique(np.linspace(0, updates - 1, explained).round().astype(int)).tolist()
    recipe = Recipe(
        Supervised(), updates, lr, every=every, explain=tuple(apart), kernel=tuple(points)
    )
    tuned = setting.fresh()
    found = finetune(lab, "sft", setting, tuned, learned, recipe, kernel_prompts=kernel_prompts)
    with one_thread():
        maps = {
            when: np.array(lab.once(f"influence-{when}", partial(_influence, setting, now)))
            for when, now in (("start", setting.model), ("end", tuned))
        }
        accuracy = lab.once(
            "accuracy", lambda: _accuracy(lab, setting, learned, lr, accuracy_steps)
        )
    _tables(lab, found, maps, setting.fields, accuracy)
    _pictures(lab, found, maps, setting.fields)
    _claims(lab, setting, found, maps, accuracy, embedded=model is None)
    return _finish(lab, setting, found, accuracy)


# ---------------------------------------------------------------------------------------------
# Measurements beside the run


def _influence(setting: Setting, model: Any, prompts: int = 8) -> list[list[list[float | None]]]:
    """⟨∇ log π(y_o), ∇ log π(y_u)⟩ / ‖∇ log π(y_u)‖² of one prompt's responses, (P, F, F) [u][o].

    Nats that y_o moves for every nat that a small SGD step on y_u gives y_u.
    """
    encoded = setting.encode(setting.probes, setting.fields)
    found = []
    for prompt in range(min(prompts, len(setting.probes))):
        own = encoded.select([prompt])
        gram = influence(model, own.examples).numpy()
        full = np.full((len(setting.fields), len(setting.fields)), np.nan)
        at = own.cells[:, 1].numpy()
        full[np.ix_(at, at)] = gram / np.diag(gram)[:, None]
        found.append([[None if np.isnan(x) else float(x) for x in row] for row in full])
    return found


def _accuracy(
    lab: Lab, setting: Setting, rows: Sequence[Mapping[str, Any]], lr: float, steps: int
) -> list[dict[str, Any]]:
    """How much of Δ log π the first order explains, at several rates, in float64."""
    probes = setting.encode(setting.probes, setting.fields).select(range(3))
    found = []
    for optimizer in ("sgd", "rmsprop"):
        for rate in (PAPER_LR, 10 * PAPER_LR, lr, 10 * lr) if steps else ():
            model = setting.fresh().double()
            parts: list[Explained] = []
            train(
                model,
                batches(rows, steps, 4, lab.generator("accuracy")),
                Supervised(),
                make_optimizer(optimizer, model.parameters(), rate),
                explain=range(steps),
                probes=probes,
                explained=parts.append,
            )
            predicted = torch.stack([p.predicted["chosen"] for p in parts])
            measured = torch.stack([p.measured for p in parts])
            found.append(
                {
                    "optimizer": optimizer,
                    "lr": rate,
                    "steps": steps,
                    "mean move, nats": float(measured.abs().mean()),
                    "explained per step": explained_share(predicted.numpy(), measured.numpy()),
                    "explained accumulated": explained_share(
                        predicted.sum(0).numpy(), measured.sum(0).numpy()
                    ),
                }
            )
    return found


def explained_share(predicted: np.ndarray, measured: np.ndarray) -> float:
    """1 − Σ |measured − predicted| / Σ |measured|: 1 is all, 0 no better than nothing."""
    return float(1 - np.abs(measured - predicted).sum() / np.abs(measured).sum())


def bell(log_prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rise to the peak and fall from it, per prompt.

    The peak of the mean curve is found on every other prompt and applied to the rest, so that
    choosing it does not favour a rise.

    Args:
        log_prob: (T, P) of one response type.

    Returns:
        rise (P,), fall (P,), nats; the fall is negative.
    """
    rise, fall = np.empty(log_prob.shape[1]), np.empty(log_prob.shape[1])
    for half in (0, 1):
        peak = int(np.nanargmax(np.nanmean(log_prob[:, half::2], axis=1)))
        other = log_prob[:, 1 - half :: 2]
        rise[1 - half :: 2] = other[peak] - other[0]
        fall[1 - half :: 2] = other[-1] - other[peak]
    return rise, fall


# ---------------------------------------------------------------------------------------------
# Tables and pictures


def _kernel_means(found: Curves) -> dict[str, dict[str, list[float]]]:
    """Type → quantity → mean over prompts at every point."""
    rows = found.raw["kernel"]
    points = sorted({row["update"] for row in rows})
    return {
        name: {
            key: [
                float(
                    np.mean(
                        [r[key] for r in rows if r["update"] == point and r["observed"] == name]
                    )
                )
                for point in points
            ]
            for key in ("norm", "lbk_norm", "sign")
        }
        for name in found.fields
        if any(r["observed"] == name for r in rows)
    }


def _tables(
    lab: Lab,
    found: Curves,
    maps: Mapping[str, np.ndarray],
    fields: Sequence[str],
    accuracy: Sequence[Mapping[str, Any]],
) -> None:
    lab.table("curves", found.rows("sft"))
    lab.table("kernel", found.raw["kernel"])
    lab.table("accuracy", accuracy)
    lab.table(
        "influence",
        [
            {"when": when, "update": u, "observed": o, "value": round(float(mean[i, j]), 4)}
            for when, mean in ((w, np.nanmean(m.astype(float), axis=0)) for w, m in maps.items())
            for i, u in enumerate(fields)
            for j, o in enumerate(fields)
        ],
    )
    lab.table(
        "first_order",
        [
            {
                "update": p["update"],
                "type": name,
                "predicted": float(f"{a:.5g}"),
                "measured": float(f"{b:.5g}"),
            }
            for p in found.raw["explained"]
            for name, a, b in zip(
                found.raw["explained types"], p["predicted"]["chosen"], p["measured"], strict=True
            )
        ],
    )


def _pictures(
    lab: Lab, found: Curves, maps: Mapping[str, np.ndarray], fields: Sequence[str]
) -> None:
    lab.figure(
        "curves",
        draw_curves(found),
        "Change of log π since the start, mean over prompts; the two lower panels are of y+ alone "
        "(left) and per token (right).",
    )
    if found.raw["kernel"]:
        lab.figure(
            "kernel",
            _draw_kernel(found),
            "What the paper could not draw: ‖K(y_o, y+)‖_F over training for every response type, "
            "and beside it what it measures instead.",
        )
    lab.figure(
        "influence",
        _draw_influence(maps, fields),
        "Nats that the column's response moves for every nat that a small step on the row's "
        "response gives it.",
    )
    lab.figure("first_order", _draw_first_order(found), "Single updates, to first order.")


def draw_curves(found: Curves) -> Any:
    """Four panels: answers, other responses, confidence of y+, energies."""
    figure, grid = axes_grid("curves", 2, 2, 11, 7.2)
    by_group = {
        "answers to the prompt": [n for n in found.fields if TYPES[n].group == "answers"],
        "other texts": ["chosen", *[n for n in found.fields if TYPES[n].group != "answers"]],
    }
    for axes, (title, names) in zip(grid, by_group.items(), strict=False):
        lines = {n: found.mean(n) - found.mean(n)[0] for n in names}
        curves(axes, found.updates, lines, f"Δ log π, {title}", "nats, sum over tokens")
    confidence = {"chosen": found.mean("chosen"), "greedy": found.mean("chosen", "greedy")}
    curves(grid[2], found.updates, confidence, "log π(y+) and its greedy confidence", "nats")
    energy = {n: found.means["energy"][:, found.column(n)] for n in found.fields}
    curves(grid[3], found.updates, energy, "‖G‖² = ‖π − e_y‖² if it were learned", "per token")
    return figure


def _draw_kernel(found: Curves) -> Any:
    means = _kernel_means(found)
    points = sorted({row["update"] for row in found.raw["kernel"]})
    figure, grid = axes_grid("kernel", 1, 2, 11, 4.6)
    panels = (("norm", "‖K‖_F, true"), ("lbk_norm", "√LBK / η, the paper's lower bound"))
    for axes, (key, title) in zip(grid, panels, strict=True):
        for name, values in means.items():
            axes.plot(points, values[key], marker="o", markersize=3, color=COLOURS[name])
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9.5, loc="left", color=INK)
        axes.set_xlabel("updates", fontsize=8)
        tidy(axes)
    for axes, (key, _) in zip(grid, panels, strict=True):
        label_ends(axes, points[-1], {n: v[key][-1] for n, v in means.items()})
    return figure


def _draw_influence(maps: Mapping[str, np.ndarray], fields: Sequence[str]) -> Any:
    figure, grid = axes_grid("influence", 1, 2, 13, 5.6, sharey=True)
    for axes, (when, values) in zip(grid, maps.items(), strict=True):
        mean = np.nanmean(values.astype(float), axis=0)
        heat_map(axes, mean, fields, fields, f"influence at the {when}: update ↓, observed →", 1.0)
    return figure


def _draw_first_order(found: Curves) -> Any:
    figure, grid = axes_grid("first_order", 1, 2, 9.6, 4.2)
    types = found.raw["explained types"]
    parts = found.raw["explained"]
    predicted = np.array([p["predicted"]["chosen"] for p in parts])
    measured = np.array([p["measured"] for p in parts])
    panels = (
        ("each update", predicted.ravel(), measured.ravel(), list(types) * len(parts)),
        (f"added up over {len(parts)} updates", predicted.sum(0), measured.sum(0), list(types)),
    )
    for axes, (title, x, y, names) in zip(grid, panels, strict=True):
        groups = np.array([TYPES[n].group for n in names])
        for group, colour in GROUP_COLOURS.items():
            at = groups == group
            axes.scatter(x[at], y[at], s=7, c=colour, linewidths=0, alpha=0.8, label=group)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=INK, linewidth=0.6, zorder=0)
        share = explained_share(x, y)
        axes.set_title(f"{title}: {100 * share:.0f} % explained", fontsize=9.5, loc="left")
        axes.set_xlabel("predicted Δ log π, nats", fontsize=8)
        axes.set_ylabel("measured Δ log π, nats", fontsize=8)
        tidy(axes)
    legend = {"answers": "answers to the prompt", "other": "other texts", "noise": "noise"}
    handles, groups_shown = grid[0].get_legend_handles_labels()
    grid[0].legend(handles, [legend[g] for g in groups_shown], fontsize=8, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------
# Claims


def _claims(
    lab: Lab,
    setting: Setting,
    found: Curves,
    maps: Mapping[str, np.ndarray],
    accuracy: Sequence[Mapping[str, Any]],
    embedded: bool,
) -> None:
    def interval(label: str, values: np.ndarray) -> tuple[float, tuple[float, float]]:
        return bootstrap(values, generator=lab.generator("bootstrap", label))

    # 1
    gain, gain_range = interval("y+", found.change("chosen"))
    shapes: dict[str, str] = {}
    for name in (n for n in _SIMILAR if n in found.fields):
        rise, fall = bell(found.log_prob[:, :, found.column(name)])
        up, down = interval(f"rise {name}", rise)[1], interval(f"fall {name}", fall)[1]
        shapes[name] = (
            "rises, then falls"
            if up[0] > 0 and down[1] < 0
            else "rises"
            if up[0] > 0
            else "falls"
            if interval(f"all {name}", rise + fall)[1][1] < 0
            else "undecided"
        )
    bells = sum(shape == "rises, then falls" for shape in shapes.values())
    steps = np.diff(found.mean("chosen"))
    lab.claim(
        Claim(
            "sft 1",
            "y+ rises throughout; responses like it are first pulled up, then pushed down.",
            "§4.1, result 1; Fig. 3",
            "bell-shaped curves of y−, y_gpts+, y_gptf+, y_test+ and y_hum; pythia-410m y+ −152.0 "
            "→ −92.4",
            f"y+ {gain:+.2f} nats, rising in {int((steps > 0).sum())} of {len(steps)} intervals; "
            f"bell-shaped: {bells} of {len(shapes)} ("
            + "; ".join(f"“{label(n)}” {s}" for n, s in shapes.items())
            + ")",
            "agrees" if 2 * bells > len(shapes) and gain_range[0] > 0 else "disagrees",
            "a type counts as bell-shaped where the rise to its peak and the fall after it both "
            "exclude zero; the peak is found on other prompts than it is tested on",
            value=gain,
            interval=gain_range,
        )
    )
    # 2
    noise = [n for n in _NOISE if n in found.fields]
    for which, name in enumerate(noise):
        values = found.log_prob[:, :, found.column(name)]
        early = interval(f"early {name}", values[1] - values[0])
        late = interval(f"late {name}", values[-1] - values[0])
        lab.claim(
            Claim(
                f"sft 2{'ab'[which]}",
                f"Text that is not language falls from the start: {label(name)}.",
                "§4.1, result 2",
                "falls from the first probe on (Qwen-1.8B: −361.8 → −376.9 permuted, −331.2 → "
                "−345.1 random)",
                f"{early[0]:+.2f} nats after {found.updates[1]} updates (95 %: {early[1][0]:+.2f} "
                f"to {early[1][1]:+.2f}), {late[0]:+.2f} at the end",
                "agrees" if early[1][1] < 0 and late[1][1] < 0 else "disagrees",
                "decided by the changes at the first probe and at the last one",
                value=late[0],
                interval=late[1],
            )
        )
    kernels = _kernel_means(found)
    if kernels and noise:
        ratio = [kernels[n]["norm"][0] / kernels["chosen"]["norm"][0] for n in noise]
        similar = [
            kernels[n]["norm"][0] / kernels["chosen"]["norm"][0] for n in _SIMILAR if n in kernels
        ]
        lab.claim(
            Claim(
                "sft 2c",
                "The reason: ‖K‖_F between noise and natural text is about zero.",
                "§4.1, result 2",
                "assumed, never measured",
                f"‖K‖_F to noise is {min(ratio):.2f} to {max(ratio):.2f} of that to y+ itself, to "
                f"similar responses {min(similar):.2f} to {max(similar):.2f}",
                "agrees" if max(ratio) < 0.1 else "disagrees",
                "the norm of K is not what tells noise from language: what matters is A K G, whose "
                "sign the norm does not have",
                value=max(ratio),
            )
        )
    # 3
    ours, test = found.change("irr_train"), found.change("irr_test")
    both = np.stack([ours, found.change("chosen")], 1)
    share, share_range = bootstrap(
        both,
        lambda x: float(np.nanmean(x[:, 0]) / np.nanmean(x[:, 1])),
        generator=lab.generator("bootstrap", "share"),
    )
    excess, excess_range = interval("excess", ours - test)
    lab.claim(
        Claim(
            "sft 3",
            "The answer to another training prompt keeps rising, slower than y+.",
            "§4.1, result 3",
            "rises (Qwen-1.8B, extend: −164.5 → −141.6 while y+ −122.8 → −79.2: "
            "0.53 of it); offered as a reason of hallucination",
            f"{float(np.nanmean(ours)):+.2f} nats, {share:.2f} of y+'s rise; {excess:+.2f} nats "
            f"(95 %: {excess_range[0]:+.2f} to {excess_range[1]:+.2f}) more than an unlearned "
            "answer",
            "agrees"
            if share_range[0] > 0 and share_range[1] < 1 and excess_range[0] > 0
            else "disagrees",
            "it must rise, by less than y+, and by more than a held-out answer does",
            value=share,
            interval=share_range,
        )
    )
    # 4
    _fingerprint(lab, maps["start"].astype(float), setting.fields, embedded)
    _kernel_claims(lab, found)
    _accuracy_claim(lab, found, accuracy)


def _fingerprint(lab: Lab, start: np.ndarray, fields: Sequence[str], embedded: bool) -> None:
    wanted = ("chosen_gptsemantic", "reject_gptsemantic", "chosen", "rejected")
    if not all(name in fields for name in wanted):
        return
    at = [fields.index(name) for name in wanted]
    pairs = (start[:, at[0], at[1]] + start[:, at[1], at[0]]) / 2
    original = (start[:, at[0], at[2]] + start[:, at[1], at[3]]) / 2
    more, interval = bootstrap(pairs - original, generator=lab.generator("bootstrap", "print"))
    if embedded:
        verdict, reason = (
            "not testable at this scale",
            (
                "no language model wrote these; the demo's rewordings share one template per "
                "question, so that they are alike by construction"
            ),
        )
    else:
        verdict = "agrees" if interval[0] > 0 else "disagrees"
        reason = "influence, not norm, per nat that the update gives itself; mean of both ways"
    lab.claim(
        Claim(
            "sft 4",
            "Texts of the same language model influence each other more than the originals that "
            "they reword.",
            "§4.1, result 4; App. C.2",
            "y_gpts+ ↔ y_gpts− about +0.45 of the column's range",
            f"rewordings move each other by {np.nanmean(pairs):+.3f} nats per nat, their originals "
            f"by {np.nanmean(original):+.3f}",
            verdict,  # type: ignore[arg-type]
            reason,
            corrected="the published map is of LBK as coded: a root of a root, and the energy of "
            "whichever response came last",
            value=more,
            interval=interval,
        )
    )


def _kernel_claims(lab: Lab, found: Curves) -> None:
    from scipy.stats import spearmanr

    rows = found.raw["kernel"]
    if not rows:
        return
    slack = np.array([r["lbk_norm"] / r["norm"] for r in rows])
    known = np.array([r["lbk_norm"] <= r["norm"] + 2 * r["stderr"] for r in rows])
    lab.claim(
        Claim(
            "bound",
            "η‖K‖_F ≥ √LBK, to first order.",
            "App. C.2, Eq. 26",
            "used as a measure of ‖K‖; K itself is called too expensive",
            f"holds in {int(known.sum())} of {len(known)} pairs; √LBK is {np.median(slack):.1e} "
            f"of η‖K‖_F (median; {slack.min():.1e} to {slack.max():.1e})",
            "agrees" if known.all() else "disagrees",
            "of single SGD steps, between evenly spaced tokens of one prompt's responses",
            corrected="LBK by Eq. 26, not as coded",
            value=float(np.median(slack)),
        )
    )
    norm, lbk = kernel_grid(rows, "norm"), kernel_grid(rows, "lbk_norm")

    def rank(a: np.ndarray, b: np.ndarray) -> float:
        return float(spearmanr(a, b, nan_policy="omit").statistic)

    ranks = np.array(
        [
            [rank(a, b) for a, b in zip(*prompt, strict=True)]
            for prompt in zip(norm, lbk, strict=True)
        ]
    )
    value, interval, decided, prompts = over_prompts(
        ranks, lambda x: float(x.mean()), 0.5, lab.generator("bootstrap", "rank")
    )
    lab.claim(
        Claim(
            "rank",
            "LBK orders the response types as ‖K‖_F does.",
            "App. C.2",
            "only relative sizes over o are read from it",
            f"Spearman {value:+.2f}, mean over {ranks.shape[1]} states of {prompts}",
            decided,
            f"agreement is asked to be above 0.5 for sure; χ_u = y+ and {norm.shape[2]} observed "
            "types each",
            value=value,
            interval=interval,
        )
    )
    if norm.shape[1] > 1:

        def stable(x: np.ndarray) -> float:
            mean = np.nanmean(x, axis=0)
            return min(rank(mean[0], later) for later in mean[1:])

        value, interval, decided, prompts = over_prompts(
            norm, stable, 0.8, lab.generator("bootstrap", "stable")
        )
        lab.claim(
            Claim(
                "stable",
                "The order of ‖K‖_F over response types changes little in training.",
                "§3, the assumption; App. C.2",
                "“relatively stable”, judged by LBK",
                f"Spearman with the start {value:+.2f} or more, by the means of {prompts}; the "
                "norms themselves change by a factor "
                f"{np.nanmean(norm[:, -1]) / np.nanmean(norm[:, 0]):.2f}",
                decided,
                "the true norm, at every point where K was measured; above 0.8 is asked for, as in "
                "mnist",
                value=value,
                interval=interval,
            )
        )


def kernel_grid(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One quantity of the table of kernels, (prompts, updates, types); NaN where there is none."""
    places = ("prompt", "update", "observed")
    names = [list(dict.fromkeys(row[place] for row in rows)) for place in places]
    grid = np.full([len(n) for n in names], np.nan)
    for row in rows:
        grid[tuple(n.index(row[p]) for n, p in zip(names, places, strict=True))] = row[key]
    return grid


def over_prompts(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    threshold: float,
    generator: torch.Generator,
) -> tuple[float, tuple[float, float] | None, Verdict, str]:
    """Whether a statistic is above a threshold for sure, prompts being all that is independent.

    Whole prompts are resampled, with all states of theirs. Of three prompts or fewer more than one
    resample in forty holds the lowest alone, so that the percentiles are merely the range: there is
    no interval then, and the range of single prompts decides; one prompt decides nothing. A
    threshold within the interval or the range is not decided either.

    Args:
        values: (P, …).
        statistic: Of such an array.
        threshold: To be exceeded.
        generator: Of the resampling.

    Returns:
        The statistic; its 95 % interval, or none; the verdict; the prompts, in words.
    """
    value, interval = statistic(values), None
    each = [statistic(values[[prompt]]) for prompt in range(len(values))]
    if len(each) == 1:
        return value, None, "not testable at this scale", "one prompt, so that there is no interval"
    low, high = min(each), max(each)
    words = f"{len(each)} prompts"
    if len(each) > 3:
        value, interval = bootstrap(values, statistic, generator=generator)
        low, high = interval
    else:
        words += f", too few for an interval (by themselves {low:+.3f} to {high:+.3f})"
    if low <= threshold <= high:
        return value, interval, "not testable at this scale", words
    return value, interval, verdict(low > threshold), words


def _accuracy_claim(lab: Lab, found: Curves, accuracy: Sequence[Mapping[str, Any]]) -> None:
    parts = found.raw["explained"]
    if not parts or not accuracy:
        return
    # The share that the figure names: of all moves of all updates that were taken apart.
    along = explained_share(
        np.array([p["predicted"]["chosen"] for p in parts]),
        np.array([p["measured"] for p in parts]),
    )
    paper = next(a for a in accuracy if a["optimizer"] == "rmsprop" and a["lr"] == PAPER_LR)
    lab.claim(
        Claim(
            "first order",
            "One step is A K G to first order in the learning rate.",
            "Eq. 5",
            "not tested",
            f"{100 * paper['explained per step']:.1f} % of |Δ log π| of a step at "
            f"the paper's rate of {PAPER_LR:g} (RMSprop), {100 * along:.0f} % "
            "along this run at its own rate",
            "agrees" if paper["explained per step"] > 0.95 else "disagrees",
            "95 % is asked for at the paper's rate; the model is far smaller than the paper's",
            value=paper["explained per step"],
        )
    )


def _finish(
    lab: Lab, setting: Setting, found: Curves, accuracy: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    spent = found.raw["seconds"]
    plain = spent["all"] - spent["probes"] - spent["kernel"]
    seen = [
        f"{setting.title}: {found.updates[-1]} updates on {len(setting.train)} rows. y+ went from "
        f"{found.mean('chosen')[0]:.1f} to {found.mean('chosen')[-1]:.1f} nats, its greedy "
        f"confidence from {found.mean('chosen', 'greedy')[0]:.1f} to "
        f"{found.mean('chosen', 'greedy')[-1]:.1f}.",
        f"{spent['passes']} probe passes took {100 * spent['probes'] / spent['all']:.0f} % of the "
        f"CPU time of the run ({spent['probes']:.1f} of {spent['all']:.1f} s), measuring K at "
        f"{len({r['update'] for r in found.raw['kernel']})} points "
        f"{100 * spent['kernel'] / spent['all']:.0f} % ({spent['kernel']:.1f} s, "
        f"{spent['kernel'] / max(1, len(found.raw['kernel'])):.2f} s for each ‖K‖_F); training, "
        f"with {len(found.raw['explained'])} updates taken apart, the remaining {plain:.1f} s.",
    ]
    for row in accuracy:
        seen.append(
            f"{row['optimizer']} at {row['lr']:g}: {100 * row['explained per step']:.1f} % of a "
            f"step and {100 * row['explained accumulated']:.1f} % of {row['steps']} steps "
            f"explained to first order (mean move {row['mean move, nats']:.2g} nats)."
        )
    return lab.finish(
        [
            "y+ rises; answers like it rise and then fall; noise falls from the start; answers to "
            "other training prompts keep rising; texts of one author move together.",
            "√LBK / η stays below ‖K‖_F and orders response types alike.",
        ],
        seen,
    )
