"""`lddyn ntk`, end to end."""

import json

import pytest
import torch
from commands import ROW, call, errors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lddyn


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    other = {**ROW, "prompt": "a z ?", "chosen": " k l m n"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, other)), encoding="utf-8")
    return path


def kernel(model, rows, *more):
    """The JSON document of a run that must succeed."""
    result = call("ntk", "--model", model, "--data", rows, "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_answers_as_the_library_does(model, rows, tmp_path):
    wanted = ("--observe", "other", "--update", "chosen", "--update-row", 1)
    document = kernel(
        model, rows, *wanted, "--norms", "tokens", "--lowrank", 4, "--out", tmp_path / "out"
    )
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    observed = lddyn.encode(tokenizer, ROW["prompt"], ROW["other"])
    learned = lddyn.encode(tokenizer, "a z ?", " k l m n")
    K = lddyn.ntk(lm, observed, learned)
    torch.testing.assert_close(torch.tensor(document["gram"]), K.gram(), rtol=1e-4, atol=1e-6)
    norms = K.frobenius()
    told = torch.tensor(document["norms"]["value"], dtype=torch.float64)
    torch.testing.assert_close(told, norms.value, rtol=1e-4, atol=0)
    whole = K.frobenius(reduce="all")
    assert document["norm"]["value"] == pytest.approx(float(whole.value), rel=1e-3)
    assert document["shape"] == list(K.shape)
    assert document["observed"] == {
        "row": 0,
        "field": "other",
        "token_ids": list(observed.targets),
        "tokens": list(observed.token_texts),
    }
    assert document["update"]["row"] == 1 and document["update"]["field"] == "chosen"

    saved = load_file(tmp_path / "out" / "kernel.safetensors")
    assert torch.equal(saved["gram"], torch.tensor(document["gram"]))
    assert set(saved) == {"gram", "norms", "norms_stderr"}
    assert json.loads((tmp_path / "out" / "ntk.json").read_text())["gram"] == document["gram"]
    factors = lddyn.LowRank.load(tmp_path / "out" / "lowrank", lm)
    assert factors.rank == document["lowrank"]["rank"] == 4
    assert document["lowrank"]["residual"]["value"] < document["norm"]["value"]


def test_one_response_with_itself(model, rows):
    document = kernel(model, rows, "--norms", "none")
    gram = torch.tensor(document["gram"])
    torch.testing.assert_close(gram, gram.T)
    assert bool((gram.diagonal() > 0).all())
    assert document["norm"] is None and document["norms"] is None and document["lowrank"] is None


def test_speaks(model, rows):
    wanted = ("--observe", "chosen", "--update", "rejected", "--lowrank", 2)
    result = call("ntk", "--model", model, "--data", rows, *wanted)
    assert result.exit_code == 0, result.stderr
    assert "K between chosen of row 0 (observed, 4 tokens) and rejected of row 0" in result.stdout
    assert "‖K‖ of the whole kernel" in result.stdout and "(standard error)" in result.stdout
    assert "Factors of rank 2 leave" in result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--observe", "nope"], "row 0 has no field 'nope'"),
        (["--update", "empty"], "empty: the response is empty"),
        (["--update-row", 7], "--update-row must be below 2"),
        (["--observe", "chosen,rejected"], "--update must name 1 field"),
        (["--rtol", 0], "rtol"),
        (["--norms", "some"], "'some' is not one of 'whole', 'tokens', 'none'"),
    ],
)
def test_refuses(model, rows, more, message):
    assert message in errors("ntk", "--model", model, "--data", rows, *more)
