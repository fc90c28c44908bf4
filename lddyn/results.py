"""What every result of lddyn can do: explain itself, hand out its numbers, be saved and read back.

summary()   a few JSON-safe numbers        to_dict()        all numbers and texts, JSON-safe
explain()   sentences for people           save(), load()   files, where there are tensors to keep

A notebook shows the sentences and small tables (`lddyn.cells`).
"""

from __future__ import annotations

import abc
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.cells import Grid, cell
from lddyn.files import (
    LARGEST_RECORD,
    JsonObject,
    digest_of,
    read_regular,
    read_sealed,
    replace_file,
    sealed,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Result", "load_result", "save_result"]


class Result(abc.ABC):
    """Base of result classes. `print(result)` shows `explain()`; the repr shows the summary.

    Whatever a damaged or hand-made file makes of `load` is a ValueError that names the file.
    """

    def __init_subclass__(cls) -> None:
        """Makes errors of `load` name the file."""
        super().__init_subclass__()
        load = vars(cls).get("load")
        if isinstance(load, classmethod):
            cls.load = classmethod(_naming_the_file(load.__func__))  # type: ignore[attr-defined]

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

    def _caption(self) -> str:
        """What a notebook says above the tables; the repr, where these say what `explain` does."""
        return self.explain()

    def _grids(self) -> Sequence[Grid]:
        """Tables that a notebook shows below the caption."""
        return ()

    def _repr_html_(self) -> str:
        """What a notebook shows: a caption and a few small tables."""
        return cell(type(self).__name__, self._caption(), self._grids())

    def __repr__(self) -> str:
        shown = [
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value!r}"
            for key, value in self.summary().items()
            if value is None or isinstance(value, bool | int | float | str)
        ]
        return f"{type(self).__name__}({', '.join(shown[:8])})"


def _naming_the_file(load: Callable[..., Any]) -> Callable[..., Any]:
    """The function `load(cls, path, …)`, whose errors name the path."""

    @functools.wraps(load)
    def named(cls: type, path: str | Path, *rest: Any, **options: Any) -> Any:
        try:
            return load(cls, path, *rest, **options)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
            raise _unreadable(path, cls, error) from error
        except (TypeError, ValueError) as error:
            if str(path) in str(error):
                raise
            raise _unreadable(path, cls, error) from error

    return named


def _unreadable(path: str | Path, cls: type, error: Exception) -> ValueError:
    reason = f"it has no {error}" if isinstance(error, KeyError) else error
    return ValueError(f"{path}: cannot be read as lddyn.{cls.__name__}: {reason}")


def save_result(
    path: str | Path,
    kind: str,
    version: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Writes `path`.json, and `path`.DIGEST.safetensors if there are tensors, in one commit.

    The JSON file names the tensors' file and holds the digests of both. It is replaced last and as
    a whole: after a crash or a loss of power the old result is there, or the new one.

    Args:
        path: Where, without the endings. Folders are created.
        kind: What it is, such as "lddyn.Estimate".
        version: Of the format; to be raised whenever older code could not read it.
        tensors: Name → tensor.
        facts: Everything else, for JSON; NaN and infinities become null.

    Raises:
        OSError: If the disk refuses; what was saved before is still there.

    Cost: one copy of the tensors in memory; it waits for the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = path.with_name(path.name + ".json")
    older = _tensors_of(record)
    content = {"kind": kind, "format": version, **facts}
    kept = None
    if tensors:
        from safetensors.torch import save

        data = save({n: tensor.detach().contiguous().clone() for n, tensor in tensors.items()})
        digest = digest_of(data)
        kept = path.with_name(f"{path.name}.{digest[:12]}.safetensors")
        replace_file(kept, data, durable=True)
        content["tensors"] = {"file": kept.name, "digest": digest, "bytes": len(data)}
    replace_file(record, sealed(content), durable=True)
    if older is not None and older != kept:
        older.unlink(missing_ok=True)


def _tensors_of(record: Path) -> Path | None:
    """The file of tensors that a saved result names, or None: what a newer save leaves behind."""
    try:
        name = json.loads(read_regular(record, limit=LARGEST_RECORD))["tensors"]["file"]
        return record.with_name(name) if _is_name(name, record) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_name(name: object, record: Path) -> bool:
    """Whether a file of this name can hold the tensors of the result: never one elsewhere."""
    stem = re.escape(record.name.removesuffix(".json"))
    return isinstance(name, str) and bool(
        re.fullmatch(rf"{stem}\.[0-9a-f]{{12}}\.safetensors", name)
    )


def load_result(
    path: str | Path, kind: str, version: int, device: str = "cpu"
) -> tuple[dict[str, Tensor], JsonObject]:
    """Reads what `save_result` wrote: the tensors, and the facts.

    Raises:
        ValueError: If a file is missing, damaged or of another save, or holds another kind of
            result, or a format of another version.
    """
    path = Path(path)
    record = path.with_name(path.name + ".json")
    try:
        facts = read_sealed(record)
        held, held_version = facts.get("kind"), facts.get("format")
        if held != kind:
            raise ValueError(f"it holds {held}")
        if held_version != version:
            raise ValueError(
                f"its format is {held_version}, and this version of lddyn reads format {version}: "
                "read it with the version that wrote it, or make it anew"
            )
        return _read_tensors(record, facts.pop("tensors", None), device), facts
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {error}") from error


def _read_tensors(record: Path, entry: Any, device: str) -> dict[str, Tensor]:
    if entry is None:
        return {}
    name = entry["file"]
    if not _is_name(name, record):
        raise ValueError(f"{record.name} names a file of tensors that cannot be its own: {name!r}")
    data = read_regular(record.with_name(name), limit=int(entry["bytes"]))
    if digest_of(data) != entry["digest"]:
        raise ValueError(f"{name} has changed since it was saved: digests differ")
    from safetensors.torch import load

    return {name: tensor.to(device) for name, tensor in load(data).items()}
