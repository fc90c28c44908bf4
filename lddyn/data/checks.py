"""Checks of encoded responses and pairs: what trains badly, or looks like dynamics and is not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from lddyn.data.columns import SCORES, Row
from lddyn.data.example import Example
from lddyn.data.messages import common_prefix_length
from lddyn.data.token_facts import TokenFacts
from lddyn.data.tokenizer import Tokenizer

__all__ = ["check_log_prob", "check_pair", "check_response", "check_scores"]

Found = Iterator[tuple[str, str]]  # (code of the problem, the values at fault)

_FAR_BELOW = 2.0  # nats per token below a uniform guess
DEFAULT_MAX_LENGTH = 1024  # of TRL's SFTConfig and DPOConfig


def check_response(
    example: Example, facts: TokenFacts, tokenizer: Tokenizer | None, *, whole: bool
) -> Found:
    """Yield the problems of one encoded response.

    Args:
        example: The response.
        facts: What is known of the tokens.
        tokenizer: The tokenizer. None: texts are not checked.
        whole: Whether the response is a whole text, which may hold turns of both sides.
    """
    notes = dict(example.notes)
    if facts.bos and example.length > 1:
        first, second = example.ids[:2]
        if first in facts.bos and second == first:
            yield "double_bos", f"token ids begin {first}, {second}"
        elif facts.adds_bos and first not in facts.bos and "truncated_prompt" not in notes:
            yield (
                "missing_bos",
                f"token ids begin {first}, {second}; the tokenizer begins a text with BOS "
                f"{min(facts.bos)}",
            )
    tail = list(itertools.takewhile(lambda token: _ends(token, facts, tokenizer), _last(example)))
    ends = [token for token in tail if token in facts.ends]
    if len(ends) > 1:
        yield "double_eos", f"the response ends in {len(ends)} end tokens: {ends[::-1]}"
    if facts.ends and not facts.ends & set(example.targets) and "eos_lost" not in notes:
        last = example.targets[-1]
        names = sorted(facts.eos or facts.ends)
        yield "eos_not_counted", f"the response ends in token id {last}, not in EOS {names}"
    if tokenizer is None:
        return
    text = tokenizer.decode([t for t in example.targets if t not in facts.ends])
    if not text.strip():
        yield "blank_response", f"{text!r}"
    if not whole:
        yield from _check_markup(example, facts, tokenizer)


def check_pair(
    chosen: Example, rejected: Example, facts: TokenFacts, tokenizer: Tokenizer | None
) -> Found:
    """Yield the problems of a pair: identical, nearly so, beginning alike, of two prompts."""
    if chosen.content_id == rejected.content_id:
        yield "identical_pair", "chosen and rejected are the same"
        return
    if chosen.prompt_ids != rejected.prompt_ids and not _cut(chosen) and not _cut(rejected):
        yield (
            "different_prompts",
            f"the prompts have {len(chosen.prompt_ids)} and {len(rejected.prompt_ids)} tokens, and "
            "differ",
        )
        return
    sides = [_without_ends(side.response_ids, facts) for side in (chosen, rejected)]
    longest, shortest = max(map(len, sides)), min(map(len, sides))
    start = common_prefix_length(*sides)
    if start == shortest == longest:
        yield "near_identical", "chosen and rejected differ in end tokens only"
        return
    yield from _check_start(sides, start, chosen, facts, tokenizer)
    end = common_prefix_length(sides[0][start:][::-1], sides[1][start:][::-1])
    texts = None if tokenizer is None else [tokenizer.decode(side) for side in sides]
    if texts is not None and texts[0].split() == texts[1].split():
        yield "near_identical", "chosen and rejected differ in white space only"
        return
    if longest >= 10 and longest - start - end <= 0.1 * longest:
        yield "near_identical", f"{longest - start - end} of {longest} tokens differ"


def _check_start(
    sides: list[list[int]],
    start: int,
    chosen: Example,
    facts: TokenFacts,
    tokenizer: Tokenizer | None,
) -> Found:
    """Yield "common_start" where both responses begin with markup, "shared_start" with much text.

    Args:
        sides: Token ids of the two responses.
        start: How many of them they share at their beginning.
        chosen: The chosen response.
        facts: What is known of the tokens.
        tokenizer: The tokenizer. None: markup is not recognised.
    """
    if "template_text" in dict(chosen.notes):
        return  # said of each response
    begin = "" if tokenizer is None else tokenizer.decode(sides[0][:start])
    thought = "</think>" in begin and start > 1
    half = start >= 8 and 2 * start >= min(map(len, sides))
    markup = thought or facts.markup(begin + " .")
    if markup or half:
        yield (
            "common_start" if markup else "shared_start",
            f"both begin with the same {start} tokens" + (f": {begin[:80]!r}" if begin else ""),
        )


def check_log_prob(example: Example, log_prob: float, vocab_size: int) -> str | None:
    """What is wrong with a response that the model finds less likely than random tokens, or None.

    Args:
        example: The response.
        log_prob: log π of its counted tokens together, in nats.
        vocab_size: Number of tokens V; a uniform guess has log π = −log V for each token.
    """
    mean, uniform = log_prob / max(1, len(example)), -math.log(vocab_size)
    if mean > uniform - _FAR_BELOW:
        return None
    return (
        f"log π is {mean:.1f} nats per token, far below that of a uniform guess ({uniform:.1f}): "
        "tokens that were never trained, another tokenizer, or a damaged model"
    )


def check_scores(row: Row) -> Found:
    """Yield what the scores of a pair's two responses say against their order."""
    for columns in SCORES:
        chosen, rejected = _number(row.get(columns[0])), _number(row.get(columns[1]))
        if chosen is not None and rejected is not None:
            detail = f"{columns[0]} {chosen:g}, {columns[1]} {rejected:g}"
            yield from _compare(chosen, rejected, detail)
    margin = _number(row.get("margin"))
    if margin is not None:
        yield from _compare(margin, 0, f"margin {margin:g}")


def swapped(
    pairs: dict[tuple[object, ...], int], examples: Mapping[str, Example], row: int
) -> Found:
    """Yield "swapped_pair" for a pair that an earlier row has the other way round.

    Args:
        pairs: (prompt, chosen, rejected) → first row; receives this pair.
        examples: The responses of the row.
        row: Its index.
    """
    prompt, chosen, rejected = (
        examples["chosen"].prompt_ids,
        examples["chosen"].response_ids,
        examples["rejected"].response_ids,
    )
    first = pairs.get((prompt, rejected, chosen))
    if first is not None:
        yield "swapped_pair", f"row {first} prefers the other response"
    pairs.setdefault((prompt, chosen, rejected), row)


def _compare(chosen: float, rejected: float, detail: str) -> Found:
    if chosen < rejected:
        yield "swapped_pair", detail
    elif chosen == rejected:
        yield "tied_pair", detail


def _number(value: object) -> float | None:
    """The value if it is a number and not NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return float(value)


def _check_markup(example: Example, facts: TokenFacts, tokenizer: Tokenizer) -> Found:
    """Yield special tokens and role headers inside the counted stretches of a response."""
    prompt = tokenizer.decode(example.prompt_ids)
    mask = example.response_mask or (True,) * len(example.response_ids)
    stretches = itertools.groupby(zip(example.response_ids, mask, strict=True), lambda tm: tm[1])
    for counts, tokens in stretches:
        text = tokenizer.decode([token for token, _ in tokens]) if counts else ""
        mark = facts.markup(text, prompt) if text else None
        if mark is not None:
            where = text.find(mark)
            yield (
                "special_in_response",
                f"{mark!r} within the response: {text[max(0, where - 20) : where + 40]!r}",
            )
            return


def _last(example: Example) -> Iterator[int]:
    """Tokens of the last stretch that is counted, from the last."""
    mask = example.response_mask or (True,) * len(example.response_ids)
    backwards = zip(example.response_ids[::-1], mask[::-1], strict=True)
    return (token for token, counts in itertools.takewhile(lambda pair: pair[1], backwards))


def _ends(token: int, facts: TokenFacts, tokenizer: Tokenizer | None) -> bool:
    """Whether a token is an end token or white space."""
    blank = tokenizer is not None and not tokenizer.decode([token]).strip()
    return token in facts.ends or token in facts.control.values() or blank


def _without_ends(ids: tuple[int, ...], facts: TokenFacts) -> list[int]:
    kept = list(ids)
    while kept and kept[-1] in facts.ends:
        kept.pop()
    return kept


def _cut(example: Example) -> bool:
    return "truncated_prompt" in dict(example.notes)
