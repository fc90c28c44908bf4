"""Every column that a row may carry: what it holds, and what happens when nobody reads it.

`lddyn.data.formats` and `lddyn.data.prepared` say which of the columns a row's format reads; the
audit names the others, in the words of this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lddyn.errors import ExampleError

__all__ = ["COLUMNS", "MASKS", "PREPARED_PAIRS", "REFERENCE", "SCORES", "WHOLE", "Column", "Row"]

Row = Mapping[str, Any]  # one row of a data set: column → value


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        holds: The content, in words.
        lost: What training would lose if the column is not read; `""`: nothing.
    """

    holds: str
    lost: str = ""


def _columns(names: str, holds: str, lost: str = "") -> dict[str, Column]:
    return dict.fromkeys(names.split(), Column(holds, lost))


COLUMNS: dict[str, Column] = {
    # Texts and conversations
    **_columns("text", "a whole text"),
    **_columns("messages conversations conversation", "a conversation"),
    **_columns("prompt", "the prompt, a text or messages"),
    **_columns("completion", "the response to the prompt"),
    **_columns("chosen rejected", "the preferred and the other response"),
    **_columns("chosen_messages rejected_messages", "whole conversations"),
    **_columns("instruction input", "the user's turn, in two parts (alpaca)", "the user's turn"),
    **_columns("context document passage", "further text of the prompt", "the context"),
    **_columns("output", "the assistant's answer (alpaca), or the better and the worse"),
    **_columns("query", "the user's turn (ms-swift)", "the user's turn"),
    **_columns("response", "the assistant's answer (ms-swift)", "the answer"),
    **_columns("rejected_response", "the worse answer (ms-swift)", "the pair"),
    **_columns("preferred_output non_preferred_output", "the two answers (OpenAI)", "the pair"),
    **_columns(
        "reasoning reasoning_content thinking thought cot",
        "the thought in front of the answer",
        "the thought",
    ),
    **_columns("system", "the system prompt", "the system prompt"),
    **_columns("history", "earlier turns, as [user, assistant] pairs (alpaca)", "earlier turns"),
    **_columns(
        "tools", "tool descriptions for the chat template", "the tools of the system prompt"
    ),
    **_columns(
        "chat_template_kwargs", "arguments of the chat template", "the template's arguments"
    ),
    **_columns("label kto_tag", "whether the response is desirable", "which way to push"),
    # Token ids
    **_columns("input_ids", "token ids of a whole sequence"),
    **_columns("prompt_ids prompt_input_ids", "token ids of the prompt"),
    **_columns("completion_ids completion_input_ids", "token ids of the response"),
    **_columns(
        "chosen_ids rejected_ids chosen_input_ids rejected_input_ids",
        "token ids of a response, with or without the prompt",
    ),
    # Which tokens are read, and which are counted
    **_columns(
        "attention_mask prompt_attention_mask completion_attention_mask chosen_attention_mask "
        "rejected_attention_mask prompt_mask",
        "0 for tokens that are not read; 1, 2, … number the documents of a packed row",
        "which tokens are padding",
    ),
    **_columns(
        "labels completion_labels chosen_labels rejected_labels",
        "the token id where the loss counts it, -100 elsewhere",
        "which tokens count",
    ),
    **_columns(
        "completion_mask assistant_masks loss_mask chosen_mask rejected_mask",
        "1 for tokens that the loss counts",
        "which tokens count",
    ),
    **_columns("position_ids", "positions; 0 begins a document", "where documents begin"),
    **_columns("seq_lengths", "lengths of the documents of a packed row", "where documents begin"),
    # What a trainer reads beside the tokens
    **_columns(
        "ref_chosen_logps ref_rejected_logps",
        "log π_ref of the two responses, in nats",
        "the reference",
    ),
    **_columns("ref_per_token_logps", "log π_ref of each token", "the reference"),
    **_columns(
        "old_per_token_logps", "log π of each token when it was sampled", "the ratio π/π_old"
    ),
    **_columns("advantages advantage", "the advantage of the response", "the sign of the step"),
    **_columns("images image videos video audios audio", "media", "what the prompt shows"),
    **_columns("pixel_values image_grid_thw", "media as numbers", "what the prompt shows"),
    **_columns("margin", "the margin that a reward model must keep", "the margin"),
    **_columns("weight loss_weight sample_weight", "the weight of the row's loss", "the weight"),
    **_columns(
        "KL_completion_ids KL_completion_input_ids KL_completion_labels",
        "KTO's mismatched response",
        "KTO's KL",
    ),
    # What no trainer reads
    **_columns("score reward rating", "what a judge gave the response"),
    **_columns("token_type_ids length num_tokens n_tokens num_items_in_batch", "bookkeeping"),
    **_columns(
        "id idx index prompt_id uid uuid source dataset category subset split", "bookkeeping"
    ),
}

# Column → field, of rows that hold a whole text or conversation; the first one there is read.
WHOLE = {
    "messages": "messages",
    "conversations": "messages",
    "conversation": "messages",
    "text": "text",
}

# (prompt, chosen, rejected) as token ids: columns of TRL 1, and of TRL 0.24.
PREPARED_PAIRS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)

# Columns of `input_ids` rows that say which tokens are in the loss; a token is if all say so.
MASKS = ("labels", "completion_mask", "assistant_masks", "loss_mask")

# Columns of log-probs of a reference that was run before training, as TRL writes them.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")

# Columns in which a judge has scored the two responses of a pair: (chosen, rejected).
SCORES = tuple(
    (name.format("chosen"), name.format("rejected"))
    for name in (
        "score_{}",
        "{}_score",
        "{}-score",
        "{}_rating",
        "{}-rating",
        "rating_{}",
        "{}_reward",
        "reward_{}",
    )
)

# What other data sets call a column → the column that is read.
_SYNONYMS = {
    "question": "prompt",
    "query": "prompt",
    "instruction": "prompt",
    "input": "prompt",
    "problem": "prompt",
    "response": "completion",
    "answer": "completion",
    "output": "completion",
    "target": "completion",
    "solution": "completion",
    "response_chosen": "chosen",
    "chosen_response": "chosen",
    "response_rejected": "rejected",
    "rejected_response": "rejected",
    "content": "text",
    "raw_content": "text",
    "dialogue": "messages",
    "dialog": "messages",
}

_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}  # as CSV files have them

# What rows of several responses to one prompt call these (GRPO, best of n, reward models).
_GROUPS = ("completions", "responses", "outputs", "answers", "candidates", "generations", "samples")

# The formats as an error lists them; `lddyn.encode_row` documents them.
_FORMATS = (
    "{text}",
    "{messages}",
    "{prompt, completion}",
    "{prompt, completion, label}",
    "{prompt, chosen, rejected}",
    "{chosen, rejected}",
    "{instruction, input, output}",
    "{query, response}",
    "{conversations, chosen, rejected}",
    "{messages, rejected_response}",
    "{chosen_messages, rejected_messages}",
    "{input_ids, labels or completion_mask}",
    "{prompt_ids, completion_ids}",
    "{prompt_ids, chosen_ids, rejected_ids}",
    "{prompt, plus the columns named in fields}",
)


def unread_columns(row: Row, read: Iterable[str]) -> dict[str, Column]:
    """Columns of a row that its format does not read: name → what it holds.

    A column without a value (None, an empty text or list) is left out; one that the table does not
    have has an empty description.
    """
    known = set(read)
    return {
        name: COLUMNS.get(name, Column(""))
        for name, value in row.items()
        if name not in known and not _is_empty(value)
    }


def feedback_label(row: Row) -> bool | None:
    """Whether the row's response is desirable, from `label` or `kto_tag`; None: the row has none.

    Raises:
        ExampleError: If the label is neither a boolean nor 0 or 1.

    Example:
        >>> from lddyn.data.columns import feedback_label
        >>> feedback_label({"prompt": "Is it red?", "completion": " No", "label": False})
        False
    """
    for column in ("label", "kto_tag"):
        value = row.get(column)
        if value is None:
            continue
        if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
            return _BOOLEANS[value.strip().lower()]
        if value in (0, 1):
            return bool(value)
        raise ExampleError(
            f"{column} must be true for a desirable response or false for an undesirable one, got "
            f"{value!r}",
            problem="bad_label",
            field=column,
        )
    return None


def reference_log_probs(row: Row) -> tuple[float, float] | None:
    """(log π_ref(y+), log π_ref(y−)) that the row holds, in nats; None: the row has none.

    Raises:
        ExampleError: If one of the two columns is missing or holds no number.

    Example:
        >>> from lddyn.data.columns import reference_log_probs
        >>> reference_log_probs({"ref_chosen_logps": -3.0, "ref_rejected_logps": -9.5})
        (-3.0, -9.5)
    """
    if all(row.get(column) is None for column in REFERENCE):
        return None
    for column in REFERENCE:
        value = row.get(column)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value <= 0:
            raise ExampleError(
                f"{column} must be a log-probability in nats (a number <= 0), got {value!r}: TRL "
                "stores both columns, or neither",
                problem="bad_reference",
                field=column,
            )
    return float(row[REFERENCE[0]]), float(row[REFERENCE[1]])


def require_columns(row: Row, *columns: str) -> None:
    """Raise `missing_column` for the first of the columns that the row lacks."""
    for column in columns:
        if column not in row:
            raise missing_column(column, row)


def missing_column(column: str, row: Row) -> ExampleError:
    """Error for a column that the row lacks: what the row has, what to rename, all formats."""
    there = ", ".join(map(repr, map(str, row))) or "no columns"
    known = {name: _usual_name(name) for name in map(str, row)}
    renamed = [f"{name!r} to {usual!r}" for name, usual in known.items() if usual != name]
    advice = f"; rename {', '.join(renamed)}" if renamed else ""
    advice += group_advice(row)
    return ExampleError(
        f"row must have a column {column!r}, got {there}{advice}; formats: {' | '.join(_FORMATS)}",
        problem="missing_column",
        field=column,
    )


def _usual_name(name: str) -> str:
    """What lddyn calls a column of this name: 'Prompt ' and 'question' are 'prompt'."""
    plain = name.strip().lower()
    return _SYNONYMS.get(plain, plain if plain in COLUMNS else name)


def prompt_under_another_name(row: Row) -> bool:
    """Whether a column that others call the prompt, such as `question`, has a text."""
    return any(
        isinstance(value, str) and bool(value) and _usual_name(str(name)) == "prompt"
        for name, value in row.items()
    )


def group_advice(row: Row) -> str:
    """What to do with a row that holds several responses to one prompt; "" for any other row."""
    several = [name for name in _GROUPS if _is_texts(row.get(name))]
    if not several:
        return ""
    return (
        f"; {several[0]!r} holds a group of responses: give each of them a row "
        "{prompt, completion}, and for a loss of the group's rewards give them to lddyn.GRPO "
        "(docs/losses.md, losses of groups)"
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 1 and not isinstance(value[0], int)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)
