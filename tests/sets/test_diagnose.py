"""The diagnosis of preference sets against explicit Jacobians and real steps."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
import zoo

import lddyn
from lddyn import report
from lddyn.errors import UnsupportedModelError
from lddyn.objectives import LOSSES
from lddyn.sets.diagnose import edit_distance
from lddyn.sets.forecast import projected
from lddyn.steps.flow import softmax_step


def some_pairs(count=5):
    generator = torch.Generator().manual_seed(2)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist()

    found = []
    for _ in range(count):
        prompt, shared = draw(3, 6), draw(1, 3)
        found.append(tuple(lddyn.Example(prompt, shared + draw(2, 6)) for _ in range(2)))
    return found


@pytest.fixture(scope="module")
def model():
    return zoo.train(zoo.build("llama")).eval()


@pytest.fixture(scope="module")
def found(model):
    return lddyn.diagnose(model, some_pairs(), beta=0.3)


def log_probs(model, example):
    return zoo.token_log_probs(model, example).sum()


def test_the_gram_is_that_of_the_gradients(model, found):
    examples = [p[0] for p in some_pairs()] + [p[1] for p in some_pairs()]
    rows = torch.stack([zoo.oracle_jacobian(model, e).sum(0) for e in examples])
    exact = rows @ rows.T
    scale = rows.norm(dim=1)
    assert float(((found.gram - exact) / (scale[:, None] * scale)).abs().max()) < 1e-5
    n = len(found)
    for name, places in {
        "norm_chosen": (range(n), range(n)),
        "norm_rejected": (range(n, 2 * n), range(n, 2 * n)),
        "inner": (range(n), range(n, 2 * n)),
    }.items():
        expected = exact[list(places[0]), list(places[1])]
        assert torch.allclose(found.scores[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "dpo+nll", "kto"])
def test_a_real_step_does_what_is_foretold(model, objective):
    pairs, rate = some_pairs(), 1e-5
    reference = torch.randn(2, len(pairs), generator=torch.Generator().manual_seed(0)) - 20
    found = lddyn.diagnose(model, pairs, objective, reference=reference, tokens=0)
    moved = copy.deepcopy(model).double()
    with lddyn.true_float64():
        before = torch.stack([log_probs(moved, e) for p in zip(*pairs, strict=True) for e in p])
        total = 0.0
        for i, (chosen, rejected) in enumerate(pairs):
            step = lddyn.preference(
                objective, chosen, rejected, reference=tuple(reference[:, i].tolist())
            )
            tokens = [zoo.token_log_probs(moved, e) for e in (chosen, rejected)]
            step.prepare(moved, lambda m, e: zoo.token_log_probs(m, e))
            total = total + step.loss(tokens) / len(pairs)
        gradients = torch.autograd.grad(total, list(moved.parameters()), allow_unused=True)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradients, strict=True):
                if g is not None:
                    p -= rate * g
            after = torch.stack([log_probs(moved, e) for p in zip(*pairs, strict=True) for e in p])
    change = ((after - before) / rate).detach().view(2, -1)
    expected = torch.stack([found.scores["set_chosen"], found.scores["set_rejected"]])
    assert float((expected - change).norm() / change.norm()) < 5e-3


def test_own_steps_and_shares_add_up(found):
    s, n = found.scores, len(found)
    own = s["weight_chosen"] * s["norm_chosen"] + s["weight_rejected"] * s["inner"]
    assert torch.allclose(s["own_chosen"], own)
    assert torch.allclose(s["gives"].sum(), s["set_chosen"].mean())
    total = sum(v for i in range(n) for _, v in found.culprits(i, n))
    assert total <= 0


def test_dpo_begins_with_half_of_beta(found):
    assert torch.allclose(found.scores["weight_chosen"], torch.full((5,), 0.15).double())
    assert torch.allclose(found.scores["weight_rejected"], torch.full((5,), -0.15).double())


def test_a_sketched_gram_is_within_its_errors(model, found):
    sketch = lddyn.Sketch(k=2048, repeats=8, seed=1)
    other = lddyn.diagnose(model, some_pairs(), beta=0.3, sketch=sketch, tokens=0)
    n = len(found)
    for i in range(n):  # a pair's own three scalars stay exact
        for a in (i, n + i):
            for b in (i, n + i):
                assert float(other.stderr[a, b]) == 0
                assert float(other.gram[a, b]) == pytest.approx(float(found.gram[a, b]), rel=1e-4)
    off = other.stderr > 0
    z = ((other.gram - found.gram) / other.stderr)[off]
    assert off.sum() == 4 * n * (n - 1) and float(z.abs().median()) < 2


def test_little_memory_is_sketched(model, found):
    other = lddyn.diagnose(model, some_pairs(), beta=0.3, memory="400KB", sketch=None, tokens=0)
    assert other.stderr is not None and found.stderr is None


def test_ches_and_similarity(model, found):
    chosen, rejected = some_pairs()[2]
    sums = []
    for e in (chosen, rejected):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([e.ids])).last_hidden_state
        sums.append(hidden[0, list(e.positions)].double().sum(0))
    ches = float(sums[0] @ sums[1] - sums[0] @ sums[0])
    assert float(found.scores["ches"][2]) == pytest.approx(ches, rel=1e-5)
    m, k = len(chosen), len(rejected)
    each = float(sums[0] @ sums[1] / (m * k) - sums[0] @ sums[0] / m**2)
    assert float(found.scores["ches_per_token"][2]) == pytest.approx(each, rel=1e-5)


def test_the_heads_part_is_a_part(model):
    frozen = copy.deepcopy(model)
    for name, p in frozen.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    found = lddyn.diagnose(frozen, some_pairs())
    assert torch.allclose(found.scores["head_inner"], found.scores["inner"], rtol=1e-4, atol=1e-5)


def test_tokens_add_up_to_what_their_pair_does(model, found):
    assert found.named and set(found.worst(4)) <= set(found.named)
    for i in found.named:
        rows = found.tokens(i)
        chosen, rejected = some_pairs()[i]
        assert [r["token"] for r in rows] == [*chosen.targets, *rejected.targets]
        for name in ("own_chosen", "own_rejected", "gives", "ches"):
            scale = sum(abs(r[name]) for r in rows)
            total = sum(r[name] for r in rows)
            assert total == pytest.approx(float(found.scores[name][i]), abs=1e-5 * scale)
        down = sum(r["nthr"] for r in rows if r["response"] == "rejected")
        assert down == pytest.approx(float(found.scores["head_inner"][i]), rel=1e-5)


def test_a_token_does_what_its_gradient_says(model, found):
    i = found.named[0]
    chosen, rejected = some_pairs()[i]
    rows = torch.cat([zoo.oracle_jacobian(model, e) for e in (chosen, rejected)])
    whole = [rows[: len(chosen)].sum(0), rows[len(chosen) :].sum(0)]
    sides = [0.15] * len(chosen) + [-0.15] * len(rejected)
    for row, g, w in zip(found.tokens(i), rows, sides, strict=True):
        for name, direction in zip(("own_chosen", "own_rejected"), whole, strict=True):
            bound = 1e-4 * abs(w) * float(g.norm() * direction.norm())
            assert row[name] == pytest.approx(w * float(g @ direction), abs=bound)
    culprits = dict(found.culprits(i, len(found)))
    told = found.culprit_tokens(i)
    assert told == sorted(told, key=lambda r: r["effect"])
    for j in {r["pair"] for r in told}:
        each = [r["effect"] for r in told if r["pair"] == j]
        assert len(each) == sum(map(len, some_pairs()[j])) and j != i
        assert sum(each) == pytest.approx(culprits[j], abs=1e-5 * sum(map(abs, each)))


def test_nthr_is_as_published(model, found):
    i = found.named[0]
    residuals, states = [], []
    for e in some_pairs()[i]:
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([e.ids])).last_hidden_state[0]
        states.append(hidden[list(e.positions)].double())
        pi = (states[-1] @ model.lm_head.weight.detach().double().T).softmax(-1)
        residuals.append(torch.nn.functional.one_hot(torch.tensor(e.targets), pi.shape[1]) - pi)
    m = residuals[0].T @ states[0]  # (V, d), as in the paper's vectorised form
    s = [((g @ m) * h).sum(1) for g, h in zip(residuals, states, strict=True)]
    rows = found.tokens(i)
    assert [r["nthr"] for r in rows] == pytest.approx(torch.cat(s).tolist(), rel=1e-4, abs=1e-4)
    selected = [r["nthr_selects"] for r in rows if r["response"] == "rejected"]
    assert selected == (s[1] > s[0].mean()).tolist()
    assert not any(r["nthr_selects"] for r in rows if r["response"] == "chosen")


def test_tokens_are_told(model):
    found = lddyn.diagnose(model, some_pairs(4), "unlikelihood", tokens=1)
    told, worst, deepest = " ".join(found.tell()), found.worst(1)[0], found.falling(1)[0]
    assert f"In pair {worst} it is pushing down '" in told and "it takes." in told
    ahead = replace(found, foretold=found.simulate(lddyn.Run(lr=0.1, optimizer="sgd")))
    assert "of what it takes in the first step." in " ".join(ahead.tell())
    assert float(found.scores["set_chosen"][deepest]) < 0
    row = found.culprit_tokens(deepest)[0]
    assert f"do it: {row['text']!r} of pair {row['pair']}, pushed down" in told


def test_tokens_follow_the_objective(found):
    other, i = found.under("simpo"), found.named[0]
    total = sum(r["own_chosen"] for r in other.tokens(i))
    assert total == pytest.approx(float(other.scores["own_chosen"][i]), rel=1e-4)
    assert total != pytest.approx(float(found.scores["own_chosen"][i]), rel=1e-4)


def test_lbk_and_squeeze(model, found):
    chosen, rejected = some_pairs()[1]
    moved, rate = copy.deepcopy(model).double(), 1e-6
    with lddyn.true_float64():
        gradients = torch.autograd.grad(
            zoo.token_log_probs(moved, rejected).sum(), list(moved.parameters()), allow_unused=True
        )
        logits = [
            moved(input_ids=torch.tensor([e.ids])).logits[0, list(e.positions)].detach()
            for e in (chosen, rejected)
        ]
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradients, strict=True):
                if g is not None:
                    p += rate * g
            after = moved(input_ids=torch.tensor([chosen.ids])).logits[0, list(chosen.positions)]
    change = (after.log_softmax(-1) - logits[0].log_softmax(-1)) / rate
    pi, targets = logits[1].softmax(-1), torch.tensor(rejected.targets)
    one = torch.nn.functional.one_hot(targets, pi.shape[1])
    expected = float(lddyn.lbk(change, logits[0], one - pi))
    assert float(found.scores["lbk"][1]) == pytest.approx(expected, rel=1e-3)
    gain = (pi * softmax_step(logits[1], -1e-7 * one)).clamp(min=0)
    assert float((gain * one).sum()) == 0
    share = float(gain.amax(1).sum() / gain.sum())
    assert float(found.scores["squeeze"][1]) == pytest.approx(share, rel=1e-4)


def test_pairs_that_were_not_looked_at(model, found, monkeypatch):
    other = lddyn.diagnose(model, some_pairs(), beta=0.3, tokens=0)
    assert other.named == [] and other.to_dict()["tokens"] == []
    with pytest.raises(ValueError, match=r"tokens are known of the pairs \[\], got 2: diagnose"):
        other.tokens(2)
    with pytest.raises(ValueError, match="tokens must be a number of pairs, 0 or more, got -1"):
        lddyn.diagnose(model, some_pairs(), tokens=-1)

    def refuse(*_):
        raise UnsupportedModelError("no block")

    monkeypatch.setattr(sys.modules["lddyn.diagnose"], "Anatomy", refuse)
    closed = lddyn.diagnose(model, some_pairs(), beta=0.3)
    assert closed.unopened == "no block" and bool(closed.scores["lbk"].isnan().all())
    assert torch.equal(closed.gram, found.gram)
    assert "lbk" not in {r["score"] for r in closed.correlations(found.scores["set_chosen"])}
    assert any("no block" in line for line in closed.tell())
    with pytest.raises(ValueError, match="got 0: no block"):
        closed.tokens(0)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "abc") == 0


def test_all_objectives_are_compared(found):
    rows = found.objectives()
    assert [r["objective"] for r in rows] == [*LOSSES, "extend"]
    by_name = {r["objective"]: r for r in rows}
    assert by_name["sft"]["chosen_falls"] == 0 or by_name["sft"]["chosen"] > 0
    assert by_name["unlikelihood"]["rejected"] < 0
    assert by_name["extend"]["rejected"] > by_name["sft"]["rejected"]
    again = found.under("dpo", beta=0.3)
    assert all(torch.equal(again.scores[k], found.scores[k]) for k in found.scores)


def test_correlations_know_their_intervals(found):
    rows = found.correlations(found.scores["set_chosen"] * 2 + 1)
    top = {r["score"]: r for r in rows}["set_chosen"]
    assert top["rho"] == pytest.approx(1) and top["low"] <= top["rho"] <= top["high"] + 1e-9
    other = {r["score"]: r for r in found.correlations(-found.scores["set_chosen"])}
    assert other["set_chosen"]["rho"] == pytest.approx(-1)


def test_it_leaves_the_model_as_it_was(model):
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    lddyn.diagnose(model, some_pairs(2))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    model.eval()


def test_what_is_wrong_is_said(model):
    with pytest.raises(ValueError, match="at least one"):
        lddyn.diagnose(model, [])
    with pytest.raises(ValueError, match=r"objective must be one of sft, .*got 'ppo'"):
        lddyn.diagnose(model, some_pairs(1), "ppo")
    with pytest.raises(ValueError, match=r"reference must be log-probs \(2, 1\), got \(3,\)"):
        lddyn.diagnose(model, some_pairs(1), reference=torch.zeros(3))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter .* requires_grad"):
        lddyn.diagnose(frozen, some_pairs(1))


def test_parameters_are_checked_before_the_work(model, found, monkeypatch):
    monkeypatch.setattr(sys.modules["lddyn.diagnose"], "_Look", None)
    for objective, given, message in (
        ("dpo", {"beta": -1.0}, "beta must be positive"),
        ("dpo", {"foo": 1.0}, r"dpo has the parameters \['beta'\], got 'foo'"),
        ("sft", {"beta": 0.1}, "sft has the parameters"),
        ("cdpo", {"label_smoothing": 0.7}, "label_smoothing must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            lddyn.diagnose(model, some_pairs(1), objective, **given)
        with pytest.raises(ValueError, match=message):
            found.under(objective, **given)
    with pytest.raises(ValueError, match="the model's context, got 5003 tokens"):
        lddyn.diagnose(model, [(lddyn.Example([1] * 5000, [3, 4, 5]), lddyn.Example([1], [2]))])


def test_logits_are_not_kept(model, monkeypatch):
    import gc

    alive = []
    module = sys.modules["lddyn.diagnose"]  # the name is the function's in lddyn
    look = module._sequence

    def counted(*arguments):
        gc.collect()
        kinds = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        alive.append(sum(x.ndim == 2 and x.shape[1] == zoo.VOCABULARY for x in kinds))
        return look(*arguments)

    monkeypatch.setattr(module, "_sequence", counted)
    lddyn.diagnose(model, some_pairs(8), tokens=0)
    assert max(alive[8:]) <= max(alive[2:4])


def test_callers_in_inference_mode_are_served(model, found):
    with torch.inference_mode():
        other = lddyn.diagnose(model, some_pairs(), beta=0.3, tokens=1)
    assert torch.equal(other.gram, found.gram)


def test_its_own_objective_is_compared_with_its_own_parameters(model):
    reference = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)) - 20
    found = lddyn.diagnose(model, some_pairs(), "ipo", beta=0.7, reference=reference, tokens=0)
    row = next(r for r in found.objectives() if r["objective"] == "ipo")
    assert row["chosen_falls"] == float((found.scores["set_chosen"] < 0).double().mean())
    w = found._weights().flatten() / 5
    length = float(w @ found.gram @ w) ** 0.5
    assert row["chosen"] == pytest.approx(float(found.scores["set_chosen"].mean()) / length)


def test_errors_of_a_sketched_step_are_those_seen(model, found):
    assert found.set_stderr() is None
    wrong = []
    for seed in range(6):
        sketch = lddyn.Sketch(k=512, repeats=4, seed=seed)
        other = lddyn.diagnose(model, some_pairs(), beta=0.3, sketch=sketch, tokens=0)
        for name, error in zip(("set_chosen", "set_rejected"), other.set_stderr(), strict=True):
            wrong.append((other.scores[name] - found.scores[name]) / error)
    assert 0.6 < float(torch.cat(wrong).square().mean().sqrt()) < 1.6
    assert "Inner products between pairs are estimates" in " ".join(other.tell())
    assert other.to_dict()["pairs"][0]["set_chosen_stderr"] > 0


def test_a_pair_of_equal_responses(model, tmp_path):
    example = some_pairs()[0][0]
    found = lddyn.diagnose(model, [(example, example)])
    assert "exceeds" not in " ".join(found.tell())
    assert float(found.scores["set_chosen"]) == 0
    found.scores["tau"][0] = float("nan")
    text = found.save(tmp_path, [7]).read_text()
    assert json.loads(text)["pairs"][0]["row"] == 7 and "NaN" not in text


@pytest.mark.parametrize("memory", ["1GiB", "400KB"])
def test_equal_responses_move_nothing_by_rounding(model, memory, tmp_path):
    pairs = [(chosen, chosen) for chosen, _ in some_pairs()]
    found = lddyn.diagnose(model, pairs, memory=memory, validate=2, tokens=0)
    for name in ("set_chosen", "own_chosen", "set_rejected", "gives"):
        assert not bool(found.scores[name].any()), name
    assert found.validated["own"]["error"] == 0 and found.validated["others"]["error"] == 0
    assert {row["action"] for row in found.actions()} == {"fix"}
    found.save(tmp_path)
    mixed = lddyn.diagnose(model, [*pairs[:2], some_pairs()[2]], memory=memory, tokens=0)
    assert mixed.scores["gives"][:2].tolist() == [0, 0] and float(mixed.scores["gives"][2]) != 0
    assert (mixed.stderr is None) == (memory == "1GiB")


def test_a_loss_past_its_target_is_not_entanglement(model):
    pairs = some_pairs()
    reference = lddyn.diagnose(model, pairs, "ipo", tokens=0).log_probs.clone()
    reference[0, :3] -= 40  # these have a margin of 80, and IPO wants 5
    reference[1, :3] += 40
    found = lddyn.diagnose(model, pairs, "ipo", reference=reference, tokens=0)
    assert bool((found.scores["weight_chosen"][:3] < 0).all())
    assert bool((found.scores["own_chosen"][:3] < 0).all()) and found.entangled == []
    told = " ".join(found.tell())
    assert "ipo itself pulls the chosen response of 3 down" in told and "exceeds" not in told
    assert not any("too like" in row["why"] for row in found.actions())
    said = {row["about"]: row["text"] for row in report.tell_diagnosis(found)}
    assert "ipo itself pulls chosen responses down" in said["the answer"]
    assert "which the loss itself pulls down" in said["the mechanism"]


def test_measured_must_fit(found):
    for measured in (torch.zeros(3), torch.tensor([1.0, 2, 3, float("nan"), 5])):
        with pytest.raises(ValueError, match="measured must be 5 finite numbers"):
            found.correlations(measured)


# --------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run():
    return lddyn.Run(lr=1e-4, epochs=3, batch=2, optimizer="sgd")


@pytest.fixture(scope="module")
def foretold(model, run):
    return lddyn.diagnose(model, some_pairs(), beta=0.3, run=run, tokens=0)


def test_simulation_is_training_of_a_linear_model(found):
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(10, 40, generator=generator).double()
    linear = replace(found, gram=jacobian @ jacobian.T)
    theta = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.3, momentum=0.9)
    run = lddyn.Run(lr=0.3, epochs=3, batch=2, optimizer="sgd", schedule="linear", seed=4)
    shares, batches = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0]).double(), run.batches([0, 1, 2, 4])
    assert sorted(torch.cat(batches).tolist()) == sorted([0, 1, 2, 4] * 3)
    path = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / len(batches))
        moved = (jacobian @ theta).view(2, 5)
        loss = -torch.nn.functional.logsigmoid(0.3 * (moved[0] - moved[1])) * shares
        optimizer.zero_grad()
        loss[batch].mean().backward()
        optimizer.step()
        path.append(found.log_probs + (jacobian @ theta.detach()).view(2, 5))
    forecast = linear.simulate(run, leave_out=[3], shares=shares)
    assert torch.allclose(forecast.path[1:], torch.stack(path), rtol=1e-9)
    assert torch.allclose(forecast.effects.sum(1), forecast.change[0])
    assert bool((forecast.effects[:, 3] == 0).all()) and bool((forecast.effects[:, 4] == 0).all())


def test_a_small_run_is_foretold(model, foretold, run):
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=run.lr, momentum=run.momentum)
    sides = list(zip(*some_pairs(), strict=True))
    before = torch.stack([torch.stack([log_probs(moved, e) for e in s]) for s in sides]).detach()
    for batch in run.batches(range(5)):
        now = [torch.stack([log_probs(moved, s[i]) for i in batch]) for s in sides]
        margin = (now[0] - before[0, batch]) - (now[1] - before[1, batch])
        optimizer.zero_grad()
        (-torch.nn.functional.logsigmoid(0.3 * margin).mean()).backward()
        optimizer.step()
    after = torch.stack([torch.stack([log_probs(moved, e) for e in s]) for s in sides]).detach()
    change, told = (after - before).double(), foretold.foretold
    assert told.curved and float(change.abs().max()) > 0.05
    assert float((told.change - change).norm() / change.norm()) < 0.03
    linear = foretold.simulate()
    assert not linear.curved and float((linear.change - change).norm() / change.norm()) < 0.03
    assert torch.allclose(told.effects.sum(1), told.change[0], atol=1e-3 * float(change.norm()))
    assert torch.equal(foretold.scores["run_gives"], told.gives)
    assert torch.allclose(told.weighted(torch.ones(5)), told.effects.sum(1))
    assert torch.equal(foretold.scores["run_chosen"], told.change[0])
    assert "run_gives" not in foretold.under("ipo").scores


def test_the_forecast_goes_through_the_softmax(model, foretold):
    net, moved = foretold.foretold.coefficients.flatten(), copy.deepcopy(model).double()
    examples = [p[0] for p in some_pairs()] + [p[1] for p in some_pairs()]
    parameters = [p for p in moved.parameters() if p.requires_grad]
    with lddyn.true_float64():
        total = sum(c * log_probs(moved, e) for c, e in zip(net, examples, strict=True))
        step = torch.autograd.grad(total, parameters)
        sides = []
        for h in (1e-4, -2e-4, 1e-4):  # forth, back, and where it was
            with torch.no_grad():
                for p, d in zip(parameters, step, strict=True):
                    p += h * d
                ids = torch.tensor([examples[0].ids])
                sides.append(moved(input_ids=ids).logits[0, list(examples[0].positions)])
    slope = (sides[0] - sides[1]) / 2e-4
    at = torch.tensor(examples[0].targets)[:, None]
    change = [x.log_softmax(-1).gather(1, at).sum() for x in (sides[2] + slope, sides[2])]
    expected = float(change[0] - change[1])
    assert float(foretold.foretold.change[0, 0]) == pytest.approx(expected, rel=1e-4)
    assert float(foretold.simulate().change[0, 0]) != pytest.approx(expected, rel=1e-4)


def test_adam_has_the_diagonal_of_its_batches(model):
    run = lddyn.Run(lr=1e-5, batch=2)
    found = lddyn.diagnose(model, some_pairs(), beta=0.3, run=run, tokens=0)
    examples = [p[0] for p in some_pairs()] + [p[1] for p in some_pairs()]
    rows = torch.stack([zoo.oracle_jacobian(model, e).sum(0) for e in examples]).double()
    pulls = 0.15 * (rows[:5] - rows[5:])
    v = pulls.mean(0) ** 2 + pulls.var(0, correction=0) / 2
    exact = (rows / (v.sqrt() + 1e-8)) @ rows.T
    scale = exact.diagonal().sqrt()
    assert float(((found.adam[0] - exact) / (scale[:, None] * scale)).abs().max()) < 1e-3
    assert found.adam[1] == pytest.approx(float(v.sum()), rel=1e-3)
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
    linear = replace(found, gram=gram, adam=(gram / 3.0, 9.0))
    run = lddyn.Run(lr=0.05, epochs=4, batch=2)
    theta, m, v = torch.zeros(40).double(), torch.zeros(40).double(), 0.0
    for step, batch in enumerate(run.batches(range(n)), 1):
        moved = (jacobian @ theta).view(2, n)
        w = 0.3 * torch.sigmoid(-0.3 * (moved[0] - moved[1]))[batch] / len(batch)
        g = -(w @ jacobian[:n][batch] - w @ jacobian[n:][batch])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * float(g @ g)
        theta = theta - 0.05 * m / (1 - 0.9**step) / (v / (1 - 0.999**step)) ** 0.5
    expected = (jacobian @ theta).view(2, n)
    assert torch.allclose(linear.simulate(run).change, expected, rtol=1e-9)


def test_losses_are_compared_over_the_run(found, foretold):
    assert "run_chosen" not in found.objectives()[0]
    rows = {r["objective"]: r for r in foretold.objectives()}
    own = foretold.simulate().change
    assert rows["dpo"]["run_chosen"] == pytest.approx(float(own[0].mean()))
    other = foretold.under("dpop").simulate(foretold.foretold.run).change
    assert rows["dpop"]["run_rejected"] == pytest.approx(float(other[1].mean()))
    # In a linear model SFT on both responses adds the same to DPO, whatever comes after it.
    run = lddyn.Run(lr=1e-4, epochs=3, batch=2, optimizer="sgd", momentum=0.0)
    start = replace(foretold, foretold=replace(foretold.foretold, run=run))
    total = torch.zeros(5).double()
    for batch in run.batches(range(5)):
        total[batch] += run.lr / len(batch)
    expected = (foretold.gram @ total.repeat(2)).view(2, 5).mean(1)
    both = {r["objective"]: r for r in start.objectives()}
    for name, value in zip(("run_chosen", "run_rejected"), expected.tolist(), strict=True):
        assert both["extend"][name] - both["dpo"][name] == pytest.approx(value)


def test_every_pair_gets_an_action(found, foretold):
    rows = foretold.actions({3: "a duplicate"})
    assert [r["pair"] for r in rows] == foretold.worst()
    gives = [r["gives"] for r in rows]
    assert gives == sorted(gives) == pytest.approx(foretold.foretold.gives.sort().values.tolist())
    by_pair = {r["pair"]: r for r in rows}
    assert by_pair[3]["action"] == "fix" and by_pair[3]["why"] == "a duplicate"
    harmful = torch.eye(5).double() * -1
    dropped = replace(found, gram=torch.zeros(10, 10).double())
    dropped.gram[:5, :5] = harmful
    assert {r["action"] for r in dropped.actions()} == {"drop"} and not bool(dropped.shares().any())
    alike = replace(found, scores={**found.scores, "own_chosen": -torch.ones(5).double()})
    assert {r["action"] for r in alike.actions()} == {"fix"}
    shares = foretold.shares()
    assert float(shares.mean()) == pytest.approx(1) and bool((shares >= 0).all())
    assert bool((foretold.foretold.effects @ shares >= -1e-6).all())


def test_real_steps_say_what_scores_are_worth(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = lddyn.diagnose(model, some_pairs(9), beta=0.3, tokens=0, validate=6)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    told = found.validated
    assert (told["steps"], told["batch"]) == (6, 4) and told["lr"] > 0
    for name in ("own", "others"):
        assert told[name]["error"] < 0.05 and told[name]["rho"] > 0.97
        assert told[name]["low"] <= told[name]["rho"] <= told[name]["high"] + 1e-9
    rows = {r["score"]: r for r in told["scores"]}
    assert rows["own_chosen"]["own"]["rho"] > 0.5
    assert json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="validate must be a number of steps, on 4 pairs or more"):
        lddyn.diagnose(model, some_pairs(3), validate=1)


def test_shares_are_the_nearest_ray_of_the_cone():
    generator = torch.Generator().manual_seed(3)
    effects = torch.randn(6, 6, generator=generator).double() + torch.eye(6)
    found = projected(effects)
    assert bool((found >= 0).all()) and bool((effects @ found >= -1e-9).all())
    generator = torch.Generator().manual_seed(1)
    tried = torch.rand(20000, 6, generator=generator).double() * 3
    inside = tried[((tried @ effects.T) >= 0).all(1)]
    assert len(inside) > 10
    assert float((inside - 1).norm(dim=1).min()) >= float((found - 1).norm())
    assert torch.equal(projected(torch.eye(4).double()), torch.ones(4).double())
    assert bool((projected(-torch.eye(4).double()) == 0).all())


def test_runs_that_cannot_be(model, found, foretold):
    for given, message in (
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": 1.0, "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 1.0, "optimizer": "lion"}, "optimizer must be one of adamw, sgd, got 'lion'"),
        ({"lr": 1.0, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            lddyn.Run(**given)
    with pytest.raises(ValueError, match="run is needed"):
        found.simulate()
    with pytest.raises(ValueError, match="Adam's diagonal is not known"):
        found.simulate(lddyn.Run(lr=1e-4))
    with pytest.raises(ValueError, match=r"pairs from 0 to 4, got \[7\]"):
        foretold.simulate(leave_out=[7])
    with pytest.raises(ValueError, match="leave a pair"):
        foretold.simulate(leave_out=range(5))
    with pytest.raises(ValueError, match=r"shares must be 5 finite numbers, got \(2,\)"):
        foretold.simulate(shares=torch.ones(2))
    with pytest.raises(ValueError, match="gradients of all sequences fit: memory must be"):
        lddyn.diagnose(model, some_pairs(), run=lddyn.Run(lr=1e-4), memory="400KB")
