"""Features: rows of numbers whose inner products estimate those of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.token_table import COLUMNS, TokenTable, arrow_table, sequence_table
from lddyn.estimate import Estimate
from lddyn.files import JsonObject, json_safe
from lddyn.results import Result, load_result, save_result
from lddyn.sketches.layout import Layout, Part
from lddyn.sketches.projections import haar, hashed
from lddyn.text import bytes_text

if TYPE_CHECKING:
    import pyarrow

PAIRS = 1 << 22  # of rows, times repeats, that are compared at a time

_COLUMNS = ("example_index", *COLUMNS)

_FORMAT = 1


@dataclass(frozen=True)
class Features(Result):
    """Rows of token gradients, or of whole sequences' gradients. Made by `lddyn.features`.

    `rows.numpy()`, DLPack (`jax.dlpack.from_dlpack(rows)`) and `to_arrow()` share the memory of the
    rows; `vectors()` returns plain vectors for tools that compute inner products themselves.

    Attributes:
        rows: (N, layout.width).
        tokens: Example, index in the response, position and token id of each row; −1 for whole
            sequences.
        layout: What a row is made of, and how two rows are compared.
    """

    rows: Tensor
    tokens: TokenTable
    layout: Layout

    def __len__(self) -> int:
        """N, number of rows."""
        return len(self.rows)

    @property
    def by(self) -> str:
        """What a row is: `"token"` or `"sequence"`."""
        whole = len(self) > 0 and bool((self.tokens.response_index < 0).all())
        return "sequence" if whole else "token"

    def __repr__(self) -> str:
        sequences = f"{len(set(self.tokens.example_id))} sequences"
        rows = sequences if self.by == "sequence" else f"{len(self)} tokens of {sequences}"
        sketch = self.layout.sketch
        return (
            f"Features({rows}, {self.layout.width:,} numbers each, "
            f"{str(self.rows.dtype).removeprefix('torch.')}; {sketch.kind}, k = {sketch.k:,})"
        )

    def summary(self) -> JsonObject:
        """Numbers of rows and examples, width, bytes and the sketch's kind and size; JSON-safe."""
        sketch = self.layout.sketch
        return {
            "by": self.by,
            "rows": len(self),
            "examples": len(set(self.tokens.example_id)),
            "width": self.layout.width,
            "dtype": str(self.rows.dtype).removeprefix("torch."),
            "bytes": self.rows.nbytes,
            "kind": sketch.kind,
            "k": sketch.k,
            "repeats": sketch.repeats,
        }

    def explain(self) -> str:
        """What the rows are, what they store of each parameter, and how to compare them."""
        return "\n".join(
            [
                repr(self),
                f"{bytes_text(self.rows.nbytes)} in all; {self.layout.explain()}",
                "gram() compares the rows: inner products of gradients with standard errors",
            ]
        )

    def to_dict(self) -> JsonObject:
        """Rows, token table and layout, JSON-safe; `save` is smaller."""
        columns = {name: getattr(self.tokens, name).tolist() for name in _COLUMNS}
        return {
            "rows": json_safe(self.rows.tolist()),
            "tokens": {"example_id": list(self.tokens.example_id)} | columns,
            "layout": self.layout.to_dict(),
        }

    def gram(self, other: Features | None = None) -> Estimate:
        """Estimated inner products ⟨gradient of row i, gradient of row j⟩.

        Args:
            other: Features of the same layout, whose rows are the columns j. None: these.

        Returns:
            Estimate (N, N'), with standard errors.

        Raises:
            ValueError: If the layouts differ: such rows cannot be compared.

        Cost: 4 N N' width FLOPs.
        """
        other = self if other is None else other
        if other.layout != self.layout:
            raise ValueError(
                "other has another layout, so its rows cannot be compared with these: make both "
                "with the same layout=…"
            )
        step = max(1, PAIRS // (self.layout.sketch.repeats * max(1, len(other))))
        parts = [self.layout.estimate(part, other.rows) for part in self.rows.split(step)]
        return Estimate(
            torch.cat([part.value for part in parts]),
            torch.cat([part.stderr for part in parts]),
            parts[0].samples,
        )

    def vectors(self) -> Tensor:
        """Plain vectors (N, width) whose inner products are `gram().value`, for other tools.

        This is `rows` itself, no copy, where nothing is sketched.

        Raises:
            ValueError: If the layout holds outer products, as layouts of tokens do: make the rows
                with `by="sequence"`, sum them with `per_sequence`, or use `gram` as a kernel.

        Example:
            >>> import lddyn, transformers
            >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16,
            ...     intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
            >>> model = transformers.LlamaForCausalLM(config)
            >>> exs = [lddyn.Example(prompt_ids=[1, 2], response_ids=[i, 5]) for i in (3, 4)]
            >>> feats = lddyn.features(model, exs, lddyn.Sketch(k=1024), by="sequence")
            >>> x = feats.vectors().numpy()
            >>> bool((abs(x @ x.T - feats.gram().value.numpy()) < 1e-4 * abs(x @ x.T).max()).all())
            True
        """
        layout = self.layout
        if not layout.linear or any(part.kind == "minus" for part in layout.parts):
            raise ValueError(
                "vectors needs rows of whole sequences, whose inner product is a plain one; these "
                'hold outer products of tokens: features(…, by="sequence"), or per_sequence()'
            )
        exact = layout.exact(self.rows)
        if exact.shape[1] == layout.width:
            return self.rows
        sketched = layout.repeated(self.rows).flatten(1) / layout.sketch.repeats**0.5
        return torch.cat([exact, sketched], 1)

    def to_arrow(self) -> pyarrow.Table:
        """Token table and rows as an Arrow table, with the columns of `Store.to_arrow`.

        The column `features` is a view of rows that are on the CPU.

        Raises:
            ImportError: If pyarrow is not installed.
        """
        return arrow_table([(self.tokens, self.rows)], self.layout.width, self.rows.dtype)

    def per_sequence(self) -> Features:
        """Rows of whole sequences: the sums of their tokens' rows, for Σ_m w_m ∇ log π(y_m).

        Returns:
            Features with one row an example, in order, of the layout `layout.summed()`.
        """
        layout, new = self.layout, self.layout.summed()
        owner, index = torch.unique(self.tokens.example_index, return_inverse=True)
        index = index.to(self.rows.device)

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(len(owner), *x.shape[1:]).index_add_(0, index, x)

        rows = self.rows.new_zeros(len(owner), new.width)
        new.exact(rows)[:] = total(layout.exact(self.rows))
        for part in new.parts:
            place = new.repeated(rows)[..., new.places[part.name, part.kind]]
            if part.kind == "summed" and (part.name, "summed") not in layout.places:
                outer = next(p for p in layout.parts if p.name == part.name)
                place[:] = self._summed(outer, part.sizes, index, len(owner))
            elif part.kind != "exact":
                old = layout.places[part.name, part.kind]
                place[:] = total(layout.repeated(self.rows)[..., old])
        first = [int((self.tokens.example_index == i).nonzero()[0]) for i in owner]
        names = [self.tokens.example_id[i] for i in first]
        return Features(rows, sequence_table(names, owner), new)

    def _summed(self, part: Part, sizes: tuple[int, int], index: Tensor, count: int) -> Tensor:
        """Σ_m (S v_m) ⊗ (S' h_m) of each sequence (count, R, numbers), for one outer product."""
        sketch, name = self.layout.sketch, f"{part.name}\0sum"
        v, h = self.layout.pair(self.rows, part)
        frames = haar(sketch.seed, name, "right", sketch.repeats, sizes[1], part.shape[1]).to(h)
        where, sign = hashed(sketch.seed, name, "left hash", sketch.repeats, sizes[0], v.shape[2])
        out = h.new_zeros(count, sketch.repeats, sizes[0] * sizes[1])
        for repeat in range(sketch.repeats):
            left = v[:, repeat % v.shape[1]]
            if sizes[0] < v.shape[2]:
                moved = left.new_zeros(len(left), sizes[0])
                signed = left * sign[repeat].to(left)
                left = moved.index_add_(1, where[repeat].to(left.device), signed)
            both = left[:, :, None] * (h[:, 0] @ frames[repeat].T)[:, None, :]
            out[:, repeat].index_add_(0, index, both.flatten(1))
        return out

    def save(self, path: str | Path) -> None:
        """Writes `path`.json (layout, examples) and its tensors (rows and token table)."""
        columns = {name: getattr(self.tokens, name) for name in _COLUMNS}
        facts = {"layout": self.layout.to_dict(), "example_id": self.tokens.example_id}
        save_result(path, "lddyn.Features", _FORMAT, {"rows": self.rows} | columns, facts)

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Features from the files that `save` wrote.

        Raises:
            ValueError: If one of the two files is missing or damaged, they do not fit each other,
                or another version of lddyn wrote them.
        """
        tensors, facts = load_result(path, "lddyn.Features", _FORMAT)
        layout = Layout.from_dict(facts["layout"])
        names, rows = facts["example_id"], tensors["rows"]
        if tuple(rows.shape) != (len(names), layout.width):
            raise ValueError(
                f"{path}: rows must be ({len(names)}, {layout.width}) by its JSON file, got "
                f"{tuple(rows.shape)}; the two files are not of one save"
            )
        return cls(rows, TokenTable(names, *(tensors[name] for name in _COLUMNS)), layout)
