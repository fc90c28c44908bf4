"""What the words, signs and units of a diagnosis page mean, for a reader who has not met them."""

from __future__ import annotations

__all__ = ["OF_PAIRS", "OF_SEQUENCES"]

_SIGNS = {
    "nat": "unit of log π: a response whose log π falls by 0.7 nats is half as likely as before, "
    "by 2.3 nats a tenth as likely",
    "log π": "the sum of the log-probabilities of a response's tokens: always below 0",
    "Δ": "a change: after minus before",
    "blue ▲, red ▼": "blue is raised, red is lowered",
    "● ◆ ◌": "● follows exactly from the model's gradients, to first order; ◆ was measured; ◌ is "
    "an estimate, from sketches or from a predicted run",
    "±": "standard error: the number itself is within twice of it in 95 % of such estimates",
}
_RUN = {
    "planned run": "the training run that was described and not made; its changes are predicted",
    "segment": "a part of the planned run, for which gradients are taken anew",
}
_ROWS = {
    "effect": "what one {row} of the training set does to another response, through the parameters "
    "that both use",
    "weight": "a factor on a {row}'s loss: 0 leaves it out, 1 changes nothing",
}

OF_PAIRS = {
    "y+, y−": "the chosen and the rejected response of a pair",
    "margin": "log π(y+) − log π(y−), minus the same of the reference where the loss has one",
    **_SIGNS,
    "small step": "the step of SGD on the whole set that moves the margins by 1 nat on average; so "
    "losses and learning rates compare",
    **_RUN,
    **{word: text.format(row="pair") for word, text in _ROWS.items()},
    "do": "fix: an audit found a problem in the row; drop: leave the pair out; reweight: train it "
    "with the weight beside it; keep",
    "own, others": "own is what a pair's part of the step does to itself, others what it does to "
    "the rest of the set",
}

OF_SEQUENCES = {
    "raises, lowers": "what the loss wants of a sequence: demonstrations and completions above "
    "their group's mean are raised, the others lowered",
    **_SIGNS,
    "unit step": "the step of SGD on the whole set that moves log π of the sequences by 1 nat on "
    "average; so losses and learning rates compare",
    **_RUN,
    **{word: text.format(row="sequence") for word, text in _ROWS.items()},
    "target": "the sequences that the effects in the first table are on, mean over them",
}
