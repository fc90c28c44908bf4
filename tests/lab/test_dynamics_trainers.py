"""The laboratory's loop takes the steps that transformers' Trainer and TRL's DPOTrainer take.

In the same order of the same rows, with the same optimizer, warm-up and clipping. What differs is
rounding: the loop takes the log-probs of counted tokens only, and TRL's head sums in chunks.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import lddyn
from lddyn.demo import world as demo
from lddyn.engine.gradient import gradient
from lddyn.lab.training import Preferring, Supervised, train
from lddyn.optimizers import make_optimizer

transformers = pytest.importorskip("transformers")
STEPS, BATCH, WARMUP, CLIP = 4, 2, 2, 1.0  # which every gradient here exceeds


@pytest.fixture(scope="module")
def world(small_worlds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield demo.build_world(small_worlds, progress=False)
    torch.set_num_threads(threads)


def settings(folder):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "remove_unused_columns": False,
        "logging_strategy": "no",
    }


def optimizers(model, name, lr):
    """The optimizer and the warm-up of `training.train`."""
    optimizer = make_optimizer(name, model.parameters(), lr)
    warmed = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARMUP + 1))
    )
    return optimizer, warmed


def ours(model, rows, loss, name, lr, reference=None):
    batches = [
        {term: [row[term] for row in rows[i : i + BATCH]] for term in loss.terms}
        for i in range(0, STEPS * BATCH, BATCH)
    ]
    train(
        model,
        batches,
        loss,
        make_optimizer(name, model.parameters(), lr),
        reference=reference,
        warmup=WARMUP,
        max_grad_norm=CLIP,
    )


def disagreement(one, other, start):
    """‖θ − θ'‖ over how far training moved θ."""
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (one, other, start)]
    return float((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm())


@pytest.mark.parametrize(("name", "lr"), [("sgd", 1e-3), ("rmsprop", 5e-5)])
def test_sft_is_that_of_transformers(world, tmp_path, name, lr):
    rows = [
        {"chosen": lddyn.encode(world.tokenizer, row["prompt"], row["chosen"])}
        for row in world.preference_pairs[: STEPS * BATCH]
    ]

    def collate(examples):
        longest = max(e.length for e in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, e in enumerate(examples):
            ids[row, : e.length] = torch.tensor(e.ids)
            first = len(e.prompt_ids)
            labels[row, first : e.length] = torch.tensor(e.response_ids)
        return {"input_ids": ids, "attention_mask": (ids >= 0).long(), "labels": labels}

    def loss(outputs, labels, **_):
        """Eq. 4 of the paper: the sum over tokens, the mean over the batch."""
        flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return cross_entropy(*flat, reduction="sum") / len(labels)

    theirs, mine = copy.deepcopy(world.model), copy.deepcopy(world.model)
    trainer = transformers.Trainer(
        theirs,
        transformers.TrainingArguments(**settings(tmp_path)),
        collate,
        [row["chosen"] for row in rows],
        optimizers=optimizers(theirs, name, lr),
        compute_loss_func=loss,
    )
    trainer.train()
    ours(mine, rows, Supervised(), name, lr)
    assert disagreement(mine, theirs, world.model) < 1e-6  # where this was written, 0
    other = copy.deepcopy(world.model)
    ours(other, rows[::-1], Supervised(), name, lr)
    assert disagreement(other, theirs, world.model) > 1e-2


@pytest.mark.parametrize(("name", "lr"), [("sgd", 1e-2), ("rmsprop", 2e-5)])
def test_dpo_is_that_of_trl(world, tmp_path, name, lr):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = [
        {k: row[k] for k in ("prompt", "chosen", "rejected")}
        for row in world.preference_pairs[: STEPS * BATCH]
    ]
    theirs, mine = copy.deepcopy(world.model), copy.deepcopy(world.model)
    arguments = {**settings(tmp_path), "remove_unused_columns": True}
    trainer = trl.DPOTrainer(
        theirs,
        copy.deepcopy(world.model),
        trl.DPOConfig(beta=0.1, **arguments),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=world.tokenizer,
        optimizers=optimizers(theirs, name, lr),
    )
    rows = [
        {
            term: lddyn.Example(row["prompt_ids"], row[f"{term}_ids"])
            for term in ("chosen", "rejected")
        }
        for row in trainer.train_dataset
    ]
    trainer.train()
    ours(mine, rows, Preferring(), name, lr, reference=world.model)
    assert disagreement(mine, theirs, world.model) < 1e-4  # where this was written, 1e-5


def gradient_of(trainer):
    """Loss of the trainer's first batch, and its gradient, flat."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    parts = torch.autograd.grad(loss, list(trainer.model.parameters()))
    return float(loss.detach()), torch.cat([g.flatten() for g in parts])


def gradient_by(model, update):
    """Loss of an objective of lddyn, and its gradient, flat."""
    anatomy = lddyn.Anatomy(model)
    update = update.prepare(anatomy)
    loss, weights = update.weights(lddyn.token_log_probs(model, update.examples))
    parts = gradient(anatomy, update.examples, weights)
    return loss, torch.cat([g.flatten() for g in parts.values()])


def close(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert float((one[1] - other[1]).norm()) < 1e-4 * float(other[1].norm())


def test_a_batch_of_dpo_is_that_of_trl(world, tmp_path):
    """lddyn.DPO on several pairs is the loss of DPOTrainer: the mean over pairs."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = [
        {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in world.preference_pairs[:3]
    ]
    reference = copy.deepcopy(world.model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    arguments = {**settings(tmp_path), "remove_unused_columns": True}
    arguments["per_device_train_batch_size"] = 3
    trainer = trl.DPOTrainer(
        copy.deepcopy(world.model),
        copy.deepcopy(reference),
        trl.DPOConfig(beta=0.3, **arguments),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=world.tokenizer,
    )
    chosen, rejected = (
        [lddyn.Example(row["prompt_ids"], row[f"{term}_ids"]) for row in trainer.train_dataset]
        for term in ("chosen", "rejected")
    )
    update = lddyn.DPO(chosen, rejected, 0.3, reference)
    close(gradient_by(world.model, update), gradient_of(trainer))


def test_a_batch_of_sft_is_that_of_trl(world, tmp_path):
    """lddyn.SFT on several examples is the loss of SFTTrainer: the mean over counted tokens."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    texts = [
        {"prompt": row["prompt"], "completion": row["chosen"]} for row in world.preference_pairs[:3]
    ]
    arguments = {**settings(tmp_path), "remove_unused_columns": True}
    arguments["per_device_train_batch_size"] = 3
    trainer = trl.SFTTrainer(
        copy.deepcopy(world.model),
        trl.SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=world.tokenizer,
    )
    examples = []
    for row in trainer.train_dataset:
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)
        examples.append(lddyn.Example(row["input_ids"][:first], row["input_ids"][first:]))
    assert len({len(e) for e in examples}) > 1  # else a mean over examples would be the same
    close(gradient_by(world.model, lddyn.SFT(examples)), gradient_of(trainer))
