"""dynamics.jsonl: rows written, read again at a checkpoint, and never mixed with other runs'."""

import json
import math

import pytest
import torch

import lddyn
from lddyn.integrations.dynamics_file import DynamicsFile
from lddyn.probes.probe_set import Encoded
from lddyn.report.dynamics import read_dynamics


def encoded(*responses):
    examples = [lddyn.Example([1], [token]) for token in responses]
    cells = torch.tensor([(i, 0) for i in range(len(examples))])
    return Encoded(examples, cells, len(examples), ("chosen",))


@pytest.fixture
def file(tmp_path):
    """Three passes of one run in a folder that did not exist."""
    file = DynamicsFile(tmp_path / "run" / "lddyn", encoded(2, 3))
    assert file.resume(0) == ([], None)
    for step in (0, 2, 4):
        file.append({"step": step, "change/chosen": -step / 8, "step/chosen": math.nan}, [-1.0, -2])
    return file


def test_a_checkpoint_undoes_the_rows_after_it(file):
    with file.path.open("a") as stream:
        stream.write('{"step": 6, "chan')  # a crash cut the line
    rows, start = file.resume(3)
    assert [row["step"] for row in rows] == [0, 2] and rows[1]["change/chosen"] == -0.25
    assert math.isnan(rows[0]["step/chosen"]) and torch.equal(
        start, torch.tensor([-1.0, -2.0]).double()
    )
    assert len(file.path.read_text().splitlines()) == 2
    assert not file.path.with_name("dynamics-1.jsonl").exists()


def test_a_line_that_changed_is_an_error_and_a_run_sets_its_file_aside(file):
    text = file.path.read_text()
    file.path.write_text(text.replace("-0.25", "-0.75"))
    with pytest.raises(ValueError, match="line 2 is not as lddyn wrote it"):
        read_dynamics(file.path)
    with pytest.warns(UserWarning, match="line 2 .* set aside"):
        assert file.resume(3) == ([], None)
    assert "-0.75" in file.path.with_name("dynamics-1.jsonl").read_text()
    file.path.write_text(text)
    assert [row["step"] for row in read_dynamics(file.path)] == [0, 2, 4]


def test_lines_are_strict_json(file):
    def strict(text):
        raise ValueError(text)

    for line in file.path.read_text().splitlines():
        row = json.loads(line, parse_constant=strict)
        assert row["each"] == [-1.0, -2.0] and row["step/chosen"] is None


def test_a_new_run_and_other_probes_put_the_file_aside(file):
    before = file.path.read_text()
    other = DynamicsFile(file.path.parent, encoded(2, 4))
    assert other.resume(4) == ([], None)
    assert file.path.with_name("dynamics-1.jsonl").read_text() == before
    other.append({"step": 4}, [0.0, 0.0])
    assert DynamicsFile(file.path.parent, encoded(2, 4)).resume(0) == ([], None)
    assert json.loads(file.path.with_name("dynamics-2.jsonl").read_text())["step"] == 4
    assert file.path.read_text() == ""


@pytest.mark.case("two runs that are watched in one folder")
def test_rows_of_two_runs_are_not_mixed(file):
    """The later run keeps the folder, and the earlier one is told at its next row."""
    later = DynamicsFile(file.path.parent, encoded(2, 3))
    later.resume(0)
    later.append({"step": 0}, [0.0, 0.0])
    with pytest.raises(ValueError, match=r"dynamics\.jsonl: another run writes there, too"):
        file.append({"step": 6}, [0.0, 0.0])
    later.append({"step": 1}, [0.0, 0.0])
    assert [row["step"] for row in read_dynamics(file.path)] == [0, 1]
