"""Batches, learning rates and weight decay of a run, held to transformers' Trainer."""

import pytest
import torch
import transformers
import zoo

import lddyn

SETTINGS = {
    "shuffled": {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2, "seed": 5},
    "cosine": {
        "num_train_epochs": 3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "seed": 7,
        "data_seed": 3,
    },
    "steps": {
        "max_steps": 6,
        "dataloader_drop_last": True,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3,
        "adam_beta2": 0.95,
    },
    "in order": {"num_train_epochs": 1, "train_sampling_strategy": "sequential"},
}


class Recorder(transformers.Trainer):
    """Notes the rows of every part of a step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.parts.append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


class Rates(transformers.TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def trained(folder, **settings):
    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=None,
        attention_bias=True,
    )
    rows = [{"input_ids": [i, 8, 9], "labels": [i, 8, 9]} for i in range(7)]
    noted = Rates()
    trainer = Recorder(
        transformers.LlamaForCausalLM(config),
        transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=rows,
        callbacks=[noted],
    )
    trainer.parts = []
    trainer.train()
    return trainer, noted.rates


@pytest.mark.case("a run's batches, rates and decay are transformers' Trainer's")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_the_trainers(tmp_path, name):
    if "train_sampling_strategy" in SETTINGS[name] and not hasattr(
        transformers.TrainingArguments, "train_sampling_strategy"
    ):
        pytest.skip("this transformers has no train_sampling_strategy")
    trainer, rates = trained(tmp_path, **SETTINGS[name])
    run = lddyn.Run.like(trainer)
    assert run == lddyn.Run.like(trainer.args)
    batches = run.batches(range(7))
    assert len(batches) == len(rates) == trainer.state.global_step
    assert run.rates(len(batches)) == pytest.approx(rates, rel=1e-12)
    for step, (rows, weights) in enumerate(batches):
        parts = [part for at, part in trainer.parts if at == step]
        assert rows.tolist() == [row for part in parts for row in part]
        expected = [1 / len(p) / len(parts) for p in parts for _ in p]
        assert weights.tolist() == pytest.approx(expected)
    groups = trainer.optimizer.param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    decaying = {n for n, p in trainer.model.named_parameters() if id(p) in decayed}
    assert run.decaying(trainer.model) == decaying
    assert bool(decaying) == bool(run.weight_decay) and (run.beta2 == groups[0]["betas"][1])


def test_runs_that_cannot_be():
    for given, message in (
        ({"lr": 0.0}, "lr must be positive, got 0.0: with a learning rate of 0 nothing moves"),
        ({"lr": 1.0, "epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": 1.0, "optimizer": "lion"}, "optimizer must be one of adamw, sgd, got 'lion'"),
        ({"lr": 1.0, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"lr": 1.0, "batch": "4"}, "batch must be a whole number, got '4'"),
        ({"lr": 1.0, "max_steps": 3.5}, "max_steps must be a whole number or None, got 3.5"),
        ({"lr": 1.0, "batch": 3, "accumulation": 2}, "got 3 pairs in 2 parts"),
        ({"lr": 1.0, "schedule": "sine"}, "schedule must be one of linear, .*, got 'sine'"),
        ({"lr": 1.0, "schedule": "reduce_lr_on_plateau"}, "not known before the run"),
        ({"lr": 1.0, "schedule": "cosine_with_min_lr"}, "schedule 'cosine_with_min_lr': .*min_lr"),
        ({"lr": 1.0, "optimizer": "sgd", "weight_decay": 0.1}, "followed for optimizer 'adamw'"),
    ):
        with pytest.raises(ValueError, match=message):
            lddyn.Run(**given)
    with pytest.raises(ValueError, match="drop_last leaves no step: a part of a step has 8 pairs"):
        lddyn.Run(lr=1.0, drop_last=True).batches(range(5))


def test_a_run_says_what_is_not_the_default():
    run = lddyn.Run(lr=1e-4, schedule="cosine_with_min_lr", schedule_options={"min_lr": 1e-5})
    assert repr(run) == (
        "Run(lr=0.0001, schedule='cosine_with_min_lr', schedule_options={'min_lr': 1e-05})"
    )
    assert torch.equal(run.batches(range(3))[0].weights, torch.full((3,), 1 / 3))


@pytest.mark.case("numbers of epochs, pairs or segments without measure")
def test_runs_without_measure_end_soon():
    for options in ({"epochs": 1e12}, {"max_steps": 10**18}):
        with pytest.raises(ValueError, match=r"a run of [\d,]+ steps is too long to be predicted"):
            lddyn.Run(lr=1e-3, **options).batches(range(8))
    (only,) = lddyn.Run(lr=1e-3, batch=10**30).batches(range(8))
    assert sorted(only.pairs.tolist()) == list(range(8))
    model, pairs = zoo.build("llama", num_hidden_layers=1), [zoo.examples()]
    run = lddyn.Run(lr=1e-3, epochs=2)
    found = lddyn.diagnose(model, pairs, run=run, refresh=10**20, close_ups=0)
    assert found.forecast.segments == len(run.batches(range(1))) == 2
