"""A trainer's settings as one value: what a run trains with, read from its configuration.

`TrainerSettings.of` takes a TRL config, a TrainingArguments, a trainer, a mapping, or a YAML or
JSON file of such arguments. Everything that takes `like=` reads it from there: objective and
parameters, cutting of rows, optimizer, clipping, reference. What lddyn cannot follow is a sentence
in `remarks`. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lddyn.arguments import arguments
from lddyn.files import naming

__all__ = ["Like", "TrainerSettings", "router_remark"]

Like: TypeAlias = object  # a config, a trainer, a mapping, a path, or TrainerSettings

# Names of transformers' `optim` → lddyn's.
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
}

# Optimizers whose arithmetic is AdamW's with a state of 8 bits, or in pages.
_NEARLY_ADAMW = ("paged_adamw", "adamw_bnb", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit")


@dataclass(frozen=True)
class TrainerSettings:
    """What a run trains with, as far as lddyn follows it.

    Attributes:
        trainer: "sft", "dpo", "kto", "cpo", "orpo", "grpo"; "other" for transformers' own; for
            other trainers of TRL their name, such as "gkd": they have no `losses`.
        trl_version: Version of TRL whose rules hold; empty: not known, and those of 1.16 hold.
        losses: Names of losses of `lddyn.Loss`, or of `lddyn.SFT`, `lddyn.KTO` and `lddyn.GRPO`.
        loss_weights: One weight per loss.
        parameters: Name → value, of the losses.
        max_length, max_prompt_length, max_completion_length: Most tokens; None: no limit.
        truncation_mode: "keep_start" or "keep_end".
        assistant_only: Whether only the assistant's tokens of a conversation are in the loss.
        completion_only: Whether only the completion of a prompt is in the loss.
        eos_token: The EOS token that the trainer sets; None: the tokenizer's.
        learning_rate: η at its highest.
        optimizer: "adamw", "sgd" or "rmsprop"; None: one that lddyn does not follow.
        weight_decay, betas, epsilon: Of the optimizer.
        max_grad_norm: Norm to which gradients are clipped; None: not clipped.
        batch: Rows of one optimizer step on one device, accumulation included.
        accumulation: Parts of equal size into which a step's rows are divided.
        epochs: Passes over the data.
        max_steps: Optimizer steps in all, instead of `epochs`; None: not given.
        drop_last: Whether a last part of an epoch that is too small is left out.
        shuffle: Whether rows are shuffled in each epoch.
        seed: Seed of the order of rows.
        schedule: transformers' name of the learning rate's schedule.
        schedule_options: Its further arguments, `lr_scheduler_kwargs`.
        warmup_steps, warmup_ratio: Steps, or part of all steps, over which the rate rises from 0.
        reference: "trainer": what TRL's trainers take (`trainer_reference`); "adapter:NAME";
            "free": log π_ref = 0; or the trainer's reference model.
        router_aux_loss_coef: Weight of a router's auxiliary loss; None: the model config's own.
        optimizer_state: A trainer's optimizer, once it has made a step; None: a fresh one.
        remarks: Settings that lddyn does not follow, one sentence each.
        step_remarks: The same of a single step at the start of the run; a predicted run follows
            them.
        file: The file that they were read from; empty: none.

    Example:
        >>> import lddyn
        >>> like = lddyn.TrainerSettings.of({"trainer": "dpo", "loss_type": ["ipo"], "beta": 0.5})
        >>> like.losses, like.parameters["beta"], like.max_grad_norm
        (('ipo',), 0.5, 1.0)
    """

    trainer: str
    trl_version: str = ""
    losses: tuple[str, ...] = ()
    loss_weights: tuple[float, ...] = ()
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    assistant_only: bool = True
    completion_only: bool = True
    eos_token: str | None = None
    learning_rate: float = 5e-5
    optimizer: str | None = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    batch: int = 8
    accumulation: int = 1
    epochs: float = 3.0
    max_steps: int | None = None
    drop_last: bool = False
    shuffle: bool = True
    seed: int = 42
    schedule: str = "linear"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    reference: object = "trainer"
    router_aux_loss_coef: float | None = None
    optimizer_state: object = field(default=None, repr=False)
    remarks: tuple[str, ...] = ()
    step_remarks: tuple[str, ...] = ()
    file: str = field(default="", compare=False)

    @classmethod
    def of(cls, source: Like) -> TrainerSettings:
        """Reads the settings of a run.

        Args:
            source: A config of TRL (SFTConfig, DPOConfig, KTOConfig, CPOConfig, ORPOConfig), a
                TrainingArguments, a trainer, a mapping of their arguments, or a YAML or JSON file
                of them; also a configuration of LLaMA-Factory (`stage:`) or axolotl
                (`base_model:`). A mapping or a file of TRL's arguments says `trainer: dpo` where
                they do not tell.

        Raises:
            ValueError: If the file cannot be read, it is no configuration, or the trainer's kind is
                not known; the message says what to give.
        """
        if isinstance(source, TrainerSettings):
            return source
        trainer = source if hasattr(source, "args") else None
        file = str(source) if isinstance(source, str | Path) else ""
        with naming(file):
            values, kind, remarks = arguments(source)
            return replace(_Reading(values, kind, trainer, remarks).settings(), file=file)

    @property
    def old(self) -> bool:
        """Whether the rules are those of TRL before 1.0."""
        return self.before(1, 0)

    def before(self, *version: int) -> bool:
        """Whether the rules are those of a TRL before this version; False where it is not known."""
        numbers = [int(part) for part in self.trl_version.split(".")[:2] if part.isdigit()]
        return bool(numbers) and tuple(numbers) < version


def _installed_trl() -> str:
    try:
        return version("trl")
    except PackageNotFoundError:
        return ""


class _Reading:
    """Reads arguments one by one, and collects remarks about those that are not followed."""

    def __init__(
        self,
        values: Mapping[str, Any],
        kind: str,
        trainer: object = None,
        remarks: Iterable[str] = (),
    ):
        self.values, self.kind, self.trainer = values, kind, trainer
        self.ref_model = getattr(trainer, "ref_model", None)
        self.trl = _installed_trl()
        self.remarks = list(remarks)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an argument; the default where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else getattr(value, "value", value)

    def settings(self) -> TrainerSettings:
        """All settings."""
        losses, weights, parameters = self._losses()
        state = _state_of(self.trainer)
        self._left_out()
        if self.trainer is not None:
            self.remarks += _trainer_remarks(self.trainer, self)
        clip = float(self.get("max_grad_norm", 0.0))
        accumulation = int(self.get("gradient_accumulation_steps", 1))
        max_steps = int(self.get("max_steps", -1))
        return TrainerSettings(
            trainer=self.kind,
            trl_version=self.trl,
            losses=losses,
            loss_weights=weights or (1.0,) * len(losses),
            parameters=parameters,
            max_length=self.get("max_length"),
            max_prompt_length=self.get("max_prompt_length"),
            max_completion_length=self.get("max_completion_length"),
            truncation_mode=self.get("truncation_mode", "keep_start"),
            assistant_only=bool(self.get("assistant_only_loss", self.kind != "sft")),
            completion_only=bool(self.get("completion_only_loss", True)),
            eos_token=self.get("eos_token"),
            learning_rate=float(self.get("learning_rate", 5e-5)),
            optimizer=self._optimizer(),
            weight_decay=float(self.get("weight_decay", 0.0)),
            betas=(float(self.get("adam_beta1", 0.9)), float(self.get("adam_beta2", 0.999))),
            epsilon=float(self.get("adam_epsilon", 1e-8)),
            max_grad_norm=clip if clip > 0 else None,
            batch=int(self.get("per_device_train_batch_size", 8)) * accumulation,
            accumulation=accumulation,
            epochs=float(self.get("num_train_epochs", 3.0)),
            max_steps=max_steps if max_steps > 0 else None,
            drop_last=bool(self.get("dataloader_drop_last", False)),
            shuffle=self.get("train_sampling_strategy", "random") != "sequential",
            seed=int(self.get("data_seed", self.get("seed", 42))),
            schedule=str(self.get("lr_scheduler_type", "linear")),
            schedule_options=self._schedule_options(),
            warmup_steps=int(self.get("warmup_steps", 0)),
            warmup_ratio=self._warmup_ratio(),
            reference=self._reference(),
            router_aux_loss_coef=self.get("router_aux_loss_coef"),
            optimizer_state=state,
            remarks=tuple(self.remarks),
            # A live optimizer has the rate of its next step.
            step_remarks=tuple(self._unlike(_NOT_FOLLOWED_BY_A_STEP)) if state is None else (),
        )

    # ----- losses

    Losses: TypeAlias = tuple[tuple[str, ...], tuple[float, ...], dict[str, float | str]]

    def _sft(self) -> Losses:
        kind = str(self.get("loss_type", "nll"))
        return ({"chunked_nll": "nll"}.get(kind, kind),), (), {}

    def _losses(self) -> Losses:
        """Names, weights and parameters of the losses; none of a trainer that lddyn lacks."""
        readers = {
            "sft": self._sft,
            "dpo": self._dpo,
            "kto": self._kto,
            "cpo": self._cpo,
            "orpo": self._orpo,
            "grpo": self._grpo,
            "other": self._other,
        }
        return readers[self.kind]() if self.kind in readers else ((), (), {})

    def _other(self) -> Losses:
        return ("nll",), (), {}

    def _kto(self) -> Losses:
        names = ("beta", "desirable_weight", "undesirable_weight")
        return (str(self.get("loss_type", "kto")),), (), self._numbers(names)

    def _grpo(self) -> Losses:
        scale = self.get("scale_rewards", "group")
        given: dict[str, float | str] = {
            "scale_rewards": {True: "group", False: "none"}.get(scale, scale),
            "importance_sampling_level": str(self.get("importance_sampling_level", "token")),
            "use_bias_correction_kl": bool(self.get("use_bias_correction_kl", True)),
        }
        given |= self._numbers(("beta", "epsilon", "epsilon_high", "max_completion_length"))
        return (str(self.get("loss_type", "dapo")),), (), given

    def _orpo(self) -> Losses:
        return ("orpo",), (), self._numbers(("beta",))

    def _cpo(self) -> Losses:
        kind = str(self.get("loss_type", "sigmoid"))
        if kind == "alphapo":
            return ("simpo",), (), {**self._numbers(_CPO["simpo"]), "cpo_alpha": 0.0}
        name = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo"}.get(kind, kind)
        return (name,), (), self._numbers(_CPO.get(name, ()))

    def _dpo(self) -> Losses:
        given = self.get("loss_type", ["sigmoid"])
        names = [given] if isinstance(given, str) else [str(name) for name in given]
        weights = [float(w) for w in self.get("loss_weights", [1.0] * len(names))]
        names = [{"sigmoid": "dpo", "aot_pair": "aot_unpaired"}.get(n, n) for n in names]
        smooth = float(self.get("label_smoothing", 0.0))
        old = self.trl.startswith("0.")
        if smooth and "dpo" in names and not old:
            self.remarks.append(
                f"label_smoothing={smooth:g} is not read by TRL {self.trl or '1.16'} for sigmoid, "
                "and not here; cdpo is the smoothed loss."
            )
        if smooth and old:
            names = ["cdpo" if n == "dpo" else n for n in names]
        rpo = float(self.get("rpo_alpha", 0.0))
        if rpo:
            names, weights = [*names, "sft"], [*weights, rpo]
        parameters = self._numbers(("beta", "discopop_tau", "ld_alpha"))
        if smooth or "robust" in names or "cdpo" in names:
            parameters["label_smoothing"] = smooth
        if "exo_pair" in names and not smooth:
            parameters["label_smoothing"] = 1e-3
        kind = str(self.get("f_divergence_type", "reverse_kl"))
        if kind != "reverse_kl":
            parameters["f_divergence_type"] = kind
            parameters["f_alpha_divergence_coef"] = float(self.get("f_alpha_divergence_coef", 0.5))
        if old and (kind == "alpha_divergence" or "ld_alpha" in parameters):
            self.remarks.append(
                f"TRL {self.trl} has another formula of alpha_divergence and ld_alpha than the one "
                "here, which is TRL 1.16's."
            )
        if old and "bco_pair" in names:
            self.remarks.append(
                f"TRL {self.trl} measures rewards of bco_pair from their running mean; here delta "
                "is 0."
            )
        return tuple(names), tuple(weights), parameters

    def _numbers(self, names: tuple[str, ...]) -> dict[str, float | str]:
        """The arguments of these names that are given, as numbers."""
        return {n: float(self.get(n)) for n in names if self.get(n) is not None}

    # ----- optimizer and reference

    def _optimizer(self) -> str | None:
        name = str(self.get("optim", "adamw_torch")).lower()
        if name in _OPTIMIZERS:
            return _OPTIMIZERS[name]
        if name.startswith(_NEARLY_ADAMW):
            self.remarks.append(
                f"optim={name}: its state has fewer bits or lies in pages; the step here is "
                "AdamW's with an exact state."
            )
            return "adamw"
        self.remarks.append(
            f"optim={name}: lddyn follows SGD, Adam, AdamW and RMSprop, so that the step needs "
            "another optimizer=…; watch(trainer, predict=1) measures the real one."
        )
        return None

    def _reference(self) -> object:
        if self.get("reference_free", False):
            return "free"
        if self.ref_model is not None:
            return self.ref_model
        name = self.get("ref_adapter_name")
        return f"adapter:{name}" if name else "trainer"

    def _schedule_options(self) -> Mapping[str, Any]:
        """`lr_scheduler_kwargs`, which transformers also takes as JSON."""
        given = self.get("lr_scheduler_kwargs", {})
        try:
            options = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(
                f"lr_scheduler_kwargs must be JSON, got {given!r:.80}: {error}"
            ) from error
        if not isinstance(options, Mapping):
            raise ValueError(f"lr_scheduler_kwargs must have names and values, got {given!r:.80}")
        return {str(name): _number(value) for name, value in options.items()}

    def _warmup_ratio(self) -> float:
        """The part of all steps over which the rate rises; 0 where steps are given."""
        if float(self.get("warmup_steps", 0.0)) >= 1:
            return 0.0
        return self._fraction("warmup_steps") or float(self.get("warmup_ratio", 0.0))

    def _fraction(self, name: str) -> float:
        """An argument that is a part of all steps where it is below 1, else 0."""
        value = float(self.get(name, 0.0))
        return value if 0 < value < 1 else 0.0

    # ----- what is left out

    def _left_out(self) -> None:
        """A sentence for every setting that changes the training and is not followed."""
        self.remarks += self._unlike(_NOT_FOLLOWED)
        if self.get("disable_dropout", True) is False:
            self.remarks.append("disable_dropout=False: dropout stays on in training, not here.")

    def _unlike(self, table: Iterable[_Unlike]) -> list[str]:
        """A sentence for each of a table's settings that matters here."""
        sentences = []
        for name, test, text in table:
            value = self.get(name)
            if value is not None and test(value):
                shown = f"{value:g}" if isinstance(value, float) else value
                sentences.append(f"{name}={shown}: {text}")
        return sentences


def _state_of(trainer: object) -> object:
    """The trainer's optimizer if it has made a step; None otherwise."""
    optimizer = getattr(trainer, "optimizer", None)
    return optimizer if getattr(optimizer, "state", None) else None


def _package(function: object) -> str:
    return str(getattr(function, "__module__", "")).split(".")[0]


def _trainer_remarks(trainer: object, reading: _Reading) -> list[str]:
    """What a trainer has of its own that lddyn cannot see into, in sentences."""
    remarks = []
    own = getattr(type(trainer), "compute_loss", None)
    if own is not None and _package(own) not in ("trl", "transformers"):
        remarks.append(
            f"compute_loss is {type(trainer).__name__}'s own: the loss here is that of the "
            f"{reading.kind.upper()} settings; write another one as an lddyn.Objective."
        )
    function = getattr(trainer, "compute_loss_func", None)
    if function is not None and _package(function) != "trl":
        remarks.append(
            "compute_loss_func is a function of your own: the loss here is the usual one; write "
            "it as an lddyn.Objective."
        )
    made = int(getattr(getattr(trainer, "state", None), "global_step", 0) or 0)
    if made and reading.get("precompute_ref_log_probs", False) and reading.ref_model is None:
        remarks.append(
            f"The trainer computed log π_ref before its first of {made} steps and kept no "
            "reference model: unless an adapter can be switched off, give reference=… the columns "
            "ref_chosen_logps and ref_rejected_logps of its train_dataset."
        )
    return remarks


_CPO = {
    "cpo": ("beta", "label_smoothing", "alpha", "cpo_alpha"),
    "cpo_hinge": ("beta", "alpha", "cpo_alpha"),
    "cpo_ipo": ("beta", "alpha", "cpo_alpha"),
    "simpo": ("beta", "simpo_gamma", "label_smoothing", "alpha", "cpo_alpha"),
}


def _number(value: Any) -> Any:
    """A number that YAML read as text, such as 1e-7."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _yes(value: Any) -> bool:
    return bool(value)


# (argument, when it matters, what of it is not followed)
_Unlike: TypeAlias = tuple[str, Callable[[Any], bool], str]

_NOT_FOLLOWED: tuple[_Unlike, ...] = (
    (
        "label_smoothing_factor",
        _yes,
        "smoothing reads the whole distribution; the step here is that of the plain loss.",
    ),
    ("delta", _yes, "the two-sided clip of ratios is left out."),
    (
        "top_entropy_quantile",
        lambda part: float(part) < 1,
        "training reads the tokens of highest entropy alone; here all tokens count.",
    ),
    (
        "mask_truncated_completions",
        _yes,
        "completions without an end are left out in training: leave them out of the rows.",
    ),
    (
        "num_iterations",
        lambda count: int(count) > 1,
        "training makes several steps on the same completions; ratios here are those of the first.",
    ),
    ("use_weighting", _yes, "WPO's weights of pairs are not followed; here every pair has 1."),
    ("neftune_noise_alpha", _yes, "noise on embeddings is left out."),
    ("packing", _yes, "rows are packed into one sequence in training; here each is read alone."),
    (
        "sync_ref_model",
        _yes,
        "the reference follows the policy in training; here it stays as it is at this moment.",
    ),
    (
        "train_sampling_strategy",
        lambda name: name in ("group_by_length", "batch_rebalance"),
        "rows of like lengths share a batch in training; a predicted run shuffles them.",
    ),
    (
        "group_by_length",
        _yes,
        "rows of like lengths share a batch in training; a predicted run shuffles them.",
    ),
    ("optim_args", _yes, "further arguments of the optimizer are not followed."),
    ("optim_target_modules", _yes, "the optimizer's choice of modules is not followed."),
    ("chat_template_path", _yes, "give a tokenizer with this chat template."),
    ("bf16", _yes, "training computes in bfloat16; here in the weights' own number type."),
    ("fp16", _yes, "training computes in float16; here in the weights' own number type."),
)

_RISES = "the learning rate rises from 0 at the first step; here it is the highest one."

_NOT_FOLLOWED_BY_A_STEP: tuple[_Unlike, ...] = (
    ("warmup_steps", lambda steps: steps > 0, _RISES),
    ("warmup_ratio", lambda part: part > 0, _RISES),
)


def router_remark(config: object, settings: TrainerSettings | None = None) -> str | None:
    """A sentence where training adds a router's auxiliary loss, which lddyn leaves out.

    Args:
        config: The model's config.
        settings: Settings of the run. None: the loss is there where the config asks for router
            logits.
    """
    text = getattr(config, "get_text_config", lambda: config)()
    own = float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0)
    given = None if settings is None else settings.router_aux_loss_coef
    weight = own if given is None else given
    asked = bool(getattr(text, "output_router_logits", False))
    if settings is not None and not settings.old and settings.trainer != "other":
        asked = hasattr(text, "output_router_logits")  # TRL turns router logits on by itself
    if not asked or not weight:
        return None
    return (
        f"Left out: the auxiliary loss of the routers, router_aux_loss_coef = {weight:g} times the "
        "load balancing, which training adds to the loss."
    )
