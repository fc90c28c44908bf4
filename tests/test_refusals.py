"""Values that look like sound ones and would lead to wrong numbers without a word."""

import json

import pytest
import zoo

import lddyn
from lddyn.files import parse_json, sealed
from lddyn.report.dynamics import read_lines, write_dynamics


@pytest.mark.case("adapters that are merged into their layers")
def test_a_merged_adapter_is_refused():
    """Its layers compute without the adapter: the table was zeros."""
    model, (observed, updated) = zoo.lora("llama").eval(), zoo.examples()
    model.merge_adapter()
    calls = [
        lambda: lddyn.decompose(model, observed, lddyn.SFT(updated), 1e-3),
        lambda: lddyn.ntk(model, observed, updated),
    ]
    for call in calls:
        with pytest.raises(lddyn.UnsupportedModelError, match=r"call model\.unmerge_adapter"):
            call()
    model.unmerge_adapter()
    assert lddyn.ntk(model, observed, updated).gram().abs().max() > 0


def test_a_learning_rate_is_a_number():
    model, (observed, updated) = zoo.build("llama").eval(), zoo.examples()
    with pytest.raises(ValueError, match="lr must be a positive number, or 0, got True"):
        lddyn.decompose(model, observed, lddyn.SFT(updated), True)
    with pytest.raises(ValueError, match="lr must be a number, got True"):
        lddyn.Run(lr=True)


@pytest.mark.parametrize("step", [float("inf"), 10**400, True, None, "3", -(2**60)])
def test_a_step_of_a_watched_run_is_a_number(tmp_path, step):
    path = tmp_path / "dynamics.jsonl"
    path.write_text(sealed({"step": step, "log_prob/a": 1.0}, indent=None))
    with pytest.raises(ValueError, match=str(path)):
        read_lines(path)
    path.write_text(json.dumps({"step": step, "digest": "0" * 32}) + "\n")
    with pytest.raises(ValueError, match=str(path)):
        read_lines(path)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]"])
def test_json_has_no_infinities(text):
    with pytest.raises(ValueError, match="is no number in JSON"):
        parse_json(text)


def test_a_page_shows_hidden_characters_of_its_title(tmp_path):
    path = tmp_path / "page.html"
    write_dynamics(
        [{"step": 0, "log_prob/a": -1.0}, {"step": 1, "log_prob/a": -2.0}],
        path,
        title="evil \u202egnp.exe\u200b",
    )
    text = path.read_text(encoding="utf-8")
    assert "evil \\u202egnp.exe\\u200b" in text and not set("\u202e\u200b\u2066") & set(text)
