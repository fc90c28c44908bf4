"""Every exception that lddyn raises on purpose, importable as `lddyn.NAME`."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "DisagreementError",
    "EmptyResponseError",
    "ExampleError",
    "MemoryBudgetError",
    "NonFiniteError",
    "StoreCorruptError",
    "StoreError",
    "StoreIdentityError",
    "StoreLockedError",
    "UnrepeatableModelError",
    "UnsupportedModelError",
]


class NonFiniteError(ValueError):
    """A weight, activation or logit is NaN or infinite; the message names the first one."""


class MemoryBudgetError(ValueError):
    """`memory=` is less than an analysis needs; the message says how much that is."""


class UnsupportedModelError(ValueError):
    """The model has a part that lddyn cannot analyse; the message names it."""


class UnrepeatableModelError(UnsupportedModelError):
    """The model returns other logits for the same token ids each time it runs."""


class DisagreementError(RuntimeError):
    """Two computations of one step differ: an operation has a wrong derivative, or none."""


class StoreError(RuntimeError):
    """A store that cannot be read or written; the message names the file."""


class StoreCorruptError(StoreError):
    """A file of the store differs from what was written."""


class StoreLockedError(StoreError):
    """Another process is writing to this store."""


class StoreIdentityError(StoreError):
    """The store was made with another model, data set or layout than it is opened for.

    Attributes:
        fields: Name → (stored, given) of each field that differs; `"absent"` for a missing value.
    """

    def __init__(self, path: Path, fields: dict[str, tuple[object, object]]) -> None:
        """Name each field with both values; of two lists, the first entries that differ."""
        shown = {k: _first_difference(a, b) for k, (a, b) in fields.items()}
        listed = "; ".join(f"{k}: stored {a!r}, given {b!r}" for k, (a, b) in shown.items())
        super().__init__(
            f"{path} belongs to something else: {listed} (open it with what made it, or make "
            "another store)"
        )
        self.fields = fields


class ExampleError(ValueError):
    """A sequence or data row that cannot become an `Example`.

    Attributes:
        problem: Code of the problem, as `audit` reports it (`"empty_prompt"`, ...).
        field: Argument or column at fault; `""` when it is the whole row.
    """

    def __init__(self, message: str, *, problem: str = "invalid", field: str = "") -> None:
        """Store the code and the field beside the message."""
        super().__init__(message)
        self.problem = problem
        self.field = field


class EmptyResponseError(ExampleError):
    """The response has no tokens: there is no log-probability to measure."""

    def __init__(self, message: str, *, field: str = "response_ids") -> None:
        """Store the field; the code is `"empty_response"`."""
        super().__init__(message, problem="empty_response", field=field)


def _first_difference(stored: object, given: object) -> tuple[object, object]:
    """The two values; of two lists, the first entries that differ, or else their lengths."""
    if isinstance(stored, list) and isinstance(given, list):
        for one, other in zip(stored, given, strict=False):
            if one != other:
                return one, other
        return len(stored), len(given)
    return stored, given


def glimpse(value: object) -> str:
    """Type and beginning of a value, for an error message."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
