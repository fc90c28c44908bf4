"""Acting on a diagnosis in the library: rows left out or weighted, models and losses as objects."""

import json
from dataclasses import replace

import pytest
import torch
from preference_pairs import some_pairs, with_gram

import lddyn
from lddyn.files import sealed
from lddyn.sets.filter import check_source, filter_rows, read_diagnosed, write_source
from lddyn.sets.pairs import PairSet

ROWS = [{"prompt": str(i)} for i in range(7)]
NUMBERS = [0, 1, 3, 4, 6]


@pytest.fixture(scope="module")
def diagnosed(found):
    """Five pairs, of which 3 and 1 lower the chosen responses of the others."""
    gram = torch.eye(10).double()
    gram[:5, 3], gram[3, :5] = -1.0, -1.0
    gram[:5, 1] -= 0.5
    gram[3, 3] = gram[1, 1] = 1.0
    pairs = PairSet.of(some_pairs(), NUMBERS)
    other = with_gram(found, gram)
    return replace(other, step=replace(other.step, pairs=pairs))


def test_the_worst_pairs_are_left_out(diagnosed):
    assert diagnosed.worst(2) == [3, 1]
    for diagnosis in (diagnosed, json.loads(json.dumps(diagnosed.to_dict()))):
        filtered = filter_rows(ROWS, diagnosis, drop=2)
        assert filtered.dropped_rows == [4, 1] and filtered.kept_rows == [0, 2, 3, 5, 6]
        assert filtered.kept == [ROWS[i] for i in filtered.kept_rows]
        assert filtered.helpful == 0


def test_rows_get_the_weights_of_their_pairs(diagnosed):
    given = [0.5, 0.0, 2.0, 1.5, 1.0]
    document = {**diagnosed.to_dict(), "pair_weights": given}
    filtered = filter_rows(ROWS, document, reweight=True)
    weights = [row["weight"] for row in filtered.kept]
    assert [weights[i] for i in NUMBERS] == given
    assert weights[2] == weights[5] == 1.0  # these were not diagnosed
    assert "weight" not in ROWS[0]


@pytest.mark.case("rows repeated by weight, for a trainer that reads no weights")
def test_rows_are_repeated_by_weight(diagnosed):
    given = [0.5, 0.0, 2.25, 1.5, 0.75]
    document = {**diagnosed.to_dict(), "pair_weights": given}
    wanted = {**dict.fromkeys(range(7), 1.0), **dict(zip(NUMBERS, given, strict=True))}
    counts = torch.zeros(7)
    for seed in range(200):
        filtered = filter_rows(ROWS, document, resample=True, seed=seed)
        assert filtered.kept == [ROWS[i] for i in filtered.kept_rows]
        drawn = torch.tensor([filtered.kept_rows.count(i) for i in range(7)])
        assert all(abs(int(c) - wanted[i]) < 1 for i, c in enumerate(drawn))
        counts += drawn / 200
    assert torch.allclose(counts, torch.tensor([wanted[i] for i in range(7)]), atol=0.12)
    with pytest.raises(ValueError, match="two ways of one weight"):
        filter_rows(ROWS, document, resample=True, reweight=True)


def test_rows_that_cannot_be_filtered(diagnosed):
    with pytest.raises(ValueError, match="row 6 was diagnosed, but there are 5 rows"):
        filter_rows(ROWS[:5], diagnosed, drop=1)
    with pytest.raises(ValueError, match="drop must be from 0 to 5"):
        filter_rows(ROWS, diagnosed, drop=6)
    with pytest.raises(ValueError, match="row 0 has a weight already"):
        filter_rows([{**row, "weight": 1} for row in ROWS], diagnosed, reweight=True)
    nothing = {**diagnosed.to_dict(), "pair_weights": [0.0] * 5}
    with pytest.raises(ValueError, match="all weights of the diagnosis are 0"):
        filter_rows(ROWS, nothing, reweight=True)


def test_pairs_are_named_by_their_rows(diagnosed):
    assert "rows 4, 1" in diagnosed.explain() or "row 4" in diagnosed.explain()
    assert [row["row"] for row in diagnosed.table()] == NUMBERS
    with pytest.raises(ValueError, match="row_numbers must be one per pair, 5, got 2"):
        PairSet.of(some_pairs(), [1, 2])
    with pytest.raises(ValueError, match="faults must name pairs from 0 to 4, got \\[9\\]"):
        PairSet.of(some_pairs(), faults={9: "duplicate"})


def test_a_model_may_be_opened_and_a_loss_an_object(model, found):
    loss = lddyn.Loss("dpo", beta=0.3)
    other = lddyn.diagnose(lddyn.Anatomy(model), some_pairs(), loss, close_ups=0, lbk=True)
    assert other.loss == found.loss == loss
    assert all(torch.equal(other.scores[k], found.scores[k]) for k in found.scores)
    assert repr(other) == repr(found) and str(other) != repr(other)


@pytest.mark.case("a diagnosis put beside the rows of another one")
def test_a_diagnosis_and_its_rows_are_of_one_save(tmp_path):
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        content = {"kind": "lddyn.Diagnosis", "worst": [0], "name": name}
        content["pairs"] = [{"row": 0, "contribution": 1.0}]
        (folder / "diagnosis.json").write_text(sealed(content))
        write_source(folder, folder / "rows.jsonl")
    one, other = tmp_path / "one", tmp_path / "other"
    assert read_diagnosed(one)["name"] == "one" and check_source(one) == one / "rows.jsonl"
    with pytest.raises(ValueError, match=r"rows\.jsonl: not the rows that were diagnosed"):
        check_source(one, other / "rows.jsonl")
    (one / "diagnosis.json").write_bytes((other / "diagnosis.json").read_bytes())
    with pytest.raises(ValueError, match="not of one diagnosis: diagnose again"):
        read_diagnosed(one)
    (one / "diagnosis.json").write_text(sealed({"kind": "lddyn.Estimate"}))
    with pytest.raises(ValueError, match=r"diagnosis\.json: must hold a diagnosis, got 'lddyn\.E"):
        read_diagnosed(one)
    (one / "source.json").write_text(sealed({"data": "x"}))
    with pytest.raises(ValueError, match=r"source\.json: has no data_digest"):
        check_source(one)


@pytest.mark.case("a diagnosis that was edited and sealed anew")
@pytest.mark.parametrize(
    "change",
    [
        {"pair_weights": ["x", 1.0]},
        {"pair_weights": [1.0]},
        {"pair_weights": [-1.0, 3.0]},
        {"pair_weights": [1e12, 1.0]},
        {"worst": [0, 0]},
        {"worst": ["a", "b"]},
        {"pairs": "ab"},
        {"pairs": [{"row": 0, "contribution": 1.0}] * 2},
        {"pairs": [{"row": -1, "contribution": 1.0}, {"row": 0, "contribution": 1.0}]},
        {"pairs": [{"row": 0, "contribution": None}, {"row": 1, "contribution": 1.0}]},
        {"pairs": [], "worst": [], "pair_weights": []},
    ],
)
def test_a_diagnosis_whose_parts_do_not_fit_is_named(tmp_path, change):
    pairs = [{"row": row, "contribution": -1.0} for row in range(2)]
    content = {"kind": "lddyn.Diagnosis", "worst": [1, 0], "pair_weights": [0.5, 1.5]}
    (tmp_path / "rows.jsonl").write_text("{}\n" * 2)
    for changed in ({}, change):
        (tmp_path / "diagnosis.json").write_text(sealed(content | {"pairs": pairs} | changed))
        write_source(tmp_path, tmp_path / "rows.jsonl")
        if not changed:
            assert read_diagnosed(tmp_path)["worst"] == [1, 0]
    with pytest.raises(
        ValueError, match=r"diagnosis\.json: its rows, ranks and weights do not fit"
    ):
        read_diagnosed(tmp_path)
