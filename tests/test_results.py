"""Every public result explains itself, hands out JSON-safe numbers, and prints in a few lines."""

import json
import os
import random
import tempfile
import threading

import pytest
import torch
import zoo
from mutations import mutate

import lddyn
from lddyn.files import read_sealed, sealed
from lddyn.results import Result, load_result, save_result

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama").eval()


@pytest.fixture(scope="module")
def step(model):
    chosen, rejected = zoo.examples()
    update = lddyn.DPO(chosen, rejected)
    observed = {"chosen": chosen, "rejected": rejected}
    return lddyn.decompose(model, observed, update, 1e-3, optimizer="adamw")


def diagnosed(model):
    run = lddyn.Run(lr=1e-4, epochs=2, batch=1)
    pairs = [zoo.examples(), zoo.examples()[::-1]]
    return lddyn.diagnose(model, pairs, run=run, close_ups=1, row_numbers=[3, 5])


def features(model):
    return lddyn.features(model, zoo.examples(), lddyn.Sketch(k=1000))


def stored(model):
    feats, (one, other) = features(model), zoo.examples()
    with lddyn.Store.create(tempfile.mkdtemp(), {}, feats.layout) as store:
        store.append(one, feats.rows[: len(one)])
        store.append(other, feats.rows[len(one) :])
    return store


# Name → how it is made, from a model and a decomposed step. A new result belongs here.
RESULTS = {
    "Decomposition": lambda model, step: step,
    "Observed": lambda model, step: step[0],
    "Verification": lambda model, step: step.verify([1e-3, 5e-4]),
    "MassFlow": lambda model, step: lddyn.massflow(
        model, zoo.examples()[1], lddyn.DPO(*zoo.examples()), 1e-3
    ),
    "Estimate": lambda model, step: lddyn.Estimate(torch.randn(3, 2), torch.rand(3, 2), 9),
    "Diagnosis": lambda model, step: diagnosed(model),
    "SequenceDiagnosis": lambda model, step: lddyn.diagnose(
        model, lddyn.SFT(list(zoo.examples())), close_ups=0
    ),
    "Forecast": lambda model, step: diagnosed(model).forecast,
    "Audit": lambda model, step: lddyn.audit(
        None, [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "no row"]
    ),
    "LowRank": lambda model, step: lddyn.ntk(model, *zoo.examples()).lowrank(4),
    "Features": lambda model, step: features(model),
    "Plan": lambda model, step: lddyn.plan(model, zoo.examples(), rtol=0.3),
}
# Objects without numbers of their own, which only have to print in a few lines.
OTHERS = {
    "NTK": lambda model, step: lddyn.ntk(model, *zoo.examples()),
    "Shift": lambda model, step: lddyn.ntk(model, *zoo.examples()).explain(),
    "Flow": lambda model, step: RESULTS["MassFlow"](model, step).measured,
    "Loss": lambda model, step: lddyn.Loss("kto"),
    "Run": lambda model, step: lddyn.Run(lr=1e-4),
    "Sketch": lambda model, step: lddyn.Sketch(),
    "Layout": lambda model, step: features(model).layout,
    "Store": lambda model, step: stored(model),
    "Hits": lambda model, step: (store := stored(model)).query(
        store.rows()[:2], 3, layout=features(model).layout
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_verbs(name, model, step, tmp_path):
    result = RESULTS[name](model, step)
    assert isinstance(result, getattr(lddyn, name)) and isinstance(result, Result)
    for numbers in (result.summary(), result.to_dict()):
        text = json.dumps(numbers, allow_nan=False)  # no NaN, no tensor, no key that is no text
        assert json.loads(text) == numbers and "tensor(" not in text
    assert len(json.dumps(result.summary())) < 10_000
    explained = result.explain()
    assert explained and "tensor(" not in explained and str(result) == explained
    short = repr(result)
    assert 1 <= len(short.splitlines()) <= 10 and "tensor(" not in short
    assert short.startswith(name)
    if not hasattr(result, "save"):
        assert name in ("Observed", "Plan")  # a part of a Decomposition; holds a model
        return
    path = tmp_path / "deep" / "result"
    result.save(path)
    other = [model] if name == "LowRank" else []
    back = type(result).load(path, *other)
    assert back.to_dict() == result.to_dict() and back.explain() == explained
    assert not [p for p in path.parent.iterdir() if p.suffix == ".tmp"]
    with pytest.raises(ValueError):
        type(result).load(tmp_path / "absent", *other)


@pytest.mark.parametrize("name", [n for n in RESULTS if n not in ("Observed", "Plan")])
def test_damaged_files_are_never_read(name, model, step, tmp_path):
    """Any change of any file is an error that names the result, or changes nothing that is read."""
    more = [model] if name == "LowRank" else []
    second = lddyn.decompose(model, zoo.examples()[0], lddyn.SFT(zoo.examples()[1]), 2e-3)
    saves = []
    for number, held in enumerate((step, second)):
        result = RESULTS[name](model, held)
        folder = tmp_path / str(number)
        result.save(folder / "result")
        saves.append({p.name: p.read_bytes() for p in folder.iterdir()})
        if not number:
            whole = [result.to_dict()]
    whole.append(type(result).load(folder / "result", *more).to_dict())
    rng, refused = random.Random(name), 0
    for turn in range(60):
        damaged = mutate(*saves, rng)
        place = tmp_path / f"damaged-{turn}"
        place.mkdir()
        for file, data in damaged.items():
            (place / file).write_bytes(data)
        try:
            assert type(result).load(place / "result", *more).to_dict() in whole
        except ValueError as error:
            assert f"lddyn.{name}" in str(error) and str(place) in str(error)
            refused += 1
    assert refused > 40


def test_an_interrupted_save_leaves_the_result_before_it(step, model, tmp_path, monkeypatch):
    path = tmp_path / "result"
    step.save(path)
    second = lddyn.decompose(model, zoo.examples()[0], lddyn.SFT(zoo.examples()[1]), 2e-3)
    refused, here = set(), threading.get_ident()
    # A collection in the middle of a save may close what other tests left open: it writes, too.
    for call in ("fsync", "replace", "pwrite"):
        for allowed in (0, 1):
            real, calls = getattr(os, call), []

            def limited(*arguments, call=call, real=real, calls=calls, allowed=allowed):
                if threading.get_ident() != here:  # what other tests left running
                    return real(*arguments)
                calls.append(1)
                if len(calls) <= allowed:
                    return real(*arguments)
                refused.add((call, allowed))
                raise OSError("no space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(os, call, limited)
                with pytest.raises(OSError, match="no space left"):
                    second.save(path)
            assert lddyn.Decomposition.load(path).to_dict() == step.to_dict()
    assert len(refused) == 6, refused


@pytest.mark.parametrize("name", OTHERS)
def test_a_short_repr(name, model, step):
    short = repr(OTHERS[name](model, step))
    assert 1 <= len(short.splitlines()) <= 10 and "tensor(" not in short
    assert short.startswith(name)


def test_files_of_another_kind_or_version_are_refused_by_name(tmp_path):
    save_result(tmp_path / "x", "lddyn.Estimate", 7, {"value": torch.zeros(1)}, {"samples": None})
    assert load_result(tmp_path / "x", "lddyn.Estimate", 7)[1]["samples"] is None
    with pytest.raises(ValueError, match=r"its format is 7, and this version .* reads format 1"):
        lddyn.Estimate.load(tmp_path / "x")
    with pytest.raises(ValueError, match=r"cannot be read as lddyn\.MassFlow: it holds lddyn\.Est"):
        lddyn.MassFlow.load(tmp_path / "x")


def test_numbers_that_json_does_not_know_become_none():
    one = lddyn.Estimate(torch.tensor([float("nan"), 0.0]), torch.tensor([1.0, 1.0]))
    assert one.to_dict()["value"] == [None, 0.0]
    assert json.loads(json.dumps(one.summary(), allow_nan=False))["mean"] is None
    empty = lddyn.Estimate(torch.zeros(0, 2), torch.zeros(0, 2))
    assert "no entries" in empty.explain() and empty.summary()["mean"] is None


@pytest.mark.case("a saved result that was edited and sealed anew")
def test_entries_of_another_type_are_errors_that_name_the_file(tmp_path):
    """As another version could write them under the same number of the format."""
    path = tmp_path / "kept"
    lddyn.Estimate(torch.ones(2), torch.ones(2), 9).save(path)
    record = tmp_path / "kept.json"
    content = read_sealed(record)
    for change in ({"samples": "x"}, {"samples": -1}, {"samples": []}, {"tensors": None}):
        record.write_text(sealed({**content, **change}))
        with pytest.raises(ValueError, match=f"{path}: cannot be read as lddyn.Estimate"):
            lddyn.Estimate.load(path)
    record.write_text(sealed({k: v for k, v in content.items() if k != "samples"}))
    with pytest.raises(ValueError, match="it has no 'samples'"):
        lddyn.Estimate.load(path)
    for text in ("[]", "null", "[" * 10**5, sealed({**content, "format": 99}), "\ufeff{}"):
        record.write_text(text)
        with pytest.raises(ValueError, match=str(path)):
            lddyn.Estimate.load(path)
