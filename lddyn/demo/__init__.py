"""`lddyn demo`: a small language, a small model trained on it, and two steps decomposed."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
