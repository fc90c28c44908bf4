"""The demo's world: a small language, a model trained on it here, and preference pairs.

Nothing is downloaded. A seeded generator writes short question-and-answer dialogues about a few
dozen things with fixed facts; a BPE tokenizer and a tiny Llama are trained on them in well under a
minute on one core, and cached. The model's beliefs come from data, so finetuning it moves
log-probabilities as finetuning does.

Every question has a good answer, the same answer in other words, and answers to reject:

- `"near"`: the wording of the good answer with wrong facts, so that lowering it can lower the good
  answer, too,
- `"unhelpful"`: a polite refusal,
- `"unrelated"`: a good answer to another question.

The cache is in `LDDYN_CACHE_DIR`, or in the platform's cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.encode import encode
from lddyn.data.options import RowOptions
from lddyn.demo.cache import Trained, cache_root, load, save
from lddyn.demo.language import cut_text, make_corpus, make_items, make_preferences
from lddyn.demo.training import (
    ARCHITECTURE,
    PRETRAINING,
    SFT,
    VOCABULARY,
    Recipe,
    new_model,
    train,
    train_tokenizer,
)
from lddyn.engine.gradient import flat_gradient
from lddyn.engine.logits import own_response
from lddyn.files import JsonObject
from lddyn.memory import cpu_threads

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["PROBE_FIELDS", "World", "build_world", "falling_pair", "sft", "world_folder"]

PROBE_FIELDS = (
    "chosen",
    "chosen_gptsemantic",
    "chosen_gptformat",
    "rejected",
    "reject_gptsemantic",
    "reject_gptformat",
    "irr_train",
    "irr_test",
    "random_permute",
    "random_nonhum",
)

_VERSION = 2  # raise when the training code changes; facts, templates and settings are hashed


@dataclass(frozen=True)
class World:
    """A tokenizer, a model, and data to finetune it with.

    Attributes:
        model: A Llama of transformers in evaluation mode, float32, on the CPU.
        tokenizer: Its tokenizer; EOS is `<|endoftext|>`, padding is another token.
        sft_pairs: Rows {"prompt", "completion"}: the good answers.
        preference_pairs: Rows {"prompt", "chosen", "rejected", …} with all probing fields,
            `"kind"`: how `rejected` is wrong (`"near"`, `"unhelpful"`, `"unrelated"`), and
            `"topic"`.
        probe_fields: Names of the response columns of `preference_pairs`.
        seed: Seed of everything.
        stats: `"loss"` (nats per token, mean of the last steps), `"seconds"`, `"parameters"`,
            `"cached"`; after `sft` also `"sft_loss"` and `"sft_seconds"`.
        path: Folder where the model is cached. None: it is not.
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    sft_pairs: list[dict[str, str]]
    preference_pairs: list[dict[str, str]]
    probe_fields: tuple[str, ...] = PROBE_FIELDS
    seed: int = 0
    stats: JsonObject = field(default_factory=dict)
    path: Path | None = None

    def __repr__(self) -> str:
        size = self.stats.get("parameters", 0)
        return (
            f"World(a Llama of {size:,} parameters, {len(self.preference_pairs)} preference pairs, "
            f"seed {self.seed})"
        )

    def greedy(self, prompt: str, max_new_tokens: int = 48) -> str:
        """The answer to a prompt that takes the most probable token each time."""
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad(), cpu_threads(1):
            for _ in range(max_new_tokens):
                token = self.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                if token == self.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
        return str(self.tokenizer.decode(ids[0, start:]))


def build_world(
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    steps: int | None = None,
) -> World:
    """Builds the demo's world, or reads its model from the cache.

    Args:
        cache_dir: Folder of the cache. Default: `lddyn.demo.cache.cache_root()`.
        seed: Seed of facts, data, initial weights and batches.
        progress: Show a progress bar while training.
        steps: Pretraining steps. Default: 500, enough for sensible answers.

    Returns:
        The world, its model pretrained but not finetuned. The same seed gives the same weights
        on the same kind of machine, whatever its number of cores.

    Raises:
        ValueError: If steps is below 1.

    Cost: about half a minute of one core the first time; a second from the cache.
    """
    path = world_folder(cache_dir, seed, steps=steps)
    items = make_items(seed)
    trained, cached = load(path), True
    if trained is None:
        trained = _pretrain(make_corpus(items, seed), _recipe(steps), seed, progress)
        cached = save(path, trained)
        trained.stats["cached"] = False
    else:
        trained.stats["cached"] = True
    preferences = make_preferences(items, seed)
    return World(
        model=trained.model.eval(),
        tokenizer=trained.tokenizer,
        sft_pairs=[{"prompt": r["prompt"], "completion": r["chosen"]} for r in preferences],
        preference_pairs=preferences,
        seed=seed,
        stats=trained.stats,
        path=path if cached else None,
    )


def world_folder(
    cache_dir: str | os.PathLike[str] | None = None, seed: int = 0, *, steps: int | None = None
) -> Path:
    """The folder where `build_world` with these arguments caches its model.

    Its name contains a digest of everything that decides the weights.
    """
    corpus = make_corpus(make_items(seed), seed)
    content = [_VERSION, corpus, asdict(_recipe(steps)), ARCHITECTURE, VOCABULARY, seed]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return (Path(cache_dir) if cache_dir is not None else cache_root()) / f"demo-{digest}"


def _recipe(steps: int | None) -> Recipe:
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return replace(PRETRAINING, steps=steps or PRETRAINING.steps)


def _pretrain(corpus: Sequence[str], recipe: Recipe, seed: int, progress: bool) -> Trained:
    began = time.perf_counter()
    tokenizer = train_tokenizer(corpus)
    model = new_model(tokenizer, seed)
    bare = RowOptions(texts=False)
    examples = [encode(tokenizer, *cut_text(text), options=bare) for text in corpus]
    loss = train(
        model, examples, recipe, seed, prompts_too=True, title="pretraining", progress=progress
    )
    stats = {
        "loss": loss,
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return Trained(model, tokenizer, stats)


def sft(world: World, progress: bool = True, *, steps: int | None = None) -> World:
    """The world with a model that is finetuned on the good answers: where DPO starts.

    Args:
        world: As `build_world` returned it; its model is copied.
        progress: Show a progress bar.
        steps: Optimizer steps. Default: 100, a few seconds.
    """
    began = time.perf_counter()
    model = copy.deepcopy(world.model)
    examples = [encode(world.tokenizer, r["prompt"], r["completion"]) for r in world.sft_pairs]
    recipe = replace(SFT, steps=steps or SFT.steps)
    loss = train(
        model, examples, recipe, world.seed, prompts_too=False, title="SFT", progress=progress
    )
    stats = {**world.stats, "sft_loss": loss, "sft_seconds": time.perf_counter() - began}
    return replace(world, model=model.eval(), stats=stats, path=None)


def falling_pair(world: World, kind: str = "near", candidates: int = 64) -> int:
    """The preference pair whose chosen answer one small DPO step on it lowers most.

    At the start of DPO (policy = reference) a step of gradient descent moves log π(y+) by
    `eta * beta / 2 * (<g+, g+> - <g+, g->)`, with g the gradients of log π(y+) and log π(y-): the
    chosen answer falls where its gradient agrees more with that of the rejected answer than with
    itself.

    Args:
        world: The world, finetuned (`sft`).
        kind: Consider pairs of this kind only.
        candidates: Consider this many pairs at most, in order.

    Returns:
        Index into `world.preference_pairs`.

    Raises:
        ValueError: If no pair is of this kind.

    Cost: two backward passes per candidate.
    """
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    indices = [i for i, row in enumerate(world.preference_pairs) if row["kind"] == kind]
    if not indices:
        kinds = sorted({row["kind"] for row in world.preference_pairs})
        raise ValueError(f"kind must be one of {kinds}, got {kind!r}")

    def gradient(prompt: str, response: str) -> Tensor:
        example = encode(world.tokenizer, prompt, response)
        total = own_response(world.model, example).log_probs.sum()
        return flat_gradient(total, parameters).double()

    def rise(index: int) -> float:
        row = world.preference_pairs[index]
        chosen = gradient(row["prompt"], row["chosen"])
        return float(chosen @ (chosen - gradient(row["prompt"], row["rejected"])))

    with cpu_threads(1):
        return min(indices[:candidates], key=rise)
