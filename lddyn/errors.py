"""Every exception that lddyn raises on purpose, importable as `lddyn.NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["EmptyResponseError", "ExampleError"]


class NonFiniteError(ValueError):
    """A weight, activation or logit is NaN or infinite; the message names the first one."""


class UnsupportedModelError(ValueError):
    """The model cannot be opened at its seams; the message names what could not be placed."""


class DisagreementError(RuntimeError):
    """Two computations of one step differ: an operation has a wrong or silent derivative."""


class StoreError(RuntimeError):
    """A store that cannot be read or written; the message names the file."""


class StoreCorruptError(StoreError):
    """A file of the store is not what was written."""


class StoreLockedError(StoreError):
    """Another process writes this store."""


class StoreIdentityError(StoreError):
    """The store was made by something else than what it is opened for.

    Attributes:
        fields: Name → (stored, given) of each field that differs; absent ones are `"absent"`.
    """

    def __init__(self, path: Path, fields: dict[str, tuple[Any, Any]]) -> None:
        """The message names all fields with both values, of lists what differs first."""
        shown = {k: _apart(a, b) for k, (a, b) in fields.items()}
        listed = "; ".join(f"{k}: stored {a!r}, given {b!r}" for k, (a, b) in shown.items())
        super().__init__(
            f"{path} belongs to something else: {listed} (open it with what made it, or make "
            "another store)"
        )
        self.fields = fields


class ExampleError(ValueError):
    """A sequence or data row that cannot become an `Example`.

    Attributes:
        problem: Short code of the problem, as in the table of `audit` (`"empty_prompt"`, ...).
        field: The argument or column at fault, `""` when the whole row is.
    """

    def __init__(self, message: str, *, problem: str = "invalid", field: str = "") -> None:
        """Keep the message with the code and the field it is about."""
        super().__init__(message)
        self.problem = problem
        self.field = field


class EmptyResponseError(ExampleError):
    """The response has no tokens: there is no log-probability to measure."""

    def __init__(self, message: str, *, field: str = "response_ids") -> None:
        """Keep the message; the code is always `"empty_response"`."""
        super().__init__(message, problem="empty_response", field=field)


def _apart(stored: Any, given: Any) -> tuple[Any, Any]:
    """Of two lists the first entries that differ, or else their lengths."""
    if isinstance(stored, list) and isinstance(given, list):
        for one, other in zip(stored, given, strict=False):
            if one != other:
                return one, other
        return len(stored), len(given)
    return stored, given


def glimpse(value: object) -> str:
    """Type and beginning of a value, for an error message."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
