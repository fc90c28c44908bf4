"""The probing set, built or read, and the pass over it against the authors' (paper §4.1)."""

from __future__ import annotations

from lddyn.lab.experiment import experiment
from lddyn.lab.probes.claims import expected, make_claim, seen
from lddyn.lab.probes.measure import by_type, compare
from lddyn.lab.probes.pictures import draw_types
from lddyn.lab.record import Lab, Results
from lddyn.lab.setting import UNTRACKED, load, one_thread
from lddyn.lab.settings import Probes
from lddyn.lazy import attributes
from lddyn.probes.endpoint import Endpoint, write

__getattr__, __dir__ = attributes(__name__, {})

__all__ = ["run"]


@experiment("probes", Probes)
def run(lab: Lab, settings: Probes) -> Results:
    """Builds or reads a probing set, reports on it, and times the pass.

    Cost: with the default settings 40 seconds of one core.
    """
    setting = load(lab, settings)
    probes = setting.probes
    if settings.endpoint:
        service = Endpoint(settings.endpoint, settings.endpoint_model, settings.key_variable)
        probes = write(probes, service, lab.path("written.jsonl"), progress=lab.bar)
    probes.save(lab.path("probes.jsonl"))
    fields = [name for name in probes.fields if name not in UNTRACKED]
    encoded = probes.encode(setting.tokenizer, fields=fields)
    with one_thread():
        passes = lab.once("compare", lambda: compare(setting.model, encoded))
        types = lab.once("types", lambda: by_type(setting, encoded, probes.table()))
    lab.table("types", types)
    lab.table("pass", [passes])
    lab.figure(
        "types",
        draw_types(types),
        "Mean log-prob per token of every response type before any finetuning.",
    )
    lab.claim(make_claim(passes))
    return lab.finish(expected(), seen(setting, passes, types))
