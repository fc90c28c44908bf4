"""Rows of a diagnosis in a store: kept by an interrupt, and used again."""

import pytest
import torch
from preference_pairs import some_pairs

import lddyn
from lddyn.store import build

SKETCH = lddyn.Sketch(k=512)


def test_an_interrupted_diagnosis_goes_on_and_another_one_reuses_its_rows(
    model, tmp_path, monkeypatch
):
    pairs, path = some_pairs(), tmp_path / "rows"
    real, seen = build.features, []

    def stopped(model, examples, *arguments, **options):
        if seen:
            raise KeyboardInterrupt
        seen.append(len(examples))
        return real(model, examples, *arguments, **options)

    monkeypatch.setattr(build, "features", stopped)
    monkeypatch.setattr(build, "WINDOW", 3)
    with pytest.raises(KeyboardInterrupt):
        lddyn.diagnose(model, pairs, store=path, sketch=SKETCH, close_ups=0)
    kept = lddyn.Store.open(path)
    assert 0 < len(kept) < 2 * len(pairs)
    made = []

    def counted(model, examples, *arguments, **options):
        made.append(len(examples))
        return real(model, examples, *arguments, **options)

    monkeypatch.setattr(build, "features", counted)
    whole = lddyn.diagnose(model, pairs, store=path, sketch=SKETCH, close_ups=0)
    assert sum(made) == len({e.content_id for p in pairs for e in p}) - len(kept)
    made.clear()
    again = lddyn.diagnose(model, pairs, "ipo", store=path, sketch=SKETCH, close_ups=0)
    some = lddyn.diagnose(model, pairs[1:3], store=path, sketch=SKETCH, close_ups=0)
    assert made == []
    torch.testing.assert_close(again.gram, whole.gram, rtol=0, atol=0)
    n, few = len(pairs), torch.tensor([1, 2])
    index = torch.cat([few, few + n])
    torch.testing.assert_close(some.gram, whole.gram[index][:, index], rtol=1e-6, atol=1e-9)
    exact = lddyn.diagnose(model, pairs, close_ups=0)
    off = (whole.gram - exact.gram).abs() / whole.stderr.clamp(min=1e-12)
    assert float(off.median()) < 2
    assert float(off.amax()) > 0


def test_single_sequences_use_a_store(model, tmp_path):
    rows = [chosen for chosen, _ in some_pairs()]
    first = lddyn.diagnose(model, rows, "sft", store=tmp_path / "rows", sketch=SKETCH)
    second = lddyn.diagnose(model, rows, "sft", store=tmp_path / "rows", sketch=SKETCH)
    assert first.to_dict() == second.to_dict()
    assert first.stderr is not None


def test_a_run_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="rank with the store first"):
        lddyn.diagnose(model, some_pairs(), store=tmp_path / "rows", run=lddyn.Run(lr=1e-4))
    assert not (tmp_path / "rows").exists()
