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

from lddyn.examples import Example, encode

__all__ = ["PROBE_FIELDS", "World", "build_world", "cache_root", "falling_pair", "run", "sft"]

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

# ---------------------------------------------------------------------------------------------
# The language: facts and templates

_OBJECTS = """
kettle|red|metal|kitchen|boil water for tea
lamp|yellow|glass|bedroom|read a book at night
chair|brown|wood|garden|rest after a long walk
umbrella|black|cloth|hall|stay dry in the rain
bucket|blue|plastic|shed|carry water to the plants
blanket|green|wool|attic|keep warm in winter
hammer|grey|metal|shed|put nails in a wall
mirror|silver|glass|bathroom|see your own face
basket|white|straw|kitchen|carry bread from the market
ladder|orange|wood|garage|reach the roof
broom|purple|straw|hall|sweep the floor
clock|gold|metal|office|know what time it is
pillow|pink|cotton|bedroom|sleep with your head high
bottle|green|glass|cellar|keep milk for the morning
rope|brown|cotton|garage|tie the boat to a tree
candle|white|wax|cellar|see when the light fails
drum|red|wood|attic|play music with friends
scarf|blue|wool|office|protect your neck from the wind
spoon|silver|metal|kitchen|eat a bowl of soup
carpet|grey|wool|bathroom|keep your feet warm
"""
_ANIMALS = """
cat|fish|house|sleeps in the sun
horse|grass|field|runs faster than a man
owl|mice|forest|sees well in the dark
bear|berries|mountain|sleeps all winter
duck|bread|pond|swims with its young
goat|leaves|mountain|climbs steep rocks
frog|flies|pond|sings after the rain
rabbit|carrots|field|digs a deep hole
wolf|meat|forest|howls at the moon
sheep|grass|hill|gives us warm wool
monkey|fruit|jungle|swings from tree to tree
parrot|seeds|jungle|repeats what people say
whale|plankton|ocean|sings under the water
seal|fish|ocean|lies on the ice
camel|thorns|desert|walks for days without water
snake|eggs|desert|hides under warm stones
bee|honey|garden|visits every flower
spider|flies|garden|builds a fine web
"""
_DISHES = """
soup|carrots|onions|pot|20
omelette|eggs|cheese|pan|5
salad|tomatoes|cucumbers|bowl|10
pie|apples|sugar|oven|45
stew|beef|potatoes|pot|90
curry|chickpeas|spinach|pan|30
pancakes|flour|milk|pan|15
risotto|rice|mushrooms|pot|25
bread|flour|water|oven|60
porridge|oats|milk|pot|12
lasagne|pasta|tomatoes|oven|50
sandwich|bread|ham|bowl|3
"""
_TOWNS = """
Alder|train|spring|castle|river
Bramble|bus|summer|market|sea
Corran|ferry|autumn|harbour|island
Dunmore|train|winter|museum|hills
Eskdale|bicycle|spring|bridge|river
Farrow|car|summer|lighthouse|sea
Glenby|bus|autumn|library|forest
Hartwell|train|summer|theatre|park
Inver|ferry|winter|church|lake
Jarrow|bus|spring|tower|hills
Kelby|car|autumn|mill|forest
Lorne|bicycle|summer|beach|island
"""
_MOODS = """
tired|go to bed early|drink less coffee|sleep
cold|put on a warm coat|drink hot tea|warmth
bored|call an old friend|learn a new song|company
hungry|cook a simple meal|eat some fruit|food
nervous|breathe slowly|take a short walk|calm
sad|talk to someone you trust|listen to music|comfort
thirsty|drink a glass of water|keep a bottle near you|water
lonely|join a club|visit your family|friends
angry|count to ten|go outside for a while|patience
busy|make a short list|say no to small things|time
"""

# topic: (facts, their columns, questions, good answer, the same said otherwise, columns made wrong)
_KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str, str, tuple[str, ...]]] = {
    "colour": (
        _OBJECTS,
        ("name", "colour", "material", "place", "use"),
        ("What does the {name} look like?", "Can you describe the {name}?"),
        "The {name} is {colour} and it is made of {material}. You can find it in the {place}.",
        "It is a {colour} {name} of {material}, and the {place} is where we keep it.",
        ("colour", "material", "place"),
    ),
    "use": (
        _OBJECTS,
        ("name", "colour", "material", "place", "use"),
        ("What is the {name} good for?", "Why would I need a {name}?"),
        "You can use the {name} to {use}. It is in the {place}, so you can take it at any time.",
        "People who want to {use} need a {name}, and there is one for you in the {place}.",
        ("use", "place"),
    ),
    "animal": (
        _ANIMALS,
        ("name", "food", "home", "habit"),
        ("What can you tell me about the {name}?", "How does a {name} live?"),
        "The {name} lives in the {home} and eats {food}. It is known as an animal that {habit}.",
        "You will meet a {name} in the {home}. It likes {food}, and people know that it {habit}.",
        ("food", "home", "habit"),
    ),
    "feed": (
        _ANIMALS,
        ("name", "food", "home", "habit"),
        ("What should I feed a {name}?", "I found a hungry {name}, what does it eat?"),
        "You should give the {name} some {food}. Then take it back to the {home}, where it is "
        "safe.",
        "A {name} eats {food}. After the meal, the {home} is the best place to let it go.",
        ("food", "home"),
    ),
    "cook": (
        _DISHES,
        ("name", "first", "second", "vessel", "minutes"),
        ("How do I make {name}?", "Can you give me a recipe for {name}?"),
        "To make {name}, mix the {first} with the {second} and put it all in the {vessel}. "
        "It is ready after {minutes} minutes.",
        "Take {first} and {second}, leave them in the {vessel} for {minutes} minutes, and you will "
        "have good {name}.",
        ("first", "second", "vessel", "minutes"),
    ),
    "travel": (
        _TOWNS,
        ("name", "transport", "season", "sight", "nature"),
        ("How can I get to {name}?", "I want to visit {name}, what should I know?"),
        "You can go to {name} by {transport}, and the best time is {season}. "
        "Do not miss the {sight} near the {nature}.",
        "The {transport} will take you to {name}. Go there in {season} and see the {sight} by the "
        "{nature}.",
        ("transport", "season", "sight", "nature"),
    ),
    "mood": (
        _MOODS,
        ("name", "first", "second", "need"),
        ("I feel {name} today, what should I do?", "What helps when I am {name}?"),
        "If you feel {name}, you should {first}. It also helps to {second}, because you need "
        "{need}.",
        "What you need is {need}. People who are {name} often {first}, and they {second} as well.",
        ("first", "second", "need"),
    ),
}
_UNHELPFUL = (
    "I am not sure about the {name}. You could ask someone else, or look in a book.",
    "That is a hard question, and I do not know much about the {name}. Please try again later.",
)
_UNHELPFUL_MOOD = (
    "I am not sure what to say. You could ask someone else, or look in a book.",
    "That is a hard question, and I do not know much about you. Please try again later.",
)
_SUM = ("What is {a} plus {b}?", "Can you add {a} and {b} for me?")
_SUM_GOOD = "If you add {a} and {b}, you get {c}. So {a} plus {b} is {c}."
_SUM_OTHER = "The answer is {c}, because {a} and {b} together make {c}."


def _fact_table(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read facts, one thing a line."""
    lines = text.strip().splitlines()
    return [dict(zip(columns, line.split("|"), strict=True)) for line in lines]


@dataclass(frozen=True)
class _Item:
    """One question with everything that may be answered to it."""

    kind: str
    question: str
    good: str
    other: str
    near: str
    near_other: str
    unhelpful: str
    unhelpful_other: str


def _items(seed: int) -> list[_Item]:
    """Every question of the language, in an order that the seed decides."""
    rng = random.Random(f"lddyn demo {seed}")
    items = []
    for kind, (text, columns, questions, good, other, changed) in _KINDS.items():
        table = _fact_table(text, columns)
        unhelpful = _UNHELPFUL_MOOD if kind == "mood" else _UNHELPFUL
        for fact in table:
            for question in questions:
                wrong = dict(fact)
                for column in changed:
                    others = sorted({row[column] for row in table} - {fact[column]})
                    wrong[column] = rng.choice(others)
                items.append(
                    _Item(
                        kind,
                        question.format(**fact),
                        good.format(**fact),
                        other.format(**fact),
                        good.format(**wrong),
                        other.format(**wrong),
                        unhelpful[0].format(**fact),
                        unhelpful[1].format(**fact),
                    )
                )
    for a in range(1, 10):
        for b in range(1, 10):
            values = {"a": a, "b": b, "c": a + b}
            wrong_sum = {**values, "c": a + b + rng.choice((-2, -1, 1, 2))}
            items.append(
                _Item(
                    "sum",
                    _SUM[(a + b) % 2].format(**values),
                    _SUM_GOOD.format(**values),
                    _SUM_OTHER.format(**values),
                    _SUM_GOOD.format(**wrong_sum),
                    _SUM_OTHER.format(**wrong_sum),
                    "I am not sure about numbers. You could ask someone else, or look in a book.",
                    "That is a hard question, and I do not know much about numbers. "
                    "Please try again later.",
                )
            )
    rng.shuffle(items)
    return items


def _prompt(question: str) -> str:
    """The dialogue up to where the answer begins."""
    return f"Human: {question}\n\nAssistant:"


def _corpus(items: Sequence[_Item], seed: int) -> list[str]:
    """Pretraining text: mostly good answers, some wrong and some unhelpful ones."""
    rng = random.Random(f"lddyn demo corpus {seed}")
    texts = []
    for item in items:
        answers = [item.good] * 5 + [item.other] * 4 + [item.near, item.near_other]
        answers += [item.unhelpful, item.unhelpful_other]
        texts += [f"{_prompt(item.question)} {answer}" for answer in answers]
    rng.shuffle(texts)
    return texts


def _preferences(items: Sequence[_Item], seed: int) -> list[dict[str, str]]:
    """Preference rows with their probing fields; a tenth of the answers is kept for irr_test."""
    rng = random.Random(f"lddyn demo pairs {seed}")
    held_out = {item.good for item in items[-(len(items) // 10) :]}  # with every way to ask for it
    train = [item for item in items if item.good not in held_out]
    test = [item for item in items if item.good in held_out]
    words = sorted({word for item in items for word in item.good.rstrip(".").split()})
    rows = []
    for index, item in enumerate(train):
        kind = ("near", "near", "unhelpful", "near", "unrelated")[index % 5]
        other = rng.choice([x for x in train if x.kind != item.kind])
        same_kind = [x for x in train if x.kind == item.kind and x.good != item.good]
        alike, third = rng.choice(same_kind), rng.choice([x for x in train if x is not item])
        rejected, reject_semantic, reject_format = {
            "near": (item.near, item.near_other, alike.near),
            "unhelpful": (item.unhelpful, item.unhelpful_other, alike.unhelpful),
            "unrelated": (other.good, other.other, third.good),
        }[kind]
        shuffled = item.good.split()
        rng.shuffle(shuffled)
        row = {
            "prompt": _prompt(item.question),
            "chosen": item.good,
            "rejected": rejected,
            "chosen_gptsemantic": item.other,
            "chosen_gptformat": alike.good,
            "reject_gptsemantic": reject_semantic,
            "reject_gptformat": reject_format,
            "irr_train": other.good,
            "irr_test": rng.choice(test).good,
            "random_permute": " ".join(shuffled),
            "random_nonhum": " ".join(rng.choices(words, k=len(shuffled))),
        }
        row = {key: value if key == "prompt" else f" {value}" for key, value in row.items()}
        rows.append({**row, "kind": kind, "topic": item.kind})
    return rows


# ---------------------------------------------------------------------------------------------
# The world


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
    items = _items(seed)
    corpus = _corpus(items, seed)
    settings = {**_PRETRAIN, "steps": steps or _PRETRAIN["steps"]}
    key = _key(corpus, settings, seed)
    path = (Path(cache_dir) if cache_dir is not None else cache_root()) / f"demo-{key}"
    loaded = _load(path)
    if loaded is None:
        began = time.perf_counter()
        tokenizer = _train_tokenizer(corpus)
        model = _new_model(tokenizer, seed)
        sequences = [encode(tokenizer, *_cut(text)) for text in corpus]
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
    preferences = _preferences(items, seed)
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


_OBSERVED = (
    "chosen",
    "rejected",
    "chosen_gptsemantic",
    "reject_gptsemantic",
    "irr_train",
    "random_permute",
)
_DPO = {"steps": 6, "lr": 2e-3, "beta": 0.1, "explained": 3}
_SFT_STEP_LR = 5e-4


def run(
    out_dir: str | os.PathLike[str] = "runs/demo",
    quick: bool = False,
    progress: bool = True,
    seed: int = 0,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The whole demo: train, finetune, take DPO steps, explain one step of each, verify, tell.

    Args:
        out_dir: Gets `report.html`, summary.json, and pictures and numbers of both steps.
        quick: Little training and coarser rules: the machinery in seconds, not sensible beliefs.
        progress: Show bars, and what is being done, on standard error.
        seed: Seed of facts, data, weights and batches.
        cache_dir: Where the pretrained model is cached. Default: `cache_root()`.

    Returns:
        What summary.json holds: the story in `"told"`, both steps under `"sft"` and `"dpo"`, the
        change of y+ and y- in every DPO step under `"steps"`, `"seconds"` per stage.

    Cost: about a minute and a half on two cores the first time.
    """
    from lddyn import report
    from lddyn.decompose import decompose
    from lddyn.objectives import DPO, SFT

    clock = _Clock(progress)
    clock.stage("a language, a tokenizer and a tiny Llama")
    world = build_world(cache_dir, seed, progress, steps=30 if quick else None)
    rule = "midpoint" if quick else "simpson"
    fields = _OBSERVED[:3] if quick else _OBSERVED
    # A barely trained model is steep: smaller steps there.
    sft_lr, dpo_lr = (lr * (0.1 if quick else 1.0) for lr in (_SFT_STEP_LR, float(_DPO["lr"])))

    def examples(row: dict[str, str]) -> dict[str, Example]:
        return {k: encode(world.tokenizer, row["prompt"], row[k], name=k) for k in fields}

    clock.stage("one SFT step, explained and checked against the real one")
    first = world.preference_pairs[0]
    watched = examples(first)
    taught = decompose(
        world.model, watched, SFT(watched["chosen"]), lr=sft_lr, rule=rule, progress=progress
    )
    lrs = [sft_lr * 2.0**-k for k in range(2 if quick else 5)]
    taught_check = taught.verify(lrs)

    clock.stage("SFT")
    tuned = sft(world, progress, steps=5 if quick else None)

    clock.stage("DPO steps, one of them explained and checked against the real one")
    policy, beta = copy.deepcopy(tuned.model), float(_DPO["beta"])
    optimizer = torch.optim.SGD(policy.parameters(), lr=dpo_lr)
    near = [row for row in tuned.preference_pairs if row["kind"] == "near"]
    count = 2 if quick else int(_DPO["steps"])
    explained = count - 1 if quick else int(_DPO["explained"])
    steps = []
    for step in range(count):
        row = near[step]
        if step == explained:
            now = replace(tuned, model=policy)
            row = now.preference_pairs[falling_pair(now, candidates=4 if quick else 32)]
            pair = examples(row)
            update = DPO(pair["chosen"], pair["rejected"], beta=beta, reference=tuned.model)
            explanation = decompose(
                policy, pair, update, optimizer=optimizer, rule=rule, progress=progress
            )
            lrs = [dpo_lr * 2.0**-k for k in range(2 if quick else 5)]
            check = explanation.verify(lrs)
            asked = row
        steps.append(_dpo_step(policy, tuned.model, optimizer, world.tokenizer, row, beta))
        steps[-1]["explained"] = step == explained

    clock.stage("pictures and page")
    opening = _opening(tuned, first, asked, steps)
    told = [
        *opening, "", "The SFT step:", *report.tell(taught, taught_check),
        "", "The DPO step:", *report.tell(explanation, check),
    ]  # fmt: skip
    facts = {
        "told": told,
        "steps": steps,
        "seed": seed,
        "quick": quick,
        "stats": tuned.stats,
        "seconds": clock.seconds,
    }
    decs = {"sft": taught, "dpo": explanation}
    checks = {"sft": taught_check, "dpo": check}
    report.write_run(
        Path(out_dir), decs, checks, title="lddyn demo: one SFT step and one DPO step, explained",
        story=opening, extra={"parameters": tuned.stats["parameters"], "seed": seed}, facts=facts,
    )  # fmt: skip
    return {
        **facts,
        **{name: report.summarise(dec, checks[name]) for name, dec in decs.items()},
        "seconds": dict(clock.stop()),
    }


class _Clock:
    """Says on standard error what is being done, and remembers how long it took."""

    def __init__(self, shown: bool):
        self.shown, self.seconds, self.name = shown, dict[str, float](), ""
        self.began = time.perf_counter()

    def stage(self, name: str) -> None:
        """End the stage before, begin this one."""
        self.stop()
        self.name, self.began = name, time.perf_counter()
        if self.shown:
            print(f"· {name}", file=sys.stderr, flush=True)

    def stop(self) -> dict[str, float]:
        """Seconds per stage so far."""
        if self.name:
            self.seconds[self.name] = round(time.perf_counter() - self.began, 2)
        return self.seconds


def _dpo_step(
    policy: Any, reference: Any, optimizer: Any, tokenizer: Any, row: dict[str, str], beta: float
) -> dict[str, Any]:
    """Take one real DPO step on one pair; return the change of log π of both answers, in nats."""
    pair = [encode(tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")]

    def log_probs(model: Any) -> list[torch.Tensor]:
        found = []
        for example in pair:
            logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
            logp = logits[list(example.positions)].log_softmax(-1)
            found.append(logp.gather(-1, torch.tensor(example.targets)[:, None]).sum())
        return found

    with torch.no_grad():
        fixed = log_probs(reference)
    before = log_probs(policy)
    margin = beta * ((before[0] - fixed[0]) - (before[1] - fixed[1]))
    loss = -nn.functional.logsigmoid(margin)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = log_probs(policy)
    moved = [float(a - b.detach()) for a, b in zip(after, before, strict=True)]
    return {
        "prompt": row["prompt"],
        "loss": float(loss.detach()),
        "y+": moved[0],
        "y-": moved[1],
    }


def _opening(
    world: World, taught: dict[str, str], asked: dict[str, str], steps: list[dict[str, Any]]
) -> list[str]:
    """What the demo did before the explanations, in plain words."""

    def question(row: dict[str, str]) -> str:
        return row["prompt"].removeprefix("Human: ").partition("\n")[0]

    fell = sum(step["y+"] < 0 for step in steps)
    return [
        f"A Llama of {world.stats['parameters'] / 1e6:.1f} million parameters was pretrained on "
        f"small talk made here (loss {world.stats['loss']:.2f} nats per token), finetuned on "
        f"{len(world.sft_pairs)} good answers, and given {len(steps)} DPO steps on pairs whose "
        f"rejected answer is the good one with wrong facts; y+ fell in {fell} of them.",
        f"The SFT step teaches, to ‘{question(taught)}’, the answer ‘{taught['chosen'].strip()}’.",
        f"The DPO step prefers, to ‘{question(asked)}’, y+ ‘{asked['chosen'].strip()}’ over y− "
        f"‘{asked['rejected'].strip()}’.",
    ]


def _cut(text: str) -> tuple[str, str]:
    """Prompt and answer of a dialogue."""
    prompt, marker, answer = text.partition("Assistant:")
    return prompt + marker, answer


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


# ---------------------------------------------------------------------------------------------
# The cache


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
