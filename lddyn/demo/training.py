"""The demo's tiny Llama: its tokenizer, its random start, and its training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lddyn.data.example import Example
from lddyn.memory import cpu_threads

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["ARCHITECTURE", "PRETRAINING", "SFT", "Recipe", "new_model", "train", "train_tokenizer"]

VOCABULARY = 1024

ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

_EOS = "<|endoftext|>"
_PAD = "<|pad|>"


@dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Sequences in a batch.
        lr: Largest learning rate of AdamW.
        warmup: Steps over which the learning rate rises; then it falls linearly to 2 % of `lr`.
        weight_decay: Of AdamW.
    """

    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a multiple of `lr`."""
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        return min((step + 1) / self.warmup, max(0.02, left))


PRETRAINING = Recipe(steps=500, batch=16, lr=3e-3, warmup=20, weight_decay=0.01)

SFT = Recipe(steps=100, batch=16, lr=3e-4, warmup=5, weight_decay=0.0)


def train_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus, with 1,024 tokens; padding is not EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_EOS, _PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_EOS, pad_token=_PAD)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with seeded random weights; the caller's random state stays as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def train(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    recipe: Recipe,
    seed: int,
    *,
    prompts_too: bool,
    title: str,
    progress: bool,
) -> float:
    """Trains a model in place, on one thread: the same weights whatever the number of cores.

    Args:
        model: The model.
        examples: What it learns.
        recipe: How.
        seed: Seed of the order of examples.
        prompts_too: Learn every token but the first; else the response tokens alone.
        title: Of the progress bar.
        progress: Show it.

    Returns:
        The mean loss of the last 20 steps, nats per token.
    """
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor)
    batches = _batches(examples, recipe.batch, recipe.steps, random.Random(seed))
    losses: list[float] = []
    model.train()
    # Products this small: on a busy machine one thread is many times faster than several that wait
    # for each other in every product.
    with cpu_threads(1):
        bar = tqdm(
            batches,
            total=recipe.steps,
            desc=title,
            mininterval=0.5,
            disable=None if progress else True,
            leave=False,
        )
        for batch in bar:
            loss = _loss(model, batch, prompts_too)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    optimizer.zero_grad()
    last = losses[-20:]
    return sum(last) / len(last)


def _loss(model: LlamaForCausalLM, batch: Sequence[Example], prompts_too: bool) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens of a batch."""
    longest = max(example.length for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for row, example in enumerate(batch):
        ids[row, : example.length] = torch.tensor(example.ids)
        first = 1 if prompts_too else len(example.prompt_ids)
        labels[row, first : example.length] = torch.tensor(example.ids[first:])
    # Padding is on the right: under a causal mask no learned token attends to it.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def _batches(
    examples: Sequence[Example], size: int, steps: int, rng: random.Random
) -> Iterator[list[Example]]:
    """Yields batches of examples of similar length, epoch after epoch."""
    done = 0
    while True:
        order = list(examples)
        rng.shuffle(order)
        groups = []
        for start in range(0, len(order), size * 16):  # sorted within a window: little padding
            window = sorted(order[start : start + size * 16], key=lambda example: example.length)
            groups += [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(groups)
        for group in groups:
            if done == steps:
                return
            done += 1
            yield group
