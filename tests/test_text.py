"""Tokens and numbers as people read them."""

import json
import math

import pytest

from lddyn.text import hides, json_printable, printable, readable, signed, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ġthe", "␣the"),
        (" the", "␣the"),
        ("▁the", "␣the"),
        ("Ċ", "↵"),
        ("\n\t", "↵⇥"),
        ("", "∅"),
        ("a\u202eb", "a\\u202eb"),
        ("\x1b[2J", "\\u001b[2J"),
        ("日本", "日本"),
    ],
)
def test_visible_shows_what_is_invisible(text, shown):
    assert visible(text) == shown


def test_visible_cuts_long_tokens():
    assert visible("x" * 50, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.5, "−0.5"), (1234.4, "+1234"), (-1e-9, "−1e−9"), (math.nan, "nan")],
)
def test_signed(value, text):
    assert signed(value) == text


HIDDEN = (
    "\x1b\0\u202e\u2066\u200d\u2028\u20dd\u3164\u115f\u034f\u2800\ufe01\u00ad\ufeff\u061c\x9b\ud800"
)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_nothing_that_hides_or_reorders_text_is_left(hidden):
    for shown in (printable(f"a{hidden}b"), readable(f"a{hidden}b"), visible(f"a{hidden}b")):
        assert shown == f"a\\u{ord(hidden):04x}b"


def test_json_shows_what_it_holds():
    text = json.dumps({"a": f"ä{HIDDEN}\U000e0101 ☺\ufe0f"}, ensure_ascii=False, indent=1)
    shown = json_printable(text)
    assert json.loads(shown) == json.loads(text)
    assert not any(map(hides, shown.replace("\n", ""))) and "ä" in shown and "☺\ufe0f" in shown


def test_readable_keeps_lines_and_cuts_long_text():
    assert readable("a\n\tb") == "a\n    b"
    assert readable("x" * 50, 10) == "x" * 9 + "…"
