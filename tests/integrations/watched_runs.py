"""A tiny model, its data, and short runs of a trainer, watched or not."""

import torch
import transformers
from transformers import Trainer, TrainingArguments

import lddyn
from lddyn.integrations.trainer import LearningDynamicsCallback

WORDS = [f"w{i}" for i in range(60)]


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
