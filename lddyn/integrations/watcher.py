"""What every way of watching shares: when a pass is made, what it measures, where rows are kept.

`trainer` calls a `Watcher` from transformers' events, `loop` from an optimizer's steps. A pass
reads probes (`lddyn.probes`) in a forward of its own, in evaluation mode and without gradients,
when its budget of time allows it. Weights and random numbers of the run stay as they are without
it, to the bit, and an error inside ends the watching, never the training.

One process watches. Where parameters are sharded (FSDP2) no process could run the model alone: all
take part in the forward, when the first one's clock allows it and none has failed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lddyn.data.example import Example
from lddyn.engine.pushforward import Direction, batched_shifts
from lddyn.files import plain, replace_file
from lddyn.probes.measure import measure
from lddyn.probes.probe_set import LABELS, Encoded, ProbeSet
from lddyn.report import write_dynamics

__all__ = ["Probes", "Watcher"]

_LOG = logging.getLogger("lddyn")
Probes = str | Path | ProbeSet | Encoded | Mapping[str, Sequence[Example]]


class Watcher:
    """Passes over probes within a budget of time; see `LearningDynamicsCallback`, `loop.Watch`.

    Attributes:
        budget: As a share of the time of training.
        rows: What was logged, one dict a pass, with "step".
        folder: Where dynamics.jsonl is.
        given: The folder that was asked for. None: that of each run.
    """

    def __init__(
        self,
        probes: Probes,
        *,
        every: int | None = None,
        budget: float | str = "5%",
        predict: int = 0,
        prompts: int | None = 64,
        folder: str | Path | None = None,
    ):
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if predict < 0:
            raise ValueError(f"predict must be 0 or more prompts, got {predict}")
        self.budget = _share(budget)
        self.probes, self.every, self.predict, self.prompts = probes, every, predict, prompts
        self.folder = self.given = None if folder is None else Path(folder)
        self.rows: list[dict[str, Any]] = []
        self._set: Encoded | None = None
        self._start: Tensor | None = None  # log-probs of the first pass
        self._before: tuple[Direction, Tensor] | None = None  # weights, log-probs before a step
        self._began = self._spent = 0.0
        self._costs: deque[float] = deque(maxlen=3)  # seconds of the latest passes
        self._step_cost = 0.0  # of what precedes the latest pass, before its step
        self._broken = self._ended = False  # an error here; an end that all processes know of
        self._main, self._sharded = True, False

    # ----- what those who train call

    def begin(self, model: nn.Module, tokenizer: Any, folder: str | Path, step: int) -> None:
        """Encodes the probes, and makes the first pass or reads those of before."""
        # Another run, or this one again with another batch size, begins anew.
        self._start = self._before = None
        self._spent = self._step_cost = 0.0
        self._costs.clear()
        self._broken = self._ended = False
        together = distributed.is_available() and distributed.is_initialized()
        self._main = not together or distributed.get_rank() == 0
        self._sharded = together and _is_sharded(model)
        self._ended = not (self._main or self._sharded)
        if self._ended:
            return
        model = _plain(model)
        with self._safely("begin"):
            _check_whole(model)
            self._set = self._encoded(tokenizer)
            self.rows = []
            if self._main:
                self.folder = self.given or Path(folder)
                self.folder.mkdir(parents=True, exist_ok=True)
                self._resume(step)
            if self._sharded and self.predict:
                warnings.warn(
                    f"lddyn leaves out predict={self.predict}: parameters are sharded over "
                    "processes, and J Δθ needs them whole; give predict=0",
                    stacklevel=4,
                )
        self._began = time.monotonic()
        if self._agreed(not self.rows):
            self._pass("begin", model, step)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Keeps the weights of before the step that makes `step`, if that is to be explained."""
        if not self.predict or self._sharded or not self._due(step):
            return
        model, before = _plain(model), self._spent
        with self._safely("step"), self._paid(), _own_forward(model):
            kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            self._before = kept, measure(model, self._few).log_prob
        self._step_cost = self._spent - before

    def after_step(self, model: nn.Module, step: int) -> None:
        """Makes a pass if one is due after `step`."""
        if self._before is not None or self._due(step):
            self._pass("step", _plain(model), step)

    def end(self, model: nn.Module, step: int, measured: bool = False) -> None:
        """Makes a last pass if the budget has room for it, and draws the rows as a page.

        Args:
            model: After `step`.
            step: The last one.
            measured: These weights need no pass.
        """
        done = measured or (bool(self.rows) and self.rows[-1]["step"] == step)
        if self._agreed(not done and self._affordable(1)):
            self._pass("end", _plain(model), step)
        if self._main and self.rows and self.folder is not None and not self._broken:
            with self._safely("page"):
                write_dynamics(self.rows, self.folder / "index.html", labels=LABELS)

    def log(self, values: dict[str, float], step: int) -> None:
        """Hands a row to whoever shows it; names begin with ``lddyn/``."""
        raise NotImplementedError

    # ----- budget

    @property
    def overhead(self) -> float:
        """Seconds of passes over seconds of everything else, so far."""
        training = time.monotonic() - self._began - self._spent
        return self._spent / training if training > 0 else math.inf

    def _affordable(self, passes: int) -> bool:
        training = time.monotonic() - self._began - self._spent
        cost = max(self._costs, default=0.0)  # as long as the longest of the latest
        return self._spent + passes * cost <= self.budget * training

    def _due(self, step: int) -> bool:
        if self.every is not None and step % self.every:
            return False
        return self._agreed(self._affordable(2))  # with room for the last one

    def _agreed(self, wish: bool) -> bool:
        """Whether the first process wishes it and none has failed."""
        if self._ended:
            return False
        votes: list[Any] = [(wish, self._broken)]
        if self._sharded:
            votes *= distributed.get_world_size()
            distributed.all_gather_object(votes, (wish, self._broken))
        self._ended = any(broken for _, broken in votes)
        return bool(votes[0][0]) and not self._ended

    @contextmanager
    def _paid(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - start

    # ----- a pass

    def _pass(self, where: str, model: nn.Module, step: int) -> None:
        with self._safely(where):
            before = self._spent
            with self._paid(), _own_forward(model):
                values = self._values(model)
                _reshard(model)
            self._costs.append(self._spent - before + self._step_cost)
            self._step_cost = 0.0
            row = {"step": step, "overhead": self.overhead if self.rows else 0.0}
            row |= {k: v for k, v in values.items() if k != "each"}
            self.rows.append(row)
            if not self._main:
                return
            assert self.folder is not None
            whole = plain({**row, "each": values["each"], "probes": _digest(self._set)})
            with (self.folder / "dynamics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole, allow_nan=False) + "\n")
            finite = {k: v for k, v in row.items() if k != "step" and math.isfinite(v)}
            self.log({f"lddyn/{k}": v for k, v in finite.items()}, step)

    def _values(self, model: nn.Module) -> dict[str, Any]:
        assert self._set is not None
        found = measure(model, self._set)
        self._start = found.log_prob if self._start is None else self._start
        columns = {
            "log_prob": found.log_prob,
            "change": found.log_prob - self._start,
            "greedy": found.greedy,
            "entropy": found.entropy / found.tokens,
        }
        if self._before is not None:
            (kept, old), self._before = self._before, None
            few = self._few
            step = measure(model, few).log_prob - old
            first = _first_order(model, few.examples, kept)
            columns |= {"step": step, "first_order": first}
        values: dict[str, Any] = {}
        for name, column in columns.items():
            where = self._few if name in ("step", "first_order") else self._set
            for kind, mean in zip(where.fields, where.grid(column).nanmean(0), strict=True):
                values[f"{name}/{kind}"] = float(mean)
        values["each"] = [round(x, 4) for x in found.log_prob.tolist()]
        return values

    @property
    def _few(self) -> Encoded:
        assert self._set is not None
        return self._set.select(range(min(self.predict, self._set.prompts)))

    # ----- beginning

    def _encoded(self, tokenizer: Any) -> Encoded:
        probes = self.probes
        if isinstance(probes, Encoded):
            return probes
        if isinstance(probes, Mapping):
            fields = tuple(probes)
            at = [(i, j) for j, name in enumerate(fields) for i in range(len(probes[name]))]
            examples = [e for name in fields for e in probes[name]]
            count = max((len(x) for x in probes.values()), default=0)
            if not examples:
                raise ValueError("probes hold no example")
            return Encoded(examples, torch.tensor(at), count, fields)
        if not isinstance(probes, ProbeSet):
            probes = ProbeSet.read(probes, limit=self.prompts)
        if tokenizer is None:
            raise ValueError("the trainer has no processing_class (tokenizer): give encoded probes")
        found = probes.encode(getattr(tokenizer, "tokenizer", tokenizer))
        return found.select(range(min(self.prompts or found.prompts, found.prompts)))

    def _resume(self, step: int) -> None:
        """Rows of an earlier run up to its checkpoint; those after it did not happen."""
        assert self.folder is not None
        path = self.folder / "dynamics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        probes, kept, foreign = _digest(self._set), [], not step and bool(lines)
        for line in lines if step else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut by a crash
            if not isinstance(row, dict) or row.get("probes") != probes:
                foreign = True
            elif row["step"] <= step:
                kept.append(row)
        if foreign:
            number = 1
            while (aside := path.with_name(f"dynamics-{number}.jsonl")).exists():
                number += 1
            path.replace(aside)
        replace_file(path, "".join(json.dumps(r) + "\n" for r in kept))
        if kept:
            first = [math.nan if x is None else x for x in kept[0]["each"]]
            self._start = torch.tensor(first, dtype=torch.float64)
        self.rows = [{k: v for k, v in r.items() if k not in ("each", "probes")} for r in kept]

    # ----- safety

    @contextmanager
    def _safely(self, where: str) -> Iterator[None]:
        """An error ends the watching, with a warning, and not the training."""
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                yield
        except Exception as error:
            self._broken, self._before = True, None
            _LOG.debug("traceback", exc_info=True)
            warnings.warn(
                f"lddyn stopped watching ({where}): {type(error).__name__}: {error}; training "
                "goes on (LDDYN_LOG=DEBUG shows the traceback)",
                stacklevel=4,
            )


def _digest(probes: Encoded | None) -> str:
    """Of examples and fields: rows of other probes are not continued."""
    assert probes is not None
    parts = [*probes.fields, *(e.content_id for e in probes.examples), str(probes.cells.tolist())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _share(budget: float | str) -> float:
    text = str(budget).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"budget must be a share such as '5%' or 0.05, got {budget!r}")
    return value


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """The model's forward without autocast: accelerate's around it, or that of the loop."""
    wrapped = model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def _plain(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, whose cache is for the shapes of training, and DDP's."""
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    while hasattr(model, "_orig_mod") or isinstance(model, parallel):
        model = model.module if isinstance(model, parallel) else model._orig_mod  # type: ignore[assignment]
    return model


def _is_sharded(model: nn.Module) -> bool:
    """Whether this process has only a part of some parameters, and torch gathers them (FSDP2)."""
    return any(hasattr(p, "placements") for p in model.parameters())


def _reshard(model: nn.Module) -> None:
    """FSDP2 keeps the root's parameters whole after a forward; a step would leave them behind."""
    for module in model.modules():
        if reshard := getattr(type(module), "reshard", None):
            reshard(module)


def _check_whole(model: nn.Module) -> None:
    """Refuses the ways of sharding in which a pass would fail or leave something behind."""
    for module in model.modules():
        if hasattr(module, "_fsdp_wrapped_module"):
            raise ValueError(
                "the model is sharded by FullyShardedDataParallel (FSDP 1), expected whole "
                "parameters or fully_shard: use FSDP 2 (fsdp_version: 2)"
            )
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(
                f"parameter {name} is sharded by DeepSpeed ZeRO-3, expected whole parameters: use "
                "ZeRO-2, or FSDP 2"
            )


def _first_order(model: nn.Module, examples: Sequence[Example], kept: Direction) -> Tensor:
    """Σ_m [J Δθ]_m of each example's realised tokens, (N,), at θ_{t+1}, in nats."""
    moved = {n: p.detach() - kept[n] for n, p in model.named_parameters() if n in kept}
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for index, shift in batched_shifts(model, examples, [moved]):
        sums[index] = shift.realised.double().sum()
    return sums
