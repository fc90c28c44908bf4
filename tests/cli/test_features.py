"""`lddyn features … | store … | plan`, end to end."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from commands import call, errors
from ranks import run_ranks

import lddyn
from lddyn.ranks import Ranks


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


def built(model, pairs, store, *more):
    """The JSON document of a store that must be made."""
    result = call(
        "features",
        "build",
        "--model",
        model,
        "--data",
        pairs,
        "--out",
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
    arguments = "features", "query", tmp_path / "s", "--index", 2, "--count", 3
    entry = json.loads(call(*arguments, "--json").stdout)["queries"][0]
    hits = entry["hits"]
    assert len(hits) == 3 and all(hit["stderr"] > 0 for hit in hits)
    assert " ± " in call(*arguments, "--by", "sequence").stdout
    changed = errors(
        "features", "build", "--model", model, "--data", pairs, "--out", tmp_path / "s", "-k", 901
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
        "--store-dtype",
        "bfloat16",
    )
    assert document["tokens"] == document["examples"] == 8 and document["dtype"] == "bfloat16"
    answer = call("features", "query", tmp_path / "s", "--index", 0, "--count", 2).stdout
    assert answer.startswith("all of ") and " ± " in answer


def test_features_build_leaves_out_what_does_not_fit(model, data, tmp_path):
    fits = tmp_path / "rows.jsonl"
    fits.write_text("".join(data.read_text().splitlines(True)[:4]), encoding="utf-8")
    arguments = ["--model", model, "--data", fits, "--out", tmp_path / "s", "-k", 900]
    assert "row 2, chosen: length must be <= 64" in errors(
        "features", "build", *arguments, "--strict"
    )
    named = call("features", "build", *arguments).stderr
    document = built(model, fits, tmp_path / "s")
    assert document["examples"] == 3 and len(document["left_out"]) == 3  # one is there twice
    assert all(f"left out: {line}" in named for line in document["left_out"])


def test_plan_by_sequence(model, pairs):
    arguments = ["plan", "--model", model, "--data", pairs, "--by", "sequence"]
    document = json.loads(call(*arguments, "--json").stdout)
    assert document["by"] == "sequence" and document["shape"] == [8, 8]
    assert "8 x 8 sequence pairs" in call(*arguments).stdout
    assert "'--by': 'word' is not one of 'token', 'sequence'" in errors(*arguments[:-1], "word")


@pytest.mark.parametrize("world", [1, 2])
def test_features_build_goes_on_with_more_examples(model, pairs, tmp_path, monkeypatch, world):
    """From fewer than what a layout looks at; also by several ranks, from a finished store."""
    for more in (("--limit", 1), ()):
        built(model, pairs, tmp_path / "alone", *more)

    def build(*more):
        for rank in reversed(range(world)):  # one after the other, the one that merges last
            ranks = contextlib.nullcontext(Ranks(rank, world))
            monkeypatch.setattr(Ranks, "of_torchrun", lambda ranks=ranks: ranks)
            result = call(
                "features",
                "build",
                "--model",
                model,
                "--data",
                pairs,
                "--out",
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


def test_features_build_on_two_ranks_makes_the_same_files(model, pairs, tmp_path):
    built(model, pairs, tmp_path / "one")
    arguments = ["--model", model, "--data", pairs, "--out", tmp_path / "two", "-k", 900, "--json"]

    def build():
        result = call("features", "build", *arguments)
        assert result.exit_code == 0, result.stderr
        print(result.stdout, end="")

    first, second = run_ranks(build, tmp_path)
    assert json.loads(first)["processes"] == 2 and not second
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert not list(tmp_path.glob("two.rank-*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--by", "word"], "'--by': 'word' is not one of 'token', 'sequence'"),
        (["--kind", "hash"], "'--kind': 'hash' is not one of 'twosided', 'lowrank'"),
        (["-k", 9], "k must be at least"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of 'float32'"),
        (["--store-dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16'"),
        (["--fields", "colour"], "colour"),
        (["--device", "abacus"], "device must be one of this machine"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--memory", "1KB"], "memory must be at least"),
    ],
)
def test_features_build_refuses(model, pairs, tmp_path, more, message):
    arguments = ["--model", model, "--data", pairs, "--out", tmp_path / "s", "-k", 900]
    assert message in errors("features", "build", *arguments, *more)


def test_features_query(stores, tmp_path):
    paths, examples = stores
    store = lddyn.Store.merge(paths, tmp_path / "all")
    arguments = ("features", "query", store.path, "--index", 0, "--count", 2)
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
        (["--index", 9], "--index must be the number of a stored example, got 9"),
        (["--example", "zz"], "got 'zz', which 0 stored"),
        (["--index", 0, "--token", 5], r"--token must be one of [0, 1, 2], got 5"),
        (
            ["--index", 0, "--sign", "sideways"],
            "'--sign': 'sideways' is not one of 'up', 'down', 'both'",
        ),
    ]:
        assert message in errors("features", "query", store.path, *more)
