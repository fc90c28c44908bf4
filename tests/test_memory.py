"""Budgets of memory, errors of allocators, CPU threads."""

import threading

import pytest
import torch

from lddyn.memory import cpu_threads, in_gib, is_out_of_memory, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2**31),
        ("500MB", 500 * 10**6),
        (" 1.5 gib ", 3 * 2**29),
        ("4096", 4096),
        (4096, 4096),
        ("1TiB", 2**40),
        ("auto", 2**32),
    ],
)
def test_budgets(text, expected):
    assert parse_memory(text) == expected
    assert parse_memory(text, torch.device("cpu")) == expected


@pytest.mark.parametrize("bad", ["", "GiB", "2 sheep", "nan GiB", "infGB", True, None, "2GiB3"])
def test_what_is_no_budget(bad):
    with pytest.raises(ValueError, match="memory must look like '2GiB'"):
        parse_memory(bad)


@pytest.mark.parametrize("bad", [0, -1, "-2GiB", "0"])
def test_a_budget_is_positive(bad):
    with pytest.raises(ValueError, match="memory must be positive"):
        parse_memory(bad)


def test_auto_on_a_gpu_is_a_third_of_what_is_free(monkeypatch):
    free = [2**30, 0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free)
    assert parse_memory("auto", torch.device("cuda")) == 2**32
    free[0] = 3 * 2**33
    assert parse_memory("auto", torch.device("cuda")) == 2**33


def test_errors_of_allocators():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_sizes_for_people():
    sizes = [1023, 2**20, 2**30, 15 * 2**30, 2**40, 16_060_522_496]
    shown = ["1,023 bytes", "0.000977 GiB", "1.00 GiB", "15.0 GiB", "1024 GiB", "15.0 GiB"]
    assert [in_gib(size) for size in sizes] == shown


def test_threads_are_restored_whoever_leaves_last():
    before = torch.get_num_threads()
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    with cpu_threads(1):
        with cpu_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

    entered, leave = threading.Event(), threading.Event()

    def other():
        with cpu_threads(1):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with cpu_threads(1):
        thread.start()
        assert entered.wait(30)
    assert torch.get_num_threads() == 1  # the other is still within
    leave.set()
    thread.join()
    with cpu_threads(3):
        pass
    assert torch.get_num_threads() == before
