"""What README, docs and examples show: code runs, commands and names exist, nothing is left out."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import lddyn
from lddyn.cli.app import app
from lddyn.demo import world as demo
from lddyn.files import sealed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in PAGES if "_build" not in p.parts}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# An example that watches nothing must fail.
pytestmark = pytest.mark.filterwarnings("error:lddyn stopped")


@pytest.fixture(scope="module")
def world(small_worlds):
    """The demo's world after little training, where a program that builds it finds it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield demo.build_world(small_worlds, progress=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Stands for "path/or/name": a model that knows nothing, with the world's tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(world.tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
        eos_token_id=world.tokenizer.eos_token_id,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    world.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def workplace(world, folder, tmp_path, monkeypatch):
    """A folder with the data files, models and watched run that pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDDYN_CACHE_DIR", str(world.path.parent))
    rows = "".join(json.dumps(row) + "\n" for row in world.preference_pairs[:4])
    for name in ("pairs.jsonl", "probes.jsonl", "formal_prob_train.jsonl"):
        Path(name).write_text(rows)
    Path("RUN", "lddyn").mkdir(parents=True)
    passes = [{"step": step, "change/chosen": -0.5 * step} for step in range(3)]
    Path("RUN", "lddyn", "dynamics.jsonl").write_text(
        "".join(sealed(row, indent=None) for row in passes)
    )
    for name in ("SFT", "RUN/checkpoint-8", "RUN/checkpoint-32"):
        Path(name).symlink_to(folder)
    return tmp_path


# --------------------------------------------------------------------------- Python


class Service(BaseHTTPRequestHandler):
    """Says the same to every chat."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        text = json.dumps({"choices": [{"message": {"content": "Reply."}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def given(world, folder, workplace):
    """What blocks take for granted: a model, its tokenizer, some data."""
    import transformers

    rows = world.preference_pairs[:3]
    pairs = []
    for row in rows:
        both = lddyn.encode_row(world.tokenizer, row)
        pairs.append((both["chosen"], both["rejected"]))
    examples = [example for pair in pairs[:2] for example in pair]
    return {
        "lddyn": lddyn,
        "torch": torch,
        "model": transformers.AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": world.tokenizer,
        "rows": rows,
        "pairs": pairs,
        "examples": examples,
        "chosen": pairs[0][0],
        "rejected": pairs[0][1],
        "ex_o": pairs[0][0],
        "ex_u": pairs[0][1],
        "labels": [True, False] * 2,
        "rewards": [1.0, 0.0] * 2,
        "held_out": [pairs[2][0]],
    }


def of_store(given):
    feats = lddyn.features(given["model"], given["examples"], lddyn.Sketch(k=1024))
    places = dict(zip((e.content_id for e in given["examples"]), range(99), strict=False))

    def rows_of(example):
        return feats.rows[feats.tokens.example_index == places[example.content_id]]

    return {"feats": feats, "rows_of": rows_of, "rows": rows_of(given["chosen"])}


def of_watch(given):
    import datasets
    from trl import DPOConfig
    from trl import DPOTrainer as Trainer

    def build(_):
        rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in given["rows"]]
        config = DPOConfig(
            "run",
            max_steps=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=2,
        )
        data = datasets.Dataset.from_list(rows)
        return Trainer(
            given["model"], args=config, train_dataset=data, processing_class=given["tokenizer"]
        )

    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()  # of trainers before
    ids = torch.tensor([given["chosen"].ids])
    return {
        "DPOTrainer": build,
        "accelerator": accelerate.Accelerator(cpu=True),
        "optimizer": torch.optim.AdamW(given["model"].parameters()),
        "batches": torch.utils.data.DataLoader([{"input_ids": ids[0], "labels": ids[0]}] * 2),
    }


MORE = {
    "docs/diagnose.md": lambda given: {"measured": torch.randn(len(given["pairs"]))},
    "docs/store.md": of_store,
    "docs/watch.md": of_watch,
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p, text in PAGES.items() if blocks(text, "python")])
def test_python_blocks_run(page, given, folder, service):
    names = {"__name__": page, **given, **MORE.get(page, lambda _: {})(given)}
    for block in blocks(PAGES[page], "python"):
        code = block.replace("path/or/name", folder)
        code = code.replace("http://localhost:8000/v1", service)
        code = code.replace("worst(20)", "worst(2)")  # of three pairs
        exec(compile(code, page, "exec"), names)


NAME = re.compile(r"(?<![\w./-])lddyn(?:\.[A-Za-z_]\w*)+")
# In one fresh interpreter, whose imports take many seconds: names, before anything is imported but
# lddyn, and then the examples, one after another.
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
import lddyn
missing, outcomes = {}, {}
for name in json.load(sys.stdin):
    here = lddyn
    for part in name.split(".")[1:]:
        try:
            here = getattr(here, part)
        except AttributeError as error:
            missing[name] = str(error)
            break
for path in sys.argv[1:]:
    said, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(path, run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    outcomes[path] = [said.getvalue(), error]
print(json.dumps({"missing": missing, "outcomes": outcomes}))
"""


@pytest.fixture(scope="module")
def said(world, made_once):
    """What a fresh interpreter says of the names that pages write, and of the examples."""
    names = sorted({name for text in PAGES.values() for name in NAME.findall(text)})
    about = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    about["LDDYN_CACHE_DIR"] = str(world.path.parent)

    def run(folder):
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL, *map(str, EXAMPLES)],
            input=json.dumps(names),
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | about,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        (folder / "said.json").write_text(done.stdout.splitlines()[-1])

    return json.loads((made_once("pages", run) / "said.json").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_names_in_code_exist(page, said):
    """As a reader writes them: attributes of lddyn, after `import lddyn` and nothing else."""
    missing = said["missing"]
    assert {name: missing[name] for name in NAME.findall(PAGES[page]) if name in missing} == {}


def test_every_page_is_in_a_table_of_contents():
    listed = {"docs/index.md"}
    for page, text in PAGES.items():
        for tree in re.findall(r"^```{toctree}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for entry in re.findall(r"^(?!:)(?:.* <)?([\w/-]+)>?$", tree, re.MULTILINE):
                listed.add(os.path.normpath(f"{os.path.dirname(page)}/{entry}.md"))
    assert {page for page in PAGES if page.startswith("docs/")} <= listed


def test_every_public_name_is_in_the_api():
    text = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    documented = set(re.findall(r"auto\w+:: lddyn\.(\S+)", text))
    assert set(lddyn.__all__) - {"__version__"} <= documented


# --------------------------------------------------------------------------- commands

COMMAND = typer.main.get_command(app)
WORD = re.compile(r"(?:lddyn|make|torchrun|python|pip)\b")


def lines(text):
    """Shell lines of a page: those of blocks without a language, and of code in a sentence."""
    shell = blocks(text, "") + blocks(text, "bash")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    shell += re.findall(r"^(?:    .*\n)+", text, re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", "\n".join(shell))
    spans = re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text)
    in_blocks = [line.strip() for line in joined.splitlines()]
    in_text = [" ".join(span.split()) for span in spans if " " in span]
    return [x for x in in_blocks if WORD.match(x)], [x for x in in_text if WORD.match(x)]


def check_lddyn(words):
    """Walks the commands as the program does; what stands for something else is in capitals."""
    here = COMMAND
    while words and hasattr(here, "commands") and not words[0].startswith("-"):
        if re.fullmatch(r"[A-Z]+|…", words[0]):
            return
        assert words[0] in here.commands, f"no command {words[0]!r}: {sorted(here.commands)}"
        here = here.commands[words.pop(0)]
        if words[:1] == ["|"]:  # verify | ls | merge
            return
    options = {o for p in here.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in options, f"no option {word}: {sorted(options)}"


def check(line):
    words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "lddyn":
        check_lddyn(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        assert all(w in source for w in words[2:] if w.startswith("--")), words


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    in_blocks, in_text = lines(PAGES[page])
    for line in in_blocks + in_text:
        check(line)


RUN = (
    "decompose",
    "massflow",
    "ntk",
    "audit",
    "diagnose",
    "filter",
    "plan",
    "features",
    "env",
    "report",
)
SHELLS = {
    page: found
    for page, text in PAGES.items()
    if (found := [x for x in lines(text)[0] if x.startswith("lddyn") and x.split()[1] in RUN])
}


@pytest.mark.parametrize("page", SHELLS)
def test_commands_of_blocks_run(page, folder, workplace):
    for line in SHELLS[page]:
        line = line.replace("--drop 20", "--drop 2")  # of four rows
        words = shlex.split(re.sub(r"\[.*?\]", "", line), comments=True)[1:]
        places = {"PATH_OR_NAME", "MODEL", "PATH"}
        result = CliRunner().invoke(app, [folder if word in places else word for word in words])
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception}"
        assert "\\u000a" not in result.output  # lines said as one


def test_the_page_of_commands_has_them_all():
    text = runpy.run_path(str(ROOT / "docs" / "conf.py"))["commands"]()
    sections = dict(re.findall(r"^#+ `(lddyn[^`]*)`\n(.*?)(?=^#|\Z)", text, re.M | re.S))

    def walk(command, name):
        for param in command.params:
            if param.opts[0].startswith("-"):
                assert any(f"`{option}" in sections[name] for option in param.opts), param.opts
        for word, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {word}")

    for word, inner in COMMAND.commands.items():
        walk(inner, f"lddyn {word}")


# --------------------------------------------------------------------------- examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, said):
    printed, error = said["outcomes"][str(path)]
    assert not error
    assert printed.strip()
    assert len(path.read_text().splitlines()) <= 60
