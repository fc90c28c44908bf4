"""How `make docs` builds the documentation: the API from docstrings, the CLI from typer."""

import re
import subprocess
import sys

import lddyn

project = "lddyn"
author = "the lddyn authors"
release = version = lddyn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "none"
default_role = "code"
smartquotes_action = "D"  # dashes, no quotes
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False

# Names of other packages (nothing is fetched while building) and of lddyn's insides, in signatures.
INSIDES = [
    "data.options.RowSettings",
    "data.read.PlacedRow",
    "data.tokenizer.Tokenizer",
    "engine.replay.(Batch|Replay)",
    "engine.anatomy.(Batch|Replay)",
    "engine.trace.Trace",
    "entk.lowrank.Ends",
    "entk.products.KernelProducts",
    "probes.endpoint.Request",
    "report.data.(StepData|ResponseData|CheckData)",
    "objectives.losses.(Pairs|Parameter|Score|Value)",
    "objectives.paired.Preference",
    "sets.motion.AdamMetric",
    "sets.readings.(Readings|SetReading)",
    "sets.rows.Gram",
    "sets.pairs.PairSet",
    "sets.step.SetStep",
    "sketches.projections.Term",
    "store.contents.Contents",
    "store.lock.Lock",
    "store.manifest.Manifest",
    "store.query.InnerProduct",
]
nitpick_ignore_regex = [
    (r"py:.*", r"(?!lddyn\.).*"),
    *((r"py:.*", f"lddyn.{name}") for name in INSIDES),
]

html_theme = "furo"
html_title = "lddyn"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def commands():
    """Every command of `lddyn` with its options, as typer writes them."""
    typer = [sys.executable, "-m", "typer", "lddyn.cli.app", "utils", "docs", "--name", "lddyn"]
    text = subprocess.run(typer, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"^# .*\n", "", text).replace("```console\n$ ", "```\n")
    text = re.sub(r"(?<![`\w-])--[a-z-]+(?![^`\n]*`:)", r"`\g<0>`", text)  # not a dash
    return re.sub(r"^(\* `\w+`): .*\.\.\.$", r"\1", text, flags=re.MULTILINE)  # cut sentences


def add_commands(app, docname, source):
    """The page cli.md ends with what the program itself says."""
    if docname == "cli":
        source[0] += commands()


SECTION = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Yields):")
# Code is left alone; "R. The" is no list.
MARKUP = re.compile(r"(`[^`]*`)|([|*])|(?<=\w)(_)(?!\w)|(?<=: )([A-Z])(?=\. )")


def as_rst(app, kind, name, obj, options, lines):
    """Docstrings are plain text with Markdown's code and tables: nothing else in them is markup."""
    out, section, literal = [], False, False
    for line in lines:
        blank_before = not out or not out[-1]
        if line and line[0] != " ":
            section, literal = bool(SECTION.fullmatch(line)), False
        elif line and blank_before and not section and not literal:  # a formula
            out += ["::", ""]
            literal = True
        if literal or ">>>" in line or line.lstrip().startswith(("...", "**")):
            out.append(line)
        elif line.startswith("|"):
            if blank_before:
                out += [".. list-table::", "   :header-rows: 1", ""]
            cells = re.split(r"(?<= )\|(?= )", line[1:-1])
            if not set(line) <= set("|- "):
                out += [
                    f"   {' ' if i else '*'} - {MARKUP.sub(escape, c.strip())}"
                    for i, c in enumerate(cells)
                ]
        else:
            out.append(MARKUP.sub(escape, line))
    lines[:] = out


def escape(found):
    """What is code stays; another sign is preceded by a backslash."""
    return found[1] or f"\\{found[0]}"


def setup(app):
    """Connect both; docstrings before napoleon reads their sections."""
    app.connect("source-read", add_commands)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
