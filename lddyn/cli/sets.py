"""`lddyn diagnose | filter`: what a preference set does to its own responses, and a better set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lddyn.cli.command import OUTPUT, Answer
from lddyn.cli.console import say_progress, warn
from lddyn.cli.options import (
    COMPUTATION,
    STEP,
    Beta,
    DataOptions,
    Memory,
    ModelOptions,
    ObjectiveName,
    Out,
    Reference,
    RequiredOut,
    Seed,
)
from lddyn.cli.pairs import PairSet, encode_observed, encode_pairs, warn_of_skipped
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.audit import Audit
    from lddyn.data.example import Example
    from lddyn.data.read import PlacedRow
    from lddyn.objectives.loss import Loss
    from lddyn.objectives.losses import Value
    from lddyn.sets.diagnosis import Diagnosis
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

    refresh: Annotated[
        int,
        typer.Option(
            min=1,
            help="Segments of the run: gradients are taken anew at the start of each.",
            rich_help_panel=RUN,
        ),
    ] = 2

    def make(self, seed: int, settings: TrainerSettings | None) -> Run | None:
        """The run. None: no forecast is wanted."""
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


def diagnose(
    model: ModelOptions,
    rows: DataOptions,
    loss: LossOptions,
    run: RunOptions,
    page: PageOptions,
    validate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Take this many real steps of SGD on a copy of the model, and print each score's "
            "rank correlation with the measured changes.",
            rich_help_panel=DIAGNOSIS,
        ),
    ] = 0,
    observe: Annotated[
        Path | None,
        typer.Option(
            "--observe-data",
            help="A data file of other responses, which are not trained on: what the pairs do to "
            "them, and which pairs do it.",
            exists=True,
            show_default=False,
            rich_help_panel=DIAGNOSIS,
        ),
    ] = None,
    close_ups: Annotated[
        int,
        typer.Option(
            min=0,
            help="Compute the effect of each token in this many of the most harmful pairs.",
            rich_help_panel=DIAGNOSIS,
        ),
    ] = 4,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="2x",
            help="Most epochs of the explained training that the diagnosis may take: close-ups and "
            "segments of the run are left out until it fits.",
            show_default=False,
            rich_help_panel=COMPUTATION,
        ),
    ] = None,
    sketch_size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Estimate inner products of gradients from sketches of this many numbers, also "
            "where gradients fit into --memory. Default: exact where they fit, else 16384.",
            show_default=False,
            rich_help_panel=COMPUTATION,
        ),
    ] = None,
    memory: Memory = "auto",
    seed: Seed = 0,
) -> Answer:
    """Why the chosen log-probs of a preference set fall: which pairs do it, under which loss.

    --out FOLDER gets the page index.html and its tables; `lddyn filter FOLDER` then leaves out the
    worst pairs.
    """
    page.check()
    import lddyn
    from lddyn.sets.plan import parse_budget

    settings = rows.settings
    planned = run.make(seed, settings)
    objective = loss.make(settings)  # errors in it are raised before the work
    epochs = parse_budget(budget)
    content = rows.read()
    tokenizer, lm = model.load_tokenizer(), model.load()
    given = encode_pairs(tokenizer, lm.config, content, rows.encoding)
    warn_of_skipped(given, rows.data, content)
    others = observe and encode_observed(tokenizer, lm.config, observe, rows.encoding)
    sequences = 2 * len(given.pairs) + len(others or {})
    sketch = _sketch(lm, sequences, planned is not None, memory, sketch_size, seed)
    moved = _log_probs_after(page.after, model, given.pairs)
    extra = _extra(model, rows, loss, page, given)

    def write(diagnosis: Diagnosis, whole: nn.Module | None = None) -> Path | None:
        """The page: as far as it is known, which an interrupt leaves, or the whole one."""
        if page.out is None:
            return None
        say_progress("writing the page …" if whole is not None else "writing the page so far …")
        return _write_page(diagnosis, page, (whole, tokenizer), moved, extra, rows.data)

    diagnosis = lddyn.diagnose(
        lm,
        given.pairs,
        objective,
        observe=others,
        like=settings,
        reference=loss.load_reference(model, settings, _rows(content, given.rows)),
        memory=memory,
        sketch=sketch,
        run=planned,
        refresh=run.refresh,
        close_ups=close_ups,
        validate=validate,
        budget=epochs,
        row_numbers=given.rows,
        faults=given.faults,
        so_far=write,
        progress=True,
    )
    document = diagnosis.to_dict() | {"audit": given.audit.to_dict()}
    written = write(diagnosis, lm)
    return Answer(document, _explain(document, diagnosis, given.audit, close_ups, written))


def filter(
    folder: Annotated[
        Path,
        typer.Argument(
            help="What `diagnose --out` wrote.", exists=True, file_okay=False, show_default=False
        ),
    ],
    out: RequiredOut,
    drop: Annotated[
        int, typer.Option(min=0, help="Leave out this many of the most harmful pairs.")
    ] = 0,
    reweight: Annotated[
        bool,
        typer.Option(
            "--reweight",
            help="Add a column `weight` to every row: how much its loss should count.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The diagnosed data file, if it is not where it was.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
) -> Answer:
    """Leave the most harmful pairs out of a data file, or weight its rows; needs no model.

    --out FOLDER gets kept.jsonl (rows to train on, in their order) and dropped.jsonl. Rows that
    were not diagnosed are kept.
    """
    from lddyn.data.read import placed_rows
    from lddyn.errors import ExampleError
    from lddyn.files import read_sealed
    from lddyn.sets.filter import check_source, filter_rows

    if not drop and not reweight:
        raise ValueError("give --drop N, --reweight, or both: what is to change?")
    file = check_source(folder, data)
    if (out / "kept.jsonl").resolve() == file.resolve():
        raise ValueError(f"{out}: kept.jsonl there is the data file itself; give another --out")
    diagnosis = read_sealed(folder / "diagnosis.json")
    rows = [None if isinstance(row, ExampleError) else row for _, row in placed_rows(file)]
    filtered = filter_rows(rows, diagnosis, drop=drop, reweight=reweight)
    if filtered.helpful:
        warn(f"only {drop - filtered.helpful} of the {drop} dropped pairs lower chosen responses")
    if reweight:
        warn(
            "TRL's trainers do not read the column weight: they train on a row of weight 0 as on "
            "any other; lddyn.integrations.trl.weighted(trainer) makes a DPOTrainer read it"
        )
    filtered.write(out)
    document = {
        "data": str(file),
        "kept": filtered.kept_rows,
        "dropped": filtered.dropped_rows,
        "weights": [row["weight"] for row in filtered.kept] if reweight else None,
        "file": str(out / "kept.jsonl"),
    }
    line = f"{document['file']}: {len(filtered.kept)} rows kept, {len(filtered.dropped)} dropped"
    named = ", ".join(map(str, filtered.dropped_rows))
    return Answer(document, [line + (f" (rows {named})" if named else "")])


def _rows(content: Sequence[PlacedRow], numbers: Sequence[int]) -> list[Mapping[str, Any]]:
    """The content of some rows."""
    rows = [content[number].row for number in numbers]
    return [row for row in rows if isinstance(row, dict)]


def _sketch(
    model: nn.Module, sequences: int, run: bool, memory: str, k: int | None, seed: int
) -> Sketch | None:
    """The sketch from which inner products are estimated. None: all gradients fit."""
    from lddyn.memory import in_gib, parse_memory
    from lddyn.sets.preparation import NUMBERS
    from lddyn.sets.rows import exact_bytes
    from lddyn.sketches.sketch import Sketch

    if k is not None:
        return Sketch(k=k, seed=seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = exact_bytes(sequences, trainable, 4, run)
    if size <= parse_memory(memory):
        return None
    warn(
        f"the gradients of {sequences} responses take {in_gib(size)}, more than --memory {memory}: "
        f"inner products are estimated from sketches of {NUMBERS:,} numbers, with standard errors; "
        "more --memory, an adapter or --limit makes them exact"
    )
    return Sketch(k=NUMBERS, seed=seed)


def _log_probs_after(
    after: str | None, model: ModelOptions, pairs: Sequence[tuple[Example, Example]]
) -> Tensor | None:
    """Log π of the chosen responses under a later checkpoint (N,), nats. None: there is none."""
    if after is None:
        return None
    from lddyn.probes.measure import measure

    return measure(model.load_other(after), [chosen for chosen, _ in pairs]).log_prob.cpu()


def _extra(
    model: ModelOptions, rows: DataOptions, loss: LossOptions, page: PageOptions, given: PairSet
) -> JsonObject:
    """Facts for the page's last table."""
    extra: JsonObject = {"model": model.model, "data": str(rows.data)}
    extra["rows left out"] = len(given.skipped)
    extra |= {} if loss.reference in (None, "self") else {"reference": loss.reference}
    return extra | ({} if page.after is None else {"after": page.after})


def _write_page(
    diagnosis: Diagnosis,
    page: PageOptions,
    loaded: tuple[nn.Module | None, PreTrainedTokenizerBase],
    moved: Tensor | None,
    extra: Mapping[str, Any],
    data: Path,
) -> Path:
    from lddyn.sets.filter import write_source

    assert page.out is not None
    write_source(page.out, data)
    return diagnosis.report(
        page.out / "index.html",
        *loaded,
        watched=page.watched,
        measured=None if moved is None else moved - diagnosis.log_probs[0],
        extra=extra,
    )


def _explain(
    document: Mapping[str, Any],
    diagnosis: Diagnosis,
    audit: Audit,
    close_ups: int,
    page: Path | None,
) -> Iterator[str | Table]:
    """The audit, the diagnosis in sentences, and its tables."""
    yield str(audit)
    yield from document["explanation"]
    yield _actions(document)
    yield _tokens(document, diagnosis.worst(close_ups))
    if document["observed"]:
        yield _observed(document)
    yield _objectives(document)
    if diagnosis.validation is not None:
        yield from _validation(diagnosis.validation)
    if page is not None:
        yield f"page: {page} (open it in a browser; its tables are beside it)"


def _actions(document: Mapping[str, Any], count: int = 10) -> Table:
    """The pairs to act on first."""
    from rich.table import Table

    table = Table("row", "do", "weight", "contribution", "own chosen", "log π(y+)", "log π(y−)", "")
    for action in document["actions"][:count]:
        row = document["pairs"][action["pair"]]
        values = (row[k] for k in ("own_chosen", "log_prob_chosen", "log_prob_rejected"))
        table.add_row(
            str(row["row"]),
            action["action"],
            f"{action['weight']:.2f}",
            f"{action['contribution']:+.3g}",
            *(f"{v:+.3g}" for v in values),
            action["why"] if action["action"] == "fix" else row["outcome"],
        )
    return table


def _tokens(document: Mapping[str, Any], pairs: Sequence[int]) -> Table:
    """The three most harmful tokens of each of the worst pairs."""
    from rich.table import Table

    table = Table("row", "of", "token", "contribution", "own chosen", "NTHR", "log π")
    for entry in [e for e in document["tokens"] if e["pair"] in pairs]:
        order = sorted(entry["tokens"], key=lambda token: float(token["contribution"]))
        for token in order[:3]:
            values = (token[k] for k in ("contribution", "own_chosen", "nthr", "log_prob"))
            table.add_row(
                str(entry["row"]),
                "y+" if token["response"] == "chosen" else "y−",
                repr(token["text"]),
                *(f"{v:+.3g}" for v in values),
            )
    return table


def _observed(document: Mapping[str, Any], count: int = 10) -> Table:
    """The observed responses, those that fall most first."""
    from rich.table import Table

    run, unit = document["run"] is not None, document["summary"]["unit_lr"]
    ahead = ("run: Δ log π",) if run else ()
    table = Table("observed", "log π", "unit step: Δ log π", *ahead, "lowered most by", "raised by")
    of = "run_change" if run else "set_change"
    for row in sorted(document["observed"], key=lambda row: float(row[of]))[:count]:
        error = f" ± {row['stderr'] * unit:.2g}" if row["stderr"] else ""
        cells = [f"{row['log_prob']:+.3g}", f"{row['set_change'] * unit:+.3g}{error}"]
        if run:
            cells.append(f"{row['run_change']:+.3g}")
        for side in ("lowered_by", "raised_by"):
            named = [document["pairs"][pair]["row"] for pair, _ in row[side][:3]]
            cells.append(", ".join(f"row {number}" for number in named))
        table.add_row(row["name"], *cells)
    return table


def _objectives(document: Mapping[str, Any]) -> Table:
    """What a step of each loss would do, and a run of it where one was predicted."""
    from rich.table import Table

    run = document["run"] is not None
    ahead = ("linear run: y+", "linear run: y−", "y+ falls") if run else ()
    table = Table("loss", "y+ per ‖Δθ‖", "y− per ‖Δθ‖", "y+ falls", *ahead)
    for row in document["objectives"]:
        cells = [f"{row[k]:+.3g}" for k in ("chosen", "rejected")]
        cells.append(f"{row['chosen_falls']:.0%}")
        if run:
            cells += [f"{row[k]:+.3g}" for k in ("run_chosen", "run_rejected")]
            cells.append(f"{row['run_chosen_falls']:.0%}")
        table.add_row(row["objective"], *cells)
    return table


def _validation(measured: Mapping[str, Any]) -> Iterator[str | Table]:
    """How every score compares with what real steps did."""
    from rich.table import Table

    errors = [f"{measured[k]['error']:.1%}" for k in ("own", "others")]
    yield (
        f"{measured['steps']} real steps on {measured['batch']} pairs each, "
        f"lr {measured['lr']:.3g}: predicted and measured Δ log π(y+) differ by {errors[0]} for "
        f"the pairs of the batch and {errors[1]} for the others. Rank correlations of the scores "
        "with the measured changes, and 95 % intervals:"
    )
    table = Table("score", "own batch", "", "other batches", "")
    varied = [row for row in measured["scores"] if row["own"]["low"] < row["own"]["high"]]
    for row in sorted(varied, key=lambda row: -abs(row["own"]["rho"])):
        cells = []
        for name in ("own", "others"):
            x = row[name]
            cells += [f"{x['rho']:+.2f}", f"{x['low']:+.2f} to {x['high']:+.2f}"]
        table.add_row(row["score"], *cells)
    yield table
