"""`lddyn ntk`: the empirical neural tangent kernel between two responses of a data file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lddyn.cli.command import Answer
from lddyn.cli.options import Attention, Memory, ModelOptions, OneRowOptions, Out, Seed
from lddyn.cli.rows import check_fits, choose_columns, encode_columns, read_row
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.example import Example
    from lddyn.entk.lowrank import LowRank
    from lddyn.entk.operator import NTK
    from lddyn.estimate import Estimate

KERNEL = "Kernel"


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """Between which responses the kernel is taken, and what is computed of it."""

    observe: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Field of the observed response. Default: that of the data format.",
            show_default=False,
            rich_help_panel=KERNEL,
        ),
    ] = None
    update: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Field of the response that a step would learn from. Default: that of --observe.",
            show_default=False,
            rich_help_panel=KERNEL,
        ),
    ] = None
    update_row: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Row of the response that a step would learn from. Default: that of --row.",
            show_default=False,
            rich_help_panel=KERNEL,
        ),
    ] = None
    norms: Annotated[
        Literal["whole", "tokens", "none"],
        typer.Option(
            help="Estimate the norm of the whole kernel (about 50 passes), or also the norms "
            "between every two tokens (as many passes as tokens times the hidden size, at most).",
            rich_help_panel=KERNEL,
        ),
    ] = "whole"
    rtol: Annotated[
        float, typer.Option(help="Relative standard error of the norms.", rich_help_panel=KERNEL)
    ] = 0.05
    rank: Annotated[
        int | None,
        typer.Option(
            "--lowrank",
            min=0,
            metavar="RANK",
            help="Approximate K by factors of this rank, and estimate what they leave out.",
            show_default=False,
            rich_help_panel=KERNEL,
        ),
    ] = None


@dataclass(frozen=True)
class Kernel:
    """What was computed of a kernel.

    Attributes:
        gram: ⟨∇ log π(y_m), ∇ log π(y_l)⟩ (M, L), nats² per unit of learning rate.
        norms: ‖Π K_{m,l} Π‖_F (M, L). None: not computed.
        whole: ‖Π K Π‖_F of the whole kernel.
        factors: The low-rank form. None: not computed.
    """

    gram: Tensor
    norms: Estimate | None
    whole: Estimate | None
    factors: LowRank | None

    @classmethod
    def of(cls, kernel: NTK, options: KernelOptions, seed: int) -> Kernel:
        """Computes what the options select."""
        norms = whole = factors = None
        if options.norms != "none":
            whole = kernel.frobenius(options.rtol, reduce="all", seed=seed)
        if options.norms == "tokens":
            norms = kernel.frobenius(options.rtol, seed=seed)
        if options.rank is not None:
            factors = kernel.lowrank(options.rank, seed=seed)
        return cls(kernel.gram(), norms, whole, factors)

    def to_dict(self) -> JsonObject:
        """Everything but the factors, for JSON."""
        lowrank = None
        if self.factors is not None:
            lowrank = {
                "rank": self.factors.rank,
                "residual": _estimate_to_dict(self.factors.residual),
            }
        return {
            "gram": self.gram.tolist(),
            "norms": _estimate_to_dict(self.norms),
            "norm": _estimate_to_dict(self.whole),
            "lowrank": lowrank,
        }

    def save(self, folder: Path) -> None:
        """Writes kernel.safetensors, and lowrank.json and its tensors where there are factors."""
        from safetensors.torch import save

        from lddyn.files import replace_file

        tensors = {"gram": self.gram}
        if self.norms is not None:
            tensors |= {"norms": self.norms.value, "norms_stderr": self.norms.stderr}
        data = save({n: t.contiguous() for n, t in tensors.items()})
        replace_file(folder / "kernel.safetensors", data)
        if self.factors is not None:
            self.factors.save(folder / "lowrank")


def ntk(
    model: ModelOptions,
    rows: OneRowOptions,
    options: KernelOptions,
    memory: Memory = "auto",
    attention: Attention = "lddyn",
    seed: Seed = 0,
    out: Out = None,
) -> Answer:
    """The empirical neural tangent kernel K between the tokens of two responses.

    Prints the inner products ⟨∇ log π(y_m), ∇ log π(y_l)⟩ of observed tokens y_m and updated tokens
    y_l: what raising log π(y_l) by gradient descent does to log π(y_m), per unit of learning rate.
    Also ‖K‖ with standard errors and, with --lowrank, how much of K a few directions hold. --out
    FOLDER gets ntk.json, kernel.safetensors and the low-rank factors.
    """
    import lddyn

    began = time.perf_counter()
    other = rows if options.update_row is None else replace(rows, row=options.update_row)
    tokenizer = model.load_tokenizer()
    observed = _encode_response(tokenizer, rows, options.observe)
    learned = _encode_response(tokenizer, other, options.update or options.observe, "--update-row")
    lm = model.load()
    for example, where in ((observed, rows), (learned, other)):
        check_fits(example, f"{where.place}, {example.name}", getattr(lm, "config", None))
    if learned.content_id == observed.content_id:
        learned = observed  # one sequence is traced and pulled back once
    loaded = time.perf_counter()
    exact = lddyn.true_float64() if model.dtype == "float64" else contextlib.nullcontext()
    with exact:
        opened = lddyn.Anatomy(lm, attention)
        K = lddyn.ntk(opened, observed, learned, memory=memory, progress=True)
        kernel = Kernel.of(K, options, seed)
    seconds = {"load": loaded - began, "ntk": time.perf_counter() - loaded}
    document = {
        "model": model.model,
        "data": str(rows.data),
        "observed": _response_to_dict(observed, rows.row),
        "update": _response_to_dict(learned, other.row),
        "shape": list(K.shape),
        **kernel.to_dict(),
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
    }
    if out is not None:
        _save(out, document, kernel)
    return Answer(document, _tell(document, kernel, observed, learned, out))


def _encode_response(
    tokenizer: PreTrainedTokenizerBase,
    rows: OneRowOptions,
    field: str | None,
    option: str = "--row",
) -> Example:
    """One response of one row, whose number was given as this option."""
    row = read_row(rows, option)
    columns = choose_columns(row, rows.place, field, None, 1, "the kernel")
    examples, (name,), _ = encode_columns(tokenizer, row, rows, columns)
    return examples[name]


def _response_to_dict(example: Example, row: int) -> JsonObject:
    return {
        "row": row,
        "field": example.name,
        "token_ids": list(example.targets),
        "tokens": list(example.token_texts),
    }


def _estimate_to_dict(estimate: Estimate | None) -> JsonObject | None:
    if estimate is None:
        return None
    return {
        "value": estimate.value.tolist(),
        "stderr": estimate.stderr.tolist(),
        "samples": estimate.samples,
    }


def _save(out: Path, document: Mapping[str, Any], kernel: Kernel) -> None:
    from lddyn.files import json_safe, replace_file

    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json_safe(document), ensure_ascii=False, indent=1, allow_nan=False)
    replace_file(out / "ntk.json", text + "\n")
    kernel.save(out)


def _tell(
    document: Mapping[str, Any],
    kernel: Kernel,
    observed: Example,
    learned: Example,
    out: Path | None,
) -> Iterator[str | Table]:
    """The kernel in sentences, and its strongest entries as a table."""
    from lddyn.text import signed

    rows, vocabulary, columns, _ = document["shape"]
    one, other = (
        f"{document[side]['field']} of row {document[side]['row']}"
        for side in ("observed", "update")
    )
    yield (
        f"K between {one} (observed, {rows} tokens) and {other} (learned, {columns} tokens); "
        f"vocabulary {vocabulary:,}."
    )
    yield (
        "Sum of ⟨∇ log π(y_m), ∇ log π(y_l)⟩ over all token pairs: "
        f"{signed(float(kernel.gram.sum()), 4)}. A step of SGD with learning rate η that "
        "lowers −Σ_l log π(y_l) changes log π of the observed response by η times this (nats)."
    )
    if kernel.whole is not None:
        yield f"‖K‖ of the whole kernel, centred: {_with_error(kernel.whole)}."
    if kernel.factors is not None:
        yield (
            f"Factors of rank {kernel.factors.rank} leave ‖K − K̂‖ = "
            f"{_with_error(kernel.factors.residual)} out."
        )
    yield _strongest(kernel, observed, learned)
    if out is not None:
        yield f"saved: {out / 'ntk.json'}"


def _with_error(estimate: Estimate) -> str:
    return f"{float(estimate.value):.4g} ± {float(estimate.stderr):.1g} (standard error)"


def _strongest(kernel: Kernel, observed: Example, learned: Example, count: int = 10) -> Table:
    """The token pairs with the largest inner products, by size."""
    from rich.table import Table
    from rich.text import Text

    from lddyn.text import signed, visible

    table = Table("observed token", "learned token")
    table.add_column("⟨∇ log π, ∇ log π⟩", justify="right")
    if kernel.norms is not None:
        table.add_column("‖K‖ of the token pair", justify="right")
    width = kernel.gram.shape[1]
    order = kernel.gram.abs().flatten().argsort(descending=True, stable=True)[:count]
    for m, k in (divmod(i, width) for i in order.tolist()):
        cells = [
            Text(f"{m} {visible(observed.token_texts[m])}"),
            Text(f"{k} {visible(learned.token_texts[k])}"),
            Text(signed(float(kernel.gram[m, k]), 4)),
        ]
        if kernel.norms is not None:
            value, error = (float(x[m, k]) for x in (kernel.norms.value, kernel.norms.stderr))
            cells.append(Text(f"{value:.4g} ± {error:.1g}"))
        table.add_row(*cells)
    return table
