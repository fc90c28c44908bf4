"""Tokenizers of the tests of data: a small trained one, and that of a real model with its rows."""

from pathlib import Path

import pytest
from chats import make_tokenizer

from lddyn.data.read import rows

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer():
    """A tokenizer of the test's own, so that the test may set its template."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def hh():
    model, probes = SHARED / "models/hh-llama-2m", SHARED / "data/hh-helpful/probes.jsonl"
    if not (model / "tokenizer.json").is_file() or not probes.is_file():
        pytest.skip(f"{SHARED} has no hh-llama-2m tokenizer or no hh-helpful probes")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True), rows(probes)
