"""The probing set of Ren & Sutherland (ICLR 2025, §4.1), and one fast pass over it.

A probing set asks, for every prompt x_u, about a dozen responses y: what was learned, the same said
otherwise, answers to other questions, words without grammar. Fields have the authors' names, so
that their files are read as they are:

    chosen, chosen_initial, chosen_selfr, chosen_gptsemantic, chosen_gptformat,
    rejected, reject_gptsemantic, reject_gptformat,
    irr_train, irr_test, irr_hum, random_permute, random_nonhum

`build` makes the free ones offline: permutations, other prompts' answers, random words, samples of
the model. Those that another model writes come from a file, or from an endpoint that the user names
(`write`); nothing is sent anywhere otherwise.

`measure` is the pass: every prompt is read once (`lddyn.packing`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lddyn import ops
from lddyn.anatomy import evaluating
from lddyn.examples import EmptyResponseError, Example, encode
from lddyn.examples import rows as read_rows
from lddyn.packing import response_logits
from lddyn.shards import replace_file

__all__ = [
    "TYPES", "Encoded", "Endpoint", "Measured", "ProbeSet", "ResponseType", "build", "measure",
    "sample", "write",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------
# Response types


@dataclass(frozen=True)
class ResponseType:
    """One kind of response.

    Attributes:
        symbol: The paper's.
        group: "answers" (Y_IF: follows the instruction), "other" (Y_non-IF: language, but no
            answer to this prompt) or "noise" (Y_non-hum: not language).
        label: A few words for pictures.
        made: How.
    """

    symbol: str
    group: str
    label: str
    made: str


TYPES: dict[str, ResponseType] = {
    "chosen": ResponseType("y+", "answers", "chosen", "the data's"),
    "chosen_initial": ResponseType("y_init", "answers", "sampled at start", "sampled, theta_0"),
    "chosen_selfr": ResponseType("y_selfr+", "answers", "self-rephrased", "rephrased by theta_0"),
    "chosen_gptsemantic": ResponseType("y_gpts+", "answers", "chosen, reworded", "other words"),
    "chosen_gptformat": ResponseType("y_gptf+", "answers", "chosen, other facts", "same format"),
    "rejected": ResponseType("y-", "answers", "rejected", "the data's"),
    "reject_gptsemantic": ResponseType("y_gpts-", "answers", "rejected, reworded", "other words"),
    "reject_gptformat": ResponseType("y_gptf-", "answers", "rejected, other facts", "same format"),
    "irr_train": ResponseType("y_j!=u+", "other", "chosen of another", "another row's chosen"),
    "irr_test": ResponseType("y_test+", "other", "chosen of a test row", "a held-out chosen"),
    "irr_hum": ResponseType("y_hum", "other", "human sentence", "a sentence about anything"),
    "random_permute": ResponseType("y_urnd+", "noise", "chosen, permuted", "words permuted"),
    "random_nonhum": ResponseType("y_rnd", "noise", "random words", "random words"),
}
_SYSTEM = "You are a helpful assistant."
# The paper's own words (App., Fig. 11).
_KEEP_MEANING = (
    "Given the reference sentence, please generate an output sentence. Please use different words "
    "as much as possible while keeping the meaning of the reference sentence unchanged. Please "
    "only return the output sentence.\n\nReference sentence: {text}\n\nOutput: "
)
_KEEP_FORMAT = (
    "Given the reference sentence, please generate an output sentence. Please change the meaning "
    "of the reference sentence as much as possible while keeping the format of it. Please only "
    "return the output sentence.\n\nReference sentence: {text}\n\nOutput: "
)
_SENTENCE = "Please generate a random sentence with {words} words."
_REPHRASE = (
    "Please rephrase the following sentence: \n@@@ Original Sentence: {text}\n@@@ Rephrase: "
)
# field: (the field it is made from, what is asked)
_WRITTEN = {
    "chosen_gptsemantic": ("chosen", _KEEP_MEANING),
    "chosen_gptformat": ("chosen", _KEEP_FORMAT),
    "reject_gptsemantic": ("rejected", _KEEP_MEANING),
    "reject_gptformat": ("rejected", _KEEP_FORMAT),
    "irr_hum": ("chosen", _SENTENCE),
}


@dataclass(frozen=True)
class ProbeSet:
    """Prompts with their responses.

    Attributes:
        rows: One mapping per prompt: "prompt", and the text of each field that it has.
        fields: The response types that occur, in the order of `TYPES`.

    Example:
        >>> from lddyn.probes import ProbeSet
        >>> ProbeSet([{"prompt": "Q:", "rejected": " b", "chosen": " a"}]).fields
        ('chosen', 'rejected')
    """

    rows: Sequence[Mapping[str, str]]
    fields: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a probing set needs at least one row, got none")
        for at, row in enumerate(self.rows):
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(f"row {at} of the probing set has no text under 'prompt'")
            for name in TYPES:
                if not isinstance(row.get(name, ""), str):
                    raise ValueError(f"{name} of row {at} must be text, got {row[name]!r:.40}")
        found = tuple(name for name in TYPES if any(row.get(name) for row in self.rows))
        if not found:
            raise ValueError(f"the rows hold none of the response fields {', '.join(TYPES)}")
        object.__setattr__(self, "fields", found)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @classmethod
    def read(cls, path: str | os.PathLike[str], limit: int | None = None) -> ProbeSet:
        """Reads JSONL, JSON or Parquet; the authors' files as they are.

        Raises:
            ValueError: If a row cannot be used; names it.
        """
        return cls(read_rows(path, limit=limit))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSONL that `read` reads."""
        lines = [json.dumps(dict(row), ensure_ascii=False) for row in self.rows]
        replace_file(Path(path), "\n".join(lines) + "\n")

    def split(self, held_out: float, seed: int = 0) -> tuple[ProbeSet, ProbeSet]:
        """Train and test prompts: equal prompts go to the same side.

        Args:
            held_out: Share of the distinct prompts that is kept for the test.
            seed: Which.

        Raises:
            ValueError: If one side would be empty.
        """
        prompts = sorted({row["prompt"] for row in self.rows})
        random.Random(f"lddyn probes split {seed}").shuffle(prompts)
        count = round(held_out * len(prompts))
        if not 0 < count < len(prompts):
            raise ValueError(
                f"held_out must leave prompts on both sides, got {held_out} of {len(prompts)}"
            )
        test = set(prompts[:count])
        sides = [[r for r in self.rows if (r["prompt"] in test) == side] for side in (False, True)]
        return ProbeSet(sides[0]), ProbeSet(sides[1])

    def encode(
        self,
        tokenizer: Any,
        *,
        fields: Sequence[str] | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
    ) -> Encoded:
        """Tokenises every response that is not empty; EOS is appended.

        Whether the prompt is cut is decided for every response by its own length: prompt, then
        response, are cut where both together are longer than max_length. (The authors' code decides
        by the longest of all responses, so that a long probe changes what all others are given.)

        Args:
            tokenizer: Of transformers.
            fields: Which types. None: all that occur.
            max_length: Most tokens in all.
            max_prompt_length: Tokens of a prompt that are kept, from its end, where it is cut.

        Raises:
            ValueError: If a field is unknown.
        """
        names = tuple(fields) if fields is not None else self.fields
        unknown = [name for name in names if name not in TYPES]
        if unknown:
            raise ValueError(f"fields must be among {', '.join(TYPES)}, got {unknown}")
        examples, at = [], []
        for i, row in enumerate(self.rows):
            for j, name in enumerate(names):
                try:
                    ex = encode(tokenizer, row["prompt"], row.get(name) or "", name=name)
                except EmptyResponseError:
                    continue
                if ex.length > max_length:
                    ex = encode(
                        tokenizer, row["prompt"], row[name], name=name, max_length=max_length,
                        max_prompt_length=max_prompt_length,
                    )  # fmt: skip
                examples.append(ex)
                at.append((i, j))
        return Encoded(examples, torch.tensor(at).view(-1, 2), len(self.rows), names)

    def report(self) -> list[dict[str, Any]]:
        """Per type: how many, how many empty, mean number of words."""
        found = []
        for name in self.fields:
            texts = [row.get(name) or "" for row in self.rows]
            words = [len(text.split()) for text in texts if text.strip()]
            found.append({
                "type": name,
                "symbol": TYPES[name].symbol,
                "group": TYPES[name].group,
                "count": len(words),
                "empty": len(texts) - len(words),
                "words": sum(words) / max(1, len(words)),
            })  # fmt: skip
        return found


@dataclass(frozen=True)
class Encoded:
    """Examples of a probing set, and which prompt and type each is.

    Attributes:
        examples: N of them.
        at: (N, 2) int64: prompt and field.
        prompts: Number of prompts P.
        fields: Names of the F types.
    """

    examples: list[Example]
    at: Tensor
    prompts: int
    fields: tuple[str, ...]

    def grid(self, values: Tensor) -> Tensor:
        """(N,) → (P, F) in float64, NaN where a prompt has no such response."""
        out = torch.full((self.prompts, len(self.fields)), float("nan"), dtype=torch.float64)
        out[self.at[:, 0], self.at[:, 1]] = values.double().cpu()
        return out

    def select(self, prompts: Sequence[int], fields: Sequence[str] | None = None) -> Encoded:
        """Some prompts, renumbered in this order, and some types."""
        names = tuple(fields) if fields is not None else self.fields
        row = {prompt: i for i, prompt in enumerate(prompts)}
        column = {self.fields.index(name): j for j, name in enumerate(names)}
        kept = [
            (row[i], column[j], k)
            for k, (i, j) in enumerate(self.at.tolist())
            if i in row and j in column
        ]
        kept.sort()
        at = torch.tensor([k[:2] for k in kept], dtype=torch.int64).view(-1, 2)
        return Encoded([self.examples[k] for *_, k in kept], at, len(prompts), names)


# ---------------------------------------------------------------------------------------------
# Building


def build(
    pairs: Sequence[Mapping[str, str]],
    held_out: Sequence[Mapping[str, str]],
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> ProbeSet:
    """Makes every response type that needs nothing but the data, a seed and the model itself.

    Fields that a row has already are kept. Made are: irr_train (chosen of another row), irr_test
    (chosen of a held-out row), random_permute (the chosen words in another order), random_nonhum
    (as many words of the data at random); with a model chosen_initial (sampled) and chosen_selfr
    (sampled after a request to rephrase). What another model must write (`write`) is left out.

    Args:
        pairs: Rows with "prompt" and "chosen", usually "rejected".
        held_out: Rows whose "chosen" irr_test is drawn from; none of their prompts in `pairs`.
        model: theta_0, a causal LM of transformers. None: nothing is sampled.
        tokenizer: Its tokenizer.
        seed: Of every choice.
        max_new_tokens: Most tokens of a sample.

    Raises:
        ValueError: If there are too few rows, or held-out prompts are among the others.

    Cost: without a model none worth mentioning; with one, two samples per row.

    Example:
        >>> from lddyn.probes import build
        >>> rows = [{"prompt": f"Q{i}:", "chosen": f" the answer {i}"} for i in range(3)]
        >>> made = build(rows[:2], rows[2:])
        >>> made.rows[0]["irr_train"], made.rows[0]["irr_test"]
        (' the answer 1', ' the answer 2')
    """
    if len({row["chosen"] for row in pairs}) < 2:
        raise ValueError("pairs must have two different chosen responses or more")
    shared = {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    if not held_out or shared:
        raise ValueError(
            f"held_out must be rows with prompts of their own, got {len(held_out)} rows, "
            f"{len(shared)} of whose prompts are in pairs"
        )
    learned = {row["chosen"] for row in pairs}
    unseen = [row["chosen"] for row in held_out if row["chosen"] not in learned]
    if not unseen:
        raise ValueError("held_out must have a chosen response that is not among those of pairs")
    words = sorted({word for row in (*pairs, *held_out) for word in row["chosen"].split()})
    made: list[dict[str, str]] = []
    for index, row in enumerate(pairs):
        rng = random.Random(f"lddyn probes {seed} {index}")
        shuffled = row["chosen"].split()
        rng.shuffle(shuffled)
        others = sorted({other["chosen"] for other in pairs} - {row["chosen"]})
        free = {
            "irr_train": rng.choice(others),
            "irr_test": rng.choice(unseen),
            "random_permute": _like(row["chosen"], shuffled),
            "random_nonhum": _like(row["chosen"], rng.choices(words, k=len(shuffled))),
        }
        made.append({**free, **row})
    if model is not None:
        _sample_fields(made, model, tokenizer, seed, max_new_tokens)
    names = ("prompt", *TYPES)
    return ProbeSet([{k: row[k] for k in (*names, *row) if row.get(k)} for row in made])


def _like(text: str, words: Sequence[str]) -> str:
    """Words with the leading space that the text has: it decides the first token."""
    return (" " if text[:1].isspace() else "") + " ".join(words)


def _sample_fields(
    rows: list[dict[str, str]], model: nn.Module, tokenizer: Any, seed: int, most: int
) -> None:
    for name, template in (("chosen_initial", "{prompt}"), ("chosen_selfr", _REPHRASE)):
        missing = [row for row in rows if not row.get(name)]
        digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        prompts = [
            template.format(prompt=row["prompt"], text=row["chosen"].strip()) for row in missing
        ]
        texts = sample(model, tokenizer, prompts, max_new_tokens=most, generator=generator)
        for row, text in zip(missing, texts, strict=True):
            row[name] = text


@torch.inference_mode()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    generator: torch.Generator | None = None,
    stop: str = "\n\nHuman:",
    batch: int = 64,
) -> list[str]:
    """Samples a response to every prompt, at temperature 1, or takes the greedy ones.

    Args:
        model: A causal LM of transformers with a key-value cache.
        tokenizer: Its tokenizer.
        prompts: Texts. Those of equal length in tokens are continued together.
        max_new_tokens: Most tokens of a response; fewer where the model's positions end.
        generator: Of the random numbers. None: the most probable token every time.
        stop: Text at which a response is cut, besides EOS.
        batch: Most prompts at once.

    Returns:
        One text per prompt; it may be empty.

    Cost: one forward per token and batch.
    """
    from transformers import DynamicCache

    config: Any = model.config
    room = getattr(config, "max_position_embeddings", None) or 1 << 30
    ids = [tokenizer(text)["input_ids"][-max(1, room - max_new_tokens) :] for text in prompts]
    texts = [""] * len(prompts)
    with evaluating(model):
        for at in _together([len(i) for i in ids], batch):
            device = next(model.parameters()).device
            given = torch.tensor([ids[i] for i in at], device=device)
            cache, drawn = DynamicCache(config=config), []
            running = torch.ones(len(at), dtype=torch.bool)
            for _ in range(max_new_tokens):
                logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits
                last = logits[:, -1].float().cpu()
                if generator is None:
                    token = last.argmax(-1)
                else:
                    token = torch.multinomial(last.softmax(-1), 1, generator=generator)[:, 0]
                token = torch.where(running, token, tokenizer.eos_token_id)
                drawn.append(token)
                running &= token != tokenizer.eos_token_id
                if not running.any():
                    break
                given = token[:, None].to(device)
            for i, row in zip(at, torch.stack(drawn, 1).tolist(), strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = text.partition(stop)[0]
    return texts


def _together(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of equal length, at most so many at once."""
    equal: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        equal.setdefault(length, []).append(index)
    for _, found in sorted(equal.items()):
        for start in range(0, len(found), most):
            yield found[start : start + most]


# ---------------------------------------------------------------------------------------------
# Responses that another model writes


@dataclass(frozen=True)
class Endpoint:
    """A chat service with OpenAI's interface, named by the user: there is no default.

    Attributes:
        url: Up to and without /chat/completions: "http://localhost:8000/v1".
        model: Its name there.
        key_variable: Environment variable that holds the key; empty: none is sent.
        temperature: The paper's 0.7.
        timeout: Seconds until an attempt is given up.
        attempts: How often a request is tried that failed for a passing reason: no connection,
            time over, status 408, 429 or 5xx.
        wait: Seconds before the second attempt; doubled each time.
    """

    url: str
    model: str
    key_variable: str = ""
    temperature: float = 0.7
    timeout: float = 60.0
    attempts: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the endpoint must be an http(s) address, got {self.url!r}")

    def ask(self, text: str) -> str:
        """The answer to one message.

        Raises:
            RuntimeError: If the service refuses, or answers with something else; or keeps failing.
        """
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            if not os.environ.get(self.key_variable):
                raise RuntimeError(f"the environment has no key under {self.key_variable}")
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "messages": [
                {"role": "system", "content": _SYSTEM}, {"role": "user", "content": text},
            ],
        }  # fmt: skip
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    document = json.load(reply)
                return str(document["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}"
                if error.code not in (408, 429) and error.code < 500:
                    raise RuntimeError(f"{self.url} refused the request: {problem}") from None
            except (OSError, TimeoutError) as error:
                problem = str(error)
            except (ValueError, LookupError, TypeError) as error:
                raise RuntimeError(
                    f"{self.url} did not answer as a chat service does: {error!r}"
                ) from None
        raise RuntimeError(f"{self.url} failed {self.attempts} times, at last: {problem}")


def write(
    probes: ProbeSet,
    endpoint: Endpoint,
    journal: str | os.PathLike[str],
    *,
    fields: Sequence[str] = tuple(_WRITTEN),
    bar: Callable[[list[Any], str], Iterable[Any]] | None = None,
) -> ProbeSet:
    """Has the service write the responses that are missing.

    Args:
        probes: A set; what it has is kept.
        endpoint: Who is asked. The text of "chosen" and "rejected" is sent there.
        journal: JSONL to which every answer is appended as it comes: run again after an
            interruption, it asks only for the rest.
        fields: Which types.
        bar: Wraps a list of requests and a label in a progress bar.

    Returns:
        The set, complete.

    Raises:
        ValueError: If a field is not one that is written so.
        RuntimeError: If the service fails; the journal keeps what there is.
    """
    unknown = [name for name in fields if name not in _WRITTEN]
    if unknown:
        raise ValueError(f"fields must be among {', '.join(_WRITTEN)}, got {unknown}")
    journal = Path(journal)
    known: dict[str, str] = {}
    if journal.exists():
        text = journal.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line that was cut short is asked for again
        for line in whole.splitlines():
            entry = json.loads(line)
            known[entry["key"]] = entry["text"]
        if whole != text:
            replace_file(journal, whole)
    requests = []
    for index, row in enumerate(probes.rows):
        for name in fields:
            source, template = _WRITTEN[name]
            if row.get(name) or not row.get(source):
                continue
            asked = template.format(text=row[source].strip(), words=len(row[source].split()))
            content = json.dumps([index, name, asked, endpoint.model, endpoint.temperature])
            requests.append((index, name, asked, hashlib.sha256(content.encode()).hexdigest()))
    rows = [dict(row) for row in probes.rows]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as out:
        for index, name, asked, key in bar(requests, "asking") if bar else requests:
            if key not in known:
                known[key] = endpoint.ask(asked)
                out.write(json.dumps({"key": key, "text": known[key]}) + "\n")
                out.flush()
            rows[index][name] = _like(rows[index]["chosen"], known[key].split(" "))
    return ProbeSet(rows)


# ---------------------------------------------------------------------------------------------
# The pass


@dataclass(frozen=True)
class Measured:
    """Sums over the counted tokens of each example, (N,), float64; nats.

    Attributes:
        tokens: Number of counted tokens.
        log_prob: Σ log π(y_m).
        greedy: Σ log max_v π: confidence of the greedy choice along the teacher-forced prefix.
        rest: Σ log(1 − max_v π), from a logsumexp over the others: finite when π saturates.
        entropy: Σ H(π).
        peakiness: ‖A‖_F² = Σ (V − 2 + V ‖π‖²).
        energy: ‖G‖_F² = Σ ‖π − e_y‖².
    """

    tokens: Tensor
    log_prob: Tensor
    greedy: Tensor
    rest: Tensor
    entropy: Tensor
    peakiness: Tensor
    energy: Tensor

    @property
    def mean_log_prob(self) -> Tensor:
        """Per token."""
        return self.log_prob / self.tokens


_SUMS = ("log_prob", "greedy", "rest", "entropy", "peakiness", "energy")


@torch.no_grad()  # not inference mode: FSDP2 keeps the buffers of its first forward
def measure(
    model: nn.Module, probes: Encoded | Sequence[Example], *, tokens: int | None = None
) -> Measured:
    """One teacher-forced pass over many responses, whose equal prompts are read once.

    Prompts and responses are packed into sequences without padding, see `lddyn.packing`. The head
    sees the response's positions only.

    Args:
        model: A causal LM of transformers; taken in evaluation mode.
        probes: A probing set, encoded, or examples in any order.
        tokens: Most tokens in one forward. None: so many that logits stay below a quarter GiB.

    Returns:
        Measured, aligned with the examples.

    Cost: 2 N FLOPs per prompt token, once per distinct prompt, and per response token.

    Example:
        >>> import lddyn, transformers
        >>> from lddyn.probes import measure
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> examples = [lddyn.Example([1, 2], y) for y in ([3, 4, 5], [3, 6])]
        >>> measure(model, examples).tokens
        tensor([3., 2.], dtype=torch.float64)
    """
    examples = probes.examples if isinstance(probes, Encoded) else list(probes)
    sums = torch.zeros(len(examples), len(_SUMS), dtype=torch.float64)
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for logits, targets, owners in response_logits(model, examples, tokens=tokens):
            sums.index_add_(0, owners, _statistics(logits, targets).cpu())
    count = torch.tensor([float(len(e)) for e in examples], dtype=torch.float64)
    return Measured(count, *sums.unbind(1))


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, 6) in float64, in the order of _SUMS."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    residual, log_prob, entropy, squared_norm, top = ops.residual(z, targets)
    best = top[:, :1]
    total = z.gather(1, targets[:, None]) - log_prob[:, None].to(z)  # log Σ exp z
    greedy = (z.gather(1, best) - total)[:, 0]
    # 1 − max π has no digits left where π saturates: there it is summed over the others.
    rest = torch.log1p(-greedy.exp())
    near = (greedy > -0.7).nonzero()[:, 0]
    others = z[near].scatter_(1, best[near], -torch.inf)
    rest[near] = others.logsumexp(1) - total[near, 0]
    vocabulary = z.shape[1]
    peakiness = vocabulary - 2 + vocabulary * squared_norm.double()
    energy = torch.linalg.vector_norm(residual, dim=1).double() ** 2
    parts = (log_prob, greedy, rest, entropy, peakiness, energy)
    return torch.stack([part.double() for part in parts], 1)
