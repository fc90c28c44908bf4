"""Files of torch.save are read without unpickling: what comes out, and what is refused."""

import collections
import copy
import os
import pickle
import random
import zipfile

import pytest
import torch

from lddyn.torch_files import read_torch_file


class Runs:
    """An object that an unpickler would run."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def same(one, other):
    """Whether two values are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def state():
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95))
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    return optimizer.state_dict()


def test_an_optimizers_state_is_read_to_the_bit(state, tmp_path):
    path = tmp_path / "optimizer.pt"
    torch.save(state, path)
    assert same(read_torch_file(path), state)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "int64", "uint8", "bool"])
def test_values_and_views_are_read(dtype, tmp_path):
    numbers = torch.arange(24).to(getattr(torch, dtype)).view(4, 6)
    value = {
        "views": [numbers[1:, ::2], numbers.T, numbers[:, :0], numbers[2, 3]],
        "plain": (1, -(2**40), 2.5, "text ü", None, True, False, [], {}, (), (1,), (1, 2, 3, 4)),
        3: {"long": list(range(3000)), "empty": torch.zeros(0)},
    }
    path = tmp_path / "x.pt"
    torch.save(value, path)
    assert same(read_torch_file(path), value)


@pytest.mark.parametrize(
    "value", [Runs(), {1: [Runs()]}, collections.Counter("aab"), torch.Size([1])]
)
def test_nothing_is_called(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(value, "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt cannot be read: it (calls|holds)|operation"):
        read_torch_file(tmp_path / "x.pt")
    assert not os.path.exists("planted")


def test_damaged_files_are_named(state, tmp_path):
    path, other = tmp_path / "optimizer.pt", tmp_path / "damaged.pt"
    torch.save(state, path)
    data, generator, refused = path.read_bytes(), random.Random(0), 0
    for number in range(300):
        changed = bytearray(data)
        if number % 3 == 0:
            changed = changed[: generator.randrange(len(changed))]
        else:
            for _ in range(number % 3):
                changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        other.write_bytes(changed)
        try:
            assert same(read_torch_file(other), state)  # a byte that pads
        except ValueError as error:
            assert "damaged.pt" in str(error)
            refused += 1
    assert refused > 150
    other.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"damaged\.pt is damaged, or not a file of torch\.save"):
        read_torch_file(other)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_grows_or_lies_is_refused(compressed, tmp_path):
    path, other = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save(torch.ones(100), path)
    with zipfile.ZipFile(path) as old:
        kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with zipfile.ZipFile(other, "w", kind) as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(ValueError, match=r"y\.pt cannot be read: .* bytes, expected"):
        read_torch_file(other)


def program(*operations):
    return b"\x80\x02" + b"".join(operations) + b"."


# A tuple of 2^60 items by 60 pairs; one that is nested 100,000 times.
PAIRS = [b"K\x01\x85", *[b"q%ch%c\x86" % (i, i) for i in range(60)]]
DEEP = [b"K\x01", b"\x85" * 10**5]


@pytest.mark.case("an optimizer.pt that is a trap")
@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        ([b"}", *PAIRS, b"K\x02s"], "keys other than text"),
        ([b"}", *DEEP, b"K\x02s"], "keys other than text"),
        ([*PAIRS, b"q<(h<h<h<h<h<tQ"], "no storage of torch"),
        ([*PAIRS, b")R"], "it calls 'tuple'"),
        ([b"ctorch\n" + b"x" * 1000 + b"\n)R"], "it calls 'torch x{60,80}$"),
    ],
)
def test_structures_that_take_for_ever_are_refused(operations, reason, tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program(*operations))
    with pytest.raises(ValueError, match=rf"x\.pt cannot be read: .*{reason}"):
        read_torch_file(path)


def test_entries_that_overlap_are_refused(tmp_path):
    """Two entries of a zip over the same bytes would be two copies in memory."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", bytes(1 << 16))
        archive.writestr("x/data.pkl", pickle.dumps(1, 2))
        first = archive.filelist[0]
        archive.filelist += [copy.copy(first) for _ in range(3)]
        for number, entry in enumerate(archive.filelist[2:]):
            entry.filename = f"x/data/{number + 1}"
    with pytest.raises(ValueError, match=r"x\.pt cannot be read: its entries overlap"):
        read_torch_file(path)
