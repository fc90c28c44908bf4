"""The command line: `lddyn COMMAND`."""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {"main": "app"})
