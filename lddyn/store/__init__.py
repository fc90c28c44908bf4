"""Token features on disk, crash-safe, and the strongest of them for a query."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
