"""What the benchmarks that train on preference pairs share: command line, data, finetuning."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

import lddyn
from lddyn.data.read import rows
from lddyn.engine.logits import sequence_log_probs
from lddyn.objectives.losses import Pairs as Scores

if TYPE_CHECKING:
    import trl
    from transformers import PreTrainedTokenizerBase

Pairs = list[tuple[lddyn.Example, lddyn.Example]]
PairLoss = Callable[[Scores], Tensor]

BATCH = 8  # pairs of one update
# What TRL's trainers are told in every benchmark.
QUIET = {
    "per_device_train_batch_size": BATCH,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}


def arguments(description: str, *, folder: str = "") -> argparse.ArgumentParser:
    """A parser with MODEL, PAIRS and --out, and with --folder if `folder` says what it keeps."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model", help="name or folder of a causal LM of transformers")
    parser.add_argument("pairs", help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--out", required=True, help="results file; gets a section of its own")
    if folder:
        parser.add_argument("--folder", required=True, type=Path, help=folder)
    return parser


def load(name: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
    return model, transformers.AutoTokenizer.from_pretrained(name)


def encoded_rows(
    path: str, tokenizer: PreTrainedTokenizerBase, longest: int, skip: int = 0
) -> Iterator[tuple[dict[str, str], tuple[lddyn.Example, lddyn.Example]]]:
    """(row, (y+, y−)) of all rows after the first `skip` without an empty or a long response.

    Long: prompt and response have more than `longest` tokens together.
    """
    for number, row in enumerate(rows(path)):
        if number < skip:
            continue
        texts = {k: row[k] for k in ("prompt", "chosen", "rejected")}
        try:
            pair = lddyn.encode_row(tokenizer, texts)
        except ValueError:  # an empty response
            continue
        if max(e.length for e in pair.values()) <= longest:
            yield texts, (pair["chosen"], pair["rejected"])


def read(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    longest: int,
    but: Pairs | None = None,
) -> Pairs:
    """The first `count` pairs of at most `longest` tokens whose y+ is not one of `but`."""
    others = {chosen.content_id for chosen, _ in but or []}
    pairs: Pairs = []
    for _, pair in encoded_rows(path, tokenizer, longest):
        if len(pairs) == count:
            break
        if pair[0].content_id not in others:
            pairs.append(pair)
    return pairs


def finetune(
    model: nn.Module,
    pairs: Pairs,
    epochs: int,
    rate: float,
    seed: int,
    loss: PairLoss | None = None,
    weights: Tensor | None = None,
    reference: Tensor | None = None,
) -> None:
    """Trains by AdamW, in place.

    Args:
        model: A causal LM.
        pairs: What it learns from.
        epochs: Passes over the pairs, each in a random order.
        rate: Learning rate.
        seed: Of the orders.
        loss: A loss of pairs. None: the mean of −log π(y+) per token.
        weights: (N,), one per pair. None: 1 each.
        reference: log π_ref, (2, N) nats. None: 0.
    """
    weights = torch.ones(len(pairs)) if weights is None else weights
    reference = torch.zeros(2, len(pairs)) if reference is None else reference
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    chosen, rejected = ([p[side] for p in pairs] for side in (0, 1))
    lengths = torch.tensor([[len(e) for e in side] for side in (chosen, rejected)])
    for _ in range(epochs):
        for part in torch.randperm(len(pairs), generator=generator).split(BATCH):
            up = sequence_log_probs(model, [chosen[i] for i in part])
            if loss is None:
                total = -up.sum() / lengths[0, part].sum()
            else:
                both = torch.stack([up, sequence_log_probs(model, [rejected[i] for i in part])])
                scores = Scores.of(both, reference[:, part], lengths[:, part])
                total = (weights[part] * loss(scores)).mean()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()


def dpo_trainer(
    start: str | Path, folder: str | Path, data: list[dict[str, str]], **config: Any
) -> trl.DPOTrainer:
    """TRL's DPOTrainer on the CPU, quiet, with the model of `start` as policy and as reference.

    Args:
        start: Name or folder of the model.
        folder: Where the trainer writes.
        data: Rows with prompt, chosen and rejected.
        config: Arguments of DPOConfig.
    """
    import trl
    from datasets import Dataset

    transformers.set_seed(config.get("seed", 0))
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(start) for _ in range(2))
    return trl.DPOTrainer(
        policy,
        reference,
        trl.DPOConfig(str(folder), **{**QUIET, **config}),
        train_dataset=Dataset.from_list(data),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )
