"""Claims about whole training runs: do the predictions of all steps add up to the change?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lddyn.lab.mnist.claims.statistics import draws, interval, six_digits, verdict
from lddyn.lab.mnist.measure import CLASSES, NETWORKS, Halves, logits
from lddyn.lab.mnist.pictures import draw_accumulated
from lddyn.lab.record import Claim, Lab, Row
from lddyn.lab.settings import Mnist

__all__ = ["judge_sums"]

_EXPLAINED = 0.9  # share of the squared total that counts as adding up; stated beforehand
_STEPS = {
    "momentum": "momentum: A (∇θ z) Δθ with the step's own Δθ, momentum's memory included",
    "plain": "no momentum, constant learning rate: −η/B Σ A K G, and weight decay",
}


@dataclass(frozen=True)
class _Total:
    """One run's change of log π on the observed images.

    Attributes:
        predicted: Sum of the first-order predictions of all steps, nats, (N_o, 10).
        measured: Change from the first step to the last, nats, (N_o, 10).
        decay: Weight decay's share of the squared parts of the prediction.
        by_step: Share explained of single steps, one number per epoch.
    """

    predicted: np.ndarray
    measured: np.ndarray
    decay: float
    by_step: list[float]

    @classmethod
    def of(cls, settings: Mnist, halves: Halves, trained: Row) -> _Total:
        observed = halves.unseen.pixels[halves.observed].double()
        module, sums = NETWORKS[settings.network](), trained["sums"]
        last = logits(module, trained["theta"], observed).log_softmax(-1)
        return cls(
            sums.sum(0).numpy(),
            (last - trained["first"]).numpy(),
            float(sums[CLASSES].square().sum() / sums.square().sum()),
            [record["explained"] for record in trained["epochs"]],
        )

    def explained(self, of_images: np.ndarray) -> tuple[float, tuple[float, float]]:
        """Share of the squared total that the predictions explain, and its interval."""
        missed = ((self.measured - self.predicted) ** 2).sum(1)
        moved = (self.measured**2).sum(1)
        repeats = 1 - missed[of_images].sum(1) / moved[of_images].sum(1)
        return float(1 - missed.sum() / moved.sum()), interval(repeats)

    def rows(self, name: str, each: int) -> Iterator[Row]:
        """A row per observed image and label."""
        for i, (predicted, measured) in enumerate(zip(self.predicted, self.measured, strict=True)):
            for label in range(CLASSES):
                yield {
                    "descent": name,
                    "class_observed": i // each,
                    "label": label,
                    "predicted": six_digits(predicted[label]),
                    "measured": six_digits(measured[label]),
                }


def judge_sums(lab: Lab, settings: Mnist, halves: Halves, runs: Mapping[str, Row]) -> list[str]:
    """Σ_t of predictions against the total Δ log π."""
    of_images = draws(lab, "sums", [settings.probes] * CLASSES)
    rows: list[Row] = []
    shares = []
    for name, trained in runs.items():
        total = _Total.of(settings, halves, trained)
        lab.claim(_adds_up(name, total, of_images))
        rows += total.rows(name, settings.probes)
        shares.append(f"{100 * total.explained(of_images)[0]:.3f} % ({name})")
    lab.table("accumulated", rows)
    lab.figure(
        "accumulated",
        draw_accumulated(rows, {n: t["epochs"] for n, t in runs.items()}),
        "Every dot is one label of one unseen image: what all steps were predicted to do, against "
        "what they did.",
    )
    return [
        "Added up over training, first-order predictions explain this share of the squared total "
        f"change of log π: {', '.join(shares)}."
    ]


def _adds_up(name: str, total: _Total, of_images: np.ndarray) -> Claim:
    share, shares = total.explained(of_images)
    return Claim(
        f"Σ_t, {name}",
        "The predictions of all steps add up to the total change of log π.",
        "§2, Fig. 1c (accumulated influence)",
        "assumed; never measured",
        f"{100 * share:.3f} % of the squared total explained; of single steps, by epoch: "
        f"{100 * min(total.by_step):.3f} to {100 * max(total.by_step):.3f} %; weight decay has "
        f"{100 * total.decay:.2g} % of the squared parts",
        verdict(shares[0] > _EXPLAINED),
        f"{_STEPS[name]}; called so if the interval over observed images lies above "
        f"{100 * _EXPLAINED:g} %",
        value=share,
        interval=shares,
    )
