"""The empirical NTK between token logits: the lazy operator, its norms, low rank, and proxies."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
