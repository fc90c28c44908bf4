"""Options that several commands share: each is declared once and means one thing everywhere.

A dataclass here is a group of options. A command that has it as a parameter gets all its fields as
options (`lddyn.cli.command`).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lddyn.cli.command import OUTPUT
from lddyn.data.columns import feedback_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lddyn.data.example import Example
    from lddyn.data.options import RowOptions
    from lddyn.data.read import PlacedRow
    from lddyn.objectives.like import Update
    from lddyn.objectives.losses import Value
    from lddyn.settings import TrainerSettings

MODEL, DATA, STEP, SKETCH, COMPUTATION = "Model", "Data", "Step", "Sketch", "Computation"

FloatType = Literal["float32", "bfloat16", "float16", "float64"]

# The names of `LOSSES` and `ALIASES` in lddyn.objectives, which imports torch; --help must not.
ObjectiveName = Literal[
    "sft",
    "unlikelihood",
    "dpo",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "kto",
    "cpo",
    "cpo_hinge",
    "cpo_ipo",
    "simpo",
    "orpo",
    "slic",
    "dpop",
    "dpo+nll",
    "cal-dpo",
    "sigmoid",
]

Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for everything that the command writes.",
        file_okay=False,
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]

RequiredOut = Annotated[
    Path,
    typer.Option(
        help="Folder for everything that the command writes.",
        file_okay=False,
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel=MODEL,
    ),
]

Memory = Annotated[
    str,
    typer.Option(
        help="Memory for intermediate results beyond the model, such as 2GiB. auto: 4GiB, or a "
        "third of the free memory of a GPU.",
        rich_help_panel=COMPUTATION,
    ),
]

Attention = Annotated[
    Literal["lddyn", "eager"],
    typer.Option(
        help="Attention of the analysed model: lddyn's own, or transformers' eager.",
        rich_help_panel=COMPUTATION,
    ),
]

By = Annotated[
    Literal["token", "sequence"],
    typer.Option(
        help="Compare single response tokens, or whole responses (sums over tokens).",
        rich_help_panel=COMPUTATION,
    ),
]

Seed = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="Seed of all random numbers.", rich_help_panel=COMPUTATION
    ),
]

SketchKind = Literal["twosided", "lowrank", "sjlt", "rademacher", "gaussian", "tensorsketch"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that a command reads, and how it is loaded."""

    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub name of a causal LM.", show_default=False, rich_help_panel=MODEL
        ),
    ]
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a peft adapter; then a step moves the adapter alone.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    dtype: Annotated[
        FloatType, typer.Option(help="Number type of the parameters.", rich_help_panel=MODEL)
    ] = "float32"
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Where the model runs: cpu, cuda, cuda:1, …",
            rich_help_panel=MODEL,
        ),
    ] = "cpu"
    trust_remote_code: TrustRemoteCode = False

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from lddyn.loading import load_tokenizer

        return load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)

    def load(self) -> PreTrainedModel | nn.Module:
        """The model, with its adapter."""
        return self.load_other(self.model, self.adapter)

    def load_other(self, name: str, adapter: str | None = None) -> PreTrainedModel | nn.Module:
        """Another model in the same number type and on the same device."""
        from lddyn.loading import load_model, usable_device

        return load_model(
            name,
            dtype=self.dtype,
            device=usable_device(self.device),
            adapter=adapter,
            trust_remote_code=self.trust_remote_code,
        )

    def load_reference(
        self, reference: str, rows: Sequence[Mapping[str, Any]] = ()
    ) -> PreTrainedModel | nn.Module | str | Tensor:
        """The option --reference as the library takes it: a model, a word, or log-probs.

        Args:
            reference: The option.
            rows: The rows of the pairs, which may hold log-probs of a reference.
        """
        from lddyn.cli.reference import warn_of_unread_log_probs
        from lddyn.engine.reference_policy import row_log_probs

        if reference == "rows":
            return row_log_probs(rows)
        warn_of_unread_log_probs(rows)
        words = reference in ("self", "adapter-off") or reference.startswith("adapter:")
        return reference if words else self.load_other(reference)


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """A data file, and how its rows become token sequences."""

    data: Annotated[
        Path,
        typer.Option(
            help="Data: a JSONL, JSON, CSV, TSV or Parquet file (also .gz), a folder of them or of "
            "save_to_disk, or a glob; in any format of TRL or LLaMA-Factory, or `prompt` and one "
            "column per response.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ]
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Cut sequences to this many tokens, as trainers do.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    max_prompt_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut prompts to this many tokens, from their beginning, before --max-length.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    truncation_mode: Annotated[
        Literal["keep_start", "keep_end"] | None,
        typer.Option(
            help="Which tokens --max-length keeps: the first ones (default) or the last ones.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    counted: Annotated[
        Literal["assistant", "all"] | None,
        typer.Option(
            help="Tokens of a conversation that are in the loss: those of the assistant (default), "
            "or all of them, as TRL's SFTTrainer counts by default.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON file of a trainer's arguments (TRL's SFTConfig, DPOConfig, …). What "
            "no other option says is as in that training; `trainer: dpo` in it says which trainer.",
            exists=True,
            dir_okay=False,
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None

    @cached_property
    def settings(self) -> TrainerSettings | None:
        """What --like says. None: there is no such file."""
        from lddyn.settings import TrainerSettings

        return None if self.like is None else TrainerSettings.of(self.like)

    @property
    def encoding(self) -> RowOptions:
        """How rows become token sequences, as the library takes it."""
        from lddyn.data.options import DEFAULT, RowOptions

        settings = self.settings
        base = DEFAULT if settings is None else RowOptions.like(settings)
        counted = None if self.counted is None else self.counted == "assistant"
        given: dict[str, Any] = {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "truncation_mode": self.truncation_mode,
            "assistant_only": counted,
        }
        return replace(base, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class OneRowOptions(FileOptions):
    """One row of a data file."""

    row: Annotated[
        int, typer.Option(min=0, help="Which row of the data, from 0.", rich_help_panel=DATA)
    ] = 0

    @property
    def place(self) -> str:
        """The file and the row, as errors name them."""
        return f"{self.data}: row {self.row}"


@dataclass(frozen=True, kw_only=True)
class DataOptions(FileOptions):
    """The rows of a data file."""

    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read only this many rows, from the first.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None

    def read(self) -> list[PlacedRow]:
        """The rows with their places; one that cannot be read is an error in its place."""
        from lddyn.data.read import placed_rows

        most = None if self.limit is None else min(self.limit, sys.maxsize)
        return list(itertools.islice(placed_rows(self.data), most))


@dataclass(frozen=True, kw_only=True)
class ResponseOptions(DataOptions):
    """Some responses of every row of a data file."""

    fields: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD,FIELD,…|all",
            help="Fields (columns with a response) to read. Default: those of the data format.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at the first response that is too long or cannot be encoded. Default: leave "
            "it out, and say so.",
            rich_help_panel=DATA,
        ),
    ] = False

    @property
    def names(self) -> list[str] | Literal["all"] | None:
        """The fields. None: those of the data format."""
        return "all" if self.fields == "all" else split(self.fields) or None


Beta = Annotated[
    float | None,
    typer.Option(
        help="β of the objective. Default: the objective's own (0.1 for dpo).",
        show_default=False,
        rich_help_panel=STEP,
    ),
]

Reference = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|self|adapter-off|adapter:NAME|rows",
        help="Reference model π_ref of the objective: a folder or hub name; self (default): the "
        "model before the step; adapter-off: the model without its adapter; adapter:NAME: with "
        "that adapter alone; rows: log-probs in the data's columns ref_chosen_logps and "
        "ref_rejected_logps.",
        show_default=False,
        rich_help_panel=STEP,
    ),
]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """One finetuning step on one row of a data file."""

    objective: Annotated[
        ObjectiveName | None,
        typer.Option(
            help="Loss of the step. Default: sft, the mean over tokens.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None
    update: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD[,FIELD]",
            help="Fields (columns with a response) that the step learns from: one for sft, chosen "
            "and rejected for the other losses. Default: those of the data format.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None
    observe: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD,FIELD,…",
            help="Fields whose log-probs are watched. Default: those of --update.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate η. Default: 1e-4.", show_default=False, rich_help_panel=STEP
        ),
    ] = None
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw", "rmsprop"] | None,
        typer.Option(
            help="Optimizer of the step, in its initial state. Default: sgd.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            help="Clip the gradient to this norm first, as trainers do; 0: do not clip.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None
    beta: Beta = None
    reference: Reference = None

    def adjusted(self, settings: TrainerSettings | None) -> TrainerSettings | None:
        """What --like says, with the loss of --objective and --beta in its place."""
        if settings is None or (self.objective is None and self.beta is None):
            return settings
        parameters = dict(settings.parameters)
        if self.beta is not None:
            parameters["beta"] = self.beta
        if self.objective is None:
            return replace(settings, parameters=parameters)
        kind = self.objective if self.objective in ("sft", "kto") else "dpo"
        names = ("nll",) if kind == "sft" else (self.objective,)
        return replace(
            settings, trainer=kind, losses=names, loss_weights=(1.0,), parameters=parameters
        )

    def name(self, settings: TrainerSettings | None) -> str:
        """The name of the loss."""
        if settings is None:
            return self.objective or "sft"
        plain = settings.trainer in ("sft", "other")
        return "sft" if plain else " + ".join(settings.losses)

    def rate(self, settings: TrainerSettings | None) -> float | None:
        """The learning rate. None: that of --like."""
        return 1e-4 if self.lr is None and settings is None else self.lr

    def responses(self, row: Mapping[str, Any], settings: TrainerSettings | None) -> int:
        """How many responses of a row the objective learns from."""
        name = self.name(settings)
        unpaired = name in ("kto", "apo_zero_unpaired") and feedback_label(row) is not None
        return 1 if name == "sft" or unpaired else 2

    def make(
        self,
        examples: Sequence[Example],
        model: ModelOptions,
        row: Mapping[str, Any],
        settings: TrainerSettings | None,
    ) -> Update:
        """The objective on the examples that the step learns from, of this row.

        With --like and no --reference the examples alone, of which the library makes it.
        """
        from lddyn.objectives.like import loss_like
        from lddyn.objectives.loss import Loss
        from lddyn.objectives.objective import SFT
        from lddyn.objectives.paired import preference
        from lddyn.objectives.unpaired import KTO

        name, desirable = self.name(settings), feedback_label(row)
        if name == "sft" and desirable is False:
            raise ValueError(
                "the row's label is false: its completion is not wanted, and an SFT step would "
                "raise it; --objective kto lowers it, as KTO training does"
            )
        if name == "sft":
            return SFT(examples[0]) if settings is None else examples[0]
        if settings is not None and self.reference is None:
            if len(examples) == 1:
                return examples[0], bool(desirable)
            return examples[0], examples[1]
        reference = model.load_reference(self.reference or "self", [row])
        if len(examples) == 1:
            beta = 0.1 if self.beta is None else self.beta
            return KTO(examples[0], bool(desirable), beta=beta, reference=reference)
        given: dict[str, Value] = {} if self.beta is None else {"beta": self.beta}
        loss = Loss(name, None, **given) if settings is None else loss_like(settings)
        return preference(loss, examples[0], examples[1], reference=reference)


def split(text: str | None) -> list[str]:
    """The names between commas, each once."""
    return list(dict.fromkeys(f.strip() for f in (text or "").split(",") if f.strip()))
