"""`lddyn audit`: what is wrong with a data set, before it is trained on."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lddyn.cli.command import Answer
from lddyn.cli.options import DATA, FileOptions, TrustRemoteCode, split


def audit(
    rows: FileOptions,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a model: check against its tokenizer, vocabulary and "
            "context.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a tokenizer, instead of the model's.", show_default=False
        ),
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD,FIELD,…|all",
            help="Further fields (columns with a response) to check.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with status 1 for warnings, too."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Answer:
    """List rows that would train badly: empty, cut, merged, identical, or without an end token.

    The exit status is 1 if a row cannot be used, or there is none. Notes never change it.
    """
    name = tokenizer or model
    if name is None:
        raise ValueError("give --model or --tokenizer: what the audit finds depends on the tokens")
    from lddyn.data.audit import audit as find
    from lddyn.loading import load_config, load_generation_config, load_tokenizer

    columns: Any = "all" if fields == "all" else split(fields) or None
    config = generation_config = None
    if model is not None:
        config = load_config(model, trust_remote_code=trust_remote_code)
        generation_config = load_generation_config(model)
    audit_of_rows = find(
        load_tokenizer(name, trust_remote_code=trust_remote_code),
        rows.data,
        columns,
        rows.encoding,
        config=config,
        generation_config=generation_config,
    )
    usable = all(finding.severity != "error" for finding in audit_of_rows)
    passed = audit_of_rows.ok if strict else usable
    return Answer(audit_of_rows.to_dict(), [str(audit_of_rows)], passed)
