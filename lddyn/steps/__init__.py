"""One finetuning step: decomposed, verified against a real step, and where its mass went."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
