"""Writing gradients into feature rows: each parameter's gradient into its part of the layout."""

from __future__ import annotations

from torch import Tensor

from lddyn.engine.factors import HeadFactor
from lddyn.errors import UnsupportedModelError
from lddyn.sketches.allocation import use_of
from lddyn.sketches.gradients import Gradients, base_name, head_sides, wide
from lddyn.sketches.layout import Layout, Part
from lddyn.sketches.projections import (
    Stream,
    Term,
    count_sketch,
    hashed_rows,
    low_rank,
    single,
    weigh,
)


class RowWriter:
    """Adds gradients, sketched, to feature rows; a `Visit` for the visits of `gradients`.

    Args:
        rows: Zeros (n, layout.width) that the gradients are added to.
        layout: What a row stores of each parameter.
        together: Whether a row is a whole sequence.
    """

    def __init__(self, rows: Tensor, layout: Layout, together: bool) -> None:
        self.rows, self.layout, self.together = rows, layout, together
        self.parts: dict[str, dict[str, Part]] = {}
        for part in layout.parts:
            self.parts.setdefault(part.name, {})[part.kind] = part

    def __call__(self, selected: Tensor, gradients: Gradients) -> None:
        """Adds the gradients of one segment to the selected rows."""
        for name, terms in gradients.weights.items():
            self._weight(selected, name, terms)
        for name, vector in gradients.vectors.items():
            self._vector(selected, name, vector)
        head = gradients.head
        if head is not None and (head.weight or head.bias):
            (self._summed_head if self.together else self._head)(selected, head)

    def _add(self, selected: Tensor, part: Part, numbers: Tensor) -> None:
        rows = self.rows if part.kind == "exact" else self.layout.repeated(self.rows)
        place = self.layout.places[part.name, part.kind]
        rows[..., place].index_add_(0, selected, numbers.to(rows))

    def _vector(self, selected: Tensor, name: str, vector: Tensor) -> None:
        part, numbers = self._part(name, "vector"), vector
        if part.kind != "exact":
            term = Term(vector[:, None], vector.new_ones(len(vector), 1, 1))
            numbers = self.layout.sketch.project(name, [term], part.shape, part.sizes)
        self._add(selected, part, numbers)

    def _weight(self, selected: Tensor, name: str, terms: list[Term]) -> None:
        sketch = self.layout.sketch
        part = self._part(name, use_of(name, terms))
        if part.kind == "exact":
            for c in range(len(selected)):  # one at a time: each is as large as the weight
                whole = weigh(terms, c, part.shape[0]).view(1, -1)
                self._add(selected[c : c + 1], part, whole)
            return
        if part.kind == "summed":
            for term in terms:
                left = term.left if term.left.dim() == 3 else term.left[None]
                self._add(selected, part, self._hashed(part, left, term.right))
            return
        # The "outer" part under the name of a tied embedding belongs to the head.
        outer = None if part.kind == "onehot" else self.parts[part.name].get("outer")
        if outer is not None:
            form = self._low_rank(selected, name, terms, outer)
            if part is outer:
                _check_outer(name, terms, form)
                return
            minus = self.parts[name]["minus"]
            low = [Term(*form)]
            self._add(selected, minus, sketch.project(name, low, minus.shape, minus.sizes))
        # Each packed expert has a random stream of its own and shares its parameter's numbers.
        self._add(selected, part, sketch.project(name, terms, part.shape, part.sizes))

    def _low_rank(
        self, selected: Tensor, name: str, terms: list[Term], outer: Part
    ) -> tuple[Tensor, Tensor]:
        """Stores the low-rank form U Vᵀ of each gradient and returns (U, V)."""
        sketch = self.layout.sketch
        stream = Stream(sketch.seed, name, sketch.repeats)
        form = low_rank(stream, terms, outer.shape, outer.sizes[0])
        for place, side in zip(self.layout.pair(self.rows, outer), form, strict=True):
            place[selected] = side.to(place)
        return form

    def _head(self, selected: Tensor, head: HeadFactor) -> None:
        sketch = self.layout.sketch
        name = head.weight or head.bias or ""
        stream = Stream(sketch.seed, name, sketch.repeats)
        part = self._part(name, "head")
        h, v = head_sides(head)
        left, right = self.layout.pair(self.rows, part)
        right[selected, 0] = h
        whole = part.kind == "outer"
        left[selected] = v[:, None] if whole else count_sketch(stream, v, part.sizes[0])
        tied = self.parts[name].get("minus")
        if tied is not None:
            hidden = wide(head.hidden)[:, None]
            own = hashed_rows(stream, v[:, None], hidden, tied.sizes).flatten(2)
            self._add(selected, tied, own)
            self._add(selected, self.parts[name]["onehot"], own)

    def _summed_head(self, selected: Tensor, head: HeadFactor) -> None:
        """Adds Σ_m v_m ⊗ h_m over all tokens of a sequence."""
        v, h = wide(head.rows)[None], wide(head.hidden)[None]
        if head.bias is not None:
            self._vector(selected, head.bias, v.sum(1))
        if head.weight is None:
            return
        part = self._part(head.weight, "summed")
        numbers = (v.mT @ h).flatten(1) if part.kind == "exact" else self._hashed(part, v, h)
        self._add(selected, part, numbers)

    def _hashed(self, part: Part, left: Tensor, right: Tensor) -> Tensor:
        """Sketches of Σ_t left[t] ⊗ right[t] with hashed rows; all rows where a part has room."""
        sketch, summed = self.layout.sketch, part.kind == "summed"
        name = f"{part.name}\0sum" if summed else part.name
        stream = Stream(sketch.seed, name, sketch.repeats)
        whole = summed and part.sizes[0] == part.shape[0]
        return hashed_rows(stream, left, right, part.sizes, whole).flatten(2)

    def _part(self, name: str, use: str) -> Part:
        """The part that stores a parameter's gradients."""
        parts = self.parts.get(base_name(name), {})
        others = {
            "sketch": ("exact", "outer", "summed"),
            "head": ("outer",),
            "summed": ("exact", "onehot"),
        }.get(use, ("exact",))
        part = next((parts[kind] for kind in (use, *others) if kind in parts), None)
        if part is None:
            raise UnsupportedModelError(
                f"the layout has no part for {name} as a {use}: it was made for another model, or "
                "none of the examples that it was made with reached this parameter; make it with "
                "other examples"
            )
        return part


def _check_outer(name: str, terms: list[Term], form: tuple[Tensor, Tensor]) -> None:
    """An UnsupportedModelError unless each gradient is the outer product that is stored for it."""
    u, v = form
    for c in range(0 if single(terms) else len(u)):
        whole = weigh(terms, c, u.shape[2])
        if float((whole - u[c].T @ v[c]).norm()) > 1e-3 * float(whole.norm()):
            raise UnsupportedModelError(
                f"the gradients of {name} were outer products in the examples of the layout, and "
                "are none here: give `choose_layout` examples like this one"
            )
