"""What `lddyn lab mnist` claims of its runs: one file per picture, with its claims and tables.

Each `judge_*` takes what was measured, writes tables and a picture, makes claims, and returns
sentences for the page.
"""

from __future__ import annotations

from lddyn.lab.mnist.claims.kernel import judge_kernel
from lddyn.lab.mnist.claims.maps import judge_maps
from lddyn.lab.mnist.claims.one_step import judge_step
from lddyn.lab.mnist.claims.sums import judge_sums
from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__)

__all__ = ["judge_kernel", "judge_maps", "judge_step", "judge_sums"]
