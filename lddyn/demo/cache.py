"""The demo's model on disk, so that it is trained once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import platformdirs
import torch
from safetensors.torch import load_file, save_file

from lddyn.files import JsonObject, read_sealed, sealed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["Trained", "cache_root", "load", "save"]


class Trained(NamedTuple):
    """A trained model, its tokenizer, and numbers of its training."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    stats: JsonObject


def cache_root() -> Path:
    """Folder for cached models: `LDDYN_CACHE_DIR`, or lddyn's folder in the platform's cache."""
    named = os.environ.get("LDDYN_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    return platformdirs.user_cache_path("lddyn", appauthor=False)


def save(path: Path, trained: Trained) -> bool:
    """Writes a model to a temporary folder, then renames it: no process finds a half-written one.

    Returns:
        Whether the model is cached now. If not, a warning has said why.
    """
    model, tokenizer, stats = trained
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as name:
            building = Path(name) / "world"
            tokenizer.save_pretrained(building)
            model.config.save_pretrained(building)
            weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
            files = {file.name: _digest(file) for file in sorted(building.iterdir())}
            manifest = {"stats": stats, "sha256": files}
            (building / "manifest.json").write_text(sealed(manifest), encoding="utf-8")
            if path.exists():
                shutil.rmtree(path)
            building.rename(path)
    except OSError as error:
        if load(path) is not None:  # another process was faster
            return True
        warnings.warn(f"the demo's model is not cached: {error}", stacklevel=3)
        return False
    return True


def load(path: Path) -> Trained | None:
    """Reads what `save` wrote. None: there is nothing, or (with a warning) it is damaged."""
    if not path.exists():
        return None
    try:
        manifest = read_sealed(path / "manifest.json")
        absent = {"config.json", "model.safetensors", "tokenizer.json"} - set(manifest["sha256"])
        if absent:
            raise ValueError(f"the manifest does not name {sorted(absent)}")
        for name, digest in manifest["sha256"].items():
            if _digest(path / name) != digest:
                raise ValueError(f"{name} is not what was written")
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        with torch.random.fork_rng(devices=[]):  # random weights first, then the stored ones
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(path, local_files_only=True))
        model.load_state_dict(load_file(path / "model.safetensors"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        return Trained(model, tokenizer, dict(manifest["stats"]))
    except Exception as error:  # whatever is wrong with it, it is only a cache
        warnings.warn(f"{path} is damaged ({error}); training the model anew", stacklevel=3)
        return None


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
