"""Merging the stores of several processes into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from lddyn.data.token_table import COLUMNS
from lddyn.errors import StoreError
from lddyn.store.contents import Contents

if TYPE_CHECKING:
    from lddyn.store.writer import Writer

Source = tuple[int, Contents]  # index of an example in the data set, and the store that has it


def sources(stores: Sequence[Contents]) -> dict[str, Source]:
    """Content id → where to take an example from, in the order of the data set.

    An example that several stores have is taken at its lowest index.

    Raises:
        StoreError: If two examples have one index, or one example has different rows.
    """
    best: dict[str, Source] = {}
    for store in stores:
        for name, place in store.places.items():
            if name in best:
                check_same(name, best[name][1], store)
            if name not in best or place.index < best[name][0]:
                best[name] = place.index, store
    order = sorted(best, key=lambda name: best[name][0])
    for one, other in pairwise(order):
        if best[one][0] == best[other][0]:
            raise _same_index(one, *best[one], other, best[other][1])
    return {name: best[name] for name in order}


def copy_missing(target: Writer, best: Mapping[str, Source]) -> None:
    """Appends to a store the examples that it does not have.

    Raises:
        StoreError: If the store has other rows for an example, or its index for another one.
    """
    contents = target.contents
    missing = {name: source for name, source in best.items() if name not in contents.places}
    for name, (index, store) in best.items():
        taken = contents.at(index)
        if name not in missing:
            check_same(name, contents, store)
        elif taken is not None:
            raise _same_index(taken, index, contents, name, store)
    for name, (index, store) in missing.items():
        place = store.places[name]
        start, stop = place.start, place.start + place.count
        table = store.tokens(start, stop)
        columns = {column: getattr(table, column) for column in COLUMNS}
        target.append(name, store.rows(start, stop), columns, index)


def check_same(name: str, one: Contents, other: Contents) -> None:
    """A StoreError unless an example has the same rows in both stores."""
    a, b = (slice(p.start, p.start + p.count) for p in (one.places[name], other.places[name]))
    ta, tb = one.tokens(a.start, a.stop), other.tokens(b.start, b.stop)
    same = torch.equal(one.rows(a.start, a.stop), other.rows(b.start, b.stop)) and all(
        torch.equal(getattr(ta, column), getattr(tb, column)) for column in COLUMNS
    )
    if not same:
        raise StoreError(
            f"example {name} has different rows in {one.shards.path} and {other.shards.path}"
        )


def _same_index(one: str, index: int, first: Contents, other: str, second: Contents) -> StoreError:
    return StoreError(
        f"index {index} belongs to {one} in {first.shards.path} and to {other} in "
        f"{second.shards.path}: append with index=, the place in the data set"
    )
