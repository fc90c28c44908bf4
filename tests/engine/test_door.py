"""Models as trainers hold them: wrappers, hooks, replaced forwards, against plain autograd."""

import functools
import types

import accelerate
import peft
import pytest
import torch
import zoo
from torch import nn

import lddyn
from lddyn.engine import door
from lddyn.engine.anatomy import Anatomy
from lddyn.errors import UnrepeatableModelError, UnsupportedModelError

CHOSEN = lddyn.Example([5, 9, 33], [7, 41, 8], name="chosen")
REJECTED = lddyn.Example([5, 9, 33], [12, 2], name="rejected")
RATE = 1e-3


def log_prob(model, example):
    logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
    return logits.log_softmax(-1)[list(example.positions), list(example.targets)].sum()


def predicted(model):
    """−η ⟨∇ log π(y), ∇L⟩ of both responses by autograd; L is the sum over the chosen tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    chosen, rejected = (
        torch.autograd.grad(log_prob(model, e), parameters, allow_unused=True)
        for e in (CHOSEN, REJECTED)
    )
    pairs = [
        [(a, b) for a, b in zip(chosen, g, strict=True) if None not in (a, b)]
        for g in (chosen, rejected)
    ]
    return [RATE * sum(float((a * b).sum()) for a, b in pair) for pair in pairs]


def decomposed(model, lr=RATE, **options):
    """A decomposition, and the changes of both log-probs that it predicts."""
    update = lddyn.SFT([CHOSEN], reduction="sum")
    dec = lddyn.decompose(model, [CHOSEN, REJECTED], update, lr=lr, **options)
    return dec, [float(o.delta_logp.sum()) for o in dec]


def every_entry(model, **options):
    """The same, after the other entries took the model."""
    examples = [CHOSEN, REJECTED]
    assert len(lddyn.features(model, examples)) == 5
    kernel = lddyn.ntk(model, CHOSEN, REJECTED).gram()
    assert bool(torch.isfinite(kernel).all())
    assert len(lddyn.diagnose(model, [(CHOSEN, REJECTED)], close_ups=0)) == 1
    lddyn.massflow(model, CHOSEN, lddyn.SFT([CHOSEN]), lr=RATE)
    return decomposed(model, **options)


def small(seed=0, **changes):
    return zoo.build("llama", seed, **changes).eval()


def with_trl_forward(model):
    original = model.forward

    @functools.wraps(type(model).forward)
    def fused(self, *args, fused_lm_head=False, **kwargs):
        assert not fused_lm_head
        return original(*args, **kwargs)

    model.forward = types.MethodType(fused, model)
    return model


def with_plain_function(model):
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model


def with_autocast(model):
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert hasattr(prepared, "_original_forward")
    return prepared


def with_capture_hooks(model):
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = True
    model.config.return_dict = False
    return model


def with_dispatch_hooks(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


def checkpointed(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


HELD = {
    "a forward replaced as TRL does": with_trl_forward,
    "a forward replaced by a plain function": with_plain_function,
    "accelerate's autocast": with_autocast,
    "transformers' capture hooks, output_* flags": with_capture_hooks,
    "accelerate's dispatch hooks": with_dispatch_hooks,
    "an average of weights": averaged,
    "gradient checkpointing": checkpointed,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("held", [pytest.param(h, marks=pytest.mark.case(h)) for h in HELD])
def test_models_as_trainers_hold_them(held):
    expected = predicted(small())
    model = HELD[held](small())
    state = [(m.__dict__.get("forward"), m.training) for m in model.modules()]
    dec, delta = (every_entry if "autocast" in held else decomposed)(model)
    assert delta == pytest.approx(expected, rel=1e-4)
    if "TRL" in held:
        slope = dec.verify([1e-5, 5e-6], dtype=torch.float64).slope
        assert slope == pytest.approx(2, abs=0.1)
    assert [(m.__dict__.get("forward"), m.training) for m in model.modules()] == state


@pytest.mark.case("DistributedDataParallel, and its refusals: FSDP 2, offloaded weights")
def test_models_of_processes(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        assert decomposed(model)[1] == pytest.approx(predicted(small()), rel=1e-4)
        sharded = torch.distributed.fsdp.fully_shard(small())
        with pytest.raises(UnsupportedModelError, match="FSDP 2"):
            lddyn.ntk(sharded, CHOSEN, CHOSEN)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(UnsupportedModelError, match=r"lddyn\.stream"):
        lddyn.ntk(accelerate.cpu_offload(small()), CHOSEN, CHOSEN)


@pytest.mark.case("a mixture that returns router logits")
def test_router_logits():
    model = zoo.build("mixtral").eval()
    expected = predicted(model)
    model.config.output_router_logits = True
    assert decomposed(model)[1] == pytest.approx(expected, rel=1e-4)
    assert model.config.output_router_logits


@pytest.mark.case("accelerate's optimizer, as a callback gets it")
def test_an_optimizer_in_accelerates_wrapper():
    model = small()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model, prepared = accelerator.prepare(model, optimizer)
    _, delta = decomposed(model, optimizer=prepared, lr=None)
    assert delta == pytest.approx(predicted(small()), rel=1e-4)


@pytest.mark.case("a gradient hook on a weight")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gradient_hooks_that_scale(optimizer):
    model = small()
    rows = torch.zeros(zoo.VOCABULARY, 1)
    rows[[7, 41]] = 1.0  # only these tokens' rows are trained
    embedding = model.get_input_embeddings().weight
    embedding.register_hook(lambda g: g * rows)
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g.mul_(0.5))
    own = optimizer(model.parameters(), lr=1e-4)
    dec, delta = decomposed(model, optimizer=own, lr=None)
    with lddyn.true_float64():
        stepped = door.copied(model).double()
        before = [log_prob(stepped, e).item() for e in (CHOSEN, REJECTED)]
        (-log_prob(stepped, CHOSEN)).backward()
        optimizer(stepped.parameters(), lr=1e-8).step()
        after = [log_prob(stepped, e).item() for e in (CHOSEN, REJECTED)]
    moved = [1e4 * (b - a) for a, b in zip(before, after, strict=True)]
    assert delta == pytest.approx(moved, rel=2e-3)
    slope = dec.verify([1e-6, 5e-7], dtype=torch.float64).slope
    assert slope == pytest.approx(2, abs=0.2)


def test_gradient_hooks_that_do_more_are_refused():
    model = small()
    model.get_input_embeddings().weight.register_hook(lambda g: g / g.norm())
    with pytest.raises(UnsupportedModelError, match=r"gradient hook of model\.embed_tokens"):
        lddyn.decompose(model, CHOSEN, lddyn.SFT([CHOSEN]), lr=RATE)


@pytest.mark.case("a noise hook, always on")
def test_models_that_draw_noise_are_refused_everywhere():
    model = small()
    model.get_input_embeddings().register_forward_hook(lambda *a: a[2] + torch.rand_like(a[2]))
    entries = [
        lambda: lddyn.decompose(model, CHOSEN, lddyn.SFT([CHOSEN]), lr=RATE),
        lambda: lddyn.features(model, [CHOSEN]),
        lambda: lddyn.diagnose(model, [(CHOSEN, REJECTED)], close_ups=0),
        lambda: lddyn.ntk(model, CHOSEN, CHOSEN).gram(),
    ]
    for entry in entries:
        with pytest.raises(UnrepeatableModelError, match="random numbers"):
            entry()


@pytest.mark.case("torch.compile: nothing is compiled for lddyn")
@pytest.mark.parametrize("way", ["wrapped", "in place", "inside peft"])
def test_nothing_is_compiled(way):
    counters = torch._dynamo.utils.counters
    model = small()
    if way == "in place":
        model.compile()
    elif way == "wrapped":
        model = torch.compile(model)
    else:
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(torch.compile(model), config)
    counters.clear()
    decomposed(model)
    lddyn.diagnose(model, [(CHOSEN, REJECTED)], close_ups=0)
    assert not counters["frames"]


@pytest.mark.case("a copy of a model whose forward was replaced")
def test_a_forward_of_another_model_is_named():
    original = with_trl_forward(small())
    model = zoo.copy.deepcopy(original)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(UnsupportedModelError, match=r"del model\.forward"):
        lddyn.ntk(model, CHOSEN, CHOSEN).gram()
    del model.forward
    assert bool(torch.isfinite(lddyn.ntk(model, CHOSEN, CHOSEN).gram()).all())


def test_an_anatomy_is_taken_as_it_is():
    anatomy = Anatomy(nn.DataParallel(small()))
    assert Anatomy.module_of(anatomy) is anatomy.model is Anatomy.module_of(anatomy.model)


@pytest.mark.case("a model of which a part is on another device")
def test_what_is_on_another_device_is_named():
    """The meta device stands for a GPU, and a hook for the error of torch's products there."""
    model = zoo.build("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.register_buffer("scale", torch.ones(1, device="meta"))

    def fail(*_):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            "cuda:0 and cpu!"
        )

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(
        UnsupportedModelError,
        match=r"buffer model\.layers\.0\.mlp\.scale is on meta and the head on cpu: move the whole",
    ):
        lddyn.token_log_probs(model, CHOSEN)
