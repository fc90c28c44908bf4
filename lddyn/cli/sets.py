"""`lddyn diagnose | filter`: what a preference set does to its own responses, and a better set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lddyn.cli.command import Answer
from lddyn.cli.console import say_progress, warn
from lddyn.cli.options import (
    COMPUTATION,
    DataOptions,
    Memory,
    ModelOptions,
    RequiredOut,
    Seed,
)
from lddyn.cli.pairs import encode_observed, encode_pairs, warn_of_skipped
from lddyn.cli.sequences import Kind, encode_responses, explain, kind_of
from lddyn.cli.set_options import DIAGNOSIS, LossOptions, PageOptions, RunOptions, Work
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.audit import Audit
    from lddyn.data.example import Example
    from lddyn.data.read import PlacedRow
    from lddyn.ranks import Ranks
    from lddyn.sets.diagnosis import Diagnosis
    from lddyn.sets.sequence_diagnosis import SequenceDiagnosis


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
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a store of sketched gradients: rows that it has are read, others are "
            "added, so that an interrupted diagnosis goes on. Without --forecast.",
            file_okay=False,
            show_default=False,
            rich_help_panel=COMPUTATION,
        ),
    ] = None,
    memory: Memory = "auto",
    seed: Seed = 0,
) -> Answer:
    """Why the log-probs of a set fall: which rows do it, under which loss.

    Rows are pairs (chosen, rejected), demonstrations, responses with a label, or completions with
    a reward. --out FOLDER gets the page index.html and its tables; `lddyn filter FOLDER` then
    leaves out the worst rows. Under `torchrun -m lddyn diagnose …` the processes divide the passes.
    """
    page.check()
    settings = rows.settings
    work = Work(
        run=run.make(settings=settings, seed=seed),
        refresh=run.refresh,
        memory=memory,
        sketch_size=sketch_size,
        seed=seed,
        budget=budget,
        store=store,
    )
    from lddyn.ranks import Ranks

    content = rows.read()
    kind = kind_of(content, loss.objective)
    single = kind != "pairs"
    if single and (validate or page.watched is not None or page.after is not None):
        raise ValueError("--validate, --watched and --after are of pairs (chosen, rejected)")
    with Ranks.of_torchrun() as ranks:
        if ranks.rank:
            page = replace(page, out=None)
        if single:
            answer = _of_sequences(model, rows, loss, page, work, content, observe, kind, ranks)
        else:
            answer = _of_pairs(
                model, rows, loss, page, work, content, observe, validate, close_ups, ranks
            )
    return answer if ranks.rank == 0 else Answer(None)  # the first process answers


def _of_pairs(
    model: ModelOptions,
    rows: DataOptions,
    loss: LossOptions,
    page: PageOptions,
    work: Work,
    content: Sequence[PlacedRow],
    observe: Path | None,
    validate: int,
    close_ups: int,
    ranks: Ranks,
) -> Answer:
    """The diagnosis of a preference set."""
    import lddyn

    settings = rows.settings
    objective = loss.make(settings)  # errors in it are raised before the work
    tokenizer, lm = model.load_tokenizer(), model.load()
    given = encode_pairs(tokenizer, lm.config, content, rows.encoding)
    warn_of_skipped(given, rows.data, content)
    others = observe and encode_observed(tokenizer, lm.config, observe, rows.encoding)
    moved = _log_probs_after(page.after, model, given.pairs)
    extra = _extra(model, rows, loss, page, len(given.skipped))

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
        close_ups=close_ups,
        validate=validate,
        row_numbers=given.rows,
        faults=given.faults,
        so_far=write,
        ranks=ranks,
        **work.options(lm, 2 * len(given.pairs) + len(others or {})),
    )
    document = diagnosis.to_dict() | {"audit": given.audit.to_dict()}
    written = write(diagnosis, lm)  # None in processes but the first
    return Answer(document, _explain(document, diagnosis, given.audit, close_ups, written))


def _of_sequences(
    model: ModelOptions,
    rows: DataOptions,
    loss: LossOptions,
    page: PageOptions,
    work: Work,
    content: Sequence[PlacedRow],
    observe: Path | None,
    kind: Kind,
    ranks: Ranks,
) -> Answer:
    """The diagnosis of a set of single responses."""
    import lddyn
    from lddyn.sets.filter import write_source

    tokenizer, lm = model.load_tokenizer(), model.load()
    given = encode_responses(tokenizer, lm.config, content, rows.encoding, kind)
    reference = None
    if kind == "kto":
        reference = loss.load_reference(model, rows.settings, _rows(content, given.rows))
    elif loss.reference is not None:
        raise ValueError(f"--reference is of losses with one; {kind} has none")
    objective = given.objective(rows.settings, loss.beta, reference, lm)
    others = observe and encode_observed(tokenizer, lm.config, observe, rows.encoding)
    extra = _extra(model, rows, loss, page, len(given.skipped))

    def write(diagnosis: SequenceDiagnosis) -> Path | None:
        """The page, as far as it is known; an interrupt leaves it."""
        if page.out is None:
            return None
        say_progress("writing the page …")
        written = diagnosis.report(page.out / "index.html", extra)
        if given.rows:
            write_source(page.out, rows.data)
        return written

    diagnosis = lddyn.diagnose(
        lm,
        objective,
        observe=others,
        row_numbers=given.rows or None,
        so_far=write,
        ranks=ranks,
        **work.options(lm, len(given.examples) + len(others or {})),
    )
    document = diagnosis.to_dict() | {"audit": given.audit.to_dict()}
    written = None if page.out is None else page.out / "index.html"
    return Answer(
        document, itertools.chain([str(given.audit)], explain(document, diagnosis, written))
    )


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
    resample: Annotated[
        bool,
        typer.Option(
            "--resample",
            help="Write every row as often as its weight says, for trainers that read no weights.",
        ),
    ] = False,
    seed: Seed = 0,
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
    """Leave the most harmful rows out of a data file, weight or repeat its rows; needs no model.

    --out FOLDER gets kept.jsonl (rows to train on, in their order) and dropped.jsonl. Rows that
    were not diagnosed are kept.
    """
    from lddyn.data.read import placed_rows
    from lddyn.errors import ExampleError
    from lddyn.files import naming
    from lddyn.sets.filter import check_source, filter_rows, read_diagnosed

    if not (drop or reweight or resample):
        raise ValueError("give --drop N, --reweight, or both, or --resample: what is to change?")
    file = check_source(folder, data)
    if (out / "kept.jsonl").resolve() == file.resolve():
        raise ValueError(f"{out}: kept.jsonl there is the data file itself; give another --out")
    diagnosis = read_diagnosed(folder)
    rows = [None if isinstance(row, ExampleError) else row for _, row in placed_rows(file)]
    with naming(str(file)):
        filtered = filter_rows(
            rows, diagnosis, drop=drop, reweight=reweight, resample=resample, seed=seed
        )
    if filtered.helpful:
        warn(f"only {drop - filtered.helpful} of the {drop} dropped pairs lower chosen responses")
    if reweight:
        warn(
            "TRL's trainers do not read the column weight: they train on a row of weight 0 as on "
            "any other; lddyn.integrations.trl.weighted(trainer) makes them read it; --resample "
            "writes rows for every other trainer"
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
    if resample:
        line += f"; {len({*filtered.kept_rows})} different ones, repeated by weight"
    named = ", ".join(map(str, filtered.dropped_rows))
    return Answer(document, [line + (f" (rows {named})" if named else "")])


def _rows(content: Sequence[PlacedRow], numbers: Sequence[int]) -> list[Mapping[str, Any]]:
    """The content of some rows."""
    rows = [content[number].row for number in numbers]
    return [row for row in rows if isinstance(row, dict)]


def _log_probs_after(
    after: str | None, model: ModelOptions, pairs: Sequence[tuple[Example, Example]]
) -> Tensor | None:
    """Log π of the chosen responses under a later checkpoint (N,), nats. None: there is none."""
    if after is None:
        return None
    from lddyn.probes.measure import measure

    return measure(model.load_other(after), [chosen for chosen, _ in pairs]).log_prob.cpu()


def _extra(
    model: ModelOptions, rows: DataOptions, loss: LossOptions, page: PageOptions, left_out: int
) -> JsonObject:
    """Facts for the page's last table."""
    extra: JsonObject = {"model": model.model, "data": str(rows.data)}
    extra["rows left out"] = left_out
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
    written = diagnosis.report(
        page.out / "index.html",
        *loaded,
        watched=page.watched,
        measured=None if moved is None else moved - diagnosis.log_probs[0],
        extra=extra,
    )
    write_source(page.out, data)
    return written


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
    """What a step of each loss would do, and a run of it where one was predicted.

    Without a run, losses whose step has the same direction are one row.
    """
    from rich.table import Table

    from lddyn.report.words import distinct

    run, rows = document["run"] is not None, document["objectives"]
    ahead = ("linear run: y+", "linear run: y−", "y+ falls") if run else ()
    table = Table("loss", "y+ per ‖Δθ‖", "y− per ‖Δθ‖", "y+ falls", *ahead)
    for row in rows if run else distinct(rows):
        cells = [f"{row[k]:+.3g}" for k in ("chosen", "rejected")]
        cells.append(f"{row['chosen_falls']:.0%}")
        if run:
            cells += [f"{row[k]:+.3g}" for k in ("run_chosen", "run_rejected")]
            cells.append(f"{row['run_chosen_falls']:.0%}")
        same = [] if run else row["alike"]
        table.add_row(" = ".join([row["objective"], *same]), *cells)
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
