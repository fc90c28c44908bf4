"""What `lddyn lab mnist` claims of its runs: statistics, verdicts, tables and pictures.

Each `judge_*` takes what was measured, writes a table and a picture, makes claims, and returns
sentences for the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from lddyn.lab.mnist.measure import CLASSES, FITTED, NETWORKS, Halves, logits
from lddyn.lab.mnist.pictures import draw_accumulated, draw_kernel, draw_maps, draw_step
from lddyn.lab.record import Claim, Lab, Verdict
from lddyn.lab.settings import Mnist

__all__ = ["judge_kernel", "judge_maps", "judge_step", "judge_sums"]

_REPEATS = 1000  # of a bootstrap

# What is called so, stated before anything was measured.
_STABLE = 0.8  # rank correlation
_CHANGED = 1.25  # factor of a norm
_STRONG = 0.5  # correlation
_EXPLAINED = 0.9  # share


# --------------------------------------------------------------------------- statistics


def _spearman(a: Any, b: Any) -> np.ndarray:
    """Rank correlation along the last dimension."""
    ranks = [rankdata(x, axis=-1) for x in (a, b)]
    a, b = (r - r.mean(-1, keepdims=True) for r in ranks)
    found: np.ndarray = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return found


def _draws(lab: Lab, label: str, sizes: Sequence[int]) -> np.ndarray:
    """Bootstrap indices (repeats, Σ sizes): drawn with replacement within groups of these sizes."""
    generator, offset, parts = lab.generator("bootstrap", label), 0, []
    for size in sizes:
        parts.append(torch.randint(size, (_REPEATS, size), generator=generator) + offset)
        offset += size
    return torch.cat(parts, 1).numpy()


def _interval(values: Any) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values), (0.025, 0.975))
    return float(low), float(high)


def _by_class(norms: np.ndarray) -> np.ndarray:
    """(…, 10 n, 10 m), sorted by class, to means by class (…, 10, 10)."""
    *lead, rows, columns = norms.shape
    blocks = norms.reshape(*lead, CLASSES, rows // CLASSES, CLASSES, columns // CLASSES)
    found: np.ndarray = blocks.mean((-3, -1))
    return found


_OFF = ~np.eye(CLASSES, dtype=bool)
_PAIRS = [(a, b) for a in range(CLASSES) for b in range(a + 1, CLASSES)]


def _pairs(by_class: np.ndarray) -> np.ndarray:
    """The 45 pairs of different classes, both ways averaged: (…, 45)."""
    return np.stack([(by_class[..., a, b] + by_class[..., b, a]) / 2 for a, b in _PAIRS], -1)


def _percentiles(values: np.ndarray, of: Sequence[tuple[int, int]]) -> np.ndarray:
    """The mean place of these pairs among the 45, 0 … 100: (…,)."""
    at = [_PAIRS.index(pair) for pair in of]
    ranks = rankdata(values, axis=-1)[..., at].mean(-1)
    found: np.ndarray = 100 * (ranks - 1) / (len(_PAIRS) - 1)
    return found


def _asymmetry(table: np.ndarray) -> np.ndarray:
    """‖M − Mᵀ‖ / ‖M + Mᵀ‖ off the diagonal: 0 for a symmetric table."""
    off, turned = table * _OFF, np.swapaxes(table * _OFF, -1, -2)
    found: np.ndarray = np.linalg.norm(off - turned, axis=(-2, -1)) / np.linalg.norm(
        off + turned, axis=(-2, -1)
    )
    return found


def _verdict(holds: bool, testable: bool = True) -> Verdict:
    """What holds agrees; what does not, on images it was not said of, is not testable."""
    if holds:
        return "agrees"
    return "disagrees" if testable else "not testable at this scale"


def _named_pairs(pairs: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{a}–{b}" for a, b in pairs)


def _short(value: Any) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------- the panels


def judge_step(
    lab: Lab, settings: Mnist, halves: Halves, step: Mapping[str, Any], late: Mapping[str, Any]
) -> list[str]:
    """Panels a and b: one step on a 4, early in training; `late` is the same at its end."""
    predicted, measured = np.array(step["predicted"]), np.array(step["measured"])
    norms, rates = np.array(step["norms"]), np.array(step["rates"])
    residuals = np.array(step["residuals"])
    each, fours = settings.probes, norms.shape[1]
    fitted = rates <= FITTED[-1] * 1.001
    x, y = np.log10(rates[fitted]), np.log10(residuals[fitted])
    slopes = ((x - x.mean()) @ (y - y.mean(0))) / ((x - x.mean()) ** 2).sum()
    of_fours = _draws(lab, "fours", [fours])
    slope, slope_interval = float(slopes.mean()), _interval(slopes[of_fours].mean(1))
    explained = 1 - ((measured - predicted) ** 2).sum() / (measured**2).sum()
    lab.claim(
        Claim(
            "Prop. 1",
            "One step changes log π(·|x_o) by −η A K G, up to O(η²).",
            "§2, Prop. 1, Eq. 3",
            "derived; never measured",
            f"the residual falls as η^{slope:.3f} between η = {FITTED[0]:g} and {FITTED[-1]:g}; "
            f"at the training's η = {settings.lr:g}, −η A K G explains "
            f"{100 * explained:.2f} % of the squared change",
            _verdict(slope_interval[0] > 1.9 and slope_interval[1] < 2.1),
            f"float64; {fours} update images, {norms.shape[0]} observed ones, all ten labels; "
            "interval over update images",
            value=slope,
            interval=slope_interval,
        )
    )

    cases = {"identical": 4, "similar": 9, "dissimilar": int(step["dissimilar"])}
    of_probes = _draws(lab, "observed", [each] * CLASSES)
    four = measured[:, :, 4]
    # (repeats, 10): resampled over update and observed images.
    again = np.stack(
        [
            four[o][:, u].reshape(CLASSES, -1).mean(1)
            for o, u in zip(of_probes, of_fours, strict=True)
        ]
    )
    means = four.reshape(CLASSES, -1).mean(1)
    pull = {case: float(means[c]) for case, c in cases.items()}
    late_means = np.array(late["measured"])[:, :, 4].reshape(CLASSES, -1).mean(1)
    late_said = ", ".join(f"{c} {1000 * late_means[c]:+.3g}" for c in cases.values())
    apart = [
        _interval(again[:, cases[a]] - again[:, cases[b]])[0] > 0
        for a, b in (("identical", "similar"), ("similar", "dissimilar"))
    ]
    rises = _interval(again[:, 9])[0] > 0
    ordered = float(_spearman(norms.T, four.T).mean())
    little = abs(pull["dissimilar"]) < 0.25 * pull["identical"]
    size = norms.reshape(CLASSES, -1).mean(1)
    doubts = []
    if not apart[0]:
        doubts.append("identical is not above similar")
    if not rises:
        doubts.append("the 9 is not pulled up")
    if not apart[1]:
        doubts.append("similar is not above dissimilar")
    if not little:
        doubts.append(
            ("the order is right, but " if not doubts else "")
            + f"the dissimilar class moves by {pull['dissimilar'] / pull['identical']:.2f} of the "
            "identical one, not by less than a quarter: its ‖K‖_F is "
            f"{size[cases['dissimilar']] / size[4]:.2f} of that of the 4s"
        )
    lab.claim(
        Claim(
            "Fig. 1b",
            "After a step on a 4, π(4|x_o) is pulled up where x_o is a 4, also where it is a "
            "similar 9, and almost not where it is dissimilar.",
            "§2, Fig. 1b",
            "drawn, without numbers",
            "Δ log π(4|x_o), millinats: "
            + ", ".join(f"{case} ({c}) {1000 * pull[case]:+.3g}" for case, c in cases.items())
            + f"; the class most similar to 4 by ‖K‖_F is {step['similar']}: "
            f"{1000 * means[step['similar']]:+.3g}; rank correlation of ‖K_uo‖_F and pull over all "
            f"x_o, mean of the x_u: {ordered:.2f}; at the end of training: {late_said}",
            _verdict(not doubts),
            "; ".join(doubts)
            or "all differences have intervals above 0; dissimilar is the class "
            "with the smallest ‖K‖_F on training images",
            value=float(pull["similar"] / pull["identical"]),
            interval=_interval(again[:, 9] / again[:, 4]),
        )
    )

    rows, residual_rows = [], []
    shown = _shown(step, cases, each)
    for case, o in shown.items():
        for label in range(CLASSES):
            rows.append(
                {
                    "case": case,
                    "class_observed": cases[case],
                    "label": label,
                    "asked_of_update": _short(step["pulls"][0][label]),
                    "norm": _short(norms[o, 0]),
                    "predicted": _short(predicted[o, 0, label]),
                    "measured": _short(measured[o, 0, label]),
                }
            )
    lab.table("one_step", rows)
    for rate, row in zip(rates, residuals, strict=True):
        residual_rows += [
            {"learning_rate": _short(rate), "update": u, "residual": _short(r)}
            for u, r in enumerate(row)
        ]
    lab.table("one_step_residual", residual_rows)
    classes = [
        {
            "class_observed": c,
            "norm": _short(size[c]),
            "pull": _short(means[c]),
            "low": _short(_interval(again[:, c])[0]),
            "high": _short(_interval(again[:, c])[1]),
        }
        for c in range(CLASSES)
    ]
    lab.table("one_step_classes", classes)
    pictures_of = {case: halves.unseen.pixels[halves.observed][o, 0] for case, o in shown.items()}
    lab.figure(
        "one_step",
        draw_step(
            rows,
            residual_rows,
            classes,
            pictures_of,
            halves.learned.pixels[step["fours"][0], 0],
            settings.lr,
            slope,
            ordered,
            settings.early,
        ),
        f"One step on a single 4, after {settings.early} epochs. Rings: predicted "
        "by −η A K G; bars: measured. Below: what the first "
        "order leaves out, and the pull on label 4 against ‖K‖_F for every class of x_o.",
    )
    return [
        f"−η A K G explains {100 * explained:.2f} % of one step's squared change of log π at the "
        f"training's learning rate; what is left falls as η^{slope:.2f}.",
        f"A step on a 4 pulls the label 4 up by {1000 * pull['identical']:.3g} millinats on other "
        f"4s, {1000 * pull['similar']:.3g} on 9s and {1000 * pull['dissimilar']:.3g} on "
        f"{cases['dissimilar']}s.",
    ]


def _shown(step: Mapping[str, Any], cases: Mapping[str, int], each: int) -> dict[str, int]:
    """For each case the observed image whose ‖K‖_F with the first 4 is the median of its class."""
    norms = np.array(step["norms"])[:, 0]
    found = {}
    for case, c in cases.items():
        members = np.arange(c * each, (c + 1) * each)
        found[case] = int(members[np.argsort(norms[members])[each // 2]])
    return found


def judge_maps(lab: Lab, settings: Mnist, halves: Halves, trained: Mapping[str, Any]) -> list[str]:
    """Panels c and d, items 5 and 6 of App. C.1: accumulated influence and mean prediction."""
    each = settings.probes
    module = NETWORKS[settings.network]()
    probabilities = (
        logits(module, trained["theta"].float(), halves.unseen.pixels).softmax(-1).numpy()
    )
    order = np.argsort(halves.unseen.classes.numpy(), kind="stable")
    probabilities = probabilities[order]
    counts = np.bincount(halves.unseen.classes.numpy(), minlength=CLASSES)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def mean_prediction(chosen: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.add.reduceat(chosen, starts, 0) / counts[:, None]
        return found

    prediction = mean_prediction(probabilities)
    of_images = _draws(lab, "unseen", counts.tolist())
    predictions = np.stack([mean_prediction(probabilities[i]) for i in of_images])

    at = np.arange(CLASSES)

    def influence(sums: np.ndarray) -> np.ndarray:
        # Source class u, its own label: (u, o) by class of o.
        found: np.ndarray = sums[at, :, at].reshape(CLASSES, CLASSES, -1).mean(-1)
        return found

    pulls, sums = trained["pulls"].numpy(), trained["sums"].numpy()
    pull, pull_log = influence(pulls), influence(sums)
    norms = trained["norms"].numpy()
    integral = _by_class(norms.sum(0))
    of_probes = _draws(lab, "probes o", [each] * CLASSES)
    of_updates = _draws(lab, "probes u", [each] * CLASSES)
    pulls_again = np.stack([influence(pulls[:, o]) for o in of_probes])
    integrals = np.stack(
        [_by_class(norms.sum(0)[u][:, o]) for o, u in zip(of_probes, of_updates, strict=True)]
    )

    published = halves.unseen.published
    where = _percent_in_row(prediction)
    bumps = float((where[4, 9] + where[9, 4]) / 2)
    again = _percent_in_row(predictions)
    bumps_interval = _interval((again[:, 4, 9] + again[:, 9, 4]) / 2)
    holds = bumps_interval[0] > 50
    largest = {c: int(np.argmax(np.where(at == c, -1, prediction[c]))) for c in range(CLASSES)}
    lab.claim(
        Claim(
            "Fig. 1c",
            "Predictions for 4s have a bump on 9, and those for 9s on 4.",
            "§2, Fig. 1c, d",
            "true 4: p(4) .71, p(9) .18; true 9: p(9) .62, p(4) .17 (MNIST)",
            f"true 4: p(4) {prediction[4, 4]:.2f}, p(9) {prediction[4, 9]:.3f}, largest wrong "
            f"label {largest[4]} ({prediction[4, largest[4]]:.3f}); true 9: p(9) "
            f"{prediction[9, 9]:.2f}, p(4) {prediction[9, 4]:.3f}, largest wrong label "
            f"{largest[9]} ({prediction[9, largest[9]]:.3f}); mean place of the two "
            f"among the nine wrong labels {bumps:.0f} of 100",
            _verdict(holds, published),
            "above the middle of the wrong labels, with its interval"
            if holds
            else "not above the middle of the wrong labels; " + _other_images(halves),
            corrected="from the logits; the published notebook's cell takes the softmax of "
            "another layer as committed",
            value=bumps,
            interval=bumps_interval,
        )
    )
    turned = np.swapaxes(pulls_again, -1, -2)
    reinforced = float(_spearman(pull.T[_OFF], prediction[_OFF]))
    reinforced_interval = _interval(_spearman(turned[:, _OFF], predictions[:, _OFF]))
    lab.claim(
        Claim(
            "Fig. 1d",
            "The wrong labels that a class predicts are those whose updates pulled on it.",
            "§2, Fig. 1c, d",
            "by eye: bumps at 4/9, 5/3, 8/5",
            f"rank correlation {reinforced:.2f} between the accumulated pull of class y on x_o and "
            "the mean prediction π(y|x_o), over the 90 pairs of classes",
            _verdict(reinforced_interval[0] > _STRONG),
            f"called so if the interval lies above {_STRONG:g}; interval over images: "
            "resampling adds noise, which lowers it",
            value=reinforced,
            interval=reinforced_interval,
        )
    )

    unlike, unlike_k = float(_asymmetry(pull)), float(_asymmetry(integral))
    difference = _interval(_asymmetry(pulls_again) - _asymmetry(integrals))
    lab.claim(
        Claim(
            "C.1 item 5",
            "Influence is not symmetric between classes, because A and G differ; K is: "
            "K(o, u) = K(u, o)ᵀ.",
            "App. C.1, item 5",
            "by eye",
            f"‖M − Mᵀ‖ / ‖M + Mᵀ‖ is {unlike:.3f} for the accumulated influence, {unlike_k:.3f} "
            "for the class means of ‖K‖_F (different images on both sides: sampling alone)",
            _verdict(difference[0] > 0),
            "the difference and its interval over images; K itself is symmetric by definition",
            value=unlike - unlike_k,
            interval=difference,
        )
    )
    related = float(_spearman(pull[_OFF], integral[_OFF]))
    related_interval = _interval(_spearman(pulls_again[:, _OFF], integrals[:, _OFF]))
    lab.claim(
        Claim(
            "C.1 item 6",
            "The accumulated influence correlates strongly with the time integral of ‖K_uo‖_F.",
            "App. C.1, item 6",
            "by eye",
            f"rank correlation {related:.2f} over the 90 pairs of different classes",
            _verdict(related_interval[0] > _STRONG),
            f"strong if the interval lies above {_STRONG:g}; interval over images",
            value=related,
            interval=related_interval,
        )
    )
    rows = [
        {
            "class_update": u,
            "class_observed": o,
            "pull": _short(pull[u, o]),
            "pull_log": _short(pull_log[u, o]),
            "mean_prediction": _short(prediction[o, u]),
            "norm_integral": _short(integral[u, o]),
        }
        for u in range(CLASSES)
        for o in range(CLASSES)
    ]
    lab.table("maps", rows)
    lab.figure(
        "maps",
        draw_maps(rows),
        "Row: the class that was learned, and its label. Column: the class that is observed. "
        "Hundredths; the diagonal is left white. Pulls may exceed 1: others push back.",
    )
    return [
        f"The accumulated pull of a class explains where wrong predictions sit (rank correlation "
        f"{reinforced:.2f}) and follows the time integral of ‖K‖_F ({related:.2f}); "
        f"its asymmetry is {unlike:.2f}, that of ‖K‖_F {unlike_k:.2f}.",
    ]


def _percent_in_row(table: np.ndarray) -> np.ndarray:
    """The place 0 … 100 of each entry among the nine that are not on the diagonal of its row."""
    ranks = rankdata(np.where(_OFF, table, -np.inf), axis=-1)
    found: np.ndarray = 100 * (ranks - 2) / (CLASSES - 2)
    return found


def _other_images(halves: Halves) -> str:
    if halves.unseen.published:
        return "on the paper's images"
    return f"the claim names classes of MNIST, these are {halves.unseen.source}"


def judge_kernel(
    lab: Lab, settings: Mnist, halves: Halves, runs: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Items 1 to 4 of App. C.1: ‖K‖_F over training."""
    each, early = settings.probes, settings.early
    of_updates = _draws(lab, "ranking u", [each] * CLASSES)
    stable, consecutive = {}, {}
    rows: list[dict[str, Any]] = []
    for name, trained in runs.items():
        norms, drifts = trained["norms"].numpy(), trained["drifts"].numpy()
        to_last = _spearman(norms, norms[-1][None])  # (epoch, u)
        to_next = _spearman(norms[1:], norms[:-1])
        stable[name], consecutive[name] = to_last, to_next
        for t, table in enumerate(norms):
            low, high = _interval(to_last[t][of_updates].mean(1))
            row = {
                "descent": name,
                "epoch": t,
                "norm": table.mean(),
                "rank_to_last_low": low,
                "rank_to_last": to_last[t].mean(),
                "rank_to_last_high": high,
                "rank_to_previous": to_next[t - 1].mean() if t else None,
                "drift": drifts[t - 1].mean() if t else None,
            }
            for key in ("loss", "unseen_loss", "unseen_accuracy", "explained"):
                row[key] = trained["epochs"][t - 1][key] if t else None
            rows.append(
                {k: _short(v) if isinstance(v, float | np.floating) else v for k, v in row.items()}
            )
    lab.table("kernel_over_training", rows)

    settled, settled_interval = {}, {}
    for name, values in consecutive.items():
        change = values[-early:].mean(0) - values[:early].mean(0)
        settled[name] = float(change.mean())
        settled_interval[name] = _interval(change[of_updates].mean(1))
    relative = {
        name: (trained["drifts"].numpy() / trained["norms"].numpy()[1:]).mean((1, 2))
        for name, trained in runs.items()
    }
    lab.claim(
        Claim(
            "C.1 item 1",
            "Early epochs are messy, late ones behave like finetuning.",
            "App. C.1, item 1",
            "epochs 0–30 messy, 800–1000 like finetuning",
            f"rank correlation of ‖K_uo‖_F over o between neighbouring epochs: "
            f"{consecutive['momentum'][:early].mean():.3f} in the first fifth of {settings.epochs} "
            f"epochs, {consecutive['momentum'][-early:].mean():.4f} in the last; K changes by "
            f"{100 * relative['momentum'][:early].mean():.0f} % an epoch, then "
            f"{100 * relative['momentum'][-early:].mean():.2g} %. At a constant learning rate: "
            f"{consecutive['plain'][:early].mean():.3f}, {consecutive['plain'][-early:].mean():.4f}"
            f"; {100 * relative['plain'][:early].mean():.0f} %, "
            f"{100 * relative['plain'][-early:].mean():.2g} %",
            _verdict(all(interval[0] > 0 for interval in settled_interval.values())),
            "the rise from the first to the last fifth, over update images; holds only if also the "
            "run at a constant learning rate rises, where no schedule freezes the end",
            value=settled["momentum"],
            interval=settled_interval["momentum"],
        )
    )
    norms = runs["momentum"]["norms"].numpy()
    growth = float(norms[-1].mean() / norms[early].mean())
    rho = stable["momentum"][early]
    rho_interval = _interval(rho[of_updates].mean(1))
    plain_rho = float(stable["plain"][early].mean())
    plain_growth = float(runs["plain"]["norms"][-1].mean() / runs["plain"]["norms"][early].mean())
    moved = abs(math.log(growth)) > math.log(_CHANGED)
    firm = rho_interval[0] > _STABLE
    doubts = [] if firm else [f"the ranking's interval is not above {_STABLE:g}"]
    doubts += [] if moved else [f"the mean norm changes by less than a factor {_CHANGED:g}"]
    lab.claim(
        Claim(
            "C.1 item 2",
            "‖K_uo‖_F and its drift change a lot, also late, while the ranking over o is stable: "
            "the paper's only assumption.",
            "§2; App. C.1, item 2",
            "by eye",
            f"from epoch {early} to {settings.epochs} the mean norm changes by a factor "
            f"{growth:.2f} and the ranking over o correlates with the last at {rho.mean():.2f} "
            f"(from the initialisation: {stable['momentum'][0].mean():.2f}); plain descent at a "
            f"constant learning rate: factor {plain_growth:.2f}, {plain_rho:.2f}",
            _verdict(firm and moved),
            "; ".join(doubts)
            or f"stable: interval over update images above {_STABLE:g}; a lot: {_CHANGED:g}-fold; "
            + ("so does" if plain_rho > _STABLE else "not so")
            + " the run at a constant learning rate",
            value=float(rho.mean()),
            interval=rho_interval,
        )
    )

    integral = norms.sum(0)
    of_probes = _draws(lab, "ranking o", [each] * CLASSES)
    pairs = _pairs(_by_class(integral))
    pairs_again = _pairs(
        np.stack([_by_class(integral[u][:, o]) for u, o in zip(of_updates, of_probes, strict=True)])
    )
    by_norm = [_PAIRS[i] for i in np.argsort(pairs)]
    # Halves that share no image, on either side.
    u, o = (np.arange(CLASSES * each).reshape(CLASSES, each) for _ in range(2))
    half = each // 2
    first, second = (
        _pairs(_by_class(integral[u[:, s].ravel()][:, o[:, s].ravel()]))
        for s in (slice(0, half), slice(half, 2 * half))
    )
    clear = float(_spearman(first, second))
    of_pairs = _draws(lab, "pairs", [len(_PAIRS)])
    clear_interval = _interval(_spearman(first[of_pairs], second[of_pairs]))
    for item, word, named, extreme in (
        (3, "similar", ((4, 9), (5, 8)), by_norm[::-1][:4]),
        (4, "dissimilar", ((6, 7), (2, 5)), by_norm[:4]),
    ):
        place = float(_percentiles(pairs, named))
        interval = _interval(_percentiles(pairs_again, named))
        holds = interval[0] > 50 if word == "similar" else interval[1] < 50
        each_place = ", ".join(f"{a}–{b} {_percentiles(pairs, [(a, b)]):.0f}" for a, b in named)
        lab.claim(
            Claim(
                f"C.1 item {item}",
                f"{word.capitalize()} pairs are clear: {_named_pairs(named)}.",
                f"App. C.1, item {item}",
                f"by eye: {_named_pairs(named)} (MNIST)",
                "place among the 45 pairs by ‖K‖_F over training, 100 = most similar: "
                f"{each_place}; "
                f"most {word} here: {_named_pairs(extreme)}",
                _verdict(holds, halves.unseen.published),
                "mean place and its interval over images on the claimed side of 50"
                if holds
                else "mean place not on the claimed side of 50; " + _other_images(halves),
                value=place,
                interval=interval,
            )
        )
    lab.claim(
        Claim(
            "C.1 items 3–4",
            "Which pairs of classes are similar is clear, whichever they are.",
            "App. C.1, items 3 and 4",
            "by eye",
            f"rank correlation {clear:.2f} of the 45 pairs between two halves of the images",
            _verdict(clear_interval[0] > _STRONG),
            f"called clear if the interval, over pairs, lies above {_STRONG:g}",
            value=clear,
            interval=clear_interval,
        )
    )
    over_time = _by_class(norms)
    table = [
        {
            "epoch": t,
            **{f"{a}-{a}": _short(over_time[t, a, a]) for a in range(CLASSES)},
            **{f"{a}-{b}": _short(v) for (a, b), v in zip(_PAIRS, values, strict=True)},
        }
        for t, values in enumerate(_pairs(over_time))
    ]
    lab.table("class_pairs", table)
    lab.figure(
        "kernel",
        draw_kernel(table, rows, early, by_norm[-1], by_norm[0]),
        "Left: ‖K‖_F of every pair of different classes. Middle: does the ranking over x_o hold? "
        "Right: how much K moves from epoch to epoch.",
    )
    return [
        f"After the first fifth of training ‖K‖_F changes by a factor {growth:.2f}, while the "
        f"ranking of its x_o keeps a rank correlation of {rho.mean():.2f} with the last one.",
    ]


def judge_sums(
    lab: Lab, settings: Mnist, halves: Halves, runs: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Σ_t of predictions against the total Δ log π."""
    rows, said = [], []
    of_probes = _draws(lab, "sums", [settings.probes] * CLASSES)
    module = NETWORKS[settings.network]()
    observed = halves.unseen.pixels[halves.observed].double()
    for name, trained in runs.items():
        last = logits(module, trained["theta"], observed).log_softmax(-1)
        total = (last - trained["first"]).numpy()
        predicted = trained["sums"].sum(0).numpy()
        decay = float(trained["sums"][CLASSES].square().sum() / trained["sums"].square().sum())
        missed, moved = ((total - predicted) ** 2).sum(1), (total**2).sum(1)
        share = float(1 - missed.sum() / moved.sum())
        interval = _interval(1 - missed[of_probes].sum(1) / moved[of_probes].sum(1))
        by_step = [record["explained"] for record in trained["epochs"]]
        rows += [
            {
                "descent": name,
                "class_observed": i // settings.probes,
                "label": label,
                "predicted": _short(predicted[i, label]),
                "measured": _short(total[i, label]),
            }
            for i in range(len(total))
            for label in range(CLASSES)
        ]
        how = (
            "momentum: A (∇θ z) Δθ with the step's own Δθ, momentum's memory included"
            if name == "momentum"
            else "no momentum, constant learning rate: −η/B Σ A K G, and weight decay"
        )
        lab.claim(
            Claim(
                f"Σ_t, {name}",
                "The predictions of all steps add up to the total change of log π.",
                "§2, Fig. 1c (accumulated influence)",
                "assumed; never measured",
                f"{100 * share:.3f} % of the squared total explained; of single steps, by epoch: "
                f"{100 * min(by_step):.3f} to {100 * max(by_step):.3f} %; weight decay has "
                f"{100 * decay:.2g} % of the squared parts",
                _verdict(interval[0] > _EXPLAINED),
                f"{how}; called so if the interval over observed images lies above "
                f"{100 * _EXPLAINED:g} %",
                value=share,
                interval=interval,
            )
        )
        said.append(f"{100 * share:.3f} % ({name})")
    lab.table("accumulated", rows)
    lab.figure(
        "accumulated",
        draw_accumulated(rows, {n: t["epochs"] for n, t in runs.items()}),
        "Every dot is one label of one unseen image: what all steps were predicted to do, against "
        "what they did.",
    )
    return [
        "Added up over training, first-order predictions explain this share of the squared total "
        f"change of log π: {', '.join(said)}."
    ]
