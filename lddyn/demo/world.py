"""The world of `lddyn demo`: a small language, a model trained on it here, and preference pairs.

Nothing is downloaded. A seeded generator writes short question-and-answer dialogues about a few
dozen things with fixed facts, a BPE tokenizer and a tiny Llama are trained on them in well under a
minute on one core, and the result is cached. The model is real in the sense that matters here: its
beliefs come from data, so that finetuning it moves log-probabilities the way finetuning does.

Every question has a good answer, the same said otherwise, and answers to reject:

- `"near"`: the good answer's wording with wrong facts, so that pushing it down can pull the good
  answer down too,
- `"unhelpful"`: a polite refusal,
- `"unrelated"`: a good answer to another question.

Cached under `LDDYN_CACHE_DIR`, or the platform's cache directory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lddyn.data.encode import encode
from lddyn.data.example import Example
from lddyn.demo.language import cut_text, make_corpus, make_items, make_preferences

__all__ = ["PROBE_FIELDS", "World", "build_world", "cache_root", "falling_pair", "sft"]

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

_VERSION = 1  # raise when the training code changes; facts, templates and settings are hashed

_EOS = "<|endoftext|>"

_VOCAB_SIZE = 1024

_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

_PRETRAIN = {"steps": 500, "batch": 16, "lr": 3e-3, "warmup": 20, "weight_decay": 0.01}

_SFT = {"steps": 100, "batch": 16, "lr": 3e-4, "warmup": 5, "weight_decay": 0.0}


@dataclass(frozen=True)
class World:
    """A tokenizer, a model, and data to finetune it with.

    Attributes:
        model: A transformers Llama in evaluation mode, float32, on the CPU.
        tokenizer: Its tokenizer; EOS is `<|endoftext|>`, padding is another token.
        sft_pairs: Rows {"prompt", "completion"}: the good answers.
        preference_pairs: Rows {"prompt", "chosen", "rejected", ...} with the probing fields, and
            `"kind"`: how `rejected` is wrong (`"near"`, `"unhelpful"`, `"unrelated"`), and
            `"topic"`.
        probe_fields: Names of the response columns of `preference_pairs`.
        seed: Seed of everything.
        stats: `"loss"` (nats per token, mean of the last steps), `"seconds"`, `"parameters"`,
            `"cached"`; after `sft` also `"sft_loss"` and `"sft_seconds"`.
        path: Where it is cached; None when it is not.
    """

    model: Any
    tokenizer: Any
    sft_pairs: list[dict[str, str]]
    preference_pairs: list[dict[str, str]]
    probe_fields: tuple[str, ...] = PROBE_FIELDS
    seed: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def greedy(self, prompt: str, max_new_tokens: int = 48) -> str:
        """The model's most probable answer to a prompt, token by token."""
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad(), _one_thread():
            for _ in range(max_new_tokens):
                token = self.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                if token == self.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
        return str(self.tokenizer.decode(ids[0, start:]))


def cache_root() -> Path:
    """Directory for cached worlds: `LDDYN_CACHE_DIR`, or lddyn's in the platform's cache."""
    named = os.environ.get("LDDYN_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lddyn"


def build_world(
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    steps: int | None = None,
) -> World:
    """Build the demo's world, or read it from the cache.

    Args:
        cache_dir: Where to cache. Default: `cache_root()`.
        seed: Seed of facts, data, initial weights and batches.
        progress: Show a progress bar while training.
        steps: Pretraining steps. Default: enough for sensible answers.

    Returns:
        The world, its model pretrained but not finetuned. The same seed gives the same weights
        on the same kind of machine, whatever its number of cores.

    Cost: about half a minute of one core the first time; a second from the cache.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    items = make_items(seed)
    corpus = make_corpus(items, seed)
    settings = {**_PRETRAIN, "steps": steps or _PRETRAIN["steps"]}
    key = _key(corpus, settings, seed)
    path = (Path(cache_dir) if cache_dir is not None else cache_root()) / f"demo-{key}"
    loaded = _load(path)
    if loaded is None:
        began = time.perf_counter()
        tokenizer = _train_tokenizer(corpus)
        model = _new_model(tokenizer, seed)
        sequences = [encode(tokenizer, *cut_text(text)) for text in corpus]
        loss = _train(
            model, sequences, settings, seed, whole=True, title="pretraining", bar=progress
        )
        stats = {
            "loss": loss,
            "seconds": time.perf_counter() - began,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        saved = _save(path, model, tokenizer, stats)
        stats["cached"] = False
    else:
        model, tokenizer, stats = loaded
        stats["cached"] = saved = True
    preferences = make_preferences(items, seed)
    pairs = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences]
    return World(
        model=model.eval(),
        tokenizer=tokenizer,
        sft_pairs=pairs,
        preference_pairs=preferences,
        seed=seed,
        stats=stats,
        path=path if saved else None,
    )


def sft(world: World, progress: bool = True, *, steps: int | None = None) -> World:
    """Finetune the world's model on its good answers (a copy; the world given stays as it is).

    Args:
        world: The world, as `build_world` returned it.
        progress: Show a progress bar.
        steps: Optimizer steps. Default: a few seconds' worth.

    Returns:
        The world with the finetuned model, the start of preference training.
    """
    began = time.perf_counter()
    model = copy.deepcopy(world.model)
    examples = [encode(world.tokenizer, r["prompt"], r["completion"]) for r in world.sft_pairs]
    settings = {**_SFT, "steps": steps or _SFT["steps"]}
    loss = _train(model, examples, settings, world.seed, whole=False, title="SFT", bar=progress)
    stats = {**world.stats, "sft_loss": loss, "sft_seconds": time.perf_counter() - began}
    return replace(world, model=model.eval(), stats=stats, path=None)


def falling_pair(world: World, kind: str = "near", candidates: int = 64) -> int:
    """Find the preference pair whose chosen answer falls most under one small DPO step on it.

    At the start of DPO (policy = reference) a gradient-descent step moves log π(y+) by
    `eta * beta / 2 * (<g+, g+> - <g+, g->)`, with g the gradients of log π(y+) and log π(y-): the
    chosen answer falls where its gradient agrees more with the rejected answer's than with itself.

    Args:
        world: The world, finetuned (`sft`).
        kind: Consider only pairs of this kind.
        candidates: Most pairs to look at, in order.

    Returns:
        Index into `world.preference_pairs` of the pair with the lowest such difference.

    Cost: two backward passes per candidate.
    """
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    indices = [i for i, row in enumerate(world.preference_pairs) if row["kind"] == kind]
    if not indices:
        kinds = sorted({row["kind"] for row in world.preference_pairs})
        raise ValueError(f"kind must be one of {kinds}, got {kind!r}")

    def gradient(prompt: str, response: str) -> torch.Tensor:
        example = encode(world.tokenizer, prompt, response)
        logits = world.model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        log_probs = logits[list(example.positions)].log_softmax(-1)
        total = log_probs.gather(-1, torch.tensor(example.targets)[:, None]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]).double()

    def rise(index: int) -> float:
        row = world.preference_pairs[index]
        chosen = gradient(row["prompt"], row["chosen"])
        return float(chosen @ (chosen - gradient(row["prompt"], row["rejected"])))

    with _one_thread():
        return min(indices[:candidates], key=rise)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread for products this small.

    The same bits however many cores there are; and on a busy machine many times faster than threads
    that wait for each other in every product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_tokenizer(corpus: Sequence[str]) -> Any:
    """Train a byte-level BPE tokenizer on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[_EOS, "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_EOS, pad_token="<|pad|>")


def _new_model(tokenizer: Any, seed: int) -> Any:
    """A Llama with seeded random weights; the caller's random state stays as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def _batches(
    examples: Sequence[Example], size: int, steps: int, rng: random.Random
) -> Iterator[list[Example]]:
    """Yield batches of examples of like length, epoch after epoch."""
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


def _train(
    model: Any,
    examples: Sequence[Example],
    settings: dict[str, Any],
    seed: int,
    *,
    whole: bool,
    title: str,
    bar: bool,
) -> float:
    """Train on the counted tokens (`whole`: on every token); return the mean of the last losses."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    steps, warmup = int(settings["steps"]), int(settings["warmup"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.02, (steps - step) / max(1, steps - warmup))),
    )
    model.train()
    losses: list[float] = []
    with _one_thread():
        batches = _batches(examples, int(settings["batch"]), steps, random.Random(seed))
        with tqdm(
            batches,
            total=steps,
            desc=title,
            mininterval=0.5,
            disable=None if bar else True,
            leave=False,
        ) as shown:
            for batch in shown:
                longest = max(example.length for example in batch)
                ids = torch.zeros(len(batch), longest, dtype=torch.long)
                labels = torch.full((len(batch), longest), -100)
                for row, example in enumerate(batch):
                    ids[row, : example.length] = torch.tensor(example.ids)
                    first = 1 if whole else len(example.prompt_ids)
                    labels[row, first : example.length] = torch.tensor(example.ids[first:])
                # right padding under a causal mask: no counted token can see it
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                shown.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    optimizer.zero_grad()
    last = losses[-20:]
    return sum(last) / len(last)


def _key(corpus: Sequence[str], settings: dict[str, Any], seed: int) -> str:
    """Hash of all that decides the weights."""
    content = [_VERSION, corpus, settings, _MODEL, _VOCAB_SIZE, seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _save(path: Path, model: Any, tokenizer: Any, stats: dict[str, Any]) -> bool:
    """Write the cache beside its place, then rename; False (and a warning) when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as name:
            building = Path(name) / "world"
            tokenizer.save_pretrained(building)
            model.config.save_pretrained(building)
            weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
            files = {file.name: _digest(file) for file in sorted(building.iterdir())}
            manifest = {"stats": stats, "sha256": files}
            (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
            if path.exists():
                shutil.rmtree(path)
            building.rename(path)
    except OSError as error:
        if _load(path) is not None:  # another process was faster
            return True
        warnings.warn(f"the demo's model is not cached: {error}", stacklevel=3)
        return False
    return True


def _load(path: Path) -> tuple[Any, Any, dict[str, Any]] | None:
    """Read the cache; None when there is none, or (with a warning) when it is damaged."""
    if not path.exists():
        return None
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        absent = {"config.json", "model.safetensors", "tokenizer.json"} - set(manifest["sha256"])
        if absent:
            raise ValueError(f"the manifest does not name {sorted(absent)}")
        for name, digest in manifest["sha256"].items():
            if _digest(path / name) != digest:
                raise ValueError(f"{name} is not what was written")
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        with torch.random.fork_rng(devices=[]):  # random weights first, then the stored ones
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(path, local_files_only=True))
        model.load_state_dict(load_file(path / "model.safetensors"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        return model, tokenizer, dict(manifest["stats"])
    except Exception as error:  # whatever is wrong with it, it is only a cache
        warnings.warn(f"{path} is damaged ({error}); building it anew", stacklevel=3)
        return None
