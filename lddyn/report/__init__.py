"""Sentences, pictures and self-contained HTML pages, made of plain data alone: `docs/report.md`."""

from lddyn.files import plain
from lddyn.lazy import attributes
from lddyn.report.diagnosis import CloseUp, look_closer, tell_diagnosis, warnings, write_diagnosis
from lddyn.report.dynamics import explain_dynamics, read_dynamics, write_dynamics
from lddyn.report.figures import plot_step
from lddyn.report.page import render
from lddyn.report.step import explain_step, write_step_page
from lddyn.text import readable

__all__ = [
    "CloseUp",
    "explain_dynamics",
    "explain_step",
    "look_closer",
    "plain",
    "plot_step",
    "read_dynamics",
    "readable",
    "render",
    "tell_diagnosis",
    "warnings",
    "write_diagnosis",
    "write_dynamics",
    "write_step_page",
]

__getattr__, __dir__ = attributes(__name__)
