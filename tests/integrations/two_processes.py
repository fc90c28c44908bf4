"""One of two processes that train together, watched and not: `main` is run by test_loop.py."""

import json
import warnings

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lddyn
from lddyn.integrations.loop import Watch

STEPS = 4
PROBES = {
    "one": [lddyn.Example([3, 4], [5, 6]), lddyn.Example([3, 4, 9], [7])],
    "two": [lddyn.Example([3, 4], [8, 2, 2])],
}


def new_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=21,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def alone(model):
    return model, adam(model)


def ddp(model):
    model = DistributedDataParallel(model)
    return model, adam(model)


def accelerated(model):
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model, adam(model))


def fsdp1(model):
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return model, adam(model)


def fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, adam(model)


def train(wrap, folder=None, predict=0, fail=None):
    """Weights after a few steps, what was watched, and what was warned of."""
    model, optimizer = wrap(new_model())
    torch.manual_seed(dist.get_rank())
    generator = torch.Generator().manual_seed(dist.get_rank())
    watch = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if folder is not None:
            probes = PROBES if fail != dist.get_rank() else "no/such/file.jsonl"
            watch = Watch(
                model, optimizer, probes, folder=folder, every=2, budget=1e4, predict=predict
            ).start()
        for _ in range(STEPS):
            ids = torch.randint(1, 21, (2, 8), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if watch is not None:
            watch.close()
    said = [str(w.message) for w in warned if str(w.message).startswith("lddyn")]
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [w.detach().clone() for w in weights], watch.rows if watch else [], said


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, answer = dist.get_rank(), {}
    for wrap in (ddp, accelerated, fsdp1, fsdp2):
        plain, _, _ = train(wrap)
        weights, rows, said = train(wrap, folder / wrap.__name__, predict=1)
        answer[wrap.__name__] = {
            "equal": all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True)),
            "rows": rows,
            "said": said,
        }
    # The second process cannot read its probes: both stop watching, and both go on training.
    weights, rows, said = train(fsdp2, folder / "failed", fail=1)
    equal = all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
    answer["failed"] = {"equal": equal, "rows": rows, "said": said}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()
