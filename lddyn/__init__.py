"""Learning dynamics of LLM finetuning: an exact eNTK decomposition of a finetuning step.

Public names are resolved on first use (PEP 562), so that ``import lddyn`` costs nothing: torch is
imported by the first name that needs it. The ops are registered as ``torch.ops.lddyn.*`` as soon as
both lddyn and torch are imported, in either order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

__version__ = "0.1.0.dev0"

# Public name → the module that defines it. A name may equal its module's (lddyn.ntk): see _Package.
_PUBLIC = {
    "Anatomy": "anatomy",
    "DPO": "objectives",
    "Decomposition": "decompose",
    "Diagnosis": "diagnose",
    "Estimate": "estimate",
    "Example": "examples",
    "Features": "features",
    "Forecast": "forecast",
    "LowRank": "lowrank",
    "MassFlow": "massflow",
    "NTK": "ntk",
    "Objective": "objectives",
    "Plan": "plan",
    "Run": "forecast",
    "SFT": "objectives",
    "Sketch": "sketch",
    "Store": "store",
    "audit": "examples",
    "backend": "ops",
    "backends": "ops",
    "decompose": "decompose",
    "diagnose": "diagnose",
    "encode": "examples",
    "encode_row": "examples",
    "env": "environment",
    "features": "features",
    "gram": "ops",
    "lbk": "proxies",
    "massflow": "massflow",
    "ntk": "ntk",
    "plan": "plan",
    "preference": "objectives",
    "residual": "ops",
    "rows": "examples",
    "selftest": "environment",
    "sign_delta": "proxies",
    "stream": "stream",
    "token_log_probs": "decompose",
    "true_float64": "anatomy",
}

__all__ = ["__version__", *_PUBLIC]


# Modules that are part of the public surface, named by errors and docstrings.
_MODULES = ("ops", "reference")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lddyn.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lddyn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lddyn.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})


class _Package(types.ModuleType):
    """Keeps ``lddyn.ntk`` the function: importing a submodule must not shadow a public name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _PUBLIC.get(name) == name and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


class _AfterTorch:
    """Registers the ops when torch is imported after lddyn (a one-shot import hook)."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_then_register(module: types.ModuleType) -> None:
                load(module)
                importlib.import_module("lddyn.ops")

            spec.loader.exec_module = load_then_register  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    importlib.import_module("lddyn.ops")
else:
    sys.meta_path.insert(0, _AfterTorch)
