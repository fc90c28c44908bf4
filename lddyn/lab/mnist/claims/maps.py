"""Claims about accumulated influence and mean predictions (Fig. 1c, d; App. C.1, items 5, 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from lddyn.lab.mnist.claims.statistics import (
    DIFFERENT,
    STRONG,
    asymmetry,
    draws,
    interval,
    means_by_class,
    other_images,
    six_digits,
    spearman,
    verdict,
)
from lddyn.lab.mnist.measure import CLASSES, NETWORKS, Halves, logits
from lddyn.lab.mnist.pictures import draw_maps
from lddyn.lab.record import Claim, Lab
from lddyn.lab.settings import Mnist

__all__ = ["judge_maps"]

_CLASSES = np.arange(CLASSES)


@dataclass(frozen=True)
class _Maps:
    """Tables over pairs of classes, each (10, 10), and bootstrap repeats of them over images.

    Attributes:
        prediction: Mean π(y|x_o) after training, by class of x_o and label y.
        pull: Accumulated predicted Δπ(y_u|x_o), by class u that was learned and class of x_o.
        pull_log: The same of Δ log π, nats.
        integral: Σ over epochs of ‖K_uo‖_F.
        predictions: Bootstrap repeats of `prediction`, over unseen images, (repeats, 10, 10).
        pulls: Bootstrap repeats of `pull`, over x_o.
        integrals: Bootstrap repeats of `integral`, over x_u and x_o.
    """

    prediction: np.ndarray
    pull: np.ndarray
    pull_log: np.ndarray
    integral: np.ndarray
    predictions: np.ndarray
    pulls: np.ndarray
    integrals: np.ndarray


def judge_maps(
    lab: Lab, settings: Mnist, halves: Halves, trained: Mapping[str, Tensor]
) -> list[str]:
    """Panels c and d, items 5 and 6 of App. C.1: accumulated influence and mean prediction."""
    maps = _maps(lab, settings, halves, trained)
    reinforced, related = _reinforced(maps), _related(maps)
    for claim in (_bumps(maps, halves), reinforced, _asymmetric(maps), related):
        lab.claim(claim)
    rows = list(_rows(maps))
    lab.table("maps", rows)
    lab.figure(
        "maps",
        draw_maps(rows),
        "Row: the class that was learned, and its label. Column: the class that is observed. "
        "Hundredths; the diagonal is left white. Pulls may exceed 1: others push back.",
    )
    return [
        f"The accumulated pull of a class explains where wrong predictions sit (rank correlation "
        f"{reinforced.value:.2f}) and follows the time integral of ‖K‖_F ({related.value:.2f}); "
        f"its asymmetry is {asymmetry(maps.pull):.2f}, that of ‖K‖_F "
        f"{asymmetry(maps.integral):.2f}.",
    ]


def _maps(lab: Lab, settings: Mnist, halves: Halves, trained: Mapping[str, Tensor]) -> _Maps:
    """The tables after one training run, and their bootstrap repeats."""
    each = settings.probes
    prediction, predictions = _mean_predictions(lab, settings, halves, trained["theta"])
    pulls, norms = trained["pulls"].numpy(), trained["norms"].numpy().sum(0)
    of_probes = draws(lab, "probes o", [each] * CLASSES)
    of_updates = draws(lab, "probes u", [each] * CLASSES)
    return _Maps(
        prediction=prediction,
        pull=_influence(pulls),
        pull_log=_influence(trained["sums"].numpy()),
        integral=means_by_class(norms),
        predictions=predictions,
        pulls=np.stack([_influence(pulls[:, o]) for o in of_probes]),
        integrals=np.stack(
            [means_by_class(norms[u][:, o]) for o, u in zip(of_probes, of_updates, strict=True)]
        ),
    )


def _mean_predictions(
    lab: Lab, settings: Mnist, halves: Halves, theta: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Mean π(y|x_o) by class of the unseen x_o, (10, 10), and bootstrap repeats over images."""
    module, classes = NETWORKS[settings.network](), halves.unseen.classes.numpy()
    probabilities = logits(module, theta.float(), halves.unseen.pixels).softmax(-1).numpy()
    probabilities = probabilities[np.argsort(classes, kind="stable")]
    counts = np.bincount(classes, minlength=CLASSES)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def means(chosen: np.ndarray) -> np.ndarray:
        by_class: np.ndarray = np.add.reduceat(chosen, starts, 0) / counts[:, None]
        return by_class

    of_images = draws(lab, "unseen", counts.tolist())
    return means(probabilities), np.stack([means(probabilities[i]) for i in of_images])


def _influence(sums: np.ndarray) -> np.ndarray:
    """Sums (11, N_o, 10) by source to a table (u, o): class u's part of its own label's change."""
    by_class: np.ndarray = sums[_CLASSES, :, _CLASSES].reshape(CLASSES, CLASSES, -1).mean(-1)
    return by_class


def _percent_in_row(table: np.ndarray) -> np.ndarray:
    """The place 0 … 100 of each entry among the nine that are not on the diagonal of its row."""
    ranks = rankdata(np.where(DIFFERENT, table, -np.inf), axis=-1)
    percent: np.ndarray = 100 * (ranks - 2) / (CLASSES - 2)
    return percent


def _bumps(maps: _Maps, halves: Halves) -> Claim:
    prediction = maps.prediction
    place, places = _percent_in_row(prediction), _percent_in_row(maps.predictions)
    bumps = float((place[4, 9] + place[9, 4]) / 2)
    bumps_interval = interval((places[:, 4, 9] + places[:, 9, 4]) / 2)
    holds = bumps_interval[0] > 50
    largest = {c: int(np.argmax(np.where(c == _CLASSES, -1, prediction[c]))) for c in (4, 9)}
    return Claim(
        "Fig. 1c",
        "Predictions for 4s have a bump on 9, and those for 9s on 4.",
        "§2, Fig. 1c, d",
        "true 4: p(4) .71, p(9) .18; true 9: p(9) .62, p(4) .17 (MNIST)",
        f"true 4: p(4) {prediction[4, 4]:.2f}, p(9) {prediction[4, 9]:.3f}, largest wrong "
        f"label {largest[4]} ({prediction[4, largest[4]]:.3f}); true 9: p(9) "
        f"{prediction[9, 9]:.2f}, p(4) {prediction[9, 4]:.3f}, largest wrong label "
        f"{largest[9]} ({prediction[9, largest[9]]:.3f}); mean place of the two "
        f"among the nine wrong labels {bumps:.0f} of 100",
        verdict(holds, halves.unseen.published),
        "above the middle of the wrong labels, with its interval"
        if holds
        else "not above the middle of the wrong labels; " + other_images(halves),
        corrected="from the logits; the published notebook's cell takes the softmax of "
        "another layer as committed",
        value=bumps,
        interval=bumps_interval,
    )


def _reinforced(maps: _Maps) -> Claim:
    turned = np.swapaxes(maps.pulls, -1, -2)
    correlation = float(spearman(maps.pull.T[DIFFERENT], maps.prediction[DIFFERENT]))
    correlations = interval(spearman(turned[:, DIFFERENT], maps.predictions[:, DIFFERENT]))
    return Claim(
        "Fig. 1d",
        "The wrong labels that a class predicts are those whose updates pulled on it.",
        "§2, Fig. 1c, d",
        "by eye: bumps at 4/9, 5/3, 8/5",
        f"rank correlation {correlation:.2f} between the accumulated pull of class y on x_o and "
        "the mean prediction π(y|x_o), over the 90 pairs of classes",
        verdict(correlations[0] > STRONG),
        f"called so if the interval lies above {STRONG:g}; interval over images: "
        "resampling adds noise, which lowers it",
        value=correlation,
        interval=correlations,
    )


def _asymmetric(maps: _Maps) -> Claim:
    pull, norm = float(asymmetry(maps.pull)), float(asymmetry(maps.integral))
    difference = interval(asymmetry(maps.pulls) - asymmetry(maps.integrals))
    return Claim(
        "C.1 item 5",
        "Influence is not symmetric between classes, because A and G differ; K is: "
        "K(o, u) = K(u, o)ᵀ.",
        "App. C.1, item 5",
        "by eye",
        f"‖M − Mᵀ‖ / ‖M + Mᵀ‖ is {pull:.3f} for the accumulated influence, {norm:.3f} "
        "for the class means of ‖K‖_F (different images on both sides: sampling alone)",
        verdict(difference[0] > 0),
        "the difference and its interval over images; K itself is symmetric by definition",
        value=pull - norm,
        interval=difference,
    )


def _related(maps: _Maps) -> Claim:
    correlation = float(spearman(maps.pull[DIFFERENT], maps.integral[DIFFERENT]))
    correlations = interval(spearman(maps.pulls[:, DIFFERENT], maps.integrals[:, DIFFERENT]))
    return Claim(
        "C.1 item 6",
        "The accumulated influence correlates strongly with the time integral of ‖K_uo‖_F.",
        "App. C.1, item 6",
        "by eye",
        f"rank correlation {correlation:.2f} over the 90 pairs of different classes",
        verdict(correlations[0] > STRONG),
        f"strong if the interval lies above {STRONG:g}; interval over images",
        value=correlation,
        interval=correlations,
    )


def _rows(maps: _Maps) -> Iterator[dict[str, float]]:
    """A row per pair of classes."""
    for u in range(CLASSES):
        for o in range(CLASSES):
            yield {
                "class_update": u,
                "class_observed": o,
                "pull": six_digits(maps.pull[u, o]),
                "pull_log": six_digits(maps.pull_log[u, o]),
                "mean_prediction": six_digits(maps.prediction[o, u]),
                "norm_integral": six_digits(maps.integral[u, o]),
            }
