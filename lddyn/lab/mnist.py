"""Handwritten digits (paper §2, Fig. 1, App. C.1): one step, all steps, and K over training.

`digits` trains and measures, `mnist_claims` judges.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lddyn.lab.digits import Descent, Options, descend, halve, one_step
from lddyn.lab.mnist_claims import judge_kernel, judge_maps, judge_step, judge_sums
from lddyn.lab.record import Lab

__all__ = ["run"]


def run(
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
    network: str = "lenet",
    data: str | Path | None = None,
    torchvision: str | None = None,
    epochs: int = 50,
    train: int = 1000,
    batch: int = 64,
    learning_rate: float = 3e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    probes: int = 6,
) -> dict[str, Any]:
    """Experiment 1 of the laboratory: handwritten digits.

    The paper's settings are 2,000 images, 100 epochs, learning rate 1e-3; the defaults take 1,000
    of the embedded digits and learn as much in fewer steps. A second run, without momentum and at a
    constant learning rate of `learning_rate` / (1 − `momentum`), is the control.

    Args:
        out: Folder; a run that was stopped goes on from its last five epochs.
        seed: Of all random numbers.
        progress: Show bars.
        network: "lenet" (the paper's) or "mlp".
        data: A folder of IDX files; None: scikit-learn's digits. See `lddyn.lab.images.load`.
        torchvision: The name of one of torchvision's sets instead.
        epochs: At least 5.
        train: Images to learn; of the others 10,000 at most are the unseen ones.
        batch: Images a step.
        learning_rate: Of the first epoch, then a cosine down to 1e-6.
        momentum: In [0, 1).
        weight_decay: Added to the gradient, times θ.
        probes: Images a class and side at which K is measured; memory grows with its square.

    Returns:
        What results.json holds.

    Raises:
        ValueError: An option is out of range, or data are corrupt.
        ImportError: scikit-learn or torchvision is needed and not there.

    Example:
        >>> # results = lddyn.lab.mnist.run("lab/mnist", network="mlp")
    """
    options = Options(
        network,
        str(data) if data is not None else None,
        torchvision,
        epochs,
        train,
        batch,
        learning_rate,
        momentum,
        weight_decay,
        probes,
    )
    lab = Lab("mnist", Path(out), seed=seed, options=asdict(options), progress=progress)
    halves = halve(lab, options)
    descents = (
        Descent("momentum", momentum, learning_rate, cosine=True),
        Descent("plain", 0.0, learning_rate / (1 - momentum), cosine=False),
    )
    with torch.no_grad():
        runs = {d.name: descend(lab, options, halves, d) for d in descents}
        early = runs["momentum"]["early"]
        step = lab.once("one step", lambda: one_step(options, halves, early))
        last = runs["momentum"]["theta"]
        late = lab.once("one step late", lambda: one_step(options, halves, last))
        said = judge_step(lab, options, halves, step, late)
        said += judge_maps(lab, options, halves, runs["momentum"])
        said += judge_kernel(lab, options, halves, runs)
        said += judge_sums(lab, options, halves, runs)
    accuracy = runs["momentum"]["epochs"][-1]["unseen_accuracy"]
    return lab.finish(
        [
            "One step on x_u changes log π(·|x_o) by −η A K G, so that a 4 pulls the label 4 up on "
            "other 4s, on similar digits such as 9, and hardly on dissimilar ones.",
            "Over training these pulls accumulate: classes with large ‖K_uo‖_F predict each other.",
            "‖K_uo‖_F itself changes, but the ranking of the x_o for a given x_u is stable.",
        ],
        [
            f"{network} on {halves.unseen.source}: after {epochs} epochs on {train} images it is "
            f"right on {100 * accuracy:.1f} % of the others.",
            *said,
        ],
    )
