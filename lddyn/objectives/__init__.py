"""Every loss of a finetuning step, and the weight that it puts on every token.

Every loss here is a function of the log-probabilities log π(y_l) of its sequences, so its gradient
on the logits of token l is

    G_l = w_l (e_{y_l} − π_l),     w_l = ∂L/∂log π(y_l)

A negative weight raises the token. Weights come from autograd: SFT has w = −1/L per token, DPO has
w = ∓β(1 − a) (paper Eq. 5 and App. B Eq. 12-15).

`losses` is the table of losses of (chosen, rejected) pairs; a `Loss` is some of its rows with
values for their parameters; `preference` and `DPO` apply it to examples; `KTO` learns from single
responses with a label, `GRPO` from groups of rated completions.
"""

from lddyn.lazy import attributes

# Name → the module that defines it.
_PUBLIC = {
    "ALIASES": "losses",
    "DPO": "paired",
    "GRPO": "grouped",
    "KTO": "unpaired",
    "LOSSES": "losses",
    "Loss": "loss",
    "Objective": "objective",
    "Preference": "paired",
    "SFT": "objective",
    "preference": "paired",
}

__getattr__, __dir__ = attributes(__name__, _PUBLIC)
