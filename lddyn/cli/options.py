"""Options that several commands share: each is declared once and means one thing everywhere.

A dataclass here is a group of options. A command that has it as a parameter gets all its fields as
options (`lddyn.cli.command`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lddyn.cli.command import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lddyn.data.example import Example
    from lddyn.data.options import RowOptions
    from lddyn.data.read import PlacedRow
    from lddyn.objectives.objective import Objective

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

Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", rich_help_panel=COMPUTATION)]

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
        from lddyn.loading import check_device, load_model

        check_device(self.device)
        return load_model(
            name,
            dtype=self.dtype,
            device=self.device,
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
        Literal["keep_start", "keep_end"],
        typer.Option(
            help="Which tokens --max-length keeps: the first ones or the last ones.",
            rich_help_panel=DATA,
        ),
    ] = "keep_start"
    counted: Annotated[
        Literal["assistant", "all"],
        typer.Option(
            help="Tokens of a conversation that are in the loss: those of the assistant, or all of "
            "them, as TRL's SFTTrainer counts by default.",
            rich_help_panel=DATA,
        ),
    ] = "assistant"

    @property
    def encoding(self) -> RowOptions:
        """How rows become token sequences, as the library takes it."""
        from lddyn.data.options import RowOptions

        return RowOptions(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation_mode=self.truncation_mode,
            assistant_only=self.counted == "assistant",
        )


@dataclass(frozen=True, kw_only=True)
class OneRowOptions(FileOptions):
    """One row of a data file."""

    row: Annotated[
        int, typer.Option(min=0, help="Which row of the data, from 0.", rich_help_panel=DATA)
    ] = 0


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

        return list(itertools.islice(placed_rows(self.data), self.limit))


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
    str,
    typer.Option(
        metavar="PATH|self|adapter-off|adapter:NAME|rows",
        help="Reference model π_ref of the objective: a folder or hub name; self: the model "
        "before the step; adapter-off: the model without its adapter; adapter:NAME: with that "
        "adapter alone; rows: log-probs in the data's columns ref_chosen_logps and "
        "ref_rejected_logps.",
        rich_help_panel=STEP,
    ),
]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """One finetuning step on one row of a data file."""

    objective: Annotated[
        ObjectiveName,
        typer.Option(help="Loss of the step; sft: mean over tokens.", rich_help_panel=STEP),
    ] = "sft"
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
    lr: Annotated[float, typer.Option(help="Learning rate η.", rich_help_panel=STEP)] = 1e-4
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw", "rmsprop"],
        typer.Option(help="Optimizer of the step, in its initial state.", rich_help_panel=STEP),
    ] = "sgd"
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            help="Clip the gradient to this norm first, as trainers do.",
            show_default=False,
            rich_help_panel=STEP,
        ),
    ] = None
    beta: Beta = None
    reference: Reference = "self"

    def responses(self, row: Mapping[str, Any]) -> int:
        """How many responses of a row the objective learns from."""
        single = self.objective == "sft" or (self.objective == "kto" and "label" in row)
        return 1 if single else 2

    def make(
        self, examples: Sequence[Example], model: ModelOptions, row: Mapping[str, Any]
    ) -> Objective:
        """The objective on the examples that the step learns from, of this row."""
        from lddyn.objectives.loss import Loss
        from lddyn.objectives.objective import SFT
        from lddyn.objectives.paired import preference

        desirable = row.get("label")
        if self.objective == "sft":
            if desirable is False:
                raise ValueError(
                    "the row's label is false: its completion is not wanted, and an SFT step would "
                    "raise it; --objective kto lowers it, as KTO training does"
                )
            return SFT(examples[0])
        if self.objective == "kto" and desirable is not None:
            from lddyn.objectives.unpaired import KTO

            beta = 0.1 if self.beta is None else self.beta
            reference = model.load_reference(self.reference)
            return KTO(examples[0], bool(desirable), beta=beta, reference=reference)
        reference = model.load_reference(self.reference, [row])
        loss = Loss(self.objective, None, **({} if self.beta is None else {"beta": self.beta}))
        return preference(loss, examples[0], examples[1], reference=reference)


def split(text: str | None) -> list[str]:
    """The names between commas, each once."""
    return list(dict.fromkeys(f.strip() for f in (text or "").split(",") if f.strip()))
