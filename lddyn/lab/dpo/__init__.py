"""DPO (paper §4.2, Fig. 4): its two terms at every probe, and where the mass of y− went.

Four kinds of run: off-policy after several lengths of SFT, on-policy after the longest, and SFT at
the same learning rate.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lddyn.lab.dpo.claims import expected, make_claims, seen
from lddyn.lab.dpo.measure import LOSS, encoded_pairs, mass_of_steps, sampled_pairs
from lddyn.lab.dpo.pictures import draw
from lddyn.lab.dpo.tables import AGAIN, ON_POLICY, Runs, off_policy, write_tables
from lddyn.lab.experiment import experiment
from lddyn.lab.finetune import Recipe, checkpoint, finetune, spread
from lddyn.lab.mass import mass_of_run
from lddyn.lab.record import Lab, Results
from lddyn.lab.setting import load, one_thread
from lddyn.lab.settings import Dpo
from lddyn.lab.training import Supervised
from lddyn.lazy import attributes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("dpo", Dpo)
def run(lab: Lab, settings: Dpo) -> Results:
    """Trains by DPO after SFT of several lengths, and measures every response type on the way.

    Cost: with the default settings about 3 minutes of one core.
    """
    setting = load(lab, settings)
    pairs = setting.pairs(setting.train, ("chosen", "rejected"))
    longest = settings.lengths[-1]
    if longest:
        recipe = Recipe(
            Supervised(), longest, settings.sft_lr, every=longest, keep=settings.lengths
        )
        finetune(lab, "sft", setting, setting.fresh(), pairs, recipe)

    def start(length: int) -> PreTrainedModel:
        fresh = setting.fresh()
        return checkpoint(lab, f"sft-{length}", fresh) if length else fresh

    preferring = Recipe(LOSS, settings.updates, settings.lr, every=settings.every)
    apart = spread(settings.updates - 1, settings.explained)
    runs = Runs(settings.lengths)
    for length in settings.lengths:
        recipe = Recipe(
            LOSS,
            settings.updates,
            settings.lr,
            every=settings.every,
            explain=apart if length == longest else (),
        )
        before, after = start(length), start(length)
        runs.curves[off_policy(length)] = finetune(
            lab, f"off-{length}", setting, after, pairs, recipe, reference=before
        )
        with one_thread():
            runs.mass[off_policy(length)] = lab.once(
                f"mass-{length}", partial(mass_of_run, setting, before, after)
            )
    last = start(longest)
    with one_thread():
        drawn = lab.once("sampled", lambda: sampled_pairs(lab, setting, last, settings.new_tokens))
    ours = encoded_pairs(setting, drawn)
    runs.curves[ON_POLICY] = finetune(
        lab, "on", setting, start(longest), ours, preferring, reference=last
    )
    same_rate = Recipe(Supervised(), settings.updates, settings.lr, every=settings.every)
    runs.curves[AGAIN] = finetune(lab, "sft-again", setting, start(longest), pairs, same_rate)
    with one_thread():
        runs.steps = lab.once("mass-step", lambda: mass_of_steps(lab, setting, last, pairs))
    write_tables(lab, runs)
    draw(lab, runs)
    for claim in make_claims(lab, runs):
        lab.claim(claim)
    return lab.finish(expected(), seen(setting, runs, len(ours)))
