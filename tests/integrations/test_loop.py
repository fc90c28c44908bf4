"""Watching loops through their optimizer: plain, accelerate's, DDP and FSDP2."""

import contextlib
import json
import warnings

import pytest
import torch
from ranks import run_ranks
from watched_runs import new_model, rows

import lddyn
from lddyn.integrations.loop import Watch


def looped(folder=None, steps=4, model=None, optimizer=None, start=0, **options):
    """Weights, and what was watched, of a loop over one batch with momentum."""
    model = new_model(dropout=0.1) if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(5)
    ids = torch.randint(3, 63, (4, 6))
    watch = contextlib.nullcontext()
    if folder is not None:
        given = {"probes": {"greeting": [lddyn.Example([3, 4], [5, 6])]}, "budget": 1e4}
        watch = Watch(model, optimizer, folder=folder, step=start, **{**given, **options})
    with watch:
        for _ in range(start, steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], watch


def test_a_plain_loop_is_watched(tmp_path, tokenizer):
    logged = []
    plain, _ = looped()
    watched, watch = looped(
        tmp_path,
        probes=lddyn.probes.probe_set.ProbeSet(rows(4)),
        tokenizer=tokenizer,
        predict=2,
        every=2,
        log=lambda values, step: logged.append((step, values)),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [row["step"] for row in watch.rows] == [step for step, _ in logged] == [0, 2, 4]
    last = watch.rows[-1]
    assert last["first_order/chosen"] == pytest.approx(last["step/chosen"], rel=0.5)
    assert logged[-1][1]["lddyn/change/chosen"] == last["change/chosen"]
    model = watch.model.eval()
    probes = watch.probes.encode(tokenizer)
    example = probes.examples[0]
    logits = model(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
    value = logits[list(example.positions), list(example.targets)].sum().item()
    lines = (tmp_path / "dynamics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["each"][0] == pytest.approx(value, abs=1e-3)


def test_a_loop_under_autocast_is_watched_without(tmp_path):
    _, plain = looped(tmp_path / "a", steps=0)
    with torch.autocast("cpu", torch.bfloat16):
        _, watch = looped(tmp_path / "b", steps=0, model=torch.compile(new_model(dropout=0.1)))
    assert watch.rows == plain.rows and [row["step"] for row in watch.rows] == [0]


def test_a_loop_goes_on_after_a_checkpoint(tmp_path):
    model = new_model(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, first = looped(tmp_path, 2, model, optimizer)
    other = Watch(model, optimizer, first.probes, folder=tmp_path, budget=1e4)
    other.load_state_dict(first.state_dict())
    assert other.step == 2
    _, second = looped(tmp_path, 4, model, optimizer, start=other.step)
    assert [row["step"] for row in second.rows] == [0, 1, 2, 3, 4]
    _, third = looped(tmp_path, 1, model, optimizer)  # another run begins anew
    assert [row["step"] for row in third.rows] == [0, 1]
    assert len((tmp_path / "dynamics-1.jsonl").read_text().splitlines()) == 5


def test_a_loop_goes_on_after_an_error(tmp_path, monkeypatch):
    plain, _ = looped()
    monkeypatch.setattr("lddyn.integrations.watcher.measure", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"stopped watching \(begin\): ZeroDivisionError"):
        watched, watch = looped(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert watch.rows == [] and watch.step == 4


def test_an_error_of_the_loop_is_raised_and_leaves_no_hook(tmp_path):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = {"greeting": [lddyn.Example([3, 4], [5, 6])]}
    with pytest.raises(KeyError), Watch(model, optimizer, probes, folder=tmp_path, budget=1e4):
        raise KeyError("of the loop")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got NoneType"):
        Watch(model, None, probes, folder=tmp_path)


def test_accelerate_counts_true_steps(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()  # of the trainers above
    after = []
    for watched in (False, True):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = new_model(dropout=0.0)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
        watch = Watch(
            model,
            optimizer,
            {"greeting": [lddyn.Example([3, 4], [5, 6])]},
            folder=tmp_path,
            budget=1e4,
        )
        accelerator.register_for_checkpointing(watch)
        torch.manual_seed(2)
        with watch if watched else contextlib.nullcontext():
            for _ in range(6):
                ids = torch.randint(3, 63, (2, 6))
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=ids, labels=ids).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        after.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert [row["step"] for row in watch.rows] == [0, 1, 2, 3]
    accelerator.save_state(str(tmp_path / "checkpoint"))
    watch.load_state_dict({"step": 0})
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert watch.step == 3


@pytest.mark.slow
def test_two_processes_are_watched(tmp_path):
    from two_processes import main

    run_ranks(lambda: main(tmp_path), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for way in ("ddp", "accelerated", "fsdp1", "fsdp2"):
        assert first[way]["equal"] and second[way]["equal"]
    for way in ("ddp", "accelerated", "fsdp2"):
        assert [row["step"] for row in first[way]["rows"]] == [0, 2, 4]
        lines = (tmp_path / way / "dynamics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    # The same model on the same data, however its parameters lie.
    for a, b in zip(first["ddp"]["rows"], first["fsdp2"]["rows"], strict=True):
        assert a["log_prob/one"] == pytest.approx(b["log_prob/one"], abs=1e-4)
    assert "first_order/one" in first["ddp"]["rows"][-1]
    assert "first_order/one" not in first["fsdp2"]["rows"][-1]
    assert "leaves out predict=1" in first["fsdp2"]["said"][0]
    assert second["ddp"]["rows"] == [] and len(second["fsdp2"]["rows"]) == 3
    assert "FSDP 1), expected whole parameters" in first["fsdp1"]["said"][0]
    assert first["fsdp1"]["rows"] == []
    assert first["failed"]["equal"] and second["failed"]["equal"]
    assert first["failed"]["rows"] == second["failed"]["rows"] == []
    assert "no/such/file.jsonl" in second["failed"]["said"][0]


@pytest.mark.case("passes that the budget leaves out are said")
def test_passes_that_the_budget_leaves_out_are_said(tmp_path):
    with pytest.warns(UserWarning, match=r"left out 4 of the passes that every=1 asks for.*budget"):
        looped(tmp_path, every=1, budget=1e-9, predict=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        looped(tmp_path / "b", every=2)
        looped(tmp_path / "c", budget=1e-9)  # as many passes as the budget has room for
