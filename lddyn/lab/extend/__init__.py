"""The paper's remedy (§4.3): SFT on both responses before DPO, against SFT on the chosen one.

The same DPO follows both. Two remedies within DPO are run beside it: a gate on the negative term,
and the negative log-likelihood of y+ added to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lddyn.lab.curves import Curves
from lddyn.lab.experiment import experiment
from lddyn.lab.extend import pictures
from lddyn.lab.extend.claims import GATE, expected, make_claims, seen
from lddyn.lab.extend.measure import examine, summary
from lddyn.lab.finetune import Recipe, checkpoint, finetune
from lddyn.lab.record import Lab, Results, Row
from lddyn.lab.setting import load, one_thread
from lddyn.lab.settings import Extend
from lddyn.lab.training import Preferring, Supervised
from lddyn.lazy import attributes
from lddyn.objectives.loss import Loss

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]

# Run → the SFT that it begins with, and its loss.
_PLAN = {
    "y+ only": ("y+ only", Preferring(Loss("dpo", beta=0.1))),
    "both": ("both", Preferring(Loss("dpo", beta=0.1))),
    "y+ only, gate": ("y+ only", Preferring(Loss("dpo", beta=0.1), gate=GATE)),
    "y+ only, NLL": ("y+ only", Preferring(Loss("dpo+nll", beta=0.1, alpha=1.0))),
}


@experiment("extend", Extend)
def run(lab: Lab, settings: Extend) -> Results:
    """Runs SFT on y+ or on both, then DPO; measures probes, samples, and held-out pairs.

    Cost: with the default settings about 3 minutes of one core.
    """
    setting = load(lab, settings)
    pairs = setting.pairs(setting.train, ("chosen", "rejected"))
    tuned: dict[str, Curves] = {}
    # Both pass over y+ equally often.
    for name, terms in (("y+ only", ("chosen",)), ("both", ("chosen", "rejected"))):
        recipe = Recipe(
            Supervised(terms), settings.sft_updates, settings.sft_lr, every=settings.every
        )
        tuned[name] = finetune(lab, _file("sft", name), setting, setting.fresh(), pairs, recipe)
    runs: dict[str, Curves] = {}
    after: dict[str, Row] = {}
    for name, (start, loss) in _PLAN.items():
        before, policy = (checkpoint(lab, _file("sft", start), setting.fresh()) for _ in range(2))
        recipe = Recipe(loss, settings.updates, settings.lr, every=settings.every)
        runs[name] = finetune(
            lab, _file("dpo", name), setting, policy, pairs, recipe, reference=before
        )
        with one_thread():
            after[name] = lab.once(
                _file("after", name), partial(examine, setting, before, policy, settings.new_tokens)
            )
    lab.table("curves", _curve_rows({"SFT": tuned, "DPO": runs}))
    rows = summary(runs, after)
    lab.table("summary", rows)
    lab.figure("sft", pictures.draw_sft(tuned), "SFT on y+ only (left) and on both (right).")
    lab.figure(
        "dpo", pictures.draw_dpo(runs), "The same DPO after each SFT, and two remedies within DPO."
    )
    lab.figure("summary", pictures.draw_summary(rows), "At the end of DPO.")
    for claim in make_claims(lab, tuned, runs, after):
        lab.claim(claim)
    return lab.finish(expected(), seen(setting, rows))


def _file(stage: str, name: str) -> str:
    return f"{stage}-{name}".replace(" ", "-").replace("+", "plus").replace(",", "")


def _curve_rows(stages: Mapping[str, Mapping[str, Curves]]) -> list[Row]:
    columns = ("run", "update", "type", "log_prob", "greedy")
    return [
        {name: row[name] for name in columns}
        for stage, runs in stages.items()
        for run, curves in runs.items()
        for row in curves.rows(f"{stage}: {run}")
    ]
