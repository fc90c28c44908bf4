"""Whole preference sets: which pairs lower the chosen responses, and what a run will do."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
