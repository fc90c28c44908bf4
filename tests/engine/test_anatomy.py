"""The anatomy: seams, ledger, what it refuses, and that the model is left as it was found."""

import copy
import functools
import re
import sys
import types
import warnings

import peft
import pytest
import torch
import zoo
from torch import nn

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gradient import gradient
from lddyn.engine.gram import Side, factored_gram, token_gram
from lddyn.engine.guard import true_float64
from lddyn.engine.pullback import Pullback, segments_down
from lddyn.engine.pushforward import AlongDirection, pair_direction
from lddyn.errors import DisagreementError, NonFiniteError, UnsupportedModelError

torch.set_num_threads(1)

THE_16 = list(zoo.ARCHITECTURES)[:16]
EXPERT = re.compile(r"\.experts\.\d+\.")  # of transformers 4, where each has its own matrices
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
# Long enough for every expert of the tiny mixtures to see a token.
LONG = lddyn.Example(
    prompt_ids=[(7 * i + 3) % 83 + 3 for i in range(30)],
    response_ids=[(11 * i + 5) % 83 + 3 for i in range(20)],
    name="long",
)


def influence_error(model, **options):
    """Error of decompose's influence under SGD against the explicit Jacobian, normalised."""
    observed, updated = zoo.examples()
    truth, scale = zoo.oracle_gram(model, observed, updated)
    dec = lddyn.decompose(model, observed, lddyn.SFT(updated, reduction="sum"), lr=1e-3, **options)
    return zoo.normalised_error(dec[0].influence / 1e-3, truth, scale)


# --------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_ledger_places_every_parameter(name, tied):
    model = zoo.build(name, tie_word_embeddings=tied)
    anatomy = Anatomy(model)
    anatomy.trace(LONG)
    rows = anatomy.ledger_table()
    trainable = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {r["parameter"]: tuple(r["shape"]) for r in rows} == trainable
    rules = {r["rule"] for r in rows if not EXPERT.search(r["parameter"])}
    assert rules <= {"factored", "direct"}
    # No weight matrix of a product may be materialised per token.
    for row in rows:
        if row["rule"] == "direct":
            assert torch.Size(row["shape"]).numel() <= 4 * 32 * 8, row
    assert anatomy.tied == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_factors_make_the_gradient_of_every_parameter(name):
    """⟨Σ_l J_l from the factors, g⟩ = ‖g‖² parameter by parameter, g by whole-model autograd."""
    model = zoo.build(name)
    anatomy = Anatomy(model)
    trace = anatomy.trace(LONG)
    side = Side.log_probs(trace)
    whole = gradient(anatomy, [LONG], [torch.ones(len(LONG))])
    found = dict.fromkeys(whole, 0.0)

    def add(key, values):
        found[key.split("[")[0]] += float(values.double().sum())

    source = AlongDirection(whole)
    with anatomy.analysis():
        pull = Pullback(trace, side.rows)
        pair_direction(pull.head_factors(), source, add)
        for segment in segments_down(anatomy):
            for _, factors in pull.step(segment):
                pair_direction(factors, source, add)
    for key, g in whole.items():
        square = float(g.double().square().sum())
        assert found[key] == pytest.approx(square, rel=2e-4, abs=1e-9), key
        # Softmax ignores a shift of all keys; to an expert of its own no token may go.
        if not key.endswith("k_proj.bias") and not EXPERT.search(key):
            assert square > 0, key


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_experts_without_a_token_have_zero_gradient(name):
    model = zoo.build(name)
    example = lddyn.Example(prompt_ids=[5], response_ids=[9])  # one row: two of four experts
    anatomy = Anatomy(model)
    anatomy.trace(example)
    whole = gradient(anatomy, [example], [torch.ones(1)])
    experts = {}  # by matrix: the gradient of each expert's, packed or not
    for key, g in whole.items():
        if ".experts." in key:
            parts = [g] if EXPERT.search(key) else g.unbind()
            experts.setdefault(EXPERT.sub(".experts.", key), []).extend(parts)
    assert experts
    for parts in experts.values():
        assert len(parts) == 4 and sum(float(g.abs().max()) > 0 for g in parts) == 2
    assert influence_error(model) < 5e-6


def test_true_float64_changes_what_float32_rounds():
    model = zoo.double(zoo.build("llama"))
    observed, _ = zoo.examples()
    plain = zoo.token_log_probs(model, observed)
    with true_float64():
        exact = zoo.token_log_probs(model, observed)
    assert plain.dtype == exact.dtype == torch.float64
    assert 0 < float((plain - exact).detach().abs().max()) < 1e-5


# --------------------------------------------------------------------------- hostile parameters


class Product(nn.Module):
    """x through a weight that is itself a product of two parameters."""

    def __init__(self, mode):
        super().__init__()
        self.a = nn.Parameter(0.3 * torch.randn(32, 4))
        self.b = nn.Parameter(0.3 * torch.randn(4, 32))
        self.mode = mode

    def forward(self, x):
        if self.mode == "matmul":
            return x @ (self.a @ self.b)
        if self.mode == "linear":
            return nn.functional.linear(x, nn.functional.linear(self.a, self.b.T))
        if self.mode == "einsum":
            return torch.einsum("btd,dr,re->bte", x, self.a, self.b)
        return torch.addmm(self.b[0], self.a, self.b).mean() + x


class Gain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum((0, 1))


class SilentTanh(torch.autograd.Function):
    """First derivative right, second derivative cut: forward over reverse would be zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (1 - torch.tanh(x) ** 2) * g


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def scripted_linear(x: torch.Tensor, weight: torch.Tensor):
        return torch.nn.functional.linear(x, weight)


@torch.library.custom_op("lddyn_tests::tanh", mutates_args=())
def plain_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


@torch.library.custom_op("lddyn_tests::linear", mutates_args=())
def plain_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


@torch.library.custom_op("lddyn_tests::tanh_once", mutates_args=())
def once_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


@torch.library.custom_op("lddyn_tests::tanh_once_backward", mutates_args=())
def once_tanh_backward(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return g * (1 - torch.tanh(x) ** 2)


once_tanh.register_autograd(
    lambda ctx, g: once_tanh_backward(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Call(nn.Module):
    """A module around a function of x, or of x and a weight."""

    def __init__(self, fn, shape=None):
        super().__init__()
        self.fn = fn
        self.weight = None if shape is None else nn.Parameter(0.3 * torch.randn(shape))

    def forward(self, x):
        return self.fn(x) if self.weight is None else self.fn(x, self.weight)


def with_module(make, at="o_proj"):
    model = zoo.build("llama")
    for layer in model.model.layers:
        owner = layer.self_attn if at == "o_proj" else layer.mlp if at == "act_fn" else layer
        setattr(owner, at, make())
    return model


@pytest.mark.parametrize("mode", ["matmul", "linear", "einsum", "addmm"])
def test_product_of_two_parameters_loses_neither(mode):
    model = with_module(lambda: Product(mode))
    assert influence_error(model) < 5e-6
    anatomy = Anatomy(model)
    anatomy.trace(zoo.examples()[0])
    assert all(e.rule != "not reached (zero gradient)" for e in anatomy.ledger.values())


def test_gain_inside_an_autograd_function_is_right():
    assert influence_error(with_module(lambda: Call(Gain.apply, 32), "input_layernorm")) < 5e-6


@pytest.mark.parametrize(
    "fn",
    [zoo.Fused.apply, lambda x, weight: scripted_linear(x, weight)],
    ids=["autograd.Function", "TorchScript"],
)
def test_weight_hidden_from_torch_functions_is_named(fn):
    model = with_module(lambda: Call(fn, (32, 32)))
    with pytest.raises(DisagreementError, match=r"o_proj\.weight .*cannot follow"):
        influence_error(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_module(lambda: Call(lambda x: plain_tanh(x)), "act_fn"),
        lambda: with_module(lambda: Call(lambda x, w: plain_linear(x, w), (32, 32))),
        lambda: with_module(lambda: Call(lambda x: once_tanh(x)), "act_fn"),
        lambda: with_module(lambda: Call(SilentTanh.apply), "act_fn"),
    ],
    ids=["op-without-derivative", "linear-op-without-derivative", "op-once", "function-once"],
)
def test_operation_without_derivative_raises(make):
    with pytest.raises((RuntimeError, DisagreementError)):
        influence_error(make())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["embedding", "rslora", "bias", "modules_to_save"],
)
def test_lora_variants(options):
    assert influence_error(zoo.lora("qwen2", **options)) < 5e-6


def test_unfrozen_base_with_adapter():
    model = zoo.lora("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert influence_error(model) < 5e-6


@pytest.mark.parametrize(
    "frozen",
    ["embed", "lm_head", "layers.0", "layers.1", "norm", "weight_only_bias_left"],
)
def test_frozen_subsets(frozen):
    model = zoo.build("qwen2")
    for key, parameter in model.named_parameters():
        if frozen == "weight_only_bias_left":
            parameter.requires_grad_(key.endswith("bias"))
        elif frozen in key:
            parameter.requires_grad_(False)
    assert influence_error(model) < 5e-6


def test_only_head_trainable():
    model = zoo.build("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert influence_error(model) < 5e-6


# --------------------------------------------------------------------------- leaving no trace


def snapshot(model):
    configs = {}
    for key, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None:
            configs[key] = (
                config._attn_implementation,
                config._experts_implementation,
                getattr(config, "use_cache", None),
                config.to_json_string(),
            )
    return {
        "training": {k: m.training for k, m in model.named_modules()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "grads": {
            k: None if p.grad is None else (id(p.grad), p.grad.clone())
            for k, p in model.named_parameters()
        },
        "ids": {k: id(p) for k, p in model.named_parameters()},
        "versions": {k: p._version for k, p in model.named_parameters()},
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "configs": configs,
        "dicts": {
            k: sorted(n for n in m.__dict__ if n != "_forward_hooks")
            for k, m in model.named_modules()
        },
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for k, m in model.named_modules()
        },
        "forwards": {k: m.__dict__.get("forward") for k, m in model.named_modules()},
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        if key in ("values", "grads"):
            assert one[key].keys() == other[key].keys()
            for name, value in one[key].items():
                if key == "grads" and value is not None:
                    assert value[0] == other[key][name][0], name
                    value, now = value[1], other[key][name][1]
                else:
                    now = other[key][name]
                assert (value is None and now is None) or torch.equal(value, now), name
        elif key == "rng":
            assert torch.equal(one[key], other[key])
        else:
            assert one[key] == other[key], key


def mixed(name):
    """A model with every kind of state a careless analysis would change."""
    model = zoo.build(
        name, **({"attention_dropout": 0.5} if name != "gpt2" else {"attn_pdrop": 0.5})
    )
    model.train()
    blocks = Anatomy(model).blocks
    blocks[0].eval()
    next(blocks[1].parameters()).requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        if i % 2:
            parameter.grad = torch.randn_like(parameter)
    model.register_forward_hook(lambda *a: None)
    next(iter(blocks[1].children())).register_forward_pre_hook(lambda *a: None)
    # An own forward on one block, as accelerate and quantisers leave it.
    blocks[0].forward = functools.partial(type(blocks[0]).forward, blocks[0])
    model.config._attn_implementation = "sdpa" if name != "gpt_oss" else "eager"
    return model


def test_an_anatomy_stands_for_its_model():
    model = zoo.build("llama")
    anatomy = Anatomy(model, attention="eager")
    assert Anatomy.of(anatomy) is anatomy
    assert Anatomy.of(model).attention == "lddyn"
    one, other = zoo.examples()
    single = lddyn.token_log_probs(anatomy, one)
    several = lddyn.token_log_probs(anatomy, [one, other])
    assert torch.equal(single, several[0]) and len(several) == 2
    expected = zoo.token_log_probs(model.eval(), one)
    assert torch.allclose(single, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "gemma3_text"])
def test_model_is_left_as_it_was_found(name):
    model = mixed(name)
    observed, updated = zoo.examples()
    before = snapshot(model)
    dec = lddyn.decompose(
        model,
        [observed, updated],
        lddyn.DPO(updated, observed),
        lr=1e-3,
        rule="simpson",
        optimizer="adamw",
    )
    dec[0].token_effects(1)
    dec.verify(lrs=[1e-3])
    lddyn.ntk(model, observed, updated).gram(method="pushed")
    lddyn.token_log_probs(model, [observed])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("where", ["pullback.pull", "pushforward.push", "gram.pair"])
def test_model_is_restored_after_an_exception(where, monkeypatch):
    model = mixed("llama")
    observed, updated = zoo.examples()
    before = snapshot(model)
    calls = []

    def explode(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt("stopped by the user")

    module, function = where.split(".")
    monkeypatch.setattr(sys.modules[f"lddyn.engine.{module}"], function, explode)
    with pytest.raises(KeyboardInterrupt):
        lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
    assert calls
    assert_same(before, snapshot(model))


def test_model_is_restored_when_a_block_raises():
    model = mixed("llama")
    observed, updated = zoo.examples()
    state = {"after": 10**9, "count": 0}

    def hook(module, args):
        state["count"] += 1
        if state["count"] > state["after"]:
            raise OverflowError("inside the model")

    model.model.layers[1].mlp.register_forward_pre_hook(hook)
    for _ in range(2):  # the first call also holds the model to a plain backward pass
        state["count"] = 0
        lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
    total = state["count"]
    assert total > 4
    before = snapshot(model)
    for after in range(0, total, 2):
        state.update(after=after, count=0)
        with pytest.raises(OverflowError):
            lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_caller_without_gradients(context):
    model = zoo.build("gpt2")
    observed, updated = zoo.examples()
    plain = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3, rule="midpoint")
    with context():
        dec = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3, rule="midpoint")
        effects = dec[0].token_effects(2)
        verification = dec.verify(lrs=[1e-3, 5e-4])
        gram = lddyn.ntk(model, observed, updated).gram()
    assert torch.equal(dec[0].influence, plain[0].influence)
    assert torch.equal(effects, plain[0].token_effects(2))
    assert verification.errors == plain.verify(lrs=[1e-3, 5e-4]).errors
    assert torch.equal(gram, lddyn.ntk(model, observed, updated).gram())


def test_gradient_checkpointing_and_training_mode():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    plain = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
    model.train()
    model.gradient_checkpointing_enable()
    again = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
    assert torch.equal(plain[0].influence, again[0].influence)
    assert model.is_gradient_checkpointing and model.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "use_cache=True is incompatible" would be our leak
        model(input_ids=torch.tensor([observed.ids]), use_cache=False).logits.sum().backward()


def test_compile_wrapper_is_seen_through():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    wrapped = torch.compile(model, backend="eager")
    for rule in ("start", "midpoint"):
        one = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-2, rule=rule)
        two = lddyn.decompose(wrapped, observed, lddyn.SFT(updated), lr=1e-2, rule=rule)
        assert torch.equal(one[0].influence, two[0].influence)
        assert torch.equal(one[0].error_estimate, two[0].error_estimate)
        assert float(two[0].error_estimate.abs().max()) > 0
        assert two[0].by_parameter() == one[0].by_parameter()
    lrs = [1e-4, 5e-5, 2.5e-5]
    assert two.verify(lrs=lrs).errors == one.verify(lrs=lrs).errors


def test_autocast_of_the_caller_is_ignored():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    plain = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3)
    assert torch.allclose(plain[0].influence, cast[0].influence, rtol=1e-4, atol=1e-8)


# --------------------------------------------------------------------------- refusals


def run(model, observed=None, updated=None):
    first, second = zoo.examples()
    return lddyn.decompose(model, observed or first, lddyn.SFT(updated or second), lr=1e-3)


def test_nan_weight_is_named(tmp_path):
    """The parameter, and the folder that the model came from."""
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    named = r"layers\.1\.mlp\.up_proj\.weight has 1 non-finite of \d+ values: the model "
    with pytest.raises(NonFiniteError, match=named + "is broken"):
        run(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=named + re.escape(str(tmp_path))):
        run(loaded)


def test_infinite_embedding_is_named():
    model = zoo.build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"wpe\.weight has 32 non-finite of 2048"):
        run(model)


def test_overflow_inside_names_the_block():
    model = zoo.build("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.fill_(1e30)
        model.transformer.h[0].mlp.c_fc.bias.fill_(1e30)
    with pytest.raises(NonFiniteError, match=r"input of block 1 is not finite .*float32"):
        run(model)


def test_overflow_of_the_logits():
    model = zoo.build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(2e38)
    with pytest.raises(NonFiniteError, match="logits of response token 0 are not finite"):
        run(model)


@pytest.mark.parametrize("side", ["observed", "updated"])
def test_token_id_outside_the_vocabulary(side):
    bad = lddyn.Example(prompt_ids=[5, 9], response_ids=[21, zoo.VOCABULARY])
    with pytest.raises(ValueError, match=r"ids\[3\] must be < vocab_size 89, got token id 89"):
        run(zoo.build("llama"), **{side: bad})


def test_empty_response():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        lddyn.Example(prompt_ids=[5, 9], response_ids=[])


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_prompt_past_the_context(name):
    long = lddyn.Example(prompt_ids=[5] * 64, response_ids=[9])
    with pytest.raises(ValueError, match=r"65 .*64|64.*65"):
        run(zoo.build(name), observed=long)


class NoBlocks(nn.Module):
    """A causal LM by its interface, without a stack of blocks."""

    def __init__(self):
        super().__init__()
        self.config = copy.deepcopy(zoo.build("llama").config)
        self.embed = nn.Embedding(zoo.VOCABULARY, 8)
        self.lm_head = nn.Linear(8, zoo.VOCABULARY)

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **unused):
        hidden = torch.tanh(self.embed(input_ids).cumsum(1))
        return types.SimpleNamespace(logits=self.lm_head(hidden))


def test_model_without_blocks_is_one_segment():
    torch.manual_seed(0)
    model = NoBlocks()
    assert influence_error(model) < 5e-6
    assert Anatomy(model).joined == "NoBlocks has no nn.ModuleList of blocks"


def test_not_a_causal_lm():
    with pytest.raises(UnsupportedModelError, match="expected a transformers causal LM"):
        run(nn.Linear(3, 4))
    with pytest.raises(UnsupportedModelError, match=r"no output embedding|causal LM"):
        run(zoo.build("llama").model)


def test_all_frozen():
    model = zoo.build("llama").requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="no parameter has requires_grad=True"):
        run(model)
    with pytest.raises(UnsupportedModelError, match="no parameter has requires_grad=True"):
        lddyn.ntk(model, *zoo.examples())


def test_prompt_learning_adapter_is_refused():
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(
            zoo.build("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
        with pytest.raises(UnsupportedModelError, match="virtual tokens"):
            run(model)


def test_unknown_attention():
    with pytest.raises(ValueError, match="attention must be 'lddyn' or 'eager', got 'flash'"):
        Anatomy(zoo.build("llama"), "flash")


class Mixer(nn.Module):
    """Logits after the head that see each other."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config
        self.get_output_embeddings = model.get_output_embeddings
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, **kwargs):
        out = self.model(**kwargs)
        out.logits = out.logits - out.logits.mean(-1, keepdim=True)
        return out


def test_logits_that_mix_after_the_head():
    with pytest.raises(UnsupportedModelError, match="mixes tokens of the vocabulary"):
        run(Mixer(zoo.build("llama")))


def test_parameter_after_the_head():
    model = Mixer(zoo.build("llama"))
    model.scale = nn.Parameter(torch.tensor(1.5))
    model.forward = lambda **kwargs: scaled(model, kwargs)
    with pytest.raises(UnsupportedModelError, match="scale is used after the head"):
        run(model)


def scaled(model, kwargs):
    out = model.model(**kwargs)
    out.logits = out.logits * model.scale
    return out


def test_parameters_shared_between_blocks():
    """One MLP in both blocks: the paired Gram says no, the pushed one and decompose are right."""
    model = zoo.build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    observed, updated = zoo.examples()
    truth, scale = zoo.oracle_gram(model, observed, updated)
    anatomy = Anatomy(model)
    one, other = (Side.log_probs(anatomy.trace(e)) for e in (observed, updated))
    with pytest.raises(NotImplementedError, match="use factored_gram"):
        token_gram([one], [other])
    assert zoo.normalised_error(factored_gram([one], [other]), truth, scale) < 5e-6
    assert influence_error(model) < 5e-6


def test_forward_that_escapes_the_copy_is_found_out():
    """A closure as instance forward runs the original weights in a shifted copy: not silently."""
    model = zoo.build("llama")
    layer = model.model.layers[0]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    observed, updated = zoo.examples()
    with pytest.raises(UnsupportedModelError, match=r"forward of model\.layers\.0 was replaced"):
        lddyn.decompose(model, observed, lddyn.SFT(updated), lr=1e-3, rule="midpoint")


def test_detached_weight_norm_is_refused():
    # Autograd's rows and every check of ours would share DoRA's detach; a real step does not.
    observed, updated = zoo.examples()
    with pytest.raises(UnsupportedModelError, match="detach"):
        lddyn.decompose(zoo.lora("llama", use_dora=True), observed, lddyn.SFT(updated), lr=1e-4)


def test_rotary_angles_that_depend_on_the_length_are_not_cut():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 8,
        "factor": 8.0,
    }
    model = zoo.build("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    observed, updated = zoo.examples()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    exact = lddyn.ntk(model, observed, updated).gram(method="pushed")
    cut = lddyn.ntk(model, observed, updated, memory=1).gram(method="paired")
    assert (cut - exact).norm() < 1e-5 * exact.norm()
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


@pytest.mark.case("forward hooks at the ends of the stack")
def test_hooks_at_the_ends_of_the_stack_are_run_once():
    model = zoo.build("llama")
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    model.model.layers[-1].register_forward_hook(lambda _, args, out: out * 0.7)
    assert influence_error(model) < 1e-5


def test_models_that_are_not_causal_are_refused():
    model = zoo.build("llama")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, f=forward, **k: f(*a, **{**k, "attention_mask": None})
    observed, updated = zoo.examples()
    with pytest.raises(UnsupportedModelError, match="not causal"):
        lddyn.ntk(model, observed, updated)
