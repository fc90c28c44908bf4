"""Tiny causal LMs of every architecture of transformers, made by shrinking its default config.

`build(name)` takes the default config of a model type and makes every size in it small: vocabulary,
widths, layers, heads, experts, windows. A few architectures need more; `SPECIAL` has them. A name
with a plus sign, "falcon+alibi", is a variant: the architecture before it, with `VARIANTS`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96

# Keys of configs -> the largest value; a config that is smaller by default stays.
SIZES = {
    r"(.*_)?vocab_size(_.*)?|n_vocab": VOCABULARY,
    r"hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|model_dim|decoder_hidden_size"
    r"|encoder_hidden_dim|word_embed_proj_dim|embedding_size|(in|out)put_embedding_size"
    r"|dim_model|lru_width|attention_hidden_size": 32,
    r"hidden_size_per_layer_input": 8,
    r"(.*_)?intermediate_size|n_inner|(encoder_|decoder_)?ffn_dim|dim_ff|d_inner"
    r"|ffn_hidden_(size|dim)|intermediate_dim|d_ff|feed_forward_size|inner_dim": 48,
    r"moe_(shared_expert_)?intermediate_size|moe_ffn_hidden_size|expert_.*intermediate_size"
    r"|expert_ffn_hidden_size": 16,
    r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers|num_blocks": 2,
    r"(num|n)_heads?|num_(encoder_|decoder_)?attention_heads|(encoder|decoder)_attention_heads": 4,
    r"(.*_)?num_(global_)?key_value_heads|num_kv_heads": 2,
    r"(.*_)?head_dim|kv_channels|d_kv|attention_head_size": 8,
    r"qk_rope_head_dim|rotary_dim": 4,
    r"q_lora_rank|kv_lora_rank": 12,
    r"(moe_)?(num|n)(_routed|_local)?_experts": 4,
    r"(num|n)_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k": 2,
    r"n_group|topk_group|num_expert_group|(moe_)?(num|n)_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn_predict_layers": 0,
    r"max_position_embeddings|n_positions|max_(target|source)_positions|n_ctx"
    r"|max_seq(uence)?_len(gth)?": 64,
    r"(.*_)?sliding_window|attention_window(_size)?|attention_chunk_size|window_size": 6,
    r"(ssm_)?state_size|(mamba_)?d_state": 4,
    r"time_step_rank|mamba_dt_rank": 4,
    r"mamba_n(um)?_heads|linear_num_value_heads|n_mamba_heads": 4,
    r"linear_num_key_heads": 2,
    r"linear_(key|value)_head_dim|mamba_(head_dim|d_head|headdim)": 16,
    r"(mamba_)?n_groups|mamba_ngroups": 1,
    r"mamba_d_ssm": 64,
    r"(mamba_)?chunk_size": 8,
    r"laurel_rank|.*low_rank.*|.*lora_rank": 4,
    r"image_size": 28,
    r"patch_size": 14,
}

_TOKEN = re.compile(r".*_(token_id|token_index|token)")

_FOUR = {"num_hidden_layers": 4}
_SHARED = {
    **_FOUR,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}

_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_key_value_heads": 4,
    "per_layer_config": {"01": {"num_attention_heads": 2, "num_key_value_heads": 2}},
    "head_dim": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("indexed_attention", "sliding_attention")
    },
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "linear_num_heads": 2,
    "num_experts_per_token": 2,
    "num_key_value_heads": 4,
}

_ZAMBA = {
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
    "attention_head_dim": 16,
}

# What the rules above leave out, by model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LINEAR, "layer_group_size": 2},
    "kimi_linear": _LINEAR,
    "blt": {
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {},
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {
        **_SHARED,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16, "num_key_value_heads": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "xlnet": {"attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attention_hidden_size": 64},
    "zamba2": _ZAMBA,
}

_ASSISTANT = (
    "drafts tokens from the hidden states and the keys of another model, and takes no token ids"
)
_MUSIC = "its causal LM is the decoder of a model of sound, and makes the logits of four codebooks"

# What is no causal LM that can be trained on its own, although transformers lists it as one.
LEFT_OUT = {
    "gemma3n": "its tower of images needs the package timm; gemma3n_text is the text model",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
    "reformer": "it refuses a backward pass in evaluation mode, and hashes at random in every pass",
}

_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

# Settings that change what is computed.
VARIANTS: dict[str, dict[str, Any]] = {
    "falcon+alibi": {"alibi": True},
    "gemma4_text+shared": _SHARED,
    "llama+dynamic": {"rope_parameters": _ROPE, "max_position_embeddings": 6},
    "llama+tied": {"tie_word_embeddings": True},
}


def names() -> list[str]:
    """Every model type with a causal LM, and the variants; some of them are `LEFT_OUT`."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def build(name: str) -> nn.Module:
    """A tiny model in evaluation mode, with weights large enough for its structure to matter."""
    kind = name.partition("+")[0]
    default = transformers.AutoConfig.for_model(kind)
    changes = shrink(default.to_dict())
    if isinstance(changes.get("layer_types"), list):
        changes["num_hidden_layers"] = len(changes["layer_types"])
    for key, value in {**SPECIAL.get(kind, {}), **VARIANTS.get(name, {})}.items():
        nested = isinstance(value, dict) and isinstance(changes.get(key), dict)
        changes[key] = {**changes[key], **value} if nested else value
    if hasattr(default, "is_decoder"):
        changes["is_decoder"] = True  # else BERT and its kin see the tokens that they predict
    config = transformers.AutoConfig.for_model(kind, **changes)
    torch.manual_seed(0)
    # Grouped products of experts have no float64.
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, 0.6 * module.weight.shape[-1] ** -0.5)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in key or key.endswith("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Smaller values for a config's dictionary, without the keys that stay."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            kept = {k: value[k] for k in ("model_type",) if k in value}
            changes[key] = {**shrink(value), **kept}
        elif _TOKEN.fullmatch(key):
            if isinstance(value, int) and value >= VOCABULARY:
                changes[key] = VOCABULARY - 1 - len(key) % 8
            elif isinstance(value, list):
                changes[key] = [2]
        elif key == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            changes[key] = (2 * kinds)[: min(max(2, len(kinds)), 4)]
        elif not isinstance(value, bool):
            most = next((m for pattern, m in SIZES.items() if re.fullmatch(pattern, key)), None)
            if most is not None and isinstance(value, int) and value > most:
                changes[key] = most
            elif most is not None and isinstance(value, list | tuple) and value:
                changes[key] = [most] * 2 if isinstance(value[0], int) else value
    heads = config.get("num_attention_heads")
    if heads and config.get("num_key_value_heads") == heads and "kv_lora_rank" in config:
        changes["num_key_value_heads"] = changes.get("num_attention_heads", heads)
    return changes
