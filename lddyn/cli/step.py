"""`lddyn decompose | massflow`: what one finetuning step on one row of data does."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lddyn.cli.command import Answer
from lddyn.cli.console import safe, say_progress
from lddyn.cli.options import (
    COMPUTATION,
    STEP,
    Attention,
    Memory,
    ModelOptions,
    OneRowOptions,
    Out,
    Seed,
    StepOptions,
)
from lddyn.cli.rows import (
    audit_lines,
    check_fits,
    choose_columns,
    encode_columns,
    finding_to_dict,
    read_row,
)
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.audit import Audit
    from lddyn.data.example import Example
    from lddyn.steps.decomposition import Decomposition
    from lddyn.steps.massflow import MassFlow
    from lddyn.steps.verification import Verification

Rule = Annotated[
    Literal["start", "midpoint", "simpson"],
    typer.Option(
        help="Where on the step the kernel is taken; the error is of order η², η³, η⁵.",
        rich_help_panel=STEP,
    ),
]

Stream = Annotated[
    str | None,
    typer.Option(
        metavar="MEMORY",
        help="Keep at most this much of the weights in memory (such as 512MiB) and read blocks "
        "from disk as they are used; needs --adapter.",
        show_default=False,
        rich_help_panel=COMPUTATION,
    ),
]


@dataclass(frozen=True)
class Prepared:
    """A model, and the responses of one row that a command concerns.

    Attributes:
        model: In evaluation mode.
        tokenizer: The model's.
        examples: Field → response.
        update: Fields that the step learns from.
        observe: Fields that are watched.
        audit: What is wrong with the row.
        seconds: How long reading, loading and encoding took.
        row: The row itself.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    examples: Mapping[str, Example]
    update: list[str]
    observe: list[str]
    audit: Audit
    seconds: float
    row: Mapping[str, Any]

    @property
    def observed(self) -> dict[str, Example]:
        """The watched responses."""
        return {name: self.examples[name] for name in self.observe}

    @property
    def learned(self) -> list[Example]:
        """The responses that the step learns from."""
        return [self.examples[name] for name in self.update]


def prepare(
    model: ModelOptions,
    rows: OneRowOptions,
    step: StepOptions,
    stream: str | None = None,
) -> Prepared:
    """Reads one row, loads the model and encodes the responses; the cheap checks come first.

    Args:
        model: The model.
        rows: The row.
        step: The step, whose objective says how many responses of the row it learns from.
        stream: Memory for the weights, read block by block. None: all weights are loaded.
    """
    began = time.perf_counter()
    row = read_row(rows)
    settings = step.adjusted(rows.settings)
    count, reader = step.responses(row, settings), f"--objective {step.name(settings)}"
    columns = choose_columns(row, rows.place, step.update, step.observe, count, reader)
    tokenizer = model.load_tokenizer()
    examples, learned, watched = encode_columns(tokenizer, row, rows, columns)
    lm = model.load() if stream is None else _open_stream(model, stream)
    config = getattr(lm, "config", None)
    for name in dict.fromkeys((*learned, *watched)):
        check_fits(examples[name], f"{rows.place}, {name}", config)
    from lddyn.data.audit import audit

    audited = audit(
        tokenizer,
        [row],
        list(columns.named) or None,
        rows.encoding,
        config=config,
    )
    seconds = time.perf_counter() - began
    return Prepared(lm, tokenizer, examples, learned, watched, audited, seconds, row)


def _open_stream(options: ModelOptions, memory: str) -> nn.Module:
    """The model with blocks that are read as they are used, and its adapter."""
    from lddyn.loading import adapter_base, add_adapter, check_folder, usable_device

    base = adapter_base(options.model)
    name, adapter = (options.model, options.adapter) if base is None else (base, options.model)
    if adapter is None:
        raise ValueError(
            "--stream needs --adapter: a step of all weights holds three times the model "
            "(gradient, step, shifted copy), and streaming could not save memory"
        )
    import torch

    import lddyn

    device = usable_device(options.device)
    check_folder("model", name, needs="config.json")
    model = lddyn.stream(
        name,
        memory,
        dtype=getattr(torch, options.dtype),
        device=device,
        trust_remote_code=options.trust_remote_code,
    )
    return add_adapter(model, adapter).to(device).eval()


def decompose(
    model: ModelOptions,
    rows: OneRowOptions,
    step: StepOptions,
    rule: Rule = "start",
    verify: Annotated[
        bool,
        typer.Option(
            help="Check the answer against real optimizer steps on a float64 copy of the model. "
            "With --stream the copy has the number type of --dtype.",
            rich_help_panel=STEP,
        ),
    ] = True,
    memory: Memory = "auto",
    stream: Stream = None,
    attention: Attention = "lddyn",
    seed: Seed = 0,
    out: Out = None,
) -> Answer:
    """What one finetuning step does to every token of some responses, and which token does it.

    --out FOLDER gets the page index.html, the decomposition (to read back in Python), summary.json
    and pictures.
    """
    import torch

    import lddyn
    from lddyn.steps.folder import summarise

    torch.manual_seed(seed)
    settings = step.adjusted(rows.settings)
    given = prepare(model, rows, step, stream)
    seconds = {"load": given.seconds}
    with _timed(seconds, "decompose"), _true_float64(model.dtype):
        dec = lddyn.decompose(
            lddyn.Anatomy(given.model, attention),
            given.observed,
            step.make(given.learned, model, given.row, settings),
            step.rate(settings),
            like=settings,
            optimizer=step.optimizer,
            max_grad_norm=step.max_grad_norm,
            rule=rule,
            memory=memory,
            progress=True,
        )
    checked: Verification | None = None
    with _timed(seconds, "verify"):
        if verify:
            say_progress("checking against real steps …")
            checked = _verified(dec, streamed=stream is not None)
    facts = _facts(model, rows, given, seconds)
    page = None
    if out is not None:
        say_progress("drawing …")
        page = _write_page(out, dec, checked, facts, rows, step, seed)
    return Answer(
        facts | summarise(dec, checked),
        _tell_decomposition(dec, checked, given.audit, rows.row, seconds, page),
    )


def _verified(dec: Decomposition, streamed: bool) -> Verification | None:
    """Real steps in float64, or else in the model's own type; None where memory holds neither."""
    import torch

    import lddyn

    # A streamed model has no float64 copy.
    for dtype in (None,) if streamed else (torch.float64, None):
        try:
            return dec.verify(dtype=dtype)
        except lddyn.MemoryBudgetError as error:
            kind = "the model's own type" if dtype is None else "float64"
            typer.echo(f"not checked by real steps in {kind}: {safe(str(error))}", err=True)
    return None


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes how many seconds the block takes."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - began


def _true_float64(dtype: str) -> contextlib.AbstractContextManager[None]:
    """float64 all through: transformers computes parts of a float64 model in float32."""
    import lddyn

    return lddyn.true_float64() if dtype == "float64" else contextlib.nullcontext()


def _facts(
    model: ModelOptions, rows: OneRowOptions, given: Prepared, seconds: Mapping[str, float]
) -> JsonObject:
    """What the command worked on, for JSON."""
    return {
        "model": model.model,
        "data": str(rows.data),
        "row": rows.row,
        "update": list(given.update),
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "audit": [finding_to_dict(f, rows.row) for f in given.audit],
    }


def _write_page(
    out: Path,
    dec: Decomposition,
    checked: Verification | None,
    facts: JsonObject,
    rows: OneRowOptions,
    step: StepOptions,
    seed: int,
) -> Path:
    from lddyn.steps.folder import write_steps

    extra = {"model": facts["model"], "data": f"{rows.data}, row {rows.row}", "seed": seed}
    extra["seconds"] = ", ".join(f"{k} {v:.1f}" for k, v in facts["seconds"].items())
    title = f"What one {step.name(step.adjusted(rows.settings)).upper()} step on row {rows.row} did"
    return write_steps(out, {"": dec}, {"": checked}, title=title, extra=extra, facts=facts)


def _tell_decomposition(
    dec: Decomposition,
    checked: Verification | None,
    audit: Audit,
    row: int,
    seconds: Mapping[str, float],
    page: Path | None,
) -> Iterator[str | Table]:
    """Audit, table, story, verification."""
    yield from audit_lines(audit, row)
    yield _decomposition_table(dec, checked)
    yield dec.explain(checked)
    if checked is not None:
        yield "\nchecked against real steps:\n" + str(checked)
    yield f"({', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())})"
    if page is not None:
        yield f"page: {page}"


def _decomposition_table(dec: Decomposition, checked: Verification | None) -> Table:
    """A row per response: log π, its change, by which sequence, and as measured."""
    from rich.table import Table
    from rich.text import Text

    from lddyn.text import signed

    sources = list(dict.fromkeys(k for o in dec for k in o.by_sequence()))
    columns = ["log π before", "Δ log π", *(f"from {s}" for s in sources)]
    table = Table("nats")
    for column in (*columns, "± (start − mid)"):
        table.add_column(Text(safe(column)), justify="right", overflow="fold")
    if checked is not None:
        table.add_column("measured", justify="right")
    start = 0
    for o in dec:
        parts = {k: float(v.sum()) for k, v in o.by_sequence().items()}
        total = float(o.delta_logp.sum())
        cells = [
            Text(safe(o.name)),
            Text(signed(float(o.logp.sum()), 5)),
            Text(signed(total, 5), style="bold blue" if total > 0 else "bold red"),
            *(Text(signed(parts.get(s, 0.0), 4)) for s in sources),
            Text(signed(abs(float(o.error_estimate.sum())), 1).lstrip("+")),
        ]
        if checked is not None:
            stop = start + len(o.token_ids)
            cells.append(Text(signed(float(checked.measured[0, start:stop].sum()), 5)))
            start = stop
        table.add_row(*cells)
    return table


def massflow(
    model: ModelOptions,
    rows: OneRowOptions,
    step: StepOptions,
    top: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many of the likeliest other tokens are counted as likely ones.",
            rich_help_panel=STEP,
        ),
    ] = 10,
    memory: Memory = "auto",
    attention: Attention = "lddyn",
    out: Out = None,
) -> Answer:
    """Where the probability goes in one step: into the likeliest token, or elsewhere.

    A line per position of each watched response: the change of probability of its own token y, of
    the likeliest other token y*, of the next likely ones, and of the rest; measured by a real step
    (and predicted to first order). --out FOLDER gets massflow.json.
    """
    import lddyn
    from lddyn.files import json_safe, replace_file

    settings = step.adjusted(rows.settings)
    given = prepare(model, rows, step)
    seconds = {"load": given.seconds}
    update = step.make(given.learned, model, given.row, settings)
    flows: dict[str, MassFlow] = {}
    with _timed(seconds, "massflow"), _true_float64(model.dtype):
        opened = lddyn.Anatomy(given.model, attention)
        for name, example in given.observed.items():
            flows[name] = lddyn.massflow(
                opened,
                example,
                update,
                lr=step.rate(settings),
                like=settings,
                optimizer=step.optimizer,
                max_grad_norm=step.max_grad_norm,
                top=top,
                tokenizer=given.tokenizer,
                memory=memory,
                progress=True,
            )
    document = _facts(model, rows, given, seconds)
    document["responses"] = {name: flow.to_dict() for name, flow in flows.items()}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json_safe(document), ensure_ascii=False, indent=1, allow_nan=False)
        replace_file(out / "massflow.json", text + "\n")
    return Answer(document, _tell_flows(flows, out))


def _tell_flows(flows: Mapping[str, MassFlow], out: Path | None) -> Iterator[str]:
    """A table for each response, and what it comes to."""
    from lddyn.text import signed

    for name, flow in flows.items():
        summary = flow.summary()
        measured = summary["measured"]
        yield str(flow)
        yield (
            f"{name}: over all {summary['positions']} positions the response's own tokens moved by "
            f"{signed(measured['label'])} of probability, the likeliest other tokens by "
            f"{signed(measured['argmax'])}, the next likely ones by {signed(measured['top'])}, all "
            f"others by {signed(measured['rest'])}. The likeliest other token gained most at "
            f"{summary['argmax_gains_most']:.0%} of positions and fell at "
            f"{summary['argmax_falls']:.0%}.\n"
        )
    if out is not None:
        yield f"saved: {out / 'massflow.json'}"
