"""The command line: `lddyn decompose | env | audit | demo | report | store … | features …`.

Results go to standard output, progress and warnings to standard error; with --json, standard output
is one JSON document. A problem with the input is one line and exit status 2; LDDYN_LOG=DEBUG shows
the traceback as well. torch and transformers are imported by the commands that need them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lddyn.cli.console import one_line_errors, safe
from lddyn.cli.lab import app as lab_app

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from lddyn.data.audit import Audit
    from lddyn.data.example import Example
    from lddyn.objectives import Objective
    from lddyn.sketches.layout import Layout
    from lddyn.sketches.sketch import Sketch
    from lddyn.steps.decomposition import Decomposition
    from lddyn.steps.verify import Verification
    from lddyn.store.store import Store

__all__ = ["app", "main"]

app = typer.Typer(
    name="lddyn",
    help="Learning dynamics of LLM finetuning: what one step did to every token, and which token "
    "did it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LOG = logging.getLogger("lddyn")

_DTYPES = ("float32", "bfloat16", "float16", "float64")

_FORMAT_FIELDS = ("completion", "chosen", "messages", "conversations", "text", "input_ids")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]

Data = Annotated[
    Path,
    typer.Option(
        help="JSONL, JSON or Parquet: `prompt` and one field per response, or any format of TRL.",
        show_default=False,
    ),
]

Model = Annotated[str, typer.Option(help="Folder or hub name of a causal LM.", show_default=False)]

Fields = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD,FIELD,…|all",
        help="Responses of each row. Default: those of the data format.",
        show_default=False,
    ),
]

Limit = Annotated[
    int | None, typer.Option(help="Only the first rows of the data.", show_default=False)
]

MaxLength = Annotated[
    int | None, typer.Option(help="Cut sequences to this many tokens.", show_default=False)
]

Skip = Annotated[
    bool, typer.Option("--skip", help="Leave out what is too long or cannot be encoded.")
]

Dtype = Annotated[str, typer.Option(help=f"Of the model: {' '.join(_DTYPES)}.")]

Adapter = Annotated[
    str | None, typer.Option(help="peft adapter; only it is trained.", show_default=False)
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]


class Problem(ValueError):
    """Something the user can put right; its text is the whole message."""


def main() -> None:
    """Run the command line; the entry point of the `lddyn` script."""
    # OpenMP's threads spin between many small operations: tenfold the time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    level = os.environ.get("LDDYN_LOG", "WARNING").upper()
    logging.basicConfig(
        format="%(name)s: %(message)s",
        level=level if level in logging.getLevelNamesMapping() else "WARNING",
    )
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show π shows \u03c0
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app()


def _print_json(document: Mapping[str, Any]) -> None:
    from lddyn.files import plain

    typer.echo(json.dumps(plain(document), ensure_ascii=False, indent=1, allow_nan=False))


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(safe(line))


def _warn(message: str) -> None:
    typer.echo(f"warning: {safe(message)}", err=True)


def _print_table(table: Table) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, markup=False, width=width).print(table)


def _show_version(value: bool) -> None:
    if value:
        from lddyn import __version__

        typer.echo(f"lddyn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------------------------------------
# decompose


@app.command()
def decompose(
    model: Model,
    data: Data,
    row: Annotated[int, typer.Option(help="Which row of the data, from 0.")] = 0,
    objective: Annotated[str, typer.Option(help="sft or dpo.")] = "sft",
    observe: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD,FIELD,…",
            help="Responses to watch. Default: those of the update itself.",
            show_default=False,
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD[,FIELD]",
            help="Responses to learn from: one for SFT, chosen and rejected for DPO. Default: "
            "the data format's own.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate η.")] = 1e-4,
    optimizer: Annotated[str, typer.Option(help="sgd, adam, adamw or rmsprop, fresh.")] = "sgd",
    rule: Annotated[
        str,
        typer.Option(
            help="Where on the step the kernel is taken: start, midpoint or simpson (error η², "
            "η³, η⁵)."
        ),
    ] = "start",
    beta: Annotated[float, typer.Option(help="β of DPO.")] = 0.1,
    reference: Annotated[
        str,
        typer.Option(
            metavar="PATH|self|adapter-off", help="π_ref of DPO; self: the model before the step."
        ),
    ] = "self",
    max_length: MaxLength = None,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(help="Clip the gradient's norm, as trainers do.", show_default=False),
    ] = None,
    memory: Annotated[str, typer.Option(help="Workspace beyond model and result.")] = "auto",
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="MEMORY",
            help="Read the blocks' weights as they are used, at most this much at once (512MiB); "
            "needs --adapter.",
            show_default=False,
        ),
    ] = None,
    attention: Annotated[str, typer.Option(help="lddyn or eager.")] = "lddyn",
    dtype: Annotated[str, typer.Option(help=" ".join(_DTYPES) + ".")] = "float32",
    adapter: Adapter = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Check against real steps on a float64 copy (with --stream: in --dtype)."
        ),
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of torch.")] = 0,
    as_json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the decomposition, summary.json, pictures and index.html.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Decompose one SFT or DPO step on one row of data: what it did to every token, and why."""
    with one_line_errors():
        began = time.perf_counter()
        objective = objective.lower()
        if objective not in ("sft", "dpo"):
            raise Problem(f"--objective must be sft or dpo, got {objective!r}")
        _check_dtype(dtype)
        if stream is not None and adapter is None:
            raise Problem(
                "--stream needs --adapter: a step of all weights holds three times the model "
                "(gradient, step, shifted copy), got no adapter"
            )
        content = _read_row(data, row)  # before torch is imported: it fails fast
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        import torch

        import lddyn
        from lddyn.steps.decompose import decompose as take_apart
        from lddyn.steps.folder import summarise, write_steps

        torch.manual_seed(seed)
        chosen_dtype: torch.dtype = getattr(torch, dtype)
        _check_device(device)
        tokenizer = _load_tokenizer(model, trust_remote_code)
        observed = _split(observe)
        wanted, fields = _fields(content, row, objective, _split(update), observed)
        examples = _encode(tokenizer, content, row, fields, max_length)
        wanted = wanted or list(examples)[:1]
        watched = observed or wanted
        absent = [f for f in (*wanted, *watched) if f not in examples]
        if absent:
            raise Problem(
                f"row {row} of {data} has no field {absent[0]!r}; there are: "
                + ", ".join(sorted(examples))
            )
        lm = _load_model(model, chosen_dtype, trust_remote_code, adapter, stream, device)
        lm = lm.to(device)
        config = getattr(lm, "config", None)
        findings = lddyn.audit(
            tokenizer, [content], fields or None, max_length=max_length, config=config
        )
        if not as_json:
            _print_audit(findings, row)
        for name in dict.fromkeys((*wanted, *watched)):
            _check_limits(examples[name], name, config)
        step = _objective(
            objective,
            [examples[f] for f in wanted],
            beta,
            reference,
            chosen_dtype,
            trust_remote_code,
            device,
        )
        loaded = time.perf_counter()
        exact = lddyn.true_float64() if dtype == "float64" else contextlib.nullcontext()
        with exact:
            dec = take_apart(
                lm,
                {f: examples[f] for f in watched},
                step,
                lr,
                optimizer=optimizer,
                max_grad_norm=max_grad_norm,
                rule=rule,
                memory=memory,
                attention=attention,
                progress=True,
            )
        decomposed = time.perf_counter()
        verification = None
        if verify:
            _progress("checking against real steps …")
            # A streamed model has no float64 copy.
            verification = dec.verify() if stream is None else dec.verify(dtype=None)
        seconds = {
            "load": loaded - began,
            "decompose": decomposed - loaded,
            "verify": time.perf_counter() - decomposed,
        }
        document = {
            "model": model,
            "data": str(data),
            "row": row,
            "update": list(wanted),
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "audit": [_finding(f, row) for f in findings],
        }
        page = None
        if out is not None:
            _progress("drawing …")
            extra = {"model": model, "data": f"{data}, row {row}", "seed": seed}
            extra["seconds"] = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
            title = f"What one {objective.upper()} step on row {row} did"
            page = write_steps(
                out, {"": dec}, {"": verification}, title=title, extra=extra, facts=document
            )
        if as_json:
            _print_json({**document, **summarise(dec, verification)})
            return
        _print_decomposition(dec, verification)
        _say(f"({', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())})")
        if page is not None:
            _say(f"page: {page}")


def _split(text: str | None) -> list[str]:
    """Names between commas."""
    return list(dict.fromkeys(f.strip() for f in (text or "").split(",") if f.strip()))


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        typer.echo(message, err=True)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise Problem(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise Problem(f"--device must be a device of this machine, got {device!r}") from None


def _read_row(data: Path, row: int) -> dict[str, Any]:
    """One row of a data file."""
    from lddyn.data.read import rows

    if row < 0:
        raise Problem(f"--row must be >= 0, got {row}")
    read = rows(data, limit=row + 1)
    if row >= len(read):
        raise Problem(f"--row must be below {len(read)}, the number of rows in {data}, got {row}")
    return read[row]


def _fields(
    content: Mapping[str, Any], row: int, objective: str, update: list[str], observe: list[str]
) -> tuple[list[str], list[str]]:
    """(fields to learn from, text fields to encode); [] means: what the format has."""
    wanted = update
    count = 2 if objective == "dpo" else 1
    if update and len(update) != count:
        raise Problem(f"--update must name {count} field(s) for {objective}, got {update}")
    if not update:
        if objective == "dpo":
            wanted = ["chosen", "rejected"]
        else:
            wanted = [f for f in _FORMAT_FIELDS if f in content][:1]
            wanted = ["messages"] if wanted == ["conversations"] else wanted
            if not wanted and "prompt" in content:
                raise Problem(
                    f"row {row} has no completion or chosen: name the response to learn from with "
                    f"--update; there are: {', '.join(k for k in content if k != 'prompt')}"
                )
    named = list(dict.fromkeys((*wanted, *observe)))
    prepared = any(k.endswith("_ids") for k in content)
    absent = [f for f in named if f not in content]
    if absent and not prepared and absent != ["messages"]:
        there = ", ".join(k for k in map(str, content) if k != "prompt") or "none"
        raise Problem(f"row {row} has no field {absent[0]!r}; there are: {there}")
    alone = not {"prompt", "chosen", "rejected"} & set(content)
    return wanted, [] if prepared or alone else named


def _encode(
    tokenizer: Any, content: Mapping[str, Any], row: int, fields: Sequence[str], limit: int | None
) -> dict[str, Example]:
    """The examples of a row; an error names the row."""
    from lddyn.data.rows import encode_row
    from lddyn.errors import EmptyResponseError, ExampleError

    try:
        examples = encode_row(
            tokenizer, content, list(fields) or None, max_length=limit, skip_empty=bool(fields)
        )
    except EmptyResponseError as error:
        raise Problem(f"row {row}: {error}") from error
    except ExampleError as error:
        where = f"row {row}, {error.field}" if error.field else f"row {row}"
        raise Problem(f"{where}: {error}") from error
    for name in fields:
        if name not in examples:
            raise Problem(
                f"row {row}, {name}: the response is empty: there is no log-probability to measure"
            )
    return examples


def _check_limits(example: Example, name: str, config: Any) -> None:
    """Refuse what the model cannot read, before it is tried."""
    text = getattr(config, "text_config", None) or config
    size = getattr(text, "vocab_size", None)
    context = getattr(text, "max_position_embeddings", None)
    try:
        example.check_model_limits(size if isinstance(size, int) else 2**62, context)
    except ValueError as error:
        raise Problem(f"{name}: {error}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no advice from transformers while something loads."""
    from transformers.utils import logging as loud

    before, bars = loud.get_verbosity(), loud.is_progress_bar_enabled()
    if not _LOG.isEnabledFor(logging.DEBUG):
        loud.set_verbosity_error()
        loud.disable_progress_bar()
    try:
        yield
    finally:
        loud.set_verbosity(before)
        if bars:
            loud.enable_progress_bar()


def _local(name: str, what: str) -> None:
    """Refuse a path that does not exist before anybody looks for it on a hub."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or "\\" in name
    if looks_local and not path.exists():
        raise Problem(f"{what} {name}: no such folder")
    if path.is_file():
        raise Problem(f"{what} {name}: must be a folder with config.json, got a file")
    if path.is_dir() and what != "--adapter" and not (path / "config.json").is_file():
        raise Problem(f"{what} {name}: no config.json in this folder")


def _load_tokenizer(name: str, trust: bool) -> Any:
    _local(name, "--model")
    from transformers import AutoTokenizer

    with _quiet_transformers(), _loading("tokenizer", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust)


def _load(name: str, dtype: str, trust: bool, adapter: str | None, device: str) -> tuple[Any, Any]:
    """Tokenizer and model."""
    import torch

    tokenizer = _load_tokenizer(name, trust)
    return tokenizer, _load_model(name, getattr(torch, dtype), trust, adapter).to(device)


def _load_model(
    name: str,
    dtype: torch.dtype,
    trust: bool,
    adapter: str | None = None,
    stream: str | None = None,
    device: str = "cpu",
) -> Any:
    """A causal LM in evaluation mode; weights that its files do not have are an error."""
    _local(name, "--model")
    if stream is None:
        model = _load_whole(name, dtype, trust)
    else:
        import lddyn

        with _quiet_transformers(), _loading("model", name):
            model = lddyn.stream(name, stream, dtype=dtype, device=device, trust_remote_code=trust)
    if adapter is not None:
        _local(adapter, "--adapter")
        try:
            from peft import PeftModel
        except ImportError:
            raise Problem("--adapter needs peft: pip install peft") from None
        with _loading("adapter", adapter):
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.eval()


def _load_whole(name: str, dtype: torch.dtype, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with _quiet_transformers(), _loading("model", name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust, output_loading_info=True
        )
    missing = sorted(map(str, info.get("missing_keys") or []))
    if missing:
        raise Problem(
            f"--model {name}: {len(missing)} weights are not in its files and would be random, "
            f"{missing[0]} first"
        )
    return model


@contextlib.contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Name what could not be loaded."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise Problem(f"cannot load the {what} {name}: {reason}") from error


def _objective(
    kind: str,
    examples: Sequence[Example],
    beta: float,
    reference: str,
    dtype: torch.dtype,
    trust: bool,
    device: str,
) -> Objective:
    import lddyn

    if kind == "sft":
        update: Objective = lddyn.SFT(examples[0])
        return update
    source: Any = reference
    if reference not in ("self", "adapter-off"):
        source = _load_model(reference, dtype, trust).to(device)
    pair: Objective = lddyn.DPO(examples[0], examples[1], beta=beta, reference=source)
    return pair


def _finding(finding: Any, row: int) -> dict[str, Any]:
    found = {**vars(finding)}
    found["row"] = row if found["row"] >= 0 else None
    return found


def _print_audit(audit: Audit, row: int) -> None:
    """What the audit says about this row."""
    if audit.ok:
        _say(f"audit of row {row}: nothing found")
        return
    _say(f"audit of row {row}:")
    for finding in audit:
        place = finding.field or "the row"
        _say(f"  {finding.severity}: {finding.problem} ({place}): {finding.detail}")


def _print_decomposition(dec: Decomposition, verification: Verification | None) -> None:
    """Table, story, verification."""
    from rich.table import Table
    from rich.text import Text

    from lddyn.text import signed

    sources = list(dict.fromkeys(k for o in dec for k in o.by_sequence()))
    columns = ["log π before", "Δ log π", *(f"from {s}" for s in sources)]
    table = Table("nats")
    for column in (*columns, "± (start − mid)"):
        table.add_column(Text(safe(column)), justify="right", overflow="fold")
    if verification is not None:
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
        if verification is not None:
            stop = start + len(o.token_ids)
            cells.append(Text(signed(float(verification.measured[0, start:stop].sum()), 5)))
            start = stop
        table.add_row(*cells)
    _print_table(table)
    _say(*dec.explain(verification).splitlines())
    if verification is not None:
        _say("", "checked against real steps:", *str(verification).splitlines())


# ---------------------------------------------------------------------------------------------
# The other commands


@app.command()
def audit(
    data: Data,
    model: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer, vocabulary and context to check against."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer alone, instead of a model.")
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(metavar="FIELD,FIELD,…|all", help="Further response columns to check."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="As the trainer has it.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """List what is wrong with a data set: empty, cut, merged, identical, without EOS."""
    with one_line_errors():
        name = tokenizer or model
        if name is None:
            raise Problem("give --model or --tokenizer: findings depend on the tokens")
        if not data.is_file():
            raise Problem(f"{data}: no such file")
        from lddyn.data.audit import audit as find

        if tokenizer is None:
            loaded = _load_tokenizer(name, trust_remote_code)
        else:
            from transformers import AutoTokenizer

            with _quiet_transformers(), _loading("tokenizer", name):
                loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = None
        if model is not None:
            _local(model, "--model")
            from transformers import AutoConfig

            with _quiet_transformers(), _loading("config", model):
                config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        columns: Any = "all" if fields == "all" else _split(fields) or None
        found = find(loaded, data, columns, max_length=max_length, config=config)
        if as_json:
            _print_json(found.to_dict())
        else:
            _say(*str(found).splitlines())


@app.command()
def env(
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Also run every op against float64.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, devices, compiled parts and backends: what a bug report needs."""
    with one_line_errors():
        from lddyn import environment

        if as_json:
            document = environment.env()
            rows = environment.selftest() if selftest else []
            _print_json({**document, "selftest": rows} if selftest else document)
            passed = all(row["ok"] for row in rows)
        else:
            environment.print_env()
            passed = environment.print_selftest() if selftest else True
        if not passed:
            raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and page.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of data, weights and steps.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Little training, coarse rules: a smoke test.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a tiny LM here, finetune it, and explain one SFT and one DPO step of it."""
    with one_line_errors():
        from lddyn.demo.run import run

        summary = run(out, quick=quick, progress=True, seed=seed)
        if as_json:
            _print_json(summary)
            return
        _say(*summary["explanation"])
        _say("", f"page: {Path(out) / 'index.html'}")


@app.command()
def report(
    run_dir: Annotated[
        Path,
        typer.Argument(
            help="What --out wrote, or the folder of a watched run.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write the page of a saved decomposition again, or that of a watched run."""
    with one_line_errors():
        from lddyn import report as reports
        from lddyn.probes.probe_set import LABELS
        from lddyn.steps.folder import read_steps, write_steps

        if not any(run_dir.glob("**/decomposition.json")):
            with contextlib.suppress(FileNotFoundError):  # a watched run instead
                rows = reports.read_dynamics(run_dir)
                folder = run_dir if (run_dir / "dynamics.jsonl").is_file() else run_dir / "lddyn"
                page = reports.write_dynamics(rows, folder / "index.html", labels=LABELS)
                told = {"": reports.explain_dynamics(rows, LABELS)}
                if as_json:
                    _print_json({"page": str(page), "explanation": told})
                else:
                    _say(*told[""], f"page: {page}")
                return
        decs, verifications, summary = read_steps(run_dir)
        known = {"title", "opening", "extra", *decs}
        page = write_steps(
            run_dir,
            decs,
            verifications,
            title=str(summary.get("title", "What one finetuning step did")),
            opening=[str(s) for s in summary.get("opening", [])],
            extra=summary.get("extra"),
            facts={k: v for k, v in summary.items() if k not in known},
        )
        told = {
            name: dec.explain(verifications.get(name)).splitlines() for name, dec in decs.items()
        }
        if as_json:
            _print_json({"page": str(page), "explanation": told})
            return
        for name, lines in told.items():
            _say(*([f"{name}:"] if name else []), *lines)
        _say(f"page: {page}")


# What of an audit makes a pair one to fix.
_FAULTS = ("identical_pair", "duplicate", "blank_response")


def _show_validated(found: Mapping[str, Any]) -> None:
    """What real steps left of the scores."""
    from rich.table import Table

    errors = [f"{found[k]['error']:.1%}" for k in ("own", "others")]
    _say(
        f"{found['steps']} real steps on {found['batch']} pairs each, lr {found['lr']:.3g}: "
        f"foretold and measured Δ log π(y+) differ by {errors[0]} for the pairs of the batch and "
        f"{errors[1]} for the others. Rank correlations with it, and 95 % intervals:"
    )
    table = Table("score", "own batch", "", "other batches", "")
    varied = [row for row in found["scores"] if row["own"]["low"] < row["own"]["high"]]
    rows = sorted(varied, key=lambda row: -abs(row["own"]["rho"]))
    for row in rows:
        cells = []
        for name in ("own", "others"):
            x = row[name]
            cells += [f"{x['rho']:+.2f}", f"{x['low']:+.2f} to {x['high']:+.2f}"]
        table.add_row(row["score"], *cells)
    _print_table(table)


@app.command()
def diagnose(
    model: Model,
    data: Annotated[Path, typer.Option(help="Preference pairs.", show_default=False)],
    objective: Annotated[str, typer.Option(help="dpo, ipo, simpo, dpop, dpo+nll, …")] = "dpo",
    beta: Annotated[
        float | None, typer.Option(help="Of the objective. Default: its own.", show_default=False)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Reference model. Default: the model itself.", show_default=False),
    ] = None,
    adapter: Adapter = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    max_prompt_length: Annotated[
        int | None,
        typer.Option(
            help="Cut prompts to this many tokens where a row is too long.", show_default=False
        ),
    ] = None,
    drop: Annotated[
        int, typer.Option(help="Leave out so many of the most harmful pairs from --write.")
    ] = 0,
    reweight: Annotated[
        bool, typer.Option("--reweight", help="Give the rows of --write a weight each.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="JSONL of the rows that are left, as they were.", show_default=False),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Foretell a run of AdamW of this rate.", show_default=False),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of that run.")] = 1,
    batch: Annotated[int, typer.Option(help="Pairs in its batches.")] = 8,
    schedule: Annotated[str, typer.Option(help="constant, or linear to 0.")] = "constant",
    validate: Annotated[
        int, typer.Option(help="Take so many real steps on a copy, and show what each score got.")
    ] = 0,
    tokens: Annotated[
        int, typer.Option(help="Look at the tokens of so many of the worst pairs.")
    ] = 4,
    memory: Annotated[str, typer.Option(help="Workspace for gradients.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the page, index.html, and its tables.", show_default=False),
    ] = None,
    watched: Annotated[
        Path | None,
        typer.Option(help="Folder of a watched run: its curves for the page.", show_default=False),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(help="A later checkpoint, to check the page against.", show_default=False),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Why do the chosen log-probs fall? Which pairs do it, and under which objective."""
    with one_line_errors():
        _check_dtype(dtype)
        if drop < 0:
            raise Problem(f"--drop must be 0 or more pairs, got {drop}")
        if out is None and (watched is not None or after is not None):
            raise Problem("--watched and --after are for the page: give --out FOLDER, too")
        if (drop or reweight) and write is None:
            raise Problem(
                f"--{'drop' if drop else 'reweight'} needs --write FILE for the rows that are left"
            )
        if write is not None and write.resolve() == data.resolve():
            raise Problem("--write is the file of --data: give another, the rows are not kept")
        for folder in [out, *([] if write is None else [write.parent])]:
            if folder is not None:  # what cannot be written is said before the work
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise Problem(f"{folder}: no right to write there")
        if write is not None and write.is_dir():
            raise Problem(f"--write must be a file, got the folder {write}")
        if watched is not None:
            from lddyn.report import read_dynamics

            read_dynamics(watched)
        from lddyn.data.audit import audit
        from lddyn.data.read import rows as read_rows
        from lddyn.data.rows import encode_row

        # Rows that nobody looked at are written, too.
        content = read_rows(data, limit=limit if write is None else None)
        taken = [i for i, row in enumerate(content) if "weight" in row] if reweight else []
        if taken:
            raise Problem(f"row {taken[0]} has a weight already: rename that column for --reweight")
        import torch

        import lddyn
        from lddyn.files import replace_file
        from lddyn.memory import parse_memory
        from lddyn.objectives import Loss

        run = None if lr is None else lddyn.Run(lr, epochs, batch, schedule=schedule)
        given = {} if beta is None else {"beta": beta}
        Loss(objective.lower(), **given)
        _check_device(device)
        tokenizer, lm = _load(model, dtype, trust_remote_code, adapter, device)
        pairs, places, skipped = [], [], []
        for place, row in enumerate(content[:limit]):
            try:
                encoded = encode_row(
                    tokenizer, row, max_length=max_length, max_prompt_length=max_prompt_length
                )
                for side in ("chosen", "rejected"):
                    _check_limits(encoded[side], side, lm.config)
                pairs.append((encoded["chosen"], encoded["rejected"]))
                places.append(place)
            except (ValueError, KeyError) as error:
                skipped.append((place, str(error)))
        if not pairs:
            why = skipped[0][1] if skipped else "there is none"
            raise Problem(f"{data}: no row is a pair of chosen and rejected ({why})")
        for place, why in skipped[:3]:
            _warn(f"row {place} is not diagnosed: {why}")
        if len(skipped) > 3:
            _warn(f"{len(skipped)} rows in all are not diagnosed")
        if drop > len(pairs) or (drop and drop == len(content)):
            raise Problem(
                f"--drop must leave a row, and be at most the {len(pairs)} pairs, got {drop}"
            )
        size = 8 * len(pairs) * sum(p.numel() for p in lm.parameters() if p.requires_grad)
        if run is None and size > parse_memory(memory):
            _warn(
                f"the gradients of {len(pairs)} pairs take {size / 2**30:.3g} GiB, more than "
                "--memory: inner products between pairs are estimated"
            )
        moved = None
        if after is not None:
            from lddyn.probes.measure import measure

            later = _load_model(after, getattr(torch, dtype), trust_remote_code).to(device)
            moved = measure(later, [chosen for chosen, _ in pairs]).log_prob.cpu()
            del later
        other = None
        if reference is not None:
            other = _load_model(reference, getattr(torch, dtype), trust_remote_code).to(device)
        checked = audit(
            tokenizer,
            content[:limit],
            max_length=max_length,
            config=lm.config,
            max_prompt_length=max_prompt_length,
        )
        found = lddyn.diagnose(
            lm,
            pairs,
            objective.lower(),
            reference=other,
            memory=memory,
            run=run,
            tokens=tokens,
            validate=validate,
            progress=True,
            **given,
        )
        faults = {finding.row: finding.problem for finding in checked if finding.problem in _FAULTS}
        faulty = {i: faults[place] for i, place in enumerate(places) if place in faults}
        document = found.to_dict(places, faulty) | {"audit": checked.to_dict()}
        page = None
        if out is not None:
            _progress("writing the page …")
            extra = {"model": model, "data": str(data), "rows left out": len(skipped)}
            extra |= {} if reference is None else {"reference": reference}
            extra |= {} if after is None else {"after": after}
            measured = None if moved is None else moved - found.log_probs[0]
            page = found.report(
                out / "index.html",
                lm,
                tokenizer,
                watched=watched,
                measured=measured,
                places=places,
                faults=faulty,
                extra=extra,
            )
        if write is not None:
            gone = {places[i] for i in found.worst(drop)}
            harmful = int((found.gives < 0).sum())
            if drop > harmful:
                _warn(f"only {harmful} of the {drop} dropped pairs pull chosen responses down")
            shares = dict(zip(places, found.shares().tolist(), strict=True)) if reweight else {}
            weights = [
                {"weight": shares.get(i, 1.0)} if reweight else {} for i in range(len(content))
            ]
            kept = [place for place in range(len(content)) if place not in gone]
            left = [content[place] | weights[place] for place in kept]
            write.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in left)
            replace_file(write, text)
        if as_json:
            _print_json(document)
            return
        _say(*str(checked).splitlines(), *document["told"])
        from rich.table import Table

        table = Table("row", "do", "weight", "gives", "own chosen", "log π(y+)", "log π(y−)", "")
        for action in document["actions"][:10]:
            row = document["pairs"][action["pair"]]
            values = (row[k] for k in ("own_chosen", "log_prob_chosen", "log_prob_rejected"))
            table.add_row(
                str(row["row"]),
                action["action"],
                f"{action['share']:.2f}",
                f"{action['gives']:+.3g}",
                *(f"{v:+.3g}" for v in values),
                action["why"] if action["action"] == "fix" else row["fate"],
            )
        _print_table(table)
        table = Table("row", "of", "token", "gives", "own chosen", "NTHR", "log π")
        for entry in [e for e in document["tokens"] if e["pair"] in found.worst(tokens)]:
            order = sorted(entry["tokens"], key=lambda token: float(token["gives"]))
            for token in order[:3]:
                values = (token[k] for k in ("gives", "own_chosen", "nthr", "log_prob"))
                table.add_row(
                    str(entry["row"]),
                    "y+" if token["response"] == "chosen" else "y−",
                    repr(token["text"]),
                    *(f"{v:+.3g}" for v in values),
                )
        _print_table(table)
        table = Table(
            "loss",
            "y+ per unit",
            "y− per unit",
            "y+ falls",
            *(["linear run: y+", "linear run: y−", "y+ falls"] if run else []),
        )
        for row in document["objectives"]:
            step = [row["chosen"], row["rejected"]]
            ahead = [row["run_chosen"], row["run_rejected"]] if run else []
            table.add_row(
                row["objective"],
                *(f"{v:+.3g}" for v in step),
                f"{row['chosen_falls']:.0%}",
                *(f"{v:+.3g}" for v in ahead),
                *([f"{row['run_chosen_falls']:.0%}"] if run else []),
            )
        _print_table(table)
        if found.validated is not None:
            _show_validated(found.validated)
        if page is not None:
            _say(f"page: {page} (open it in a browser; its tables are beside it)")


# ---------------------------------------------------------------------------------------------
# Stores of token features

store_app = typer.Typer(help="Look after stores of token features.", no_args_is_help=True)

features_app = typer.Typer(help="Make and ask stores of token features.", no_args_is_help=True)

app.add_typer(store_app, name="store")

app.add_typer(features_app, name="features")

app.add_typer(lab_app, name="lab")

Stores = Annotated[list[Path], typer.Argument(metavar="STORE…", show_default=False)]


def _describe(store: Store) -> dict[str, Any]:
    return {
        "path": str(store.path),
        "tokens": len(store),
        "examples": len(store.example_ids),
        "shards": store.n_shards,
        "bytes": store.nbytes,
        "width": store.width,
        "dtype": str(store.dtype).removeprefix("torch."),
        "layout": store.layout_json,
        "identity": store.identity,
    }


def _short(found: Mapping[str, Any]) -> str:
    return (
        f"{found['path']}: {found['tokens']:,} tokens of {found['examples']:,} examples, "
        f"{found['shards']} shards, {found['bytes'] / 2**20:,.1f} MiB, {found['width']} × "
        f"{found['dtype']}"
    )


@store_app.command()
def verify(paths: Stores, as_json: Json = False) -> None:
    """Read every byte of stores and check it; exit status 1 if anything is damaged."""
    with one_line_errors():
        from lddyn.errors import StoreCorruptError
        from lddyn.store.store import Store

        documents = []
        for path in paths:
            found: dict[str, Any] = {"path": str(path)}
            try:
                store = Store.open(path)
                found |= _describe(store)
                problems = store.verify()
            except StoreCorruptError as error:
                problems = [str(error)]
            documents.append({**found, "problems": problems})
            if not as_json:
                if "tokens" in found:
                    _say(_short(found))
                _say(*(f"  {problem}" for problem in problems or ["nothing wrong"]))
        if as_json:
            _print_json({"stores": documents})
        if any(document["problems"] for document in documents):
            raise typer.Exit(1)


@store_app.command()
def ls(paths: Stores, as_json: Json = False) -> None:
    """Show what stores hold and what they belong to."""
    with one_line_errors():
        from lddyn.store.store import Store

        documents = [_describe(Store.open(path)) for path in paths]
        if as_json:
            _print_json({"stores": documents})
            return
        for found in documents:
            _say(_short(found))
            for name in ("identity", "layout"):
                shown = dict(found[name] or {})
                if "parts" in shown:  # of a sketch: one or more for every parameter
                    shown["parts"] = f"{len(shown['parts'])} (--json shows them)"
                if shown:
                    _say(f"  {name}: {json.dumps(shown, ensure_ascii=False)}")


@store_app.command()
def merge(
    paths: Stores,
    out: Annotated[Path, typer.Option(help="Folder of the merged store.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Make one store of those of several ranks, in the order of the data set."""
    with one_line_errors():
        from lddyn.store.store import Store

        found = _describe(Store.merge(paths, out))
        if as_json:
            _print_json(found)
        else:
            _say(_short(found))


@features_app.command()
def build(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--store", help="Folder of the store.", show_default=False)],
    fields: Fields = None,
    limit: Limit = None,
    kind: Annotated[
        str,
        typer.Option(help="twosided, lowrank, sjlt, rademacher, gaussian or tensorsketch."),
    ] = "twosided",
    k: Annotated[int, typer.Option("-k", help="Sketched numbers for each token.")] = 4096,
    repeats: Annotated[int, typer.Option(help="Independent repeats among them: error bars.")] = 8,
    rank: Annotated[int, typer.Option(help="Rank that lowrank keeps.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sketch.")] = 0,
    by: Annotated[
        str, typer.Option(help="A row for each token, or for each sequence: its tokens' sum.")
    ] = "token",
    rows: Annotated[
        str, typer.Option(help="Numbers in the store: float32, bfloat16 or float16.")
    ] = "float32",
    max_length: MaxLength = None,
    skip: Skip = False,
    memory: Annotated[str, typer.Option(help="Workspace beyond the model.")] = "auto",
    dtype: Dtype = "float32",
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Sketch the gradient of every response token of a data set into a store.

    A run that was stopped goes on where it was. Under `torchrun -m lddyn features build …` each
    process takes its share of the examples; the store is the same.
    """
    with one_line_errors(), _ranks() as (me, world, wait):
        began = time.perf_counter()
        _check_dtype(dtype)
        if by not in ("token", "sequence"):
            raise Problem(f"--by must be token or sequence, got {by!r}")
        if not data.is_file():
            raise Problem(f"{data}: no such file")

        from lddyn.engine.anatomy import Anatomy
        from lddyn.sketches.divide import plan_layout
        from lddyn.sketches.sketch import Sketch
        from lddyn.store.build import store_features
        from lddyn.store.identity import identify
        from lddyn.store.manifest import MANIFEST
        from lddyn.store.store import Store

        _check_device(device)
        sketch = Sketch(kind, k=k, seed=seed, repeats=repeats, rank=rank)
        tokenizer, lm = _load(model, dtype, trust_remote_code, adapter, device)
        examples, left_out = _data_set(tokenizer, lm, data, fields, limit, max_length, skip=skip)
        if left_out and me == 0:
            _warn(f"{len(left_out)} left out; the first: {left_out[0]}")
        identity = identify(lm, tokenizer, dtype=dtype, rows=by)
        parts = [out]
        if world > 1:
            parts = [out.with_name(f"{out.name}.rank-{i}-of-{world}") for i in range(world)]
        anatomy = Anatomy(lm)
        # That of what is there, which may have begun with other examples; else of all ranks alike,
        # and not of what is left to do.
        layout = _stored_layout([out, *parts], sketch)
        if layout is None:
            layout = plan_layout(anatomy, list(examples.values()), sketch, by)
        mine = {i: e for n, (i, e) in enumerate(examples.items()) if n % world == me}
        left = len(examples)
        if world > 1 and (out / MANIFEST).exists():  # what is there already is no rank's to make
            done = Store.open(out, identity, layout=layout)
            if str(done.dtype) != f"torch.{rows}":
                raise Problem(f"--rows must be that of {out}, {done.dtype}, got {rows}")
            left = sum(not done.has(e) for e in examples.values())
            mine = {i: e for i, e in mine.items() if not done.has(e)}
        written = 0
        if left:
            with Store.create(parts[me], identity, layout, rows, exist_ok=True) as store:
                written = store_features(
                    store, anatomy, mine, layout, by=by, memory=memory, progress=me == 0
                )
        wait()
        if me != 0:
            return
        if world > 1:
            import shutil

            if left:
                Store.merge(parts, out, append=True)
            for part in filter(Path.exists, parts):
                shutil.rmtree(part)
        found = _describe(Store.open(out)) | {"written": written, "processes": world}
        found["left_out"] = left_out
        found["seconds"] = round(time.perf_counter() - began, 3)
        if as_json:
            _print_json(found)
            return
        _say(_short(found), f"({found['seconds']:.1f} s)")


def _stored_layout(paths: Sequence[Path], sketch: Sketch) -> Layout | None:
    """That of the first store that is there and was made with this sketch."""
    from lddyn.sketches.layout import Layout
    from lddyn.store.manifest import MANIFEST
    from lddyn.store.store import Store

    for path in paths:
        if (path / MANIFEST).exists():
            described = Store.open(path).layout_json
            layout = None if described is None else Layout.from_json(described)
            if layout is not None and layout.sketch == sketch:
                return layout
    return None


def _data_set(
    tokenizer: Any,
    model: Any,
    data: Path,
    fields: str | None,
    limit: int | None,
    max_length: int | None,
    skip: bool,
) -> tuple[dict[int, Example], list[str]]:
    """Place in the data set -> example, what is there twice once; and why others are left out."""
    from lddyn.data.read import rows as read
    from lddyn.data.rows import encode_row

    wanted: Any = "all" if fields == "all" else _split(fields) or None
    found: dict[int, Example] = {}
    seen: set[str] = set()
    left_out: list[str] = []
    place = 0
    for number, row in enumerate(read(data, limit=limit)):
        try:
            encoded = encode_row(tokenizer, row, wanted, max_length=max_length, skip_empty=True)
        except ValueError as error:
            if not skip:
                raise Problem(f"row {number}: {error}") from error
            left_out.append(f"row {number}: {error}")
            continue
        if wanted not in (None, "all"):
            encoded = {name: e for name, e in encoded.items() if name in wanted}
        for name, example in encoded.items():
            place += 1
            try:
                _check_limits(example, f"row {number}, {name}", getattr(model, "config", None))
            except Problem as error:
                if not skip:
                    raise
                left_out.append(str(error))
                continue
            if example.content_id not in seen:
                found[place - 1] = example
            seen.add(example.content_id)
    if not found:
        raise Problem(f"{data} has no response to make features of")
    return found, left_out


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """Which process of how many this is, as torchrun says, and what waits for the others."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, lambda: None
        return
    import datetime

    from torch import distributed

    # Shares may take hours, and differ by as much.
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield distributed.get_rank(), world, distributed.barrier
    finally:
        distributed.destroy_process_group()


@app.command()
def plan(
    model: Model,
    data: Data,
    fields: Fields = None,
    limit: Limit = None,
    rtol: Annotated[
        float | None,
        typer.Option(help="Wanted relative error of the whole table. Default: exact."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of sketch to look at. Default: twosided and lowrank."),
    ] = None,
    by: Annotated[str, typer.Option(help="token, or sequence: whole gradients.")] = "token",
    skip: Skip = False,
    max_length: MaxLength = None,
    memory: Annotated[str, typer.Option(help="What may be used beyond the model.")] = "auto",
    dtype: Dtype = "float32",
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Say how to compare all tokens of a data set, exactly or by sketches, and what it costs."""
    with one_line_errors():
        _check_dtype(dtype)
        if by not in ("token", "sequence"):
            raise Problem(f"--by must be token or sequence, got {by!r}")
        if not data.is_file():
            raise Problem(f"{data}: no such file")

        import lddyn

        _check_device(device)
        tokenizer, lm = _load(model, dtype, trust_remote_code, adapter, device)
        examples, left_out = _data_set(tokenizer, lm, data, fields, limit, max_length, skip=skip)
        if left_out:
            _warn(f"{len(left_out)} left out; the first: {left_out[0]}")
        sketch = None if kind is None else lddyn.Sketch(kind)
        way = lddyn.plan(
            lm, list(examples.values()), by=by, rtol=rtol, memory=memory, sketch=sketch
        )
        if as_json:
            _print_json(way.to_json() | {"left_out": len(left_out)})
            return
        for line in way.explain().splitlines():
            _say(line)


@features_app.command()
def query(
    path: Annotated[Path, typer.Argument(metavar="STORE", show_default=False)],
    example: Annotated[
        str | None,
        typer.Option(help="Content id of a stored example, or its beginning.", show_default=False),
    ] = None,
    index: Annotated[
        int | None, typer.Option(help="Or its place in the data set.", show_default=False)
    ] = None,
    token: Annotated[
        int | None,
        typer.Option(help="Only this token of its response, from 0.", show_default=False),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many for each token.")] = 10,
    sign: Annotated[
        str, typer.Option(help="up: what pulls it up; down: what pushes it down; both.")
    ] = "both",
    by: Annotated[str, typer.Option(help="token or sequence.")] = "token",
    own: Annotated[bool, typer.Option("--own", help="The example's own tokens, too.")] = False,
    memory: Annotated[str, typer.Option(help="Workspace.")] = "256MiB",
    as_json: Json = False,
) -> None:
    """Which of the stored tokens or sequences pull the tokens of one up, or push them down."""
    with one_line_errors():
        from lddyn.store.store import Store

        store = Store.open(path, layout=_layout(path))
        name = _stored(store, example, index)
        span = store.span(name)
        asked = store.tokens(span.start, span.stop)
        places = list(range(len(asked)))
        if token is not None:
            places = [i for i in places if int(asked.response_index[i]) == token]
            if not places:
                raise Problem(
                    f"--token must be one of {asked.response_index.tolist()}, got {token}"
                )
        hits = store.query(
            store.rows(span.start, span.stop)[places],
            k,
            sign=sign,
            by=by,
            memory=memory,
            exclude=() if own else [name],
        )
        queries: list[dict[str, Any]] = [
            {
                "response_index": int(asked.response_index[i]),
                "token_id": int(asked.token_id[i]),
                "hits": [vars(hit) for hit in hits[number]],
            }
            for number, i in enumerate(places)
        ]
        if as_json:
            _print_json({"store": str(path), "example_id": name, "by": by, "queries": queries})
            return
        whole = store.identity.get("rows") == "sequence"
        for entry in queries:
            title = f"token {entry['response_index']} (id {entry['token_id']}) of {name}"
            _say(f"all of {name}" if whole else title)
            for hit in entry["hits"]:
                what = "all" if whole else f"all {hit['tokens']} tokens"
                if hit["token_id"] is not None and not whole:
                    what = f"token {hit['response_index']} (id {hit['token_id']})"
                error = f" ± {hit['stderr']:.2g}" if hit["stderr"] else ""
                place = f"example {hit['example_index']} ({hit['example_id']})"
                _say(f"  {hit['value']:+.4g}{error}  {what} of {place}")


def _layout(path: Path) -> Any:
    """What made the rows of a store, from what its manifest says; None: plain vectors."""
    from lddyn.store.store import Store

    described = Store.open(path).layout_json
    if described is None:
        return None
    import importlib

    try:
        return importlib.import_module("lddyn.sketches.sketch").Layout.from_json(described)
    except ModuleNotFoundError:
        raise Problem(f"{path} holds sketches; this lddyn has none") from None


def _stored(store: Store, example: str | None, index: int | None) -> str:
    """Content id of the one example that is meant."""
    if (example is None) == (index is None):
        raise Problem("give --example or --index: which stored example is asked about?")
    if index is not None:
        name = store.example_at(index)
        if name is None:
            raise Problem(f"--index must be the place of a stored example, got {index}")
        return name
    found = [name for name in store.example_ids if name.startswith(example or "")]
    if len(found) != 1:
        raise Problem(f"--example must be one stored example, {example!r} begins {len(found)}")
    return found[0]


if __name__ == "__main__":
    main()
