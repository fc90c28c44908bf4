"""Watching a run from inside it: `trl`, `trainer` (transformers), `loop` (any other loop)."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__)
