"""What a step says of its reference, its clipping and its number type."""

import math
import warnings

import pytest
import torch
import zoo

import lddyn

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair():
    return zoo.examples()


def sums(model, pair):
    return [float(zoo.token_log_probs(model.eval(), e).detach().sum()) for e in pair]


@pytest.mark.case("bf16 weights that a step does not move")
@pytest.mark.parametrize("lr", [1e-6, 3e-2])
def test_a_step_on_16_bit_weights_says_what_rounding_leaves(pair, lr, monkeypatch):
    monkeypatch.setattr("lddyn.steps.precision._PIECE", 100)
    model = zoo.build("llama").bfloat16()
    dec = lddyn.decompose(model, list(pair), lddyn.SFT(pair[0]), lr=lr)
    share = dec.settings["weights_moved"]
    gradient = torch.autograd.grad(
        -zoo.token_log_probs(model, pair[0]).mean(), list(model.parameters())
    )
    moved = [
        ((p - lr * g.float()).bfloat16() != p)[g != 0]
        for p, g in zip(model.parameters(), gradient, strict=True)
    ]
    assert share == pytest.approx(float(torch.cat(moved).float().mean()), abs=0.02)
    checked = dec.verify([lr, lr / 2])
    assert checked.own_step["dtype"] == "bfloat16"
    text = dec.explain(checked)
    assert "of the weights that it should move" in text and "A real step in bfloat16" in text
    small = [
        o.name for o in dec if abs(float(o.delta_logp.sum())) < dec.settings["rounding"][o.name]
    ]
    assert bool(small) == ("smaller than that" in text)
    if lr < 1e-5:
        assert share < 0.01 and checked.own_step["moved"] < 0.01
        assert abs(checked.own_step["measured"]) < abs(float(checked.measured[0].sum()))
    again = lddyn.Verification.from_dict(checked.to_dict())
    assert again.own_step == checked.own_step
    assert (
        "rounding"
        not in lddyn.decompose(zoo.build("llama"), pair[0], lddyn.SFT(pair[0]), lr=lr).settings
    )


@pytest.mark.case("a reference that is not the start")
def test_the_reference_and_the_margin_at_the_start_are_said(pair):
    model = zoo.lora("llama")
    pair = pair[0], lddyn.Example(pair[0].prompt_ids, pair[1].response_ids)
    off = sums(zoo.build("llama"), pair)
    own = sums(model, pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # plain LoRA: nothing to warn of
        dec = lddyn.decompose(model, pair[0], lddyn.DPO(*pair, reference="adapter-off"), lr=1e-3)
    margin = (own[0] - off[0]) - (own[1] - off[1])
    assert dec.settings["margin_at_start"] == pytest.approx(margin, rel=1e-4)
    assert "The reference is the model with its adapters off" in dec.explain()
    assert "where a run that begins at its reference has 0" in dec.explain()
    same = lddyn.decompose(model, pair[0], lddyn.DPO(*pair), lr=1e-3)
    assert same.settings["margin_at_start"] == 0 and "has 0" not in same.explain()
    far = lddyn.decompose(model, pair[0], lddyn.DPO(*pair, reference=(-3.0, -900.0)), lr=1e-3)
    assert "computed on the same tokens?" in far.explain()


@pytest.mark.case("adapter-off is not the model before training")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "pissa"}, "initialised by pissa"),
        ({"init_lora_weights": "olora"}, "initialised by olora"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"beside": "norm"}, "trained beside the adapter"),
        ({"bias": "all"}, "trained beside the adapter"),
        ({}, None),
        ({"modules_to_save": ["lm_head"]}, None),
    ],
    ids=str,
)
def test_adapter_off_that_is_not_the_start_is_warned_of(pair, options, said):
    import peft

    from lddyn.engine.reference_policy import adapter_remarks

    options = dict(options)
    beside = options.pop("beside", None)
    base = zoo.build("qwen2")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if beside and beside in name:
            parameter.requires_grad_(True)
    remarks = adapter_remarks(model)
    assert (not remarks) if said is None else (said in remarks[0])
    if said and not beside and "bias" not in options:
        with pytest.warns(UserWarning, match="is not the model that training started from"):
            lddyn.decompose(model, pair[0], lddyn.DPO(*pair, reference="adapter-off"), lr=1e-3)


def test_clipping_and_dropout_are_said(pair):
    model = zoo.lora("llama", lora_dropout=0.5).train()
    dec = lddyn.decompose(model, pair[0], lddyn.SFT(pair[0]), lr=1e-3, max_grad_norm=1e-3)
    assert "clipped to max_grad_norm: multiplied by" in dec.explain()
    assert "Dropout is off" in dec.explain() and model.training
    plain = lddyn.decompose(zoo.build("llama"), pair[0], lddyn.SFT(pair[0]), lr=1e-3)
    assert "clipped" not in plain.explain() and "Dropout" not in plain.explain()
    assert math.isclose(plain.settings["clip_factor"], 1.0)


@pytest.mark.case("a group of equal rewards")
def test_an_update_of_weights_zero_is_said(pair):
    group = lddyn.Objective(lambda lp: 0.0 * sum(x.mean() for x in lp), list(pair))
    dec = lddyn.decompose(zoo.build("llama"), pair[0], group, lr=1e-3)
    assert not bool(dec[0].delta_logp.any())
    assert "Every token of the update has weight 0" in dec.explain()
    plain = lddyn.decompose(zoo.build("llama"), pair[0], lddyn.SFT(pair[0]), lr=1e-3)
    assert "has weight 0" not in plain.explain()


@pytest.mark.case("NEFTune's noise, which is left out")
def test_noise_on_embeddings_is_said(pair):
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = zoo.build("llama")
    embedding = model.get_input_embeddings()
    plain = lddyn.decompose(model, pair[0], lddyn.SFT(pair[0]), lr=1e-3)
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    dec = lddyn.decompose(model.train(), pair[0], lddyn.SFT(pair[0]), lr=1e-3)
    assert torch.equal(dec[0].delta_logp, plain[0].delta_logp)
    assert "NEFTune's noise" in dec.explain() and "NEFTune" not in plain.explain()
