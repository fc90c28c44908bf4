"""The manifest of a store: what its features belong to, with a checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import torch

from lddyn.errors import StoreCorruptError, StoreError
from lddyn.files import JsonObject, canonical, digest_of, parse_json, read_stored

FORMAT = 1

MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "lock"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LARGEST_MANIFEST = 2**24


class Manifest(TypedDict):
    """Model, data and sketch that a store was made with, and the form of its rows.

    Keys:
        format: Version of the files.
        identity: What the features depend on; see `identify`.
        layout: `to_dict()` of the layout of the rows; None: plain vectors.
        dtype: Name of the dtype of the rows, a key of `DTYPES`.
        width: Numbers in a row.
        shard_bytes: Bytes of features after which a shard is written.
    """

    format: int
    identity: JsonObject
    layout: JsonObject | None
    dtype: str
    width: int
    shard_bytes: int


def json_copy(name: str, content: object) -> Any:
    """The content as JSON reads it back: tuples become lists.

    Raises:
        ValueError: If JSON cannot hold the content; the message begins with `name`.
    """
    try:
        return json.loads(canonical(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be JSON (text, numbers, lists, dicts): {error}") from error


def _flat(content: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    flat: dict[str, object] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(stored: object, given: object) -> dict[str, tuple[object, object]]:
    """Dotted name → (stored, given) for each field that differs; `"absent"` where there is none."""
    a, b = _flat(stored), _flat(given)
    absent = "absent"
    pairs = {key: (a.get(key, absent), b.get(key, absent)) for key in sorted({*a, *b})}
    # Compared as JSON: 1, 1.0 and true are different fields.
    return {k: (x, y) for k, (x, y) in pairs.items() if canonical(x) != canonical(y)}


def essence(manifest: Manifest) -> dict[str, object]:
    """The fields that two stores must share: all but `shard_bytes`, which rows do not depend on."""
    return {k: v for k, v in manifest.items() if k != "shard_bytes"}


def render(manifest: Manifest) -> bytes:
    """The bytes of the manifest file, checksum included."""
    content = {"checksum": digest_of(canonical(manifest)), "manifest": manifest}
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`.

    Raises:
        StoreError: If there is no store, or it has another format version.
        StoreCorruptError: If a byte of the manifest is not as it was written.
    """
    file = path / MANIFEST
    if not file.exists():
        raise StoreError(f"{path}: no store here (no {MANIFEST})")
    data = read_stored(file, limit=LARGEST_MANIFEST)
    try:
        content = parse_json(data)
        manifest: Manifest = content["manifest"]
        sound = render(manifest) == data  # the checksum, and no byte more
        version = manifest.get("format")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StoreCorruptError(f"{file}: damaged: {error!r}") from error
    if not sound:
        raise StoreCorruptError(f"{file}: checksum does not match: the manifest is damaged")
    if version != FORMAT:
        raise StoreError(f"{file}: format must be {FORMAT}, got {version!r}: another lddyn's store")
    expected = set(Manifest.__annotations__)
    if set(manifest) != expected:
        raise StoreCorruptError(f"{file}: must have {sorted(expected)}, got {sorted(manifest)}")
    for name, sound in (
        ("dtype", str(manifest["dtype"]) in DTYPES),
        ("width", type(manifest["width"]) is int and manifest["width"] >= 1),
        ("shard_bytes", type(manifest["shard_bytes"]) is int and manifest["shard_bytes"] >= 1),
        ("identity", isinstance(manifest["identity"], dict)),
        ("layout", isinstance(manifest["layout"], dict | None)),
    ):
        if not sound:
            raise StoreCorruptError(f"{file}: has no {name} that a store can have")
    return manifest
