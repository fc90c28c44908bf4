"""Predictions of whole runs against real training, and what follows for each pair."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import zoo
from preference_pairs import log_probs, some_pairs, with_gram

import lddyn
from lddyn.sets.forecast import Simulation, least_falls
from lddyn.sets.motion import AdamMetric


def test_simulation_is_training_of_a_linear_model(found):
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(10, 40, generator=generator).double()
    linear = with_gram(found, jacobian @ jacobian.T)
    theta = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.3, momentum=0.9)
    run = lddyn.Run(lr=0.3, epochs=3, batch=2, optimizer="sgd", schedule="linear", seed=4)
    weights, batches = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0]).double(), run.batches([0, 1, 2, 4])
    assert sorted(torch.cat([b.pairs for b in batches]).tolist()) == sorted([0, 1, 2, 4] * 3)
    path = []
    for step, (batch, _) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / len(batches))
        moved = (jacobian @ theta).view(2, 5)
        loss = -torch.nn.functional.logsigmoid(0.3 * (moved[0] - moved[1])) * weights
        optimizer.zero_grad()
        loss[batch].mean().backward()
        optimizer.step()
        path.append(found.log_probs + (jacobian @ theta.detach()).view(2, 5))
    forecast = linear.simulate(run, leave_out=[3], pair_weights=weights)
    assert torch.allclose(forecast.path[1:], torch.stack(path), rtol=1e-9)
    assert torch.allclose(forecast.effects.sum(1), forecast.change[0])
    assert bool((forecast.effects[:, 3] == 0).all()) and bool((forecast.effects[:, 4] == 0).all())


def test_a_small_run_is_predicted(model, predicted, run):
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=run.lr, momentum=run.momentum)
    sides = list(zip(*some_pairs(), strict=True))
    before = torch.stack([torch.stack([log_probs(moved, e) for e in s]) for s in sides]).detach()
    for batch, _ in run.batches(range(5)):
        now = [torch.stack([log_probs(moved, s[i]) for i in batch]) for s in sides]
        margin = (now[0] - before[0, batch]) - (now[1] - before[1, batch])
        optimizer.zero_grad()
        (-torch.nn.functional.logsigmoid(0.3 * margin).mean()).backward()
        optimizer.step()
    after = torch.stack([torch.stack([log_probs(moved, e) for e in s]) for s in sides]).detach()
    change, told = (after - before).double(), predicted.forecast
    assert told.segments == 2 and float(change.abs().max()) > 0.05
    assert float((told.change - change).norm() / change.norm()) < 0.03
    linear = predicted.simulate()
    assert linear.segments == 0 and float((linear.change - change).norm() / change.norm()) < 0.03
    assert torch.allclose(told.effects.sum(1), told.change[0], atol=1e-3 * float(change.norm()))
    assert torch.equal(predicted.scores["run_contribution"], told.contribution)
    assert torch.allclose(told.weighted(torch.ones(5)), told.change[0])
    assert torch.equal(predicted.scores["run_chosen"], told.change[0])
    assert "run_contribution" not in predicted.under("ipo").scores


def real_run(model, run, pairs, beta=0.3):
    """Δ log π (2, N) by real training."""
    moved = copy.deepcopy(model)
    if run.optimizer == "sgd":
        optimizer = torch.optim.SGD(moved.parameters(), lr=run.lr, momentum=run.momentum)
    else:
        optimizer = torch.optim.AdamW(moved.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    before = torch.stack(
        [torch.stack([log_probs(moved, e) for e in s]) for s in zip(*pairs, strict=True)]
    )
    before = before.detach()
    batches = run.batches(range(len(pairs)))
    rates = run.rates(len(batches))
    for step, (batch, _) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rates[step]
        now = [torch.stack([log_probs(moved, pairs[i][s]) for i in batch]) for s in (0, 1)]
        margin = (now[0] - before[0, batch]) - (now[1] - before[1, batch])
        optimizer.zero_grad()
        (-torch.nn.functional.logsigmoid(beta * margin).mean()).backward()
        if run.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(moved.parameters(), run.max_grad_norm)
        optimizer.step()
    after = torch.stack(
        [torch.stack([log_probs(moved, e) for e in s]) for s in zip(*pairs, strict=True)]
    )
    return (after - before).detach().double()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_run_is_predicted_in_segments(model, optimizer, sketched):
    weights = [p.detach().clone() for p in model.parameters()]
    settings = {
        "adamw": {"lr": 3e-4, "max_grad_norm": 1.0, "weight_decay": 0.5, "schedule": "linear"},
        "sgd": {"lr": 2e-3, "momentum": 0.5},
    }[optimizer]
    run = lddyn.Run(epochs=4, batch=2, optimizer=optimizer, **settings)
    measured = real_run(model, run, some_pairs())
    sketch = lddyn.Sketch(k=8192) if sketched else None
    errors = []
    for refresh in (1, 4):
        told = lddyn.diagnose(
            model, some_pairs(), beta=0.3, run=run, refresh=refresh, sketch=sketch, close_ups=0
        ).forecast
        assert told.segments == refresh and told.path.shape == (13, 2, 5)
        assert torch.equal(told.path[-1] - told.path[0], told.change)
        assert torch.allclose(told.effects.sum(1) + told.left_over, told.change[0])
        assert torch.allclose(told.weighted(torch.ones(5)), told.change[0])
        left = float(told.left_over.norm() / told.change[0].norm())
        # Of the attribution: the trapezoidal rule, and under Adam one diagonal for a segment.
        assert left < (0.2 if sketched else 0.15 if optimizer == "adamw" else 0.1)
        errors.append(float((told.change - measured).norm() / measured.norm()))
    if sketched and optimizer == "adamw":
        assert max(errors) < 0.2  # its second moment: 12 steps are few for a mean
    else:
        assert errors[1] < 0.5 * errors[0] < 0.5
    assert all(map(torch.equal, weights, model.parameters()))


def test_adam_has_the_diagonal_of_its_batches(model):
    run = lddyn.Run(lr=1e-5, batch=2)
    found = lddyn.diagnose(model, some_pairs(), beta=0.3, run=run, close_ups=0)
    examples = [p[0] for p in some_pairs()] + [p[1] for p in some_pairs()]
    rows = torch.stack([zoo.oracle_jacobian(model, e).sum(0) for e in examples]).double()
    pulls = 0.15 * (rows[:5] - rows[5:])
    v = pulls.mean(0) ** 2 + pulls.var(0, correction=0) / 2
    exact = (rows / (v.sqrt() + 1e-8)) @ rows.T
    scale = exact.diagonal().sqrt()
    assert float(((found.adam.gram - exact) / (scale[:, None] * scale)).abs().max()) < 1e-3
    assert found.adam.second_moment == pytest.approx(float(v.sum()), rel=1e-3)
    # A step on all pairs: both moments are those of its own gradient.
    first = found.simulate(lddyn.Run(lr=1e-5, batch=5)).path[1] - found.log_probs
    moved = (exact @ torch.tensor([0.15 / 5] * 5 + [-0.15 / 5] * 5).double()).view(2, 5)
    moved *= 1e-5 * (float(v.sum()) / float(pulls.mean(0).square().sum())) ** 0.5
    assert torch.allclose(first, moved, rtol=1e-2, atol=1e-3 * float(moved.abs().max()))


def test_adam_is_followed_through_a_run(found):
    """Where P is a multiple of 1, simulation is Adam with a scalar second moment."""
    generator = torch.Generator().manual_seed(0)
    jacobian, n = torch.randn(10, 40, generator=generator).double(), 5
    gram = jacobian @ jacobian.T
    linear = replace(with_gram(found, gram), adam=AdamMetric(gram / 3.0, 9.0))
    run = lddyn.Run(lr=0.05, epochs=4, batch=2)
    theta, m, v = torch.zeros(40).double(), torch.zeros(40).double(), 0.0
    for step, (batch, _) in enumerate(run.batches(range(n)), 1):
        moved = (jacobian @ theta).view(2, n)
        w = 0.3 * torch.sigmoid(-0.3 * (moved[0] - moved[1]))[batch] / len(batch)
        g = -(w @ jacobian[:n][batch] - w @ jacobian[n:][batch])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * float(g @ g)
        theta = theta - 0.05 * m / (1 - 0.9**step) / (v / (1 - 0.999**step)) ** 0.5
    expected = (jacobian @ theta).view(2, n)
    assert torch.allclose(linear.simulate(run).change, expected, rtol=1e-9)


def test_a_run_without_pairs_is_told_where_the_parts_add_up(predicted):
    n = len(predicted)
    effects = torch.eye(n).double()
    effects[:, 0] = -3.0  # pair 0 lowers every chosen response
    forecast = replace(
        predicted.forecast,
        effects=effects,
        change=torch.stack([effects.sum(1)] * 2),
        left_over=None,
    )
    told = replace(predicted, forecast=forecast)
    without = told.summary()["harm"]["without"]
    kept = torch.ones(n).double()
    kept[0] = 0
    assert without["dropped"] == pytest.approx(float(forecast.weighted(kept).mean()))
    assert "Without this pair the run is predicted" in told.explain()
    left = replace(forecast, left_over=forecast.change[0])
    unexplained = replace(predicted, forecast=left)
    assert unexplained.summary()["harm"]["without"] == {
        "adds_up": False,
        "dropped": None,
        "reweighted": None,
    }
    assert "leave more than half of this prediction unexplained" in unexplained.explain()


def test_losses_are_compared_over_the_run(found, predicted):
    assert "run_chosen" not in found.objectives()[0]
    rows = {r["objective"]: r for r in predicted.objectives()}
    own = predicted.simulate().change
    assert rows["dpo"]["run_chosen"] == pytest.approx(float(own[0].mean()))
    other = predicted.under("dpop").simulate(predicted.forecast.run).change
    assert rows["dpop"]["run_rejected"] == pytest.approx(float(other[1].mean()))
    # In a linear model SFT on both responses adds the same to DPO, whatever comes after it.
    run = lddyn.Run(lr=1e-4, epochs=3, batch=2, optimizer="sgd", momentum=0.0)
    start = replace(predicted, forecast=replace(predicted.forecast, run=run))
    total = torch.zeros(5).double()
    for batch, _ in run.batches(range(5)):
        total[batch] += run.lr / len(batch)
    expected = (predicted.gram @ total.repeat(2)).view(2, 5).mean(1)
    both = {r["objective"]: r for r in start.objectives()}
    for name, value in zip(("run_chosen", "run_rejected"), expected.tolist(), strict=True):
        assert both["extend"][name] - both["dpo"][name] == pytest.approx(value)


def test_every_pair_gets_an_action(found, predicted):
    pairs = replace(predicted.pairs, faults={3: "a duplicate"})
    rows = replace(predicted, step=replace(predicted.step, pairs=pairs)).actions()
    assert [r["pair"] for r in rows] == predicted.worst()
    parts = [r["contribution"] for r in rows]
    expected = predicted.forecast.contribution.sort().values.tolist()
    assert parts == sorted(parts) == pytest.approx(expected)
    by_pair = {r["pair"]: r for r in rows}
    assert by_pair[3]["action"] == "fix" and by_pair[3]["why"] == "a duplicate"
    gram = torch.zeros(10, 10).double()  # every pair raises its own y+ and lowers all others
    gram[:5, :5] = 1.1 * torch.eye(5) - 1
    others = with_gram(found, gram)  # so that no pair is better than another
    assert others.entangled == []
    assert others.pair_weights().tolist() == pytest.approx([1.0] * 5)
    assert {r["action"] for r in others.actions()} == {"keep"}
    gram[:5, :5] = torch.eye(5)
    gram[1:5, 0] = -40.0  # pair 0 lowers the others much
    assert with_gram(found, gram).actions()[0]["action"] == "drop"
    gram = torch.eye(10).double()
    gram[:5, 5:] = gram[5:, :5] = 2 * torch.eye(5)
    alike = with_gram(found, gram)
    assert alike.entangled == list(range(5))
    assert {r["action"] for r in alike.actions()} == {"fix"}
    weights = predicted.pair_weights()
    assert float(weights.mean()) == pytest.approx(1) and bool((weights >= 0).all())
    effects = predicted.forecast.effects
    falls = [(effects @ w).clamp(max=0).square().sum() for w in (torch.ones(5).double(), weights)]
    assert falls[1] <= falls[0]


def test_real_steps_say_what_scores_are_worth(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = lddyn.diagnose(model, some_pairs(9), beta=0.3, close_ups=0, validate=6)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    told = found.validation
    assert (told["steps"], told["batch"]) == (6, 4) and told["lr"] > 0
    for name in ("own", "others"):
        assert told[name]["error"] < 0.05 and told[name]["rho"] > 0.97
        assert told[name]["low"] <= told[name]["rho"] <= told[name]["high"] + 1e-9
    rows = {r["score"]: r for r in told["scores"]}
    assert rows["own_chosen"]["own"]["rho"] > 0.5
    assert json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="validate must be a number of steps, on 4 pairs or more"):
        lddyn.diagnose(model, some_pairs(3), validate=1)


def test_pair_weights_are_the_best_of_their_kind():
    generator = torch.Generator().manual_seed(3)
    effects = torch.randn(6, 6, generator=generator).double() + torch.eye(6)

    def cost(weights):
        moved = weights @ (effects / effects.abs().amax(1, keepdim=True)).T
        return (weights - 1).square().sum(-1) + 100 * moved.clamp(max=0).square().sum(-1)

    best = least_falls(effects)
    assert bool((best >= 0).all()) and float(best.mean()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(1)
    for spread in (1.0, 0.1, 0.01):  # far and near
        near = (best + spread * torch.randn(20000, 6, generator=generator).double()).clamp(min=0)
        near /= near.mean(1, keepdim=True)
        assert float(cost(near).min()) >= float(cost(best)) - 1e-9
    falls = [float((effects @ w).clamp(max=0).sum()) for w in (torch.ones(6).double(), best)]
    assert falls[1] > 0.5 * falls[0]
    for alike in (torch.eye(4), -torch.eye(4), torch.zeros(4, 4)):  # no row is the better one
        assert least_falls(alike.double()).tolist() == pytest.approx([1.0] * 4)
    lowering = least_falls(torch.tensor([[1.0, -5.0, 0.0], [0.0, -1.0, 1.0]]).double())
    assert float(lowering[0]) == pytest.approx(5 * float(lowering[1]), abs=0.06)


def test_segments_lie_between_equal_sums_of_rates():
    def cuts(run, segments):
        start = torch.zeros(2, 12).double()
        return Simulation(start, lambda now, batch: now, run, range(12)).cuts(segments)

    constant = lddyn.Run(lr=1e-4, epochs=4, batch=4)
    assert cuts(constant, 3) == [0, 4, 8, 12] and cuts(constant, 1) == [0, 12]
    assert cuts(constant, 50) == list(range(13))
    linear = replace(constant, schedule="linear")
    assert cuts(linear, 2) == [0, 4, 12]  # rates 12, 11, 10, 9 of 78: 42, and 36
    for segments in (2, 5, 11):  # the first rate is 0
        warm = cuts(replace(linear, warmup=11), segments)
        assert warm == sorted(set(warm)) and (warm[0], warm[-1], len(warm)) == (0, 12, segments + 1)
    assert cuts(replace(constant, epochs=1), 3) == [0, 1, 2, 3]


def test_runs_that_cannot_be(model, found, predicted):
    with pytest.raises(ValueError, match="run is needed"):
        found.simulate()
    with pytest.raises(ValueError, match="Adam's diagonal is not known"):
        found.simulate(lddyn.Run(lr=1e-4))
    with pytest.raises(ValueError, match=r"pairs from 0 to 4, got \[7\]"):
        predicted.simulate(leave_out=[7])
    with pytest.raises(ValueError, match="leave a pair"):
        predicted.simulate(leave_out=range(5))
    with pytest.raises(ValueError, match=r"pair_weights must be 5 finite numbers, got \(2,\)"):
        predicted.simulate(pair_weights=torch.ones(2))
    with pytest.raises(ValueError, match="refresh must be at least 1, got 0"):
        lddyn.diagnose(model, some_pairs(), run=lddyn.Run(lr=1e-4), refresh=0)


def test_a_sketch_with_room_for_whole_gradients_is_none(model):
    run = lddyn.Run(lr=1e-4, batch=2)
    size = sum(p.numel() for p in model.parameters())
    whole, roomy = (
        lddyn.diagnose(model, some_pairs(), run=run, sketch=sketch, close_ups=0)
        for sketch in (None, lddyn.Sketch(k=4 * size))
    )
    assert roomy.stderr is None and torch.equal(roomy.gram, whole.gram)
    assert torch.equal(roomy.forecast.change, whole.forecast.change)
