"""What a store's features depend on, as digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lddyn.data.example import Example
from lddyn.engine.streamed import present
from lddyn.files import canonical, digest_of
from lddyn.store.manifest import (
    plain,
)

__all__ = ["identify"]


def identify(
    model: torch.nn.Module,
    tokenizer: Any = None,
    examples: Iterable[Example] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What features depend on, as digests: the identity of a store.

    Args:
        model: Its configuration, and name, dtype, shape and bytes of every weight and buffer.
        tokenizer: Its vocabulary, rules and chat template. None: left out.
        examples: The data set, in order, by content id. None: left out.
        settings: Anything else that JSON can hold and that features depend on.

    Returns:
        Fields `model`, `tokenizer`, `data`, `versions` and the settings; another value of any of
        them does not open the store. Cost: reading the weights once, 2 GiB/s.

    Raises:
        ValueError: If a setting is not JSON.

    Example:
        >>> import torch
        >>> from lddyn.store.identity import identify
        >>> ours = identify(torch.nn.Linear(2, 1), seed=3)
        >>> sorted(ours), sorted(ours["model"])
        (['model', 'seed', 'versions'], ['class', 'weights'])
    """
    import transformers

    from lddyn import __version__

    weights = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = present(tensor).detach().cpu().contiguous().reshape(-1)
            weights.update(flat.view(torch.uint8).numpy().data)
    found: dict[str, Any] = {
        "model": {"class": type(model).__name__, "weights": weights.hexdigest()[:32]},
        "versions": {
            "lddyn": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    config = getattr(model, "config", None)
    if config is not None:
        # Where it was loaded from and by what version does not change what it computes.
        volatile = ("_name_or_path", "transformers_version")
        content = {k: v for k, v in config.to_dict().items() if k not in volatile}
        text = json.dumps(content, sort_keys=True, default=str)
        found["model"]["config"] = digest_of(text.encode())
        found["model"]["attention"] = getattr(config, "_attn_implementation", None)
    if tokenizer is not None:
        rules: Any = sorted(tokenizer.get_vocab().items())
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            rules = json.loads(tokenizer.backend_tokenizer.to_str())
            rules.pop("padding", None)  # left by the last call
            rules.pop("truncation", None)
        template = getattr(tokenizer, "chat_template", None)
        found["tokenizer"] = {
            "class": type(tokenizer).__name__,
            "rules": digest_of(canonical(rules)),
            "chat_template": None if template is None else digest_of(canonical(template)),
        }
    if examples is not None:
        ids = [example.content_id for example in examples]
        found["data"] = {"examples": len(ids), "digest": digest_of("\n".join(ids).encode())}
    for name, value in settings.items():
        found[name] = plain(name, value)
    return found
