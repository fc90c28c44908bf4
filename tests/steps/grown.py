"""Memory that a step takes under two limits, measured in a process of its own.

``python tests/steps/grown.py`` prints three sizes in MiB as JSON: the vectors of all weights, and
by how much the process grows while a step is decomposed with ``memory="48MiB"`` and ``"4GiB"``.
A fresh process is needed: freed memory that other work left behind would move the figures.
"""

import json
from pathlib import Path

import torch
import zoo
from influence import resident

import lddyn
from lddyn.memory import return_free_memory


def grown(function):
    """MiB by which resident memory grows while a function runs."""
    return_free_memory()  # it shall not hide what the function takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return (resident("VmHWM") - before) / 2**20


def main():
    """Measure, and print."""
    torch.set_num_threads(1)
    model = zoo.build(
        "llama",
        hidden_size=64,
        head_dim=32,
        intermediate_size=4096,
        num_hidden_layers=2,
        max_position_embeddings=256,
    )
    prompt = [i % 60 for i in range(100)]
    one, two = (
        lddyn.Example(prompt, [i % 60 for i in range(s, 2 * s)], name=str(s)) for s in (4, 12)
    )

    def run(memory, observed=one):
        lddyn.decompose(model, observed, lddyn.SFT(two), lr=1e-3, memory=memory)

    run("48MiB", lddyn.Example([3, 4], [5, 6]))  # libraries load with the first step
    sizes = {x: min(grown(lambda x=x: run(x)) for _ in range(3)) for x in ("48MiB", "4GiB")}
    print(json.dumps({"vectors": sum(p.nbytes for p in model.parameters()) / 2**20, **sizes}))


if __name__ == "__main__":
    main()
