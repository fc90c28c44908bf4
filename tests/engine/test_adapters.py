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
ON_THE_HEAD = {
    "LoRA on the head": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on embedding and tied head": (True, {"target_modules": ["q_proj", *BOTH]}),
    "rows of a tied embedding": (
        True,
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 41, 50]},
    ),
}
REFUSED = {
    "on the head, with DoRA": (
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        "the head lm_head carries an adapter",
    ),
    "on embedding and head, tied": (
        {"target_modules": BOTH, "ensure_weight_tying": True},
        "views of the same memory",
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
    "name", [pytest.param(n, marks=pytest.mark.case(f"peft trains {n}")) for n in ON_THE_HEAD]
)
def test_adapters_on_the_head(name):
    """Every entry, in float64, in units of the norms of the gradients."""
    model = zoo.double(adapted(*ON_THE_HEAD[name]))
    with lddyn.true_float64():
        rows = [zoo.oracle_jacobian(model, example) for example in (CHOSEN, REJECTED)]
        chosen, rejected = rows
        update = lddyn.SFT([CHOSEN], reduction="sum")
        anatomy = lddyn.Anatomy(model)
        table = lddyn.decompose(anatomy, REJECTED, update, lr=1.0)[0].influence
        features = lddyn.features(anatomy, [CHOSEN, REJECTED]).gram().value
        diagnosis = lddyn.diagnose(anatomy, [(CHOSEN, REJECTED)], close_ups=0)
        kernel = lddyn.ntk(anatomy, REJECTED, CHOSEN)
        low_rank = kernel.lowrank(rank=8, span="data").gram()
    together, sums = torch.cat(rows), torch.stack([g.sum(0) for g in rows])
    for value, one, other in (
        (kernel.gram(), rejected, chosen),
        (low_rank, rejected, chosen),
        (table, rejected, chosen),
        (features, together, together),
        (diagnosis.gram, sums, sums),
    ):
        scale = one.norm(dim=1)[:, None] * other.norm(dim=1)[None]
        assert zoo.normalised_error(value, one @ other.T, scale) < 1e-9


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.case(f"LoRA {n}, refused")) for n in REFUSED]
)
def test_what_is_refused_says_what_to_do(name):
    options, words = REFUSED[name]
    model = adapted(True, options)
    for entry in (
        lambda: lddyn.decompose(model, CHOSEN, lddyn.SFT([CHOSEN]), RATE),
        lambda: lddyn.ntk(model, CHOSEN, REJECTED),
        *[lambda: lddyn.diagnose(model, [(CHOSEN, REJECTED)], close_ups=0)] * ("tied" in name),
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


@pytest.mark.case("LoRA on the packed experts of a mixture")
def test_lora_on_packed_experts():
    """Each of peft's forward passes sets the frozen experts anew, which is no optimizer's step."""
    lora = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(zoo.build("mixtral", num_hidden_layers=1), lora).eval()
    assert decomposed(model)[1] == pytest.approx(predicted(model), rel=1e-4)
