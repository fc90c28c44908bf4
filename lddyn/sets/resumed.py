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
from lddyn.errors import NonFiniteError
from lddyn.files import LARGEST_RECORD, read_regular, unique_keys
from lddyn.finite import broken_entries, is_finite
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
            ValueError: If the state is of other parameters, or of another kind of optimizer, or is
                no such state; the message names the file.
            NonFiniteError: If a moment is NaN or infinite.
        """
        where, source = _name_of(source), _optimizer_of(source)
        if isinstance(source, torch.optim.Optimizer):
            states = _of_optimizer(source, kind, parameters)
        else:
            states = _of_dict(where, _read(source), parameters, model)
        first, second, steps = {}, {}, 0
        for name, state in states.items():
            of = f"{where} of {name}"
            if unknown := [key for key in ("state1", "max_exp_avg_sq") if key in state]:
                raise ValueError(
                    f"{of} has {unknown[0]!r} (an 8-bit optimizer or amsgrad), which a predicted "
                    "run does not follow: predict it without the state"
                )
            if state.get(_FIRST[kind]) is not None:
                first[name] = _checked(of, state[_FIRST[kind]], parameters[name])
                if kind == "adamw":
                    second[name] = _checked(of, state.get("exp_avg_sq"), parameters[name])
                    if second[name].numel() and float(second[name].min()) < 0:
                        raise ValueError(f"{of} has a negative second moment: it is damaged")
            steps = max(steps, _count(of, state.get("step", 0)))
        if not first:
            raise ValueError(
                f"{where} has no moments of {kind} for a trainable parameter: it has made no step, "
                "or is of another kind of optimizer"
            )
        return cls(first, second, steps)


def steps_made(source: object) -> int:
    """Optimizer steps before the state that `source` holds; 0: not known."""
    progress = getattr(getattr(source, "state", None), "global_step", None)  # of a trainer
    if isinstance(progress, int):
        return progress
    if isinstance(source, str | Path) and (Path(source) / _PROGRESS).is_file():
        return _steps_in(Path(source) / _PROGRESS)
    where, source = _name_of(source), _optimizer_of(source)
    held = source.state if isinstance(source, torch.optim.Optimizer) else _read(source)["state"]
    return max((_count(where, state.get("step", 0)) for state in held.values()), default=0)


def _steps_in(path: Path) -> int:
    """The steps that a checkpoint's trainer_state.json says were made."""
    text = read_regular(path, limit=LARGEST_RECORD)
    try:
        steps = json.loads(text, object_pairs_hook=unique_keys)["global_step"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} has no number of steps, "global_step": {error}') from None
    return _count(str(path), steps)


def _count(where: str, steps: object) -> int:
    """A number of steps; optimizers of torch hold it as a tensor."""
    if isinstance(steps, Tensor) and steps.numel() == 1:
        steps = steps.item()
    whole = isinstance(steps, int | float) and type(steps) is not bool
    if whole and 0 <= steps < 2**53 and steps == int(steps):  # type: ignore[operator, call-overload]
        return int(steps)  # type: ignore[call-overload, no-any-return]
    shown = repr(steps) if whole or isinstance(steps, str) else f"a {type(steps).__name__}"
    raise ValueError(f"{where}: the number of steps must be a whole number, got {shown:.60}")


def _name_of(source: object) -> str:
    """What errors call the state of an optimizer."""
    return str(_file(source)) if isinstance(source, str | Path) else "the optimizer's state"


def _file(source: str | Path) -> Path:
    """The file of a state, of which a checkpoint's folder has one."""
    return Path(source) / _FILE if Path(source).is_dir() else Path(source)


def _optimizer_of(source: object) -> object:
    """The optimizer of a trainer, or inside of a wrapper; anything else as it is."""
    if hasattr(source, "args") and hasattr(source, "optimizer"):
        source = source.optimizer
        if source is None:
            raise ValueError("the trainer has no optimizer yet: it has made no step")
    return unwrapped_optimizer(source) if isinstance(source, torch.optim.Optimizer) else source


def _read(source: object) -> Mapping[str, Any]:
    """The state dict of an optimizer, from a file or a checkpoint's folder where it is in one."""
    where = _name_of(source)
    if isinstance(source, str | Path):
        path = _file(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; a checkpoint of transformers' Trainer has the optimizer's "
                "state there, unless save_only_model=True"
            )
        source = read_torch_file(path)
    if not isinstance(source, Mapping) or not {"state", "param_groups"} <= {*source}:
        raise ValueError(
            f"{where} must be a torch optimizer, its state_dict, a trainer, or a checkpoint's "
            f"folder with {_FILE}, got {type(source).__name__}"
        )
    states, groups = source["state"], source["param_groups"]
    try:  # a parameter is named by its number, or by its name
        named = all(type(i) in (int, str) for group in groups for i in group["params"])
        named &= all(type(n) is str for group in groups for n in group.get("param_names", ()))
        whole = named and all(isinstance(state, Mapping) for state in states.values())
    except (AttributeError, TypeError, LookupError):
        whole = False
    if not whole:
        raise ValueError(f"{where} is no state of an optimizer: it has other things in its place")
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
    where: str, state: Mapping[str, Any], parameters: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Mapping[str, Any]]:
    groups = [list(group["params"]) for group in state["param_groups"]]
    for names in _orders(state["param_groups"], list(parameters), model):
        if [len(part) for part in names] == [len(group) for group in groups]:
            pairs = zip(names, groups, strict=True)
            places = {n: i for part, group in pairs for n, i in zip(part, group, strict=True)}
            held = {n: state["state"][i] for n, i in places.items() if i in state["state"]}
            if not held.keys() <= parameters.keys():
                raise ValueError(
                    f"{where} is of {min(held.keys() - parameters.keys())!r:.80}, "
                    "which is no trainable parameter of this model"
                )
            return held
    sizes = " and ".join(str(len(group)) for group in groups)
    raise ValueError(
        f"{where} has {sizes} parameters, and the model {len(parameters)} trainable "
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


def _checked(where: str, value: object, parameter: Tensor) -> Tensor:
    """A moment of a parameter: this process's part of it."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(
            f"{where} must have moments of floating-point numbers, got "
            f"{value.dtype if isinstance(value, Tensor) else type(value).__name__}"
        )
    part = local(value)
    if part.shape != local(parameter).shape:
        raise ValueError(
            f"{where} has the shape {tuple(part.shape)}, and the parameter "
            f"{tuple(local(parameter).shape)}: it is the state of another model"
        )
    if not is_finite(part):
        raise NonFiniteError(
            f"{where} has {broken_entries(part)}: the run is broken; go back to an earlier "
            "checkpoint"
        )
    return part
