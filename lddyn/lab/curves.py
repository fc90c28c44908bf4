"""Log-probs of the probing set over a finetuning run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lddyn.lab.record import Row

__all__ = ["Curves", "bell", "explained_share", "unrelated"]


@dataclass(frozen=True)
class Curves:
    """Log-probs of every probe over a run.

    Attributes:
        updates: Numbers of updates before the T measurements.
        fields: F types.
        log_prob: (T, P, F) nats, sums over tokens; NaN where there is no such response.
        greedy: (T, P, F) nats, Σ log max π along the teacher-forced prefix.
        means: Per token, mean over prompts: "log_prob", "greedy", "rest", "entropy", "peakiness",
            "energy", each (T, F).
        raw: Everything that the run kept, as JSON holds it.
    """

    updates: list[int]
    fields: tuple[str, ...]
    log_prob: np.ndarray
    greedy: np.ndarray
    means: dict[str, np.ndarray]
    raw: Row = field(repr=False)

    @classmethod
    def of(cls, raw: Row) -> Curves:
        """Makes the curves from the result of `finetune`."""
        return cls(
            list(raw["updates"]),
            tuple(raw["fields"]),
            np.array(raw["log_prob"], dtype=float),
            np.array(raw["greedy"], dtype=float),
            {k: np.array(v, dtype=float) for k, v in raw["means"].items()},
            raw,
        )

    def column(self, name: str) -> int:
        """Index of the column of a response type."""
        return self.fields.index(name)

    def change(self, name: str, kind: str = "log_prob") -> np.ndarray:
        """Change of log π over the run, last minus first value, per prompt (P,)."""
        values = getattr(self, kind)[:, :, self.column(name)]
        moved: np.ndarray = values[-1] - values[0]
        return moved

    def mean(self, name: str, kind: str = "log_prob") -> np.ndarray:
        """Mean over prompts, (T,)."""
        mean: np.ndarray = np.nanmean(getattr(self, kind)[:, :, self.column(name)], axis=1)
        return mean

    def rows(self, run: str) -> list[Row]:
        """For a table: one row per update and type."""
        return [
            {
                "run": run,
                "update": update,
                "type": name,
                "log_prob": round(float(np.nanmean(self.log_prob[t, :, f])), 4),
                "greedy": round(float(np.nanmean(self.greedy[t, :, f])), 4),
                **{f"{k} per token": round(float(v[t, f]), 5) for k, v in self.means.items()},
            }
            for t, update in enumerate(self.updates)
            for f, name in enumerate(self.fields)
        ]


def bell(log_prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rise to the peak and fall from it, per prompt.

    The peak of the mean curve is found on every other prompt and applied to the rest, so that
    choosing it does not favour a rise.

    Args:
        log_prob: (T, P) of one response type.

    Returns:
        rise (P,), fall (P,), nats; the fall is negative.
    """
    rise, fall = np.empty(log_prob.shape[1]), np.empty(log_prob.shape[1])
    for half in (0, 1):
        peak = int(np.nanargmax(np.nanmean(log_prob[:, half::2], axis=1)))
        other = log_prob[:, 1 - half :: 2]
        rise[1 - half :: 2] = other[peak] - other[0]
        fall[1 - half :: 2] = other[-1] - other[peak]
    return rise, fall


def explained_share(predicted: np.ndarray, measured: np.ndarray) -> float:
    """1 − Σ |measured − predicted| / Σ |measured|: 1 where all is explained, 0 as for a zero."""
    return float(1 - np.abs(measured - predicted).sum() / np.abs(measured).sum())


def unrelated(curve: Curves) -> np.ndarray:
    """Change of responses that answer something else, mean over their types, per prompt (P,)."""
    names = [n for n in ("irr_train", "irr_test", "irr_hum") if n in curve.fields]
    mean: np.ndarray = np.nanmean([curve.change(n) for n in names], axis=0)
    return mean
