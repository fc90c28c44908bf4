"""Log-probs of a reference that rows hold, as the command line speaks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lddyn.cli.console import warn

__all__ = ["warn_of_unread_log_probs"]


def warn_of_unread_log_probs(rows: Sequence[Mapping[str, Any]]) -> None:
    """Says that log-probs of a reference in the rows are not used without --reference rows."""
    from lddyn.data.columns import REFERENCE

    there = [row for row in rows if all(column in row for column in REFERENCE)]
    if there:
        warn(
            f"{len(there)} rows hold {' and '.join(REFERENCE)}, which are not used: "
            "--reference rows takes them as the reference"
        )
