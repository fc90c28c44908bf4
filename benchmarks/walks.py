"""Which rooms and modules of lddyn three questions pass, in which order: traced, not told.

python benchmarks/walks.py

A tiny Llama answers an influence table, a diagnosis of pairs and a stored feature. Every call from
one module of lddyn into another is recorded. For each walk it prints the rooms in the order in
which they are entered first, with their modules; then the calls from a room into one of a higher
row (tests/test_package.py, ROOMS). No room imports a higher one, so that these are functions which
the higher room handed down.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import lddyn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "lddyn")


def rows() -> dict[str, int]:
    """Room → its row, lowest first, from the test that holds the arrows."""
    spec = importlib.util.spec_from_file_location("package", ROOT / "tests" / "test_package.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.ROW)


def passes_on(frame) -> bool:
    """Whether a frame only calls what it decorates, or imports a name on its first use."""
    name = frame.f_code.co_qualname
    return name.endswith("undisturbed.<locals>.run") or frame.f_globals["__name__"] == "lddyn.lazy"


class Recorder:
    """Calls between modules of lddyn, in order of their first occurrence."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.calls: dict[tuple[str, str], str] = {}

    def profile(self, frame, event, arg) -> None:  # the signature of sys.setprofile
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if frame.f_code.co_name == "<module>" or passes_on(frame):
            return
        module, caller = frame.f_globals["__name__"], frame.f_back
        while caller is not None and (
            not caller.f_code.co_filename.startswith(PACKAGE) or passes_on(caller)
        ):
            caller = caller.f_back
        if module not in self.modules:
            self.modules.append(module)
        origin = caller.f_globals["__name__"] if caller is not None else ""
        if origin not in ("", module):
            self.calls.setdefault((origin, module), frame.f_code.co_qualname)

    def record(self, call: Callable[[], object]) -> None:
        """Run it once for imports and caches, then once under the profiler."""
        call()
        sys.setprofile(self.profile)
        try:
            call()
        finally:
            sys.setprofile(None)


def room_of(module: str) -> str:
    """lddyn.ops.gram → ops."""
    return module.split(".")[1] if "." in module else module


def show(title: str, recorder: Recorder, row: dict[str, int]) -> None:
    """Print one walk."""
    order: dict[str, list[str]] = {}
    for module in recorder.modules:
        order.setdefault(room_of(module), []).append(module.split(".", 2)[-1])
    print(f"\n{title}")
    for room, modules in order.items():
        print(f"  {room:12} {', '.join(dict.fromkeys(modules))}")
    for (origin, module), name in recorder.calls.items():
        if row[room_of(module)] > row[room_of(origin)]:
            print(f"  handed down to {origin} by {module}: {name}")


def main() -> None:
    """Command line."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()

    def example(seed: int) -> lddyn.Example:
        ids = torch.randint(3, 89, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        return lddyn.Example(prompt_ids=ids[:4], response_ids=ids[4:])

    examples = [example(seed) for seed in range(8)]
    pairs = list(zip(examples[::2], examples[1::2], strict=True))
    dpo, sketch, row = lddyn.DPO(*pairs[0], beta=0.1), lddyn.Sketch(k=1024), rows()
    with tempfile.TemporaryDirectory() as folder:
        stores = iter(range(9))

        def stored_feature() -> None:
            place = Path(folder, str(next(stores)))
            lddyn.store.build.build_store(model, examples, place, sketch)

        walks: dict[str, Callable[[], object]] = {
            "an influence table": lambda: (
                lddyn.decompose(model, [pairs[0][0]], dpo, 1e-3)[0].influence
            ),
            "a diagnosis": lambda: lddyn.diagnose(model, pairs, "dpo", beta=0.1),
            "a stored feature": stored_feature,
        }
        for title, call in walks.items():
            recorder = Recorder()
            recorder.record(call)
            show(title, recorder, row)


if __name__ == "__main__":
    main()
