"""Watching transformers' Trainer: same weights, nothing lost, budgets kept, errors harmless."""

import json
import warnings

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from watched_runs import Data, lora, new_model, rows, train, weights

import lddyn
from lddyn.integrations.trainer import LearningDynamicsCallback


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (None, {}),
        (None, {"bf16": True}),
        (None, {"gradient_checkpointing": True}),
        (lora, {}),
        (
            lora,
            {
                "bf16": True,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
    ],
    ids=["plain", "bf16", "checkpointing", "lora", "all"],
)
def test_weights_are_equal_to_the_bit(tmp_path, tokenizer, wrap, options):
    after = []
    for watch in (None, {"predict": 2}):
        model = new_model()
        model = wrap(model) if wrap else model
        trainer, callback = train(tmp_path / str(watch), tokenizer, watch, model, **options)
        after.append(weights(trainer))
    assert all(torch.equal(after[0][n], after[1][n]) for n in after[0])
    assert [row["step"] for row in callback.rows] == list(range(7))
    assert trainer.model.training


def test_numbers_are_those_of_the_model(tmp_path, tokenizer):
    trainer, callback = train(tmp_path, tokenizer, {"predict": 4})
    probes = lddyn.probes.probe_set.ProbeSet(rows(4)).encode(tokenizer)
    model, total = trainer.model.eval(), []
    for example in probes.examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        total.append(float(logits[list(example.positions), list(example.targets)].sum().detach()))
    means = probes.grid(torch.tensor(total)).mean(0)
    last, first = callback.rows[-1], callback.rows[0]
    for name, mean in zip(probes.fields, means.tolist(), strict=True):
        assert last[f"log_prob/{name}"] == pytest.approx(mean, abs=1e-4)
        moved = last[f"log_prob/{name}"] - first[f"log_prob/{name}"]
        assert last[f"change/{name}"] == pytest.approx(moved, abs=1e-4)
        assert last[f"greedy/{name}"] >= last[f"log_prob/{name}"]
        before = callback.rows[-2][f"log_prob/{name}"]
        assert last[f"step/{name}"] == pytest.approx(last[f"log_prob/{name}"] - before, abs=1e-4)
    assert "of the watched run" in (tmp_path / "lddyn" / "index.html").read_text("utf-8")
    lines = (tmp_path / "lddyn" / "dynamics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["each"] == pytest.approx(total, abs=1e-3)


def test_first_order_is_of_first_order(tmp_path, tokenizer):
    errors = []
    for rate in (4e-4, 2e-4):
        # One step: Adam's is the sign of the gradient times the rate.
        _, callback = train(
            tmp_path / str(rate),
            tokenizer,
            {"predict": 4},
            max_steps=1,
            learning_rate=rate,
            lr_scheduler_type="constant",
            model=new_model(dropout=0.0).double(),
        )
        row = callback.rows[-1]
        errors.append(abs(row["step/chosen"] - row["first_order/chosen"]))
        assert errors[-1] < 0.2 * abs(row["step/chosen"])
    assert errors[0] / errors[1] > 3.5  # falls at least as the square of the rate


def test_the_trainers_own_rows_are_kept(tmp_path, tokenizer):
    shown = []

    class Dashboard(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            shown.append(set(logs))

    plain, _ = train(tmp_path / "a", tokenizer)
    trainer, _ = train(tmp_path / "b", tokenizer, {}, also=[Dashboard()])
    assert sum("loss" in keys for keys in shown) == 3
    assert sum("lddyn/log_prob/chosen" in keys for keys in shown) == 7
    ours = [r for r in trainer.state.log_history if any(k.startswith("lddyn/") for k in r)]
    others = [r for r in trainer.state.log_history if r not in ours]
    assert [r["step"] for r in ours] == list(range(7))
    assert [r.get("loss") for r in others] == [r.get("loss") for r in plain.state.log_history]
    assert all(len(r) <= 32 and all(isinstance(v, int | float) for v in r.values()) for r in ours)


class Clock:
    """A clock that only the test moves: 0.05 s a step of training, 0.01 s a pass."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("lddyn.integrations.budget.time", self)
        monkeypatch.setattr("lddyn.integrations.watcher.measure", self.measure)

    def monotonic(self):
        return self.now

    def measure(self, *arguments):
        self.now += 0.01
        return lddyn.probes.measure.measure(*arguments)


def test_the_budget_is_kept(tmp_path, tokenizer, monkeypatch):
    clock = Clock(monkeypatch)

    class Slow(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.now += 0.05

    options = {"budget": "11%", "every": 2}
    _, callback = train(tmp_path, tokenizer, options, also=[Slow()], max_steps=40)
    steps = [row["step"] for row in callback.rows]
    assert steps == [
        0,
        *range(6, 41, 2),
    ]  # 0.03 s, room for a last pass among them, are 10 % of 0.3
    assert callback.overhead == pytest.approx(0.19 / 2.0)
    assert all(row["overhead"] <= 0.11 for row in callback.rows)


def test_a_pass_waits_until_the_budget_has_room(tmp_path, tokenizer, monkeypatch):
    clock = Clock(monkeypatch)

    class Slow(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.now += 0.05

    _, callback = train(tmp_path, tokenizer, {"budget": "1.1%"}, also=[Slow()], max_steps=40)
    assert [row["step"] for row in callback.rows] == [0, 40]  # 0.02 s of 2 s: the last one
    _, callback = train(tmp_path, tokenizer, {"budget": "0.9%"}, also=[Slow()], max_steps=40)
    # The first and the last are made in any case.
    assert [row["step"] for row in callback.rows] == [0, 40]


def test_a_long_first_pass_is_said(tmp_path, tokenizer, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr("lddyn.integrations.watcher._LONG", 0.009)
    with pytest.warns(UserWarning, match=r"first pass over \d+ probes took 0 s; budget=0\.05 lets"):
        train(tmp_path, tokenizer, {"budget": "5%"}, max_steps=2)
    assert clock.now == pytest.approx(0.02)


def test_an_error_never_stops_training(tmp_path, tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the probes are gone")

    monkeypatch.setattr("lddyn.integrations.watcher.measure", broken)
    with pytest.warns(UserWarning, match=r"stopped watching \(begin\).*the probes are gone"):
        trainer, callback = train(tmp_path, tokenizer, {})
    assert trainer.state.global_step == 6 and callback.rows == []


def test_a_resumed_run_goes_on_with_its_rows(tmp_path, tokenizer):
    whole, expected = train(tmp_path / "whole", tokenizer, {"every": 2})
    train(tmp_path / "two", tokenizer, {"every": 2}, save_strategy="steps", save_steps=4)
    folder = tmp_path / "two"
    resumed, callback = train(
        folder,
        tokenizer,
        {"every": 2},
        resume=str(folder / "checkpoint-4"),
        save_strategy="steps",
        save_steps=4,
    )
    assert [r["step"] for r in callback.rows] == [0, 2, 4, 6]
    for a, b in zip(expected.rows, callback.rows, strict=True):
        assert a["change/chosen"] == pytest.approx(b["change/chosen"], abs=1e-3)
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_without_a_trainer_rows_are_in_the_history(tmp_path, tokenizer):
    watch = {"trainer": None, "probes": {"greeting": [lddyn.Example([3, 4], [5, 6])]}}
    transformers.set_seed(1)
    callback = LearningDynamicsCallback(**watch, budget=1e4)
    trainer = Trainer(
        new_model(),
        TrainingArguments(
            str(tmp_path),
            max_steps=2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Data(tokenizer),
        callbacks=[callback],
        data_collator=lambda batch: {
            k: torch.tensor([row[k] for row in batch]) for k in ("input_ids", "labels")
        },
    )
    trainer.train()
    history = [r for r in trainer.state.log_history if "lddyn/log_prob/greeting" in r]
    assert [r["step"] for r in history] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "much"}, "budget must be a share such as '5%' or 0.05, got 'much'"),
        ({"budget": 0}, "budget must be a share"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"predict": -1}, "predict must be 0 or more prompts, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LearningDynamicsCallback("probes.jsonl", **options)


def test_nothing_is_warned_of(tmp_path, tokenizer):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lddyn stopped")
        train(tmp_path, tokenizer, {"predict": 1})


def test_a_second_run_begins_anew(tmp_path, tokenizer):
    trainer, callback = train(tmp_path, tokenizer, {"every": 2})
    callback._failed = True
    trainer.train()
    assert [row["step"] for row in callback.rows] == [0, 2, 4, 6]
    assert callback.rows[0]["change/chosen"] == 0
    old = (tmp_path / "lddyn" / "dynamics-1.jsonl").read_text().splitlines()
    assert len(old) == 4  # of the first run


def test_a_callback_follows_its_trainer(tmp_path, tokenizer):
    _, callback = train(tmp_path / "a", tokenizer, {}, max_steps=1)
    train(tmp_path / "b", tokenizer, also=[callback], max_steps=1)
    for name in ("a", "b"):
        assert len((tmp_path / name / "lddyn" / "dynamics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_does_not_mix_probes(tmp_path, tokenizer):
    options = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, tokenizer, {"every": 2}, **options)
    others = lddyn.probes.probe_set.ProbeSet(rows(8)[4:])
    _, callback = train(
        tmp_path,
        tokenizer,
        {"every": 2, "probes": others},
        resume=str(tmp_path / "checkpoint-4"),
        **options,
    )
    assert [row["step"] for row in callback.rows] == [4, 6]
    assert callback.rows[0]["change/chosen"] == 0
    assert len((tmp_path / "lddyn" / "dynamics-1.jsonl").read_text().splitlines()) == 4


def test_numbers_that_are_not_finite_are_null(tmp_path, tokenizer):
    def strict(text):
        raise ValueError(text)

    probes = {"one": [lddyn.Example([3, 4], [5, 6])], "none": []}
    _, callback = train(tmp_path, tokenizer, {"probes": probes, "predict": 1})
    assert len(callback.rows) == 7
    for line in (tmp_path / "lddyn" / "dynamics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=strict)
        assert row["log_prob/none"] is None and row["log_prob/one"] < 0


def test_weights_that_are_not_finite_end_the_watching(tmp_path, tokenizer):
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"stopped watching \(begin\).*must be finite"):
        trainer, _ = train(tmp_path, tokenizer, {}, model)
    assert trainer.state.global_step == 6


def test_the_last_row_is_of_the_last_weights(tmp_path, tokenizer):
    _, callback = train(
        tmp_path,
        tokenizer,
        {"every": 4},
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="loss",
        evaluate=True,
        learning_rate=0.5,
    )
    assert [row["step"] for row in callback.rows] == [0, 4]


def test_the_cost_before_a_step_counts(tmp_path, tokenizer, monkeypatch):
    import time

    import lddyn.integrations.watcher as module

    measured = module.measure

    def slow(*arguments):
        time.sleep(0.05)
        return measured(*arguments)

    monkeypatch.setattr(module, "measure", slow)
    _, callback = train(tmp_path, tokenizer, {"predict": 1}, max_steps=2)
    assert callback._run.budget._costs[-1] > 0.14  # before the step, after it, and the pass itself


def test_modes_and_flags_stay(tmp_path, tokenizer):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(
                [
                    [m.training for m in model.modules()],
                    [p.requires_grad for p in model.parameters()],
                    sorted(k for m in model.modules() for k in m.__dict__ if k == "forward"),
                    [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                    model.config.use_cache,
                    model.config._attn_implementation,
                    torch.get_rng_state().tolist(),
                ]
            )

    for watch in (None, {"predict": 2}):
        model = new_model()
        model.model.embed_tokens.requires_grad_(False)
        train(
            tmp_path / str(watch),
            tokenizer,
            watch,
            model,
            bf16=True,
            also=[Look()],
            gradient_accumulation_steps=2,
            max_steps=2,
        )
    assert len(seen) == 4 and seen[:2] == seen[2:]


def test_probes_are_not_compiled(tmp_path, tokenizer):
    runs = []
    for watch in (None, {"predict": 2}):
        torch._dynamo.reset()
        compiled = []

        def backend(graph, inputs, compiled=compiled):
            compiled.append(len(inputs))
            return graph.forward

        model = torch.compile(new_model(), backend=backend)
        trainer, callback = train(
            tmp_path / str(watch), tokenizer, watch, model, remove_unused_columns=False, max_steps=2
        )
        runs.append((compiled, weights(trainer)))
    torch._dynamo.reset()
    assert [row["step"] for row in callback.rows] == [0, 1, 2]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][n], runs[1][1][n]) for n in runs[0][1])
