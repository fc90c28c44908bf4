"""The rows of a store in an index of faiss."""

from __future__ import annotations

from typing import Any

from lddyn.store.contents import Contents


def faiss_index(contents: Contents, factory: str) -> Any:
    """A faiss index of all rows by inner product; see `Store.to_faiss`."""
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ImportError("to_faiss needs faiss: pip install faiss-cpu") from None
    index = faiss.index_factory(contents.shards.width, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(contents.rows().float().numpy())
    for number in range(len(contents.records)):
        index.add(contents.shard(number).rows.float().numpy())
    return index
