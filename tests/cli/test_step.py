"""`lddyn decompose` and `lddyn massflow`, end to end."""

import json
import re

import pytest
from commands import ROW, call, errors
from safetensors.torch import load_file, save_file

import lddyn


def decomposed(model, data, *more):
    """The JSON document of a run that must succeed."""
    result = call("decompose", "--model", model, "--data", data, "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


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
    for part in ("audit of row 0", "chosen", "One dpo step", "slope", "page:"):
        assert part in result.stdout
    names = {p.name for p in out.iterdir()}
    assert {
        "index.html",
        "summary.json",
        "decomposition.json",
    } < names
    assert list(out.glob("decomposition.*.safetensors"))
    assert {"overview.png", "overview.pdf", "influence-1-other.png"} < names
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    page = (out / "index.html").read_text(encoding="utf-8")
    (out / "index.html").unlink()
    again = call("report", out)
    assert again.exit_code == 0, again.stderr
    assert "One dpo step" in again.stdout
    same = (out / "index.html").read_text(encoding="utf-8") == page
    assert same  # and no diff of a megabyte
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--row", 7], r"line 8: not JSON"),
        (["--row", -1], "'--row': Input should be greater than or equal to 0"),
        (["--observe", "chosen,nope"], r"no field 'nope'; there are: chosen, rejected, other"),
        (["--observe", "empty"], "empty: the response is empty"),
        (["--observe", "number"], "number must be text"),
        (["--row", 2, "--objective", "dpo"], "length must be <= 64"),
        (["--row", 3, "--objective", "dpo"], "must be < vocab_size 89, got token id 88888"),
        (["--row", 4, "--objective", "dpo", "--observe", "other"], "has no field 'other'"),
        (["--row", 5, "--objective", "dpo"], "no field 'chosen'; there are: completion"),
        (["--objective", "ppo"], "'--objective': 'ppo' is not one of 'sft', 'unlikelihood', 'dpo'"),
        (["--update", "a,b"], "--update must name 1 field"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of 'float32', 'bfloat16'"),
        (["--lr", -1], "lr must be a positive number"),
        (["--rule", "euler"], "'--rule': 'euler' is not one of 'start', 'midpoint', 'simpson'"),
        (["--optimizer", "lion"], "'--optimizer': 'lion' is not one of 'sgd', 'adam', 'adamw'"),
        (["--attention", "magic"], "'--attention': 'magic' is not one of 'lddyn', 'eager'"),
        (["--memory", "much"], "memory"),
        (["--device", "abacus"], "device must be one of this machine, .* got 'abacus'"),
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


def test_massflow_answers_as_the_library_does(model, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = ("--objective", "dpo", "--lr", 1e-3, "--top", 3)
    result = call("massflow", "--model", model, "--data", data, *given, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document["responses"]) == ["chosen", "rejected"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    ex = lddyn.encode_row(tokenizer, ROW)
    flow = lddyn.massflow(
        AutoModelForCausalLM.from_pretrained(model).eval(),
        ex["rejected"],
        lddyn.DPO(ex["chosen"], ex["rejected"]),
        lr=1e-3,
        top=3,
    )
    told, truth = document["responses"]["rejected"]["summary"], flow.summary()
    for key in ("label", "argmax", "top", "rest", "entropy"):
        assert told["measured"][key] == pytest.approx(truth["measured"][key], abs=1e-6)
    entry = document["responses"]["rejected"]["by_position"][0]
    assert len(entry["top"]) == 3 and entry["token"] == ex["rejected"].token_texts[0]
    assert json.loads((tmp_path / "massflow.json").read_text()) == document


def test_massflow_speaks(model, data):
    arguments = ("--objective", "ipo", "--beta", 0.2, "--observe", "other")
    result = call("massflow", "--model", model, "--data", data, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "other: Δπ measured (predicted)" in result.stdout
    assert "the response's own tokens moved by" in result.stdout


@pytest.mark.parametrize("objective", ["ipo", "simpo", "dpo+nll"])
def test_every_loss_of_the_table_can_be_decomposed(model, data, objective):
    found = decomposed(model, data, "--objective", objective, "--no-verify")
    assert found["objective"] == objective
    assert [o["name"] for o in found["observed"]] == ["chosen", "rejected"]


@pytest.mark.case("KTO on single responses with a label")
def test_a_labelled_row_takes_ktos_step_and_no_step_towards_what_is_not_wanted(model, tmp_path):
    file = tmp_path / "labelled.jsonl"
    rows = [{"prompt": "a b ?", "completion": " c d", "label": flag} for flag in (True, False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kto = [
        decomposed(model, file, "--objective", "kto", "--row", row, "--no-verify") for row in (0, 1)
    ]
    assert kto[0]["observed"][0]["delta_logp"] > 0 > kto[1]["observed"][0]["delta_logp"]
    assert decomposed(model, file, "--no-verify")["observed"][0]["delta_logp"] > 0
    result = call("decompose", "--model", model, "--data", file, "--row", 1, "--no-verify")
    assert result.exit_code == 2 and "the row's label is false" in result.stderr
    found = json.loads(call("diagnose", "--model", model, "--data", file, "--json").stdout)
    assert found["summary"]["objective"] == "kto"
    assert [row["wanted"] for row in found["sequences"]] == [1, -1]


@pytest.mark.case("settings of a trainer's config")
def test_a_step_like_a_file_of_arguments(model, data, tmp_path):
    file = tmp_path / "dpo.yaml"
    file.write_text(
        "trainer: dpo\nloss_type: [ipo]\nbeta: 0.5\nlearning_rate: 2.0e-3\nmax_grad_norm: 0.01\n"
        "use_weighting: true\noptim: sgd\n"
    )
    like = decomposed(model, data, "--like", file, "--no-verify")
    hand = ("--objective", "ipo", "--beta", 0.5, "--lr", 2e-3, "--max-grad-norm", 0.01)
    given = decomposed(model, data, *hand, "--no-verify")
    assert like["objective"] == "ipo" and like["lr"] == 2e-3
    for a, b in zip(like["observed"], given["observed"], strict=True):
        assert a["delta_logp"] == pytest.approx(b["delta_logp"], rel=1e-6)
    assert any("WPO" in sentence for sentence in like["explanation"])
    other = decomposed(model, data, "--like", file, "--beta", 0.25, "--lr", 1e-3, "--no-verify")
    assert other["beta"] == 0.25 and other["lr"] == 1e-3
    assert other["objective"] == "ipo" and other["optimizer"] == "SGD"


@pytest.mark.case("a group of responses with rewards")
def test_a_row_without_a_response_names_the_objective_and_the_group(model, tmp_path):
    file = tmp_path / "group.jsonl"
    file.write_text(json.dumps({"prompt": "a ?", "completions": [" b", " c"], "rewards": [1, 0]}))
    result = call("decompose", "--model", model, "--data", file)
    assert result.exit_code == 2
    assert "no completion or chosen, which --objective sft reads" in result.stderr
    assert "lddyn.GRPO" in " ".join(result.stderr.split())


@pytest.mark.case("KTO labels as words or numbers")
def test_a_label_in_words_is_read_as_it_means(model, tmp_path):
    """ "false" is no true value: the step lowers such a completion."""
    file = tmp_path / "labelled.jsonl"
    labels = ({"label": "false"}, {"kto_tag": 0}, {"label": "True"})
    rows = [{"prompt": "a b ?", "completion": " c d", **label} for label in labels]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, sign in ((0, -1), (1, -1), (2, 1)):
        told = decomposed(model, file, "--objective", "kto", "--row", number, "--no-verify")
        assert told["observed"][0]["delta_logp"] * sign > 0
    refused = call("decompose", "--model", model, "--data", file, "--row", 0)
    assert refused.exit_code == 2 and "label is false" in " ".join(refused.stderr.split())
