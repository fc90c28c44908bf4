"""Sentences, pictures and self-contained HTML pages, made of plain data alone: `docs/report.md`."""

from lddyn.lazy import attributes
from lddyn.report.advice import warnings
from lddyn.report.diagnosis import write_diagnosis_page
from lddyn.report.dynamics import explain_dynamics, read_dynamics, write_dynamics
from lddyn.report.explain import explain_diagnosis, explain_run
from lddyn.report.figures import plot_step
from lddyn.report.page import render
from lddyn.report.step import explain_step, write_step_page

__all__ = [
    "explain_diagnosis",
    "explain_dynamics",
    "explain_run",
    "explain_step",
    "plot_step",
    "read_dynamics",
    "render",
    "warnings",
    "write_diagnosis_page",
    "write_dynamics",
    "write_step_page",
]

__getattr__, __dir__ = attributes(__name__)
