"""The diagnosis of preference sets against explicit Jacobians and real steps."""

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch
import zoo
from preference_pairs import log_probs, some_pairs

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.errors import UnsupportedModelError
from lddyn.memory import in_gib
from lddyn.report import explain_diagnosis
from lddyn.report.words import distinct
from lddyn.sets import readings
from lddyn.sets.compare import COMPARED
from lddyn.sets.pairs import PairSet
from lddyn.sets.preparation import prepare
from lddyn.sets.readings import edit_distance
from lddyn.steps.flow import softmax_step


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
def test_a_real_step_does_what_is_predicted(model, objective):
    pairs, rate = some_pairs(), 1e-5
    reference = torch.randn(2, len(pairs), generator=torch.Generator().manual_seed(0)) - 20
    found = lddyn.diagnose(model, pairs, objective, reference=reference, close_ups=0)
    moved = copy.deepcopy(model).double()
    with lddyn.true_float64():
        before = torch.stack([log_probs(moved, e) for p in zip(*pairs, strict=True) for e in p])
        total = 0.0
        for i, (chosen, rejected) in enumerate(pairs):
            step = lddyn.preference(
                objective, chosen, rejected, reference=tuple(reference[:, i].tolist())
            )
            tokens = [zoo.token_log_probs(moved, e) for e in (chosen, rejected)]
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


def test_own_steps_and_contributions_add_up(found):
    s, n = found.scores, len(found)
    own = -(s["weight_chosen"] * s["norm_chosen"] + s["weight_rejected"] * s["inner"])
    assert torch.allclose(s["own_chosen"], own)
    assert torch.allclose(s["contribution"].sum(), s["set_chosen"].mean())
    total = sum(v for i in range(n) for _, v in found.culprits(i, n))
    assert total <= 0


def test_dpo_begins_with_half_of_beta(found):
    assert torch.allclose(found.scores["weight_chosen"], torch.full((5,), -0.15).double())
    assert torch.allclose(found.scores["weight_rejected"], torch.full((5,), 0.15).double())


def test_a_sketched_gram_is_within_its_errors(model, found):
    sketch = lddyn.Sketch(k=2048, repeats=8, seed=1)
    other = lddyn.diagnose(model, some_pairs(), beta=0.3, sketch=sketch, close_ups=0)
    z = (other.gram - found.gram) / other.stderr
    scale = found.gram.diagonal().sqrt()
    error = (other.gram - found.gram) / (scale[:, None] * scale)
    assert float(z.abs().median()) < 2 and float(error.abs().mean()) < 2 / 2048**0.5


def test_little_memory_is_sketched(model, found):
    other = lddyn.diagnose(model, some_pairs(), beta=0.3, memory="400KB", sketch=None, close_ups=0)
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
    assert list(found.close_ups) and set(found.worst(4)) <= set(list(found.close_ups))
    for i in found.close_ups:
        rows = found.tokens(i)
        chosen, rejected = some_pairs()[i]
        assert [r["token"] for r in rows] == [*chosen.targets, *rejected.targets]
        for name in ("own_chosen", "own_rejected", "contribution", "ches"):
            scale = sum(abs(r[name]) for r in rows)
            total = sum(r[name] for r in rows)
            assert total == pytest.approx(float(found.scores[name][i]), abs=1e-5 * scale)
        down = sum(r["nthr"] for r in rows if r["response"] == "rejected")
        assert down == pytest.approx(float(found.scores["head_inner"][i]), rel=1e-5)


def test_a_token_does_what_its_gradient_says(model, found):
    i = next(iter(found.close_ups))
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
    i = next(iter(found.close_ups))
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


def test_tokens_are_explained(model):
    found = lddyn.diagnose(model, some_pairs(4), "unlikelihood", close_ups=1)
    said = {row["about"]: row["text"] for row in explain_diagnosis(found.summary())}["the tokens"]
    worst, deepest = found.worst(1)[0], found.falling(1)[0]
    assert f"In the most harmful pairs (pair{'' if worst == deepest else 's'} {worst}" in said
    assert "lower the chosen responses of all pairs most: lowering ‘" in said
    ahead = replace(found, forecast=found.simulate(lddyn.Run(lr=0.1, optimizer="sgd")))
    assert "of all pairs most in the first step: " in ahead.explain()
    assert float(found.scores["set_chosen"][deepest]) < 0
    row = found.culprit_tokens(deepest)[0]
    assert f"lower it most: lowering ‘{row['text']}’ of pair {row['pair']}" in said


def test_tokens_follow_the_objective(found):
    other, i = found.under("simpo"), next(iter(found.close_ups))
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
    other = lddyn.diagnose(model, some_pairs(), beta=0.3, close_ups=0)
    assert other.close_ups == {} and other.to_dict()["tokens"] == []
    with pytest.raises(ValueError, match=r"tokens are known of the pairs \[\], got 2: diagnose"):
        other.tokens(2)
    with pytest.raises(ValueError, match="close_ups must be a number of pairs, 0 or more, got -1"):
        lddyn.diagnose(model, some_pairs(), close_ups=-1)

    def refuse(*_):
        raise UnsupportedModelError("no block")

    monkeypatch.setattr(Anatomy, "of", refuse)
    closed = lddyn.diagnose(model, some_pairs(), beta=0.3, lbk=True)
    assert closed.unavailable == "no block" and bool(closed.scores["lbk"].isnan().all())
    assert torch.allclose(closed.gram, found.gram, rtol=1e-4, atol=1e-3)
    assert "lbk" not in {r["score"] for r in closed.correlations(found.scores["set_chosen"])}
    assert "no block" in closed.explain()
    with pytest.raises(ValueError, match="got 0: no block"):
        closed.tokens(0)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "abc") == 0


def test_all_objectives_are_compared(found):
    rows = found.objectives()
    assert [r["objective"] for r in rows] == [*COMPARED, "extend"]
    by_name = {r["objective"]: r for r in rows}
    assert by_name["sft"]["chosen_falls"] == 0 or by_name["sft"]["chosen"] > 0
    assert by_name["unlikelihood"]["rejected"] < 0
    assert by_name["extend"]["rejected"] > by_name["sft"]["rejected"]
    # At its reference, every loss of the margin alone begins with the same step.
    assert {"hinge", "kto", "dpop"} <= {*by_name["dpo"]["alike"]}
    assert by_name["sft"]["alike"] == [] and "dpo" in by_name["hinge"]["alike"]
    assert [r["objective"] for r in distinct(rows)].count("hinge") == 0
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
    with pytest.raises(ValueError, match=r"reference .* the shape \(2, 2\), got \(3,\)"):
        lddyn.diagnose(model, some_pairs(2), reference=torch.zeros(3))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter .* requires_grad"):
        lddyn.diagnose(frozen, some_pairs(1))


def test_parameters_are_checked_before_the_work(model, found, monkeypatch):
    monkeypatch.setattr("lddyn.sets.diagnose.Access", None)
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
    alive, seen = [], []
    read = readings.ResponseReading.of

    def counted(response):
        alive.append(sum(logits() is not None for logits in seen))
        made = read(response)
        seen.extend((weakref.ref(response.logits), weakref.ref(made.logits)))
        return made

    monkeypatch.setattr(readings.ResponseReading, "of", counted)
    lddyn.diagnose(model, some_pairs(24), close_ups=0)
    assert 0 < max(alive[16:]) <= max(alive[:16])  # windows of 8 pairs


def test_close_ups_have_the_bound(found):
    looked_at = replace(found, step=replace(found.step, readings=_without_lbk(found)))
    for pair in found.close_ups:
        expected = float(found.scores["lbk"][pair])
        assert float(looked_at.scores["lbk"][pair]) == pytest.approx(expected, rel=1e-5)


def _without_lbk(found):
    readings = found.step.readings
    return replace(readings, facts={k: x for k, x in readings.facts.items() if k != "lbk"})


def test_callers_in_inference_mode_are_served(model, found):
    with torch.inference_mode():
        other = lddyn.diagnose(model, some_pairs(), beta=0.3, close_ups=1)
    assert torch.equal(other.gram, found.gram)


def test_its_own_objective_is_compared_with_its_own_parameters(model):
    reference = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)) - 20
    found = lddyn.diagnose(model, some_pairs(), "ipo", beta=0.7, reference=reference, close_ups=0)
    row = next(r for r in found.objectives() if r["objective"] == "ipo")
    assert row["chosen_falls"] == float((found.scores["set_chosen"] < 0).double().mean())
    w = found.step.weights.flatten() / 5
    length = float(w @ found.gram @ w) ** 0.5
    assert row["chosen"] == pytest.approx(float(found.scores["set_chosen"].mean()) / length)


def test_errors_of_a_sketched_step_are_those_seen(model, found):
    assert found.set_stderr() is None
    wrong = []
    for seed in range(6):
        sketch = lddyn.Sketch(k=512, repeats=4, seed=seed)
        other = lddyn.diagnose(model, some_pairs(), beta=0.3, sketch=sketch, close_ups=0)
        for name, error in zip(("set_chosen", "set_rejected"), other.set_stderr(), strict=True):
            wrong.append((other.scores[name] - found.scores[name]) / error)
    assert 0.6 < float(torch.cat(wrong).square().mean().sqrt()) < 1.6
    assert "estimated from sketched gradients" in other.explain()
    assert other.to_dict()["pairs"][0]["set_chosen_stderr"] > 0


def test_a_pair_of_equal_responses(model, tmp_path):
    example = some_pairs()[0][0]
    found = lddyn.diagnose(model, [(example, example)], row_numbers=[7])
    assert "exceeds" not in found.explain()
    assert float(found.scores["set_chosen"]) == 0
    found.scores["tau"][0] = float("nan")
    found.save(tmp_path / "diagnosis")
    text = (tmp_path / "diagnosis.json").read_text()
    assert json.loads(text)["pairs"][0]["row"] == 7 and "NaN" not in text


@pytest.mark.parametrize("memory", ["1GiB", "400KB"])
def test_equal_responses_move_nothing_by_rounding(model, memory, tmp_path):
    pairs = [(chosen, chosen) for chosen, _ in some_pairs()]
    found = lddyn.diagnose(model, pairs, memory=memory, validate=2, close_ups=0)
    for name in ("set_chosen", "own_chosen", "set_rejected", "contribution"):
        assert not bool(found.scores[name].any()), name
    assert found.validation["own"]["error"] == 0 and found.validation["others"]["error"] == 0
    assert {row["action"] for row in found.actions()} == {"fix"}
    found.save(tmp_path / "diagnosis")
    mixed = lddyn.diagnose(model, [*pairs[:2], some_pairs()[2]], memory=memory, close_ups=0)
    assert (
        mixed.scores["contribution"][:2].tolist() == [0, 0]
        and float(mixed.scores["contribution"][2]) != 0
    )
    assert (mixed.stderr is None) == (memory == "1GiB")


def test_a_loss_past_its_target_is_not_entanglement(model):
    pairs = some_pairs()
    reference = lddyn.diagnose(model, pairs, "ipo", close_ups=0).log_probs.clone()
    reference[0, :3] -= 40  # these have a margin of 80, and IPO wants 5
    reference[1, :3] += 40
    found = lddyn.diagnose(model, pairs, "ipo", reference=reference, close_ups=0)
    assert bool((found.scores["weight_chosen"][:3] > 0).all())
    assert bool((found.scores["own_chosen"][:3] < 0).all()) and found.entangled == []
    told = found.explain()
    assert "ipo itself lowers the chosen response of 3 pairs" in told and "exceeds" not in told
    assert not any("too like" in row["why"] for row in found.actions())
    said = {row["about"]: row["text"] for row in explain_diagnosis(found.summary())}
    assert "ipo itself lowers chosen responses" in said["the answer"]
    assert "the loss itself, which lowers their own chosen response" in said["the mechanism"]


def test_measured_must_fit(found):
    for measured in (torch.zeros(3), torch.tensor([1.0, 2, 3, float("nan"), 5])):
        with pytest.raises(ValueError, match="measured must be 5 finite numbers"):
            found.correlations(measured)


@pytest.mark.case("a reference that is not the start")
def test_the_reference_and_the_margin_at_the_start_are_said(tmp_path):
    model, other = zoo.build("llama"), zoo.build("llama", seed=7)
    pairs = some_pairs()[:2]
    diagnosis = lddyn.diagnose(model, pairs, reference=other, close_ups=0)
    gains = diagnosis.log_probs - diagnosis.reference
    said = diagnosis.summary()["reference"]
    assert said["name"] == "another model (LlamaForCausalLM)"
    assert said["margin"] == pytest.approx(float((gains[0] - gains[1]).mean()))
    assert said["distance"] == pytest.approx(float(gains.abs().max()))
    assert "where a run that begins at its reference has 0" in diagnosis.explain()
    diagnosis.save(tmp_path / "diagnosis")
    assert lddyn.Diagnosis.load(tmp_path / "diagnosis").explain() == diagnosis.explain()
    start = lddyn.diagnose(model, pairs, close_ups=0)
    assert "The reference is the model itself before the step" in start.explain()
    assert "has 0" not in start.explain()
    far = lddyn.diagnose(model, pairs, reference=start.log_probs - 900, close_ups=0)
    assert "computed on the same tokens?" in far.explain()
    assert lddyn.diagnose(model, pairs, "simpo", close_ups=0).summary()["reference"] is None
    coarse = lddyn.diagnose(zoo.build("llama").bfloat16(), pairs[:1], "orpo", close_ups=0)
    said = coarse.summary()["remarks"]
    assert any("also learns the tokens of the prompt" in text for text in said)
    assert any("The weights are bfloat16" in text and text in coarse.explain() for text in said)
    assert not any("bfloat16" in text for text in start.summary()["remarks"])


@pytest.mark.case("log π far below that of a uniform guess; pairs of different prompts")
def test_remarks_on_the_data_of_a_diagnosis():
    model = zoo.build("llama")
    pair = (lddyn.Example([3, 4], [5, 6]), lddyn.Example([3, 7], [8]))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1000.0)
    said = " ".join(lddyn.diagnose(model, [pair], close_ups=0).step.remarks)
    assert "1 of 1 pairs chosen and rejected have different prompts" in said
    assert "responses are less likely than random tokens; the first is" in said


@pytest.mark.case("dropout that training has and the analysis has not")
def test_a_diagnosis_says_that_dropout_is_off():
    pair = lddyn.Example([5, 9], [7, 2], name="chosen"), lddyn.Example([5, 9], [8, 2])
    model = zoo.lora("llama", lora_dropout=0.5)
    for training in (True, False):
        diagnosis = lddyn.diagnose(model.train(training), [pair], close_ups=0)
        assert ("Dropout is off" in diagnosis.explain()) == training


@pytest.mark.case("what a preference set does to sequences that are not trained on")
def test_other_sequences_are_observed(model, found, run):
    other = lddyn.Example([1, 2, 3], [4, 5, 6, 7], name="held out")
    seen = {"held out": other, "row 1": some_pairs()[1][0]}
    both = lddyn.diagnose(model, some_pairs(), beta=0.3, observe=seen, close_ups=0)
    size = found.gram.diagonal().sqrt()
    assert float(((both.gram - found.gram) / (size[:, None] * size)).abs().max()) < 1e-5
    rows = both.observed()
    assert [r["name"] for r in rows] == ["held out", "row 1"] and rows[0]["stderr"] == 0
    # A sequence of the set, observed beside it, changes as it does in the set.
    assert rows[1]["set_change"] == pytest.approx(float(found.scores["set_chosen"][1]), rel=1e-5)
    gradient = zoo.oracle_jacobian(model, other).sum(0).double()
    sides = [
        torch.stack([zoo.oracle_jacobian(model, p[s]).sum(0) for p in some_pairs()]) for s in (0, 1)
    ]
    parts = -(found.step.weights[0] * (sides[0].double() @ gradient))
    parts -= found.step.weights[1] * (sides[1].double() @ gradient)
    assert rows[0]["set_change"] == pytest.approx(float(parts.mean()), rel=1e-4)
    worst = int(parts.argmin())
    assert rows[0]["lowered_by"][0] == (worst, pytest.approx(float(parts[worst]) / 5, rel=1e-4))
    rough = lddyn.diagnose(
        model, some_pairs(), beta=0.3, observe=seen, close_ups=0, sketch=lddyn.Sketch(k=4096)
    ).observed()
    for row, exact in zip(rough, rows, strict=True):
        assert (
            row["stderr"] > 0 and abs(row["set_change"] - exact["set_change"]) < 5 * row["stderr"]
        )


@pytest.mark.parametrize("sketched", [False, True])
def test_a_run_moves_what_is_observed(model, run, predicted, sketched):
    other = lddyn.Example([1, 2, 3], [4, 5, 6, 7], name="held out")
    sketch = lddyn.Sketch(k=8192) if sketched else None
    told = lddyn.diagnose(
        model, some_pairs(), beta=0.3, run=run, observe=other, close_ups=0, sketch=sketch
    )
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=run.lr, momentum=run.momentum)
    before = [[log_probs(model, e).item() for e in pair] for pair in some_pairs()]
    for batch, _ in run.batches(range(5)):
        optimizer.zero_grad()
        for i in batch.tolist():
            gains = [
                log_probs(moved, e) - b for e, b in zip(some_pairs()[i], before[i], strict=True)
            ]
            (-torch.nn.functional.logsigmoid(0.3 * (gains[0] - gains[1])) / len(batch)).backward()
        optimizer.step()
    measured = log_probs(moved, other).item() - log_probs(model, other).item()
    forecast, (row,) = told.forecast, told.observed()
    assert row["run_change"] == pytest.approx(measured, rel=0.05)
    total = float(forecast.observed_effects.sum())
    net = forecast.coefficients.flatten()
    norms = zoo.oracle_jacobian(model, other).sum(0).norm() * (net @ told.gram @ net).sqrt()
    noise = 4 * float(norms) / 8192**0.5 if sketched else 0.0
    assert total == pytest.approx(measured, rel=0.05, abs=noise)
    assert row["lowered_by"] == sorted(row["lowered_by"], key=lambda part: part[1])
    if not sketched:
        change = predicted.forecast.change
        assert torch.allclose(change, forecast.change, rtol=1e-4, atol=1e-6)


def test_a_budget_leaves_out_what_is_not_needed(model, run, capsys):
    seen = []
    told = lddyn.diagnose(
        model,
        some_pairs(),
        run=run,
        refresh=3,
        close_ups=3,
        lbk=True,
        budget=2.3,
        progress=True,
        so_far=seen.append,
    )
    assert told.forecast.segments == 2 and not told.close_ups and "lbk" not in told.scores
    said = capsys.readouterr().err
    assert "left out for the budget: LBK of all pairs; " in said
    assert "the tokens of 3 of 3; left out for the budget: 1 of 3 segments of the run" in said
    # First the ranking by a step, then the run.
    assert [d.forecast is None for d in seen] == [True, False]
    assert torch.equal(seen[0].gram, told.gram) and seen[0].worst() == seen[0].worst(5)
    some = lddyn.diagnose(model, some_pairs(), close_ups=4, budget=8, so_far=seen.append)
    assert 0 < len(some.close_ups) < 5 and len(seen) == 3
    with pytest.raises(ValueError, match=r"budget 0.1 is too small: gradients alone take"):
        lddyn.diagnose(model, some_pairs(), budget=0.1)


def test_memory_counts_vectors_of_all_weights(model, run, capsys, monkeypatch):
    monkeypatch.setattr("lddyn.memory.FLOOR", 0)
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    before = [p.clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr("lddyn.sets.preparation.Access", None)  # no pass is made before the refusal
        with pytest.raises(lddyn.MemoryBudgetError, match=r"prediction of a run needs .*--memory"):
            lddyn.diagnose(model, some_pairs(), run=run, close_ups=2, memory=size)
    assert all(map(torch.equal, before, model.parameters()))
    sketch = lddyn.Sketch(k=1024)
    small, large = (
        lddyn.diagnose(
            model, some_pairs(), close_ups=2, sketch=sketch, memory=memory, progress=True
        )
        for memory in (2 * size, 8 * size)
    )
    assert not small.close_ups and large.close_ups
    assert "the tokens of 2 of 2 (memory)" in capsys.readouterr().err
    assert torch.equal(small.gram, large.gram)


def test_the_plan_counts_a_batch(model):
    """The bytes that a plan names hold the graphs of a batch, and one parameter's gradient."""
    prepared = prepare(
        model,
        PairSet.of(some_pairs(), None, None, {}),
        None,
        memory="64MiB",
        sketch=None,
        budget=None,
        refresh=1,
    )
    plan, batching = prepared.plan, prepared.batching
    largest = max(p.nbytes for p in model.parameters() if p.requires_grad)
    assert batching.keep_graphs and 0 < batching.bytes_of(1 << 30) <= prepared.workspace
    assert batching.bytes_of(1) == batching.kept > batching.least
    assert plan.batch == batching.bytes_of(2 * len(some_pairs())) + largest
    assert plan.memory == plan.rows + plan.vectors + plan.batch
    assert f"{in_gib(plan.memory)} beyond the model" in plan.explain()
