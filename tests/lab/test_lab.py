"""What experiments share: steps kept, other settings refused, tables, figures, claims, the page."""

import dataclasses
import importlib
import inspect
import json

import pytest
import torch
from typer.testing import CliRunner

from lddyn.cli.lab import app
from lddyn.lab import EXPERIMENTS, record, scoreboard, settings
from lddyn.lab.record import AGREES, DISAGREES, Claim, Lab, anew
from lddyn.report.figures import blank_figure


def claim(name="one", verdict=AGREES, **changes):
    return Claim(name, "x | <b>", "§1", "3", "4 nats", verdict, "because", **changes)


def test_a_step_is_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": (1, 2.5), "b": float("nan")}

    for _ in range(2):
        found = Lab("x", tmp_path, progress=False).once("step", make)
        assert found == {"a": [1, 2.5], "b": None}
    assert len(calls) == 1


def test_other_settings_are_refused_by_name(tmp_path):
    Lab("x", tmp_path, seed=1, options={"steps": 3, "sizes": (1, 2)})
    Lab("x", tmp_path, seed=1, options={"steps": 3, "sizes": (1, 2)})
    with pytest.raises(ValueError, match=r"steps \(there 3, now 4\)"):
        Lab("x", tmp_path, seed=1, options={"steps": 4, "sizes": (1, 2)})
    with pytest.raises(ValueError, match=r"seed \(there 1, now 2\)"):
        Lab("x", tmp_path, seed=2, options={"steps": 3, "sizes": (1, 2)})


def test_random_numbers_depend_on_their_labels_alone(tmp_path):
    lab = Lab("x", tmp_path)
    a = torch.rand(3, generator=lab.generator("a", 1))
    torch.rand(3, generator=lab.generator("b"))
    assert torch.equal(a, torch.rand(3, generator=lab.generator("a", 1)))
    assert not torch.equal(a, torch.rand(3, generator=lab.generator("a", 2)))


def test_everything_is_on_the_page(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    lab = Lab("x", tmp_path, options={"steps": 3})
    lab.table("numbers", [{"a": 1, "b": 0.5}, {"a": 2, "b": None}])
    lab.figure("picture", blank_figure(2, 1, "picture"), "Look <here>.")
    lab.claim(claim(interval=(1.0, 2.0), value=1.5))
    with pytest.raises(ValueError, match="'one' was made already"):
        lab.claim(claim())
    lab.finish(["It falls."], ["It fell."])
    page = (tmp_path / "index.html").read_text()
    for text in ("It falls.", "It fell.", "Look &lt;here&gt;.", "x | &lt;b&gt;", "data:image/png"):
        assert text in page
    assert json.loads((tmp_path / "results.json").read_text())["claims"][0]["value"] == 1.5
    assert (tmp_path / "figures" / "picture.pdf").read_bytes()[:4] == b"%PDF"
    rows = parquet.read_table(tmp_path / "tables" / "numbers.parquet").to_pylist()
    assert rows == json.loads((tmp_path / "tables" / "numbers.json").read_text())


def test_results_say_what_made_them(tmp_path, monkeypatch):
    made = Lab("x", tmp_path).finish([], [])["made by"]
    assert made["processor"] and made["cores"] >= 1 and made["date"].count("-") == 2
    assert made["processor"] in (tmp_path / "index.html").read_text()
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))  # in no checkout
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record._made_by() == {**made, "commit": None}


def test_scoreboard(tmp_path):
    results = []
    for name, verdict in (("a", AGREES), ("b", DISAGREES)):
        lab = Lab(name, tmp_path / name)
        lab.claim(claim(verdict=verdict, interval=(0.1, 0.2)))
        results.append(lab.finish([], []))
    found = scoreboard.write(results, tmp_path)
    assert found["verdicts"] == {AGREES: 1, DISAGREES: 1}
    lines = (tmp_path / "scoreboard.md").read_text().splitlines()
    assert len(lines) == 4 and "x \\| <b>" in lines[2] and "0.1 to 0.2" in lines[2]


def test_a_verdict_is_one_of_three():
    with pytest.raises(ValueError, match="got 'maybe'"):
        claim(verdict="maybe")


def test_a_fresh_start_deletes_only_what_an_experiment_wrote(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    lab = Lab("x", tmp_path, progress=False)
    lab.once("step", lambda: 1)
    lab.finish([], [])
    with pytest.raises(ValueError, match="holds experiment x, not y"):
        Lab.clear(tmp_path, "y")
    Lab.clear(tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    Lab("x", tmp_path, seed=1)


def test_a_fresh_start_that_is_refused_deletes_nothing(tmp_path):
    from lddyn.cli.app import app

    def files():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    for name, wrong in (
        ("squeeze", ["--labels", "1"]),
        ("sft", ["--every", "0"]),
        ("dpo", ["--lengths", "a"]),
        ("probes", ["--model", "m"]),  # without --data
    ):
        folder = tmp_path / name
        Lab(name, folder, progress=False).once("step", lambda: 1)
        before = files()
        arguments = ["lab", name, "--out", str(folder), *wrong]
        result = CliRunner().invoke(app, [*arguments, "--fresh"])
        assert result.exit_code == 2 and wrong[0][2:] in result.stderr
        assert files() == before


def test_a_fresh_start_clears_before_the_first_step(tmp_path):
    Lab("x", tmp_path, progress=False).once("step", lambda: 1)
    with anew():
        lab = Lab("x", tmp_path, seed=1, progress=False)
        with pytest.raises(ValueError, match="holds experiment x, not y"):
            Lab("y", tmp_path)
    assert lab.once("step", lambda: 2) == 2
    assert Lab("x", tmp_path, seed=1).once("step", lambda: 3) == 2


@pytest.mark.parametrize("name", ["index.html", "identity.json", "results.json"])
def test_files_of_others_are_kept(tmp_path, name):
    (tmp_path / name).write_text('{"name": "me"}')
    Lab.clear(tmp_path, "x")
    with pytest.raises(ValueError, match=rf"holds {name} of no experiment"):
        Lab("x", tmp_path)
    assert (tmp_path / name).read_text() == '{"name": "me"}'


def test_the_command_clears_only_its_own(tmp_path):
    from lddyn.cli.app import app

    (tmp_path / "identity.json").write_text('{"name": "me"}')
    (tmp_path / "thesis.tex").write_text("mine")
    result = CliRunner().invoke(app, ["lab", "squeeze", "--out", str(tmp_path), "--fresh"])
    assert result.exit_code == 2 and "of no experiment" in result.stderr
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "identity.json").exists()


def test_a_share_says_whether_it_is_all():
    from lddyn.lab.shares import Share

    assert str(Share(5, 5)) == "100 % of 5" and str(Share(1, 3)) == "33.33 % of 3"
    assert str(Share(99_999, 100_000)) == "all but 1 of 100,000"


def test_an_interval_of_nothing_is_left_out(tmp_path):
    lab = Lab("x", tmp_path)
    lab.claim(claim(value=float("nan"), interval=(float("nan"), 1.0)))
    results = lab.finish([], [])
    assert results["claims"][0]["interval"] is None and results["claims"][0]["value"] is None
    scoreboard.write([results], tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_other_code_or_content_is_refused_by_name(tmp_path, monkeypatch):
    lab = Lab("x", tmp_path, progress=False)
    lab.reads(rows="aa", model={"weights": "11", "class": "M"})
    assert lab.once("step", lambda: 1) == 1
    again = Lab("x", tmp_path, progress=False)
    again.reads(rows="aa", model={"weights": "11", "class": "M"})
    assert again.once("step", lambda: 2) == 1
    with pytest.raises(ValueError, match=r"other settings: rows \(there 'aa', now 'bb'\); give"):
        Lab("x", tmp_path, progress=False).reads(rows="bb")
    with pytest.raises(ValueError, match=r"model weights \(there '11', now '22'\); give"):
        Lab("x", tmp_path, progress=False).reads(model={"weights": "22", "class": "M"})
    with monkeypatch.context() as patch:
        patch.setattr(record, "_code", lambda: "edited")
        with pytest.raises(ValueError, match=r"code \(there '\w{32}', now 'edited'\)"):
            Lab("x", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(record, "__version__", "9.9")
        with pytest.raises(ValueError, match=r"lddyn \(there '.*', now '9.9'\)"):
            Lab("x", tmp_path)
    results = again.finish([], [])
    assert results["inputs"] == {"rows": "aa", "model": {"weights": "11", "class": "M"}}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_command_has_the_options_and_defaults_of_its_settings(name):
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for field in dataclasses.fields(EXPERIMENTS[name]):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
        assert field.metadata["help"].split(".")[0][:30] in result.stdout


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_its_settings(name):
    run = importlib.import_module(f"lddyn.lab.{name}").run
    assert list(inspect.signature(run).parameters) == ["out", "settings", "seed", "progress"]
    kind = EXPERIMENTS[name]
    assert kind().decisive().keys() <= {field.name for field in dataclasses.fields(kind)}


def test_settings_name_the_field_that_is_out_of_bounds():
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        settings.Sft(every=0)
    with pytest.raises(ValueError, match="lengths must be numbers of steps"):
        settings.Dpo(lengths=(-1, 3))
    assert settings.Dpo(lengths=(3, 0, 3)).lengths == (0, 3)
    assert "key_variable" not in settings.Probes().decisive()
