"""Token features: one row of numbers per response token, whose inner products estimate the NTK.

N sequences cost N passes, not N² pairs: every token's gradient is pulled back once, block by block,
sketched where it stands, and forgotten.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lddyn.data.token_table import COLUMNS, TokenTable, arrow_table
from lddyn.estimate import Estimate
from lddyn.sketches.layout import Layout, Part
from lddyn.sketches.projections import (
    haar,
    hashed,
)

if TYPE_CHECKING:
    import pyarrow

from lddyn.data.token_table import sequence_table

CHUNK = 16

PAIRS = 1 << 22  # of tokens, times repeats, that are compared at a time


@dataclass(frozen=True)
class Features:
    """Rows of token gradients, what tokens they are, and how they are compared. See `features`.

    `rows.numpy()`, DLPack (`jax.dlpack.from_dlpack(rows)`) and `to_arrow()` share its memory;
    `vectors()` are what a tool for plain vectors takes.

    Attributes:
        rows: (N, layout.width).
        tokens: Example, place, position and id of each row; −1 for whole sequences.
        layout: How two rows make an inner product.
    """

    rows: Tensor
    tokens: TokenTable
    layout: Layout

    def __len__(self) -> int:
        """N, number of rows."""
        return len(self.rows)

    def gram(self, other: Features | None = None) -> Estimate:
        """⟨gradient of row i, gradient of row j⟩ of these rows with themselves, or with others.

        Args:
            other: Features of the same layout.

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
        found = [self.layout.estimate(part, other.rows) for part in self.rows.split(step)]
        return Estimate(
            torch.cat([e.value for e in found]),
            torch.cat([e.stderr for e in found]),
            found[0].samples,
        )

    def vectors(self) -> Tensor:
        """Plain vectors (N, width) whose inner products are `gram().value`, for other tools.

        Where there are no sketched parts this is `rows` itself, no copy.

        Raises:
            ValueError: If there are none: rows of tokens keep outer products (make them with
                `by="sequence"`, or sum them with `per_sequence`; or use `gram` as a kernel).

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
                "vectors needs rows of whole sequences: their inner product is a plain one; these "
                'keep outer products of tokens: features(…, by="sequence"), or per_sequence()'
            )
        exact = layout.exact(self.rows)
        if exact.shape[1] == layout.width:
            return self.rows
        sketched = layout.repeated(self.rows).flatten(1) / layout.sketch.repeats**0.5
        return torch.cat([exact, sketched], 1)

    def to_arrow(self) -> pyarrow.Table:
        """Token table and rows as an Arrow table of one chunk, as by `Store.to_arrow`.

        The column `features` is a view of `rows` on the CPU.

        Raises:
            ImportError: If pyarrow is not installed.
        """
        return arrow_table([(self.tokens, self.rows)], self.layout.width, self.rows.dtype)

    def per_sequence(self) -> Features:
        """The rows of whole sequences: sums over their tokens, of Σ_m w_m ∇ log π(y_m).

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
        """Writes `path`.safetensors (rows and token table) and `path`.json (layout, examples)."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: getattr(self.tokens, name) for name in _COLUMNS}
        tensors = {"rows": self.rows} | columns
        save_file(
            {name: x.contiguous().cpu() for name, x in tensors.items()},
            path.with_name(path.name + ".safetensors"),
        )
        described = {"layout": self.layout.to_json(), "example_id": self.tokens.example_id}
        path.with_name(path.name + ".json").write_text(json.dumps(described), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If one of the two files is not there.
            ValueError: If they do not fit each other, or are of another version.
        """
        from safetensors.torch import load_file

        path = Path(path)
        text = path.with_name(path.name + ".json").read_text(encoding="utf-8")
        tensors = load_file(path.with_name(path.name + ".safetensors"))
        described = json.loads(text)
        layout = Layout.from_json(described["layout"])
        names, rows = described["example_id"], tensors["rows"]
        if tuple(rows.shape) != (len(names), layout.width):
            raise ValueError(
                f"{path}: rows must be ({len(names)}, {layout.width}) by its JSON file, got "
                f"{tuple(rows.shape)}; the two files are not of one save"
            )
        return cls(rows, TokenTable(names, *(tensors[name] for name in _COLUMNS)), layout)


_COLUMNS = ("example_index", *COLUMNS)


WINDOW = 64  # whole sequences that are made before a store has them: enough for batches
