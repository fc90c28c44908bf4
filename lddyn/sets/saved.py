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
from lddyn.sets.forecast import Forecast
from lddyn.sets.motion import AdamMetric
from lddyn.sets.pairs import PairSet
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.run import Run
from lddyn.sets.step import SetStep

if TYPE_CHECKING:
    from lddyn.sets.diagnosis import Diagnosis

__all__ = [
    "example_facts",
    "forecast_facts",
    "forecast_tensors",
    "gram_tensors",
    "read",
    "read_forecast",
    "read_gram",
    "write",
]

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
        "pairs": [[example_facts(e) for e in pair] for pair in pairs],
        "observed": {name: example_facts(e) for name, e in pairs.observed.items()},
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
        state["forecast"] = forecast_facts(diagnosis.forecast)
    facts = {**diagnosis.to_dict(), **(measured or {}), "state": state}
    save_result(path, KIND, FORMAT, _tensors(diagnosis), facts)


def example_facts(example: Example) -> dict[str, Any]:
    """The fields of an example, for JSON; `Example(**…)` takes them."""
    return {k: getattr(example, k) for k in _EXAMPLE}


def gram_tensors(gram: Gram) -> dict[str, Tensor]:
    """The tensors of a Gram by name; `read_gram` takes them."""
    tensors = {"gram": gram.value, "gram_observed": gram.observed}
    if gram.stderr is not None:
        tensors["stderr"] = gram.stderr
    if gram.observed_stderr is not None:
        tensors["stderr_observed"] = gram.observed_stderr
    return tensors


def read_gram(tensors: Mapping[str, Tensor]) -> Gram:
    """The Gram among these tensors."""
    return Gram(
        tensors["gram"],
        tensors.get("stderr"),
        tensors["gram_observed"],
        tensors.get("stderr_observed"),
    )


def forecast_facts(forecast: Forecast) -> dict[str, Any]:
    """What of a forecast is no tensor, for JSON: the value of "forecast" in a saved state."""
    return {"run": asdict(forecast.run), "segments": forecast.segments}


def forecast_tensors(forecast: Forecast) -> dict[str, Tensor]:
    """The tensors of a forecast by name; `read_forecast` takes them."""
    return {f"forecast.{name}": x for name, x in forecast.tensors().items()}


def read_forecast(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Forecast | None:
    """The forecast of a saved state; None: it has none."""
    if "forecast" not in state:
        return None
    run, segments = Run(**state["forecast"]["run"]), int(state["forecast"]["segments"])
    return Forecast(run=run, segments=segments, **_under(tensors, "forecast"))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix and a dot, by the rest of their names."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _tensors(diagnosis: Diagnosis) -> dict[str, Tensor]:
    step, readings = diagnosis.step, diagnosis.step.readings
    tensors = gram_tensors(step.gram) | {
        "reference": step.reference,
        "log_probs": readings.log_probs,
        "observed": readings.observed,
    }
    tensors |= {f"facts.{name}": x for name, x in readings.facts.items()}
    tensors |= {f"token_facts.{k}": torch.cat(list(x)) for k, x in readings.token_facts.items()}
    if diagnosis.adam is not None:
        tensors["adam"] = diagnosis.adam.gram
    if diagnosis.forecast is not None:
        tensors |= forecast_tensors(diagnosis.forecast)
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
    token_facts = {n: list(x.split(sizes)) for n, x in _under(tensors, "token_facts").items()}
    observed = tensors["observed"]
    readings = Readings(tensors["log_probs"], _under(tensors, "facts"), token_facts, observed)
    step = SetStep(
        Loss(**meta["loss"]),
        pairs,
        readings,
        read_gram(tensors),
        tensors["reference"],
        meta["reference_name"],
        tuple(meta["remarks"]),
    )
    adam = AdamMetric(tensors["adam"], meta["second_moment"]) if "adam" in tensors else None
    forecast = read_forecast(meta, tensors)
    close_ups = {
        int(i): CloseUp(
            tensors[f"close_up.{i}"],
            {int(j): tensors[f"close_up.{i}.{j}"] for j in seen["others"]},
            float(seen["lbk"]),
        )
        for i, seen in meta["close_ups"].items()
    }
    return Diagnosis(step, adam, forecast, close_ups, meta["validation"], str(meta["unavailable"]))
