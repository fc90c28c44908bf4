"""What was found, told in words and as one self-contained HTML page: `docs/report.md`."""

from lddyn.report.decomposition import (
    read_run,
    summarise,
    tell,
    verification_from_dict,
    verification_to_dict,
    write_html,
    write_run,
)
from lddyn.report.page import plain, readable, template

__all__ = [
    "plain",
    "read_run",
    "readable",
    "summarise",
    "tell",
    "template",
    "verification_from_dict",
    "verification_to_dict",
    "write_html",
    "write_run",
]
