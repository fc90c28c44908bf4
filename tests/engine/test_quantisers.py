"""LoRA on weights of HQQ, torchao, quanto and GGUF, by transformers, against autograd."""

import peft
import pytest
import torch
import transformers
import zoo
from torch import nn

import lddyn

CHOSEN = lddyn.Example([5, 9, 33], [7, 41, 8], name="chosen")
REJECTED = lddyn.Example([5, 9, 33], [12, 2], name="rejected")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def missing(package):
    return f"{package} is not installed: the weights that it quantises are not tested"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        pad_token_id=None,
    )
    path = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def loaded(folder, **options):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, **options)


def hqq(folder, bits):
    """By hand, as transformers did before version 5."""
    quantize = pytest.importorskip("hqq.core.quantize", reason=missing("hqq"))
    model = loaded(folder)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64)
            small = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, small)
    return model


def torchao(folder, kind):
    api = pytest.importorskip("torchao.quantization", reason=missing("torchao"))
    config = transformers.TorchAoConfig(getattr(api, kind)())
    return loaded(folder, quantization_config=config, device_map="cpu")


def quanto(folder, weights):
    pytest.importorskip("optimum.quanto", reason=missing("optimum-quanto"))
    config = transformers.QuantoConfig(weights=weights)
    return loaded(folder, quantization_config=config, device_map="cpu")


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def gguf(folder, kind):
    """A file of llama.cpp's, with its names, and queries and keys in its order of pairs."""
    gguf = pytest.importorskip("gguf", reason=missing("gguf"))
    model, path = loaded(folder), folder / f"{kind}.gguf"
    config, heads = model.config, model.config.num_attention_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        layer = name.removeprefix("model.layers.").removesuffix(".weight")
        number, _, inner = layer.partition(".")
        own = f"blk.{number}.{NAMES[inner]}" if number.isdigit() else NAMES[layer]
        values, type_ = weight.numpy(), None
        if number.isdigit() and weight.dim() == 2:
            type_ = gguf.GGMLQuantizationType[kind]
            values = gguf.quants.quantize(values, type_)
        writer.add_tensor(f"{own}.weight", values, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return loaded(folder, gguf_file=path.name)


KINDS = {
    "HQQ, 4 bits": (hqq, 4),
    "torchao, int8": (torchao, "Int8WeightOnlyConfig"),
    "torchao, float8": (torchao, "Float8WeightOnlyConfig"),
    "quanto, int8": (quanto, "int8"),
    "quanto, int4": (quanto, "int4"),
    "GGUF, Q8_0": (gguf, "Q8_0"),
}


def jacobian(model, example):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return zoo.jacobian(zoo.token_log_probs(model.eval(), example), parameters).double()


def apart(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.case(f"QLoRA, {k}")) for k in KINDS]
)
def test_lora_on_weights_of_other_quantisers(kind, folder):
    make, option = KINDS[kind]
    model = make(folder, option)
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    chosen, rejected = jacobian(model, CHOSEN), jacobian(model, REJECTED)
    anatomy = lddyn.Anatomy(model)
    assert anatomy.joined == ""
    assert apart(lddyn.ntk(anatomy, REJECTED, CHOSEN).gram(), rejected @ chosen.T) < 1e-5
    update = lddyn.SFT([CHOSEN], reduction="sum")
    dec = lddyn.decompose(anatomy, REJECTED, update, lr=1e-3)
    assert apart(dec[0].influence / 1e-3, rejected @ chosen.T) < 1e-5
    features = lddyn.features(anatomy, [CHOSEN, REJECTED]).gram().value
    rows = torch.cat([chosen, rejected])
    assert apart(features, rows @ rows.T) < 1e-5
    whole = torch.stack([chosen.sum(0), rejected.sum(0)])
    diagnosis = lddyn.diagnose(anatomy, [(CHOSEN, REJECTED)], close_ups=0)
    assert apart(diagnosis.gram, whole @ whole.T) < 1e-5
    assert dec.verify([1e-6, 5e-7]).slope == pytest.approx(2, abs=0.1)
