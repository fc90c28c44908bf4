"""Models that do not fit in memory: a block's weights are in memory only while it is used.

`model` builds such a model, `pieces` finds where its tensors are stored, `weights` keeps a few
blocks in memory.
"""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
