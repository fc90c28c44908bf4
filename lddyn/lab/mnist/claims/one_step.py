"""Claims of one step on a single 4 (Fig. 1a, b): the first order, and which classes it pulls up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lddyn.lab.mnist.claims.statistics import draws, interval, six_digits, spearman, verdict
from lddyn.lab.mnist.measure import CLASSES, FITTED, Halves
from lddyn.lab.mnist.pictures import draw_step
from lddyn.lab.record import Claim, Lab, Row
from lddyn.lab.settings import Mnist

__all__ = ["judge_step"]


@dataclass(frozen=True)
class _Step:
    """What `measure.one_step` measured, as arrays.

    Attributes:
        norms: ‖K(x_o, x_u)‖_F, (N_o, N_u).
        predicted: −η A K G, nats, (N_o, N_u, 10).
        measured: Δ log π, nats, (N_o, N_u, 10).
        pulls: −G of each update image, (N_u, 10).
        rates: Learning rates in ascending order, (R,).
        residuals: ‖measured − predicted‖ at each learning rate, (R, N_u).
        fours: Indices of the update images among the learned ones.
        cases: The class of x_o in each case that is drawn.
        similar: The class most similar to 4 by ‖K‖_F on training images.
    """

    norms: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray
    pulls: np.ndarray
    rates: np.ndarray
    residuals: np.ndarray
    fours: list[int]
    cases: dict[str, int]
    similar: int

    @classmethod
    def of(cls, step: Row) -> _Step:
        arrays = ("norms", "predicted", "measured", "pulls", "rates", "residuals")
        return cls(
            **{name: np.array(step[name]) for name in arrays},
            fours=step["fours"],
            cases={"identical": 4, "similar": 9, "dissimilar": int(step["dissimilar"])},
            similar=step["similar"],
        )

    @property
    def explained(self) -> float:
        """Share of the squared change that the first order explains at the training's η."""
        missed = ((self.measured - self.predicted) ** 2).sum()
        return float(1 - missed / (self.measured**2).sum())

    def median_images(self, each: int) -> dict[str, int]:
        """For each case the x_o whose ‖K‖_F with the first 4 is the median of its class."""
        norms, images = self.norms[:, 0], {}
        for case, c in self.cases.items():
            members = np.arange(c * each, (c + 1) * each)
            images[case] = int(members[np.argsort(norms[members])[each // 2]])
        return images


@dataclass(frozen=True)
class _Pulls:
    """Δ log π(4|x_o) in nats, averaged over the x_o of a class and all x_u.

    Attributes:
        means: By class of x_o, (10,).
        repeats: Bootstrap repeats of `means`, over update and observed images, (repeats, 10).
        norms: ‖K‖_F averaged in the same way, (10,).
        correlation: Rank correlation of ‖K_uo‖_F and pull over all x_o, mean over the x_u.
    """

    means: np.ndarray
    repeats: np.ndarray
    norms: np.ndarray
    correlation: float

    @classmethod
    def of(cls, lab: Lab, step: _Step, each: int, of_fours: np.ndarray) -> _Pulls:
        four = step.measured[:, :, 4]
        of_probes = draws(lab, "observed", [each] * CLASSES)
        repeats = [
            four[o][:, u].reshape(CLASSES, -1).mean(1)
            for o, u in zip(of_probes, of_fours, strict=True)
        ]
        return cls(
            means=four.reshape(CLASSES, -1).mean(1),
            repeats=np.stack(repeats),
            norms=step.norms.reshape(CLASSES, -1).mean(1),
            correlation=float(spearman(step.norms.T, four.T).mean()),
        )


def judge_step(lab: Lab, settings: Mnist, halves: Halves, step: Row, late: Row) -> list[str]:
    """Panels a and b: one step on a 4, early in training; `late` is the same at its end."""
    taken, each = _Step.of(step), settings.probes
    of_fours = draws(lab, "fours", [taken.norms.shape[1]])
    slopes = _slopes(taken)
    slope = float(slopes.mean())
    pulls = _Pulls.of(lab, taken, each, of_fours)
    lab.claim(_first_order(taken, slope, interval(slopes[of_fours].mean(1)), settings.lr))
    lab.claim(_order_of_pulls(taken, pulls, _Step.of(late)))
    cells = list(_cells(taken, taken.median_images(each)))
    residuals, classes = list(_residual_rows(taken)), list(_class_rows(pulls))
    lab.table("one_step", cells)
    lab.table("one_step_residual", residuals)
    lab.table("one_step_classes", classes)
    pixels = halves.unseen.pixels[halves.observed]
    figure = draw_step(
        cells,
        residuals,
        classes,
        {case: pixels[o, 0] for case, o in taken.median_images(each).items()},
        halves.learned.pixels[taken.fours[0], 0],
        settings.lr,
        slope,
        pulls.correlation,
        settings.early,
    )
    lab.figure(
        "one_step",
        figure,
        f"One step on a single 4, after {settings.early} epochs. Rings: predicted "
        "by −η A K G; bars: measured. Below: what the first "
        "order leaves out, and the pull on label 4 against ‖K‖_F for every class of x_o.",
    )
    pull = {case: 1000 * pulls.means[c] for case, c in taken.cases.items()}
    return [
        f"−η A K G explains {100 * taken.explained:.2f} % of one step's squared change of log π at "
        f"the training's learning rate; what is left falls as η^{slope:.2f}.",
        f"A step on a 4 pulls the label 4 up by {pull['identical']:.3g} millinats on other "
        f"4s, {pull['similar']:.3g} on 9s and {pull['dissimilar']:.3g} on "
        f"{taken.cases['dissimilar']}s.",
    ]


def _slopes(step: _Step) -> np.ndarray:
    """Log-log slope of the residual against the learning rate for each update image, (N_u,)."""
    fitted = step.rates <= FITTED[-1] * 1.001
    x, y = np.log10(step.rates[fitted]), np.log10(step.residuals[fitted])
    slopes: np.ndarray = ((x - x.mean()) @ (y - y.mean(0))) / ((x - x.mean()) ** 2).sum()
    return slopes


def _first_order(step: _Step, slope: float, slopes: tuple[float, float], rate: float) -> Claim:
    observed, fours = step.norms.shape
    return Claim(
        "Prop. 1",
        "One step changes log π(·|x_o) by −η A K G, up to O(η²).",
        "§2, Prop. 1, Eq. 3",
        "derived; never measured",
        f"the residual falls as η^{slope:.3f} between η = {FITTED[0]:g} and {FITTED[-1]:g}; "
        f"at the training's η = {rate:g}, −η A K G explains "
        f"{100 * step.explained:.2f} % of the squared change",
        verdict(slopes[0] > 1.9 and slopes[1] < 2.1),
        f"float64; {fours} update images, {observed} observed ones, all ten labels; "
        "interval over update images",
        value=slope,
        interval=slopes,
    )


def _order_of_pulls(step: _Step, pulls: _Pulls, late: _Step) -> Claim:
    means, cases = pulls.means, step.cases
    late_means = late.measured[:, :, 4].reshape(CLASSES, -1).mean(1)
    at_the_end = ", ".join(f"{c} {1000 * late_means[c]:+.3g}" for c in cases.values())
    doubts = list(_doubts(cases, pulls))
    return Claim(
        "Fig. 1b",
        "After a step on a 4, π(4|x_o) is pulled up where x_o is a 4, also where it is a "
        "similar 9, and almost not where it is dissimilar.",
        "§2, Fig. 1b",
        "drawn, without numbers",
        "Δ log π(4|x_o), millinats: "
        + ", ".join(f"{case} ({c}) {1000 * means[c]:+.3g}" for case, c in cases.items())
        + f"; the class most similar to 4 by ‖K‖_F is {step.similar}: "
        f"{1000 * means[step.similar]:+.3g}; rank correlation of ‖K_uo‖_F and pull over all "
        f"x_o, mean of the x_u: {pulls.correlation:.2f}; at the end of training: {at_the_end}",
        verdict(not doubts),
        "; ".join(doubts)
        or "all differences have intervals above 0; dissimilar is the class "
        "with the smallest ‖K‖_F on training images",
        value=float(means[9] / means[4]),
        interval=interval(pulls.repeats[:, 9] / pulls.repeats[:, 4]),
    )


def _doubts(cases: Mapping[str, int], pulls: _Pulls) -> Iterator[str]:
    """What of the claim about the order of pulls does not hold, a sentence each."""
    means, repeats, dissimilar = pulls.means, pulls.repeats, cases["dissimilar"]

    def above(case: str, other: str) -> bool:
        return interval(repeats[:, cases[case]] - repeats[:, cases[other]])[0] > 0

    ordered = True
    if not above("identical", "similar"):
        ordered = False
        yield "identical is not above similar"
    if not interval(repeats[:, 9])[0] > 0:
        ordered = False
        yield "the 9 is not pulled up"
    if not above("similar", "dissimilar"):
        ordered = False
        yield "similar is not above dissimilar"
    if not abs(means[dissimilar]) < 0.25 * means[4]:
        yield (
            ("the order is right, but " if ordered else "")
            + f"the dissimilar class moves by {means[dissimilar] / means[4]:.2f} of the "
            "identical one, not by less than a quarter: its ‖K‖_F is "
            f"{pulls.norms[dissimilar] / pulls.norms[4]:.2f} of that of the 4s"
        )


def _cells(step: _Step, images: Mapping[str, int]) -> Iterator[Row]:
    """A row per case and label, of the image that stands for the case."""
    for case, o in images.items():
        for label in range(CLASSES):
            yield {
                "case": case,
                "class_observed": step.cases[case],
                "label": label,
                "asked_of_update": six_digits(step.pulls[0][label]),
                "norm": six_digits(step.norms[o, 0]),
                "predicted": six_digits(step.predicted[o, 0, label]),
                "measured": six_digits(step.measured[o, 0, label]),
            }


def _residual_rows(step: _Step) -> Iterator[Row]:
    for rate, row in zip(step.rates, step.residuals, strict=True):
        for u, residual in enumerate(row):
            yield {
                "learning_rate": six_digits(rate),
                "update": u,
                "residual": six_digits(residual),
            }


def _class_rows(pulls: _Pulls) -> Iterator[Row]:
    for c in range(CLASSES):
        low, high = interval(pulls.repeats[:, c])
        yield {
            "class_observed": c,
            "norm": six_digits(pulls.norms[c]),
            "pull": six_digits(pulls.means[c]),
            "low": six_digits(low),
            "high": six_digits(high),
        }
