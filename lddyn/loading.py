"""Models, tokenizers and configurations from a folder or the hub; errors name what is missing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from lddyn.files import LARGEST_RECORD, parse_json, read_regular
from lddyn.text import first_sentences

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

__all__ = [
    "add_adapter",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "usable_device",
]

_LOG = logging.getLogger("lddyn")

# Of a model that is loaded at all: each takes time and memory before a weight is read.
_LAYERS = 10_000

_TOKENIZERS = ("token*", "vocab*", "*.model", "*.tiktoken", "*.py")  # files that one has


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: Folder with the tokenizer's files, or name of a model on the hub.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: If the folder does not exist or the tokenizer cannot be loaded.
    """
    check_folder("tokenizer", name)
    from transformers import AutoTokenizer

    base, folder = adapter_base(name), Path(name).expanduser()
    if base is not None and not any(folder.glob("tokenizer*")):
        name = base  # peft saves no tokenizer; trainers do
    elif folder.is_dir() and not any(any(folder.glob(kind)) for kind in _TOKENIZERS):
        raise ValueError(
            f"tokenizer {name}: this folder has no tokenizer (tokenizer.json, tokenizer.model or "
            "vocab.json): save it there with tokenizer.save_pretrained"
        )

    with _quiet_transformers(), _named_errors("tokenizer", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        name: Folder with config.json, or name of a model on the hub.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: If the folder or its config.json does not exist, or the file cannot be read.
    """
    name = adapter_base(name) or name
    check_folder("model", name, needs="config.json")
    from transformers import AutoConfig

    with _quiet_transformers(), _named_errors("config", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_generation_config(name: str) -> GenerationConfig | None:
    """The generation configuration of a model; None: it has none.

    Args:
        name: Folder with generation_config.json, or name of a model on the hub.
    """
    from transformers import GenerationConfig

    try:
        with _quiet_transformers():
            return GenerationConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | nn.Module:
    """A causal LM in evaluation mode.

    Args:
        name: Folder with config.json and weights, or name of a model on the hub. A folder with
            adapter_config.json alone, such as a checkpoint of TRL, stands for its base model with
            this adapter.
        dtype: Of the weights, a torch.dtype or its name.
        device: Where the weights are put.
        adapter: Folder or hub name of a peft adapter; then only the adapter is trainable.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: If the folder does not exist, the model cannot be loaded, or a weight is not in
            its files (transformers would draw it at random).
        ImportError: If an adapter is given and peft is not installed.
    """
    base = adapter_base(name)
    if base is not None:
        if adapter is not None:
            raise ValueError(
                f"model {name} is itself an adapter on {base}: give {base} with one adapter"
            )
        name, adapter = base, name
    check_folder("model", name, needs="config.json")
    check_indices(Path(name).expanduser())
    config = load_config(name, trust_remote_code=trust_remote_code)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _LAYERS:
        raise ValueError(f"model {name}: its config.json says {layers} layers: it is damaged")
    import torch
    from transformers import AutoModelForCausalLM

    number_type = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with _quiet_transformers(), _named_errors("model", name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=number_type, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    missing = sorted(map(str, info.get("missing_keys") or []))
    if missing:
        raise ValueError(
            f"model {name}: {len(missing)} weights are not in its files and would be random, the "
            f"first is {missing[0]}: save the model with all its weights"
        )
    model = model if adapter is None else add_adapter(model, adapter)
    return model.to(device).eval()


def add_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """The model with a peft adapter on it; only the adapter is trainable.

    Args:
        model: A causal LM.
        adapter: Folder with adapter_config.json, or name of an adapter on the hub.

    Raises:
        ValueError: If the folder does not exist or the adapter cannot be loaded.
        ImportError: If peft is not installed.
    """
    check_folder("adapter", adapter, needs="adapter_config.json")
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not any(folder.glob("adapter_model.*")):  # peft would ask the hub
        raise ValueError(f"adapter {adapter}: this folder has no adapter_model.safetensors")
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError("an adapter needs peft: pip install peft") from None
    with _quiet_transformers(), _named_errors("adapter", adapter):
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)  # type: ignore[no-any-return, unused-ignore]


def adapter_base(name: str) -> str | None:
    """The base model of a folder that holds an adapter and no model; None for any other name.

    Raises:
        ValueError: If adapter_config.json names no base model.
    """
    folder = Path(name).expanduser()
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = parse_json(read_regular(file, limit=LARGEST_RECORD))["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: no configuration of an adapter: {error}") from None
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"model {name} holds an adapter whose adapter_config.json names no base model: give "
            "the base model, and this folder as its adapter"
        )
    return base


def check_indices(folder: Path) -> None:
    """Raises a ValueError if an index of weights names a file outside of its folder."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            places = json.loads(read_regular(index, limit=LARGEST_RECORD))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index}: no index of weights: {error!r}") from error
        for place in places:
            if not isinstance(place, str) or place != os.path.basename(place) or not place:
                raise ValueError(f"{index}: names {place!r}, which is no file beside it")


def usable_device(device: str) -> str:
    """A device that torch can put a tensor on; of several processes on one machine, each its own.

    Args:
        device: Such as "cpu" or "cuda:0". "cuda" is the GPU of this process where torchrun has
            started several.

    Raises:
        ValueError: If torch cannot put a tensor there.
    """
    import torch

    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        there = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        there = False
    if not there:
        raise ValueError(
            f"device must be one of this machine, such as cpu or cuda:0, got {device!r:.60}"
        )
    return device


def check_folder(what: str, name: str, needs: str | None = None) -> None:
    """Raises a ValueError for a path that is no folder, before anybody looks for it on a hub.

    Also for a folder with a pipe or a device in the place of a file, which would be read for ever.

    Args:
        what: What is to be loaded, for the message.
        name: A path, or a name on the hub: the latter has at most one slash.
        needs: A file that the folder must have.
    """
    path = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or "\\" in name
    if is_path and not path.exists():
        raise ValueError(f"{what} {name}: no such folder")
    if path.is_file():
        raise ValueError(f"{what} {name}: this is a file; give the folder that it is in")
    if not path.is_dir():
        return
    for file in sorted(path.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{file}: must be a regular file, not a pipe or a device")
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > LARGEST_RECORD:
            raise ValueError(f"{file}: larger than {LARGEST_RECORD} bytes")
    if needs is not None and not (path / needs).is_file():
        raise ValueError(f"{what} {name}: this folder has no {needs}")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers, unless lddyn logs at level DEBUG."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")  # it counts its attempts to reach the hub
    hub_level = hub.level
    if not _LOG.isEnabledFor(logging.DEBUG):
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()
        hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            theirs.enable_progress_bar()


@contextlib.contextmanager
def _named_errors(what: str, name: str) -> Iterator[None]:
    """Turns any exception into a ValueError that says what could not be loaded, and why."""
    try:
        yield
    except Exception as error:
        place = "" if Path(name).exists() else ": there is no such folder, and the hub did not help"
        raise ValueError(f"cannot load the {what} {name}{place}: {_reason(error, name)}") from error


def _reason(error: Exception, name: str) -> str:
    """Why a library could not load something, in one line that names the file if it is damaged."""
    text = first_sentences(str(error)) or type(error).__name__
    if isinstance(error, LookupError | AttributeError | ArithmeticError):
        text = f"{type(error).__name__}: {text}"  # its text is a name alone, or a riddle
    if "ignore_mismatched_sizes" in text:  # "look at the above report", which is switched off
        return _misfit(Path(name).expanduser())
    if "Unrecognized configuration class" in text:
        found = re.search(r"\.(\w+)'>", text)
        return f"a {found[1] if found else 'configuration'} is of no causal language model"
    for file in sorted(Path(name).expanduser().glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="np") as weights:
                weights.keys()
        except Exception as damage:
            return f"{file} is damaged: {damage}"
    return text


def _misfit(folder: Path) -> str:
    """The first weight whose shape in the files is not that of the configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="np") as weights:
            for name in sorted(weights.keys()):
                own = weights.get_slice(name).get_shape()
                if own != shapes.get(name, own):
                    return (
                        f"{file}: {name} has the shape {own}, and config.json says {shapes[name]}"
                    )
    return "its weights have other shapes than config.json says"
