"""Tiny models of many architectures, built from their configs: no downloads."""

from __future__ import annotations

import contextlib
import copy

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lddyn.data.example import Example
from lddyn.engine.guard import true_float64

VOCABULARY = 89

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 24,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, dict] = {
    "gpt2": _GPT2,
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 5},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma2": {**_COMMON, **_GEMMA},
    "gemma3_text": {**_COMMON, **_GEMMA},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "phi3": _COMMON,
    "opt": _OPT,
    "olmo2": _COMMON,
    "falcon": {
        **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
        "multi_query": True,
        "bias": True,
        "new_decoder_architecture": False,
    },
    "granite": {
        **_COMMON,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
    },
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_COMMON, **_MOE, "head_dim": 8, "decoder_sparse_step": 1},
    "olmoe": {**_COMMON, **_MOE},
    "phi": _COMMON,
    "stablelm": _COMMON,
    "cohere": _COMMON,
    "bloom": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
    "gpt_oss": {
        **_COMMON,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
}


def build(name: str, seed: int = 0, **changes) -> nn.Module:
    """A tiny causal LM with weights large enough for the architecture to matter."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.6 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Fused(torch.autograd.Function):
    """A product whose weight no torch function shows, as fused-kernel libraries write it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


def examples() -> tuple[Example, Example]:
    """An observed and an updated sequence that share tokens."""
    observed = Example(
        prompt_ids=[5, 9, 33, 7], response_ids=[21, 9, 40, 7, 62, 2], name="observed"
    )
    updated = Example(prompt_ids=[5, 9, 12], response_ids=[40, 7, 33, 21, 2], name="updated")
    return observed, updated


def double(model: nn.Module) -> nn.Module:
    """A float64 copy; use it inside `true_float64()`."""
    return copy.deepcopy(model).double()


def lora(name: str, seed: int = 0, zero: bool = False, **options) -> nn.Module:
    """A tiny model with a LoRA adapter; B is random unless `zero`, as it is when freshly made."""
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **options}
    model = peft.get_peft_model(build(name, seed), peft.LoraConfig(**options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not zero and ("lora_B" in key or "lora_embedding_B" in key):
                parameter.normal_(0.0, 0.3)
    return model


def token_log_probs(model: nn.Module, example: Example) -> Tensor:
    """log π(y_m) of the response tokens by the model's own forward."""
    logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return precise.log_softmax(-1)[list(example.positions), list(example.targets)]


def jacobian(values: Tensor, parameters: list[Tensor]) -> Tensor:
    """Explicit rows ∇θ values[m], flattened over all parameters."""
    rows = []
    for value in values:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def oracle_jacobian(model: nn.Module, example: Example) -> Tensor:
    """∇θ log π(y_m) in true float64, over the trainable parameters."""
    exact = double(model).eval()
    with true_float64():
        values = token_log_probs(exact, example)
        return jacobian(values, [p for p in exact.parameters() if p.requires_grad])


def oracle_gram(model: nn.Module, observed: Example, updated: Example) -> tuple[Tensor, Tensor]:
    """⟨∇ log π(y_m), ∇ log π(y_l)⟩ in true float64, and the norms ‖a_m‖‖b_l‖ that scale errors."""
    one, other = oracle_jacobian(model, observed), oracle_jacobian(model, updated)
    return one @ other.T, one.norm(dim=1)[:, None] * other.norm(dim=1)[None]


def oracle_shift(model: nn.Module, example: Example, direction: Tensor, width=1e-5) -> Tensor:
    """Change of all log-probs (M, V) along a flat direction, by differences in true float64.

    Central differences at two widths, extrapolated: the error is of order width⁴.
    """
    exact = double(model).eval()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    parts = direction.split([p.numel() for p in parameters])
    unit = width / float(direction.norm())

    def log_probs(at: float) -> Tensor:
        for parameter, old, part in zip(parameters, start, parts, strict=True):
            parameter.copy_(old + at * part.view_as(old))
        logits = exact(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        return logits[list(example.positions)].log_softmax(-1)

    with torch.no_grad(), true_float64():
        wide, narrow = ((log_probs(h) - log_probs(-h)) / (2 * h) for h in (unit, unit / 2))
    return (4 * narrow - wide) / 3


def plain_shifts(model: nn.Module, example: Example, direction: Tensor) -> list[Tensor]:
    """Change of all log-probs (M, V) along a flat direction, by torch's forward mode.

    Once with each attention of torch that has a forward mode, eager and SDPA's "math": they round
    differently, and where a model is ill-conditioned one may be twice as wrong as the other.
    """
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    parts = direction.split([p.numel() for p in trainable.values()])
    moves = [part.view_as(p).to(p) for part, p in zip(parts, trainable.values(), strict=True)]

    def log_probs(*parameters: Tensor) -> Tensor:
        ids = torch.tensor([example.ids])
        given = dict(zip(trainable, parameters, strict=True))
        out = torch.func.functional_call(model, given, (ids,), {"use_cache": False})
        return out.logits[0, list(example.positions)].float().log_softmax(-1)

    shifts = []
    for attention in ("eager", "sdpa"):
        with contextlib.suppress(ValueError):  # an architecture without SDPA
            model.set_attn_implementation(attention)
            with sdpa_kernel(SDPBackend.MATH):
                shifts.append(torch.func.jvp(log_probs, tuple(trainable.values()), tuple(moves))[1])
    return shifts


def widest(model: nn.Module, example: Example) -> Tensor:
    """‖∇ log π(v)‖ (M,) of each position's least likely token: the scale of errors over all v."""
    exact = double(model).eval()
    with true_float64():
        logits = exact(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        values = logits[list(example.positions)].log_softmax(-1).amin(-1)
        return jacobian(values, [p for p in exact.parameters() if p.requires_grad]).norm(dim=1)


def normalised_error(value: Tensor, truth: Tensor, scale: Tensor) -> float:
    """Largest error in units of ‖a_m‖‖b_l‖ (token gradients are nearly orthogonal)."""
    return float(((value.double() - truth).abs() / scale).max())


def train(model: nn.Module, steps: int = 12, lr: float = 3e-3) -> nn.Module:
    """The model after a few AdamW steps on copies: its kernel is not that of random weights."""
    generator = torch.Generator().manual_seed(1)
    half = torch.randint(3, 60, (8, 8), generator=generator)
    ids = torch.cat([half, half], dim=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def dense_jacobian(model: nn.Module, example: Example) -> Tensor:
    """∇θ z of every response logit (M, V, P) in true float64, over the trainable parameters."""
    exact = double(model).eval()
    parameters = [p for p in exact.parameters() if p.requires_grad]
    with true_float64():
        logits = exact(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        logits = logits[list(example.positions)]
        ones = torch.eye(logits.numel(), dtype=logits.dtype)
        gradients = torch.autograd.grad(
            logits.flatten(), parameters, ones, is_grads_batched=True, allow_unused=True
        )
    flat = [
        logits.new_zeros(logits.numel(), p.numel()) if g is None else g.flatten(1)
        for g, p in zip(gradients, parameters, strict=True)
    ]
    return torch.cat(flat, dim=1).view(*logits.shape, -1)


def dense_kernel(
    model: nn.Module, observed: Example, updated: Example, precondition: dict | None = None
) -> Tensor:
    """K, or J_o P J_uᵀ, as (M, L, V, V) in true float64."""
    one, other = dense_jacobian(model, observed), dense_jacobian(model, updated)
    if precondition is not None:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        other = other * torch.cat([precondition[n].double().flatten() for n in names])
    return torch.einsum("mvp,lwp->mlvw", one, other)


def centred(kernel: Tensor) -> Tensor:
    """Π K Π for every token pair."""
    kernel = kernel - kernel.mean(-1, keepdim=True)
    return kernel - kernel.mean(-2, keepdim=True)
