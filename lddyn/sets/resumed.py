"""The state of an optimizer that a predicted run begins with: Adam's moments, SGD's momentum.

A run that begins at step t with first moment m, second moment v and gradients of its own moves the
weights by m alone, too: with zero gradients step k after it is −rate β₁^k m / (1 − β₁^(t+k)) · P.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.engine.sharded import local
from lddyn.files import read_regular
from lddyn.optimizers import optimizer_kind, trainer_decays, unwrapped_optimizer
from lddyn.torch_files import read_torch_file

__all__ = ["OptimizerState", "steps_made"]

_FILE, _PROGRESS = "optimizer.pt", "trainer_state.json"
_FIRST = {"adamw": "exp_avg", "sgd": "momentum_buffer"}
_OF_TORCH = {"adamw": ("AdamW", "Adam"), "sgd": ("SGD",)}


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer remembers, by parameter; of split parameters this process's part.

    Attributes:
        first: The first moment m of Adam, or the momentum of SGD; parameters without one are left
            out.
        second: Adam's second moment v, not corrected for its start from zero; empty for SGD.
        steps: Steps that the optimizer has made.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    steps: int

    @classmethod
    def of(
        cls, source: object, kind: str, parameters: Mapping[str, Tensor], model: nn.Module
    ) -> OptimizerState:
        """The state of an optimizer of these parameters.

        Args:
            source: As of `Run.resumed`.
            kind: "adamw" or "sgd".
            parameters: Name → trainable parameter.
            model: Their model.

        Raises:
            ValueError: If the state is of other parameters, or of another kind of optimizer.
        """
        source = _optimizer_of(source)
        if isinstance(source, torch.optim.Optimizer):
            states = _of_optimizer(source, kind, parameters)
        else:
            states = _of_dict(_read(source), parameters, model)
        first, second, steps = {}, {}, 0
        for name, state in states.items():
            if unknown := [key for key in ("state1", "max_exp_avg_sq") if key in state]:
                raise ValueError(
                    f"the optimizer's state of {name} has {unknown[0]!r} (an 8-bit optimizer or "
                    "amsgrad), which a predicted run does not follow: predict it without the state"
                )
            if state.get(_FIRST[kind]) is not None:
                first[name] = _checked(name, state[_FIRST[kind]], parameters[name])
            if kind == "adamw" and "exp_avg_sq" in state:
                second[name] = _checked(name, state["exp_avg_sq"], parameters[name])
            steps = max(steps, int(state.get("step", 0)))
        if not first and not second:
            raise ValueError(
                f"the optimizer's state has no moments of {kind} for a trainable parameter: it has "
                "made no step, or is of another kind of optimizer"
            )
        return cls(first, second, steps)


def steps_made(source: object) -> int:
    """Optimizer steps before the state that `source` holds; 0: not known."""
    progress = getattr(getattr(source, "state", None), "global_step", None)  # of a trainer
    if isinstance(progress, int):
        return progress
    if isinstance(source, str | Path) and (Path(source) / _PROGRESS).is_file():
        return int(json.loads(read_regular(Path(source) / _PROGRESS))["global_step"])
    source = _optimizer_of(source)
    held = source.state if isinstance(source, torch.optim.Optimizer) else _read(source)["state"]
    return max((int(state.get("step", 0)) for state in held.values()), default=0)


def _optimizer_of(source: object) -> object:
    """The optimizer of a trainer, or inside of a wrapper; anything else as it is."""
    if hasattr(source, "args") and hasattr(source, "optimizer"):
        source = source.optimizer
        if source is None:
            raise ValueError("the trainer has no optimizer yet: it has made no step")
    return unwrapped_optimizer(source) if isinstance(source, torch.optim.Optimizer) else source


def _read(source: object) -> Mapping[str, Any]:
    """The state dict of an optimizer, from a file or a checkpoint's folder where it is in one."""
    if isinstance(source, str | Path):
        path = Path(source) / _FILE if Path(source).is_dir() else Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint of transformers' Trainer has the optimizer's "
                "state there, unless save_only_model=True"
            )
        source = read_torch_file(path)
    if not isinstance(source, Mapping) or not {"state", "param_groups"} <= {*source}:
        raise ValueError(
            "the state must be a torch optimizer, its state_dict, a trainer, or a checkpoint's "
            f"folder with {_FILE}, got {type(source).__name__}"
        )
    return source


def _of_optimizer(
    optimizer: torch.optim.Optimizer, kind: str, parameters: Mapping[str, Tensor]
) -> dict[str, Mapping[str, Any]]:
    if (own := optimizer_kind(optimizer)) not in _OF_TORCH[kind]:
        raise ValueError(f"the run is one of {kind}, and the optimizer's state is of {own}")
    for group in optimizer.param_groups:
        coupled = own == "Adam" and group["weight_decay"] and not group["decoupled_weight_decay"]
        for name, set_ in (
            ("a weight decay that is part of the gradient", coupled),
            ("nesterov", group.get("nesterov")),
            ("dampening", group.get("dampening")),
        ):
            if set_:
                raise ValueError(f"the optimizer has {name}, which a predicted run does not follow")
    names = {id(p): name for name, p in parameters.items()}
    held = {names[id(p)]: s for p, s in optimizer.state.items() if id(p) in names}
    if not held:
        raise ValueError(
            "the optimizer's state is of no trainable parameter of this model: it has made no "
            "step, or was built on another copy of the model"
        )
    return held


def _of_dict(
    state: Mapping[str, Any], parameters: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Mapping[str, Any]]:
    groups = [list(group["params"]) for group in state["param_groups"]]
    for names in _orders(state["param_groups"], list(parameters), model):
        if [len(part) for part in names] == [len(group) for group in groups]:
            pairs = zip(names, groups, strict=True)
            places = {n: i for part, group in pairs for n, i in zip(part, group, strict=True)}
            return {n: state["state"][i] for n, i in places.items() if i in state["state"]}
    sizes = " and ".join(str(len(group)) for group in groups)
    raise ValueError(
        f"the optimizer's state has {sizes} parameters, and the model {len(parameters)} trainable "
        "ones in the order of transformers' Trainer: give the model of that checkpoint, with the "
        "same parameters trainable"
    )


def _orders(
    groups: Sequence[Mapping[str, Any]], names: list[str], model: nn.Module
) -> list[list[list[str]]]:
    """Which parameters an optimizer's groups may be: named ones, the Trainer's two, or all."""
    if all("param_names" in group for group in groups):
        return [[list(group["param_names"]) for group in groups]]
    decaying = trainer_decays(model)
    two = [[n for n in names if n in decaying], [n for n in names if n not in decaying]]
    return [two, [names], [part for part in two if part]]


def _checked(name: str, value: Tensor, parameter: Tensor) -> Tensor:
    part = local(value)
    if part.shape != local(parameter).shape:
        raise ValueError(
            f"the optimizer's state of {name} has the shape {tuple(part.shape)}, and the parameter "
            f"{tuple(local(parameter).shape)}: it is the state of another model"
        )
    return part
