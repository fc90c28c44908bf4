"""Adapters of peft as they are trained: exact against autograd, or refused by a true reason."""

import peft
import pytest
import torch
import zoo
from test_door import CHOSEN, RATE, REJECTED, decomposed, log_prob, predicted

import lddyn
from lddyn.errors import UnsupportedModelError
from lddyn.loading import load_config, load_model

ALL, BOTH = "all-linear", ["embed_tokens", "lm_head"]
EXACT = {
    "the head": (False, {"target_modules": ALL, "modules_to_save": ["lm_head"]}),
    "embedding and head": (
        False,
        {"target_modules": ALL, "modules_to_save": BOTH},
    ),
    "tied embedding and head": (
        True,
        {"target_modules": ALL, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "a copy of a tied head": (True, {"target_modules": ALL, "modules_to_save": ["lm_head"]}),
    "rows of the embedding": (False, {"target_modules": ALL, "trainable_token_indices": [7, 12]}),
}
REFUSED = {
    "on the head": ({"target_modules": ["q_proj", "lm_head"]}, "carries an adapter"),
    "on tied tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8]},
        "trainable_token_indices",
    ),
    "activated": (
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [33]},
        "activated LoRA",
    ),
}


def adapted(tied, options, seed=1):
    model = zoo.build("llama", tie_word_embeddings=tied)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
    torch.manual_seed(seed)
    with torch.no_grad():  # as after some training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.case(f"peft trains {n}")) for n in EXACT]
)
def test_modules_to_save(name):
    model = adapted(*EXACT[name])
    assert decomposed(model)[1] == pytest.approx(predicted(model), rel=1e-4)
    base = zoo.build("llama", tie_word_embeddings=EXACT[name][0]).eval()
    with torch.no_grad():
        expected = [float(log_prob(base, e)) for e in (CHOSEN, REJECTED)]
    dec = lddyn.decompose(model, CHOSEN, lddyn.DPO(CHOSEN, REJECTED, reference="adapter-off"), RATE)
    assert dec.settings["reference_log_probs"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.case(f"LoRA {n}, refused")) for n in REFUSED]
)
def test_what_is_refused_says_what_to_do(name):
    options, words = REFUSED[name]
    model = adapted(True, options)
    for entry in (
        lambda: lddyn.decompose(model, CHOSEN, lddyn.SFT([CHOSEN]), RATE),
        lambda: lddyn.ntk(model, CHOSEN, REJECTED),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            entry()


@pytest.mark.case("peft: HRA, SHiRA, IA3, LoHa, VeRA, merged LoRA")
@pytest.mark.parametrize(
    "config",
    [
        peft.HRAConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False),
        peft.ShiraConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False),
        peft.VeraConfig(r=2, target_modules=["q_proj"], init_weights=False),
        peft.LoraConfig(r=2, target_modules=ALL, use_rslora=True, init_lora_weights=False),
    ],
    ids=lambda config: config.peft_type.value + "-rs" * getattr(config, "use_rslora", False),
)
def test_families_of_adapters(config):
    model = peft.get_peft_model(zoo.build("llama"), config).eval()
    assert decomposed(model)[1] == pytest.approx(predicted(model), rel=1e-4)


@pytest.mark.case("a checkpoint folder of an adapter as the model")
def test_a_folder_with_an_adapter_is_loaded_with_its_base(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(base, lora)
    trained.save_pretrained(tmp_path / "checkpoint-1")
    model = load_model(str(tmp_path / "checkpoint-1"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        assert float(log_prob(model, CHOSEN)) == pytest.approx(
            float(log_prob(trained.eval(), CHOSEN))
        )
    assert load_config(str(tmp_path / "checkpoint-1")).model_type == "llama"
    with pytest.raises(ValueError, match="is itself an adapter"):
        load_model(str(tmp_path / "checkpoint-1"), adapter=str(tmp_path / "checkpoint-1"))
