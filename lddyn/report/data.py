"""The plain data that sentences, pictures and pages are made of: numbers and texts, no results.

Result classes hand it over (`Decomposition.to_dict`, `Verification.to_dict`, …). It is JSON-safe,
so a page can also be made from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lddyn.files import JsonObject

__all__ = ["CheckData", "ResponseData", "StepData", "TokenData"]


class TokenData(TypedDict):
    """A token of the update: its sequence, its index there, id, text, and w_l = ∂L/∂log π(y_l)."""

    sequence: str
    index: int
    token_id: int
    text: str
    weight: float


class ResponseData(TypedDict):
    """What a step did to one observed response of M tokens, by the L tokens of the update.

    Attributes:
        name: Name of the response.
        token_ids: M ids.
        tokens: M texts.
        logp: log π of each token before the step, M numbers in nats.
        delta_logp: Predicted Δ log π of each token, M numbers in nats.
        influence: M rows of L numbers: nats of the row's token caused by the column's token.
        by_sequence: Source (an update sequence, "history", "weight decay") -> M numbers in nats.
        by_parameter: Parameter -> nats of the response's change that went through it.
        by_block: Block -> nats likewise.
        error_estimate: Prediction at the start minus that at the midpoint of the step, M numbers.
        agreement: Largest difference between the two computations, relative to the largest row.
    """

    name: str
    token_ids: list[int]
    tokens: list[str]
    logp: list[float]
    delta_logp: list[float]
    influence: list[list[float]]
    by_sequence: dict[str, list[float]]
    by_parameter: dict[str, float]
    by_block: dict[str, float]
    error_estimate: list[float]
    agreement: float


class StepData(TypedDict):
    """One decomposed step: its settings, the update's tokens, and every observed response.

    Attributes:
        settings: Objective, optimizer and their parameters.
        lr: Learning rate.
        loss: Loss before the step.
        rule: Where on the step gradients were taken: "start", "midpoint" or "simpson".
        sequences: Update sequence -> first and last + 1 of its places in `update_tokens`.
        update_tokens: The L tokens of the update.
        observed: The observed responses.
    """

    settings: JsonObject
    lr: float
    loss: float
    rule: str
    sequences: dict[str, list[int]]
    update_tokens: list[TokenData]
    observed: list[ResponseData]


class CheckData(TypedDict):
    """A prediction checked against real steps, one per learning rate.

    Attributes:
        lrs: Learning rates.
        errors: ‖measured − predicted‖ over all observed tokens at each, nats.
        relative_error: The first error over ‖measured‖.
        slope: Log-log slope of the errors; None where it is unknown.
        expected: The slope that the rule should have.
        dtype: Of the copy that took the steps.
        measured: Per learning rate Δ log π of all observed tokens, nats.
        predicted: Likewise.
        answer_error: Distance of the decomposition's own numbers from the real step at its own
            rate, nats; None where that rate was not taken.
        own_step: Of 16-bit weights: "dtype", the part of all weights that a real step in it moved
            ("moved"), and the sum of all Δ log π after it ("measured", nats); else None.
    """

    lrs: list[float]
    errors: list[float]
    relative_error: float
    slope: float | None
    expected: int
    dtype: str
    measured: list[list[float]]
    predicted: list[list[float]]
    answer_error: float | None
    own_step: dict[str, Any] | None


Steps = Mapping[str, StepData]
Checks = Mapping[str, CheckData]
Rows = Sequence[Mapping[str, Any]]
