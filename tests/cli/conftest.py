"""A tiny model with a tokenizer made here, and data files."""

import json

import pytest
import torch
import zoo
from commands import ROW
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<eos>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "?", "!"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="!"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="!"
    )
    tokenizer.save_pretrained(path)
    zoo.build("llama", eos_token_id=0, bos_token_id=None).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    same = {**ROW, "rejected": ROW["chosen"]}
    lengthy = {"prompt": "a " * 80, "chosen": " b", "rejected": " c"}
    wide = {"prompt_ids": [3, 4], "chosen_ids": [5, 88888], "rejected_ids": [6, 0]}
    prepared = {"prompt_ids": [3, 4], "chosen_ids": [5, 7, 0], "rejected_ids": [6, 0]}
    completion = {"prompt": "a b ?", "completion": " c d"}
    lines = [ROW, same, lengthy, wide, prepared, completion, {"text": "a b c d"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + "{not json\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Five rows, the last one like the first."""
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    rows = [{**ROW, "prompt": f"a {w} c ?"} for w in "bcdeb"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
