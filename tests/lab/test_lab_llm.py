"""The experiments with language models: losses, first order, kernel, mass; runs, resumed; CLI."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lddyn
from lddyn.cli.lab import app
from lddyn.demo import world as demo
from lddyn.engine.logits import sequence_log_probs
from lddyn.lab import dpo, dynamics, extend, setting, sft
from lddyn.lab.dynamics import Preference, Supervised, Tracker, train
from lddyn.lab.record import Lab
from lddyn.optimizers import make_optimizer
from lddyn.probes.probe_set import ProbeSet

TINY = {"rows": 30, "prompts": 4}


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory):
    """The demo's world after a few steps, in a cache of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDDYN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(setting, "_PRETRAINING", 20)
        yield demo.build_world(progress=False, steps=20)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def examples(small_world):
    rows = small_world.preference_pairs[:3]
    tok = small_world.tokenizer
    return [
        {k: lddyn.encode(tok, row["prompt"], row[k], name=k) for k in ("chosen", "rejected")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def probes(small_world):
    fields = ("chosen", "rejected", "irr_train")
    return ProbeSet(small_world.preference_pairs[:3]).encode(small_world.tokenizer, fields=fields)


def batch_of(examples):
    return {k: [pair[k] for pair in examples] for k in ("chosen", "rejected")}


# --------------------------------------------------------------------------- dynamics


@pytest.mark.parametrize(
    "loss", [Preference(), Preference(nll=0.5), Preference(gate=(20.0, 0.3))], ids=str
)
def test_coefficients_are_the_derivatives_of_the_loss(loss, examples):
    torch.manual_seed(0)
    policy = {t: torch.randn(3, dtype=torch.float64) * 5 - 20 for t in loss.terms}
    fixed = {t: torch.randn(3, dtype=torch.float64) * 5 - 20 for t in loss.terms}
    batch = batch_of(examples)
    for x in policy.values():
        x.requires_grad_(True)
    gate = torch.ones(3, dtype=torch.float64)
    sizes = {t: torch.tensor([float(len(e)) for e in batch[t]]) for t in loss.terms}
    down = policy["rejected"]
    if loss.gate:
        typical = (down / sizes["rejected"]).exp()
        gate = torch.sigmoid(loss.gate[0] * (typical - loss.gate[1])).detach()
        down = down * gate + (down * (1 - gate)).detach()  # the gate scales its gradient alone
    margin = (policy["chosen"] - fixed["chosen"]) - (down - fixed["rejected"])
    total = -torch.nn.functional.logsigmoid(loss.beta * margin).mean()
    total = total - loss.nll * (policy["chosen"] / sizes["chosen"]).mean()
    total.backward()
    with torch.no_grad():
        found = loss.coefficients(policy, fixed, batch)
    for term in loss.terms:
        assert torch.allclose(found[term], policy[term].grad, rtol=1e-10)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e-5), ("rmsprop", 1e-6), ("adamw", 1e-6)])
def test_a_taken_apart_update_is_the_update(small_world, examples, probes, optimizer, lr):
    model = copy.deepcopy(small_world.model).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = []
    train(
        model,
        [batch_of(examples)],
        Preference(),
        make_optimizer(optimizer, model.parameters(), lr),
        reference=copy.deepcopy(model),
        explain={0},
        probes=probes,
        explained=found.append,
    )
    for name, parameter in model.named_parameters():
        total = sum(
            direction[name] for direction in found[0].directions.values() if name in direction
        )
        moved = parameter.detach() - before[name]
        assert torch.allclose(total, moved, rtol=1e-6, atol=1e-14), name
    predicted = torch.stack(list(found[0].predicted.values())).sum(0)
    error = (predicted - found[0].measured).abs().sum() / found[0].measured.abs().sum()
    assert error < 0.1


def test_first_order_terms_are_those_of_decompose(small_world, examples, probes):
    one = examples[:1]
    found = []
    model = copy.deepcopy(small_world.model)
    train(
        model,
        [batch_of(one)],
        Preference(),
        make_optimizer("sgd", model.parameters(), 1e-4),
        reference=small_world.model,
        explain={0},
        probes=probes,
        explained=found.append,
    )
    watched = dict(enumerate(probes.examples))
    dec = lddyn.decompose(
        small_world.model,
        {str(k): e for k, e in watched.items()},
        lddyn.DPO(one[0]["chosen"], one[0]["rejected"], reference=small_world.model),
        lr=1e-4,
        max_grad_norm=10.0,
    )
    for term, name in (("chosen", "y+"), ("rejected", "y-")):
        ours = found[0].predicted[term]
        theirs = torch.tensor([float(dec[str(k)].by_sequence()[name].sum()) for k in watched])
        assert torch.allclose(ours, theirs.double(), rtol=1e-3, atol=1e-7)


def test_influence_is_the_first_order_of_sgd(small_world, probes):
    gram = dynamics.influence(small_world.model, probes.examples)
    total = sequence_log_probs(small_world.model, [probes.examples[2]]).sum()
    names = dict(small_world.model.named_parameters())
    gradient = dict(zip(names, torch.autograd.grad(total, names.values()), strict=True))
    pushed = dynamics.first_order(small_world.model, probes.examples, {"x": gradient})["x"]
    assert torch.allclose(pushed, gram[:, 2], rtol=1e-3, atol=1e-3 * float(gram.abs().max()))


def test_kernel_norms_are_bounded_by_lbk(small_world, probes):
    few = {e.name: dynamics.some_tokens(e, 3) for e in probes.examples[:3]}
    assert [len(e) for e in few.values()] == [3, 3, 3]
    rows = dynamics.kernel_norms(small_world.model, few["chosen"], few, rtol=0.3)
    for row in rows:
        assert 0 < row["lbk_norm"] <= row["norm"] + 3 * row["stderr"]
    exact = lddyn.ntk(small_world.model, few["rejected"], few["chosen"]).frobenius(directions=128)
    truth = float(exact.value.square().sum().sqrt())
    assert abs(rows[1]["norm"] - truth) < 4 * rows[1]["stderr"] + 1e-3 * truth


def test_the_mass_of_a_step_is_what_massflow_finds(small_world, examples):
    """One pair, one SGD step: the experiment's forward mode against the decomposition."""
    model, pair = small_world.model, examples[0]
    update = lddyn.DPO(pair["chosen"], pair["rejected"], beta=0.1)
    settings = {"lr": 1e-3, "max_grad_norm": 10.0, "dtype": None}
    flow = lddyn.massflow(model, pair["rejected"], update, **settings)
    stepped, taken = copy.deepcopy(model), []
    train(
        stepped,
        [batch_of(examples[:1])],
        Preference(0.1),
        make_optimizer("sgd", stepped.parameters(), 1e-3),
        reference=model,
        explain={0},
        probes=ProbeSet(small_world.preference_pairs[:1]).encode(
            small_world.tokenizer, fields=("rejected",)
        ),
        explained=taken.append,
    )
    terms = [taken[0].directions[name] for name in ("chosen", "rejected")]
    parts = [dpo._predicted(model, [pair["rejected"]], term)[0] for term in terms]
    (measured,) = dpo._measured(model, stepped, [pair["rejected"]])
    assert torch.equal(measured.leading, flow.leading)
    for name in ("label", "argmax", "top", "rest"):
        scale = float(flow.measured.change.norm())
        real = getattr(measured, name) - getattr(flow.measured, name)
        assert float(real.abs().max()) < 1e-3 * scale, name
        first = sum(getattr(part, name) for part in parts) - getattr(flow.predicted, name)
        assert float(first.abs().max()) < 1e-2 * scale, name  # massflow's is renormalised


def test_tracker_measures_the_start_the_end_and_between(small_world, examples, probes):
    tracker = Tracker(probes, 2, 3)
    model = copy.deepcopy(small_world.model)
    batches = [batch_of(examples)] * 3
    losses = train(
        model,
        batches,
        Supervised(),
        make_optimizer("rmsprop", model.parameters(), 1e-4),
        observe=tracker,
    )
    assert tracker.updates == [0, 2, 3] and len(losses) == 3
    assert tracker.grids("log_prob").shape == (3, 3, 3)
    assert losses[-1] < losses[0]


def test_bell_and_share_and_degeneration():
    course = np.array([[0.0] * 6, [2.0] * 6, [1.0] * 6])
    rise, fall = sft.bell(course)
    assert rise.tolist() == [2.0] * 6 and fall.tolist() == [-1.0] * 6
    assert sft.explained_share(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == pytest.approx(0.6)
    found = extend.degeneration(["a b c a b c", "d"])
    assert found["repeated"] == pytest.approx(0.125) and found["distinct 1"] == pytest.approx(4 / 7)


def test_whole_prompts_are_resampled():
    """States of a prompt are no further evidence: copies of them leave the interval as it is."""
    ranks = np.random.default_rng(0).normal(0.7, 0.1, (6, 1))

    def over(values, threshold=0.5):
        generator = torch.Generator().manual_seed(0)
        return sft.over_prompts(values, lambda x: float(x.mean()), threshold, generator)

    once, often = over(ranks), over(ranks.repeat(9, axis=1))
    assert often[0] == pytest.approx(once[0]) and often[1] == pytest.approx(once[1])
    assert once[1][0] < once[0] < once[1][1] and once[2] == "agrees"
    undecided = "not testable at this scale"
    assert over(ranks, once[0])[2] == undecided and over(ranks, 0.9)[2] == "disagrees"
    low, high = sorted(ranks[:2, 0])
    _, interval, verdict, words = over(ranks[:2], (low + high) / 2)
    assert interval is None and verdict == undecided and "2 prompts, too few" in words
    assert over(ranks[:2], low - 0.01)[2] == "agrees"
    assert over(ranks[:1])[1:3] == (None, undecided)


def test_a_kernel_that_was_not_measured_is_not_a_number():
    rows = [
        {"update": update, "prompt": 3, "observed": name, "norm": float(update)}
        for update, name in ((0, "chosen"), (0, "rejected"), (7, "chosen"))
    ]
    grid = sft.kernel_grid(rows, "norm")
    assert grid.shape == (1, 2, 2) and grid[0, 1, 0] == 7 and np.isnan(grid[0, 1, 1])


# --------------------------------------------------------------------------- experiments


def test_batches_see_every_row_once_an_epoch():
    rows = [{"chosen": k} for k in range(7)]
    made = setting.batches(rows, 7, 3, torch.Generator().manual_seed(0))
    seen = [k for batch in made for k in batch["chosen"]]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))


def test_a_model_needs_data(tmp_path):
    with pytest.raises(ValueError, match="belong together"):
        setting.load(Lab("x", tmp_path, progress=False), "m", None, rows=9, prompts=2)


SFT_OPTIONS = {
    **TINY,
    "updates": 4,
    "every": 2,
    "kernel_points": 1,
    "kernel_prompts": 1,
    "explained": 1,
    "accuracy_steps": 1,
}


@pytest.mark.slow
def test_sft_resumed_is_sft_uninterrupted(tmp_path):
    whole = sft.run(tmp_path, progress=False, **SFT_OPTIONS)
    names = [claim["name"] for claim in whole["claims"]]
    assert {"sft 1", "sft 2a", "sft 2b", "sft 2c", "sft 3", "sft 4", "bound", "rank"} <= set(names)
    kernel = json.loads((tmp_path / "tables" / "kernel.json").read_text())
    assert {row["update"] for row in kernel} == {0}
    # as if it had been stopped before the influence at the end
    for name in ("influence-end", "accuracy"):
        (tmp_path / "steps" / f"{name}.json").unlink()
    again = sft.run(tmp_path, progress=False, **SFT_OPTIONS)
    assert again["claims"] == whole["claims"]


@pytest.mark.slow
def test_dpo(tmp_path):
    options = {**TINY, "lengths": (0, 3), "updates": 3, "every": 2, "explained": 1, "new_tokens": 6}
    found = dpo.run(tmp_path, progress=False, **options)
    names = {claim["name"] for claim in found["claims"]}
    assert {"dpo 1", "dpo 2", "dpo 3", "dpo 4a", "dpo 4b", "dpo 4c", "on-policy"} == names
    step = json.loads((tmp_path / "tables" / "mass_step.json").read_text())
    for row in step:
        assert abs(row["response"] + row["likeliest other"] + row["top"] + row["rest"]) < 1e-5
    parts = {row["kind"]: row for row in step if row["position"] < 0}
    for place in ("response", "likeliest other"):
        terms = parts["predicted, y+ term"][place] + parts["predicted, y− term"][place]
        assert parts["predicted"][place] == pytest.approx(terms, abs=1e-6)
    again = dpo.run(tmp_path, progress=False, **options)
    assert again["claims"] == found["claims"]


@pytest.mark.slow
def test_extend(tmp_path):
    options = {**TINY, "sft_updates": 3, "updates": 3, "every": 2, "new_tokens": 6}
    found = extend.run(tmp_path, progress=False, **options)
    assert {"extend 1", "extend 5", "gate", "NLL"} <= {c["name"] for c in found["claims"]}
    rows = json.loads((tmp_path / "tables" / "summary.json").read_text())
    assert [row["run"] for row in rows] == ["y+ only", "both", "y+ only, gate", "y+ only, NLL"]


def test_probes_command_builds_reads_and_compares(tmp_path, small_world):
    runner = CliRunner()
    flags = ["probes", "--out", str(tmp_path), "--limit", "20", "--prompts", "3", "--json"]
    found = runner.invoke(app, flags)
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["claims"][0]["name"] == "pass"
    assert len(ProbeSet.read(tmp_path / "probes.jsonl")) == 3
    table = json.loads((tmp_path / "tables" / "pass.json").read_text())[0]
    assert max(table["largest difference"].values()) < 1e-5
    refused = runner.invoke(app, ["probes", "--out", str(tmp_path), "--limit", "21"])
    assert refused.exit_code == 2 and "rows (there 20, now 21)" in refused.stderr


def test_a_users_model_and_file(tmp_path, small_world):
    """What --model and --data name is loaded and probed; nothing of the demo is needed."""
    small_world.model.save_pretrained(tmp_path / "m")
    small_world.tokenizer.save_pretrained(tmp_path / "m")
    ProbeSet(small_world.preference_pairs[:12]).save(tmp_path / "p.jsonl")
    lab = Lab("x", tmp_path / "lab", progress=False)
    found = setting.load(lab, str(tmp_path / "m"), str(tmp_path / "p.jsonl"), rows=10, prompts=3)
    assert found.title == "m on p.jsonl" and len(found.test) == 2
    recipe = setting.Recipe(Supervised(), 2, 1e-4, every=1)
    curves = setting.finetune(
        lab, "r", found, found.fresh(), found.pairs(found.train, ("chosen",)), recipe
    )
    assert curves.log_prob.shape == (3, 3, len(found.fields))
    loaded = setting.checkpoint(lab, "r", found.fresh())
    again = setting.finetune(lab, "r", found, found.fresh(), [], replace(recipe, updates=2))
    assert again.raw == curves.raw
    # Another answer in the file, then other weights in the folder: not a step is mixed with them.
    for change, name in ((_other_row, "texts"), (_other_weights, "model weights")):
        change(tmp_path, small_world)
        with pytest.raises(ValueError, match=rf"other settings: {name} \(there"):
            setting.load(
                Lab("x", tmp_path / "lab", progress=False),
                str(tmp_path / "m"),
                str(tmp_path / "p.jsonl"),
                rows=10,
                prompts=3,
            )
        small_world.model.save_pretrained(tmp_path / "m")
        ProbeSet(small_world.preference_pairs[:12]).save(tmp_path / "p.jsonl")
    assert not torch.equal(loaded.lm_head.weight, found.model.lm_head.weight)


def _other_row(folder, world):
    rows = [dict(row) for row in world.preference_pairs[:12]]
    rows[3]["chosen"] += "!"
    ProbeSet(rows).save(folder / "p.jsonl")


def _other_weights(folder, world):
    other = copy.deepcopy(world.model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    other.save_pretrained(folder / "m")
