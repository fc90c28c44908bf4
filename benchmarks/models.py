"""Which architectures lddyn is right on: every causal LM of the installed transformers, made tiny.

python benchmarks/models.py                    # all that benchmarks/results/models.json lacks
python benchmarks/models.py llama falcon       # these, again
python benchmarks/models.py --table            # writes the table of docs/models.md alone

Each architecture is tried with full finetuning, with LoRA on all linear layers, and with LoRA on
4-bit weights (QLoRA, where bitsandbytes is installed), in a process of its own with a time limit.
The Gram of token gradients (`lddyn.ntk`) and the influence table (`lddyn.decompose`) of two short
sequences are compared with plain autograd:

    right      both agree, in units of the norms of the gradients
    refused    lddyn raises; the reason is kept
    WRONG      they differ
    left out   no causal LM that can be trained on its own; the reason is kept
    not built  transformers or peft cannot make or run the tiny model; the reason is kept

12 minutes on two cores (measured at 2001f40). An interrupted run continues where it was.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import multiprocessing
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import torch
from record import provenance
from tiny_models import LEFT_OUT, build, names
from torch import Tensor, nn

import lddyn

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "models.json"
PAGE = HERE.parent / "docs" / "models.md"

OBSERVED = lddyn.Example([5, 9, 33, 7], [41, 8, 22], name="observed")
UPDATED = lddyn.Example([5, 9, 12], [40, 7, 41], name="updated")

LIMIT = {torch.float64: 1e-5, torch.float32: 2e-3}

_FORK = multiprocessing.get_context("fork")


# --------------------------------------------------------------------------- one architecture


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA of rank 2 on all linear layers that peft finds, with random weights."""
    modules = _lora_targets(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def _lora_targets(model: nn.Module) -> list[str]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    left_out = ("out_proj", "conv1d") if _is_mamba(model) else ()  # peft refuses them
    # Routers and grouped layers derive from nn.Linear, and peft takes them for such.
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Linear4bit", "Conv1D", "FalconLinear")
        and module is not head
        and name.rpartition(".")[2] not in left_out
    ]


def _is_mamba(model: nn.Module) -> bool:
    kinds = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
    return getattr(model.config, "model_type", "") in kinds


# Mamba and LongCat's router multiply by these weights themselves, which cannot be packed then.
_UNPACKED = ("dt_proj", "classifier")


def with_qlora(model: nn.Module) -> nn.Module:
    """The same on weights quantised to 4 bits (nf4) by bitsandbytes."""
    import bitsandbytes

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head or name.endswith(_UNPACKED):
            continue
        small = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        small.load_state_dict(module.state_dict())
        small.requires_grad_(False)
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], small.to("cpu"))
    model.is_loaded_in_4bit = True
    return with_lora(model)


MAKE = {"full": lambda model: model, "LoRA": with_lora, "QLoRA": with_qlora}


def token_gradients(model: nn.Module, example: lddyn.Example) -> Tensor:
    """∇ log π(y_m) by plain autograd, (M, P).

    On a copy: a dynamic rotary embedding remembers the longest sequence that it has seen.
    """
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].to(torch.float64)
    values = logits.log_softmax(-1)[list(example.positions), list(example.targets)]
    rows = []
    for value in values:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parts, parameters, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.stack(rows).double()


def compare(name: str, mode: str) -> dict[str, Any]:
    """The outcome of one architecture and way of training."""
    warnings.filterwarnings("ignore")
    if name in LEFT_OUT:
        return {"outcome": "left out", "reason": LEFT_OUT[name]}
    if mode == "QLoRA":
        return _compare(name, mode, torch.float32)
    with lddyn.true_float64():
        result = _compare(name, mode, torch.float64)
    if "overflow" not in result.get("reason", ""):
        return result
    # The model's own code has a constant that float64 does not take (XGLM).
    return {**_compare(name, mode, torch.float32), "dtype": "float32"}


def _compare(name: str, mode: str, dtype: torch.dtype) -> dict[str, Any]:
    try:
        model = MAKE[mode](build(name))
        model = model if mode == "QLoRA" else model.to(dtype)
        one, other = (token_gradients(model, x) for x in (OBSERVED, UPDATED))
        if not (one.isfinite().all() and other.isfinite().all()):
            raise ValueError("autograd's gradients are not finite")
    except Exception as error:
        return {"outcome": "not built", "reason": sentence(error)}
    truth, scale = one @ other.T, one.norm(dim=1)[:, None] * other.norm(dim=1)[None]
    try:
        anatomy = lddyn.Anatomy(model)
        gram = lddyn.ntk(anatomy, OBSERVED, UPDATED).gram()
        update = lddyn.SFT(UPDATED, reduction="sum")
        step = lddyn.decompose(anatomy, OBSERVED, update, lr=1e-3)
    except Exception as error:
        return {"outcome": "refused", "reason": sentence(error)}
    influence = step[0].influence / 1e-3
    error = max(float(((x.double() - truth).abs() / scale).max()) for x in (gram, influence))
    outcome = "right" if error <= LIMIT[dtype] else "WRONG"
    result = {"outcome": outcome, "error": float(f"{error:.1e}")}
    joined = getattr(anatomy, "joined", "")
    return {**result, "joined": short(joined)} if joined else result


def sentence(error: Exception) -> str:
    """The exception's type and the beginning of its message."""
    return short(f"{type(error).__name__}: {error}")


def short(text: str) -> str:
    """The text in one line of at most 240 characters, without addresses and paths."""
    line = re.sub(r"0x[0-9a-f]+|(/[\w.-]+)+/", "", " ".join(text.split()))
    return line if len(line) <= 240 else line[:237] + "..."


# --------------------------------------------------------------------------- all of them


def _child(name: str, modes: list[str], pipe: Any) -> None:
    torch.set_num_threads(1)
    for mode in modes:
        start = time.perf_counter()
        result = compare(name, mode)
        pipe.send((mode, {**result, "seconds": round(time.perf_counter() - start, 1)}))
    pipe.close()


def try_out(name: str, modes: list[str], limit: float) -> dict[str, Any]:
    """Runs one architecture in a process of its own; a mode beyond the limit is told as such."""
    results: dict[str, Any] = {}
    here, there = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_child, args=(name, modes, there), daemon=True)
    process.start()
    there.close()
    for mode in modes:
        try:
            if not here.poll(limit):
                results[mode] = {"outcome": "refused", "reason": f"more than {limit:g} seconds"}
                break
            done, result = here.recv()
            results[done] = result
        except EOFError:
            process.join()
            results[mode] = {"outcome": "refused", "reason": f"exit code {process.exitcode}"}
            break
    process.kill()
    process.join()
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; default: those without a result")
    parser.add_argument("--modes", nargs="+", choices=list(MAKE), help="default: all that can run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one mode")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the table of the page")
    options = parser.parse_args()
    if not options.table:
        run(options)
    if options.table or options.results == RESULTS:
        results = json.loads(options.results.read_text())
        PAGE.write_text(with_table(PAGE.read_text(), results))


def run(options: argparse.Namespace) -> None:
    """Tries the architectures out and writes every result as soon as it is there."""
    modes = options.modes or [
        mode for mode in MAKE if mode != "QLoRA" or importlib.util.find_spec("bitsandbytes")
    ]
    path = options.results
    known = json.loads(path.read_text()) if path.exists() else {}
    outcomes = known.get("architectures", {})
    todo = {
        name: missing
        for name in options.names or names()
        if (missing := [m for m in modes if options.names or m not in outcomes.get(name, {})])
    }

    def one(name: str) -> None:
        results = try_out(name, todo[name], options.limit)
        outcomes[name] = {**outcomes.get(name, {}), **results}
        said = [f"{m}: {r['outcome']} {r.get('reason', '')}" for m, r in results.items()]
        print(f"{name:28} {' | '.join(said)}", flush=True)
        whole = {**provenance(), "architectures": dict(sorted(outcomes.items()))}
        path.write_text(json.dumps(whole, indent=1) + "\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, todo))


# --------------------------------------------------------------------------- the page

_BEGIN, _END = "<!-- table:begin -->", "<!-- table:end -->"


def with_table(page: str, results: dict[str, Any]) -> str:
    """The page with the table of these results in place of the old one."""
    before, rest = page.split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}\n{table(results)}\n{_END}{after}"


def table(results: dict[str, Any]) -> str:
    """Counts, then one row for each architecture, then the reasons."""
    outcomes = results["architectures"]
    modes = list(MAKE)
    kinds = ["right", "refused", "WRONG", "left out", "not built"]
    lines = [
        f"transformers {results['transformers']}, torch {results['torch']}, lddyn at commit "
        f"{results['commit']}, {results['date']}.",
        "",
        f"| of {len(outcomes)} | {' | '.join(kinds)} |",
        "|---|" + "---|" * len(kinds),
    ]
    for mode in modes:
        counts = [
            sum(o.get(mode, {}).get("outcome") == kind for o in outcomes.values()) for kind in kinds
        ]
        if any(counts):
            lines.append(f"| {mode} | {' | '.join(map(str, counts))} |")
    lines += ["", f"| architecture | {' | '.join(modes)} |", "|---|" + "---|" * len(modes)]
    reasons: dict[str, list[str]] = {}
    for name, by_mode in outcomes.items():
        cells = []
        for mode in modes:
            result = by_mode.get(mode, {})
            cell = result.get("outcome", "not run")
            if result.get("joined"):
                cell += ", as one segment"
            if result.get("dtype"):
                cell += f", in {result['dtype']}"
            if result.get("reason"):
                reasons.setdefault(result["reason"], []).append(f"{name} ({mode})")
            cells.append(cell)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    if reasons:
        lines += ["", "| reason | architectures |", "|---|---|"]
    for reason, where in reasons.items():
        text = reason.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {text} | {', '.join(where)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
