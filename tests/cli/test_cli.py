"""The command line, end to end, on a tiny model and a tokenizer made here."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lddyn
from lddyn.cli.app import app

WORDS = ["<eos>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "?", "!"]
ROW = {
    "prompt": "a b c ?",
    "chosen": " d e f",
    "rejected": " d g",
    "other": " h i",
    "empty": "",
    "number": 3,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="!"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="!"
    )
    tokenizer.save_pretrained(path)
    zoo.build("llama", eos_token_id=0, bos_token_id=None).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    same = {**ROW, "rejected": ROW["chosen"]}
    lengthy = {"prompt": "a " * 80, "chosen": " b", "rejected": " c"}
    wide = {"prompt_ids": [3, 4], "chosen_ids": [5, 88888], "rejected_ids": [6, 0]}
    prepared = {"prompt_ids": [3, 4], "chosen_ids": [5, 7, 0], "rejected_ids": [6, 0]}
    completion = {"prompt": "a b ?", "completion": " c d"}
    lines = [ROW, same, lengthy, wide, prepared, completion, {"text": "a b c d"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + "{not json\n", encoding="utf-8")
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def decomposed(model, data, *more):
    """The JSON document of a run that must succeed."""
    result = call("decompose", "--model", model, "--data", data, "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


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


def test_dpo_answers_as_the_library_does(model, data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    document = decomposed(
        model,
        data,
        "--objective",
        "dpo",
        "--observe",
        "chosen,rejected,other",
        "--lr",
        1e-3,
        "--rule",
        "midpoint",
        "--beta",
        0.2,
        "--optimizer",
        "adamw",
    )
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    ex = lddyn.data.rows.encode_row(AutoTokenizer.from_pretrained(model), ROW, ["other"])
    dec = lddyn.decompose(
        lm,
        {k: ex[k] for k in ("chosen", "rejected", "other")},
        lddyn.DPO(ex["chosen"], ex["rejected"], beta=0.2),
        lr=1e-3,
        rule="midpoint",
        optimizer="adamw",
    )
    assert [o["name"] for o in document["observed"]] == ["chosen", "rejected", "other"]
    for told, truth in zip(document["observed"], dec, strict=True):
        assert told["delta_logp"] == pytest.approx(float(truth.delta_logp.sum()), rel=1e-4)
        assert told["measured"] == pytest.approx(told["delta_logp"], rel=0.1, abs=1e-4)
    assert document["verification"]["expected"] == 3
    assert document["optimizer"] == "AdamW" and document["row"] == 0
    assert any("y+ (chosen)" in sentence for sentence in document["explanation"])


def test_default_is_the_updates_own_responses(model, data):
    dpo = decomposed(model, data, "--objective", "dpo", "--no-verify")
    assert [o["name"] for o in dpo["observed"]] == ["chosen", "rejected"]
    assert "verification" not in dpo
    sft = decomposed(model, data, "--no-verify")
    assert [o["name"] for o in sft["observed"]] == ["chosen"]
    assert sft["observed"][0]["delta_logp"] > 0
    other = decomposed(model, data, "--update", "other", "--observe", "chosen", "--no-verify")
    assert other["update"] == ["other"]
    assert [o["name"] for o in other["observed"]] == ["chosen"]


@pytest.mark.parametrize(
    ("row", "objective", "names"),
    [(4, "dpo", ["chosen", "rejected"]), (5, "sft", ["completion"]), (6, "sft", ["text"])],
)
def test_other_data_formats(model, data, row, objective, names):
    found = decomposed(model, data, "--row", row, "--objective", objective, "--no-verify")
    assert [o["name"] for o in found["observed"]] == names


def test_float64_reference_model_and_clipping(model, data):
    found = decomposed(
        model,
        data,
        "--objective",
        "dpo",
        "--dtype",
        "float64",
        "--reference",
        model,
        "--max-grad-norm",
        0.01,
        "--memory",
        "64MiB",
        "--attention",
        "eager",
        "--no-verify",
    )
    assert found["dtype"] == "torch.float64" and found["clip_factor"] < 1
    assert found["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_adapter(model, data, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(lm, config).save_pretrained(tmp_path)
    found = decomposed(
        model,
        data,
        "--objective",
        "dpo",
        "--adapter",
        tmp_path,
        "--reference",
        "adapter-off",
        "--no-verify",
    )
    assert 0 < found["trainable_parameters"] < 1000
    assert found["reference_log_probs"] is not None
    again = decomposed(
        model,
        data,
        "--objective",
        "dpo",
        "--adapter",
        tmp_path,
        "--reference",
        "adapter-off",
        "--stream",
        "1MiB",
        "--lr",
        1e-3,
    )
    assert again["loss"] == found["loss"] and again["verification"]["dtype"] == "model dtype"


def test_output_folder_can_be_rendered_again(model, data, tmp_path):
    out = tmp_path / "run"
    result = call(
        "decompose",
        "--model",
        model,
        "--data",
        data,
        "--objective",
        "dpo",
        "--observe",
        "chosen,other",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.stderr
    for part in ("audit of row 0", "chosen", "One DPO step", "slope", "page:"):
        assert part in result.stdout
    names = {p.name for p in out.iterdir()}
    assert {
        "index.html",
        "summary.json",
        "decomposition.json",
        "decomposition.safetensors",
    } < names
    assert {"overview.png", "overview.pdf", "influence-1-other.png"} < names
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    page = (out / "index.html").read_text(encoding="utf-8")
    (out / "index.html").unlink()
    again = call("report", out)
    assert again.exit_code == 0, again.stderr
    assert "One DPO step" in again.stdout
    same = (out / "index.html").read_text(encoding="utf-8") == page
    assert same  # and no diff of a megabyte
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary


def errors(*arguments):
    """The one line that a refused call prints."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert len([x for x in lines if not x.startswith("warning: ")]) == 1, lines
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--row", 7], r"line 8: not JSON"),
        (["--row", -1], "--row must be >= 0"),
        (["--observe", "chosen,nope"], r"no field 'nope'; there are: chosen, rejected, other"),
        (["--observe", "empty"], "empty: the response is empty"),
        (["--observe", "number"], "number must be text"),
        (["--row", 2, "--objective", "dpo"], "length must be <= 64"),
        (["--row", 3, "--objective", "dpo"], "must be < vocab_size 89, got token id 88888"),
        (["--row", 4, "--objective", "dpo", "--observe", "other"], "has no field 'other'"),
        (["--row", 5, "--objective", "dpo"], "no field 'chosen'; there are: completion"),
        (["--objective", "ppo"], "--objective must be sft or dpo"),
        (["--update", "a,b"], "--update must name 1 field"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--lr", -1], "lr must be a positive number"),
        (["--rule", "euler"], "rule must be one of"),
        (["--optimizer", "lion"], "optimizer must be one of"),
        (["--attention", "magic"], "attention"),
        (["--memory", "much"], "memory"),
        (["--device", "abacus"], "--device must be a device of this machine"),
        (["--reference", "./nowhere", "--objective", "dpo"], "no such folder"),
        (["--adapter", "./nowhere"], "no such folder"),
        (["--stream", "512MiB"], "--stream needs --adapter"),
        (["--stream", "1KiB", "--adapter", "./nowhere"], "memory must hold"),
    ],
)
def test_bad_input_is_one_line(model, data, arguments, message):
    line = errors("decompose", "--model", model, "--data", data, "--json", *arguments)
    assert re.search(message, line), line


def test_row_out_of_range(model, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8")
    line = errors("decompose", "--model", model, "--data", path, "--row", 1)
    assert "--row must be below 1, the number of rows" in line


@pytest.mark.parametrize("what", ["missing", "empty", "file", "config", "weights"])
def test_model_that_cannot_be_loaded(model, data, tmp_path, what):
    path = tmp_path / "model"
    if what == "file":
        path.write_text("x", encoding="utf-8")
    elif what != "missing":
        path.mkdir()
    if what in ("config", "weights"):
        for file in model.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    if what == "config":
        (path / "config.json").write_text('{"model_type": "abacus"}', encoding="utf-8")
    if what == "weights":
        (path / "model.safetensors").write_bytes(b"junk")
    line = errors("decompose", "--model", path, "--data", data)
    assert "model" in line


def test_weights_that_are_missing_are_not_made_up(model, data, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    line = errors("decompose", "--model", tmp_path, "--data", data)
    assert "1 weights are not in its files" in line and "up_proj" in line


def test_weights_that_are_nan(model, data, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    line = errors("decompose", "--model", tmp_path, "--data", data, "--json")
    assert re.search("nan|finite", line, re.IGNORECASE)


def test_debug_shows_the_traceback(model):
    code = "from lddyn.cli import main; main()"
    arguments = ["decompose", "--model", str(model), "--data", "nowhere.jsonl"]
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LDDYN_LOG": "DEBUG"},
    )
    assert out.returncode == 2
    assert "Traceback" in out.stderr and "error: nowhere.jsonl: no such file" in out.stderr


def test_output_cannot_move_the_cursor(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    name = "ev\x1b[2Jil [bold]x[/bold]"
    path.write_text(json.dumps({**ROW, name: " d"}), encoding="utf-8")
    result = call("decompose", "--model", model, "--data", path, "--observe", name, "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "\x1b[2J" not in result.output and "[bold]x[/bold]" in result.output


def test_identical_pair_is_reported(model, data):
    found = decomposed(model, data, "--row", 1, "--objective", "dpo", "--no-verify")
    assert {f["problem"] for f in found["audit"]} >= {"identical_pair"}
    assert found["observed"][0]["delta_logp"] == pytest.approx(0.0, abs=1e-9)


def test_audit(model, data):
    result = call("audit", "--model", model, "--data", data)
    assert result.exit_code == 0, result.stderr
    for problem in ("unreadable_row", "identical_pair", "over_context", "token_out_of_range"):
        assert problem in result.stdout
    document = json.loads(call("audit", "--tokenizer", model, "--data", data, "--json").stdout)
    assert document["n_rows"] == 8 and "over_context" not in document["counts"]
    assert "give --model or --tokenizer" in errors("audit", "--data", data)
    assert "no such file" in errors("audit", "--data", "nowhere", "--model", model)


def test_env():
    document = json.loads(call("env", "--json").stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert str(Path.home()) not in json.dumps(document)
    assert "backends" in call("env").stdout


@pytest.fixture
def stores(tmp_path):
    """Two ranks' stores of three examples."""
    examples = [lddyn.Example([1, 2], [n, n + 1, n + 2]) for n in (10, 20, 30)]
    for rank in range(2):
        with lddyn.Store.create(tmp_path / f"rank{rank}", {"model": "toy"}, 2) as store:
            for i in range(rank, 3, 2):
                rows = torch.tensor([[1.0, 0.0], [0.0, -1.0], [2.0, 2.0]]) * (i + 1)
                store.append(examples[i], rows, index=i)
    return [tmp_path / "rank0", tmp_path / "rank1"], examples


def test_store_verify_ls_merge(stores, tmp_path):
    (a, b), _ = stores
    document = json.loads(call("store", "ls", a, b, "--json").stdout)
    assert [s["tokens"] for s in document["stores"]] == [6, 3]
    assert document["stores"][0]["identity"] == {"model": "toy"}
    assert '"model": "toy"' in call("store", "ls", a).stdout
    out = tmp_path / "out"
    merged = json.loads(call("store", "merge", a, b, "--out", out, "--json").stdout)
    assert merged["tokens"] == 9 and merged["examples"] == 3
    assert "9 tokens of 3 examples" in call("store", "merge", a, b, "--out", out).stdout
    sound = call("store", "verify", out, a)
    assert sound.exit_code == 0 and sound.stdout.count("nothing wrong") == 2
    shard = out / "shard-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    (a / "manifest.json").write_text("{}", encoding="utf-8")
    damaged = call("store", "verify", out, a, b, "--json")
    assert damaged.exit_code == 1
    problems = [s["problems"] for s in json.loads(damaged.stdout)["stores"]]
    assert "checksum does not match" in problems[0][0] and "manifest.json" in problems[1][0]
    assert problems[2] == []
    assert "no store here" in errors("store", "verify", tmp_path)
    assert "no store here" in errors("store", "ls", tmp_path, "--json")
    assert "out must be another folder" in errors("store", "merge", b, "--out", b)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Five rows, the last one like the first."""
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    rows = [{**ROW, "prompt": f"a {w} c ?"} for w in "bcdeb"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def built(model, pairs, store, *more):
    """The JSON document of a store that must be made."""
    result = call(
        "features",
        "build",
        "--model",
        model,
        "--data",
        pairs,
        "--store",
        store,
        "-k",
        900,
        "--json",
        *more,
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def files(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.name != "lock"}


def test_features_build_resumes_and_answers(model, pairs, tmp_path):
    first = built(model, pairs, tmp_path / "s", "--limit", 4)
    assert first["examples"] == first["written"] == 8 and first["processes"] == 1
    assert first["layout"]["sketch"]["k"] == 900
    whole = built(model, pairs, tmp_path / "s")
    assert whole["examples"] == 8 and whole["written"] == 0  # the last row is there already
    again = built(model, pairs, tmp_path / "again")
    assert again["tokens"] == first["tokens"] == 4 * (4 + 3)
    assert files(tmp_path / "again") == files(tmp_path / "s")
    arguments = "features", "query", tmp_path / "s", "--index", 2, "-k", 3
    entry = json.loads(call(*arguments, "--json").stdout)["queries"][0]
    hits = entry["hits"]
    assert len(hits) == 3 and all(hit["stderr"] > 0 for hit in hits)
    assert " ± " in call(*arguments, "--by", "sequence").stdout
    changed = errors(
        "features", "build", "--model", model, "--data", pairs, "--store", tmp_path / "s", "-k", 901
    )
    assert "layout" in changed


def test_features_build_by_sequence(model, pairs, tmp_path):
    document = built(
        model,
        pairs,
        tmp_path / "s",
        "--by",
        "sequence",
        "--fields",
        "chosen,other",
        "--kind",
        "lowrank",
        "--rank",
        2,
        "--rows",
        "bfloat16",
    )
    assert document["tokens"] == document["examples"] == 8 and document["dtype"] == "bfloat16"
    answer = call("features", "query", tmp_path / "s", "--index", 0, "-k", 2).stdout
    assert answer.startswith("all of ") and " ± " in answer


def test_features_build_leaves_out_what_does_not_fit(model, data, tmp_path):
    fits = tmp_path / "rows.jsonl"
    fits.write_text("".join(data.read_text().splitlines(True)[:4]), encoding="utf-8")
    arguments = ["--model", model, "--data", fits, "--store", tmp_path / "s", "-k", 900]
    assert "row 2, chosen: length must be <= 64" in errors("features", "build", *arguments)
    document = built(model, fits, tmp_path / "s", "--skip")
    assert document["examples"] == 3 and len(document["left_out"]) == 3  # one is there twice


def test_plan_by_sequence(model, pairs):
    arguments = ["plan", "--model", model, "--data", pairs, "--by", "sequence"]
    document = json.loads(call(*arguments, "--json").stdout)
    assert document["by"] == "sequence" and document["shape"] == [8, 8]
    assert "8 x 8 sequence pairs" in call(*arguments).stdout
    assert "--by must be token or sequence" in errors(*arguments[:-1], "word")


@pytest.mark.parametrize("world", [1, 2])
def test_features_build_goes_on_with_more_examples(model, pairs, tmp_path, monkeypatch, world):
    """From fewer than what a layout looks at; also by several ranks, from a finished store."""
    for more in (("--limit", 1), ()):
        built(model, pairs, tmp_path / "alone", *more)

    def build(*more):
        for rank in reversed(range(world)):  # one after the other, the one that merges last
            ranks = contextlib.nullcontext((rank, world, lambda: None))
            monkeypatch.setattr("lddyn.cli.app._ranks", lambda ranks=ranks: ranks)
            result = call(
                "features",
                "build",
                "--model",
                model,
                "--data",
                pairs,
                "--store",
                tmp_path / "s",
                "-k",
                900,
                "--json",
                *more,
            )
            assert result.exit_code == 0, result.stderr
        assert not list(tmp_path.glob("s.rank-*"))
        return json.loads(result.stdout)

    first = build("--limit", 1)
    again = build("--limit", 1)
    assert first["examples"] == again["examples"] == 2 and again["written"] == 0
    whole = build()
    assert whole["examples"] == 8 and whole["layout"] == first["layout"]
    store, alone = (lddyn.Store.open(tmp_path / name) for name in ("s", "alone"))
    assert store.example_ids == alone.example_ids and torch.equal(store.rows(), alone.rows())


@pytest.mark.slow
def test_features_build_on_two_ranks_makes_the_same_files(model, pairs, tmp_path):
    built(model, pairs, tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
        "-m",
        "lddyn",
        "features",
        "build",
        "--model",
        model,
        "--data",
        pairs,
        "--store",
        tmp_path / "two",
        "-k",
        "900",
        "--json",
    ]
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert not list(tmp_path.glob("two.rank-*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--by", "word"], "--by must be token or sequence, got 'word'"),
        (["--kind", "hash"], "kind must be one of twosided"),
        (["-k", 9], "k must be at least"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--rows", "int8"], "dtype must be one of float32"),
        (["--fields", "colour"], "colour"),
        (["--device", "abacus"], "--device must be a device of this machine"),
        (["--data", "nowhere"], "nowhere: no such file"),
        (["--memory", "1KB"], "memory must be at least"),
    ],
)
def test_features_build_refuses(model, pairs, tmp_path, more, message):
    arguments = ["--model", model, "--data", pairs, "--store", tmp_path / "s", "-k", 900]
    assert message in errors("features", "build", *arguments, *more)


def test_features_query(stores, tmp_path):
    paths, examples = stores
    store = lddyn.Store.merge(paths, tmp_path / "all")
    arguments = ("features", "query", store.path, "--index", 0, "-k", 2)
    document = json.loads(call(*arguments, "--token", 2, "--sign", "up", "--json").stdout)
    (asked,) = document["queries"]
    assert asked["token_id"] == 12 and document["example_id"] == examples[0].content_id
    assert [(h["example_index"], h["token_id"], h["value"]) for h in asked["hits"]] == [
        (2, 32, 24.0),
        (1, 22, 16.0),
    ]
    text = call(*arguments, "--by", "sequence", "--own").stdout
    assert text.count("of " + examples[0].content_id) == 3 and "all 3 tokens of example 2" in text
    again = call("features", "query", store.path, "--example", examples[0].content_id[:9], "--own")
    assert "token 2 (id 12) of" in again.stdout
    for more, message in [
        ([], "give --example or --index"),
        (["--index", 9], "--index must be the place of a stored example, got 9"),
        (["--example", "zz"], "'zz' begins 0"),
        (["--index", 0, "--token", 5], r"--token must be one of [0, 1, 2], got 5"),
        (["--index", 0, "--sign", "sideways"], "sign must be one of"),
    ]:
        assert message in errors("features", "query", store.path, *more)


def test_report_without_a_run(tmp_path):
    assert "no decomposition.json" in errors("report", tmp_path)


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_CACHE_DIR", str(tmp_path / "cache"))
    began = time.perf_counter()
    result = call("demo", "--out", tmp_path / "demo", "--quick", "--json")
    assert result.exit_code == 0, result.stderr
    assert time.perf_counter() - began < 180
    summary = json.loads(result.stdout)
    assert [s["explained"] for s in summary["steps"]] == [False, True]
    for step in ("sft", "dpo"):
        assert summary[step]["rule"] == "midpoint"
        assert summary[step]["verification"]["relative_error"] < 0.05
        assert (tmp_path / "demo" / step / "influence-0-chosen.png").is_file()
    # the explained step is the step that was taken
    taken = summary["steps"][1]
    told = {o["name"]: o["delta_logp"] for o in summary["dpo"]["observed"]}
    assert told["chosen"] == pytest.approx(taken["y+"], rel=0.05, abs=1e-3)
    assert told["rejected"] == pytest.approx(taken["y-"], rel=0.05, abs=1e-3)
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 2
    assert call("report", tmp_path / "demo").exit_code == 0
    same = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8") == page
    assert same
