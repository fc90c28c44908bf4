"""lddyn inside what people train with: `trainer` (transformers), `trl`, `loop` (all others)."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__)
