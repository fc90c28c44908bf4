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

from lddyn.kernels import attention, elementwise, gram, precondition, residual, sketch

ELEMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cases(capability):
    """(name, jit function, pointer types, constants and options, multiples of 16) of each variant.

    Where the last is given, pointers are aligned too, and can be read 16 bytes at a time.
    """
    for dtype, element in ELEMENTS.items():
        config = residual._config(151_936)
        pointers = [element, "i64", *["fp32"] * 4, "i64"]
        yield f"residual-{element}", residual._residual_kernel, pointers, config
        statistics, pointers = residual._gram_statistics_kernel, [element, "i64", "fp32", "fp32"]
        config = residual._config(151_936)
        yield f"residual_gram-statistics-{element}", statistics, pointers, config
        pointers = [element, "i64", "fp32"] * 2 + ["fp32"]
        yield f"residual_gram-{element}", residual._gram_kernel, pointers, residual._gram_config()
        work = "bf16" if element == "bf16" else "fp32"
        for aligned, suffix in ((True, ""), (False, "-ragged")):
            push, pair = gram._config(dtype, aligned)
            step = ["WIDTH", "PITCH", "stride_st", "stride_om", "stride_os"] if aligned else []
            flags = {"HAS_O": True, "HAS_U": True}
            pointers = [work, element, work, "i64", "i64"]
            name = f"gram-push-{element}{suffix}"
            yield name, gram._push_kernel, pointers, flags | push, step
            step = ["WIDTH", "PITCH", "stride_ul", "stride_ut"] if aligned else []
            flags = {"HAS_U": True, "FIRST": False}
            pointers = [work, element, "fp32", "i64"]
            name = f"gram-pair-{element}{suffix}"
            yield name, gram._pair_kernel, pointers, flags | pair, step
        for tokens in (64, 1000):
            name = f"preconditioned_push-{element}-{tokens}"
            pointers = ["fp32", element, element, element, "fp32"]
            yield name, precondition._push_kernel, pointers, precondition._config(dtype, tokens)
        config, pointers = sketch._config(dtype), [element, work]
        pair = config | sketch._pairing(config)
        yield f"sketch-project-{element}", sketch._project_kernel, pointers, config
        yield f"sketch-pair-{element}", sketch._sketch_kernel, [*pointers, "fp32"], pair
        yield from elementwise_cases(element)
        yield from attention_cases(dtype, capability)


def attention_cases(dtype, capability):
    """The kernels of lddyn/kernels/attention.py at the head widths that models have."""
    e = ELEMENTS[dtype]
    operands, forward = [e] * 4 + ["i32"] * 2, ["fp32", "fp32"]
    for width in {"bf16": (64, 128), "fp16": (128,), "fp32": (64,)}[e]:
        for name, results, batches in (
            ("forward", [], ""),
            ("pullback_query", [e, e, "fp32"], "g"),
            ("pullback_key", [e, e, e], "g"),
            ("pushforward", [e] * 4, "qkv"),
        ):
            kernel = getattr(attention, f"_{name}_kernel")
            config = attention._config(name, dtype, width, width, 16, capability)
            config |= {"CAPPED": True}
            starts = ("stride_mh", *(f"stride_{batch}" for batch in batches))  # mh is 0: one mask
            step = [x for x in kernel.arg_names if x.startswith(starts)]
            pointers = [*operands, *forward, *results]
            yield f"attention-{name}-{e}-{width}", kernel, pointers, config, step


def elementwise_cases(element):
    """The kernels of lddyn/kernels/elementwise.py, whose norms hold whole rows in registers."""
    e = element
    for name in ("gated_pullback", "gated_pushforward"):
        kernel = getattr(elementwise, f"_{name}_kernel")
        yield f"{name}-{e}", kernel, [e] * 5, elementwise._config(4864)
    for size in (896, 4096, 8192):
        config = {"CENTRED": True} | elementwise._pullback_config(size)
        pointers = [e, "fp32", e, e, e, "fp32"]
        yield f"norm_pullback-{e}-{size}", elementwise._norm_pullback_kernel, pointers, config
        config = {"CENTRED": True} | elementwise._pushforward_config(size)
        pointers = pointers[:-1]
        yield f"norm_pushforward-{e}-{size}", elementwise._norm_pushforward_kernel, pointers, config
    config = {"TRANSPOSE": True} | elementwise._rotary_config(128)
    yield f"rotary-{e}", elementwise._rotary_kernel, [e] * 4, config


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
        for name, kernel, pointers, config, *multiples in cases(capability):
            config = dict(config)
            options = {x: config.pop(x) for x in ("num_warps", "num_stages") if x in config}
            names = kernel.arg_names
            types = [f"*{pointer}" for pointer in pointers]
            rest = names[len(types) : len(names) - len(config)]
            types += ["fp32" if x in ("scale", "softcap") else "i64" for x in rest]
            types += ["constexpr"] * len(config)
            aligned = [names.index(x) for m in multiples for x in m]
            aligned += range(len(pointers)) if aligned else []
            source = ASTSource(
                kernel,
                dict(zip(names, types, strict=True)),
                {(names.index(k),): v for k, v in config.items()},
                {(i,): [["tt.divisibility", 16]] for i in aligned},
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
