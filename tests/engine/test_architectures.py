"""Architectures that need more than a stack of blocks, against explicit Jacobians in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo

import lddyn
from lddyn import Anatomy, Example

OBSERVED = Example([5, 9, 33, 7], [41, 8, 22], name="observed")
UPDATED = Example([5, 9, 12], [40, 7, 41], name="updated")

_LLAMA = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": None,
}

CONFIGS = {
    "falcon with alibi": transformers.FalconConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        alibi=True,
        bias=True,
        multi_query=False,
    ),
    "prophetnet": transformers.ProphetNetConfig(
        vocab_size=60,
        hidden_size=16,
        num_encoder_layers=1,
        num_decoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        is_decoder=True,
    ),
    "falcon_mamba": transformers.FalconMambaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2
    ),
    "dynamic rotary angles": transformers.LlamaConfig(
        **_LLAMA,
        max_position_embeddings=5,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
}


def build(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0.0, 0.6 * module.weight.shape[-1] ** -0.5)
    return model


@pytest.mark.case("architectures beyond a stack of blocks")
@pytest.mark.parametrize("name", CONFIGS)
def test_architecture_is_right(name):
    model = build(name)
    truth, scale = zoo.oracle_gram(model, OBSERVED, UPDATED)
    gram = lddyn.ntk(model, OBSERVED, UPDATED).gram()
    assert zoo.normalised_error(gram, truth, scale) < 2e-5
    update = lddyn.SFT(UPDATED, reduction="sum")
    step = lddyn.decompose(model, OBSERVED, update, lr=1e-3)
    assert zoo.normalised_error(step[0].influence / 1e-3, truth, scale) < 2e-5


def test_dynamic_rotary_angles_are_left_as_they_were():
    model = build("dynamic rotary angles")
    ids = torch.tensor([OBSERVED.ids])
    with torch.no_grad():
        before = model(ids).logits
        fresh = build("dynamic rotary angles")
        lddyn.ntk(fresh, OBSERVED, Example([5, 9], list(range(20)))).gram()
        assert torch.equal(fresh(ids).logits, before)


def test_a_row_of_the_tied_head_is_an_embedding():
    """Gemma 4 reads the padding token's row of its embedding as W[i]."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True)
    ).eval()

    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + self.weight[7]

    model.model.embed_tokens.__class__ = Shifted
    truth, scale = zoo.oracle_gram(model, OBSERVED, UPDATED)
    anatomy = Anatomy(model)
    gram = lddyn.ntk(anatomy, OBSERVED, UPDATED).gram()
    assert zoo.normalised_error(gram, truth, scale) < 2e-5
    assert anatomy.ledger["model.embed_tokens.weight"].rule == "factored"
