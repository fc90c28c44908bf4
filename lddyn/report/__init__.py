"""What was found, told in words and as one self-contained HTML page: `docs/report.md`."""

from lddyn.files import plain
from lddyn.report.decomposition import (
    read_run,
    summarise,
    tell,
    verification_from_dict,
    verification_to_dict,
    write_html,
    write_run,
)
from lddyn.report.diagnosis import CloseUp, look_closer, tell_diagnosis, warnings, write_diagnosis
from lddyn.report.dynamics import read_dynamics, tell_dynamics, write_dynamics
from lddyn.report.page import render
from lddyn.text import readable

__all__ = [
    "CloseUp",
    "look_closer",
    "plain",
    "read_dynamics",
    "read_run",
    "readable",
    "render",
    "summarise",
    "tell",
    "tell_diagnosis",
    "tell_dynamics",
    "verification_from_dict",
    "verification_to_dict",
    "warnings",
    "write_diagnosis",
    "write_dynamics",
    "write_html",
    "write_run",
]
