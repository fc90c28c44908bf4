"""A trainer's settings, read from its configuration, and the step that follows them."""

import itertools
import json
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo

import lddyn
from lddyn.arguments import TRAINERS, _kind_of_class
from lddyn.objectives.like import loss_like
from lddyn.settings import TrainerSettings, router_remark

torch.set_num_threads(1)
trl = pytest.importorskip("trl")
OLD = trl.__version__.startswith("0.")
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(kind, tmp_path, **options):
    if kind == "Training":
        return transformers.TrainingArguments(str(tmp_path), **{**QUIET, **options})
    module = trl if hasattr(trl, f"{kind}Config") else None
    module = module or pytest.importorskip(f"trl.experimental.{kind.lower()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(module, f"{kind}Config")(str(tmp_path), **{**QUIET, **options})


@pytest.mark.case("settings of a trainer's config")
def test_a_config_says_objective_cutting_optimizer_and_clipping(tmp_path):
    options = {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [0.5, 2.0],
        "beta": 0.3,
        "max_length": 77,
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.5,
    }
    settings = TrainerSettings.of(config("DPO", tmp_path, **options))
    assert (settings.trainer, settings.losses) == ("dpo", ("dpo", "sft"))
    assert settings.loss_weights == (0.5, 2.0) and settings.parameters["beta"] == 0.3
    assert (settings.max_length, settings.batch, settings.max_grad_norm) == (77, 8, 0.5)
    assert settings.truncation_mode == ("keep_end" if OLD else "keep_start")
    for file, text in (
        ("a.json", json.dumps({"trainer": "dpo", **options})),
        ("a.yaml", "\n".join(f"{k}: {json.dumps(v)}" for k, v in options.items())),
    ):
        (tmp_path / file).write_text(text)
        read = TrainerSettings.of(tmp_path / file)
        for name in ("losses", "loss_weights", "max_length", "learning_rate", "weight_decay"):
            assert getattr(read, name) == getattr(settings, name), (file, name)
        assert read.parameters["beta"] == 0.3
    assert TrainerSettings.of(settings) is settings


@pytest.mark.parametrize(
    ("kind", "options", "losses", "loss"),
    [
        ("SFT", {}, ("nll",), None),
        ("SFT", {"loss_type": "dft"}, ("dft",), None),
        ("KTO", {"desirable_weight": 1.3}, ("kto",), "kto"),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}, ("simpo",), "simpo"),
        ("CPO", {"loss_type": "sigmoid"}, ("cpo",), "cpo"),
        ("ORPO", {"beta": 0.2}, ("orpo",), "orpo"),
        ("DPO", {"loss_type": ["robust"], "label_smoothing": 0.2}, ("robust",), "robust"),
        ("DPO", {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}, ("exo_pair",), "exo_pair"),
        ("Training", {}, ("nll",), None),
    ],
)
def test_every_trainers_config_is_read(tmp_path, kind, options, losses, loss):
    from lddyn.objectives.like import loss_like

    settings = TrainerSettings.of(config(kind, tmp_path, **options))
    assert settings.losses == losses
    if loss:
        made = loss_like(settings)
        assert made.name == loss
        given = {k: v for k, v in options.items() if k in made.parameters}
        assert given.items() <= made.parameters.items()


@pytest.mark.case("settings that cannot be followed are said")
@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        ("Training", {"label_smoothing_factor": 0.1}, "whole distribution"),
        ("Training", {"neftune_noise_alpha": 5.0}, "noise on embeddings"),
        ("Training", {"warmup_steps": 5}, "rises from 0"),
        ("Training", {"optim": "adafactor"}, "optim=adafactor: lddyn follows SGD, Adam"),
        ("Training", {"optim": "paged_adamw_8bit"}, "AdamW's with an exact state"),
        ("DPO", {"use_weighting": True}, "WPO"),
        ("DPO", {"sync_ref_model": True}, "follows the policy"),
        ("DPO", {"disable_dropout": False}, "dropout stays on"),
        ("SFT", {"packing": True}, "packed into one sequence"),
    ],
)
def test_what_is_not_followed_is_a_remark(tmp_path, kind, options, word):
    settings = TrainerSettings.of(config(kind, tmp_path, **options))
    remarks = (*settings.remarks, *settings.step_remarks)
    assert any(word in remark for remark in remarks), remarks
    assert (word == "rises from 0") == bool(settings.step_remarks)
    plain = TrainerSettings.of(config(kind, tmp_path))
    assert not plain.remarks and not plain.step_remarks


def test_what_is_no_configuration_is_refused(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("- a\n- b\n")
    for source, message in (
        ({"learning_rate": 1e-3}, "does not tell its trainer: add one of trainer: sft"),
        ({"trainer": "ppo"}, "trainer must be one of sft, dpo"),
        (bad, "must hold arguments by name"),
        (tmp_path / "none.yaml", "cannot be read"),
        (3, "like must be a TRL config"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainerSettings.of(source)


BOMB = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{k}: &{k} [{', '.join(9 * [f'*{j}'])}]" for j, k in itertools.pairwise("abcdefghij")),
        "trainer: dpo\npacking: *j",
    ]
)


@pytest.mark.case("a configuration with a key twice, or aliases without end")
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.yaml", BOMB, "more than 100,000 values, those of aliases"),
        ("a.yaml", BOMB.replace(": &", ": &x").replace("*", "*x"), "more than 100,000 values"),
        ("a.yaml", "trainer: dpo\nbeta: &b [*b]", "alias in line 2 names what holds it"),
        ("a.yaml", "trainer: dpo\nbeta: 1\nseed: 2\nbeta: 3", "'beta' occurs twice, .* line 4"),
        ("a.yaml", "trainer: dpo\nx: {a: {b: 1, b: 2}}", "'b' occurs twice"),
        ("a.json", '{"trainer": "dpo", "beta": 1, "beta": 2}', "'beta' occurs twice"),
        ("a.json", '{"trainer": "dpo", "beta": NaN}', "NaN is no number"),
        ("a.json", '{"trainer": "dpo", "beta": 1' + 5000 * "0" + "}", "digits"),
        ("a.json", '{"trainer": "dpo", "beta": 1' + 500 * "0" + "}", "beta must be a finite"),
        ("a.json", 10**5 * "[", "too deeply nested"),
        ("a.yaml", 10**3 * "[", "too deeply nested"),
        ("a.yaml", 10**4 * "? ", "not a configuration"),
        ("a.yaml", "beta: !!python/object/apply:os.system [exit]", "not a configuration"),
        ("a.yaml", "when: 2024-99-99\ntrainer: dpo", "not a configuration"),
        ("a.yaml", "trainer: dpo\nbeta: \x07", "not a configuration"),
        ("a.yaml", "trainer: dpo\npacking: [1, 2]", "packing must be true or false"),
        ("a.yaml", "trainer: ppo", "trainer must be one of"),
        ("a.yaml", "#" * (1 << 20) + "\n", "larger than"),
        ("a.yaml", "", "must hold arguments by name"),
        ("a.yaml", "trainer: dpo\nlearning_rate: -1", "learning_rate must be from 0 to inf"),
        ("a.json", '{"trainer": "dpo", "seed": 1e30}', "seed must be from 0 to 9.22337e"),
        ("a.json", '{"trainer": "dpo", "max_length": -4}', "max_length must be from 2 to"),
        ("a.json", '{"trainer": "dpo", "truncation_mode": 1}', 'must be "keep_start" or "keep_end'),
    ],
)
def test_a_hostile_configuration_is_an_error_in_one_line(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        TrainerSettings.of(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(str(tmp_path / name)) and "\n" not in said and len(said) < 500


def test_anchors_and_merged_mappings_of_yaml_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "base: &base {beta: 0.3, seed: 7}\nmore: &more {max_length: 99}\ntrainer: dpo\n"
        "<<: *base\n<<: *more\nseed: 8\n"
    )
    settings = TrainerSettings.of(tmp_path / "a.yaml")
    assert (settings.parameters["beta"], settings.max_length, settings.seed) == (0.3, 99, 8)


@pytest.mark.case("a step like the trainer's")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_step_like_a_config_is_the_step_with_its_values(tmp_path, kind):
    """Objective, rate, AdamW with decay on matrices alone, clipping: as a real step has them."""
    model = zoo.build("llama")
    one, other = zoo.examples()
    options = {"learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.9, "max_grad_norm": 0.3}
    if kind == "dpo":
        options |= {"loss_type": ["ipo"], "beta": 0.4}
    dec = lddyn.decompose(
        model,
        [one, other],
        (one, other) if kind == "dpo" else [one, other],
        like=config(kind.upper(), tmp_path, **options),
    )
    if kind == "dpo":
        update = lddyn.preference("ipo", one, other, beta=0.4)
    else:
        update = lddyn.SFT([one, other])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.9),
    )
    by_hand = lddyn.decompose(model, [one, other], update, optimizer=optimizer, max_grad_norm=0.3)
    assert dec.loss == by_hand.loss and dec.lr == by_hand.lr
    assert dec.settings["clip_factor"] == by_hand.settings["clip_factor"] < 1
    for a, b in zip(dec, by_hand, strict=True):
        assert torch.allclose(a.delta_logp, b.delta_logp, rtol=1e-5, atol=1e-8)
        assert bool(a.weight_decay.any())


def test_settings_of_a_trainer_bring_its_reference_and_the_rows_it_learns_from(tmp_path):
    from lddyn.objectives.like import objective_like

    class FakeDPOTrainer:
        args = config("DPO", tmp_path)
        ref_model = zoo.build("llama", seed=3)

    class DPOTrainer(FakeDPOTrainer):
        """Read by its name alone, as a trainer of TRL's is."""

    model, (one, other) = zoo.build("llama"), zoo.examples()
    settings = TrainerSettings.of(DPOTrainer())
    assert settings.reference is DPOTrainer.ref_model
    objective = objective_like(settings, [(one, other)], model)
    assert objective.reference is DPOTrainer.ref_model and objective.name == "dpo"
    adapted = zoo.lora("llama")
    plain = TrainerSettings.of(config("DPO", tmp_path))
    assert objective_like(plain, (one, other), adapted).reference == "adapter-off"
    adapted.add_adapter("ref", adapted.peft_config["default"])
    assert objective_like(plain, (one, other), adapted).reference == "adapter:ref"
    kto = TrainerSettings.of(config("KTO", tmp_path, beta=0.3))
    made = objective_like(kto, [(one, True), (other, False)], model)
    assert made.parameters["beta"] == 0.3 and made.labels == [True, False]
    with pytest.raises(ValueError, match="a step of a DPO trainer learns from pairs"):
        objective_like(plain, [one, other], model)
    with pytest.raises(ValueError, match="a step of a SFT trainer learns from an Example"):
        objective_like(TrainerSettings.of({"packing": False}), [(one, other)], model)


@pytest.mark.case("a router's auxiliary loss that is left out")
def test_the_auxiliary_loss_of_routers_is_said(tmp_path):
    model = transformers.Qwen3MoeConfig(router_aux_loss_coef=0.01, output_router_logits=True)
    assert "router_aux_loss_coef = 0.01" in router_remark(model)
    quiet = transformers.Qwen3MoeConfig(router_aux_loss_coef=0.01, output_router_logits=False)
    assert router_remark(quiet) is None
    settings = TrainerSettings.of(config("SFT", tmp_path))
    assert (router_remark(quiet, settings) is None) == OLD  # TRL now asks for it by itself
    assert router_remark(zoo.build("llama").config, settings) is None


@pytest.mark.case("a learning rate of 0, as in the first step of a warm-up")
def test_a_learning_rate_of_zero_moves_nothing_and_says_so():
    model, (one, _) = zoo.build("llama"), zoo.examples()
    dec = lddyn.decompose(model, one, lddyn.SFT(one), lr=0.0)
    assert not bool(dec[0].delta_logp.any())
    assert "A learning rate of 0 moves nothing" in dec.explain()
    with pytest.raises(ValueError, match="the learning rate is 0"):
        dec.verify()


def test_a_run_like_a_config_has_its_schedule(tmp_path):
    options = {"learning_rate": 1e-3, "num_train_epochs": 2, "lr_scheduler_type": "cosine"}
    run = lddyn.Run.like(config("Training", tmp_path, warmup_steps=2, **options))
    assert (run.epochs, run.schedule, run.warmup) == (2, "cosine", 2.0)


@pytest.mark.case("an optimizer that lddyn does not follow")
def test_other_optimizers_are_refused_with_a_way_out():
    model, (one, _) = zoo.build("llama"), zoo.examples()
    parameters = list(model.parameters())
    adafactor = transformers.optimization.Adafactor(parameters)
    for optimizer, kind in ((adafactor, TypeError), ("lion", ValueError)):
        with pytest.raises(kind, match=r"watch\(trainer, predict=1\)"):
            lddyn.decompose(model, one, lddyn.SFT(one), lr=1e-3, optimizer=optimizer)
    dec = lddyn.decompose(model, one, lddyn.SFT(one), lr=1e-3, optimizer="adamw_torch")
    assert dec.settings["optimizer"] == "AdamW"


def test_rows_are_cut_and_counted_like_the_trainers(tmp_path):
    arguments = {"trainer": "sft", "max_length": 64, "assistant_only_loss": True}
    (tmp_path / "sft.json").write_text(json.dumps(arguments))
    for source in (arguments, tmp_path / "sft.json", TrainerSettings.of(arguments)):
        options = lddyn.RowOptions.like(source)
        assert options.max_length == 64 and options.assistant_only
    with pytest.raises(ValueError, match="like must be a TRL config"):
        lddyn.RowOptions.like(SimpleNamespace(max_length=7))
    plain = lddyn.RowOptions.like(config("SFT", tmp_path))
    assert not plain.assistant_only and plain.max_length == 1024


@pytest.mark.case("a trainer whose loss lddyn does not have")
@pytest.mark.parametrize("kind", ["RLOO", "Reward", "GKD", "OnlineDPO", "SDPO"])
def test_other_trainers_are_refused_by_name(tmp_path, kind):
    """Also where the class inherits from SFTConfig, or its name ends as DPO's does."""
    import importlib

    if not hasattr(trl, f"{kind}Config"):
        folder = {"OnlineDPO": "online_dpo"}.get(kind, kind.lower())
        module = pytest.importorskip(f"trl.experimental.{folder}")
    else:
        module = importlib.import_module("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(module, f"{kind}Config")(str(tmp_path), learning_rate=3e-4, **QUIET)
    model, (one, other) = zoo.build("llama"), zoo.examples()
    with pytest.raises(ValueError, match=f"no loss of TRL's {kind.upper()} trainer"):
        lddyn.decompose(model, one, (one, other), like=made)
    dec = lddyn.decompose(model, one, lddyn.SFT(one), like=made)
    assert dec.lr == 3e-4 and dec.settings["optimizer"] == "AdamW"
    inherited = type("MyConfig", (type(made),), {})(str(tmp_path), **QUIET)
    assert TrainerSettings.of(inherited).losses == ()


def test_names_of_classes_that_are_not_trls_tell_their_kind():
    assert _kind_of_class(type("UnslothDPOTrainer", (), {}), "Trainer") == "dpo"
    assert _kind_of_class(type("MyTrainer", (type("SFTTrainer", (), {}),), {}), "Trainer") == "sft"
    assert _kind_of_class(type("MyOnlineDPOTrainer", (), {}), "Trainer") not in TRAINERS
    assert _kind_of_class(type("Trainer", (), {}), "Trainer") == ""


@pytest.mark.case("a live trainer's optimizer with its state")
def test_a_live_trainer_brings_its_optimizers_state(tmp_path):
    """Prediction and real next step of a trainer that has made three."""
    model, (one, other) = zoo.build("llama"), zoo.examples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    class DPOTrainer:
        args = config("DPO", tmp_path, learning_rate=9.0, warmup_steps=2, max_grad_norm=0.0)

    trainer = DPOTrainer()
    trainer.optimizer, trainer.state = optimizer, SimpleNamespace(global_step=0)
    assert TrainerSettings.of(trainer).optimizer_state is None
    for _ in range(3):
        optimizer.zero_grad()
        (-zoo.token_log_probs(model, other).mean()).backward()
        optimizer.step()
    settings = TrainerSettings.of(trainer)
    assert settings.optimizer_state is optimizer
    assert not any("rises from 0" in remark for remark in settings.remarks)
    dec = lddyn.decompose(model, one, (one, other), like=trainer)
    by_hand = lddyn.decompose(model, one, lddyn.DPO(one, other), optimizer=optimizer)
    assert dec.lr == 2e-4 and bool(dec[0].history.any())
    assert torch.equal(dec[0].delta_logp, by_hand[0].delta_logp)
    fresh = lddyn.decompose(zoo.build("llama"), one, (one, other), like=trainer)
    assert fresh.lr == 9.0 and not bool(fresh[0].history.any())  # of another model


@pytest.mark.case("a trainer's own compute_loss")
def test_what_only_a_trainer_knows_is_said(tmp_path):
    class SFTTrainer:
        args = config("SFT", tmp_path)

        def compute_loss(self, model, inputs):
            """Their own."""

    class DPOTrainer:
        args = config("DPO", tmp_path, precompute_ref_log_probs=True)
        state = SimpleNamespace(global_step=5)

    trainer = SFTTrainer()
    trainer.compute_loss_func = lambda *_: None
    said = " ".join(TrainerSettings.of(trainer).remarks)
    assert "compute_loss is SFTTrainer's own" in said and "function of your own" in said
    assert "kept no reference model" in " ".join(TrainerSettings.of(DPOTrainer()).remarks)
    DPOTrainer.state.global_step = 0
    assert not TrainerSettings.of(DPOTrainer()).remarks


def test_a_loss_without_a_reference_is_so_beside_a_reference_model(tmp_path):
    class DPOTrainer:
        args = config("DPO", tmp_path)
        ref_model = zoo.build("llama", seed=3)

    DPOTrainer.args.reference_free = True  # an option of TRL before 1.0
    assert TrainerSettings.of(DPOTrainer()).reference == "free"


@pytest.mark.case("tokens that merge with the prompt's, as older trainers count them")
def test_token_ids_of_older_trainers_are_said():
    from dataclasses import replace

    from lddyn.objectives.like import row_remarks

    plain, (one, _) = TrainerSettings.of({"trainer": "dpo"}), zoo.examples()
    merged = replace(one, notes=(("boundary_merge", "the last 1 prompt token(s) …"),))
    for version, said in (("0.24.0", True), ("1.9.2", True), ("1.14.0", False), ("", False)):
        settings = replace(plain, trl_version=version)
        assert bool(row_remarks(settings, [one, merged])) == said
        assert not row_remarks(settings, [one])
    old = replace(plain, trl_version="1.9.0", optimizer="sgd")
    dec = lddyn.decompose(zoo.build("llama"), one, (merged, one), like=old)
    assert "TRL 1.9.0 counts the prompt's tokens alone" in dec.explain()


@pytest.mark.case("arguments of a file are of their types, and unknown ones are named")
def test_arguments_of_a_file_have_types(tmp_path):
    simpo = TrainerSettings.of({"trainer": "cpo", "loss_type": "simpo"})
    assert simpo.parameters["simpo_gamma"] == 0.5 and simpo.max_length == 1024
    given = {
        "trainer": "dpo",
        "learning_rate": "5e-6",
        "warmup_ratio": "0.1",
        "max_length": "512",
        "dataloader_drop_last": "false",
        "reference_free": "no",
        "bf16": "false",
        "beta": None,
    }
    settings = TrainerSettings.of(given)
    assert (settings.learning_rate, settings.warmup_ratio, settings.max_length) == (5e-6, 0.1, 512)
    assert not settings.drop_last and settings.reference == "trainer" and not settings.remarks
    assert settings.parameters["beta"] == 0.1
    assert TrainerSettings.of({"trainer": "dpo", "max_length": None}).max_length is None
    both = {"trainer": "dpo", "warmup_ratio": 0.1, "warmup_steps": 50}
    assert lddyn.Run.like({**both, "learning_rate": 1e-3}).warmup == 50
    if not OLD:
        typo = TrainerSettings.of({"trainer": "dpo", "betta": 0.7, "lr": 1e-3})
        assert "betta, lr: no argument of DPOConfig; not read." in typo.remarks
    for name, value, message in (
        ("learning_rate", "auto", "learning_rate must be a finite number, got 'auto'"),
        ("learning_rate", True, "learning_rate must be a finite number, got True"),
        ("beta", [1], r"beta must be a finite number, got \[1\]"),
        ("max_length", 4.5, "max_length must be a whole number, got 4.5"),
        ("packing", "maybe", "packing must be true or false, got 'maybe'"),
        ("lr_scheduler_kwargs", "min_lr=1", "lr_scheduler_kwargs must be JSON, got 'min_lr=1'"),
        ("lr_scheduler_kwargs", [1], "lr_scheduler_kwargs must have names and values"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainerSettings.of({"trainer": "dpo", name: value})
    with pytest.raises(ValueError, match="a TrainingArguments does not tell a loss of pairs"):
        loss_like(TrainerSettings.of(config("Training", tmp_path)))
    with pytest.raises(ValueError, match="like must tell its trainer, got SimpleNamespace"):
        TrainerSettings.of(SimpleNamespace(learning_rate=1e-3, beta=0.3))
    trl = pytest.importorskip("trl")
    with pytest.raises(ValueError, match="got the class DPOConfig"):
        TrainerSettings.of(trl.DPOConfig)
    with pytest.raises(ValueError, match="optim=adafactor: lddyn follows"):
        lddyn.Run.like({"trainer": "dpo", "optim": "adafactor"})


@pytest.mark.case("a configuration of LLaMA-Factory")
def test_a_configuration_of_llama_factory():
    given = {
        "model_name_or_path": "m",
        "stage": "dpo",
        "finetuning_type": "lora",
        "template": "qwen",
        "cutoff_len": 512,
        "pref_beta": 0.2,
        "pref_loss": "sigmoid",
        "pref_ftx": 0.5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 5.0e-6,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
    }
    settings = TrainerSettings.of(given)
    assert (settings.trainer, settings.losses) == ("dpo", ("dpo", "sft"))
    assert settings.loss_weights == (1.0, 0.5) and settings.parameters["beta"] == 0.2
    assert settings.max_length == 512
    said = " ".join(settings.remarks)
    assert "LLaMA-Factory: pref_ftx=0.5" in said and "bf16=True" in said
    run = lddyn.Run.like(given)
    assert repr(run) == (
        "Run(lr=5e-06, epochs=3, schedule='cosine', seed=42, warmup=0.1, max_grad_norm=1.0, "
        "accumulation=8)"
    )
    simpo = TrainerSettings.of({**given, "pref_loss": "simpo", "pref_ftx": 0.0})
    assert simpo.losses == ("simpo",) and simpo.parameters["simpo_gamma"] == 0.5
    smooth = TrainerSettings.of({**given, "pref_ftx": 0.0, "dpo_label_smoothing": 0.1})
    assert smooth.losses == ("cdpo",) and smooth.parameters["label_smoothing"] == 0.1
    kto = TrainerSettings.of({**given, "stage": "kto", "kto_chosen_weight": 2.0})
    assert kto.losses == ("kto",) and kto.parameters["desirable_weight"] == 2.0
    assert kto.shuffle and not TrainerSettings.of({**given, "disable_shuffling": True}).shuffle
    galore = TrainerSettings.of({**given, "stage": "sft", "use_galore": True})
    assert galore.losses == ("nll",) and galore.optimizer is None and galore.assistant_only
    for options, message in (
        ({"stage": "ppo"}, "stage: lddyn has the losses of sft, pt, dpo and kto, got 'ppo'"),
        ({"pref_loss": "kto_pair"}, "pref_loss must be sigmoid, hinge, .*, got 'kto_pair'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainerSettings.of({**given, **options})


@pytest.mark.case("a configuration of axolotl")
def test_a_configuration_of_axolotl(tmp_path):
    text = """
base_model: m
rl: ipo
rl_beta: 0.3
sequence_len: 2048
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
warmup_steps: 10
max_grad_norm: 0.5
"""
    (tmp_path / "a.yaml").write_text(text)
    settings = TrainerSettings.of(tmp_path / "a.yaml")
    assert settings.losses == ("ipo",) and settings.parameters["beta"] == 0.3
    assert (settings.batch, settings.accumulation, settings.epochs) == (8, 4, 2.0)
    assert settings.max_length == 2048 and settings.max_grad_norm == 0.5
    assert settings.optimizer == "adamw" and "fewer bits" in " ".join(settings.remarks)
    sft = TrainerSettings.of({"base_model": "m", "sequence_len": 128, "sample_packing": True})
    assert sft.losses == ("nll",) and sft.assistant_only and sft.warmup_ratio == 0.03
    assert "packing=True" in " ".join(sft.remarks)
    simpo = {"base_model": "m", "rl": "simpo", "simpo_gamma": 0.7, "trl": {"beta": 2.0}}
    told = TrainerSettings.of(simpo)
    assert told.losses == ("simpo",)
    assert (told.parameters["simpo_gamma"], told.parameters["beta"]) == (0.7, 2.0)
    with pytest.raises(ValueError, match=r"rl: lddyn has the losses of dpo, ipo, .* got 'grpo'"):
        TrainerSettings.of({**simpo, "rl": "grpo"})


@pytest.mark.case("configurations whose loss, schedule or optimizer is unknown")
@pytest.mark.parametrize(
    "arguments",
    [{"loss_type": ["nope"]}, {"lr_scheduler_type": "nope"}, {"optim": "lion"}],
)
def test_what_is_not_known_names_the_file(arguments, tmp_path):
    file = tmp_path / "dpo.json"
    file.write_text(json.dumps({"trainer": "dpo", **arguments}))
    settings = TrainerSettings.of(file)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: "):
        loss_like(settings)
        lddyn.Run.like(file)
    if "optim" not in arguments:
        with pytest.raises(ValueError, match=r"^(objective|schedule) must be one of"):
            same = replace(settings, file="")
            loss_like(same)
            lddyn.Run.like(same)
