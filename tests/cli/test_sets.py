"""`lddyn diagnose | filter`, end to end."""

import json

import pytest
from commands import call, errors

import lddyn


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five pairs, and in row 2 none."""
    rows = [
        {"prompt": "a b ?", "chosen": f" {c} d", "rejected": f" {r} e f", "id": i}
        for i, (c, r) in enumerate(zip("ghijk", "lmnop", strict=True))
    ]
    rows.insert(2, {"prompt": "a b ?", "chosen": " c", "id": 9})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def diagnose(model, data, *more):
    return call("diagnose", "--model", model, "--data", data, *more)


@pytest.fixture(scope="module")
def diagnosed(model, data, tmp_path_factory):
    """What `diagnose --out` left, and its JSON document."""
    out = tmp_path_factory.mktemp("diagnosed")
    result = diagnose(model, data, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert "row 2 is not diagnosed" in result.stderr
    return out, json.loads(result.stdout)


def test_a_diagnosis_knows_its_rows(diagnosed):
    out, document = diagnosed
    assert [row["row"] for row in document["pairs"]] == [0, 1, 3, 4, 5]
    assert json.loads((out / "diagnosis.json").read_text())["explanation"]
    assert (out / "index.html").is_file()


def test_diagnose_speaks(model, data):
    result = diagnose(model, data, "--objective", "ipo", "--beta", "0.2")
    assert result.exit_code == 0, result.output
    assert (
        "While a small ipo step moves the margins" in result.stdout
        and "own chosen" in result.stdout
    )
    assert "audit: 6 rows" in result.stdout and "missing_column" in result.stdout
    assert "simpo" in result.stdout and "run: y+" not in result.stdout
    unknown = errors(
        "diagnose", "--model", model, "--data", data, "--objective", "sft", "--beta", 1
    )
    assert "sft has the parameters [], got 'beta'" in unknown


def test_a_forecast(model, data, tmp_path):
    rows = read(data)
    rows[4] = rows[3] | {"id": 7}
    twice = write(tmp_path / "pairs.jsonl", rows)
    run = ("--forecast", "--lr", "1e-4", "--epochs", 2, "--batch", 2, "--schedule", "linear")
    out = tmp_path / "out"
    result = diagnose(model, twice, *run, "--json", "--validate", 2, "--out", out)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["run"]["schedule"] == "linear" and len(document["run"]["path_chosen"]) == 7
    assert document["audit"]["counts"]["duplicate"] == 1
    assert document["validation"]["steps"] == 2
    assert "predicted to change" in " ".join(document["explanation"])
    actions = {document["pairs"][a["pair"]]["row"]: a for a in document["actions"]}
    assert actions[4]["action"] == "fix" and actions[4]["why"] == "duplicate"
    assert "run_chosen" in document["objectives"][0]
    spoken = diagnose(model, twice, "--forecast", "--lr", "1e-4", "--validate", 2, "--limit", 5)
    assert spoken.exit_code == 0, spoken.output
    assert "2 real steps on 2 pairs each" in spoken.stdout and "run: y+" in spoken.stdout

    done = call("filter", out, "--reweight", "--out", tmp_path / "weighted", "--json")
    assert done.exit_code == 0, done.stderr
    weighted = read(tmp_path / "weighted" / "kept.jsonl")
    weights = [row.pop("weight") for row in weighted]
    assert weighted == rows and weights[2] == 1.0  # row 2 is no pair
    assert [w for i, w in enumerate(weights) if i != 2] == pytest.approx(document["pair_weights"])
    assert json.loads(done.stdout)["weights"] == weights
    # a second time, the column is there
    assert diagnose(model, tmp_path / "weighted" / "kept.jsonl", "--out", out).exit_code == 0
    refused = errors("filter", out, "--reweight", "--out", tmp_path / "more")
    assert f"{tmp_path / 'weighted' / 'kept.jsonl'}: row 0 has a weight already" in refused


def test_an_interrupt_leaves_the_page_so_far(model, data, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lddyn.sets.diagnose.look_at_tokens", stopped)
    out = tmp_path / "out"
    result = diagnose(model, data, "--out", out, "--budget", "9x")
    assert result.exit_code == 130 and "stopped" in result.stderr
    assert "Diagnosis" not in result.stdout and (out / "index.html").is_file()
    assert json.loads((out / "diagnosis.json").read_text())["worst"]
    assert "budget must be a number of epochs such as 2x, got 'much'" in errors(
        "diagnose", "--model", model, "--data", data, "--budget", "much"
    )


def test_other_responses_are_observed(model, data, tmp_path):
    rows = read(data)
    others = [{"prompt": rows[0]["prompt"], "completion": rows[1]["chosen"]}, {"prompt": "?"}]
    file, out = write(tmp_path / "others.jsonl", others), tmp_path / "out"
    run = ("--forecast", "--lr", "1e-4", "--batch", 2, "--observe-data", file, "--close-ups", 0)
    result = diagnose(model, data, *run, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["observed"]
    assert row["name"] == "row 0, completion" and row["run_change"] and row["raised_by"]
    assert "not observed" in result.stderr and "others.jsonl" in result.stderr
    page = (out / "index.html").read_text()
    assert "Responses that are not trained on" in page and "row 0, completion" in page
    spoken = diagnose(model, data, "--observe-data", file, "--close-ups", 0)
    assert "observed" in spoken.stdout and "raised by" in spoken.stdout
    bad = write(tmp_path / "bad.jsonl", others[1:])
    assert "no response can be observed" in errors(
        "diagnose", "--model", model, "--data", data, "--observe-data", bad
    )


def test_filter_drops_the_worst(diagnosed, data, tmp_path):
    out, document = diagnosed
    result = call("filter", out, "--drop", 2, "--out", tmp_path / "new" / "left")
    assert result.exit_code == 0, result.stderr
    worst = [document["pairs"][i]["row"] for i in document["worst"][:2]]
    assert f"4 rows kept, 2 dropped (rows {worst[0]}, {worst[1]})" in result.stdout
    rows = read(data)
    kept = read(tmp_path / "new" / "left" / "kept.jsonl")
    assert kept == [row for number, row in enumerate(rows) if number not in worst]
    assert read(tmp_path / "new" / "left" / "dropped.jsonl") == [rows[i] for i in worst]


def test_filter_loses_no_rows(model, data, tmp_path):
    own = write(tmp_path / "kept.jsonl", read(data))
    out = tmp_path / "out"
    assert diagnose(model, own, "--limit", 2, "--out", out).exit_code == 0
    assert "kept.jsonl there is the data file" in errors(
        "filter", out, "--drop", 1, "--out", tmp_path
    )
    result = call("filter", out, "--drop", 2, "--out", tmp_path / "left")
    assert result.exit_code == 0, result.stderr  # rows beyond the limit are kept
    assert [row["id"] for row in read(tmp_path / "left" / "kept.jsonl")] == [9, 2, 3, 4]
    assert "of the 2 dropped pairs lower chosen responses" in result.stderr
    too_many = errors("filter", out, "--drop", 3, "--out", tmp_path / "left")
    assert "drop must be from 0 to 2, the number of pairs, and leave a row, got 3" in too_many
    assert len(read(tmp_path / "left" / "kept.jsonl")) == 4
    own.write_text("\n".join(own.read_text().splitlines()[:3]))
    changed = errors("filter", out, "--drop", 1, "--out", tmp_path / "left")
    assert "not the rows that were diagnosed" in changed
    own.unlink()
    assert "--data says where" in errors("filter", out, "--drop", 1, "--out", tmp_path / "left")
    assert "give --drop N, --reweight, or both" in errors("filter", out, "--out", tmp_path / "left")
    no_diagnosis = errors("filter", tmp_path / "left", "--drop", 1, "--out", out)
    assert "expected a folder that lddyn diagnose --out wrote" in no_diagnosis


def test_what_cannot_end_well_is_said_before_the_work(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(lddyn, "diagnose", lambda *_, **__: pytest.fail("it went to work"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    for more, message in (
        (("--out", blocked), "is a file"),
        (("--out", blocked / "o"), "Not a directory"),
        (("--out", tmp_path / "o", "--watched", tmp_path), "no dynamics.jsonl"),
        (("--out", tmp_path / "o", "--after", tmp_path / "none"), "none"),
        (("--watched", tmp_path), "--watched and --after are for the page: give --out"),
        (("--forecast",), "--forecast needs --lr"),
        (("--lr", "1e-4"), "--lr 0.0001 is the learning rate of a run that --forecast predicts"),
        (("--resume", tmp_path), "--resume is of a run that --forecast predicts"),
        (("--forecast", "--lr", 1, "--resume", tmp_path), "optimizer.pt: no such file"),
        (("--close-ups", -1), "greater than or equal to 0"),
        (("--objective", "ppo"), "'ppo' is not one of 'sft'"),
    ):
        assert message in errors("diagnose", "--model", model, "--data", data, *more)


def test_a_row_that_is_too_long_does_not_stop_the_others(model, data, tmp_path):
    long = {"prompt": "a " * 600, "chosen": " c", "rejected": " d"}
    longer = write(tmp_path / "pairs.jsonl", [*read(data), long])
    result = diagnose(model, longer, "--close-ups", 0)
    assert result.exit_code == 0, result.output
    assert "pairs.jsonl, line 7: chosen: length must be <=" in result.stderr
    assert "are estimated" not in result.stderr
    small = diagnose(model, longer, "--close-ups", 0, "--memory", "400KB")
    assert "the gradients of 10 responses take" in small.stderr, small.output
    assert "\\u000a" not in result.stdout


def test_a_sketch_has_a_size_and_a_seed(model, data):
    """--sketch-size estimates inner products where gradients fit, too; --seed draws the sketch."""

    def errors_of(*options):
        result = diagnose(model, data, "--json", "--close-ups", 0, *options)
        assert result.exit_code == 0, result.output
        return [row.get("set_chosen_stderr") for row in json.loads(result.stdout)["pairs"]]

    one = errors_of("--sketch-size", 512)
    assert all(error > 0 for error in one)
    assert one == errors_of("--sketch-size", 512, "--seed", 0)
    assert one != errors_of("--sketch-size", 512, "--seed", 1)
    assert errors_of() == [None] * len(one)


@pytest.mark.case("log-probs of a reference in rows")
def test_log_probs_of_rows_are_the_reference_where_asked_and_else_said_to_be_unread(
    model, tmp_path
):
    known = {"ref_chosen_logps": -3.0, "ref_rejected_logps": -900.0}
    row = {"prompt": "a b ?", "chosen": " c d", "rejected": " e f", **known}
    file = write(tmp_path / "pairs.jsonl", [row])
    plain = diagnose(model, file, "--json", "--close-ups", 0)
    assert plain.exit_code == 0 and "--reference rows takes them" in plain.stderr
    given = diagnose(model, file, "--json", "--close-ups", 0, "--reference", "rows")
    document = json.loads(given.stdout)
    said = document["summary"]["reference"]
    assert said["name"] == "log-probs that were given" and said["distance"] > 800
    assert "not used" not in given.stderr
    assert any("computed on the same tokens?" in text for text in document["explanation"])
    bad = write(tmp_path / "bad.jsonl", [{**row, "ref_chosen_logps": None}])
    result = diagnose(model, bad, "--reference", "rows")
    assert result.exit_code == 2 and "must have log π_ref" in result.stderr


@pytest.mark.case("a weight column that the trainer does not read")
def test_reweighting_says_that_trl_does_not_read_weights(diagnosed, data, tmp_path):
    result = call("filter", diagnosed[0], "--reweight", "--out", tmp_path)
    assert result.exit_code == 0 and "do not read the column weight" in result.stderr


@pytest.mark.case("settings of a trainer's config")
def test_a_diagnosis_like_a_file_of_arguments(model, data, tmp_path):
    file = tmp_path / "dpo.json"
    arguments = {
        "loss_type": ["robust"],
        "label_smoothing": 0.2,
        "beta": 0.3,
        "sync_ref_model": True,
    }
    file.write_text(json.dumps(arguments))
    result = diagnose(model, data, "--like", file, "--json", "--close-ups", 0)
    document = json.loads(result.stdout)
    assert document["objective"] == "robust"
    assert document["parameters"] == {"beta": 0.3, "label_smoothing": 0.2}
    assert any("follows the policy" in text for text in document["explanation"])


_SIDES = [(f" {c} d", f" {r} e f") for c, r in zip("ghi", "lmn", strict=True)]
SINGLE = {
    "sft": [{"prompt": "a b ?", "completion": chosen} for chosen, _ in _SIDES],
    "kto": [
        {"prompt": "a b ?", "completion": text, "label": not i}
        for pair in _SIDES
        for i, text in enumerate(pair)
    ],
    "flat": [
        {"prompt": "a b ?", "completion": text, "reward": 1.0 - i}
        for pair in _SIDES
        for i, text in enumerate(pair)
    ],
    "grouped": [
        {"prompt": f"a {w} ?", "completions": list(pair), "rewards": [1, i / 2]}
        for i, (w, pair) in enumerate(zip("bcd", _SIDES, strict=True))
    ],
}


@pytest.mark.case("single responses as a set")
@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("sft", "sft", 3), ("kto", "kto", 6), ("flat", "grpo", 6), ("grouped", "grpo", 6)],
)
def test_single_responses_are_diagnosed(model, tmp_path, name, kind, count):
    rows = write(tmp_path / "rows.jsonl", SINGLE[name])
    seen = write(tmp_path / "seen.jsonl", SINGLE["sft"])
    out = tmp_path / "out"
    result = diagnose(model, rows, "--observe-data", seen, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["summary"]["objective"] == kind
    assert len(document["sequences"]) == count
    assert len(document["observed"]) == 3
    assert document["audit"]["n_rows"] == count
    assert "What does training on these sequences do?" in (out / "index.html").read_text()
    if name == "grouped":
        assert document["sequences"][3]["label"] == "group 1, reward 0.5"
    else:
        kept = call("filter", out, "--drop", 1, "--out", tmp_path / "kept", "--json")
        assert json.loads(kept.stdout)["dropped"] == [document["worst"][0]]
        again = call("filter", out, "--resample", "--out", tmp_path / "again", "--json")
        drawn = json.loads(again.stdout)["kept"]
        for row, weight in enumerate(document["row_weights"]):
            assert abs(drawn.count(row) - weight) < 1


def test_single_responses_refuse_what_is_of_pairs(model, tmp_path):
    rows = write(tmp_path / "rows.jsonl", SINGLE["sft"])
    for options, message in (
        (["--objective", "dpo"], "whose loss is sft"),
        (["--validate", "4"], "of pairs"),
        (["--beta", "0.2"], "sft has none"),
        (["--reference", "self"], "sft has none"),
    ):
        assert message in errors("diagnose", "--model", model, "--data", rows, *options)


def test_rows_are_kept_in_a_store(model, data, tmp_path):
    rows = tmp_path / "rows"
    first = diagnose(model, data, "--store", rows, "--sketch-size", 400, "--json")
    assert first.exit_code == 0, first.stderr
    assert len(lddyn.Store.open(rows)) == 10
    again = diagnose(model, data, "--store", rows, "--sketch-size", 400, "--json")
    assert json.loads(again.stdout)["pairs"] == json.loads(first.stdout)["pairs"]
    refused = errors(
        *("diagnose", "--model", model, "--data", data, "--store", tmp_path / "more"),
        *("--forecast", "--lr", 1e-4),
    )
    assert "rank with the store first" in refused
