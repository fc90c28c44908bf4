"""DPO, watched (§4.2, Fig. 4): its two terms at every probe, and where the mass of y− went.

Off-policy from several lengths of SFT, on-policy from the longest, and SFT at the same rate.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lddyn import encode
from lddyn.data.example import Example
from lddyn.engine.logits import response_logits
from lddyn.engine.pushforward import batched_shifts
from lddyn.errors import EmptyResponseError
from lddyn.lab.drawing import COLOURS, axes_grid, curves, label, tidy
from lddyn.lab.dynamics import Explained, Preference, Supervised, train
from lddyn.lab.record import Claim, Lab
from lddyn.lab.setting import (
    Curves,
    Recipe,
    Setting,
    batches,
    checkpoint,
    finetune,
    load,
    must_be_positive,
    one_thread,
)
from lddyn.lab.sft import bell
from lddyn.optimizers import make_optimizer
from lddyn.probes.build import sample
from lddyn.report.canvas import INK, LOWERED, RAISED
from lddyn.stats import bootstrap
from lddyn.steps.flow import Flow

__all__ = ["mass_of_run", "run", "shares_of_mass", "unrelated"]

_BETA = 0.1
_PLACES = {
    "response": ("y− itself", "#d55e00"),
    "likeliest other": ("likeliest other token", "#0072b2"),
    "top": ("rest of the ten likeliest", "#56b4e9"),
    "rest": ("all others", "#999999"),
}
_ATTRIBUTES = dict(zip(_PLACES, ("label", "argmax", "top", "rest"), strict=True))  # of a Flow


def run(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool = True,
    model: str | None = None,
    data: str | None = None,
    rows: int = 248,
    prompts: int = 40,
    lengths: Sequence[int] = (0, 100, 400),
    updates: int = 200,
    every: int = 20,
    sft_lr: float = 5e-5,
    lr: float = 2e-5,
    explained: int = 5,
    new_tokens: int = 32,
) -> dict[str, Any]:
    """Prefers y+ to y− after SFT of several lengths, and watches every type.

    Args:
        out: Folder for everything.
        seed: Of all random numbers.
        progress: Show bars.
        model: Name or folder of a causal LM. None: the demo's.
        data: Rows in the authors' format. None: the demo's.
        rows: How many are read; a fifth is held out.
        prompts: How many of the others are probes.
        lengths: Updates of SFT before DPO.
        updates: Steps of DPO, 4 pairs each.
        every: Updates between probe passes.
        sft_lr: Rate of SFT.
        lr: Rate of DPO, and of the SFT that it is compared with.
        explained: How many updates of the longest run are taken apart.
        new_tokens: Most tokens of a sampled response.

    Returns:
        What results.json holds.

    Cost: the default about 3 minutes of one core.
    """
    must_be_positive(
        rows=rows,
        prompts=prompts,
        updates=updates,
        every=every,
        sft_lr=sft_lr,
        lr=lr,
        new_tokens=new_tokens,
    )
    lengths = tuple(sorted(set(lengths)))
    if not lengths or lengths[0] < 0:
        raise ValueError(f"lengths must be numbers of updates, got {lengths}")
    options = {
        "model": model,
        "data": data,
        "rows": rows,
        "prompts": prompts,
        "lengths": lengths,
        "updates": updates,
        "every": every,
        "sft_lr": sft_lr,
        "lr": lr,
        "explained": explained,
        "new_tokens": new_tokens,
    }
    lab = Lab("dpo", Path(out), seed, options, progress)
    setting = load(lab, model, data, rows=rows, prompts=prompts)
    pairs = setting.pairs(setting.train, ("chosen", "rejected"))
    longest = lengths[-1]
    if longest:
        recipe = Recipe(Supervised(), longest, sft_lr, every=longest, keep=lengths)
        finetune(lab, "sft", setting, setting.fresh(), pairs, recipe)

    def start(length: int) -> nn.Module:
        fresh: nn.Module = setting.fresh()
        return checkpoint(lab, f"sft-{length}", fresh) if length else fresh

    apart = np.unique(np.linspace(0, updates - 1, explained).round().astype(int)).tolist()
    preferring = Recipe(Preference(_BETA), updates, lr, every=every)
    found: dict[str, Curves] = {}
    flows: dict[str, list[dict[str, float]]] = {}
    for length in lengths:
        name = f"off-policy after {length}"
        recipe = Recipe(
            Preference(_BETA),
            updates,
            lr,
            every=every,
            explain=tuple(apart) if length == longest else (),
        )
        before, after = start(length), start(length)
        found[name] = finetune(
            lab, f"off-{length}", setting, after, pairs, recipe, reference=before
        )
        with one_thread():
            flows[name] = lab.once(
                f"mass-{length}",
                partial(mass_of_run, setting, before, after),
            )
    last = start(longest)
    with one_thread():
        drawn = lab.once("sampled", lambda: _sampled(lab, setting, last, new_tokens))
    ours = _encoded_pairs(setting, drawn)
    policy = start(longest)
    found["on-policy"] = finetune(lab, "on", setting, policy, ours, preferring, reference=last)
    same_rate = Recipe(Supervised(), updates, lr, every=every)
    found["SFT at the same rate"] = finetune(
        lab, "sft-again", setting, start(longest), pairs, same_rate
    )
    with one_thread():
        step = lab.once("mass-step", lambda: _mass_of_steps(lab, setting, last, pairs))
    _tables(lab, found, flows, step)
    _pictures(lab, found, flows, step, lengths)
    _claims(lab, found, flows, lengths)
    return _finish(lab, setting, found, flows, step, lengths, len(ours))


# ---------------------------------------------------------------------------------------------
# On-policy pairs


def _sampled(lab: Lab, setting: Setting, model: nn.Module, most: int) -> list[dict[str, str]]:
    """Two samples per prompt; that which shares more words with the data's answer is preferred."""
    prompts = [row["prompt"] for row in setting.train.rows]
    both = [
        sample(
            model,
            setting.tokenizer,
            prompts,
            max_new_tokens=most,
            generator=lab.generator("sample", k),
        )
        for k in range(2)
    ]
    made = []
    for row, one, two in zip(setting.train.rows, *both, strict=True):
        scores = [_overlap(text, row["chosen"]) for text in (one, two)]
        if scores[0] != scores[1] and one.strip() and two.strip():
            better, worse = (one, two) if scores[0] > scores[1] else (two, one)
            made.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return made


def _overlap(text: str, truth: str) -> float:
    """F1 of the two sets of words."""
    one, two = set(text.split()), set(truth.split())
    return 2 * len(one & two) / max(1, len(one) + len(two))


def _encoded_pairs(setting: Setting, rows: Sequence[Mapping[str, str]]) -> list[dict[str, Example]]:
    made = []
    for row in rows:
        try:
            made.append(
                {
                    term: encode(
                        setting.tokenizer,
                        row["prompt"],
                        row[term],
                        name=term,
                        max_length=512,
                        max_prompt_length=256,
                    )
                    for term in ("chosen", "rejected")
                }
            )
        except EmptyResponseError:
            continue
    if len(made) < 4:
        raise ValueError(f"only {len(made)} sampled pairs differ: use more rows")
    return made


# ---------------------------------------------------------------------------------------------
# Where the mass went


def _by_example(model: nn.Module, examples: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
    """Log π (L, V) and targets (L,) of each response, in order."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in examples]
    with torch.inference_mode():
        for logits, targets, owners in response_logits(model, examples):
            log_probs = logits.double().log_softmax(-1)
            for owner in owners.unique().tolist():
                mine = owners == owner
                parts[owner].append((log_probs[mine], targets[mine]))
    return [(torch.cat([p for p, _ in part]), torch.cat([t for _, t in part])) for part in parts]


def _measured(before: nn.Module, after: nn.Module, examples: Sequence[Example]) -> list[Flow]:
    """Where the mass of each response went between two models."""
    pairs = zip(_by_example(before, examples), _by_example(after, examples), strict=True)
    return [Flow.of(old, new - old, targets) for (old, targets), (new, _) in pairs]


def _predicted(
    model: nn.Module, examples: Sequence[Example], move: dict[str, Tensor]
) -> list[Flow]:
    """Where it goes to first order in a move of the parameters."""
    flows = {
        index: Flow.first_order(
            shift.logits.double().log_softmax(-1), shift.change[0], shift.targets
        )
        for index, shift in batched_shifts(model, examples, [move])
    }
    return [flows[index] for index in range(len(examples))]


def _places(flow: Flow, at: slice = slice(None)) -> dict[str, float]:
    """What each place gained at these positions together, and how often y was the likeliest."""
    gained = {place: float(getattr(flow, name)[at].sum()) for place, name in _ATTRIBUTES.items()}
    return {**gained, "was likeliest": float(flow.likeliest[at].double().mean())}


def mass_of_run(setting: Setting, before: nn.Module, after: nn.Module) -> list[dict[str, float]]:
    """Where the mass of every probe's y− went between two models."""
    rejected = setting.encode(setting.probes, ("rejected",)).examples
    return [_places(flow) for flow in _measured(before, after, rejected)]


def _mass_of_steps(
    lab: Lab,
    setting: Setting,
    model: nn.Module,
    pairs: Sequence[Mapping[str, Example]],
    steps: int = 6,
    lr: float = 1e-3,
    positions: int = 16,
) -> list[dict[str, Any]]:
    """Single SGD steps on 4 pairs: where the mass of their y− went, by position and in all.

    Predicted to first order, by the y+ and the y− term, and measured; position −1 is the sum.
    """
    probes = setting.encode(setting.probes, ("rejected",)).select(range(1))
    sums: dict[tuple[str, int], list[dict[str, float]]] = {}
    for batch in batches(pairs, steps, 4, lab.generator("mass")):
        taken: list[Explained] = []
        other = copy.deepcopy(model)
        train(
            other,
            [batch],
            Preference(_BETA),
            make_optimizer("sgd", other.parameters(), lr),
            reference=model,
            explain={0},
            probes=probes,
            explained=taken.append,
        )
        examples = list(batch["rejected"])
        terms = taken[0].directions
        whole = {n: terms["chosen"][n] + terms["rejected"][n] for n in terms["chosen"]}
        found = {
            "predicted": _predicted(model, examples, whole),
            "predicted, y+ term": _predicted(model, examples, terms["chosen"]),
            "predicted, y− term": _predicted(model, examples, terms["rejected"]),
            "measured": _measured(model, other, examples),
        }
        for name, flows in found.items():
            for flow in flows:
                sums.setdefault((name, -1), []).append(_places(flow))
                for k in range(min(positions, len(flow.label))):
                    sums.setdefault((name, k), []).append(_places(flow, slice(k, k + 1)))
    return [
        {
            "kind": name,
            "position": k,
            "responses": len(group),
            **{key: float(np.mean([g[key] for g in group])) for key in group[0]},
        }
        for (name, k), group in sums.items()
    ]


# ---------------------------------------------------------------------------------------------
# Tables and pictures


def _total(flow: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.sum([f[key] for f in flow])) for key in _PLACES}


def shares_of_mass(flow: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what y− lost, where it went: places besides itself, per unit."""
    total = _total(flow)
    return {k: -v / total["response"] for k, v in total.items() if k != "response"}


def _tables(
    lab: Lab,
    found: Mapping[str, Curves],
    flows: Mapping[str, Sequence[Mapping[str, float]]],
    step: Sequence[Mapping[str, Any]],
) -> None:
    lab.table(
        "curves",
        [
            {k: v for k, v in row.items() if k in ("run", "update", "type", "log_prob", "greedy")}
            for name, curve in found.items()
            for row in curve.rows(name)
        ],
    )
    lab.table("terms", _terms(found))
    lab.table(
        "mass",
        [
            {
                "run": name,
                "moved": place,
                "sum over positions, mean over prompts": value / len(flow),
            }
            for name, flow in flows.items()
            for place, value in _total(flow).items()
        ],
    )
    lab.table("mass_step", step)


def _terms(found: Mapping[str, Curves]) -> list[dict[str, Any]]:
    """The y+ and the y− term at every type, mean over probes and the updates taken apart."""
    rows = []
    for name, curve in found.items():
        parts, types = curve.raw["explained"], np.array(curve.raw["explained types"])
        if not parts:
            continue
        measured = np.mean([p["measured"] for p in parts], 0)
        terms = {t: np.mean([p["predicted"][t] for p in parts], 0) for t in ("chosen", "rejected")}
        for field in curve.fields:
            if not (types == field).any():
                continue
            rows.append(
                {
                    "run": name,
                    "type": field,
                    "updates": len(parts),
                    "y+ term": float(terms["chosen"][types == field].mean()),
                    "y- term": float(terms["rejected"][types == field].mean()),
                    "measured": float(measured[types == field].mean()),
                }
            )
    return rows


def unrelated(curve: Curves) -> np.ndarray:
    """Change of responses that answer something else, mean over their types, per prompt."""
    names = [n for n in ("irr_train", "irr_test", "irr_hum") if n in curve.fields]
    found: np.ndarray = np.nanmean([curve.change(n) for n in names], axis=0)
    return found


def _pictures(
    lab: Lab,
    found: Mapping[str, Curves],
    flows: Mapping[str, Sequence[Mapping[str, float]]],
    step: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
) -> None:
    main = f"off-policy after {lengths[-1]}"
    shown = {
        f"DPO, off-policy, after {lengths[-1]} updates of SFT": found[main],
        "DPO, on-policy": found["on-policy"],
        "SFT at the same rate": found["SFT at the same rate"],
    }
    figure, grid = axes_grid("curves", 1, 3, 15, 4.6, sharey=True)
    for axes, (title, curve) in zip(grid, shown.items(), strict=True):
        lines = {n: curve.mean(n) - curve.mean(n)[0] for n in curve.fields}
        lines["greedy"] = curve.mean("chosen", "greedy") - curve.mean("chosen", "greedy")[0]
        curves(axes, curve.updates, lines, title, "Δ log π, nats" if axes is grid[0] else "")
    lab.figure("curves", figure, "Change of log π of every response type, mean over prompts.")
    lab.figure("terms", _draw_terms(_terms(found), main), "The two terms of Eq. 7, and their sum.")
    lab.figure("mass", _draw_mass(flows, step), "Where the probability of y− went.")
    lab.figure("longer", _draw_longer(found, flows, lengths), "What longer SFT does to DPO.")


def _draw_terms(rows: Sequence[Mapping[str, Any]], main: str) -> Any:
    rows = [row for row in rows if row["run"] == main]
    figure, grid = axes_grid("terms", 1, 1, 8, 0.9 + 0.3 * len(rows))
    axes = grid[0]
    for at, row in enumerate(rows):
        axes.barh(at - 0.18, row["y+ term"], 0.34, color=RAISED)
        axes.barh(at + 0.18, row["y- term"], 0.34, color=LOWERED)
        axes.plot(row["y+ term"] + row["y- term"], at, "D", color=INK, markersize=4)
        axes.plot(row["measured"], at, "o", markerfacecolor="none", color=INK, markersize=8)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(range(len(rows)), [label(row["type"]) for row in rows])
    axes.invert_yaxis()
    axes.set_title(
        "what an update's y+ term (blue) and y− term (red) do; ◆ their sum, ○ measured",
        fontsize=9.5,
        loc="left",
    )
    axes.set_xlabel("Δ log π per update, nats", fontsize=8)
    tidy(axes)
    return figure


def _draw_mass(
    flows: Mapping[str, Sequence[Mapping[str, float]]], step: Sequence[Mapping[str, Any]]
) -> Any:
    figure, grid = axes_grid("mass", 1, 2, 12.5, 4.4)
    bars: dict[str, dict[str, float]] = {
        f"whole run, {name.removeprefix('off-policy ')}": {
            k: v / abs(_total(flow)["response"]) for k, v in _total(flow).items()
        }
        for name, flow in flows.items()
    }
    for row in step:
        if row["position"] < 0:
            lost = abs(
                next(r for r in step if r["position"] < 0 and r["kind"] == "measured")["response"]
            )
            bars[f"one step, {row['kind']}"] = {k: row[k] / lost for k in _PLACES}
    axes = grid[0]
    for at, parts in enumerate(bars.values()):
        right = left = 0.0
        for place, value in parts.items():
            axes.barh(at, value, left=right if value > 0 else left, color=_PLACES[place][1])
            right, left = right + max(value, 0), left + min(value, 0)
    axes.axvline(0, color=INK, linewidth=0.6)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_title("where the mass of y− went, per unit that it lost", fontsize=9.5, loc="left")
    tidy(axes)
    where = dict(zip(_PLACES, (0.0, 0.13, 0.46, 0.84), strict=True))
    for place, (text, colour) in _PLACES.items():
        axes.annotate(
            text,
            (where[place], -0.14),
            xycoords="axes fraction",
            color=colour,
            fontsize=7.5,
            weight="bold",
        )
    axes = grid[1]
    for kind, style in (("measured", "o"), ("predicted", "-")):
        steps = sorted(
            (r for r in step if r["kind"] == kind and r["position"] >= 0),
            key=lambda r: r["position"],
        )
        for place, (_, colour) in _PLACES.items():
            axes.plot(
                [r["position"] for r in steps],
                [r[place] for r in steps],
                style,
                color=colour,
                markersize=4,
                linewidth=1.2,
            )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_title(
        "one step, by position: points measured, lines predicted", fontsize=9.5, loc="left"
    )
    axes.set_xlabel("token of y−", fontsize=8)
    axes.set_ylabel("Δπ", fontsize=8)
    tidy(axes)
    return figure


def _draw_longer(
    found: Mapping[str, Curves],
    flows: Mapping[str, Sequence[Mapping[str, float]]],
    lengths: Sequence[int],
) -> Any:
    figure, grid = axes_grid("longer", 1, 3, 12.5, 3.6)
    runs = [found[f"off-policy after {n}"] for n in lengths]
    panels: list[tuple[str, dict[str, list[float]]]] = [
        (
            "Δ log π by DPO, nats",
            {
                n: [float(np.nanmean(r.change(n))) for r in runs]
                for n in ("chosen", "rejected", "irr_train", "irr_test")
            },
        ),
        (
            "Δ greedy confidence of y+'s prefix, nats",
            {"greedy": [float(np.nanmean(r.change("chosen", "greedy"))) for r in runs]},
        ),
        (
            "share of y−'s lost mass",
            {
                place: [shares_of_mass(flows[f"off-policy after {n}"])[place] for n in lengths]
                for place in ("likeliest other", "top", "rest")
            },
        ),
    ]
    for axes, (title, lines) in zip(grid, panels, strict=True):
        for name, values in lines.items():
            place = _PLACES.get(name)
            colour = place[1] if place else COLOURS[name]
            axes.plot(lengths, values, "o-", color=colour, markersize=4)
            axes.annotate(
                place[0] if place else label(name),
                (lengths[-1], values[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
                va="center",
                annotation_clip=False,
            )
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_xlabel("updates of SFT before DPO", fontsize=8)
        tidy(axes)
    return figure


# ---------------------------------------------------------------------------------------------
# Claims


def _claims(
    lab: Lab,
    found: Mapping[str, Curves],
    flows: Mapping[str, Sequence[Mapping[str, float]]],
    lengths: Sequence[int],
) -> None:
    def interval(name: str, values: np.ndarray) -> tuple[float, tuple[float, float]]:
        return bootstrap(values, generator=lab.generator("bootstrap", name))

    main = found[f"off-policy after {lengths[-1]}"]
    first = found[f"off-policy after {lengths[0]}"]
    again, ours = found["SFT at the same rate"], found["on-policy"]

    def kin(prefix: str) -> np.ndarray:
        names = [n for n in main.fields if n.startswith(prefix) and "_gpt" in n]
        values: np.ndarray = np.nanmean([main.change(n) for n in names], axis=0)
        return values

    if any("_gpt" in n for n in main.fields):
        gap, gap_range = interval("kin", kin("reject") - kin("chosen"))
        lab.claim(
            Claim(
                "dpo 1",
                "Rephrases of y− fall faster than rephrases of y+.",
                "§4.2, result 1; Fig. 4",
                "pythia-410m: gpts− −50.9 and gptf− −43.1, gpts+ −32.0 and gptf+ −31.7 nats",
                f"{np.nanmean(kin('reject')):+.2f} against {np.nanmean(kin('chosen')):+.2f} nats",
                "agrees" if gap_range[1] < 0 else "disagrees",
                "difference per prompt, of the two rewordings of each",
                value=gap,
                interval=gap_range,
            )
        )
    rise, fall = bell(main.log_prob[:, :, main.column("chosen")])
    up, down = interval("rise", rise), interval("fall", fall)
    lost, lost_range = interval("lost", main.change("rejected"))
    lab.claim(
        Claim(
            "dpo 2",
            "y+ rises first and falls later, while y− falls all along.",
            "§4.2, result 2; Fig. 4",
            "pythia-410m: y+ −152.0 → −140.2 → −146.3, y− −121.4 → −197.6",
            f"y+ rises by {up[0]:+.2f} (95 %: {up[1][0]:+.2f} to {up[1][1]:+.2f}), then moves by "
            f"{down[0]:+.2f} ({down[1][0]:+.2f} to {down[1][1]:+.2f}); y− {lost:+.2f} nats",
            "agrees" if up[1][0] > 0 and down[1][1] < 0 and lost_range[1] < 0 else "disagrees",
            "peak found on other prompts than it is tested on",
            value=down[0],
            interval=down[1],
        )
    )
    decay, decay_range = interval("decay", unrelated(main) - unrelated(again))
    lab.claim(
        Claim(
            "dpo 3",
            "Unrelated responses decay faster under DPO than under SFT, at the same rate.",
            "§4.2, result 3",
            "“much faster”, even at a smaller rate; pythia-410m DPO: y_j≠u −29.6, "
            "y_test −48.9, y_hum −34.7 nats",
            f"DPO {np.nanmean(unrelated(main)):+.2f}, SFT {np.nanmean(unrelated(again)):+.2f} nats",
            "agrees" if decay_range[1] < 0 else "disagrees",
            "same start, rows, rate and number of updates; mean of the three unrelated types",
            value=decay,
            interval=decay_range,
        )
    )
    peak, peak_range = interval("greedy", main.change("chosen", "greedy"))
    gain, gain_range = interval("gain", main.change("chosen"))
    lab.claim(
        Claim(
            "dpo 4a",
            "Greedy confidence rises while y+ falls.",
            "§4.2, result 4; Fig. 4",
            "−113 → −63 within 8 epochs, “even faster than” SFT's y+",
            f"Σ log max π along y+: {peak:+.2f} nats, y+ {gain:+.2f} (95 %: {gain_range[0]:+.2f} "
            f"to {gain_range[1]:+.2f})",
            "agrees" if peak_range[0] > 0 and gain_range[1] < 0 else "disagrees",
            "correct greedy confidence, of y+'s own prefix; a model this small has little to "
            "squeeze into",
            corrected="that series was measured on random words; corrected stored runs: −61.6 → "
            "−54.4, slower than SFT's −44.5, or −41.2 at batch 2 with y+ −152.0 → −156.2",
            value=peak,
            interval=peak_range,
        )
    )
    flow = flows[f"off-policy after {lengths[-1]}"]
    moved = np.array([[f["response"], f["likeliest other"]] for f in flow])
    share, share_range = bootstrap(
        moved,
        lambda x: float(-x[:, 1].sum() / x[:, 0].sum()),
        generator=lab.generator("bootstrap", "share"),
    )
    parts = shares_of_mass(flow)
    lab.claim(
        Claim(
            "dpo 4b",
            "The mass of y− is squeezed into the likeliest token.",
            "§4.2; §3.3",
            "argued from the one-position theory; never measured",
            f"of what y− lost at its positions {100 * share:.0f} % went to the likeliest other "
            f"token, {100 * parts['top']:.0f} % to the rest of the ten likeliest, "
            f"{100 * parts['rest']:.0f} % to all others",
            "agrees" if share_range[0] > 0.5 else "disagrees",
            "more than half is asked for; whole run, summed over positions of y− in the probes",
            value=share,
            interval=share_range,
        )
    )
    if len(lengths) > 1:
        longer, longer_range = interval("longer", unrelated(main) - unrelated(first))
        lab.claim(
            Claim(
                "dpo 4c",
                "The longer SFT lasted, the stronger is the squeezing.",
                "poster: “train longer → stronger”",
                "no number survives",
                "unrelated responses move by "
                + ", ".join(
                    f"{np.nanmean(unrelated(found[f'off-policy after {n}'])):+.2f} after {n}"
                    for n in lengths
                )
                + " updates of SFT (nats)",
                "agrees" if longer_range[1] < 0 else "disagrees",
                "decided by the longest against the shortest SFT, the same DPO after both",
                value=longer,
                interval=longer_range,
            )
        )
    on, on_range = interval("on", unrelated(ours) - unrelated(main))
    lab.claim(
        Claim(
            "on-policy",
            "With pairs from the model itself the squeezing is weaker.",
            "§4.2; Fig. 2",
            "a sketch",
            f"unrelated responses {np.nanmean(unrelated(ours)):+.2f} nats on-policy, "
            f"{np.nanmean(unrelated(main)):+.2f} off-policy",
            "agrees" if on_range[0] > 0 else "disagrees",
            "two samples per prompt; preferred is the one that shares more words with the data's "
            "answer",
            value=on,
            interval=on_range,
        )
    )


def _finish(
    lab: Lab,
    setting: Setting,
    found: Mapping[str, Curves],
    flows: Mapping[str, Sequence[Mapping[str, float]]],
    step: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    pairs: int,
) -> dict[str, Any]:
    main = found[f"off-policy after {lengths[-1]}"]
    spent = [c.raw["seconds"] for c in found.values()]
    whole, probing = sum(s["all"] for s in spent), sum(s["probes"] for s in spent)
    measured = next(r for r in step if r["kind"] == "measured" and r["position"] < 0)
    predicted = next(r for r in step if r["kind"] == "predicted" and r["position"] < 0)
    return lab.finish(
        [
            "y+ rises little and falls later, y− falls far, and with it everything else; rewordings"
            " of y− fall faster than those of y+; mass goes to the greedy answer, the more so the"
            " longer SFT was.",
        ],
        [
            f"{setting.title}, after {lengths[-1]} updates of SFT: y+ "
            f"{np.nanmean(main.change('chosen')):+.2f}, y− "
            f"{np.nanmean(main.change('rejected')):+.2f}, unrelated "
            f"{np.nanmean(unrelated(main)):+.2f}, greedy "
            f"{np.nanmean(main.change('chosen', 'greedy')):+.2f} nats in {main.updates[-1]} "
            f"updates of DPO; {pairs} on-policy pairs.",
            f"One small step took {-measured['response']:.3g} of probability off y−'s tokens "
            f"(predicted {-predicted['response']:.3g}), and gave {measured['likeliest other']:.3g} "
            f"(predicted {predicted['likeliest other']:.3g}) to the likeliest other tokens; y− was "
            f"itself the likeliest at {100 * measured['was likeliest']:.0f} % of its positions.",
            f"Probe passes took {100 * probing / whole:.0f} % of the runs' CPU time.",
        ],
    )
