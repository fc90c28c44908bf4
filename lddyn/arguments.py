"""A trainer's arguments with their values, and which trainer: from its config, a mapping or a file.

`lddyn.settings` reads what they mean. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lddyn.files import parse_json, read_regular
from lddyn.frameworks import translate

__all__ = ["TRAINERS", "arguments"]

TRAINERS = ("sft", "dpo", "kto", "cpo", "orpo", "grpo")

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
    "cpo": {
        **_CUT,
        **{"learning_rate": 1e-6, "loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
        "simpo_gamma": 0.5,
    },
    "orpo": {**_CUT, "learning_rate": 1e-6, "beta": 0.1},
    "grpo": {
        **{"learning_rate": 1e-6, "loss_type": "dapo", "beta": 0.0, "epsilon": 0.2},
        **{"scale_rewards": "group", "importance_sampling_level": "token"},
        **{"max_completion_length": 512, "use_bias_correction_kl": True},
    },
    "other": {},
}

# Arguments that only one trainer has: how a file without the word `trainer` is recognised.
_TELLING = {
    "grpo": {
        *("num_generations", "scale_rewards", "importance_sampling_level", "reward_weights"),
        *("epsilon", "epsilon_high", "steps_per_generation"),
    },
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
            remarks = _unknown(given, kind) if kind in TRAINERS and _has_trl() else []
        return {**_defaults(kind), **_typed(given)}, kind, remarks
    kind = ""
    if hasattr(source, "args"):
        kind = _kind_of_class(type(source), "Trainer")
        source = source.args
    if isinstance(source, type) or not hasattr(source, "learning_rate"):
        raise ValueError(
            "like must be a TRL config, a TrainingArguments, a trainer, a mapping of their "
            f"arguments or a file of them, got {_name_of(source)}"
        )
    kind = kind or _kind_of_class(type(source), "Config")
    if not kind and not any(a.__name__.endswith("Arguments") for a in type(source).__mro__):
        raise ValueError(
            f"like must tell its trainer, got {type(source).__name__}: give TRL's config, or a "
            "mapping of its arguments with `trainer`"
        )
    kind = kind or "other"
    given = {k: v for k, v in vars(source).items() if not k.startswith("_")}
    return {**_DEFAULTS.get(kind, {}), **given}, kind, []


def _name_of(source: object) -> str:
    return f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__


def _has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


# ----- files

_LARGEST = 1 << 20  # bytes of a configuration

_VALUES = 100_000  # that it may hold where every alias stands for what it names


def _file(path: Path) -> Mapping[str, Any]:
    """The arguments in a YAML or JSON file."""
    try:
        text = read_regular(path, limit=_LARGEST).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a configuration: {error}") from error
    try:
        values = parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except ImportError as error:
        raise ValueError(f"{path}: reading YAML needs PyYAML: pip install pyyaml") from error
    except Exception as error:  # also yaml.YAMLError, which cannot be named before the import
        reason = " ".join(str(error).split())  # in one line
        if isinstance(error, RecursionError):
            reason = "too deeply nested"
        raise ValueError(f"{path}: not a configuration: {reason}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: must hold arguments by name, got {type(values).__name__}")
    return values


def _parse_yaml(text: str) -> object:
    """The value of a YAML text, whose aliases are limited and whose keys are unique."""
    import yaml  # type: ignore[import-untyped]

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_node(root, {})
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_node(node: Any, sizes: dict[int, int]) -> int:
    """How many values a node of YAML holds where every alias stands for what it names.

    Args:
        node: A scalar, a sequence or a mapping.
        sizes: id of a node → this number, 0 while it is counted; it is filled.

    Raises:
        ValueError: If they are more than `_VALUES`, a node holds itself, or a key stands twice.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"an alias in line {_line(node)} names what holds it")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = node.value if isinstance(node.value, list) else []
    if parts and isinstance(parts[0], tuple):
        _check_keys([key for key, _ in parts])
        parts = [part for entry in parts for part in entry]
    size = 1 + sum(_check_node(part, sizes) for part in parts)
    if size > _VALUES:
        raise ValueError(f"it has more than {_VALUES:,} values, those of aliases counted again")
    sizes[id(node)] = size
    return size


def _check_keys(keys: list[Any]) -> None:
    """Raises a ValueError for a key of YAML that stands twice in one mapping."""
    seen: set[tuple[str, str]] = set()
    for key in keys:
        if isinstance(key.value, str) and not key.tag.endswith(":merge"):  # << may be repeated
            if (key.tag, key.value) in seen:
                raise ValueError(f"the key {key.value!r} occurs twice, again in line {_line(key)}")
            seen.add((key.tag, key.value))


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


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
    if not _has_trl():
        return values
    for name, described in getattr(_config(kind), "__dataclass_fields__", {}).items():
        default = described.default
        if default is None or isinstance(default, bool | int | float | str):
            values[name] = default
    return values


def _config(kind: str) -> object:
    """TRL's config class of a trainer; TRL 1 has some of them in `trl.experimental`."""
    import trl

    name = f"{kind.upper()}Config"
    if hasattr(trl, name):
        return getattr(trl, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"trl.experimental.{kind}")
    except ImportError:
        return None
    return getattr(module, name, None)


# ----- values


_NUMBERS = {
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "num_train_epochs", "warmup_steps", "warmup_ratio", "beta", "rpo_alpha"),
    *("label_smoothing", "simpo_gamma", "cpo_alpha", "ld_alpha", "discopop_tau", "alpha"),
    *("desirable_weight", "undesirable_weight", "router_aux_loss_coef", "neftune_noise_alpha"),
    *("label_smoothing_factor", "f_alpha_divergence_coef", "epsilon", "epsilon_high"),
}
_WHOLE = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed"),
    *("data_seed", "max_length", "max_prompt_length", "max_completion_length"),
}
_BILLION = 10.0**9
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), (0, math.inf)),
    **dict.fromkeys(("warmup_steps", "num_train_epochs"), (0, _BILLION)),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), (1, _BILLION)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**63 - 1)),
    **{"warmup_ratio": (0, 1), "max_steps": (-_BILLION, _BILLION), "max_length": (2, _BILLION)},
    **dict.fromkeys(("max_prompt_length", "max_completion_length"), (1, _BILLION)),
}
_SWITCHES = {
    *("dataloader_drop_last", "reference_free", "packing", "bf16", "fp16", "use_weighting"),
    *("sync_ref_model", "precompute_ref_log_probs", "assistant_only_loss", "padding_free"),
    *("completion_only_loss", "disable_dropout", "group_by_length"),
}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Where nothing is a value of its own: no limit, no clipping, not used.
_MAY_BE_NONE = {
    *("max_length", "max_prompt_length", "max_completion_length", "max_grad_norm", "rpo_alpha"),
    *("ld_alpha", "neftune_noise_alpha", "router_aux_loss_coef", "data_seed"),
}


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's arguments with values of their types: YAML reads 5e-6 as text.

    Raises:
        ValueError: If a value is not of its type; the message names the argument.
    """
    typed: dict[str, Any] = {}
    for name, value in given.items():
        known = name in _NUMBERS or name in _WHOLE or name in _SWITCHES
        if value is None and known:
            if name in _MAY_BE_NONE:
                typed[name] = None
            continue
        typed[name] = _value(name, value) if known else value
    mode = typed.get("truncation_mode", "keep_end")
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f'truncation_mode must be "keep_start" or "keep_end", got {mode!r:.80}')
    return typed


def _value(name: str, value: Any) -> Any:
    if name in _SWITCHES:
        word = _WORDS.get(str(value).lower(), value)
        if word not in (True, False):
            raise ValueError(f"{name} must be true or false, got {str(value)!r:.80}")
        return bool(word)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    if name in _WHOLE and not number.is_integer():
        raise ValueError(f"{name} must be a whole number, got {value!r:.80}")
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r:.80}")
    return int(number) if name in _WHOLE else number


def _unknown(given: Mapping[str, Any], kind: str) -> list[str]:
    """A sentence on arguments that TRL's config of this trainer does not have."""
    known = set(getattr(_config(kind), "__dataclass_fields__", {}))
    if not known:
        return []
    import trl

    for other in ("ModelConfig", "ScriptArguments", "DatasetMixtureConfig"):
        known |= set(getattr(getattr(trl, other, None), "__dataclass_fields__", {}))
    known |= _NUMBERS | _WHOLE | _SWITCHES | {"trainer", "train_sampling_strategy", "loss_weights"}
    others = [name for name in given if name not in known]
    if not others:
        return []
    return [f"{', '.join(others)}: no argument of {kind.upper()}Config; not read."]
