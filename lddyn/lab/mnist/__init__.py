"""Handwritten digits (paper §2, Fig. 1, App. C.1): one step, all steps, and K over training."""

from __future__ import annotations

import torch

from lddyn.lab.experiment import experiment
from lddyn.lab.mnist.claims import judge_kernel, judge_maps, judge_step, judge_sums
from lddyn.lab.mnist.measure import Descent, descend, halve, one_step
from lddyn.lab.record import Lab, Results
from lddyn.lab.settings import Mnist
from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("mnist", Mnist)
def run(lab: Lab, settings: Mnist) -> Results:
    """Trains a network on digits twice, and compares what K predicts with what was measured.

    The second run is the control: no momentum, and a constant learning rate of
    `lr` / (1 − `momentum`).

    Cost: with the default settings about 4 minutes on one core; memory grows with the square of
    `probes`.
    """
    halves = halve(lab, settings)
    momentum = settings.momentum
    descents = (
        Descent("momentum", momentum, settings.lr, cosine=True),
        Descent("plain", 0.0, settings.lr / (1 - momentum), cosine=False),
    )
    with torch.no_grad():
        runs = {d.name: descend(lab, settings, halves, d) for d in descents}
        early = runs["momentum"]["early"]
        step = lab.once("one step", lambda: one_step(settings, halves, early))
        last = runs["momentum"]["theta"]
        late = lab.once("one step late", lambda: one_step(settings, halves, last))
        sentences = judge_step(lab, settings, halves, step, late)
        sentences += judge_maps(lab, settings, halves, runs["momentum"])
        sentences += judge_kernel(lab, settings, halves, runs)
        sentences += judge_sums(lab, settings, halves, runs)
    accuracy = runs["momentum"]["epochs"][-1]["unseen_accuracy"]
    return lab.finish(
        [
            "One step on x_u changes log π(·|x_o) by −η A K G: a step on a 4 raises the label 4 on "
            "other 4s, on similar digits such as 9, and hardly on dissimilar ones.",
            "These changes accumulate over training: classes with a large ‖K_uo‖_F predict each "
            "other.",
            "‖K_uo‖_F itself changes, but for a given x_u the ranking of the x_o is stable.",
        ],
        [
            f"{settings.network} on {halves.unseen.source}: after {settings.epochs} epochs on "
            f"{settings.train} images it is right on {100 * accuracy:.1f} % of the others.",
            *sentences,
        ],
    )
