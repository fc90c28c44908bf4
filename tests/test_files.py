"""Files that are whole or absent, digests, and values that JSON can hold."""

import json
import math
import os
import resource
import signal

import pytest

from lddyn.errors import StoreCorruptError, StoreError
from lddyn.files import (
    TEMPORARY,
    append_text,
    canonical,
    digest_of,
    json_safe,
    parse_json,
    read_regular,
    read_sealed,
    read_stored,
    replace_file,
    sealed,
    unsealed,
    write_durably,
)


def test_write_durably_writes_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a"
    for content in (b"first", b"second, which is longer"):
        write_durably(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("failing", ["fsync", "pwrite", "replace"])
def test_write_durably_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "a"
    write_durably(path, b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="no space left"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_write_durably_never_writes_through_a_link(tmp_path):
    (tmp_path / "other").write_bytes(b"somebody's")
    (tmp_path / TEMPORARY).symlink_to(tmp_path / "other")
    write_durably(tmp_path / "a", b"ours")
    assert (tmp_path / "other").read_bytes() == b"somebody's"
    assert (tmp_path / "a").read_bytes() == b"ours"


def test_replace_file_takes_text_and_bytes(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, "χ")
    assert path.read_bytes() == "χ".encode()
    replace_file(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_read_stored_says_what_is_wrong_with_a_file_of_a_store(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read_stored(tmp_path / "a", 3) == b"3456789"
    with pytest.raises(StoreCorruptError, match="a: larger than 9 bytes"):
        read_stored(tmp_path / "a", limit=9)
    with pytest.raises(StoreCorruptError, match="absent: this file of the store is missing"):
        read_stored(tmp_path / "absent")
    with pytest.raises(StoreError, match="must be a regular file"):
        read_stored(tmp_path)


def test_sealed_text_shows_every_change(tmp_path):
    content = {"a": [1, 2.5, None], "lone": "\ud800", "b": {"c": math.nan}}
    (tmp_path / "x.json").write_text(sealed(content))
    assert read_sealed(tmp_path / "x.json") == {**content, "b": {"c": None}}
    text = sealed(content, indent=None)
    assert text.count("\n") == 1
    for changed in (
        text.replace("2.5", "2.6"),
        text[:-3],
        "[]",
        "{}",
        text.replace("{", '{"a": 1, ', 1),
    ):
        with pytest.raises(ValueError, match=r"^x "):
            unsealed(changed, "x")
    with pytest.raises(ValueError, match="the key 'a' occurs twice"):
        parse_json('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="too deeply nested"):
        parse_json("[" * 100_000)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises((ValueError, OSError)):
            read_regular(path)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"abc")
    assert read_regular(tmp_path / "link") == b"abc"
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        read_regular(tmp_path / "file", limit=2)


def test_nothing_is_appended_through_a_link(tmp_path):
    (tmp_path / "other").write_text("somebody's")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError):
        append_text(tmp_path / "link", "ours")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((OSError, ValueError)):
        append_text(tmp_path / "pipe", "ours")
    append_text(tmp_path / "a", "one\n")
    append_text(tmp_path / "a", "two\n")
    assert (tmp_path / "a").read_text() == "one\ntwo\n"
    assert (tmp_path / "other").read_text() == "somebody's"


@pytest.mark.case("a full disk")
def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    append_text(path, "one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
    try:
        with pytest.raises(OSError, match=r"too large: '.*/a'"):
            append_text(path, "two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "one\n"


def test_digests_do_not_depend_on_parts_or_order_of_keys():
    assert digest_of(b"ab", b"c") == digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert canonical({"b": [1, 2], "a": "χ"}) == canonical({"a": "χ", "b": (1, 2)})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"a": math.nan})


def test_json_safe_values_are_strict_json():
    value = {1: (math.nan, [math.inf, 2.0]), "b": {"c": -math.inf}, "d": None}
    want = {"1": [None, [None, 2.0]], "b": {"c": None}, "d": None}
    assert json_safe(value) == want
    assert json.loads(json.dumps(json_safe(value), allow_nan=False)) == want
