"""Configurations of LLaMA-Factory and axolotl as arguments of TRL's trainers.

Each framework has names and defaults of its own for what transformers and TRL call otherwise. A
setting that has no counterpart becomes a remark.

Source: LLaMA-Factory, hparams/finetuning_args.py, train/dpo/trainer.py; axolotl,
core/builders/base.py, core/builders/rl.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Translation", "translate"]


class Translation(NamedTuple):
    """A framework's configuration in TRL's words.

    Attributes:
        framework: Its name.
        kind: The trainer: "sft", "dpo", "kto", "cpo" or "orpo".
        arguments: Arguments by TRL's and transformers' names.
        remarks: What has no counterpart, in sentences.
    """

    framework: str
    kind: str
    arguments: dict[str, Any]
    remarks: list[str]


def translate(given: Mapping[str, Any]) -> Translation | None:
    """The configuration of a framework in TRL's words; None if it is none of a framework.

    Raises:
        ValueError: If lddyn has not the loss that it trains with.
    """
    if "stage" in given and given.keys() & {"finetuning_type", "template", "cutoff_len"}:
        return _llama_factory(given)
    if "base_model" in given and given.keys() & {"micro_batch_size", "sequence_len", "rl"}:
        return _axolotl(given)
    return None


# ----- LLaMA-Factory

_LLAMA_FACTORY_DEFAULTS = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "cutoff_len": 2048,
}

# Switches that put another optimizer in the place of `optim`.
_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")


# What changes the loss, or the number of rows and so their order.
_LLAMA_FACTORY_LEFT_OUT = ("mask_history", "use_asft_loss", "max_samples", "val_size")


def _llama_factory(given: Mapping[str, Any]) -> Translation:
    set_ = {name: value for name, value in given.items() if value is not None}
    values: dict[str, Any] = {**_LLAMA_FACTORY_DEFAULTS, **set_}
    remarks: list[str] = []
    stage = str(values.pop("stage"))
    values["max_length"] = values.pop("cutoff_len")
    in_order = values.pop("disable_shuffling", False)
    values["train_sampling_strategy"] = "sequential" if in_order else "random"
    if values.get("neat_packing"):
        values["packing"] = True
    remarks += [f"{name}: not followed." for name in _LLAMA_FACTORY_LEFT_OUT if values.get(name)]
    for name in _OPTIMIZERS:
        if values.get(name):
            values["optim"] = name.removeprefix("use_")
    if values.get("ref_model"):
        remarks.append(
            f"ref_model={values['ref_model']}: give it as reference= (--reference); here the "
            "reference is the start model."
        )
    if values.get("loraplus_lr_ratio"):
        remarks.append("loraplus_lr_ratio: LoRA's B has the learning rate of A here.")
    remarks.append(
        f"cutoff_len={values['max_length']}: LLaMA-Factory cuts prompt and response in proportion "
        "to their lengths; here a longer row is cut as TRL cuts it."
    )
    if stage in ("sft", "pt"):
        prompts = bool(values.get("train_on_prompt")) or stage == "pt"
        values |= {"assistant_only_loss": not prompts, "completion_only_loss": not prompts}
        values["loss_type"] = "dft" if values.get("use_dft_loss") else "nll"
        return Translation("LLaMA-Factory", "sft", values, remarks)
    values["beta"] = values.get("pref_beta", 0.1)
    if stage == "kto":
        values["desirable_weight"] = values.get("kto_chosen_weight", 1.0)
        values["undesirable_weight"] = values.get("kto_rejected_weight", 1.0)
        return Translation("LLaMA-Factory", "kto", values, remarks)
    if stage != "dpo":
        raise ValueError(f"stage: lddyn has the losses of sft, pt, dpo and kto, got {stage!r}")
    return _llama_factory_pairs(values, remarks)


def _llama_factory_pairs(values: dict[str, Any], remarks: list[str]) -> Translation:
    """`stage: dpo`: the loss by `pref_loss`."""
    loss, ftx = str(values.get("pref_loss", "sigmoid")), float(values.get("pref_ftx") or 0.0)
    smooth = float(values.get("dpo_label_smoothing") or 0.0)
    if float(values.get("pref_bco_weight") or 0.0):
        remarks.append("pref_bco_weight: the loss of BCO is left out.")
    if loss == "orpo":
        remarks.append("orpo: the first term is a mean over the tokens of the batch here.")
        return Translation("LLaMA-Factory", "orpo", values, remarks)
    if loss == "simpo":
        values |= {"loss_type": "simpo", "cpo_alpha": ftx}
        values.setdefault("simpo_gamma", 0.5)
        return Translation("LLaMA-Factory", "cpo", values, remarks)
    if loss not in ("sigmoid", "hinge", "ipo"):
        raise ValueError(f"pref_loss must be sigmoid, hinge, ipo, orpo or simpo here, got {loss!r}")
    names, weights = ["cdpo" if smooth and loss == "sigmoid" else loss], [1.0]
    values["label_smoothing"] = smooth
    if ftx:
        names, weights = [*names, "sft"], [*weights, ftx]
        remarks.append(
            f"pref_ftx={ftx:g}: LLaMA-Factory takes the mean over each response's tokens, then "
            "over responses; here the mean is over the tokens of the batch, as in TRL."
        )
    values |= {"loss_type": names, "loss_weights": weights}
    return Translation("LLaMA-Factory", "dpo", values, remarks)


# ----- axolotl

_AXOLOTL_NAMES = {
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dpo_loss_weights": "loss_weights",
}
_AXOLOTL_LEFT_OUT = (
    *("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "loraplus_lr_ratio", "embedding_lr"),
    *("embedding_lr_scale", "lr_groups", "curriculum_sampling", "val_set_size"),
)
_AXOLOTL_DEFAULTS = {"lr_scheduler": "cosine", "num_epochs": 1, "micro_batch_size": 1}
_AXOLOTL_SCHEDULES = ("one_cycle", "rex")


def _axolotl(given: Mapping[str, Any]) -> Translation:
    set_ = {k: v for k, v in given.items() if v is not None}
    values: dict[str, Any] = {
        _AXOLOTL_NAMES.get(k, k): v for k, v in {**_AXOLOTL_DEFAULTS, **set_}.items()
    }
    remarks: list[str] = []
    kind = str(set_.get("rl") or "sft")
    if values["lr_scheduler_type"] in _AXOLOTL_SCHEDULES:
        remarks.append(f"lr_scheduler={values['lr_scheduler_type']}: here it is a cosine.")
        values["lr_scheduler_type"] = "cosine"
    remarks += [f"{name}: not followed." for name in _AXOLOTL_LEFT_OUT if set_.get(name)]
    if "warmup_steps" not in set_ and "warmup_ratio" not in set_:
        values["warmup_ratio"] = 0.03
        remarks.append("warm-up: 3 % of all steps, of which axolotl takes at most 100.")
    remarks.append("axolotl shuffles the rows once more before training: the order may be another.")
    trl = set_.get("trl") or {}
    if not isinstance(trl, Mapping):
        raise ValueError(f"trl must have names and values, got {trl!r}")
    if set_.get("reward_model"):
        raise ValueError("reward_model: lddyn has no loss of reward models")
    beta = trl.get("beta", set_.get("rl_beta", set_.get("orpo_alpha")))
    if beta is not None:
        values["beta"] = beta
    if kind == "sft":
        prompts = bool(set_.get("train_on_inputs"))
        values |= {"assistant_only_loss": not prompts, "completion_only_loss": not prompts}
        values["loss_type"] = "nll"
    elif kind in ("dpo", "ipo"):
        given_losses = set_.get("dpo_loss_type") or ["ipo" if kind == "ipo" else "sigmoid"]
        values["loss_type"] = given_losses
        kind = "dpo"
    elif kind == "simpo":
        values["loss_type"], kind = "simpo", "cpo"
    elif kind == "kto":
        values["desirable_weight"] = set_.get("kto_desirable_weight") or 1.0
        values["undesirable_weight"] = set_.get("kto_undesirable_weight") or 1.0
    elif kind != "orpo":
        raise ValueError(f"rl: lddyn has the losses of dpo, ipo, simpo, kto and orpo, got {kind!r}")
    return Translation("axolotl", kind, values, remarks)
