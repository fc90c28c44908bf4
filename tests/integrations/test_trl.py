"""Watching TRL's trainers with one line, with probes from their own data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from watched_runs import new_model, rows, train, weights

import lddyn


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


@pytest.mark.case("a run of TRL's DPOTrainer is predicted from the trainer alone")
def test_a_run_of_the_trainer_is_predicted(tmp_path, tokenizer):
    options = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "learning_rate": 3e-4,
    }
    transformers.set_seed(1)
    start = new_model()
    trainer, _ = dpo(tmp_path, tokenizer, None, **options)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        tuple(lddyn.Example(prompt, side) for side in sides)
        for prompt, *sides in zip(*(trainer.train_dataset[c] for c in columns), strict=True)
    ]
    run = lddyn.Run.like(trainer)
    forecast = lddyn.diagnose(start, pairs, like=trainer.args, run=run, close_ups=0).forecast
    assert len(forecast.path) == 1 + trainer.state.global_step
    ends = [lddyn.diagnose(m, pairs, close_ups=0).log_probs for m in (start, trainer.model)]
    measured = ends[1] - ends[0]
    assert float((forecast.change - measured).norm() / measured.norm()) < 0.15


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


def test_sft_is_watched(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows()]
    runs = []
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
        runs.append((weights(trainer), own))
    (a, plain), (b, own) = runs
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert len(own) == 4 and own == plain
    assert [row["step"] for row in callback.rows] == [0, 1, 2, 3, 4]
    assert callback.rows[-1]["change/chosen"] > 0


def test_watched_again_is_watched_once(tmp_path, tokenizer):
    from lddyn.integrations.trl import watch

    trainer, _ = train(tmp_path, tokenizer, max_steps=1)
    probes = {"greeting": [lddyn.Example([3, 4], [5, 6])]}
    watch(trainer, probes)
    last = watch(trainer, probes)
    aside = watch(trainer, probes, folder=tmp_path / "aside")
    trainer.train()
    ours = [c for c in trainer.callback_handler.callbacks if hasattr(c, "rows")]
    assert ours == [last, aside]
    assert len((tmp_path / "lddyn" / "dynamics.jsonl").read_text().splitlines()) == len(last.rows)
    assert last.rows and aside.rows


def test_other_columns_need_probes(tokenizer):
    from lddyn.integrations.trl import pairs

    with pytest.raises(ValueError, match="got input_ids: give probes="):
        pairs([{"input_ids": [1]}])


def test_pairs_are_cut_as_the_collator_cuts():
    from lddyn.integrations.trl import pairs

    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [7]}
    start = pairs([row], options=lddyn.RowOptions(max_length=5))
    assert start["chosen"] == [lddyn.Example([1, 2, 3], [4, 5], name="chosen")]
    assert start["rejected"] == [lddyn.Example([1, 2, 3], [7], name="rejected")]
    assert "irr_train" not in start  # there is no other row
    end = pairs([row], options=lddyn.RowOptions(max_length=5, truncation_mode="keep_end"))
    assert end["chosen"] == [lddyn.Example([2, 3], [4, 5, 6], name="chosen")]
    assert pairs([row], options=lddyn.RowOptions(max_length=3)) == {}
    with pytest.raises(ValueError, match="streamed"):
        pairs(iter([row]))
    with pytest.raises(ValueError, match="empty"):
        pairs([])


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
