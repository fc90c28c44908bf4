"""Images of ten classes: scikit-learn's embedded digits, IDX files as MNIST's, torchvision's sets.

All become float32 (N, 1, 28, 28), normalised by MNIST's mean and deviation.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

__all__ = ["Images", "load", "read_idx"]

_MEAN, _DEVIATION = 0.1307, 0.3081  # of MNIST's pixels in 0…1
_SIDE = 28
_STEM = "train"  # of the IDX files: the paper takes both of its halves from the training images


@dataclass(frozen=True)
class Images:
    """Images and their classes.

    Attributes:
        pixels: float32 (N, 1, 28, 28), normalised.
        classes: int64 (N,), 0 … 9.
        source: What they are, for the page.
        published: True if these are the images that the paper used.
    """

    pixels: torch.Tensor
    classes: torch.Tensor
    source: str
    published: bool


def load(data: str | Path | None = None, torchvision: str | None = None) -> Images:
    """The images of an experiment.

    Args:
        data: A folder with `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, either of them
            perhaps with ".gz"; with `torchvision`, the folder that it downloads to. None:
            scikit-learn's 1,797 handwritten digits, which need no download.
        torchvision: The name of one of torchvision's data sets with ten classes: "MNIST".

    Raises:
        FileNotFoundError: The folder lacks a file.
        ImportError: scikit-learn or torchvision is not installed.
        ValueError: A file is corrupt, or the classes are not 0 … 9.

    Example:
        >>> from lddyn.lab.mnist.images import load
        >>> load().pixels.shape
        torch.Size([1797, 1, 28, 28])
    """
    if torchvision is not None:
        pixels, classes = _torchvision(torchvision, Path(data or "data"))
        source, published = f"torchvision's {torchvision}", torchvision == "MNIST"
    elif data is not None:
        pixels, classes = _idx(Path(data))
        # Other sets come in the same files; only MNIST's training images begin with these labels.
        published = len(classes) == 60_000 and classes[:5].tolist() == [5, 0, 4, 1, 9]
        source = "MNIST" if published else "images from IDX files"
    else:
        pixels, classes = _embedded()
        source, published = "scikit-learn's handwritten digits (8×8, enlarged)", False
    values = sorted(set(classes.tolist()))
    if values != list(range(10)):
        raise ValueError(f"the classes of {source} must be 0 … 9, got {values}")
    return Images((pixels - _MEAN) / _DEVIATION, classes, source, published)


def _embedded() -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the embedded digits are scikit-learn's: install lddyn[lab], or give --images a folder "
            "of IDX files"
        ) from error
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16
    # As MNIST frames its digits: 20×20 in the middle of 28×28.
    enlarged = functional.interpolate(pixels, size=(20, 20), mode="bilinear", align_corners=False)
    margin = (_SIDE - 20) // 2
    return functional.pad(enlarged, (margin,) * 4), torch.from_numpy(digits.target).long()


def _idx(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images_file = _find(folder, f"{_STEM}-images-idx3-ubyte")
    classes_file = _find(folder, f"{_STEM}-labels-idx1-ubyte")
    images, classes = read_idx(images_file, dimensions=3), read_idx(classes_file, dimensions=1)
    if len(images) != len(classes):
        raise ValueError(
            f"{images_file} and {classes_file} must hold as many images as labels, got "
            f"{len(images)} and {len(classes)}"
        )
    if images.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(
            f"{images_file}: expected images of {_SIDE}×{_SIDE} pixels, got "
            f"{images.shape[1]}×{images.shape[2]}"
        )
    return torch.from_numpy(images).float()[:, None] / 255, torch.from_numpy(classes).long()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: expected the file {name} or {name}.gz, found neither")


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """An array of bytes from an IDX file: MNIST's format, gzipped or not.

    The file is 0, 0, 8 (unsigned bytes), the number of dimensions, their sizes as big-endian
    uint32, and the bytes, the last index fastest.

    Args:
        path: The file; gzip is recognised by its content.
        dimensions: How many the array must have.

    Returns:
        uint8, writable.

    Raises:
        ValueError: Names the file, what was expected and what was got.

    Example:
        >>> import pathlib
        >>> _ = pathlib.Path("three").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 0, 4]))
        >>> from lddyn.lab.mnist.images import read_idx
        >>> read_idx("three", dimensions=1)
        array([5, 0, 4], dtype=uint8)
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got {error}") from error
    magic, head = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file of bytes in {dimensions} dimensions, which begins with "
            f"{magic.hex(' ')}, got {content[:4].hex(' ') or 'an empty file'}"
        )
    if len(content) < head:
        raise ValueError(f"{path}: expected a head of {head} bytes, got {len(content)}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, head, 4))
    if len(content) - head != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes for shape {shape}, got "
            f"{len(content) - head}"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy()


def _torchvision(name: str, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ImportError(
            f"--torchvision {name} needs torchvision, which cannot be imported ({error}): install "
            "it, or give --images a folder of IDX files"
        ) from error
    if not hasattr(datasets, name):
        raise ValueError(f"torchvision.datasets has no {name!r}; expected MNIST, FashionMNIST, …")
    data = getattr(datasets, name)(str(folder), train=True, download=True)
    pixels = torch.as_tensor(data.data)
    if pixels.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(
            f"torchvision's {name}: expected grey images (N, {_SIDE}, {_SIDE}), got "
            f"{tuple(pixels.shape)}"
        )
    return pixels.float()[:, None] / 255, torch.as_tensor(data.targets).long()
