"""Learning dynamics of LLM finetuning: an exact eNTK decomposition of a finetuning step.

Public names are resolved on first use (PEP 562), so that ``import lddyn`` costs nothing: torch is
imported by the first name that needs it. The ops are registered as ``torch.ops.lddyn.*`` as soon as
both lddyn and torch are imported, in either order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from lddyn.lazy import attributes

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

# Public name → the module that defines it.
_PUBLIC = {
    "Anatomy": "engine.anatomy",
    "Audit": "data.audit",
    "DPO": "objectives.paired",
    "Decomposition": "steps.decomposition",
    "Diagnosis": "sets.diagnosis",
    "DisagreementError": "errors",
    "EmptyResponseError": "errors",
    "Estimate": "estimate",
    "Example": "data.example",
    "ExampleError": "errors",
    "Features": "sketches.result",
    "Forecast": "sets.forecast",
    "GRPO": "objectives.grouped",
    "KTO": "objectives.unpaired",
    "LowRank": "entk.lowrank",
    "Loss": "objectives.loss",
    "MassFlow": "steps.massflow",
    "MemoryBudgetError": "errors",
    "NTK": "entk.operator",
    "NonFiniteError": "errors",
    "Objective": "objectives.objective",
    "Observed": "steps.decomposition",
    "Plan": "sketches.plan",
    "RowOptions": "data.options",
    "Run": "sets.run",
    "SFT": "objectives.objective",
    "SequenceDiagnosis": "sets.sequence_diagnosis",
    "Sketch": "sketches.sketch",
    "Store": "store.store",
    "StoreCorruptError": "errors",
    "StoreError": "errors",
    "StoreIdentityError": "errors",
    "StoreLockedError": "errors",
    "TrainerSettings": "settings",
    "UnrepeatableModelError": "errors",
    "UnsupportedModelError": "errors",
    "Verification": "steps.verification",
    "audit": "data.audit",
    "backend": "ops",
    "backends": "ops",
    "decompose": "steps.decompose",
    "diagnose": "sets.diagnose",
    "encode": "data.encode",
    "encode_row": "data.rows",
    "env": "environment",
    "features": "sketches.features",
    "gram": "ops",
    "lbk": "entk.proxies",
    "massflow": "steps.massflow",
    "ntk": "entk.operator",
    "plan": "sketches.plan",
    "preference": "objectives.paired",
    "residual": "ops",
    "rows": "data.read",
    "selftest": "environment",
    "sign_delta": "entk.proxies",
    "stream": "engine.stream.model",
    "token_factors": "engine.token_factors",
    "token_log_probs": "engine.logits",
    "true_float64": "engine.guard",
}

__all__ = ["__version__", *_PUBLIC]

__getattr__, __dir__ = attributes(__name__, _PUBLIC)


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
