"""Sets of single sequences: SFT, KTO and GRPO, in a step and in a run, held to real ones."""

import copy

import pytest
import torch
import zoo

import lddyn

PROMPTS = ([1, 2], [3, 4, 5])


def response(prompt, count, generator):
    ids = torch.randint(0, 61, (count,), generator=generator).tolist()
    return lddyn.Example(prompt, ids)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    return [response(PROMPTS[i % 2], 3 + i % 3, generator) for i in range(6)]


@pytest.fixture(scope="module")
def held_out():
    generator = torch.Generator().manual_seed(2)
    return {"refusal": response([7, 8], 4, generator), "other": response([9], 3, generator)}


OBJECTIVES = {
    "sft": lddyn.SFT,
    "kto": lambda rows: lddyn.KTO(rows, [True, False] * 3, undesirable_weight=0.5),
    "grpo": lambda rows: lddyn.GRPO(rows, [1, 0, 0, 1, 0.5, 0.2]),
    "dr_grpo": lambda rows: lddyn.GRPO(rows, [1, 0, 0, 1, 0.5, 0.2], loss_type="dr_grpo"),
    "custom": lambda rows: lddyn.Objective(lambda lp: -lp[0].sum() + 0.5 * lp[3].sum(), rows),
}


def moved(model, before, examples):
    """Measured Δ log π of some responses, (n,)."""
    with torch.no_grad():
        return torch.stack(
            [
                zoo.token_log_probs(model, e).sum() - zoo.token_log_probs(before, e).sum()
                for e in examples
            ]
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_the_loss(model, rows, held_out, name):
    objective = OBJECTIVES[name](rows)
    diagnosis = lddyn.diagnose(model, objective, observe=held_out)
    policy, lr = copy.deepcopy(model), 1e-4
    prepared = objective.prepare(lddyn.Anatomy(policy))
    loss = prepared.loss([zoo.token_log_probs(policy, e) for e in rows])
    names = dict(policy.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(names.values(), gradients, strict=True):
            if gradient is not None:
                parameter -= lr * gradient
    measured = moved(policy, model, [*rows, *held_out.values()])
    step = diagnosis.step
    predicted = lr * torch.cat([step.change[0], step.observed_effects.mean(1)])
    scale = float(measured.abs().amax())
    torch.testing.assert_close(predicted, measured.double(), rtol=0, atol=0.01 * scale)
    # Effects of single sequences add up to those of the set.
    torch.testing.assert_close(diagnosis.effects.sum(1), step.change[0])


@pytest.mark.parametrize(("name", "optimizer"), [("sft", "adamw"), ("kto", "sgd"), ("sft", "sgd")])
def test_a_run_is_that_of_the_trainer(model, rows, held_out, name, optimizer):
    objective = OBJECTIVES[name](rows)
    lr = {"adamw": 3e-4, "sgd": 0.02}[optimizer]
    settings = {"epochs": 2, "batch": 4, "optimizer": optimizer, "schedule": "linear"}
    momentum = 0.9 if optimizer == "adamw" else 0.0
    run = lddyn.Run(lr=lr, momentum=momentum, **settings)
    diagnosis = lddyn.diagnose(model, objective, observe=held_out, run=run, refresh=3)
    policy = copy.deepcopy(model)
    prepared = objective.prepare(lddyn.Anatomy(policy))
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    real = kind(policy.parameters(), lr=lr, weight_decay=0.0)
    batches = run.batches(range(len(rows)))
    for batch, rate in zip(batches, run.rates(len(batches)), strict=True):
        real.param_groups[0]["lr"] = rate
        part = prepared.subset(batch.pairs.tolist())
        real.zero_grad()
        part.loss([zoo.token_log_probs(policy, e) for e in part.examples]).backward()
        real.step()
    measured = moved(policy, model, [*rows, *held_out.values()]).double()
    predicted = torch.cat([diagnosis.forecast.change[0], diagnosis.forecast.observed])
    assert float(measured[: len(rows)].abs().amax()) > 0.05
    atol = 0.1 * float(measured.abs().amax())
    torch.testing.assert_close(predicted, measured, rtol=0.1, atol=atol)
    parts = diagnosis.effects.sum(1) + diagnosis.forecast.left_over
    torch.testing.assert_close(parts, diagnosis.forecast.change[0])


@pytest.fixture(scope="module")
def rollouts(model, rows, held_out):
    objective = OBJECTIVES["grpo"](rows)
    return lddyn.diagnose(model, objective, observe=held_out, row_numbers=[4, 5, 6, 7, 8, 9])


def test_what_is_told(rollouts):
    summary = rollouts.summary()
    assert summary["raised"] + summary["lowered"] + summary["idle"] == 6
    assert rollouts.sequences.labels[3] == "group 1, reward 1"
    assert rollouts.target == "the observed sequences"
    total = rollouts.contribution.sum()
    torch.testing.assert_close(total, rollouts.step.observed_effects.mean())
    raised = rollouts.step.wanted > 0
    parts = sum(rollouts.sources().values())
    torch.testing.assert_close(torch.tensor(parts).double(), rollouts.step.change[0][raised].mean())
    for row in rollouts.table():
        assert row["row"] == row["sequence"] + 4
        assert (row["weight"] < 0) == (row["wanted"] == 1)
    assert "grpo raises" in rollouts.explain()


def test_saved_and_read(rollouts, tmp_path):
    rollouts.save(tmp_path / "kept")
    read = lddyn.SequenceDiagnosis.load(tmp_path / "kept")
    assert read.to_dict() == rollouts.to_dict()
    assert repr(read) == repr(rollouts)
    torch.testing.assert_close(read.gram, rollouts.gram)


def test_a_page(rollouts, tmp_path):
    page = rollouts.report(tmp_path / "index.html", {"model": "<b>llama</b>"})
    text = page.read_text()
    assert "<b>llama" not in text
    assert "group 1, reward 1" in text
    assert lddyn.SequenceDiagnosis.load(tmp_path / "diagnosis").objective == "grpo"


def test_sketched_rows_have_errors_that_hold_the_exact_ones(model, rows, held_out):
    exact = lddyn.diagnose(model, lddyn.SFT(rows), observe=held_out)
    sketched = lddyn.diagnose(
        model, lddyn.SFT(rows), observe=held_out, sketch=lddyn.Sketch(k=2048, seed=3)
    )
    off = (sketched.step.change - exact.step.change).abs() / sketched.step.stderr
    assert sketched.summary()["uncertain"] is not None
    assert float(off.amax()) < 4
    assert float(off.amax()) > 0


def test_plain_rows(model, rows):
    sft = lddyn.diagnose(model, rows, "sft")
    assert sft.objective == "sft"
    assert sft.target == "the sequences that the loss raises"
    kto = lddyn.diagnose(model, [(e, i % 2 == 0) for i, e in enumerate(rows)], beta=0.3)
    assert kto.step.described["beta"] == 0.3
    assert kto.sequences.labels[:2] == ("desirable", "undesirable")


def test_refusals(model, rows):
    with pytest.raises(ValueError, match="weighs the tokens of this response differently"):
        lddyn.diagnose(model, lddyn.SFT(rows, loss_type="dft"))
    with pytest.raises(ValueError, match="a custom loss is a function of all its examples"):
        lddyn.diagnose(model, OBJECTIVES["custom"](rows), run=lddyn.Run(lr=1e-3))
    with pytest.raises(ValueError, match="give the pairs"):
        lddyn.diagnose(model, lddyn.DPO(rows[0], rows[2]))
    with pytest.raises(ValueError, match="have the objective 'sft', got 'dpo'"):
        lddyn.diagnose(model, rows, "dpo")
    with pytest.raises(ValueError, match="rows must be all of one kind"):
        lddyn.diagnose(model, [rows[0], (rows[1], True)])
    with pytest.raises(ValueError, match="validate: of pairs alone"):
        lddyn.diagnose(model, rows, validate=3)
    with pytest.raises(ValueError, match="has its own loss"):
        lddyn.diagnose(model, lddyn.SFT(rows), "sft")
