"""A diagnosis as two files: tensors in safetensors, all else as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.objectives.loss import Loss
from lddyn.results import load_result, save_result
from lddyn.sets.close_ups import CloseUp
from lddyn.sets.forecast import AdamMetric, Forecast
from lddyn.sets.pairs import PairSet
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.run import Run
from lddyn.sets.step import SetStep

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis

__all__ = ["read", "write"]

KIND, FORMAT = "lddyn.Diagnosis", 3
_EXAMPLE = ("prompt_ids", "response_ids", "response_mask", "name", "tokens", "prompt_tokens")


def write(
    diagnosis: Diagnosis, path: str | Path, measured: Mapping[str, object] | None = None
) -> None:
    """Writes a diagnosis to `path`.json, which also has `to_dict`, and its tensors beside it.

    Args:
        diagnosis: The diagnosis.
        path: Where, without the endings.
        measured: What the training that followed measured; for readers of the JSON file.
    """
    step, pairs = diagnosis.step, diagnosis.pairs
    state: dict[str, Any] = {
        "loss": step.loss.to_dict(),
        "pairs": [[_facts_of(e) for e in pair] for pair in pairs],
        "observed": {name: _facts_of(e) for name, e in pairs.observed.items()},
        "row_numbers": list(pairs.row_numbers),
        "faults": {str(k): v for k, v in pairs.faults.items()},
        "close_ups": {
            str(i): {"others": list(c.others), "lbk": c.lbk} for i, c in diagnosis.close_ups.items()
        },
        "validation": diagnosis.validation,
        "unavailable": diagnosis.unavailable,
        "reference_name": step.reference_name,
        "remarks": list(step.remarks),
    }
    if diagnosis.adam is not None:
        state["second_moment"] = diagnosis.adam.second_moment
    if diagnosis.forecast is not None:
        run, segments = asdict(diagnosis.forecast.run), diagnosis.forecast.segments
        state["forecast"] = {"run": run, "segments": segments}
    facts = {**diagnosis.to_dict(), **(measured or {}), "state": state}
    save_result(path, KIND, FORMAT, _tensors(diagnosis), facts)


def _facts_of(example: Example) -> dict[str, Any]:
    return {k: getattr(example, k) for k in _EXAMPLE}


def _tensors(diagnosis: Diagnosis) -> dict[str, Tensor]:
    step, readings = diagnosis.step, diagnosis.step.readings
    tensors = {
        "gram": step.gram.value,
        "reference": step.reference,
        "log_probs": readings.log_probs,
    }
    tensors["gram_observed"], tensors["observed"] = step.gram.observed, readings.observed
    if step.gram.stderr is not None:
        tensors["stderr"] = step.gram.stderr
    if step.gram.observed_stderr is not None:
        tensors["stderr_observed"] = step.gram.observed_stderr
    tensors |= {f"facts.{name}": x for name, x in readings.facts.items()}
    tensors |= {f"token_facts.{k}": torch.cat(list(x)) for k, x in readings.token_facts.items()}
    if diagnosis.adam is not None:
        tensors["adam"] = diagnosis.adam.gram
    if diagnosis.forecast is not None:
        tensors |= {f"forecast.{k}": x for k, x in diagnosis.forecast.tensors().items()}
    for pair, close_up in diagnosis.close_ups.items():
        tensors[f"close_up.{pair}"] = close_up.own
        tensors |= {f"close_up.{pair}.{j}": x for j, x in close_up.others.items()}
    return tensors


def read(path: str | Path) -> Diagnosis:
    """Reads what `write` wrote.

    Raises:
        ValueError: If a file is missing, damaged, or of another kind or format.
    """
    tensors, facts = load_result(path, KIND, FORMAT)
    # Copies are aligned in memory as the diagnosis' own tensors were: sums round as before.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        return _assemble(facts["state"], tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as {KIND}: {error!r}") from error


def _assemble(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Diagnosis:
    from lddyn.sets.diagnosis import Diagnosis

    pairs = PairSet.of(
        [(Example(**chosen), Example(**rejected)) for chosen, rejected in meta["pairs"]],
        meta["row_numbers"] or None,
        {int(k): v for k, v in meta["faults"].items()},
        {name: Example(**facts) for name, facts in meta["observed"].items()},
    )
    sizes = [len(chosen) + len(rejected) for chosen, rejected in pairs]

    def under(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    token_facts = {name: list(x.split(sizes)) for name, x in under("token_facts").items()}
    observed = tensors["observed"]
    readings = Readings(tensors["log_probs"], under("facts"), token_facts, observed)
    step = SetStep(
        Loss(**meta["loss"]),
        pairs,
        readings,
        Gram(
            tensors["gram"],
            tensors.get("stderr"),
            tensors["gram_observed"],
            tensors.get("stderr_observed"),
        ),
        tensors["reference"],
        meta["reference_name"],
        tuple(meta["remarks"]),
    )
    adam = AdamMetric(tensors["adam"], meta["second_moment"]) if "adam" in tensors else None
    forecast = None
    if "forecast" in meta:
        run, segments = Run(**meta["forecast"]["run"]), int(meta["forecast"]["segments"])
        forecast = Forecast(run=run, segments=segments, **under("forecast"))
    close_ups = {
        int(i): CloseUp(
            tensors[f"close_up.{i}"],
            {int(j): tensors[f"close_up.{i}.{j}"] for j in seen["others"]},
            float(seen["lbk"]),
        )
        for i, seen in meta["close_ups"].items()
    }
    return Diagnosis(step, adam, forecast, close_ups, meta["validation"], str(meta["unavailable"]))
