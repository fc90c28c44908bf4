"""Predicting the rest of a run that began before: its optimizer remembers."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import zoo
from preference_pairs import some_pairs
from torch.nn.functional import logsigmoid

import lddyn
from lddyn.sets.resumed import OptimizerState

PAIRS, START = some_pairs(), 9


def all_log_probs(model):
    return torch.stack(
        [torch.stack([zoo.token_log_probs(model, p[s]).sum() for p in PAIRS]) for s in (0, 1)]
    )


class Training:
    """DPO on the pairs, by an optimizer of torch, some steps at a time."""

    def __init__(self, model, run):
        self.model, self.run, self.done = copy.deepcopy(model), run, 0
        self.start = all_log_probs(self.model).detach()
        if run.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), run.lr, run.momentum)
        else:
            decay = {"weight_decay": run.weight_decay}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), run.lr, **decay)
        self.batches = run.batches(range(len(PAIRS)))
        self.rates = run.rates(len(self.batches))

    def to(self, step):
        """Trains up to a step; returns Δ log π (2, N) since the last call."""
        before = all_log_probs(self.model).detach()
        for at in range(self.done, step):
            rows, self.optimizer.param_groups[0]["lr"] = self.batches[at].pairs, self.rates[at]
            gain = all_log_probs(self.model)[:, rows] - self.start[:, rows]
            self.optimizer.zero_grad()
            (-logsigmoid(0.3 * (gain[0] - gain[1])).mean()).backward()
            if self.run.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm)
            self.optimizer.step()
        self.done = step
        return (all_log_probs(self.model).detach() - before).double()


def predicted(training, run, **options):
    told = lddyn.diagnose(
        training.model,
        PAIRS,
        beta=0.3,
        reference=training.start.double(),
        run=run,
        close_ups=0,
        **options,
    )
    return told.forecast


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama", num_hidden_layers=1).eval()


@pytest.mark.case("a run that is continued with a warm optimizer")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_continued_run_has_the_moments_of_its_optimizer(model, tmp_path, optimizer):
    settings = {
        "adamw": {"lr": 3e-4, "max_grad_norm": 5.0, "weight_decay": 0.1, "schedule": "linear"},
        "sgd": {"lr": 1e-3, "momentum": 0.9},
    }[optimizer]
    run = lddyn.Run(epochs=5, batch=2, optimizer=optimizer, **settings)
    training = Training(model, run)
    training.to(START)
    rest = run.resumed(training.optimizer, start=START)
    assert rest.batches(range(5))[0].pairs.tolist() == run.batches(range(5))[START].pairs.tolist()
    assert rest.rates(6) == run.rates(15)[START:]
    told = {
        "state": predicted(training, rest),
        "cold": predicted(training, replace(rest, optimizer_state=None)),
        "one segment": predicted(training, rest, refresh=1),
        "sketched": predicted(training, rest, sketch=lddyn.Sketch(k=8192)),
    }
    saved = copy.deepcopy(training.optimizer.state_dict())
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": START}))
    torch.save(saved, tmp_path / "optimizer.pt")
    from_file = predicted(training, run.resumed(tmp_path))
    assert torch.equal(from_file.change, told["state"].change)
    assert from_file.run.start == START and from_file.run.optimizer_state is None
    measured = training.to(15)
    errors = {
        name: float((forecast.change - measured).norm() / measured.norm())
        for name, forecast in told.items()
    }
    assert errors["state"] < 0.1 * errors["cold"] and errors["sketched"] < 0.06
    if optimizer == "adamw":  # Adam's own steps: what is left is rounding and curvature
        assert max(errors["state"], errors["one segment"]) < 0.003
    else:
        assert errors["state"] < min(0.03, errors["one segment"])


def test_states_that_are_not_of_the_run(model, tmp_path):
    run = lddyn.Run(lr=1e-4, epochs=5, batch=2)
    fresh = torch.optim.AdamW(model.parameters())
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for source, message in (
        (fresh, "made no step"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "has 1 parameters, and the model 12"),
        (other, "one of adamw, and the optimizer's state is of SGD"),
        (3, "the optimizer's state must be a torch optimizer, .*, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            lddyn.diagnose(model, PAIRS, run=run.resumed(source, start=1), close_ups=0)
    (tmp_path / "damaged.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"damaged.pt is damaged, or not a file of torch.save"):
        run.resumed(tmp_path / "damaged.pt")
    with pytest.raises(FileNotFoundError, match=r"optimizer.pt: no such file; .*save_only_model"):
        run.resumed(tmp_path)
    with pytest.raises(ValueError, match="start=15 leaves no step: the whole run has 15"):
        replace(run, start=15).batches(range(5))


def moment(name, value):
    """A change of an optimizer's state: a moment of its first parameter."""
    return lambda state: state["state"][0].update({name: value(state["state"][0][name])})


@pytest.mark.case("an optimizer's state with other things in it")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moment("exp_avg", lambda m: m * float("nan")), "NaN or infinite of .* go back"),
        (moment("exp_avg_sq", lambda v: v / 0), "NaN or infinite of .* go back"),
        (moment("exp_avg_sq", lambda v: v - 1), "negative second moment"),
        (moment("exp_avg_sq", lambda v: None), "floating-point numbers, got NoneType"),
        (moment("exp_avg", lambda m: m.long()), "floating-point numbers, got torch.int64"),
        (moment("step", lambda t: t * float("inf")), "a whole number, got inf"),
        (moment("step", lambda t: [1]), "a whole number, got a list"),
        (lambda state: state.update(state=[1]), "other things in its place"),
        (lambda state: state["param_groups"][0].pop("params"), "other things in its place"),
        (lambda state: state["param_groups"][0].update(param_names=["x"] * 12), "is of 'x'"),
    ],
)
def test_a_damaged_state_is_named(model, tmp_path, change, message):
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    twin = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    model.zero_grad()
    model.load_state_dict(twin)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    path = tmp_path / "optimizer.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"optimizer\.pt.*{message}"):
        OptimizerState.of(path, "adamw", dict(model.named_parameters()), model)


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 100_000, '{"global_step": 1e999}', "\udcff"])
def test_a_damaged_progress_is_named(tmp_path, text):
    path = tmp_path / "trainer_state.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"trainer_state\.json.* number of steps"):
        lddyn.Run(lr=1e-4).resumed(tmp_path)
