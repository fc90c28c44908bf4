"""Claims about ‖K‖_F over training (App. C.1, items 1 to 4): its ranking, and similar classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lddyn.lab.mnist.claims.statistics import (
    PAIRS,
    STRONG,
    draws,
    interval,
    means_by_class,
    other_images,
    pair_means,
    percentiles,
    six_digits,
    spearman,
    verdict,
)
from lddyn.lab.mnist.measure import CLASSES, Halves
from lddyn.lab.mnist.pictures import draw_kernel
from lddyn.lab.record import Claim, Lab, Row
from lddyn.lab.settings import Mnist

__all__ = ["judge_kernel"]

# What is called so, stated before anything was measured.
_STABLE = 0.8  # rank correlation
_CHANGED = 1.25  # factor of a norm


@dataclass(frozen=True)
class _Course:
    """‖K_uo‖_F in the course of one training run.

    Attributes:
        name: Of the run.
        epochs: Records of the epochs: losses, accuracy, share explained.
        norms: ‖K_uo‖_F before training and after each epoch, (epochs + 1, N_u, N_o).
        drifts: ‖K^t − K^{t−1}‖_F, (epochs, N_u, N_o).
        to_last: Rank correlation over o with the last epoch, (epochs + 1, N_u).
        to_next: Rank correlation over o of neighbouring epochs, (epochs, N_u).
    """

    name: str
    epochs: Sequence[Mapping[str, float]]
    norms: np.ndarray
    drifts: np.ndarray
    to_last: np.ndarray
    to_next: np.ndarray

    @classmethod
    def of(cls, name: str, trained: Row) -> _Course:
        norms = trained["norms"].numpy()
        return cls(
            name,
            trained["epochs"],
            norms,
            trained["drifts"].numpy(),
            to_last=spearman(norms, norms[-1][None]),
            to_next=spearman(norms[1:], norms[:-1]),
        )

    @property
    def relative_drift(self) -> np.ndarray:
        """Mean of ‖K^t − K^{t−1}‖_F / ‖K^t‖_F by epoch, (epochs,)."""
        ratio: np.ndarray = (self.drifts / self.norms[1:]).mean((1, 2))
        return ratio

    def growth(self, early: int) -> float:
        """The last mean norm over that of an early epoch."""
        return float(self.norms[-1].mean() / self.norms[early].mean())


@dataclass(frozen=True)
class _Similarity:
    """How similar the 45 pairs of classes are: mean ‖K‖_F over training.

    Attributes:
        pairs: By pair, (45,).
        repeats: Bootstrap repeats over images on both sides, (repeats, 45).
        first, second: By pair, from halves of the images that share none on either side, (45,).
    """

    pairs: np.ndarray
    repeats: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, lab: Lab, norms: np.ndarray, each: int, of_updates: np.ndarray) -> _Similarity:
        integral = norms.sum(0)
        of_probes = draws(lab, "ranking o", [each] * CLASSES)
        repeats = [
            means_by_class(integral[u][:, o]) for u, o in zip(of_updates, of_probes, strict=True)
        ]
        images, half = np.arange(CLASSES * each).reshape(CLASSES, each), each // 2
        first, second = (
            pair_means(means_by_class(integral[part.ravel()][:, part.ravel()]))
            for part in (images[:, :half], images[:, half : 2 * half])
        )
        return cls(
            pair_means(means_by_class(integral)), pair_means(np.stack(repeats)), first, second
        )

    @property
    def ascending(self) -> list[tuple[int, int]]:
        """The pairs of classes, the least similar first."""
        return [PAIRS[i] for i in np.argsort(self.pairs)]


def judge_kernel(lab: Lab, settings: Mnist, halves: Halves, runs: Mapping[str, Row]) -> list[str]:
    """Items 1 to 4 of App. C.1: ‖K‖_F over training."""
    each, early = settings.probes, settings.early
    of_updates = draws(lab, "ranking u", [each] * CLASSES)
    momentum, plain = (_Course.of(name, runs[name]) for name in ("momentum", "plain"))
    rows = [row for course in (momentum, plain) for row in _rows(course, of_updates)]
    lab.table("kernel_over_training", rows)
    lab.claim(_settles(momentum, plain, settings, of_updates))
    lab.claim(_stable_ranking(momentum, plain, settings, of_updates))
    similarity = _Similarity.of(lab, momentum.norms, each, of_updates)
    for claim in (
        _named_pairs("similar", similarity, halves),
        _named_pairs("dissimilar", similarity, halves),
    ):
        lab.claim(claim)
    lab.claim(_clear_pairs(lab, similarity))
    table = list(_pair_rows(momentum.norms))
    lab.table("class_pairs", table)
    by_norm = similarity.ascending
    lab.figure(
        "kernel",
        draw_kernel(table, rows, early, by_norm[-1], by_norm[0]),
        "Left: ‖K‖_F of every pair of different classes. Middle: does the ranking over x_o hold? "
        "Right: how much K moves from epoch to epoch.",
    )
    return [
        f"After the first fifth of training ‖K‖_F changes by a factor {momentum.growth(early):.2f},"
        " while the ranking of its x_o keeps a rank correlation of "
        f"{momentum.to_last[early].mean():.2f} with the last one.",
    ]


def _rows(course: _Course, of_updates: np.ndarray) -> Iterator[Row]:
    """A row per epoch of a run."""
    for t, table in enumerate(course.norms):
        low, high = interval(course.to_last[t][of_updates].mean(1))
        row = {
            "descent": course.name,
            "epoch": t,
            "norm": table.mean(),
            "rank_to_last_low": low,
            "rank_to_last": course.to_last[t].mean(),
            "rank_to_last_high": high,
            "rank_to_previous": course.to_next[t - 1].mean() if t else None,
            "drift": course.drifts[t - 1].mean() if t else None,
        }
        for key in ("loss", "unseen_loss", "unseen_accuracy", "explained"):
            row[key] = course.epochs[t - 1][key] if t else None
        yield {
            k: six_digits(float(v)) if isinstance(v, float | np.floating) else v
            for k, v in row.items()
        }


def _settles(momentum: _Course, plain: _Course, settings: Mnist, of_updates: np.ndarray) -> Claim:
    early = settings.early

    def rise(course: _Course) -> np.ndarray:
        """Of `to_next` from the first fifth of training to the last, by x_u."""
        change: np.ndarray = course.to_next[-early:].mean(0) - course.to_next[:early].mean(0)
        return change

    rises = {c.name: interval(rise(c)[of_updates].mean(1)) for c in (momentum, plain)}
    drift, plain_drift = momentum.relative_drift, plain.relative_drift
    return Claim(
        "C.1 item 1",
        "Early epochs are messy, late ones behave like finetuning.",
        "App. C.1, item 1",
        "epochs 0–30 messy, 800–1000 like finetuning",
        f"rank correlation of ‖K_uo‖_F over o between neighbouring epochs: "
        f"{momentum.to_next[:early].mean():.3f} in the first fifth of {settings.epochs} "
        f"epochs, {momentum.to_next[-early:].mean():.4f} in the last; K changes by "
        f"{100 * drift[:early].mean():.0f} % an epoch, then "
        f"{100 * drift[-early:].mean():.2g} %. At a constant learning rate: "
        f"{plain.to_next[:early].mean():.3f}, {plain.to_next[-early:].mean():.4f}"
        f"; {100 * plain_drift[:early].mean():.0f} %, "
        f"{100 * plain_drift[-early:].mean():.2g} %",
        verdict(all(low > 0 for low, _ in rises.values())),
        "the rise from the first to the last fifth, over update images; holds only if also the "
        "run at a constant learning rate rises, where no schedule freezes the end",
        value=float(rise(momentum).mean()),
        interval=rises["momentum"],
    )


def _stable_ranking(
    momentum: _Course, plain: _Course, settings: Mnist, of_updates: np.ndarray
) -> Claim:
    early, growth = settings.early, momentum.growth(settings.early)
    correlation, plain_correlation = momentum.to_last[early], float(plain.to_last[early].mean())
    correlations = interval(correlation[of_updates].mean(1))
    moved = abs(math.log(growth)) > math.log(_CHANGED)
    firm = correlations[0] > _STABLE
    doubts = [] if firm else [f"the ranking's interval is not above {_STABLE:g}"]
    doubts += [] if moved else [f"the mean norm changes by less than a factor {_CHANGED:g}"]
    return Claim(
        "C.1 item 2",
        "‖K_uo‖_F and its drift change a lot, also late, while the ranking over o is stable: "
        "the paper's only assumption.",
        "§2; App. C.1, item 2",
        "by eye",
        f"from epoch {early} to {settings.epochs} the mean norm changes by a factor "
        f"{growth:.2f} and the ranking over o correlates with the last at {correlation.mean():.2f} "
        f"(from the initialisation: {momentum.to_last[0].mean():.2f}); plain descent at a "
        f"constant learning rate: factor {plain.growth(early):.2f}, {plain_correlation:.2f}",
        verdict(firm and moved),
        "; ".join(doubts)
        or f"stable: interval over update images above {_STABLE:g}; a lot: {_CHANGED:g}-fold; "
        + ("so does" if plain_correlation > _STABLE else "not so")
        + " the run at a constant learning rate",
        value=float(correlation.mean()),
        interval=correlations,
    )


def _named_pairs(
    word: Literal["similar", "dissimilar"], similarity: _Similarity, halves: Halves
) -> Claim:
    """Whether the pairs that the paper names lie on the claimed side of the middle."""
    if word == "similar":
        item, named, extreme = 3, ((4, 9), (5, 8)), similarity.ascending[::-1][:4]
    else:
        item, named, extreme = 4, ((6, 7), (2, 5)), similarity.ascending[:4]
    low, high = interval(percentiles(similarity.repeats, named))
    holds = low > 50 if word == "similar" else high < 50
    places = ", ".join(f"{a}–{b} {percentiles(similarity.pairs, [(a, b)]):.0f}" for a, b in named)
    return Claim(
        f"C.1 item {item}",
        f"{word.capitalize()} pairs are clear: {_listed(named)}.",
        f"App. C.1, item {item}",
        f"by eye: {_listed(named)} (MNIST)",
        "place among the 45 pairs by ‖K‖_F over training, 100 = most similar: "
        f"{places}; "
        f"most {word} here: {_listed(extreme)}",
        verdict(holds, halves.unseen.published),
        "mean place and its interval over images on the claimed side of 50"
        if holds
        else "mean place not on the claimed side of 50; " + other_images(halves),
        value=float(percentiles(similarity.pairs, named)),
        interval=(low, high),
    )


def _listed(pairs: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{a}–{b}" for a, b in pairs)


def _clear_pairs(lab: Lab, similarity: _Similarity) -> Claim:
    first, second = similarity.first, similarity.second
    correlation = float(spearman(first, second))
    of_pairs = draws(lab, "pairs", [len(PAIRS)])
    correlations = interval(spearman(first[of_pairs], second[of_pairs]))
    return Claim(
        "C.1 items 3–4",
        "Which pairs of classes are similar is clear, whichever they are.",
        "App. C.1, items 3 and 4",
        "by eye",
        f"rank correlation {correlation:.2f} of the 45 pairs between two halves of the images",
        verdict(correlations[0] > STRONG),
        f"called clear if the interval, over pairs, lies above {STRONG:g}",
        value=correlation,
        interval=correlations,
    )


def _pair_rows(norms: np.ndarray) -> Iterator[dict[str, float]]:
    """A row per epoch: mean ‖K‖_F of every pair of classes, equal ones first."""
    over_time = means_by_class(norms)
    for t, values in enumerate(pair_means(over_time)):
        yield {
            "epoch": t,
            **{f"{a}-{a}": six_digits(over_time[t, a, a]) for a in range(CLASSES)},
            **{f"{a}-{b}": six_digits(v) for (a, b), v in zip(PAIRS, values, strict=True)},
        }
