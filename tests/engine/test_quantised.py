"""LoRA on weights in 4 and 8 bits: equal to autograd of the same model, which is left as it was."""

import warnings

import peft
import pytest
import torch
import transformers

import lddyn
from lddyn.engine.quantised import dequantised, is_quantised
from lddyn.errors import UnsupportedModelError

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CHOSEN = lddyn.Example([5, 9, 33], [7, 41, 8], name="chosen")
REJECTED = lddyn.Example([5, 9, 33], [12, 2], name="rejected")
PACKS = "support_avx512bf16_for_cpu"  # True on CPUs that can run packed weights
RATE = 1e-3

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS = {
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4"},
    "fp4, double quantisation": FOUR
    | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16, prepared for k-bit training": FOUR
    | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def quantised(folder, kind):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.1, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**KINDS[kind]),
        device_map="cpu",
        dtype=torch.float32,
    )
    if "prepared" in kind:
        model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora).train()


def log_probs(model, example):
    logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    return logits[list(example.positions), list(example.targets)]


def jacobian(model, example):
    """The gradient of every log π(y_m), (M, P), by autograd in evaluation mode."""
    packs = [m for m in model.modules() if getattr(m, PACKS, False)]
    modes = [(m, m.training) for m in model.modules()]
    for module in packs:
        setattr(module, PACKS, False)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters, retain_graph=True)])
        for v in log_probs(model, example)
    ]
    for module in packs:
        setattr(module, PACKS, True)
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows).double()


def apart(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.case(f"QLoRA, bitsandbytes {k}")) for k in KINDS]
)
def test_lora_on_quantised_weights(kind, tmp_path):
    model = quantised(tmp_path, kind)
    for module in model.modules():
        if hasattr(module, PACKS):  # as on a CPU with AVX512-BF16
            setattr(module, PACKS, True)
    (-log_probs(model, CHOSEN).sum()).backward()
    trained = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    chosen, rejected = jacobian(model, CHOSEN), jacobian(model, REJECTED)
    limit = 2e-3 if "bfloat16" in kind else 1e-5

    assert apart(lddyn.ntk(model, REJECTED, CHOSEN).gram(), rejected @ chosen.T) < limit
    update = lddyn.SFT([CHOSEN], reduction="sum")
    dec = lddyn.decompose(model, [CHOSEN, REJECTED], update, lr=RATE)
    assert apart(dec[1].influence / RATE, rejected @ chosen.T) < limit
    diagnosis = lddyn.diagnose(model, [(CHOSEN, REJECTED)], close_ups=0)
    whole = torch.stack([chosen.sum(0), rejected.sum(0)])
    assert apart(diagnosis.gram, whole @ whole.T) < limit
    assert dec.verify([1e-6, 5e-7]).slope == pytest.approx(2, abs=0.1)

    assert all(m.training for m in model.modules())
    assert all(getattr(m, PACKS, True) for m in model.modules())
    model.zero_grad()
    (-log_probs(model, CHOSEN).sum()).backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(again, trained, strict=True))


@pytest.mark.case("QLoRA, weights that bitsandbytes packed for inference on a CPU")
def test_packed_weights_are_unpacked(tmp_path):
    model = quantised(tmp_path, "nf4").eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            weight.data, weight.quant_state = (
                bitsandbytes.functional._convert_weight_packed_for_cpu(
                    weight.data, weight.quant_state
                )
            )
    with pytest.warns(UserWarning, match="packed 7 4-bit weights"):
        kernel = lddyn.ntk(model, REJECTED, CHOSEN).gram()
    expected = jacobian(model, REJECTED) @ jacobian(model, CHOSEN).T
    assert apart(kernel, expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lddyn.ntk(model, REJECTED, CHOSEN).gram()


def test_a_dequantised_layer_is_the_quantised_one(tmp_path):
    model = quantised(tmp_path, "nf4").eval()
    layers = [m for m in model.modules() if is_quantised(m)]
    assert len(layers) == 7
    x = torch.randn(3, 64)
    torch.testing.assert_close(dequantised(layers[0], rows=20)(x), layers[0](x))


def test_a_quantised_head_is_refused_by_name(tmp_path):
    model = quantised(tmp_path, "nf4").base_model.model
    model.lm_head = model.model.layers[0].mlp.down_proj.base_layer
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        lddyn.ntk(model, REJECTED, CHOSEN)
