"""Watching real trainers: same weights, nothing lost, budgets kept, errors harmless."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

import lddyn
from lddyn.integrations.loop import Watch
from lddyn.integrations.trainer import LearningDynamicsCallback

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def precision(monkeypatch):
    """transformers 4 leaves the precision of a trainer to the next one."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def new_model(seed=0, dropout=0.1):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=63,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        attention_dropout=dropout,
    )
    return transformers.LlamaForCausalLM(config)


def rows(count=16):
    generator = torch.Generator().manual_seed(3)

    def text(length):
        return " ".join(
            WORDS[i] for i in torch.randint(60, (length,), generator=generator).tolist()
        )

    return [
        {"prompt": text(5), "chosen": " " + text(4), "rejected": " " + text(4)}
        for _ in range(count)
    ]


class Data(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        self.rows = [tokenizer(r["prompt"] + r["chosen"])["input_ids"] for r in rows()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def train(
    folder, tokenizer, watch=None, model=None, resume=None, evaluate=False, also=(), **options
):
    """A short run; `watch` are options of the callback, or None for none."""
    transformers.set_seed(1)
    model = new_model() if model is None else model
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "use_cpu": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=Data(tokenizer),
        processing_class=tokenizer,
        eval_dataset=Data(tokenizer) if evaluate else None,
        data_collator=lambda batch: {
            k: torch.tensor([row[k] for row in batch]) for k in ("input_ids", "labels")
        },
    )
    callback = None
    if watch is not None:
        watch = {"budget": "100000%", "probes": lddyn.probes.probe_set.ProbeSet(rows(4)), **watch}
        callback = LearningDynamicsCallback(trainer=trainer, **watch)
        trainer.add_callback(callback)
    for other in also:
        trainer.add_callback(other)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def lora(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))


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
    found = []
    for watch in (None, {"predict": 2}):
        model = new_model()
        model = wrap(model) if wrap else model
        trainer, callback = train(tmp_path / str(watch), tokenizer, watch, model, **options)
        found.append(weights(trainer))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
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
    assert [row["step"] for row in callback.rows] == [0]  # the first one is made in any case


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
    resumed, found = train(
        folder,
        tokenizer,
        {"every": 2},
        resume=str(folder / "checkpoint-4"),
        save_strategy="steps",
        save_steps=4,
    )
    assert [r["step"] for r in found.rows] == [0, 2, 4, 6]
    for a, b in zip(expected.rows, found.rows, strict=True):
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
    found = [r for r in trainer.state.log_history if "lddyn/log_prob/greeting" in r]
    assert [r["step"] for r in found] == [0, 1, 2]


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


def dpo(tmp_path, tokenizer, watch, peft_config=None, **options):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    transformers.set_seed(1)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "use_cpu": True,
    }
    trainer = trl.DPOTrainer(
        new_model(),
        None if peft_config else new_model(),
        trl.DPOConfig(str(tmp_path), **{**settings, **options}),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    callback = None
    if watch:
        from lddyn.integrations.trl import watch as watch_trainer

        callback = watch_trainer(trainer, budget=1e4, **watch)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("adapter", [False, True])
def test_dpo_is_watched_with_its_own_pairs(tmp_path, tokenizer, adapter):
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear") if adapter else None
    plain, _ = dpo(tmp_path / "a", tokenizer, None, config)
    trainer, callback = dpo(tmp_path / "b", tokenizer, {"predict": 2}, config)
    a, b = weights(plain), weights(trainer)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert [row["step"] for row in callback.rows] == [0, 1, 2, 3, 4]
    last = callback.rows[-1]
    assert {"log_prob/chosen", "log_prob/rejected", "log_prob/irr_train"} <= set(last)
    # TRL's own numbers of the last step are still there, and are of the same pairs.
    own = [r for r in trainer.state.log_history if "logps/chosen" in r]
    same = [r for r in plain.state.log_history if "logps/chosen" in r]
    assert [r["logps/chosen"] for r in own] == [r["logps/chosen"] for r in same]
    step, predicted = last["step/rejected"], last["first_order/rejected"]
    assert predicted == pytest.approx(step, rel=0.3)


def test_other_columns_need_probes(tokenizer):
    from lddyn.integrations.trl import pairs

    with pytest.raises(ValueError, match="got input_ids: give probes="):
        pairs([{"input_ids": [1]}])


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


def test_watched_again_is_watched_once(tmp_path, tokenizer):
    from lddyn.integrations.trl import watch

    trainer, _ = train(tmp_path, tokenizer, max_steps=1)
    probes = {"greeting": [lddyn.Example([3, 4], [5, 6])]}
    watch(trainer, probes)
    last = watch(trainer, probes)
    aside = watch(trainer, probes, folder=tmp_path / "aside")
    trainer.train()
    found = [c for c in trainer.callback_handler.callbacks if hasattr(c, "rows")]
    assert found == [last, aside]
    assert len((tmp_path / "lddyn" / "dynamics.jsonl").read_text().splitlines()) == len(last.rows)
    assert last.rows and aside.rows


def test_a_resumed_run_does_not_mix_probes(tmp_path, tokenizer):
    options = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, tokenizer, {"every": 2}, **options)
    others = lddyn.probes.probe_set.ProbeSet(rows(8)[4:])
    _, found = train(
        tmp_path,
        tokenizer,
        {"every": 2, "probes": others},
        resume=str(tmp_path / "checkpoint-4"),
        **options,
    )
    assert [row["step"] for row in found.rows] == [4, 6]
    assert found.rows[0]["change/chosen"] == 0
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


def test_the_one_line_of_the_docs_works_in_a_fresh_interpreter(tmp_path):
    """`import lddyn; lddyn.integrations.trl.watch`, with nothing imported before."""
    code = (
        "import lddyn; print(lddyn.integrations.trl.watch.__name__, lddyn.integrations.loop.Watch)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(lddyn.__file__).parents[1])},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("watch <class 'lddyn.integrations.loop.Watch'>")


def test_pairs_are_cut_as_the_collator_cuts():
    from lddyn.integrations.trl import pairs

    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [7]}
    start = pairs([row], max_length=5)
    assert start["chosen"] == [lddyn.Example([1, 2, 3], [4, 5], name="chosen")]
    assert start["rejected"] == [lddyn.Example([1, 2, 3], [7], name="rejected")]
    assert "irr_train" not in start  # there is no other row
    end = pairs([row], max_length=5, truncation_mode="keep_end")
    assert end["chosen"] == [lddyn.Example([2, 3], [4, 5, 6], name="chosen")]
    assert pairs([row], max_length=3) == {}
    with pytest.raises(ValueError, match="streamed"):
        pairs(iter([row]))
    with pytest.raises(ValueError, match="empty"):
        pairs([])


def test_probes_are_not_compiled(tmp_path, tokenizer):
    found = []
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
        found.append((compiled, weights(trainer)))
    torch._dynamo.reset()
    assert [row["step"] for row in callback.rows] == [0, 1, 2]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


def test_sft_is_watched(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows()]
    found = []
    for watched in (False, True):
        transformers.set_seed(1)
        trainer = trl.SFTTrainer(
            new_model(),
            trl.SFTConfig(
                str(tmp_path / str(watched)),
                max_steps=4,
                per_device_train_batch_size=4,
                logging_steps=1,
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                learning_rate=1e-2,
                use_cpu=True,
                packing=False,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        if watched:
            from lddyn.integrations.trl import watch

            probes = lddyn.probes.probe_set.ProbeSet(rows(4))
            callback = watch(trainer, probes, budget=1e4, predict=1)
        trainer.train()
        own = [r["loss"] for r in trainer.state.log_history if "loss" in r]
        found.append((weights(trainer), own))
    (a, plain), (b, own) = found
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert len(own) == 4 and own == plain
    assert [row["step"] for row in callback.rows] == [0, 1, 2, 3, 4]
    assert callback.rows[-1]["change/chosen"] > 0


# ----- loops without a trainer


def looped(folder=None, steps=4, model=None, optimizer=None, start=0, **options):
    """Weights, and what was watched, of a loop over one batch with momentum."""
    model = new_model(dropout=0.1) if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(5)
    ids = torch.randint(3, 63, (4, 6))
    watch = contextlib.nullcontext()
    if folder is not None:
        given = {"probes": {"greeting": [lddyn.Example([3, 4], [5, 6])]}, "budget": 1e4}
        watch = Watch(model, optimizer, folder=folder, step=start, **{**given, **options})
    with watch:
        for _ in range(start, steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], watch


def test_a_plain_loop_is_watched(tmp_path, tokenizer):
    logged = []
    plain, _ = looped()
    watched, watch = looped(
        tmp_path,
        probes=lddyn.probes.probe_set.ProbeSet(rows(4)),
        tokenizer=tokenizer,
        predict=2,
        every=2,
        log=lambda values, step: logged.append((step, values)),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert [row["step"] for row in watch.rows] == [step for step, _ in logged] == [0, 2, 4]
    last = watch.rows[-1]
    assert last["first_order/chosen"] == pytest.approx(last["step/chosen"], rel=0.5)
    assert logged[-1][1]["lddyn/change/chosen"] == last["change/chosen"]
    model = watch.model.eval()
    probes = watch.probes.encode(tokenizer)
    example = probes.examples[0]
    logits = model(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
    value = logits[list(example.positions), list(example.targets)].sum().item()
    lines = (tmp_path / "dynamics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["each"][0] == pytest.approx(value, abs=1e-3)


def test_a_loop_under_autocast_is_watched_without(tmp_path):
    _, plain = looped(tmp_path / "a", steps=0)
    with torch.autocast("cpu", torch.bfloat16):
        _, watch = looped(tmp_path / "b", steps=0, model=torch.compile(new_model(dropout=0.1)))
    assert watch.rows == plain.rows and [row["step"] for row in watch.rows] == [0]


def test_a_loop_goes_on_after_a_checkpoint(tmp_path):
    model = new_model(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, first = looped(tmp_path, 2, model, optimizer)
    other = Watch(model, optimizer, first.probes, folder=tmp_path, budget=1e4)
    other.load_state_dict(first.state_dict())
    assert other.step == 2
    _, second = looped(tmp_path, 4, model, optimizer, start=other.step)
    assert [row["step"] for row in second.rows] == [0, 1, 2, 3, 4]
    _, third = looped(tmp_path, 1, model, optimizer)  # another run begins anew
    assert [row["step"] for row in third.rows] == [0, 1]
    assert len((tmp_path / "dynamics-1.jsonl").read_text().splitlines()) == 5


def test_a_loop_goes_on_after_an_error(tmp_path, monkeypatch):
    plain, _ = looped()
    monkeypatch.setattr("lddyn.integrations.watcher.measure", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"stopped watching \(begin\): ZeroDivisionError"):
        watched, watch = looped(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert watch.rows == [] and watch.step == 4


def test_an_error_of_the_loop_is_raised_and_leaves_no_hook(tmp_path):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probes = {"greeting": [lddyn.Example([3, 4], [5, 6])]}
    with pytest.raises(KeyError), Watch(model, optimizer, probes, folder=tmp_path, budget=1e4):
        raise KeyError("of the loop")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got NoneType"):
        Watch(model, None, probes, folder=tmp_path)


def test_accelerate_counts_true_steps(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()  # of the trainers above
    found = []
    for watched in (False, True):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = new_model(dropout=0.0)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
        watch = Watch(
            model,
            optimizer,
            {"greeting": [lddyn.Example([3, 4], [5, 6])]},
            folder=tmp_path,
            budget=1e4,
        )
        accelerator.register_for_checkpointing(watch)
        torch.manual_seed(2)
        with watch if watched else contextlib.nullcontext():
            for _ in range(6):
                ids = torch.randint(3, 63, (2, 6))
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=ids, labels=ids).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [row["step"] for row in watch.rows] == [0, 1, 2, 3]
    accelerator.save_state(str(tmp_path / "checkpoint"))
    watch.load_state_dict({"step": 0})
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert watch.step == 3


@pytest.mark.slow
def test_two_processes_are_watched(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("two_processes.py"), tmp_path],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            said = process.communicate(timeout=120)[1]
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for way in ("ddp", "accelerated", "fsdp1", "fsdp2"):
        assert first[way]["equal"] and second[way]["equal"]
    for way in ("ddp", "accelerated", "fsdp2"):
        assert [row["step"] for row in first[way]["rows"]] == [0, 2, 4]
        lines = (tmp_path / way / "dynamics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    # The same model on the same data, however its parameters lie.
    for a, b in zip(first["ddp"]["rows"], first["fsdp2"]["rows"], strict=True):
        assert a["log_prob/one"] == pytest.approx(b["log_prob/one"], abs=1e-4)
    assert "first_order/one" in first["ddp"]["rows"][-1]
    assert "first_order/one" not in first["fsdp2"]["rows"][-1]
    assert "leaves out predict=1" in first["fsdp2"]["said"][0]
    assert second["ddp"]["rows"] == [] and len(second["fsdp2"]["rows"]) == 3
    assert "FSDP 1), expected whole parameters" in first["fsdp1"]["said"][0]
    assert first["fsdp1"]["rows"] == []
    assert first["failed"]["equal"] and second["failed"]["equal"]
    assert first["failed"]["rows"] == second["failed"]["rows"] == []
    assert "no/such/file.jsonl" in second["failed"]["said"][0]
