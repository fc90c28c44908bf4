"""What every benchmark shares: device, threads, the ceilings of this machine, extra_info."""

import time

import pytest
import torch

import lddyn
from lddyn import ops

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config):
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # the two-core machine is noisy enough


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def small(request):
    """True in a smoke run (--benchmark-disable): each case once, on small sizes."""
    return request.config.getoption("--benchmark-disable")


def seconds(call, repeats=5):
    """Best time of a call, seconds."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.fixture(scope="session")
def ceiling():
    """Measured here and now, per second: ``ceiling("flops", dtype)``, ``ceiling("bytes")``."""
    known = {}

    def measure(kind, dtype=torch.float32):
        if (kind, dtype) not in known:
            n = 8192 if DEVICE == "cuda" else 768
            a = torch.randn(n, n, device=DEVICE, dtype=dtype)
            if kind == "flops":
                # On CPU the products of lddyn may go to a faster BLAS than those of torch.
                fastest = min(seconds(lambda: a @ a), seconds(lambda: ops.product(a, a)))
                known[kind, dtype] = 2 * n**3 / fastest
            else:
                a = torch.randn(64 << 20 if DEVICE == "cuda" else 16 << 20, device=DEVICE)
                b = torch.empty_like(a)
                known[kind, dtype] = 8 * a.numel() / seconds(lambda: b.copy_(a))
        return known[kind, dtype]

    return measure


@pytest.fixture
def run(benchmark, device, small, ceiling):
    """Time ``call()``, record what it did, and whether it did it right.

    match is the error bound of the tests: at most twice the error of ``plain`` (plain torch in the
    same dtype) plus a floor, against ``truth`` in float64. ``bound`` names what limits the work,
    "flops" or "bytes": the share of that ceiling is recorded, in percent. Where ``must_match``, a
    wrong result fails the benchmark.
    """

    def measure(call, *, truth, plain, dtype, flops, traffic, bound, must_match):
        def timed():
            out = call()
            if device == "cuda":
                torch.cuda.synchronize()
            return out

        def error(out):
            """Of the worst output; outputs that truth does not have are left out."""
            outs, truths = (x if isinstance(x, tuple) else (x,) for x in (out, truth))
            return max(
                float((x.double() - y).norm() / y.norm())
                for x, y in zip(outs, truths, strict=False)
            )

        # Warm rounds also bring the allocator's pages, which are dear on a virtual machine.
        out = benchmark.pedantic(timed, rounds=1 if small else 15, warmup_rounds=0 if small else 4)
        wrong = error(out)
        match = wrong <= 2 * error(plain) + FLOOR[dtype]
        info = benchmark.extra_info
        info |= {"device": device, "dtype": str(dtype), "torch": torch.__version__}
        info |= {"threads": torch.get_num_threads(), "lddyn": lddyn.__version__}
        info |= {"bound": bound, "flops": flops, "bytes": traffic, "error": wrong, "match": match}
        if not small:
            amount = flops if bound == "flops" else traffic
            kind = dtype if bound == "flops" and device == "cuda" else torch.float32
            rate = amount / benchmark.stats.stats.median
            info[f"percent_of_{bound}_ceiling"] = round(100 * rate / ceiling(bound, kind), 1)
        assert match or not must_match, f"wrong result: error {wrong:.1e}"

    return measure
