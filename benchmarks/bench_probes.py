"""The probe pass against the authors' batches of one, on the demo's probes; one thread.

`python benchmarks/bench_probes.py MODEL PROBES.jsonl [PROMPTS]` compares them on a user's.
"""

import json
import sys

import pytest
import torch

from lddyn.lab.probes.measure import compare, one_by_one
from lddyn.lab.setting import embedded, one_thread
from lddyn.probes.measure import measure
from lddyn.probes.probe_set import ProbeSet


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, rows, _ = embedded(0, progress=False)
    return model, ProbeSet(rows.rows[:40]).encode(tokenizer).examples


@pytest.mark.parametrize("run_pass", [measure, one_by_one], ids=["shared", "one_by_one"])
def bench_probe_pass(benchmark, demo, run_pass):
    model, examples = demo
    with one_thread():
        benchmark(run_pass, model, examples)


def main(name, data, prompts="30"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    probes = ProbeSet.read(data, limit=int(prompts))
    fields = [field for field in probes.fields if field != "chosen_selfr"]
    encoded = probes.encode(AutoTokenizer.from_pretrained(name), fields=fields)
    with one_thread():
        print(json.dumps(compare(model, encoded), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
