"""Rows whose texts are token ids already, as a trainer prepares them or batches them.

Three formats: a pair as ids, prompt and completion as ids, and `input_ids` with a loss mask (one
sequence, or several documents packed into one). Tokens whose attention mask is 0 are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lddyn.data.columns import MASKS, REFERENCE, Row, missing_column
from lddyn.data.encode import make_example
from lddyn.data.example import IGNORED_LABEL, Example, entries, token_ids
from lddyn.data.messages import common_prefix_length
from lddyn.data.options import RowOptions
from lddyn.data.tokenizer import Tokenizer, as_ids, eos_ids
from lddyn.errors import EmptyResponseError, ExampleError

__all__ = ["Encoder", "ReadRow"]

# What is left to do for one field of a row. Fields are encoded one by one, so that a field that
# cannot be encoded does not take the others with it.
Encoder = Callable[[], Example]


@dataclass
class ReadRow:
    """A row whose format is recognised.

    Attributes:
        encoders: (field, encoder) of each response.
        reads: Columns that the format reads.
        notes: What was noticed of the row as a whole, as (code, field, detail).
    """

    encoders: list[tuple[str, Encoder]] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    notes: list[tuple[str, str, str]] = field(default_factory=list)


def read_prepared(tokenizer: Tokenizer | None, row: Row, options: RowOptions) -> ReadRow | None:
    """The responses of a row of token ids; None for a row of another format.

    Raises:
        ExampleError: If a column is missing, or masks or documents do not fit the ids.
    """
    reader = _Prepared(tokenizer, row, options)
    if any(_present(row, f"{side}_ids", f"{side}_input_ids") for side in ("chosen", "rejected")):
        return reader.pair()
    completion = _present(row, "completion_ids", "completion_input_ids")
    if completion is not None:
        return reader.completion(completion)
    return reader.sequence() if "input_ids" in row else None


class _Prepared:
    """The reading of one row of token ids.

    Attributes:
        read: What has been read so far.
    """

    def __init__(self, tokenizer: Tokenizer | None, row: Row, options: RowOptions) -> None:
        self.tokenizer, self.row, self.options = tokenizer, row, options
        self.read = ReadRow()

    def pair(self) -> ReadRow:
        """Chosen and rejected: each after the prompt's ids, or holding the prompt."""
        columns = {}
        for side in ("chosen", "rejected"):
            column = _present(self.row, f"{side}_ids", f"{side}_input_ids")
            if column is None:
                other = _present(self.row, "chosen_input_ids", "rejected_input_ids")
                raise missing_column(f"{side}_input_ids" if other else f"{side}_ids", self.row)
            columns[side] = column
        self.read.reads |= {*REFERENCE}
        for side, column in columns.items():
            self._response(side, column, f"{side}_labels", f"{side}_mask")
        if all(f"{side}_labels" in self.row for side in columns):
            self._check_prompts(*(self.row[column] for column in columns.values()))
        return self.read

    def completion(self, column: str) -> ReadRow:
        """Prompt and completion, also of a batch of reinforcement learning.

        Args:
            column: Column of the completion.
        """
        self.read.reads.add("label")
        self._response("completion", column, "completion_labels", "completion_mask")
        return self.read

    def sequence(self) -> ReadRow:
        """`input_ids` with masks: one sequence, or documents packed into one."""
        row = self.row
        ids = token_ids("input_ids", row["input_ids"])
        self.read.reads |= {"input_ids", "attention_mask", "position_ids", "seq_lengths", *MASKS}
        counted = self._counted(ids, "labels", *MASKS[1:])
        attended = self._mask(ids, "attention_mask") or [1] * len(ids)
        self._note_masks(ids, counted, attended)
        documents = _documents(row, attended)
        encoders = []
        for places in documents:
            kept = [place for place in places if attended[place]]
            part = [ids[place] for place in kept]
            mask = [counted[place] for place in kept]
            if any(mask[1:]) or len(documents) == 1:
                encoders.append((part, mask))
        for index, (part, mask) in enumerate(encoders or [([], [])]):
            name = "input_ids" if len(documents) == 1 else f"document_{index}"
            self.read.encoders.append((name, self._masked(part, mask, name)))
        return self.read

    def _response(self, name: str, column: str, labels: str, mask: str) -> None:
        """Add the encoder of one response, and the columns that it reads."""
        row, prompt_column = self.row, _present(self.row, "prompt_ids", "prompt_input_ids")
        masks = (labels, mask, f"{name}_attention_mask")
        prompt_masks = ("prompt_attention_mask", "prompt_mask")
        self.read.reads |= {column, *masks, *prompt_masks} | {prompt_column or "prompt_ids"}
        if prompt_column is None and labels not in row:
            input_ids = column.endswith("_input_ids")
            raise missing_column("prompt_input_ids" if input_ids else "prompt_ids", row)

        def encoder() -> Example:
            prompt = token_ids(prompt_column, row[prompt_column]) if prompt_column else ()
            for padding in prompt_masks:
                kept = self._mask(prompt, padding) if prompt_column else None
                if kept is not None:
                    prompt = tuple(token for token, k in zip(prompt, kept, strict=True) if k)
                    break
            ids = token_ids(column, row[column])
            counted = self._counted(ids, labels, mask)
            attended = self._mask(ids, f"{name}_attention_mask")
            if attended is not None:
                kept_ids = [i for i, k in enumerate(attended) if k]
                ids, counted = tuple(ids[i] for i in kept_ids), [counted[i] for i in kept_ids]
            if labels in row:  # the ids hold the prompt, and the labels say where it ends
                return self._masked(ids, counted, name)()
            if not prompt:
                raise ExampleError(
                    f"{prompt_column} must have at least 1 token, got 0: the first token of the "
                    "response is predicted from it; begin the prompt with the BOS token",
                    problem="empty_prompt",
                    field=str(prompt_column),
                )
            if not ids:
                raise EmptyResponseError(
                    f"{column} must have at least 1 token, got 0: there is no log-probability to "
                    "measure; drop the row",
                    field=column,
                )
            return self._after_prompt(prompt, ids, counted, name, (str(prompt_column), column))

        self.read.encoders.append((name, encoder))

    def _after_prompt(
        self,
        prompt: Sequence[int],
        ids: Sequence[int],
        counted: Sequence[bool],
        name: str,
        columns: tuple[str, str],
    ) -> Example:
        """A response to a prompt, which may hold the prompt again."""
        notes, repeated = [], _repeated(prompt, ids)
        if repeated == len(prompt) < len(ids):
            ids, counted = ids[repeated:], counted[repeated:]
            detail = f"{columns[1]} begins with all of {columns[0]}; the prompt is read once"
            notes.append(("prompt_in_response", detail))
        elif repeated > 1 and 2 * repeated >= len(prompt):
            detail = (
                f"{columns[1]} begins with the last {repeated} of the {len(prompt)} tokens of "
                f"{columns[0]}; they count as response"
            )
            notes.append(("prompt_in_response", detail))
        if all(counted):
            return make_example(self.tokenizer, prompt, ids, None, notes, name, self.options)
        whole, mask = (*prompt, *ids), [*([False] * len(prompt)), *counted]
        return self._masked(whole, mask, name, notes)()

    def _masked(
        self,
        ids: Sequence[int],
        counted: Sequence[bool],
        name: str,
        notes: Sequence[tuple[str, str]] = (),
    ) -> Encoder:
        """Encoder of ids with a loss mask; the prompt ends where counting begins."""

        def encoder() -> Example:
            places = [index for index, value in enumerate(counted) if value and index > 0]
            if not places:
                raise EmptyResponseError(
                    f"{name} must count at least 1 token after the first, got none in {len(ids)}: "
                    "the loss mask is empty; drop the row",
                    field=name,
                )
            # Tokens after the last counted one change nothing.
            start, stop = places[0], places[-1] + 1
            mask, response = counted[start:stop], ids[start:stop]
            return make_example(
                self.tokenizer, ids[:start], response, mask, list(notes), name, self.options
            )

        return encoder

    def _mask(self, ids: Sequence[int], column: str) -> list[int] | None:
        """A mask of the row as integers, one per id; None: the row does not have it."""
        if self.row.get(column) is None:
            return None
        values = entries(self.row[column])
        if len(values) != len(ids):
            raise ExampleError(
                f"{column} must have {len(ids)} entries, one per token id, got {len(values)}",
                problem="bad_mask",
                field=column,
            )
        if any(isinstance(value, list | str) or value is None for value in values):
            raise ExampleError(
                f"{column} must have one number per token id, got {values[0]!r:.40}",
                problem="bad_mask",
                field=column,
            )
        return [int(value) for value in values]

    def _counted(self, ids: Sequence[int], labels: str, *masks: str) -> list[bool]:
        """Which tokens are in the loss: those that labels and all masks count."""
        counted = [True] * len(ids)
        for column in masks:
            values = self._mask(ids, column)
            if values is not None:
                counted = [a and bool(b) for a, b in zip(counted, values, strict=True)]
        values = self._mask(ids, labels)
        for index, label in enumerate(values or ()):
            if label not in (IGNORED_LABEL, ids[index]):
                raise ExampleError(
                    f"{labels}[{index}] must be the token id at its place, {ids[index]}, or "
                    f"{IGNORED_LABEL}, got {label}: labels are not shifted in a data set",
                    problem="bad_mask",
                    field=labels,
                )
            counted[index] &= label != IGNORED_LABEL
        return counted

    def _note_masks(
        self, ids: Sequence[int], counted: Sequence[bool], attended: Sequence[int]
    ) -> None:
        """Note masks and positions of an `input_ids` row that a trainer would read differently."""
        lost = sum(c and not a for c, a in zip(counted, attended, strict=True))
        if lost and any(self.row.get(column) is not None for column in MASKS):
            self.read.notes.append(
                (
                    "pad_counted",
                    "labels" if "labels" in self.row else "attention_mask",
                    f"{lost} tokens whose attention_mask is 0 are in the loss of a trainer; they "
                    "are left out here",
                )
            )
        positions = entries(self.row["position_ids"]) if self.row.get("position_ids") else []
        self._note_positions(positions if len(positions) == len(ids) else [], attended)
        restarts = sum(position == 0 for position in positions[1:])
        if restarts and self.row.get("attention_mask") is not None and set(attended) == {1}:
            self.read.notes.append(
                (
                    "packed_attention",
                    "attention_mask",
                    f"position_ids begin {restarts + 1} documents, but attention_mask is all ones: "
                    "a trainer that passes this mask lets each document attend to the earlier "
                    "ones; here they are apart",
                )
            )
        self._note_ends(ids, counted, packed=bool(restarts) or max(attended, default=1) > 1)

    def _note_positions(self, positions: Sequence[int], attended: Sequence[int]) -> None:
        """Note a hole in the attention mask, and positions that do not count from 0."""
        seen = [i for i, a in enumerate(attended) if a]
        holes = [i for i in range(seen[0], seen[-1]) if not attended[i]] if seen else []
        if holes:
            self.read.notes.append(
                (
                    "mask_hole",
                    "attention_mask",
                    f"attention_mask is 0 at index {holes[0]}, between tokens that are attended "
                    "to: lddyn leaves such tokens out, a trainer counts their positions",
                )
            )
        expected = 0
        for i in seen if positions else []:
            expected = 0 if positions[i] == 0 else expected
            if positions[i] != expected:
                self.read.notes.append(
                    (
                        "positions",
                        "position_ids",
                        f"position_ids[{i}] is {positions[i]}, and {expected} here: lddyn counts "
                        "from 0 in each document",
                    )
                )
                return
            expected += 1

    def _note_ends(self, ids: Sequence[int], counted: Sequence[bool], packed: bool) -> None:
        """Note an EOS that the mask leaves out, and a BOS in the middle of the sequence."""
        ends = eos_ids(self.tokenizer, self.options.eos_token)
        pads = as_ids(getattr(self.tokenizer, "pad_token_id", None))
        for i in range(1, len(ids)):
            if ids[i] in ends & pads and counted[i - 1] and not counted[i]:
                self.read.notes.append(
                    (
                        "pad_is_eos",
                        "labels" if "labels" in self.row else "input_ids",
                        f"token id {ids[i]} is pad and EOS, and the mask leaves out the EOS at "
                        f"index {i} as if it were padding",
                    )
                )
                break
        begins = as_ids(getattr(self.tokenizer, "bos_token_id", None))
        inside = [i for i in range(1, len(ids)) if ids[i] in begins and ids[i - 1] in ends]
        if inside and not packed and self.row.get("seq_lengths") is None:
            self.read.notes.append(
                (
                    "packed_hint",
                    "input_ids",
                    f"BOS follows EOS at index {inside[0]}: if documents are packed here, "
                    "position_ids, seq_lengths or an attention_mask of 1, 2, … must say so",
                )
            )

    def _check_prompts(self, chosen: object, rejected: object) -> None:
        """Raise if the prompts that two labelled sequences hold differ."""
        prompts = []
        for side, values in (("chosen", chosen), ("rejected", rejected)):
            ids = token_ids(f"{side}_input_ids", values)
            counted = self._counted(ids, f"{side}_labels", f"{side}_mask")
            first = counted.index(True) if True in counted else len(ids)
            attended = self._mask(ids, f"{side}_attention_mask") or [1] * len(ids)
            prompts.append([ids[i] for i in range(first) if attended[i]])
        if prompts[0] != prompts[1]:
            at = common_prefix_length(*prompts)
            raise ExampleError(
                f"chosen and rejected must have one prompt, got prompts of {len(prompts[0])} and "
                f"{len(prompts[1])} tokens that differ from index {at} on",
                problem="different_prompts",
                field="rejected",
            )


def _present(row: Mapping[str, object], *columns: str) -> str | None:
    """The first of the columns that the row has."""
    return next((column for column in columns if column in row), None)


def _repeated(prompt: Sequence[int], ids: Sequence[int]) -> int:
    """How many of the prompt's last tokens the ids begin with: the most."""
    for length in range(min(len(prompt), len(ids)), 0, -1):
        if list(prompt[-length:]) == list(ids[:length]):
            return length
    return 0


def _documents(row: Row, attended: Sequence[int]) -> list[list[int]]:
    """Indices of each document of a row; one of the whole row if it is not packed."""
    length = len(attended)
    begins = {0}
    if row.get("seq_lengths") is not None:
        ends: list[int] = []
        for size in entries(row["seq_lengths"]):
            ends.append(int(size) + (ends[-1] if ends else 0))
        total = ends[-1] if ends else 0
        if total != length:
            raise ExampleError(
                f"seq_lengths must add up to {length} input ids, got {total}",
                problem="bad_mask",
                field="seq_lengths",
            )
        begins |= set(ends[:-1])
    elif row.get("position_ids") is not None:
        positions = entries(row["position_ids"])
        if len(positions) != length:
            raise ExampleError(
                f"position_ids must have {length} entries, one per token id, got {len(positions)}",
                problem="bad_mask",
                field="position_ids",
            )
        # Padding may have position 0 or 1 throughout; it begins no document.
        begins |= {i for i, position in enumerate(positions) if position == 0 and attended[i]}
    if max(attended, default=1) > 1:
        begins |= {i for i in range(1, length) if attended[i] != attended[i - 1]}
    first = sorted(begins)
    parts = [list(range(a, b)) for a, b in zip(first, [*first[1:], length], strict=True)]
    return [part for part in parts if any(attended[i] for i in part)] or [[]]
