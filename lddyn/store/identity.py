"""The identity of a store: digests of everything that its features depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.quantised import plain_values
from lddyn.engine.streamed import present
from lddyn.files import JsonObject, canonical, digest_of
from lddyn.store.manifest import json_copy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["identify"]


def identify(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    examples: Iterable[Example] | None = None,
    **settings: Any,
) -> JsonObject:
    """The identity of a store: digests of everything that its features depend on.

    Args:
        model: Contributes its configuration, and name, dtype, shape and bytes of every weight and
            buffer.
        tokenizer: Contributes vocabulary, rules and chat template. None: left out.
        examples: The data set in order; contributes the content ids. None: left out.
        settings: Anything else that features depend on and JSON can hold.

    Returns:
        Dict with `model`, `versions`, the settings, and `tokenizer` and `data` where given. A store
        is not opened with an identity in which one of these differs.

    Raises:
        ValueError: If JSON cannot hold a setting.

    Cost: reading the weights once, about 2 GiB/s.

    Example:
        >>> import torch
        >>> from lddyn.store.identity import identify
        >>> identity = identify(torch.nn.Linear(2, 1), seed=3)
        >>> sorted(identity), sorted(identity["model"])
        (['model', 'seed', 'versions'], ['class', 'weights'])
    """
    import transformers

    from lddyn import __version__

    identity: JsonObject = {
        "model": {"class": type(model).__name__, "weights": _weights(model)},
        "versions": {
            "lddyn": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    config = getattr(model, "config", None)
    if config is not None:
        identity["model"] |= _configuration(config)
    if tokenizer is not None:
        identity["tokenizer"] = _tokenizer(tokenizer)
    if examples is not None:
        ids = [example.content_id for example in examples]
        identity["data"] = {"examples": len(ids), "digest": digest_of("\n".join(ids).encode())}
    for name, value in settings.items():
        identity[name] = json_copy(name, value)
    return identity


def _weights(model: torch.nn.Module) -> str:
    """Digest of name, dtype, shape and bytes of every weight and buffer."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = plain_values(present(tensor)).cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _configuration(config: PretrainedConfig) -> JsonObject:
    """Digest of a model's configuration, and its attention implementation."""
    # Where it was loaded from, and by which version, does not change what the model computes.
    volatile = ("_name_or_path", "transformers_version")
    content = {k: v for k, v in config.to_dict().items() if k not in volatile}
    text = json.dumps(content, sort_keys=True, default=str)
    return {
        "config": digest_of(text.encode()),
        "attention": getattr(config, "_attn_implementation", None),
    }


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> JsonObject:
    """Digests of a tokenizer's rules (a slow one's vocabulary) and of its chat template."""
    rules: Any = sorted(tokenizer.get_vocab().items())
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("padding", None)  # left by the last call
        rules.pop("truncation", None)
    template = getattr(tokenizer, "chat_template", None)
    return {
        "class": type(tokenizer).__name__,
        "rules": digest_of(canonical(rules)),
        "chat_template": None if template is None else digest_of(canonical(template)),
    }
