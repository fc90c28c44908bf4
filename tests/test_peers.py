"""The driver of the peers' Grams, where no peer is installed."""

import sys

import peers
import pytest
from peer_methods import METHODS, Method, batches, losses

SIZES = {"hidden": 64, "layers": 2, "length": 12, "count": 6, "vocabulary": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    peers.write_problem(folder, SIZES)
    return folder


@pytest.fixture(scope="module", params=peers.CASES)
def case(request, folder):
    return request.param, peers.Truth(folder, request.param)


def test_methods_agree(folder, case):
    name, truth = case
    rows = peers.load_rows(folder, name)
    for way, method in METHODS.items():
        if method.env or name not in method.cases:
            continue
        answer = method.run(peers.load_model(folder), rows)
        found = peers.errors(answer.gram.double(), truth, answer.covers)
        assert found["full"] < (1e-5 if method.exact else 0.5), way
        assert method.exact or answer.stored > 0, way


def test_rows_say_the_same_in_batches_of_any_size(folder, case):
    name, _ = case
    rows, model = peers.load_rows(folder, name), peers.load_model(folder)
    one = [losses(model, *batch) for batch in batches(rows, 1)]
    some = [losses(model, *batch) for batch in batches(rows, 5)]
    assert sum(x.sum() for x in one).item() == pytest.approx(sum(x.sum() for x in some).item())


def test_positions_cut_the_same_total(folder):
    truth = peers.Truth(folder, "tokens")
    tokens, positions = truth.sum("grams"), truth.sum("positions")
    assert positions.sum().item() == pytest.approx(tokens.sum().item(), rel=1e-10)
    assert peers.position_section(truth)["gram_error"] > 0.1


def test_a_process_of_its_own(folder, monkeypatch):
    row = peers.measure("torch, loop", "tokens", folder, sys.executable, 1, 100)
    assert row["seconds"] > 0 and row["peak_bytes"] > 0 and "torch" in row["versions"]
    assert len(row["gram"]) == SIZES["length"]
    assert Method(print, needs="no_such_package").missing
