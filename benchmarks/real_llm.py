"""A DPO run of a real LLM: predicted first, then made, and what both cost.

    python benchmarks/real_llm.py MODEL PAIRS.jsonl --name lora-12 --out benchmarks/results/FILE

The rows are pairs in any format that lddyn reads, or HH's dialogues (`prompt` of turns "Human: …",
"Assistant: …"); all go through the model's chat template. The training is a plain loop of AdamW
with a linear schedule and clipping to norm 1; its log-probs of the start are the reference.
Processor seconds of both are of one process; an epoch of training is counted with the forward
passes of a reference model.

`--sft-epochs` first finetunes on the chosen responses: DPO then starts where they are likely, and
makes them fall.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from record import provenance, record
from torch import Tensor, nn

import lddyn
from lddyn.stats import spearman

BETA = 0.1
SFT_BATCH = 6

Pair = tuple[lddyn.Example, lddyn.Example]


def read(
    path: Path, tokenizer: Any, count: int, longest: int, skip: int, cut: int | None
) -> list[Pair]:
    """The first pairs after some rows whose parts have at most so many tokens, or are cut."""
    pairs: list[Pair] = []
    for row in lddyn.rows(path)[skip:]:
        one, other = encoded(row, tokenizer)
        if cut is not None:
            one, other = (
                lddyn.Example(e.prompt_ids[-cut:], e.response_ids[:cut]) for e in (one, other)
            )
        fits = all(5 < len(e.response_ids) <= longest for e in (one, other))
        if fits and len(one.prompt_ids) <= longest and one != other:
            pairs.append((one, other))
        if len(pairs) == count:
            break
    return pairs


def encoded(row: dict[str, Any], tokenizer: Any) -> Pair:
    """Both sides of a row; a dialogue of HH by the chat template without its last line break."""
    dialogue = row.get("prompt")
    if not (isinstance(dialogue, str) and dialogue.lstrip().startswith("Human:")):
        examples = lddyn.encode_row(tokenizer, row, SIDES)
        return examples["chosen"], examples["rejected"]
    prompt = tokenizer.apply_chat_template(
        messages(dialogue), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    one, other = (tokenizer(row[k].strip() + "<|im_end|>")["input_ids"] for k in SIDES)
    return lddyn.Example(prompt, one), lddyn.Example(prompt, other)


SIDES = ("chosen", "rejected")


def messages(prompt: str) -> list[dict[str, str]]:
    """A dialogue of HH as messages; an empty turn of the assistant at its end is left out."""
    turns: list[dict[str, str]] = []
    for turn in prompt.strip().split("\n\n"):
        speaker, _, text = turn.partition(":")
        role = {"Human": "user", "Assistant": "assistant"}.get(speaker)
        if role is None:
            turns[-1]["content"] += "\n\n" + turn
        elif text.strip():
            turns.append({"role": role, "content": text.strip()})
    return turns


def log_prob(model: nn.Module, example: lddyn.Example) -> Tensor:
    """Log π(y | x), nats."""
    ids, n = torch.tensor([example.ids]), len(example.response_ids)
    logits = model(input_ids=ids).logits[0].float().log_softmax(-1)[-n - 1 : -1]
    return logits.gather(1, ids[0, -n:, None]).sum()


def log_probs(model: nn.Module, pairs: list[Pair]) -> Tensor:
    """Log π of all responses (2, N), nats."""
    with torch.no_grad():
        return torch.tensor(
            [[float(log_prob(model, p[side])) for p in pairs] for side in (0, 1)]
        ).double()


def finetune(model: nn.Module, pairs: list[Pair], epochs: int, lr: float, seed: int) -> None:
    """SFT on the chosen responses: the mean over a batch of each response's mean over tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(pairs), generator=generator).split(SFT_BATCH):
            optimizer.zero_grad()
            for i in batch.tolist():
                chosen = pairs[i][0]
                (-log_prob(model, chosen) / len(chosen.response_ids) / len(batch)).backward()
            optimizer.step()


def train(model: nn.Module, pairs: list[Pair], run: lddyn.Run, before: Tensor) -> None:
    """The run."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay)
    batches = run.batches(range(len(pairs)))
    rates = run.rates(len(batches))
    for rate, (batch, _) in zip(rates, batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for i in batch.tolist():
            gains = [log_prob(model, pairs[i][s]) - float(before[s, i]) for s in (0, 1)]
            loss = -torch.nn.functional.logsigmoid(BETA * (gains[0] - gains[1])) / len(batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm or 1e9)
        optimizer.step()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--name", required=True, help="section of the results file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--longest", type=int, default=100, help="tokens of a prompt or response")
    parser.add_argument("--full", action="store_true", help="all weights; default: LoRA, rank 8")
    parser.add_argument("--cut", type=int, help="tokens that are kept of a prompt or response")
    parser.add_argument("--skip", type=int, default=0, help="rows of the file to leave out first")
    parser.add_argument("--seed", type=int, default=0, help="of adapters and of orders of pairs")
    parser.add_argument("--batch", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--sft-epochs", type=int, default=0, help="on the chosen responses, before")
    parser.add_argument("--sft-lr", type=float, default=1e-3, help="learning rate of that SFT")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--refresh", type=int, nargs="+", default=[2], help="segments")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="rank by a step alone; the epoch is estimated from one on N of the pairs",
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if not args.full:
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    model.eval()
    pairs = read(args.pairs, tokenizer, args.count, args.longest, args.skip, args.cut)
    run = lddyn.Run(
        lr=args.lr,
        epochs=args.epochs,
        batch=args.batch,
        schedule="linear",
        max_grad_norm=1.0,
        seed=args.seed,
    )
    finetune(model, pairs, args.sft_epochs, args.sft_lr, args.seed)
    if args.rank:
        rank(model, pairs, run, args)
        return
    held, made = peak(), []
    for segments in args.refresh:
        start = time.process_time()
        diagnosis = lddyn.diagnose(
            model,
            pairs,
            beta=BETA,
            run=run,
            refresh=segments,
            memory=args.memory,
            close_ups=0,
            progress=True,
        )
        made.append((segments, diagnosis, time.process_time() - start, peak() - held))
    before, start = log_probs(model, pairs), time.process_time()
    train(model, pairs, run, before)
    # A reference's forward passes cost a third of the forward and backward passes that were made.
    epoch = 4 / 3 * (time.process_time() - start) / args.epochs
    measured = log_probs(model, pairs) - before
    facts = {
        **provenance(),
        "pairs": len(pairs),
        "tokens": sum(e.length for pair in pairs for e in pair),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "run": repr(run),
        "sft_epochs": args.sft_epochs,
        "sft_lr": args.sft_lr,
        "measured": measured.mean(1).tolist(),
    }
    for segments, diagnosis, diagnosed, grown in made:
        told = diagnosis.forecast.change
        result = facts | {
            "refresh": segments,
            "exact": diagnosis.stderr is None,
            "rho": [spearman(a, b) for a, b in zip(told, measured, strict=True)],
            "predicted": told.mean(1).tolist(),
            "falls": [int((x[0] < 0).sum()) for x in (told, measured)],
            "epochs_of_training": diagnosed / epoch,
            "cpu_seconds": {"diagnose": diagnosed, "epoch": epoch},
            "gib_beyond_the_model": grown,
        }
        record(args.out, args.name + (f", {segments} segments" if segments != 2 else ""), result)
        print(json.dumps(result, indent=1))


def rank(model: nn.Module, pairs: list[Pair], run: lddyn.Run, args: Any) -> None:
    """What ranking pairs by a step costs, without a run."""
    held, start = peak(), time.process_time()
    diagnosis = lddyn.diagnose(
        model, pairs, beta=BETA, memory=args.memory, close_ups=0, progress=True
    )
    diagnosed, grown = time.process_time() - start, peak() - held
    some = pairs[: args.rank]
    before, start = log_probs(model, some), time.process_time()
    train(model, some, replace(run, epochs=1), before)
    part = sum(e.length for p in some for e in p) / sum(e.length for p in pairs for e in p)
    epoch = 4 / 3 * (time.process_time() - start) / part
    result = {
        **provenance(),
        "pairs": len(pairs),
        "tokens": sum(e.length for pair in pairs for e in pair),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "exact": diagnosis.stderr is None,
        "epochs_of_training": diagnosed / epoch,
        "cpu_seconds": {"diagnose": diagnosed, "epoch": epoch},
        "gib_beyond_the_model": grown,
        "gib_in_all": held + grown,
    }
    record(args.out, args.name, result)
    print(json.dumps(result, indent=1))


def peak() -> float:
    """The most resident memory so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
