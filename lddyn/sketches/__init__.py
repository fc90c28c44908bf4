"""Token gradients as rows of k numbers: projections, layouts, features, and what they cost."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
