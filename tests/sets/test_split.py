"""Models whose weights are not all in one process's memory: FSDP2, and accelerate's offloading."""

import json
import sys

import pytest
import torch
import zoo
from preference_pairs import some_pairs
from ranks import run_ranks
from torch import distributed
from torch.distributed.fsdp import fully_shard

import lddyn
from lddyn.errors import UnsupportedModelError

RUN = lddyn.Run(lr=1e-3, epochs=1, batch=2, weight_decay=0.1, max_grad_norm=1.0)
SKETCH = lddyn.Sketch(k=1024)
PAIRS = some_pairs()[:2]


def small(seed=0):
    return zoo.build("llama", seed=seed, num_hidden_layers=1).eval()


def numbers(model, reference, sketch=None):
    options = {"observe": [PAIRS[0][1]], "run": RUN, "reference": reference, "sketch": sketch}
    diagnosis = lddyn.diagnose(model, PAIRS, close_ups=0, **options)
    run, step = diagnosis.forecast, diagnosis.step
    told = {"gram": diagnosis.gram, "change": run.change, "effects": run.effects}
    told["second moment"] = torch.tensor(diagnosis.adam.second_moment)
    told |= {"observed": run.observed, "reference": step.reference}
    return {name: value.tolist() for name, value in told.items()}


def largest_error(one, other):
    errors = {}
    for name, values in one.items():
        a, b = torch.tensor(values), torch.tensor(other[name])
        errors[name] = float((a - b).abs().max() / a.abs().max())
    return errors


@pytest.mark.skipif(sys.platform != "linux", reason="forks with threads of BLAS")
@pytest.mark.case("a diagnosis of a model that FSDP 2 splits over two processes")
def test_a_split_model_has_the_diagnosis_of_the_whole_one(tmp_path):
    alone, alone_sketched = (numbers(small(), small(1), sketch) for sketch in (None, SKETCH))

    def work():
        distributed.init_process_group("gloo")
        split = []
        for seed in (0, 1):
            model = small(seed)
            for layer in model.model.layers:
                fully_shard(layer)
            split.append(fully_shard(model))
        model, reference = split
        before = [p.to_local().clone() for p in model.parameters()]
        kept = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        told = numbers(model, reference)
        assert model.lm_head.weight.grad is kept
        sketched = numbers(model, reference, SKETCH)
        for old, new in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, new.to_local())
        refused = []
        try:
            lddyn.diagnose(model, PAIRS[distributed.get_rank() :], close_ups=0)
        except RuntimeError as error:
            refused.append(str(error))
        part, some = small().model.layers[0], small()
        some.model.layers[0] = fully_shard(part)
        try:
            lddyn.diagnose(some, PAIRS, close_ups=0)
        except UnsupportedModelError as error:
            refused.append(str(error))
        print(json.dumps([told, sketched, refused]))

    first, second = run_ranks(work, tmp_path)
    assert first == second
    told, sketched, refused = json.loads(first)
    assert max(largest_error(alone, told).values()) < 2e-5
    one, other = (torch.tensor(told["gram"]) for told in (alone_sketched, sketched))
    scale = one.diagonal().sqrt()  # random numbers differ, and so do their errors
    assert float(((one - other).abs() / scale / scale[:, None]).max()) < 7 * SKETCH.k**-0.5
    assert largest_error(alone_sketched, sketched)["second moment"] < 1e-5
    assert largest_error(alone_sketched, sketched)["change"] < 0.3
    assert "model and rows must be the same in all 2 processes" in refused[0]
    assert "is whole, expected all trainable parameters to be split" in refused[1]


@pytest.mark.case("LoRA on a model whose frozen weights accelerate offloads to disk")
def test_frozen_weights_may_be_offloaded_and_trainable_ones_not(tmp_path):
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()

    def offloaded():
        model = small()
        modules = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        places = {n: "disk" if "mlp" in n or "embed" in n else "cpu" for n in modules}
        return accelerate.dispatch_model(
            model, device_map=places, main_device="cpu", offload_dir=tmp_path
        )

    model = adapted(offloaded())
    assert any(p.is_meta for p in model.parameters())
    both = [numbers(m, "adapter-off") for m in (adapted(small()), model)]
    assert max(largest_error(*both).values()) < 1e-4
    with pytest.raises(UnsupportedModelError, match=r"trains and is offloaded.*train an adapter"):
        lddyn.diagnose(offloaded(), PAIRS)
