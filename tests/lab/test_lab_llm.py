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
from lddyn.lab import dpo, extend, finetune, setting, settings, sft
from lddyn.lab.curves import bell, explained_share
from lddyn.lab.extend.measure import degeneration
from lddyn.lab.first_order import first_order
from lddyn.lab.kernel_norms import influence, kernel_norms, some_tokens
from lddyn.lab.mass import measured_flows, predicted_flows
from lddyn.lab.record import Lab
from lddyn.lab.sft import measure
from lddyn.lab.sft.tables import kernel_grid
from lddyn.lab.shares import over_prompts
from lddyn.lab.tracker import Tracker
from lddyn.lab.training import Explanations, Preferring, Supervised, train
from lddyn.objectives import Loss
from lddyn.optimizers import make_optimizer
from lddyn.probes.probe_set import ProbeSet

TINY = {"limit": 60, "prompts": 2}


@pytest.fixture(scope="module", autouse=True)
def small_world(small_worlds):
    """The demo's world after a few steps, which the experiments find in the cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDDYN_CACHE_DIR", str(small_worlds))
        patch.setattr(setting, "PRETRAINING", 20)
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
    "loss",
    [
        Preferring(),
        Preferring(Loss("dpo+nll", alpha=0.5)),
        Preferring(gate=(20.0, 0.3)),
        Supervised(("chosen", "rejected")),
    ],
    ids=str,
)
def test_weights_are_the_derivatives_of_the_loss(loss):
    torch.manual_seed(0)
    policy, fixed = (torch.randn(2, 3, dtype=torch.float64) * 5 - 20 for _ in range(2))
    sizes = torch.tensor([[3.0, 4.0, 5.0], [7.0, 2.0, 6.0]])
    policy.requires_grad_(True)
    if isinstance(loss, Supervised):
        total = -policy.sum(0).mean()
    else:
        beta, alpha = loss.loss.parameters["beta"], loss.loss.parameters.get("alpha", 0.0)
        down = policy[1]
        if loss.gate:
            typical = (down / sizes[1]).exp()
            gate = torch.sigmoid(loss.gate[0] * (typical - loss.gate[1])).detach()
            down = down * gate + (down * (1 - gate)).detach()  # the gate scales its gradient alone
        margin = (policy[0] - fixed[0]) - (down - fixed[1])
        total = -torch.nn.functional.logsigmoid(beta * margin).mean()
        total = total - alpha * (policy[0] / sizes[0]).mean()
    total.backward()
    with torch.no_grad():
        weights = loss.weights(policy, fixed, sizes)
    assert torch.allclose(weights, policy.grad, rtol=1e-10)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e-5), ("rmsprop", 1e-6), ("adamw", 1e-6)])
def test_a_taken_apart_update_is_the_update(small_world, examples, probes, optimizer, lr):
    model = copy.deepcopy(small_world.model).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = []
    train(
        model,
        [batch_of(examples)],
        Preferring(),
        make_optimizer(optimizer, model.parameters(), lr),
        reference=copy.deepcopy(model),
        explanations=Explanations({0}, probes, found.append),
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
        Preferring(),
        make_optimizer("sgd", model.parameters(), 1e-4),
        reference=small_world.model,
        explanations=Explanations({0}, probes, found.append),
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
    gram = influence(small_world.model, probes.examples)
    total = sequence_log_probs(small_world.model, [probes.examples[2]]).sum()
    names = dict(small_world.model.named_parameters())
    gradient = dict(zip(names, torch.autograd.grad(total, names.values()), strict=True))
    pushed = first_order(small_world.model, probes.examples, {"x": gradient})["x"]
    assert torch.allclose(pushed, gram[:, 2], rtol=1e-3, atol=1e-3 * float(gram.abs().max()))


def test_kernel_norms_are_bounded_by_lbk(small_world, probes):
    few = {e.name: some_tokens(e, 3) for e in probes.examples[:3]}
    assert [len(e) for e in few.values()] == [3, 3, 3]
    rows = kernel_norms(small_world.model, few["chosen"], few, rtol=0.3)
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
    rejected = ProbeSet(small_world.preference_pairs[:1]).encode(
        small_world.tokenizer, fields=("rejected",)
    )
    train(
        stepped,
        [batch_of(examples[:1])],
        Preferring(),
        make_optimizer("sgd", stepped.parameters(), 1e-3),
        reference=model,
        explanations=Explanations({0}, rejected, taken.append),
    )
    terms = {name: taken[0].directions[name] for name in ("chosen", "rejected")}
    parts = [flow for (flow,) in predicted_flows(model, [pair["rejected"]], terms).values()]
    (measured,) = measured_flows(model, stepped, [pair["rejected"]])
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
    rise, fall = bell(course)
    assert rise.tolist() == [2.0] * 6 and fall.tolist() == [-1.0] * 6
    assert explained_share(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == pytest.approx(0.6)
    found = degeneration(["a b c a b c", "d"])
    assert found["repeated"] == pytest.approx(0.125) and found["distinct 1"] == pytest.approx(4 / 7)


def test_whole_prompts_are_resampled():
    """States of a prompt are no further evidence: copies of them leave the interval as it is."""
    ranks = np.random.default_rng(0).normal(0.7, 0.1, (6, 1))

    def over(values, threshold=0.5):
        generator = torch.Generator().manual_seed(0)
        return over_prompts(values, lambda x: float(x.mean()), threshold, generator)

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
    grid = kernel_grid(rows, "norm")
    assert grid.shape == (1, 2, 2) and grid[0, 1, 0] == 7 and np.isnan(grid[0, 1, 1])


# --------------------------------------------------------------------------- experiments


def test_batches_see_every_row_once_an_epoch():
    rows = [{"chosen": k} for k in range(7)]
    made = finetune.batches(rows, 7, 3, torch.Generator().manual_seed(0))
    seen = [k for batch in made for k in batch["chosen"]]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))


def test_a_model_needs_data(tmp_path):
    with pytest.raises(ValueError, match="belong together"):
        setting.load(
            Lab("x", tmp_path, progress=False), settings.Sft(model="m", limit=9, prompts=2)
        )


SFT_OPTIONS = settings.Sft(
    **TINY,
    updates=4,
    every=2,
    kernel_points=1,
    kernel_prompts=1,
    kernel_tokens=1,
    explained=1,
    accuracy_steps=1,
)


@pytest.mark.slow
def test_sft_resumed_is_sft_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "KERNEL_RTOL", 0.9)  # few samples
    monkeypatch.setattr(measure, "OPTIMIZERS", ("rmsprop",))
    whole = sft.run(tmp_path, SFT_OPTIONS, progress=False)
    names = [claim["name"] for claim in whole["claims"]]
    assert {"sft 1", "sft 2a", "sft 2b", "sft 2c", "sft 3", "sft 4", "bound", "rank"} <= set(names)
    kernel = json.loads((tmp_path / "tables" / "kernel.json").read_text())
    assert {row["update"] for row in kernel} == {0}
    # as if it had been stopped before the influence at the end
    for name in ("influence-end", "accuracy"):
        (tmp_path / "steps" / f"{name}.json").unlink()
    again = sft.run(tmp_path, SFT_OPTIONS, progress=False)
    assert again["claims"] == whole["claims"]


@pytest.mark.slow
def test_dpo(tmp_path):
    options = settings.Dpo(**TINY, lengths=(0, 3), updates=3, every=2, explained=1, new_tokens=6)
    found = dpo.run(tmp_path, options, progress=False)
    names = {claim["name"] for claim in found["claims"]}
    assert {"dpo 1", "dpo 2", "dpo 3", "dpo 4a", "dpo 4b", "dpo 4c", "on-policy"} == names
    step = json.loads((tmp_path / "tables" / "mass_step.json").read_text())
    for row in step:
        assert abs(row["response"] + row["likeliest other"] + row["top"] + row["rest"]) < 1e-5
    parts = {row["kind"]: row for row in step if row["position"] < 0}
    for place in ("response", "likeliest other"):
        terms = parts["predicted, y+ term"][place] + parts["predicted, y− term"][place]
        assert parts["predicted"][place] == pytest.approx(terms, abs=1e-6)
    again = dpo.run(tmp_path, options, progress=False)
    assert again["claims"] == found["claims"]


@pytest.mark.slow
def test_extend(tmp_path):
    options = settings.Extend(**TINY, sft_updates=3, updates=3, every=2, new_tokens=6)
    found = extend.run(tmp_path, options, progress=False)
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
    assert refused.exit_code == 2 and "limit (there 20, now 21)" in refused.stderr


def test_a_users_model_and_file(tmp_path, small_world):
    """What --model and --data name is loaded and probed; nothing of the demo is needed."""
    small_world.model.save_pretrained(tmp_path / "m")
    small_world.tokenizer.save_pretrained(tmp_path / "m")
    ProbeSet(small_world.preference_pairs[:12]).save(tmp_path / "p.jsonl")
    lab = Lab("x", tmp_path / "lab", progress=False)
    files = {"model": str(tmp_path / "m"), "data": str(tmp_path / "p.jsonl")}
    chosen = settings.Sft(**files, limit=10, prompts=3)
    found = setting.load(lab, chosen)
    assert found.title == "m on p.jsonl" and len(found.test) == 2
    recipe = finetune.Recipe(Supervised(), 2, 1e-4, every=1)
    curves = finetune.finetune(
        lab, "r", found, found.fresh(), found.pairs(found.train, ("chosen",)), recipe
    )
    assert curves.log_prob.shape == (3, 3, len(found.fields))
    loaded = finetune.checkpoint(lab, "r", found.fresh())
    again = finetune.finetune(lab, "r", found, found.fresh(), [], replace(recipe, updates=2))
    assert again.raw == curves.raw
    # Another answer in the file, then other weights in the folder: not a step is mixed with them.
    for change, name in ((_other_row, "texts"), (_other_weights, "model weights")):
        change(tmp_path, small_world)
        with pytest.raises(ValueError, match=rf"other settings: {name} \(there"):
            setting.load(Lab("x", tmp_path / "lab", progress=False), chosen)
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
