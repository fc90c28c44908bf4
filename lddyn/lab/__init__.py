"""The laboratory: the experiments of Ren & Sutherland (ICLR 2025), with K measured.

Each package here is one experiment. Its `run(out, settings, seed=0, progress=True)` measures, draws
(`pictures`), judges the paper's claims (`claims`) and returns the results, which `record` writes as
tables, figures and a page. `lddyn lab NAME` calls it.
"""

from lddyn.lab import settings
from lddyn.lazy import attributes

EXPERIMENTS: dict[str, type[settings.Settings]] = {
    "mnist": settings.Mnist,
    "squeeze": settings.Squeeze,
    "bigram": settings.Bigram,
    "probes": settings.Probes,
    "sft": settings.Sft,
    "dpo": settings.Dpo,
    "extend": settings.Extend,
    "objectives": settings.Objectives,
}
"""Name → settings of every experiment. The first line of the settings' docstring is its title."""

__getattr__, __dir__ = attributes(__name__)
