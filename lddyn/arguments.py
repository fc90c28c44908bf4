"""A trainer's arguments with their values, and which trainer: from its config, a mapping or a file.

`lddyn.settings` reads what they mean. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lddyn.files import LARGEST_RECORD, read_regular
from lddyn.frameworks import translate

__all__ = ["TRAINERS", "arguments"]

TRAINERS = ("sft", "dpo", "kto", "cpo", "orpo")

# What TRL 1.16 has where a file leaves an argument out, and TRL is not installed.
_COMMON: dict[str, Any] = {
    "learning_rate": 5e-5,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
}
_CUT = {"max_length": 1024, "truncation_mode": "keep_start"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {**_CUT, "learning_rate": 2e-5, "loss_type": "nll", "assistant_only_loss": False},
    "dpo": {**_CUT, "learning_rate": 1e-6, "loss_type": ["sigmoid"], "beta": 0.1},
    "kto": {"max_length": 1024, "learning_rate": 1e-6, "loss_type": "kto", "beta": 0.1},
    "cpo": {"learning_rate": 1e-6, "loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    "orpo": {"learning_rate": 1e-6, "beta": 0.1},
    "other": {},
}

# Arguments that only one trainer has: how a file without the word `trainer` is recognised.
_TELLING = {
    "kto": {"desirable_weight", "undesirable_weight"},
    "cpo": {"cpo_alpha", "simpo_gamma"},
    "sft": {"assistant_only_loss", "completion_only_loss", "packing", "dataset_text_field"},
    "dpo": {
        *("loss_weights", "ld_alpha", "f_divergence_type", "rpo_alpha", "use_weighting"),
        *("discopop_tau", "precompute_ref_log_probs", "sync_ref_model", "label_smoothing"),
    },
}

_BASES = ("", "_base", "base")  # TRL's ancestors of all its configs and trainers


def arguments(source: object) -> tuple[dict[str, Any], str, list[str]]:
    """All arguments with their values, the trainer's kind, and remarks on what was translated.

    The kind is one of TRAINERS, "other", or the name of the trainer.

    Args:
        source: As for `lddyn.TrainerSettings.of`.

    Raises:
        ValueError: If it is no configuration, or does not tell its trainer.
    """
    if isinstance(source, str | Path):
        source = _file(Path(source))
    if isinstance(source, Mapping):
        given, remarks = {str(k): v for k, v in source.items()}, []
        translated = translate(given)
        if translated is not None:
            given, kind = translated.arguments, translated.kind
            remarks = [f"{translated.framework}: {text}" for text in translated.remarks]
        else:
            kind = _kind_of_mapping(given)
        return {**_defaults(kind), **given}, kind, remarks
    kind = ""
    if hasattr(source, "args"):
        kind = _kind_of_class(type(source), "Trainer")
        source = source.args
    if not hasattr(source, "learning_rate"):
        raise ValueError(
            "like must be a TRL config, a TrainingArguments, a trainer, a mapping of their "
            f"arguments or a file of them, got {type(source).__name__}"
        )
    kind = kind or _kind_of_class(type(source), "Config") or "other"
    given = {k: v for k, v in vars(source).items() if not k.startswith("_")}
    return {**_DEFAULTS.get(kind, {}), **given}, kind, []


def _file(path: Path) -> Mapping[str, Any]:
    """The arguments in a YAML or JSON file."""
    try:
        text = read_regular(path, limit=LARGEST_RECORD).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a configuration: {error}") from error
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            values = yaml.safe_load(text)
    except ImportError as error:
        raise ValueError(f"{path}: reading YAML needs PyYAML: pip install pyyaml") from error
    except Exception as error:  # also yaml.YAMLError, which cannot be named before the import
        raise ValueError(f"{path}: not a configuration: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: must hold arguments by name, got {type(values).__name__}")
    return values


def _kind_of_class(source: type, end: str) -> str:
    """The kind by the class's name or an ancestor's: DPOConfig, MyDPOConfig(DPOConfig) → dpo.

    Another trainer of TRL's has a loss of its own, also where it inherits from one of TRAINERS:
    GKDConfig(SFTConfig) → gkd. Of a class that is not TRL's the end of the name decides, as in
    UnslothDPOTrainer.
    """
    named = [a for a in source.__mro__ if a.__name__.endswith(end)]
    stems = [(a.__name__.removesuffix(end).lower(), a.__module__.split(".")[0]) for a in named]
    own = [stem for stem, package in stems if package == "trl" and stem not in _BASES]
    if own:
        return own[0]
    alike = [k for stem, _ in stems for k in TRAINERS if stem.endswith(k)]
    if alike and stems[0][0].endswith("online" + alike[0]):
        return stems[0][0]
    return alike[0] if alike else ""


def _kind_of_mapping(given: Mapping[str, Any]) -> str:
    """The kind by the argument `trainer`, or by arguments that only one trainer has."""
    word = str(given.get("trainer", "")).lower().removesuffix("trainer")
    if word:
        if word not in (*TRAINERS, "other"):
            raise ValueError(f"trainer must be one of {', '.join(TRAINERS)}, got {word!r}")
        return word
    for kind, telling in _TELLING.items():
        if telling & given.keys():
            return kind
    names = given.get("loss_type")
    if isinstance(names, list) or names in ("sigmoid", "ipo", "apo_zero", "robust", "exo_pair"):
        return "dpo"
    if names in ("nll", "dft", "chunked_nll"):
        return "sft"
    raise ValueError(
        "the configuration does not tell its trainer: add one of "
        + ", ".join(f"trainer: {kind}" for kind in TRAINERS)
    )


def _defaults(kind: str) -> dict[str, Any]:
    """What the installed TRL has where an argument is left out; TRL 1.16's without TRL."""
    values = {**_COMMON, **_DEFAULTS[kind]}
    try:
        import trl
    except ImportError:
        return values
    config = getattr(trl, f"{kind.upper()}Config", None)
    for name, described in getattr(config, "__dataclass_fields__", {}).items():
        default = described.default
        if default is None or isinstance(default, bool | int | float | str):
            values[name] = default
    return values
