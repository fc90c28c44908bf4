"""Compile every Triton kernel for GPUs that need not be here; print one JSON line per kernel.

Run as a script, in a process without TRITON_INTERPRET: ``python compile_kernels.py 80 90 100``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lddyn.kernels import gram, residual

ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cases():
    """(name, jit function, pointer types, constants, launch options) of each variant."""
    for dtype, element in ELEMENTS.items():
        config = residual._config(151_936)
        pointers = [element, "i64", *["fp32"] * 4, "i64"]
        yield f"residual-{element}", residual._residual_kernel, pointers, config
        config = gram._config(dtype)
        yield f"gram-{element}", gram._gram_kernel, ["fp32", element, element, "fp32"], config


def usage(cubin):
    """REG, STACK and LOCAL of a cubin, by triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "-res-usage", path], check=True, capture_output=True, text=True
        ).stdout
    fields = [field.split(":") for field in text.split() if field.count(":") == 1]
    return {name: int(value) for name, value in fields if value.isdigit()}


def main():
    assert os.environ.get("TRITON_INTERPRET") != "1"
    for capability in map(int, sys.argv[1:]):
        for name, kernel, pointers, config in cases():
            options = {"num_warps": config.pop("num_warps")}
            names = kernel.arg_names
            types = [f"*{pointer}" for pointer in pointers]
            types += ["i64"] * (len(names) - len(types) - len(config)) + ["constexpr"] * len(config)
            source = ASTSource(
                kernel,
                dict(zip(names, types, strict=True)),
                {(names.index(k),): v for k, v in config.items()},
            )
            built = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=options
            )
            row = {"kernel": name, "sm": capability, "shared": built.metadata.shared}
            row["mma"] = next(
                (i for i in ("wgmma", "tcgen05.mma", "mma.sync") if i in built.asm["ptx"]), ""
            )
            print(json.dumps(row | usage(built.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main()
