"""Every op, as a checked function and as ``torch.ops.lddyn.NAME``.

One family, one file name in every layer: ``ops/gram.py`` (schema, checks, backends) beside
``kernels/gram.py`` (Triton), ``csrc/gram.cu`` and ``csrc/gram.cpp``; the specification of all is in
``lddyn.reference``.
"""

from lddyn.ops.attention import attention_pullback, attention_pushforward
from lddyn.ops.dispatch import (
    BACKENDS,
    OPS,
    backend,
    backends,
    choose,
    compiled,
    differentiated,
    others,
    overridden,
    why_not,
)
from lddyn.ops.elementwise import (
    gated_pullback,
    gated_pushforward,
    norm_pullback,
    norm_pushforward,
    rotary,
)
from lddyn.ops.gram import gram
from lddyn.ops.precondition import preconditioned_push
from lddyn.ops.product import product
from lddyn.ops.residual import residual, residual_gram
from lddyn.ops.sketch import sketch

__all__ = [
    "BACKENDS",
    "OPS",
    "attention_pullback",
    "attention_pushforward",
    "backend",
    "backends",
    "choose",
    "compiled",
    "differentiated",
    "gated_pullback",
    "gated_pushforward",
    "gram",
    "norm_pullback",
    "norm_pushforward",
    "others",
    "overridden",
    "preconditioned_push",
    "product",
    "residual",
    "residual_gram",
    "rotary",
    "sketch",
    "why_not",
]
