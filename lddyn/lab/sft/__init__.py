"""SFT (paper §4.1, Fig. 3): every response type over training, with K measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from lddyn.lab.curves import Curves
from lddyn.lab.experiment import experiment
from lddyn.lab.finetune import Recipe, finetune, spread
from lddyn.lab.record import Lab, Results
from lddyn.lab.setting import Setting, load, one_thread
from lddyn.lab.settings import Sft
from lddyn.lab.sft import pictures
from lddyn.lab.sft.claims import expected, make_claims, seen
from lddyn.lab.sft.measure import accuracy, influence_maps
from lddyn.lab.sft.tables import write_tables
from lddyn.lab.training import Supervised
from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("sft", Sft)
def run(lab: Lab, settings: Sft) -> Results:
    """Finetunes on the chosen responses, and measures every response type on the way.

    Cost: with the default settings about 3 minutes of one core, two thirds of it for K.
    """
    setting = load(lab, settings)
    learned = setting.pairs(setting.train, ("chosen",))
    tuned = setting.fresh()
    recipe = Recipe(
        Supervised(),
        settings.updates,
        settings.lr,
        every=settings.every,
        explain=spread(settings.updates - 1, settings.explained),
        kernel=spread(settings.updates, settings.kernel_points),
    )
    curves = finetune(
        lab,
        "sft",
        setting,
        tuned,
        learned,
        recipe,
        kernel_prompts=settings.kernel_prompts,
        kernel_tokens=settings.kernel_tokens,
    )
    with one_thread():
        maps = {
            when: np.array(
                lab.once(f"influence-{when}", partial(influence_maps, setting, model)), dtype=float
            )
            for when, model in (("start", setting.model), ("end", tuned))
        }
        rates = lab.once(
            "accuracy",
            lambda: accuracy(lab, setting, learned, settings.lr, settings.accuracy_steps),
        )
    write_tables(lab, curves, maps, setting.fields, rates)
    _draw(lab, setting, curves, maps)
    for claim in make_claims(lab, setting, curves, maps["start"], rates, settings.model is None):
        lab.claim(claim)
    return lab.finish(expected(), seen(setting, curves, rates))


def _draw(lab: Lab, setting: Setting, curves: Curves, maps: Mapping[str, np.ndarray]) -> None:
    lab.figure(
        "curves",
        pictures.draw_curves(curves),
        "Change of log π since the start, mean over prompts. The two lower panels show y+ alone "
        "(left) and per token (right).",
    )
    if curves.raw["kernel"]:
        lab.figure(
            "kernel",
            pictures.draw_kernel(curves),
            "Left: ‖K(y_o, y+)‖_F over training for every response type, which the paper could not "
            "measure. Right: what the paper measures in its place.",
        )
    lab.figure(
        "influence",
        pictures.draw_influence(maps, setting.fields),
        "By how many nats the column's response changes for every nat that a small step on the "
        "row's response gives that response itself.",
    )
    lab.figure(
        "first_order",
        pictures.draw_first_order(curves),
        "Single updates: predicted to first order, and measured.",
    )
