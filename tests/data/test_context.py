"""The longest sequence of a model, as configs write it."""

from __future__ import annotations

import types

import pytest

from lddyn.data.context import position_limit

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.case("no context length")
@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048.0}, 2048),
        ({"max_position_embeddings": -1}, None),  # XLNet
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 10**30}, None),
        ({}, None),
        ({"max_position_embeddings": 2048, "rope_parameters": DYNAMIC}, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": DYNAMIC}}, None),
    ],
)
def test_position_limit(config: dict[str, object], limit: int | None) -> None:
    text = types.SimpleNamespace(**config)
    assert position_limit(text) == limit
    assert position_limit(types.SimpleNamespace(text_config=text)) == limit


def test_config_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert position_limit(transformers.XLNetConfig()) is None
    assert position_limit(transformers.LlamaConfig(max_position_embeddings=7)) == 7
