"""Processes that work together, as torchrun starts them, without its fresh interpreters."""

import io
import multiprocessing
import os
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import torch


def run_ranks(work, folder, count=2, timeout=120):
    """Runs `work()` in forked processes with the variables of torchrun; returns what each printed.

    A forked process has imported what this one has, which takes a fresh one many seconds.

    Args:
        work: The function; torch.distributed is not initialised when it is called.
        folder: Where each process leaves its output.
        count: Number of processes.
        timeout: Seconds for all of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}

    def run(rank):
        os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        if "accelerate" in sys.modules:  # the state of this process's trainers
            sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
            sys.modules["accelerate"].state.GradientState._reset_state()
        out, error, status = io.StringIO(), io.StringIO(), 0
        try:
            with redirect_stdout(out), redirect_stderr(error):
                work()
        except BaseException:
            error.write(traceback.format_exc())
            status = 1
        for name, text in (("out", out), ("error", error)):
            (folder / f"{name}-{rank}").write_text(text.getvalue())
        os._exit(status)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    try:
        for process in processes:
            process.start()
        for rank, process in enumerate(processes):
            process.join(timeout)
            assert process.exitcode is not None, f"rank {rank} takes longer than {timeout} seconds"
            assert process.exitcode == 0, (folder / f"error-{rank}").read_text()
    finally:
        for process in processes:
            process.kill()
    return [(folder / f"out-{rank}").read_text() for rank in range(count)]
