"""The laboratory: the systems of Ren & Sutherland (ICLR 2025), run, with K measured.

Each module is one experiment and has `run(out, *, seed, progress, …) -> results`; `lddyn lab NAME`
calls it. `record` is what they share: folders, tables, figures, claims, the page.
"""

from lddyn.lazy import attributes

EXPERIMENTS = {
    "mnist": "handwritten digits: one step, accumulated influence, the kernel over training",
    "squeeze": "where the probability goes when one label is pushed down",
    "bigram": "the same negative step in a table of logits and in shared features",
    "probes": "the probing set: the paper's response types, built or read",
    "sft": "SFT: every response type over training, with the kernel measured",
    "dpo": "DPO: the two terms at every probe, and where the mass of y− went",
    "extend": "SFT on both responses before DPO, against SFT on the chosen one",
    "objectives": "the residuals of twelve objectives and where they push",
}

__getattr__, __dir__ = attributes(__name__)
