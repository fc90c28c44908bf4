"""Measurements beside the SFT run: influence between responses, and accuracy of the first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lddyn.data.example import Example
from lddyn.lab.curves import explained_share
from lddyn.lab.finetune import PAPER_LR, batches
from lddyn.lab.kernel_norms import influence
from lddyn.lab.record import Lab, Row
from lddyn.lab.setting import Setting
from lddyn.lab.training import Explained, Explanations, Supervised, train
from lddyn.optimizers import make_optimizer

OPTIMIZERS = ("sgd", "rmsprop")  # with which the accuracy of the first order is measured


def influence_maps(
    setting: Setting, model: nn.Module, prompts: int = 8
) -> list[list[list[float | None]]]:
    """⟨∇ log π(y_o), ∇ log π(y_u)⟩ / ‖∇ log π(y_u)‖² of one prompt's responses, (P, F, F) [u][o].

    By how many nats a small SGD step on y_u changes y_o for every nat by which it raises y_u.
    """
    encoded = setting.encode(setting.probes, setting.fields)
    maps = []
    for prompt in range(min(prompts, len(setting.probes))):
        own = encoded.select([prompt])
        gram = influence(model, own.examples).numpy()
        full = np.full((len(setting.fields), len(setting.fields)), np.nan)
        at = own.cells[:, 1].numpy()
        full[np.ix_(at, at)] = gram / np.diag(gram)[:, None]
        maps.append([[None if np.isnan(x) else float(x) for x in row] for row in full])
    return maps


def accuracy(
    lab: Lab,
    setting: Setting,
    learned: Sequence[Mapping[str, Example]],
    lr: float,
    steps: int,
) -> list[Row]:
    """How much of Δ log π the first order explains, with float64 weights.

    Args:
        lab: The experiment.
        setting: Its model is copied, its probes are predicted.
        learned: Rows to train on.
        lr: Learning rate of the experiment; ten times it and the paper's are tested too.
        steps: Updates of each run; 0: no run.
    """
    probes = setting.encode(setting.probes, setting.fields).select(range(3))
    rows = []
    for optimizer in OPTIMIZERS:
        for rate in (PAPER_LR, 10 * PAPER_LR, lr, 10 * lr) if steps else ():
            model = setting.fresh().double()
            parts: list[Explained] = []
            train(
                model,
                batches(learned, steps, 4, lab.generator("accuracy")),
                Supervised(),
                make_optimizer(optimizer, model.parameters(), rate),
                explanations=Explanations(range(steps), probes, parts.append),
            )
            predicted = torch.stack([p.predicted["chosen"] for p in parts]).numpy()
            measured = torch.stack([p.measured for p in parts]).numpy()
            rows.append(
                {
                    "optimizer": optimizer,
                    "lr": rate,
                    "steps": steps,
                    "mean move, nats": float(np.abs(measured).mean()),
                    "explained per step": explained_share(predicted, measured),
                    "explained accumulated": explained_share(predicted.sum(0), measured.sum(0)),
                }
            )
    return rows
