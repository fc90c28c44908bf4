"""Calling the command line in this process."""

from typer.testing import CliRunner

from lddyn.cli.app import app

ROW = {
    "prompt": "a b c ?",
    "chosen": " d e f",
    "rejected": " d g",
    "other": " h i",
    "empty": "",
    "number": 3,
}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def errors(*arguments):
    """The one line that a refused call prints."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert len([x for x in lines if not x.startswith("warning: ")]) == 1, lines
    return lines[-1]
