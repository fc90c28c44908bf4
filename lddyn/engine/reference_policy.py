"""The reference policy π_ref of a preference loss, and its log-probs of given responses.

One resolver for everything that `reference=` may be, in every function that has this argument:

| reference | π_ref |
|---|---|
| a model, or its Anatomy | that model |
| "self" | the policy itself, at its parameters of this moment |
| "adapter-off" | the policy, a peft model, with its adapters disabled |
| "adapter:NAME" | the policy, a peft model, with the adapter NAME alone |
| log-probs in nats | not needed: the pair (log π_ref(y+), log π_ref(y−)), or a tensor (2, N) |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.logits import token_log_probs

__all__ = ["Reference", "check_reference", "policy_of", "reference_log_probs"]

Reference: TypeAlias = nn.Module | Anatomy | Tensor | Sequence[float] | Sequence[Tensor] | str

_ADAPTER = "adapter:"
_KINDS = (
    "a model, 'self', 'adapter-off', 'adapter:NAME', or log-probs (y+, y−) in nats with one number "
    "per pair each"
)


def check_reference(reference: Reference, pairs: int) -> Tensor | None:
    """Log-probs of the reference, (2, N) float64 in nats, where they are given; else None.

    Args:
        reference: See this module's table.
        pairs: N.

    Raises:
        ValueError: If it is none of these, or its log-probs are not 2 N finite numbers.
    """
    if isinstance(reference, nn.Module | Anatomy):
        return None
    if isinstance(reference, str):
        named = reference.startswith(_ADAPTER) and len(reference) > len(_ADAPTER)
        if named or reference in ("self", "adapter-off"):
            return None
        raise ValueError(f"reference must be {_KINDS}, got {reference!r}")
    try:
        if isinstance(reference, Tensor):
            values = reference.detach().double().cpu()
        else:
            values = torch.stack(
                [torch.as_tensor(r, dtype=torch.float64, device="cpu") for r in reference]
            )
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"reference must be {_KINDS}, got {reference!r}") from None
    shapes = [(2, pairs), (2,)] if pairs == 1 else [(2, pairs)]
    if tuple(values.shape) not in shapes:
        raise ValueError(
            f"reference log-probs (y+, y−) must have the shape {shapes[-1]}, got "
            f"{tuple(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"reference log-probs (y+, y−) must be finite numbers of nats, got {reference!r}"
        )
    return values.view(2, pairs)


def reference_log_probs(
    reference: Reference, anatomy: Anatomy, examples: Sequence[Example]
) -> Tensor:
    """The log π_ref of N chosen and N rejected responses, (2, N) float64, in nats.

    Args:
        reference: See this module's table.
        anatomy: The policy.
        examples: All chosen responses, then all rejected ones.

    Raises:
        ValueError: If the reference is none of the table, or the policy lacks the adapter.

    Cost: one forward pass per example, unless log-probs are given.
    """
    given = check_reference(reference, len(examples) // 2)
    if given is not None:
        return given
    with policy_of(reference, anatomy) as policy:
        values = token_log_probs(policy, examples)
    return torch.stack([lp.sum() for lp in values]).double().cpu().view(2, -1)


@contextlib.contextmanager
def policy_of(reference: Reference, anatomy: Anatomy) -> Iterator[Anatomy]:
    """The opened model to run for π_ref, with the policy's adapters switched while the block runs.

    Args:
        reference: A model, "self", "adapter-off" or "adapter:NAME".
        anatomy: The policy.

    Raises:
        ValueError: If the reference is none of these, the policy is no peft model, or it has no
            adapter of this name.
    """
    if isinstance(reference, Anatomy):
        yield reference
    elif isinstance(reference, nn.Module):
        yield Anatomy(reference, anatomy.attention, allow_frozen=True)
    elif reference == "self":
        yield anatomy
    elif not isinstance(reference, str):
        raise ValueError(f"reference must name a policy, got log-probs {reference!r}")
    else:
        policy: Any = anatomy.model
        if not hasattr(policy, "disable_adapter"):
            raise ValueError(
                f"reference={reference!r} needs a peft model with adapters, got "
                f"{type(policy).__name__}: wrap it with peft, or pass the reference model"
            )
        flags = [(p, p.requires_grad) for p in policy.parameters()]
        try:
            with _adapters(policy, reference):
                yield Anatomy(policy, anatomy.attention, allow_frozen=True)
        finally:  # peft makes adapter weights trainable whenever it switches them
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def _adapters(policy: Any, reference: str) -> Iterator[None]:
    """Switches the adapters of a peft model, and back."""
    if reference == "adapter-off":
        with policy.disable_adapter():
            yield
        return
    name = reference.removeprefix(_ADAPTER)
    if name not in policy.peft_config:
        raise ValueError(
            f"reference={reference!r} must name an adapter of the model, which has "
            f"{', '.join(policy.peft_config)}: load it with load_adapter(…, adapter_name={name!r})"
        )
    active, several = policy.active_adapter, list(policy.active_adapters)
    policy.set_adapter(name)
    try:
        yield
    finally:
        policy.base_model.set_adapter(several)
        policy.active_adapter = active
