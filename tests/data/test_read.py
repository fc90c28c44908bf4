"""Rows from files, data sets and iterables."""

import json

import pytest

from lddyn.data.read import placed_rows, rows, source_files
from lddyn.errors import ExampleError

TABLE = [{"prompt": "a", "completion": "b"}, {"prompt": "χ", "completion": "d"}]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_rows_jsonl(tmp_path, newline, bom):
    path = tmp_path / "data.jsonl"
    text = bom + newline.join(json.dumps(row, ensure_ascii=False) for row in TABLE) + newline
    path.write_bytes(text.encode())
    assert rows(path) == rows(str(path)) == TABLE
    assert rows(path, limit=1) == TABLE[:1]


def test_rows_json_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(TABLE, indent=1))
    assert rows(path) == TABLE


def test_rows_iterables():
    class Dataset:  # what is used of datasets.Dataset
        def __iter__(self):
            return iter(TABLE)

    assert rows(TABLE) == rows(Dataset()) == rows(iter(TABLE)) == rows({"train": TABLE}) == TABLE


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1}\n{"a": 1\n', r"bad.jsonl, line 2: not JSON \(.* at column"),
        (b'{"a": 1}\n\n[1]\n', "bad.jsonl, line 3: a row must be a mapping of columns, got list"),
        (b'{"a": "\xff"}\n', "bad.jsonl, line 1: not UTF-8"),
        (b"[" * 100_000, "bad.jsonl: not a JSON list"),
        (b'{"a":' * 100_000, "bad.jsonl, line 1: not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad.jsonl, line 1: a number has too many digits"),
        (b'{"a": 1, "a": 2}', "bad.jsonl, line 1: the key 'a' occurs twice in one object"),
        (b'{"a": "\\ud800"}', r"bad.jsonl, line 1: no text \(half of a surrogate pair\)"),
        (b'[{"a": 1}, 2]', "bad.jsonl, entry 1: a row must be a mapping"),
    ],
)
def test_rows_errors_name_file_and_line(tmp_path, content, text):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ExampleError, match=text):
        rows(path)


def test_rows_refuses_what_is_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        rows(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match=r"this folder has no \.jsonl"):
        rows(tmp_path)
    with pytest.raises(ExampleError, match="keys 'train', 'test': choose a split"):
        rows({"train": TABLE, "test": TABLE})
    with pytest.raises(ExampleError, match="put the row in a list"):
        rows({"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(ExampleError, match=r"row 0: .* got str 'prompt'"):
        rows(["prompt"])
    with pytest.raises(TypeError, match="path or an iterable"):
        rows(3)


@pytest.mark.case("timestamps that Python cannot hold")
def test_a_timestamp_out_of_range_is_a_finding_of_its_row(tmp_path):
    pyarrow, path = pytest.importorskip("pyarrow"), tmp_path / "data.parquet"
    from pyarrow import parquet

    when = pyarrow.array([0, 1 << 50, 5]).view(pyarrow.timestamp("s"))
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "when": when}), path)
    first, second, third = placed_rows(path)
    assert first.row["text"] == "a" and third.row["text"] == "c"
    assert isinstance(second.row, ExampleError)
    assert "data.parquet, row 1: the value of when" in str(second.row)


def test_rows_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ImportError, match="pip install pyarrow"):
            rows(path)
        return
    parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
    assert rows(path) == TABLE
    path.write_bytes(b"PAR1")
    with pytest.raises(ExampleError, match="not a Parquet file"):
        rows(path)


@pytest.mark.case("tables and texts that are not UTF-8, and columns of one name")
def test_tables_that_are_not_utf8(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_bytes(b"prompt,completion\nthe,caf\xe9\nthe,cat\n")
    first, second = (row for _, row in placed_rows(table))
    assert "not UTF-8 (in column 'completion')" in str(first)
    assert second == {"prompt": "the", "completion": "cat"}
    lines = tmp_path / "rows.txt"
    lines.write_bytes(b"caf\xe9\ncaf\xc3\xa9\n")
    first, second = (row for _, row in placed_rows(lines))
    assert "not UTF-8" in str(first) and second == {"text": "café"}
    table.write_text("prompt,chosen,chosen\na,b,c\n")
    with pytest.raises(ExampleError, match="two columns are called 'chosen'"):
        list(placed_rows(table))


@pytest.mark.case("links that lead nowhere, and data sets that list files elsewhere")
def test_links_and_lists_that_lead_elsewhere(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("loop", "gone", "g*"):
        with pytest.raises(ExampleError, match="a link that leads nowhere"):
            source_files(tmp_path / name)
    saved = tmp_path / "set"
    saved.mkdir()
    for file, texts in (
        ("state.json", ['{"_data_files": [{"filename": "../gone"}]}', '{"_data_files": [3]}']),
        ("dataset_dict.json", ['{"splits": ["/etc"]}', '{"splits": [".."]}', "[]", "{", "{}"]),
    ):
        for text in texts:
            (saved / file).write_text(text)
            with pytest.raises(ExampleError, match=rf"{saved / file}: (names|not as)"):
                source_files(saved)
