"""The longest sequence that a model's config allows."""

from __future__ import annotations

from typing import Any

_NO_LIMIT = 1 << 30  # beyond it, a number stands for "none", as 1e30 does


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model; the config itself if it has no parts."""
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is not None:
        return get_text_config()
    return getattr(config, "text_config", None) or config


def position_limit(config: Any) -> int | None:
    """Longest sequence that a model was built for, in tokens; None without a limit.

    There is none with dynamic RoPE, and where the config says none, -1 (XLNet) or a number so
    large that no sequence reaches it.
    """
    if "dynamic" in rope_types(config):
        return None
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT else None


def rope_types(config: Any) -> set[str]:
    """Kinds of rotary embeddings that a config names, such as "default" or "dynamic"."""
    text = text_config(config)
    settings = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(settings, dict):
        return set()
    parts = [settings, *(x for x in settings.values() if isinstance(x, dict))]
    return {str(x["rope_type"]) for x in parts if "rope_type" in x}
