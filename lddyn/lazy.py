"""Imports on first use (PEP 562), for the package and its rooms."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(
    package: str, public: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: Name of the package.
        public: Public name → module that defines it, relative to the package. None: no names.

    Returns:
        Functions to assign to `__getattr__` and `__dir__`. The first imports public names and
        submodules on first use, so that `import lddyn; lddyn.engine.anatomy` works as written, and
        raises AttributeError for any other name.
    """
    modules = public or {}

    def load(name: str) -> Any:
        module = sys.modules[package]
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
            setattr(module, name, value)
            return value
        full = f"{package}.{name}"
        if not name.startswith("__") and importlib.util.find_spec(full) is not None:
            return importlib.import_module(full)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        module = sys.modules[package]
        inside = (m.name for m in pkgutil.iter_modules(module.__path__))
        return sorted({*vars(module), *modules, *inside})

    return load, names
