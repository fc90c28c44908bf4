"""The reference policy π_ref of a preference loss, and its log-probs of given responses.

One resolver for everything that `reference=` may be, in every function that has this argument:

| reference | π_ref |
|---|---|
| a model, or its Anatomy | that model |
| "self" | the policy itself, at its parameters of this moment |
| "adapter-off" | the policy, a peft model, with its adapters disabled |
| "adapter:NAME" | the policy, a peft model, with the adapter NAME alone |
| log-probs in nats | not needed: the pair (log π_ref(y+), log π_ref(y−)), or a tensor (2, N) |

TRL's trainers take the adapter named "ref" of a peft policy as the reference where it has one, and
else the policy with its adapters disabled (`trainer_reference`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lddyn.data.columns import REFERENCE
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.logits import token_log_probs
from lddyn.engine.turns import switching
from lddyn.engine.undo import shielded

__all__ = [
    "Reference",
    "adapter_remarks",
    "adapters_switched",
    "check_reference",
    "describe_reference",
    "policy_of",
    "reference_log_probs",
    "row_log_probs",
    "trainer_reference",
    "warn_of_adapter",
]

Reference: TypeAlias = nn.Module | Anatomy | Tensor | Sequence[float] | Sequence[Tensor] | str

_ADAPTER = "adapter:"
_KINDS = (
    "a model, 'self', 'adapter-off', 'adapter:NAME', or log-probs (y+, y−) in nats with one number "
    "per pair each"
)


def check_reference(reference: Reference, count: int, sides: int = 2) -> Tensor | None:
    """Log-probs of the reference, (sides, N) float64 in nats, where they are given; else None.

    Args:
        reference: See this module's table.
        count: N: pairs, or responses where `sides` is 1.
        sides: 2 for pairs, 1 for single responses.

    Raises:
        ValueError: If it is none of these, or its log-probs are not so many finite numbers.
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
    shapes: list[tuple[int, ...]] = [(sides, count)]
    shapes += [(sides,)] if count == 1 else []
    shapes += [(count,)] if sides == 1 else []
    if tuple(values.shape) not in shapes:
        what = "(y+, y−) " if sides == 2 else ""
        raise ValueError(
            f"reference log-probs {what}must have the shape {shapes[-1]}, got {tuple(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"reference log-probs (y+, y−) must be finite numbers of nats, got {reference!r}"
        )
    return values.view(sides, count)


def describe_reference(reference: Reference) -> str:
    """What the reference is, in a few words."""
    if isinstance(reference, Anatomy):
        reference = reference.model
    if isinstance(reference, nn.Module):
        path = str(getattr(getattr(reference, "config", None), "name_or_path", "") or "")
        return f"another model ({path or type(reference).__name__})"
    if not isinstance(reference, str):
        return "log-probs that were given"
    if reference.startswith(_ADAPTER):
        return f"the model with its adapter {reference.removeprefix(_ADAPTER)!r} alone"
    named = {
        "self": "the model itself before the step",
        "adapter-off": "the model with its adapters off",
    }
    return named[reference]


def reference_log_probs(
    reference: Reference,
    anatomy: Anatomy,
    examples: Sequence[Example],
    sums: Callable[[list[Tensor]], Tensor] | None = None,
    sides: int = 2,
) -> Tensor:
    """The log π_ref of N chosen and N rejected responses, (2, N) float64, in nats.

    Args:
        reference: See this module's table.
        anatomy: The policy.
        examples: All chosen responses, then all rejected ones.
        sums: Maps the log-probs of the tokens of every response to a number per response; None:
            their sum.
        sides: 1 for N single responses; the result is (1, N).

    Raises:
        ValueError: If the reference is none of the table, or the policy lacks the adapter.

    Cost: one forward pass per example, unless log-probs are given.
    """
    given = check_reference(reference, len(examples) // sides, sides)
    if given is not None:
        return given
    with policy_of(reference, anatomy) as policy:
        values = token_log_probs(policy, examples)
    total = torch.stack([lp.sum() for lp in values]) if sums is None else sums(values)
    return total.double().cpu().view(sides, -1)


@contextlib.contextmanager
@shielded
def policy_of(reference: Reference, anatomy: Anatomy) -> Iterator[Anatomy]:
    """The opened model to run for π_ref, with the policy's adapters switched while the block runs.

    Warns where "adapter-off" is not the model that training started from (`adapter_remarks`).

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
        with adapters_switched(anatomy.model, reference):
            yield Anatomy(anatomy.model, anatomy.attention, allow_frozen=True)


@contextlib.contextmanager
@shielded
def adapters_switched(policy: Any, reference: str) -> Iterator[None]:
    """A peft model as its own reference within: "adapter-off", or "adapter:NAME".

    Raises:
        ValueError: If it is no peft model, or has no adapter of this name.
    """
    if not hasattr(policy, "disable_adapter"):
        raise ValueError(
            f"reference={reference!r} needs a peft model with adapters, got "
            f"{type(policy).__name__}: wrap it with peft, or pass the reference model"
        )
    warn_of_adapter(reference, policy)
    with switching(policy) as undo:
        for parameter in policy.parameters():  # peft trains what it switches
            undo.add(functools.partial(parameter.requires_grad_, parameter.requires_grad))
        with _adapters(policy, reference):
            yield


@contextlib.contextmanager
@shielded
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


# ---------------------------------------------------------------------------------------------
# Log-probs in rows


def row_log_probs(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The log π_ref that rows of pairs hold, (2, N) float64, in nats.

    Raises:
        ValueError: If a row lacks them, or holds something else than finite numbers.
    """
    for number, row in enumerate(rows):
        for column in REFERENCE:
            value = row.get(column)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"pair {number} must have log π_ref in nats in the column {column!r}, got "
                    f"{value!r}"
                )
    values = [[float(row[column]) for row in rows] for column in REFERENCE]
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# Adapters as references


def trainer_reference(model: nn.Module | Anatomy) -> str:
    """The reference that TRL's trainers take for this policy where they get no reference model.

    "adapter:ref" or "adapter-off" for a peft model; "self" for another one, which is the start
    model only before the first step.
    """
    policy: Any = Anatomy.module_of(model)
    adapters = getattr(policy, "peft_config", None)
    if not adapters or not hasattr(policy, "disable_adapter"):
        return "self"
    return f"{_ADAPTER}ref" if "ref" in adapters else "adapter-off"


def adapter_remarks(policy: nn.Module) -> list[str]:
    """Why this peft model with its adapters off is not the model that training started from.

    Looks for initialisations that change the base weights, and for trainable weights that
    `disable_adapter` does not switch. Empty: nothing was noticed.
    """
    model: Any = policy
    remarks = []
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config, "init_lora_weights", True)
        if kind is False:
            remarks.append(
                f"adapter {name!r} was initialised with random weights (init_lora_weights=False), "
                "so that the model started with the adapter's effect, not without it"
            )
        elif isinstance(kind, str) and kind.lower().startswith(_MOVES_BASE):
            remarks.append(
                f"adapter {name!r} was initialised by {kind}, which takes a part out of the base "
                "weights: with the adapter off that part is missing"
            )
    beside = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and not _switched(model, name)
    ]
    if beside:
        remarks.append(
            f"{len(beside)} weights are trained beside the adapter, {beside[0]} first, and "
            "disable_adapter does not put them back"
        )
    return remarks


# Initialisations that change base weights: principal or orthogonal parts go into the adapter.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Parts of parameter names that peft switches off with the adapter.
_SWITCHED = (".modules_to_save.", "trainable_tokens_", "prompt_encoder.")


def _switched(policy: Any, name: str) -> bool:
    """Whether a parameter of a peft model acts only while its adapter is on."""
    prefix = getattr(getattr(policy, "base_model", None), "prefix", None) or "lora_"
    adapters = [f".{adapter}" for adapter in policy.peft_config]
    own = any(f"{adapter}." in f"{name}." for adapter in adapters)
    return own and (prefix in name or any(part in name for part in _SWITCHED))


def warn_of_adapter(reference: Reference, policy: nn.Module) -> None:
    """Warns where "adapter-off" is not the model that training started from."""
    if not (isinstance(reference, str) and reference == "adapter-off"):
        return
    for remark in adapter_remarks(policy):
        warnings.warn(
            f"reference='adapter-off' is not the model that training started from: {remark}; pass "
            "the start model or its log-probs as the reference",
            stacklevel=2,
        )
