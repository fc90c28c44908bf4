"""What all commands have in common: help, version, one-line errors, options of one meaning."""

import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import typer
from commands import call, errors

import lddyn
from lddyn.cli.app import app


def test_help_is_fast_and_light():
    code = """
import sys, time
began = time.perf_counter()
from lddyn.cli.app import main
sys.argv = ["lddyn", "decompose", "--help"]
try:
    main()
except SystemExit as leave:
    assert not leave.code
heavy = [m for m in ("torch", "transformers", "numpy", "matplotlib") if m in sys.modules]
print("HEAVY", heavy, "SECONDS", time.perf_counter() - began)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--observe" in out.stdout and "HEAVY []" in out.stdout
    seconds = float(out.stdout.split("SECONDS")[1])
    assert seconds < 1.0 or os.getloadavg()[0] > os.cpu_count()


def test_version():
    assert call("--version").stdout == f"lddyn {lddyn.__version__}\n"


def test_debug_shows_the_traceback(model, data):
    code = "from lddyn.cli import main; main()"
    arguments = ["decompose", "--model", str(model), "--data", str(data), "--row", "7"]
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LDDYN_LOG": "DEBUG"},
    )
    assert out.returncode == 2
    assert "Traceback" in out.stderr and "line 8: not JSON" in out.stderr


def commands(command, path=()):
    """Every command with its path: ("features", "build"), …"""
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name, child in inner.items():
        yield from commands(child, (*path, name))


ALL = dict(commands(typer.main.get_command(app)))


def test_an_option_means_one_thing():
    """The same type, and the same number of values, wherever it stands."""
    seen = {}
    for path, command in ALL.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                for name in (*parameter.opts, *parameter.secondary_opts):
                    seen.setdefault(name, {})[path] = str(parameter.bare_type()), parameter.nargs
    loose = {  # texts that the commands check themselves
        "--data",  # lab: of the authors' format, or the demo's
    }
    for name, uses in seen.items():
        kinds = {kind for kind, _ in uses.values()}
        assert len(kinds) == 1 or name in loose, (name, uses)


def test_every_command_has_json_and_help():
    for path, command in ALL.items():
        assert command.help, path
        options = {name for parameter in command.params for name in parameter.opts}
        assert "--json" in options, path
        for parameter in command.params:
            assert parameter.help or parameter.name == "help", (path, parameter.name)


def test_objective_names_are_those_of_the_table():
    from lddyn.cli.options import ObjectiveName
    from lddyn.objectives import ALIASES, LOSSES

    assert get_args(ObjectiveName) == (*LOSSES, *ALIASES)


def test_kinds_of_sketches_are_those_of_the_library():
    from lddyn.cli.options import SketchKind
    from lddyn.sketches.sketch import KINDS

    assert get_args(SketchKind) == KINDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["massflov"], "No such command 'massflov'. Did you mean 'massflow'?"),
        (["decompose", "--colour"], "No such option: --colour"),
        (["decompose", "--data", __file__], "Missing option '--model'"),
        (["--colour"], "No such option: --colour"),
        (["features", "builds"], "No such command 'builds'"),
        (["env", "--json", "more"], "Got unexpected extra argument"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message):
    line = errors(*arguments)
    assert message in line and "--help lists the options" in line


def test_no_command_prints_the_help():
    assert "decompose" in call().output


def test_json_is_the_only_thing_on_standard_output(monkeypatch):
    """Whatever a library prints while a command works goes to standard error."""
    from lddyn import environment

    env = environment.env

    def noisy():
        print("hello from a library")
        return env()

    monkeypatch.setattr(environment, "env", noisy)
    result = call("env", "--json")
    assert json.loads(result.stdout)["versions"] and "hello" in result.stderr
