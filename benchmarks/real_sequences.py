"""An SFT run of a real LLM by TRL: predicted first, then made; trained and observed responses.

    python benchmarks/real_sequences.py MODEL PAIRS.jsonl --name NAME --out benchmarks/results/FILE

The rows have `prompt` (turns "Human: …", "Assistant: …"), `chosen` and `rejected`; they go through
the model's chat template. Trained are the chosen responses of some rows, by TRL's SFTTrainer;
observed are the chosen and rejected responses of other rows. The run that is predicted is read from
the trainer. Processor seconds of both are of one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import Dataset
from real_llm import log_prob, peak, read
from record import provenance, record
from torch import Tensor, nn

import lddyn
from lddyn.stats import spearman


def log_probs(model: nn.Module, examples: list[lddyn.Example]) -> Tensor:
    """Log π of responses (n,), nats."""
    model.eval()
    with torch.no_grad():
        return torch.tensor([float(log_prob(model, e)) for e in examples]).double()


def trainer_of(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: list[lddyn.Example],
    args: argparse.Namespace,
    folder: str,
) -> trl.SFTTrainer:
    """TRL's trainer on these examples, in their own tokens."""
    rows = [
        {
            "input_ids": list(e.ids),
            "completion_mask": [0] * len(e.prompt_ids) + [1] * len(e.response_ids),
        }
        for e in examples
    ]
    config = trl.SFTConfig(
        folder,
        learning_rate=args.lr,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        seed=args.seed,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        max_length=None,
    )
    return trl.SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--name", required=True, help="section of the results file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--observed", type=int, default=12, help="rows that are observed")
    parser.add_argument("--longest", type=int, default=100, help="tokens of a prompt or response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--memory", default="4GiB")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    pairs = read(args.pairs, tokenizer, args.count + args.observed, args.longest, 0, None)
    examples = [chosen for chosen, _ in pairs[: args.count]]
    others = [pair[side] for side in (0, 1) for pair in pairs[args.count :]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, tokenizer, examples, args, folder)
        run = lddyn.Run.like(trainer)
        held, start = peak(), time.process_time()
        diagnosis = lddyn.diagnose(
            model, examples, "sft", observe=others, run=run, memory=args.memory, progress=True
        )
        diagnosed, grown = time.process_time() - start, peak() - held
        every = [*examples, *others]
        before, start = log_probs(model, every), time.process_time()
        trainer.train()
        epoch = (time.process_time() - start) / args.epochs
    measured = log_probs(model, every) - before
    forecast = diagnosis.forecast
    assert forecast is not None and forecast.observed is not None
    told = [forecast.change[0], forecast.observed]
    real = list(measured.split([len(examples), len(others)]))
    print(diagnosis.explain())
    result = {
        **provenance(),
        "sequences": len(examples),
        "observed": len(others),
        "tokens": sum(e.length for e in examples),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trl": trl.__version__,
        "run": repr(run),
        "rho": [spearman(a, b) for a, b in zip(told, real, strict=True)],
        "predicted": [float(x.mean()) for x in told],
        "measured": [float(x.mean()) for x in real],
        "falls": [[int((x < 0).sum()) for x in pair] for pair in zip(told, real, strict=True)],
        "epochs_of_training": diagnosed / epoch,
        "cpu_seconds": {"diagnose": diagnosed, "epoch": epoch},
        "gib_beyond_the_model": grown,
    }
    record(args.out, args.name, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
