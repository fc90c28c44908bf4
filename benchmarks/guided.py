"""A fuzzer that follows coverage (atheris, on libFuzzer) over rows, stores and saved results.

python benchmarks/guided.py rows --runs 2000 --seed 1

It ends with status 0 after this many executions, each an answer or an error of lddyn's that names
the file; else it prints the input that broke the promise. `make torture` runs it in batches, and
says so where atheris is not installed (pip install atheris).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["lddyn.files", "lddyn.results", "lddyn.data", "lddyn.store"]
):
    import lddyn
    from lddyn.data.audit import audit
    from lddyn.data.read import placed_rows

import chats
import store_torture
import torch

from lddyn.errors import StoreError

Target = tuple[Callable[[bytes], None], list[bytes]]  # what is run, and inputs to begin with


def rows(folder: Path) -> Target:
    """The bytes of a file of rows, audited."""
    tokenizer, path = chats.make_tokenizer(), folder / "rows.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            list(placed_rows(path))
            audit(tokenizer, path, vocab_size=400)
        except lddyn.ExampleError as error:
            assert str(path) in str(error), f"does not name the file: {error}"

    message = {"role": "user", "content": "a"}
    seeds = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "ref_chosen_logps": -1.0},
        {"messages": [message, {"role": "assistant", "content": "b"}]},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    return run, [json.dumps(row).encode() + b"\n" for row in seeds]


def _damaged(folder: Path, load: Callable[[], None]) -> Target:
    """The bytes of one file of a folder after the other, in which all others are whole."""
    kept = {p: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "lock"}
    names = list(kept)

    def run(data: bytes) -> None:
        for path, whole in kept.items():
            path.write_bytes(whole)
        if data:
            names[data[0] % len(names)].write_bytes(data[1:])
        load()

    return run, [bytes([i]) + kept[name] for i, name in enumerate(names)]


def stores(folder: Path) -> Target:
    """Files of a store."""
    truth = store_torture.fill(folder / "s", store_torture.data_set(12), 4, 512).rows().clone()

    def load() -> None:
        try:
            read = lddyn.Store.open(folder / "s").rows()
            assert torch.equal(read, truth), "a store is silently wrong"
        except StoreError as error:
            assert str(folder / "s") in str(error)

    return _damaged(folder / "s", load)


def results(folder: Path) -> Target:
    """Files of a saved result."""
    (folder / "e").mkdir()
    estimate = lddyn.Estimate(torch.arange(9.0), torch.ones(9))
    estimate.save(folder / "e" / "x")

    def load() -> None:
        try:
            read = lddyn.Estimate.load(folder / "e" / "x")
            assert torch.equal(read.value, estimate.value), "a result is silently wrong"
        except ValueError as error:
            assert str(folder / "e") in str(error)

    return _damaged(folder / "e", load)


TARGETS = {"rows": rows, "stores": stores, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="guided-"))
    (folder / "corpus").mkdir()
    run, seeds = TARGETS[options.target](folder)
    for i, seed in enumerate(seeds):
        (folder / "corpus" / str(i)).write_bytes(seed)
    limits = [f"-runs={options.runs}", f"-seed={options.seed}", "-max_len=20000", "-timeout=60"]
    atheris.Setup(["guided", *limits, f"-artifact_prefix={folder}/", str(folder / "corpus")], run)
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
