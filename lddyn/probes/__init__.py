"""Probing sets (Ren & Sutherland, ICLR 2025, §4.1): built, written by a service, measured."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__)
