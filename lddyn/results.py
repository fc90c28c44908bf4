"""What every result of lddyn can do: explain itself, hand out its numbers, be saved and read back.

summary()   a few JSON-safe numbers        to_dict()        all numbers and texts, JSON-safe
explain()   sentences for people           save(), load()   files, where there are tensors to keep
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.files import JsonObject, json_safe, replace_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Result", "load_result", "save_result"]


class Result(abc.ABC):
    """Base of result classes. `print(result)` shows `explain()`; the repr shows the summary."""

    @abc.abstractmethod
    def summary(self) -> JsonObject:
        """A few numbers and names, JSON-safe."""

    @abc.abstractmethod
    def explain(self) -> str:
        """The result in words, for people."""

    @abc.abstractmethod
    def to_dict(self) -> Mapping[str, object]:
        """All numbers and texts, JSON-safe."""

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        shown = [
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value!r}"
            for key, value in self.summary().items()
            if value is None or isinstance(value, bool | int | float | str)
        ]
        return f"{type(self).__name__}({', '.join(shown[:8])})"


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    return path.with_name(path.name + ".safetensors"), path.with_name(path.name + ".json")


def save_result(
    path: str | Path,
    kind: str,
    version: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Writes `path`.json, and `path`.safetensors if there are tensors; each is replaced as a whole.

    Args:
        path: Where, without the endings. Folders are created.
        kind: What it is, such as "lddyn.Estimate".
        version: Of the format; to be raised whenever older code could not read it.
        tensors: Name → tensor.
        facts: Everything else, for JSON.
    """
    data, meta = _files(path)
    data.parent.mkdir(parents=True, exist_ok=True)
    head = {"kind": kind, "format": version, "tensors": bool(tensors)}
    if tensors:
        from safetensors.torch import save

        kept = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        replace_file(data, save(kept))
    text = json.dumps({**head, **json_safe(facts)}, indent=1, allow_nan=False)
    replace_file(meta, text)


def load_result(
    path: str | Path, kind: str, version: int, device: str = "cpu"
) -> tuple[dict[str, Tensor], JsonObject]:
    """Reads what `save_result` wrote: the tensors, and the facts.

    Raises:
        ValueError: If a file is missing or damaged, or holds another kind of result, or a format of
            another version.
    """
    data, meta = _files(path)
    tensors: dict[str, Tensor] = {}
    try:
        facts: JsonObject = json.loads(meta.read_text(encoding="utf-8"))
        if facts.pop("tensors", True):
            from safetensors.torch import load_file

            tensors = load_file(data, device=device)
        held, held_version = facts.get("kind", kind), facts.get("format", 1)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {error!r}") from error
    if held != kind:
        raise ValueError(f"{path}: cannot be read as {kind}: it holds {held}")
    if held_version != version:
        raise ValueError(
            f"{path}: cannot be read as {kind}: its format is {held_version}, and this version of "
            f"lddyn reads format {version}: read it with the version that wrote it, or make it anew"
        )
    return tensors, facts
