"""What the tests of stores share: an identity, an inner product, a filled store."""

import torch
from store_torture import data_set, features, fill

from lddyn import Estimate

IDENTITY = {"model": {"weights": "abc", "config": "def"}, "tokenizer": "t"}


class Repeats:
    """A stand-in for a sketch's layout: the mean of independent repeats, with its error."""

    def __init__(self, width, repeats=2, scale=1.0, linear=None):
        self.width, self.repeats, self.scale = width, repeats, scale
        if linear is not None:
            self.linear = linear

    def _parts(self, a, b):
        shape = (-1, self.repeats, self.width // self.repeats)
        return torch.einsum("nrk,mrk->nmr", a.view(shape), b.view(shape)) * self.scale

    def value(self, a, b):
        return self._parts(a, b).mean(2)

    def estimate(self, a, b):
        parts = self._parts(a, b)
        return Estimate(parts.mean(2), parts.std(2) / self.repeats**0.5, self.repeats)

    def to_dict(self):
        return {"kind": "repeats", "repeats": self.repeats, "scale": self.scale}


def filled_store(path):
    """A store of 12 examples in several shards, and its data."""
    examples = data_set(700)[:12]
    store = fill(path, examples, 6, 1024)
    assert store.n_shards > 3
    return store, examples


def expected(examples, width=6, dtype=torch.float32):
    return torch.cat([features(i, len(e), width) for i, e in enumerate(examples)]).to(dtype)
