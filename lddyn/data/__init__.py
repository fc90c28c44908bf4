"""Examples χ = [x; y]: reading rows, encoding them to token ids, checking a data set."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__)
