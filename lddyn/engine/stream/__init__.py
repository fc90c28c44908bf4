"""Models that do not fit in memory: the weights of one block are loaded while it is used."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
