"""A block's layers against plain torch, in every mode of differentiation; and their recognition."""

import sys
from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn
from torch.autograd import forward_ad

from lddyn.engine import layers
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.recognise import ELEMENTWISE, ROTATES

torch.set_num_threads(1)

REFUSED = "no second derivative|is not differentiable|does not have vmap support"


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# --------------------------------------------------------------------------- the layers, twice


def plain_attention(query, key, value, mask, scale, softcap):
    """Textbook attention, (1, H, T, e) -> (1, T, H, f); grouped keys and values are repeated."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return ((scores + mask).softmax(-1) @ value).transpose(1, 2)


def attention(heads=4, groups=4, softcap=None, window=None):
    """(ours, plain, inputs) of one sequence of seven tokens."""
    distance = torch.arange(7)[:, None] - torch.arange(7)
    shut = (distance < 0) | (distance >= (window or 7))
    mask = normal(1, 1, 7, 7).fill_(0).masked_fill(shut, -torch.inf)
    inputs = normal(1, heads, 7, 4), normal(1, groups, 7, 4), normal(1, groups, 7, 3)

    def ours(q, k, v):
        return layers.attention(None, q, k, v, mask, 0.7, softcap=softcap)[0]

    return ours, lambda q, k, v: plain_attention(q, k, v, mask, 0.7, softcap), inputs


def norm(shift=0.0, centred=False, affine=(True, True)):
    has_gain, has_bias = affine

    def named(parameters):
        parameters = list(parameters)
        gain = parameters.pop(0) if has_gain else None
        return gain, parameters.pop(0) if has_bias else None

    def ours(x, *parameters):
        return layers.Norm(*named(parameters), 1e-3, shift, centred)(x)[0]

    def plain(x, *parameters):
        gain, bias = named(parameters)
        x = x - x.mean(-1, keepdim=True) if centred else x
        x = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        x = x if gain is None else x * (shift + gain)
        return x if bias is None else x + bias

    return ours, plain, (normal(1, 5, 6), *(normal(6) for given in affine if given))


def activation(function, x):
    """Our activation at x, for its argument; made outside of torch.func, where it would raise."""
    known = layers.activate(function, x)
    return lambda argument: replace(known, argument=argument)


def gate(own=False):
    inputs = normal(2, 5), normal(2, 5)
    found = activation(nn.functional.silu, inputs[0])

    def plain(a, u):
        return nn.functional.silu(a) * (a if own else u)

    return lambda a, u: found(a).gate(a if own else u), plain, inputs


def tanh():
    inputs = (normal(2, 5),)
    found = activation(torch.tanh, *inputs)
    return lambda x: found(x).output, torch.tanh, inputs


def rotation():
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    cos, sin = angles.cos().double(), angles.sin().double()

    def plain(x):
        return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin

    return lambda x: layers.rotate(x, cos, sin), plain, (normal(1, 3, 5, 4),)


def product():
    weight, bias = normal(4, 6), normal(6)
    return (
        lambda x: layers.product(x, weight, bias),
        lambda x: x @ weight + bias,
        (normal(1, 3, 4),),
    )


LAYERS = {
    "attention": attention,
    "attention-grouped": lambda: attention(groups=2),
    "attention-capped": lambda: attention(softcap=1.5),
    "attention-window": lambda: attention(window=3),
    "attention-all": lambda: attention(6, 2, 1.5, 3),
    "rms-norm": lambda: norm(affine=(True, False)),
    "rms-norm-shifted": lambda: norm(1.0, affine=(True, False)),
    "norm-of-nothing": lambda: norm(affine=(False, False)),
    "norm-of-bias": lambda: norm(affine=(False, True)),
    "layer-norm": lambda: norm(centred=True),
    "activation": tanh,
    "gate": gate,
    "gate-of-itself": lambda: gate(own=True),
    "rotation": rotation,
    "product": product,
}
# Nonlinear in their inputs, so that a second derivative is not zero.
CURVED = [name for name in LAYERS if name not in ("rotation", "product")]


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


@pytest.fixture(params=CURVED)
def curved(request):
    return LAYERS[request.param]()


def used(function, inputs):
    """The function of those inputs that it depends on, and these: so that no gradient is None."""
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    found = torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)
    wanted = [i for i, x in enumerate(found) if x is not None]

    def partial(*some):
        full = list(inputs)
        for i, x in zip(wanted, some, strict=True):
            full[i] = x
        return function(*full)

    return partial, tuple(inputs[i] for i in wanted)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


# --------------------------------------------------------------------------- first derivatives


def test_value_and_gradients(layer):
    ours, plain, inputs = layer
    close(ours(*inputs), plain(*inputs))
    leaves = [x.requires_grad_(True) for x in inputs]
    g = normal(*plain(*inputs).shape)
    found = (torch.autograd.grad(f(*leaves), leaves, g, allow_unused=True) for f in (ours, plain))
    close(*found)


def test_pullback_of_many_cotangents(layer):
    """Under vmap of autograd.grad, as the engine does it, and of torch.func.vjp."""
    ours, plain, inputs = layer
    ours, inputs = used(ours, inputs)
    plain = used(plain, layer[2])[0]
    batch = normal(3, *plain(*inputs).shape)
    expected = torch.func.vmap(torch.func.vjp(plain, *inputs)[1])(batch)
    close(torch.func.vmap(torch.func.vjp(ours, *inputs)[1])(batch), expected)
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    out = ours(*leaves)

    def grad(g):
        return torch.autograd.grad(out, leaves, g, retain_graph=True)

    pull = torch.func.vmap(grad)
    close(pull(batch), expected)
    # Batched along another axis than the first.
    other = torch.func.vmap(grad, in_dims=1)
    close(other(batch.movedim(0, 1)), expected)


def test_forward_mode(layer):
    ours, plain, inputs = layer
    tangents = tuple(torch.randn_like(x) for x in inputs)
    expected = torch.func.jvp(plain, inputs, tangents)[1]
    close(torch.func.jvp(ours, inputs, tangents)[1], expected)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True))
        close(forward_ad.unpack_dual(ours(*duals)).tangent, expected)


def test_forward_mode_of_each_input_alone(layer):
    ours, plain, inputs = layer
    for i, x in enumerate(inputs):
        tangent = torch.randn_like(x)

        def alone(function, y, i=i):
            return function(*inputs[:i], y, *inputs[i + 1 :])

        found, expected = (
            torch.func.jvp(lambda y, f=f: alone(f, y), (x,), (tangent,))[1] for f in (ours, plain)
        )
        close(found, expected)


def test_double_backward_in_the_cotangent_is_the_jvp(layer):
    """The engine's forward mode: the gradient of u -> pullback(u), also for many tangents."""
    ours, plain, inputs = layer
    ours, inputs = used(ours, inputs)
    plain = used(plain, layer[2])[0]
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    out = ours(*leaves)
    dual = torch.zeros_like(out).requires_grad_(True)
    pulled = torch.autograd.grad(out, leaves, dual, create_graph=True)
    batch = tuple(normal(3, *x.shape) for x in inputs)

    def push(*tangents):
        return torch.autograd.grad(pulled, dual, tangents, retain_graph=True)[0]

    expected = torch.func.vmap(lambda *t: torch.func.jvp(plain, inputs, t)[1])(*batch)
    close(push(*(x[0] for x in batch)), expected[0])
    close(torch.func.vmap(push)(*batch), expected)


def test_jacobian_by_reverse_mode(layer):
    ours, plain, inputs = layer
    close(torch.func.jacrev(ours)(*inputs), torch.func.jacrev(plain)(*inputs))


# --------------------------------------------------------------------------- second derivatives


def energy(function, inputs):
    """x -> a nonlinear number, in the first input: its Hessian needs that of the layer."""
    return lambda x: function(x, *inputs[1:]).sin().sum()


def total(function, inputs):
    """x -> the sum of the layer's entries: its cotangent is a constant."""
    return lambda x: function(x, *inputs[1:]).sum()


SECOND = {
    "hessian": lambda f, x, t: torch.func.hessian(f)(x),
    "jacfwd(jacrev)": lambda f, x, t: torch.func.jacfwd(torch.func.jacrev(f))(x),
    "jacrev(jacrev)": lambda f, x, t: torch.func.jacrev(torch.func.jacrev(f))(x),
    "grad(grad)": lambda f, x, t: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    "jvp(grad)": lambda f, x, t: torch.func.jvp(torch.func.grad(f), (x,), (t,)),
    "grad(jvp)": lambda f, x, t: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (t,))[1])(x),
    "jvp(jvp)": lambda f, x, t: torch.func.jvp(
        lambda y: torch.func.jvp(f, (y,), (t,))[1], (x,), (t,)
    ),
}


@pytest.mark.parametrize("of", [energy, total])
@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_raise(curved, way, of):
    ours, plain, inputs = curved
    x, tangent = inputs[0], torch.randn_like(inputs[0])
    SECOND[way](of(plain, inputs), x, tangent)  # the question makes sense
    with pytest.raises((RuntimeError, NotImplementedError), match=REFUSED):
        SECOND[way](of(ours, inputs), x, tangent)


def test_a_gradient_penalty_raises(curved):
    ours, _, inputs = curved
    leaves = [x.requires_grad_(True) for x in inputs]
    for of in (energy, total):
        gradients = torch.autograd.grad(of(ours, leaves)(leaves[0]), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradients[0].square().sum(), leaves[0])
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradients[0].square().sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_over_reverse_raises(curved, create_graph):
    """The gradient at a dual number: its tangent would be missing, with a constant cotangent."""
    ours, _, inputs = curved
    for of in (energy, total):
        with forward_ad.dual_level():
            leaf = inputs[0].clone().requires_grad_(True)
            dual = forward_ad.make_dual(leaf, torch.randn_like(leaf))
            with pytest.raises(RuntimeError, match="no second derivative"):
                value = of(ours, inputs)(dual)
                torch.autograd.grad(value, leaf, create_graph=create_graph)


def test_vmap_over_inputs_raises():
    """Many forward passes at once are not what the layers are for."""
    ours, _, inputs = attention()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(ours)(*(torch.stack([x, x]) for x in inputs))


# --------------------------------------------------------------------------- other attention


def test_attention_out_of_parts():
    """Learned sinks: composed of differentiable operations, second order included."""
    inputs = tuple(normal(1, n, 5, 4) for n in (4, 2, 2))
    sinks = normal(4)
    mask = normal(1, 1, 5, 5)

    def ours(q, k, v):
        return layers.attention(None, q, k, v, mask, softcap=2.0, s_aux=sinks)[0]

    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = 2.0 * torch.tanh(q @ k.mT * 4**-0.5 / 2.0) + mask
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, 5, 1)], -1)
        return (scores.softmax(-1)[..., :5] @ v).transpose(1, 2)

    close(ours(*inputs), plain(*inputs))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    close(torch.func.jvp(ours, inputs, tangents), torch.func.jvp(plain, inputs, tangents))

    def penalty(function):
        loss = torch.func.grad(lambda q: function(q, *inputs[1:]).sin().sum())
        return torch.func.grad(lambda q: loss(q).square().sum())(inputs[0])

    close(penalty(ours), penalty(plain))


@pytest.mark.parametrize("masks", [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_attention_of_a_batch_is_that_of_each_sequence(masks):
    """Its heads are folded, and so are masks that differ by sequence or by head; bit for bit."""
    inputs = [normal(3, n, 5, 4).float().requires_grad_(True) for n in (4, 2, 2)]
    mask, cotangent = normal(*masks, 5, 5).float(), normal(3, 5, 4, 4).float()

    def both(*inputs, mask, cotangent):
        out = layers.attention(None, *inputs, mask, softcap=2.0)[0]
        return out.detach(), *torch.autograd.grad(out, inputs, cotangent)

    found = both(*inputs, mask=mask, cotangent=cotangent)
    for i in range(3):
        own = mask[i : i + 1] if len(mask) > 1 else mask
        one = both(*(x[i : i + 1] for x in inputs), mask=own, cotangent=cotangent[i : i + 1])
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(found, one, strict=True))


def test_rows_of_attention_are_rows_of_its_pullback():
    """`Rows` for some queries gives what `attend` gives for cotangents that live on them."""
    (heads, groups), rows = (6, 2), torch.tensor([1, 4, 4])
    query, key, value = normal(heads, 7, 4), normal(groups, 7, 4), normal(groups, 7, 3)
    mask = normal(1, 7, 7)
    grads = normal(heads, len(rows), 3)
    found = layers.Rows(query[:, rows], key, value, mask[:, rows], 0.7, 1.5)
    leaves = [x.requires_grad_(True) for x in (query, key, value)]
    out = layers.attend(*leaves, mask, 0.7, 1.5)
    close(found.output.detach(), out[:, rows].detach())
    grad_query, grad_key, grad_value = found.pull(grads)
    for i, row in enumerate(rows):
        cotangent = torch.zeros_like(out)
        cotangent[:, row] = grads[:, i]
        expected = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
        close((grad_query[:, i], grad_key[i], grad_value[i]), (expected[0][:, row], *expected[1:]))


# --------------------------------------------------------------------------- recognition


def verdicts(trial, anatomy):
    """Whether the modules, or files, that a trial met passed it: a set of True and False."""
    known = trial.verdicts(anatomy.recogniser.owner)
    return {trial.verdict(anatomy.recogniser.owner, key) for key in known}


def replayed(model, example=None):
    anatomy = Anatomy(model)
    trace = anatomy.trace(example or zoo.examples()[0])
    with anatomy.analysis():
        for segment in range(len(anatomy.segments)):
            anatomy.replay(trace, segment, trace.length)
    return anatomy


# Per architecture: how many norms are recognised, (centred, shift); whether the activations are,
# and the rotary function (None: it has none that turns whole heads).
EXPECTED = {
    "gpt2": (5, (True, 0.0), True, None),
    "llama": (5, (False, 0.0), True, True),
    "mistral": (5, (False, 0.0), True, True),
    "qwen2": (5, (False, 0.0), True, True),
    "qwen3": (9, (False, 0.0), True, True),
    "gemma2": (9, (False, 1.0), True, True),
    "gemma3_text": (13, (False, 1.0), True, True),
    "gpt_neox": (5, (True, 0.0), True, None),
    "phi3": (5, (False, 0.0), True, True),
    "opt": (5, (True, 0.0), True, None),
    "olmo2": (9, (False, 0.0), True, True),
    "falcon": (3, (True, 0.0), True, True),
    "granite": (5, (False, 0.0), True, True),
    "mixtral": (5, (False, 0.0), True, True),
    "qwen3_moe": (9, (False, 0.0), True, True),
    "olmoe": (9, (False, 0.0), True, True),
    "phi": (3, (True, 0.0), True, True),
    "stablelm": (5, (True, 0.0), True, True),
    "cohere": (3, (True, 0.0), True, False),
    "bloom": (6, (True, 0.0), None, None),
    "gpt_oss": (5, (False, 0.0), None, None),
}


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_what_is_recognised(name):
    anatomy = replayed(zoo.build(name))
    found = [x for x in anatomy.recogniser.norms.values() if x is not None]
    kinds = {(x.centred, x.shift) for x in found}
    activations, rotary = verdicts(ELEMENTWISE, anatomy), verdicts(ROTATES, anatomy)
    norms, kind, activated, rotated = EXPECTED[name]
    assert (len(found), kinds) == (norms, {kind})
    assert activations == (set() if activated is None else {activated})
    assert rotary == (set() if rotated is None else {rotated})


def test_zero_angles_prove_nothing():
    """A lone first token is not turned: Cohere's pairs of neighbours would pass for halves."""
    anatomy = Anatomy(zoo.build("cohere"))
    trace = anatomy.trace(zoo.examples()[0])
    with anatomy.analysis():
        anatomy.replay(trace, 1, 1)
        assert verdicts(ROTATES, anatomy) == set()
        anatomy.replay(trace, 1, trace.length)
        assert verdicts(ROTATES, anatomy) == {False}


class Shifted(nn.Module):
    """An RMS norm that adds 0.1."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps) + 0.1


class WrongEps(nn.LayerNorm):
    """A layer norm that does not use the eps it shows."""

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-3)


class Row(nn.Module):
    """An RMS norm whose gain also enters by a sum."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 0.0) + self.weight


def of_a_norm(x):
    """What a norm without gain returns."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda: nn.LayerNorm(32), True),
        (lambda: nn.LayerNorm(32, bias=False), True),
        (lambda: nn.LayerNorm(32, elementwise_affine=False), True),
        (lambda: nn.RMSNorm(32, eps=1e-5), True),
        (lambda: Shifted(32), False),
        (lambda: WrongEps(32), False),
        (lambda: Row(32), False),
        (lambda: nn.GroupNorm(4, 32), False),
        (lambda: nn.Identity(), False),
        (lambda: nn.Dropout(0.5).eval(), False),
        (lambda: nn.Tanh(), False),
    ],
    ids=lambda x: "",
)
def test_norms_are_known_by_what_they_compute(make, known, dtype):
    module = make().to(dtype)
    # As the output of a norm without gain: on it the identity is a norm.
    for x in (torch.randn(1, 7, 32), of_a_norm(torch.randn(7, 32))):
        if isinstance(module, nn.GroupNorm):
            x = x.reshape(7, 32)
        found = layers.recognise_norm(module, module.forward, x.to(dtype))
        assert (found is not None) == known


class Sloped(nn.Module):
    """An activation with a slope to learn, in a module named as transformers names its own."""

    __module__ = "somewhere.activations"

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


@pytest.mark.parametrize(
    ("function", "alone"),
    [
        (nn.functional.silu, True),
        (nn.functional.gelu, True),
        (torch.relu, True),
        (lambda x: x.softmax(-1), False),
        (lambda x: x.softmax(-2), False),
        (lambda x: x - x.mean(), False),
        (lambda x: x.flip(-1), False),
        (lambda x: x.sum(-1), False),
    ],
)
@pytest.mark.parametrize("shape", [(1, 7, 10), (2, 2), (3, 9), (4, 3, 8)])
def test_activations_that_mix_entries_are_left_alone(function, alone, shape):
    x = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)[0]  # strided, as a fused product is
    assert layers.is_elementwise(function, x) == alone


def with_activation(activation):
    model = zoo.build("llama")
    for block in model.model.layers:
        block.mlp.act_fn = activation()
    return model


def test_softmax_for_an_activation_is_left_alone():
    anatomy = replayed(with_activation(lambda: nn.Softmax(-1)))
    assert verdicts(ELEMENTWISE, anatomy) == {False}


def test_parameters_of_an_activation_have_gradients():
    """They are not in the closed form, so it must not be used."""
    model = with_activation(Sloped)
    anatomy = Anatomy(model)
    trace = anatomy.trace(zoo.examples()[0])
    with anatomy.analysis():
        replay = anatomy.replay(trace, 1, trace.length)
        edges = {name: edge for name, edge, _ in replay.direct}
        edge = edges["model.layers.0.mlp.act_fn.slope"]
        (found,) = torch.autograd.grad(replay.output.sum(), edge)
    assert float(found.abs()) > 0
    assert verdicts(ELEMENTWISE, anatomy) == set()


def test_product_of_two_activations_is_not_one_gate():
    """φ(a) ∘ φ(b), φ(a) ∘ a and 2 φ(a) in one module, against the module by itself."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.SiLU()

        def forward(self, x):
            a, b = self.act(x), self.act(2 * x)
            return a * b + torch.mul(a, x) + 2 * a + a * a.mean(-1, keepdim=True)

    model = with_activation(Mixed)
    truth, scale = zoo.oracle_gram(model, *zoo.examples())
    from lddyn.engine.gram import Side, token_gram

    anatomy = Anatomy(model)
    sides = [Side.log_probs(anatomy.trace(e)) for e in zoo.examples()]
    assert zoo.normalised_error(token_gram(sides[:1], sides[1:]), truth, scale) < 5e-6
    assert verdicts(ELEMENTWISE, anatomy) == {True}


# --------------------------------------------------------------------------- no trace is left


def touched(model):
    """Modules with a forward of their own, and the rotary functions that their files define."""
    forwards = [name for name, m in model.named_modules() if "forward" in m.__dict__]
    files = {type(m).__module__ for m in model.modules()}
    functions = {f: getattr(sys.modules[f], "apply_rotary_pos_emb", None) for f in files}
    return forwards, functions


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_everything_is_put_back_after_a_replay(name):
    model = zoo.build(name)
    before = touched(model)
    replayed(model)
    assert touched(model) == before and before[0] == []


@pytest.mark.parametrize("where", ["mlp.down_proj", "input_layernorm", "self_attn.o_proj"])
def test_everything_is_put_back_after_an_exception(where):
    model = zoo.build("llama")
    before = touched(model)
    anatomy = Anatomy(model)
    trace = anatomy.trace(zoo.examples()[0])

    def broken(*args):
        raise KeyError("broken")

    module = model.get_submodule(f"model.layers.1.{where}")
    handle = module.register_forward_pre_hook(broken)
    with anatomy.analysis(), pytest.raises(KeyError, match="broken"):
        anatomy.replay(trace, 2, trace.length)
    handle.remove()
    assert touched(model) == before and before[0] == []


def test_a_forward_of_the_users_own_is_put_back():
    model = zoo.build("llama")
    norm = model.model.layers[0].input_layernorm
    original = norm.forward

    def own(x):
        return original(x) + 0.1

    norm.forward = own
    anatomy = replayed(model)
    assert norm.__dict__["forward"] is own
    assert anatomy.recogniser.norms[norm] is None
