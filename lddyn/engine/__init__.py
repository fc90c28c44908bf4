"""A causal LM opened at its seams: traces, replays, pullbacks, pushforwards, Grams."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
