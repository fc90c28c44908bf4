"""Options of `lddyn diagnose`: the loss, the run, the page, and how the work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lddyn.cli.command import OUTPUT
from lddyn.cli.console import warn
from lddyn.cli.options import STEP, Beta, ModelOptions, ObjectiveName, Out, Reference
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from torch import nn

    from lddyn.objectives.loss import Loss
    from lddyn.objectives.losses import Value
    from lddyn.sets.run import Run
    from lddyn.settings import TrainerSettings
    from lddyn.sketches.sketch import Sketch

RUN, DIAGNOSIS = "Forecast of a training run", "Diagnosis"


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The loss of a preference set."""

    objective: Annotated[
        ObjectiveName | None,
        typer.Option(
            help="Loss of the training. Default: dpo.", show_default=False, rich_help_panel=STEP
        ),
    ] = None
    beta: Beta = None
    reference: Reference = None

    def load_reference(
        self,
        model: ModelOptions,
        settings: TrainerSettings | None,
        rows: Sequence[Mapping[str, Any]],
    ) -> Any:
        """The reference, by --reference; None: that of --like."""
        if self.reference is None and settings is not None:
            return None
        return model.load_reference(self.reference or "self", rows)

    def make(self, settings: TrainerSettings | None) -> Loss:
        """The loss, by --objective and --beta or by --like."""
        from lddyn.objectives.like import loss_like
        from lddyn.objectives.loss import Loss

        base: Loss | str = self.objective or "dpo"
        if self.objective is None and settings is not None:
            base = loss_like(settings)
        given: dict[str, Value] = {} if self.beta is None else {"beta": self.beta}
        return Loss(base, None, **given)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A training run that is predicted, not made."""

    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast",
            help="Predict a whole run of AdamW, without training; needs --lr.",
            rich_help_panel=RUN,
        ),
    ] = False
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate η of the run.", show_default=False, rich_help_panel=RUN),
    ] = None
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs of the run. Default: 1.", show_default=False, rich_help_panel=RUN
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs in a batch of the run. Default: 8.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None
    schedule: Annotated[
        Literal["constant", "linear", "cosine"] | None,
        typer.Option(
            help="Learning rate over the run: constant (default), or falling to 0.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None

    resume: Annotated[
        Path | None,
        typer.Option(
            help="Predict the rest of the run from this checkpoint of transformers' Trainer on, "
            "whose weights are --model: steps that are made, and the optimizer's moments.",
            exists=True,
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None

    refresh: Annotated[
        int,
        typer.Option(
            min=1,
            help="Segments of the run: gradients are taken anew at the start of each.",
            rich_help_panel=RUN,
        ),
    ] = 2

    def make(self, settings: TrainerSettings | None, seed: int) -> Run | None:
        """The run. None: no forecast is wanted."""
        run = self._whole(settings, seed)
        if self.resume is None:
            return run
        if run is None:
            raise ValueError("--resume is of a run that --forecast predicts: give --forecast, too")
        return run.resumed(self.resume)

    def _whole(self, settings: TrainerSettings | None, seed: int) -> Run | None:
        """The run from its first step on."""
        from dataclasses import replace

        from lddyn.sets.run import Run

        given = {"epochs": self.epochs, "batch": self.batch, "schedule": self.schedule}
        chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if self.forecast and settings is not None:
            chosen |= {} if self.lr is None else {"lr": self.lr}
            return replace(Run.like(settings), **chosen)
        if self.forecast and self.lr is None:
            raise ValueError("--forecast needs --lr, the learning rate of the run")
        if self.lr is not None and not self.forecast:
            raise ValueError(
                f"--lr {self.lr:g} is the learning rate of a run that --forecast predicts: give "
                "--forecast, too"
            )
        if self.lr is None:
            return None
        return Run(self.lr, seed=seed, **chosen)


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What the page shows beside the diagnosis."""

    watched: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a watched run: its curves are shown on the page.",
            exists=True,
            file_okay=False,
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    after: Annotated[
        str | None,
        typer.Option(
            help="A later checkpoint: the page compares the diagnosis with how log-probs changed "
            "up to that checkpoint.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    out: Out = None

    def check(self) -> None:
        """Says what cannot be written or read before the work begins."""
        if self.out is None and (self.watched is not None or self.after is not None):
            raise ValueError("--watched and --after are for the page: give --out FOLDER, too")
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            if not os.access(self.out, os.W_OK):
                raise ValueError(f"{self.out}: no right to write there")
        if self.watched is not None:
            from lddyn.report import read_dynamics

            read_dynamics(self.watched)


@dataclass(frozen=True)
class Work:
    """How a diagnosis is computed.

    Attributes:
        run: The run that is predicted; None: none is.
        refresh, memory, sketch_size, seed, budget, store: The options of these names.
    """

    run: Run | None
    refresh: int
    memory: str
    sketch_size: int | None
    seed: int
    budget: str | None
    store: Path | None

    def options(self, model: nn.Module, sequences: int) -> JsonObject:
        """The arguments of `lddyn.diagnose` that these are."""
        from lddyn.sets.plan import parse_budget

        return {
            "memory": self.memory,
            "sketch": _sketch(model, sequences, self),
            "run": self.run,
            "refresh": self.refresh,
            "budget": parse_budget(self.budget),
            "store": self.store,
            "progress": True,
        }


def _sketch(model: nn.Module, sequences: int, work: Work) -> Sketch | None:
    """The sketch from which inner products are estimated. None: all gradients fit."""
    from lddyn.memory import in_gib, parse_memory
    from lddyn.sets.preparation import NUMBERS
    from lddyn.sets.rows import exact_bytes
    from lddyn.sketches.sketch import Sketch

    memory, seed = work.memory, work.seed
    if work.sketch_size is not None:
        return Sketch(k=work.sketch_size, seed=seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = exact_bytes(sequences, trainable, 4, work.run is not None)
    if work.store is not None:
        return Sketch(k=NUMBERS, seed=seed)
    if size <= parse_memory(memory):
        return None
    warn(
        f"the gradients of {sequences} responses take {in_gib(size)}, more than --memory {memory}: "
        f"inner products are estimated from sketches of {NUMBERS:,} numbers, with standard errors; "
        "more --memory, an adapter or --limit makes them exact"
    )
    return Sketch(k=NUMBERS, seed=seed)
