"""The probing set of Ren & Sutherland (2025, §4.1): building it, and measuring it in one pass."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__)
