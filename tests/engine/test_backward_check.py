"""Every derivative is held to a plain backward pass; models that cannot be cut are one segment."""

from __future__ import annotations

import copy
import types

import peft
import pytest
import torch
import transformers
import zoo

import lddyn
from lddyn import SFT, Anatomy, DisagreementError, Example
from lddyn.engine import backward_check
from lddyn.engine.experts import expert_remarks
from lddyn.engine.gradient import gradient
from lddyn.engine.pushforward import push_direction

VOCABULARY = 60
OBSERVED = Example([5, 9, 33, 7], [41, 8, 22], name="observed")
UPDATED = Example([5, 9, 12], [40, 7, 41], name="updated")


class Untracked(torch.autograd.Function):
    """The identity; its backward pass hides from autograd that it is linear in the cotangent."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach()


def untracked(module, x):
    return Untracked.apply(type(module).forward(module, x))


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()


def fused():
    model = llama()
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        down.forward = lambda x, down=down: zoo.Fused.apply(x, down.weight)
    return model


def gram_error(model):
    truth, scale = zoo.oracle_gram(model, OBSERVED, UPDATED)
    return zoo.normalised_error(lddyn.ntk(model, OBSERVED, UPDATED).gram(), truth, scale)


# --------------------------------------------------------------------------- nothing silent


@pytest.mark.case("a fused kernel hides a weight")
@pytest.mark.parametrize(
    "ask",
    [
        lambda model: lddyn.ntk(model, OBSERVED, UPDATED).gram(),
        lambda model: lddyn.ntk(model, OBSERVED, UPDATED) @ torch.ones(3, VOCABULARY),
        lambda model: lddyn.features(model, [OBSERVED]),
        lambda model: lddyn.features(model, [OBSERVED], by="sequence"),
        lambda model: list(lddyn.token_factors(model, OBSERVED)),
        lambda model: lddyn.decompose(model, OBSERVED, SFT(UPDATED), lr=1e-3),
    ],
    ids=["gram", "product", "features", "sequences", "factors", "decompose"],
)
def test_a_hidden_weight_is_named(ask):
    with pytest.raises(DisagreementError, match=r"down_proj\.weight .*cannot follow"):
        ask(fused())


def test_a_diagnosis_leaves_out_what_a_hidden_weight_would_falsify():
    pair = Example([5, 9], [7, 8], name="y+"), Example([5, 9], [3, 4], name="y-")
    diagnosis = lddyn.diagnose(fused(), [pair], close_ups=0, lbk=True)
    assert "down_proj.weight" in diagnosis.unavailable
    assert bool(diagnosis.scores["lbk"].isnan().all())
    plain = lddyn.diagnose(llama(), [pair], close_ups=0)
    torch.testing.assert_close(diagnosis.gram, plain.gram, rtol=1e-4, atol=1e-6)


def test_a_silent_tangent_is_found_by_pushing_alone():
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(untracked, mlp)
    assert gram_error(model) < 5e-6  # pulling needs one derivative only
    anatomy = Anatomy(model)
    direction = {name: torch.ones_like(p) for name, p in anatomy.trainable.items()}
    with pytest.raises(DisagreementError, match="in block 1, tangents"):
        push_direction(anatomy.trace(OBSERVED), direction)


def test_a_model_is_compared_once_until_its_modules_change(monkeypatch):
    compared = []
    original = backward_check._compare_pulls
    monkeypatch.setattr(
        backward_check, "_compare_pulls", lambda *args: (compared.append(1), original(*args))[1]
    )
    model = llama()
    for _ in range(2):
        lddyn.ntk(model, OBSERVED, UPDATED).gram()
        lddyn.decompose(model, OBSERVED, SFT(UPDATED), lr=1e-3, rule="midpoint")
    assert len(compared) == 1
    model.lm_head.weight.requires_grad_(False)
    lddyn.ntk(model, OBSERVED, UPDATED).gram()
    assert len(compared) == 2
    down = model.model.layers[0].mlp.down_proj
    down.forward = lambda x: zoo.Fused.apply(x, down.weight)
    with pytest.raises(DisagreementError):
        lddyn.ntk(model, OBSERVED, UPDATED).gram()


def test_the_comparison_leaves_gradients_and_random_state():
    model = llama()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    lddyn.ntk(model, OBSERVED, UPDATED).gram()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())


@pytest.mark.case("a mixture whose experts do not train")
def test_experts_that_do_not_train_are_told():
    model = zoo.lora("qwen3_moe", target_modules=["q_proj"])
    said = expert_remarks(model, [n for n, p in model.named_parameters() if p.requires_grad])
    assert len(said) == 1
    assert said[0].startswith("no expert of the mixture trains: 384 of ")
    step = lddyn.decompose(model, OBSERVED, SFT(UPDATED), lr=1e-3)
    assert said[0] in step.explain()
    assert not expert_remarks(model, dict(model.named_parameters()))
    assert not expert_remarks(llama(), ["lm_head.weight"])


# --------------------------------------------------------------------------- learned responses


@pytest.fixture(scope="module")
def learned():
    """A model that has learned a response, sharpened to 1 - π of about 1e-12."""
    model = llama()
    ids = torch.tensor([OBSERVED.ids])
    labels = ids.clone()
    labels[:, : len(OBSERVED.prompt_ids)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(ids).logits[0, list(OBSERVED.positions)]
        margin = logits.topk(2).values.diff().abs().min()
        model.lm_head.weight.mul_(28 / margin)
    return model.eval()


@pytest.mark.case("a response that is learned")
@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [("sft", "sgd"), ("dpo", "adam"), ("sft", "adamw"), ("dpo", "adamw"), ("dpo", "rmsprop")],
)
def test_a_learned_response_is_right_to_float64(learned, loss, optimizer):
    other = Example(OBSERVED.prompt_ids, [41, 9, 22], name="rejected")
    update = {"sft": SFT(OBSERVED), "dpo": lddyn.DPO(OBSERVED, other, reference=(0.0, 0.0))}[loss]
    step = lddyn.decompose(learned, OBSERVED, update, lr=1e-4, optimizer=optimizer)
    assert float(-step[0].logp.max()) < 2e-12
    exact = copy.deepcopy(learned).double()
    with lddyn.true_float64():
        truth = lddyn.decompose(exact, OBSERVED, update, lr=1e-4, optimizer=optimizer)
    torch.testing.assert_close(step[0].delta_logp.double(), truth[0].delta_logp, rtol=1e-4, atol=0)


def test_a_diagnosis_of_learned_responses_is_right_to_float64(learned):
    pair = OBSERVED, Example(OBSERVED.prompt_ids, [41, 9, 22], name="rejected")
    got = lddyn.diagnose(learned, [pair], close_ups=0).gram
    exact = copy.deepcopy(learned).double()
    with lddyn.true_float64():
        ones = torch.ones(3, dtype=torch.float64)
        gradients = [gradient(exact, [example], [ones]) for example in pair]
        rows = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in gradients])
    torch.testing.assert_close(got, rows @ rows.T, rtol=1e-4, atol=0)


# --------------------------------------------------------------------------- one segment


def gemma3n():
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=16,
        hidden_size_per_layer_input=4,
        intermediate_size=[24] * 4,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        laurel_rank=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = transformers.Gemma3nForCausalLM(config)
    adapter = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, adapter).eval()


def hooked():
    model = llama()
    model.model.layers[-1].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def run_next_too(block, hidden, **more):
    return block.next[0](type(block).forward(block, hidden, **more), **more)


def looped():
    model = llama()
    first, second = model.model.layers
    first.next = [second]
    first.forward = types.MethodType(run_next_too, first)
    return model


@pytest.mark.case("blocks that share keys and values, or run twice")
@pytest.mark.parametrize(
    "make", [gemma3n, hooked, looped], ids=["shared keys", "hook behind the blocks", "run twice"]
)
def test_a_model_that_cannot_be_cut_is_one_segment(make):
    model = make()
    assert gram_error(model) < 1e-5
    anatomy = Anatomy(model)
    step = lddyn.decompose(anatomy, OBSERVED, SFT(UPDATED, reduction="sum"), lr=1e-3)
    assert anatomy.joined
    assert anatomy.segments == ["model"]
    truth, scale = zoo.oracle_gram(model, OBSERVED, UPDATED)
    assert zoo.normalised_error(step[0].influence / 1e-3, truth, scale) < 1e-5
    estimate = lddyn.features(model, [OBSERVED, UPDATED], by="sequence").gram()
    exact = torch.stack([zoo.oracle_jacobian(model, x).sum(0) for x in (OBSERVED, UPDATED)])
    assert bool(((estimate.value - exact @ exact.T).abs() <= 6 * estimate.stderr + 1e-5).all())
