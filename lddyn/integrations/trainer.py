"""What training does to the belief in other responses, watched from inside transformers' Trainer.

    trainer = Trainer(...)      # or TRL's SFTTrainer, DPOTrainer
    trainer.add_callback(LearningDynamicsCallback("probes.jsonl", trainer=trainer))

The callback reads probes (`lddyn.probes`) in a forward pass of its own, in evaluation mode and
without gradients, when its budget of time allows it. Weights and random numbers of the run stay as
they are without it, to the bit, and an error inside ends the watching, never the training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lddyn.anatomy import Anatomy
from lddyn.examples import Example
from lddyn.probes import Encoded, ProbeSet, measure
from lddyn.pushforward import AlongDirection, Direction, Pushforward, delta_log_probs
from lddyn.report import plain, write_dynamics
from lddyn.shards import replace_file

__all__ = ["LearningDynamicsCallback"]

_LOG = logging.getLogger("lddyn")
Probes = str | Path | ProbeSet | Encoded | Mapping[str, Sequence[Example]]


class LearningDynamicsCallback(TrainerCallback):  # type: ignore[misc]
    """Tracks log π of probe responses over training, within a budget of time.

    Every pass logs, under ``lddyn/``, means over prompts in nats: ``log_prob/TYPE``, the sum over
    a response's tokens; ``change/TYPE``, since the start; ``greedy/TYPE``, Σ log max π along the
    response (paper §4.1, with the argmax of that response); ``entropy/TYPE`` per token; and
    ``overhead``, seconds of passes over seconds of training. If `predict` is not 0, the pass also
    asks what the latest step alone did to a few prompts: ``step/TYPE`` as measured, and
    ``first_order/TYPE``, the sum of J Δθ with the optimizer's true Δθ, taken at its end.

    All rows, with every single example's log-prob, are appended to FOLDER/dynamics.jsonl; they are
    read again when training resumes from a checkpoint with the same probes. A file of an earlier
    run, or of other probes, is renamed to dynamics-1.jsonl, -2, … The end of training draws the
    rows as a page, FOLDER/index.html.

    Args:
        probes: A file or `ProbeSet` (encoded with the trainer's tokenizer at the start), an
            `Encoded` set, or examples by name.
        every: Optimizer steps between passes. None: as often as the budget allows.
        budget: Most time for passes, as a share of that of training: "5%" or 0.05. A pass that
            would break it waits. The first one, at the start, is always made.
        predict: Prompts for ``step`` and ``first_order``; needs a copy of the trainable parameters
            for the time of that step. 0: none.
        prompts: Only the first so many of a `ProbeSet`. None: all.
        folder: Default: OUTPUT_DIR/lddyn.
        trainer: With it, rows reach the dashboard and the log as the trainer's own do, beside its
            rows. Without it, only ``state.log_history`` and the file.

    Attributes:
        rows: What was logged, one dict a pass, with "step".

    Raises:
        ValueError: If the budget is not a positive share, or every is not positive.

    Cost: a forward pass over the probes a pass; with `predict`, three more over those prompts.

    Example:
        >>> import lddyn
        >>> from lddyn.integrations.trainer import LearningDynamicsCallback
        >>> watch = LearningDynamicsCallback({"greeting": [lddyn.Example([1, 2], [3, 4])]})
        >>> watch.budget
        0.05
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
        trainer: Trainer | None = None,
    ):
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if predict < 0:
            raise ValueError(f"predict must be 0 or more prompts, got {predict}")
        self.budget = _share(budget)
        self.probes, self.every, self.predict, self.prompts = probes, every, predict, prompts
        self.folder = None if folder is None else Path(folder)
        self.trainer = trainer
        self.rows: list[dict[str, Any]] = []
        self._set: Encoded | None = None
        self._start: Tensor | None = None  # log-probs of the first pass
        self._before: tuple[Direction, Tensor] | None = None  # weights, log-probs before a step
        self._began = self._spent = self._last = 0.0
        self._step_cost = 0.0  # of what precedes the latest pass, before its step
        self._broken = False

    # ----- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Encodes the probes, and makes the first pass or reads those of before."""
        # Another run with this callback, or this one again with another batch size, begins anew.
        self._start = self._before = None
        self._spent = self._last = self._step_cost = 0.0
        self._broken = not state.is_world_process_zero  # one process watches
        if self._broken:
            return
        with self._safely("begin"):
            model = _plain(kwargs["model"])
            _check_whole(model)
            self._set = self._encoded(kwargs.get("processing_class"))
            self.folder = self.folder or Path(args.output_dir) / "lddyn"
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume(state.global_step)
            self._began = time.monotonic()
            if not self.rows:
                self._pass(model, args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the weights of before a step that is to be explained."""
        if self._broken or not self.predict or not self._due(state.global_step + 1):
            return
        model, before = _plain(kwargs["model"]), self._spent
        with self._safely("step"), self._paid(), _own_forward(model):
            kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            self._before = kept, measure(model, self._few).log_prob
        self._step_cost = self._spent - before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a pass if one is due."""
        if self._broken or not (self._before is not None or self._due(state.global_step)):
            return
        with self._safely("step"):
            self._pass(_plain(kwargs["model"]), args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a last pass if the budget has room for it, and writes the page."""
        done = self.rows and self.rows[-1]["step"] == state.global_step
        # The trainer may have put the best checkpoint back: those are not the last step's weights.
        other = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not (self._broken or done or other) and self._affordable():
            with self._safely("end"):
                self._pass(_plain(kwargs["model"]), args, state, control)
        if self.rows and self.folder is not None and not self._broken:
            with self._safely("page"):
                write_dynamics(self.rows, self.folder / "index.html")

    # ----- budget

    @property
    def overhead(self) -> float:
        """Seconds of passes over seconds of everything else, so far."""
        training = time.monotonic() - self._began - self._spent
        return self._spent / training if training > 0 else math.inf

    def _affordable(self) -> bool:
        training = time.monotonic() - self._began - self._spent
        return self._spent + self._last <= self.budget * training

    def _due(self, step: int) -> bool:
        if self.every is not None and step % self.every:
            return False
        return self._affordable()

    @contextmanager
    def _paid(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - start

    # ----- a pass

    def _pass(self, model: nn.Module, args: Any, state: Any, control: Any) -> None:
        assert self._set is not None
        before = self._spent
        with self._paid(), _own_forward(model):
            values = self._values(model)
        self._last = self._spent - before + self._step_cost
        self._step_cost = 0.0
        row = {"step": state.global_step, "overhead": self.overhead if self.rows else 0.0}
        row |= {k: v for k, v in values.items() if k != "each"}
        self.rows.append(row)
        assert self.folder is not None
        with (self.folder / "dynamics.jsonl").open("a", encoding="utf-8") as file:
            whole = plain({**row, "each": values["each"], "probes": _digest(self._set)})
            file.write(json.dumps(whole, allow_nan=False) + "\n")
        logged = {f"lddyn/{k}": v for k, v in row.items() if k != "step" and math.isfinite(v)}
        if self.trainer is None:
            state.log_history.append({**logged, "step": state.global_step})
            return
        # `Trainer.log` itself, not TRL's, which would empty its own metrics; and the row of the
        # trainer is still to be written.
        should_log = control.should_log
        Trainer.log(self.trainer, logged)
        control.should_log = should_log

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
                stacklevel=3,
            )


def _digest(probes: Encoded | None) -> str:
    """Of examples and fields: rows of other probes are not continued."""
    assert probes is not None
    parts = [*probes.fields, *(e.content_id for e in probes.examples), str(probes.at.tolist())]
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
    """The model's forward, without the autocast that accelerate puts around it."""
    wrapped = model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def _plain(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, whose cache is for the shapes of training."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _check_whole(model: nn.Module) -> None:
    """Refuses sharded parameters: this process could not run the model alone."""
    for name, p in model.named_parameters():
        if p.numel() == 0 or hasattr(p, "placements") or hasattr(p, "ds_id"):
            raise ValueError(f"parameter {name} is sharded over processes (FSDP, ZeRO-3)")


def _first_order(model: nn.Module, examples: Sequence[Example], kept: Direction) -> Tensor:
    """Σ_m [J Δθ]_m of each example's realised tokens, (N,), at θ_{t+1}, in nats."""
    moved = {n: p.detach() - kept[n] for n, p in model.named_parameters() if n in kept}
    anatomy, found = Anatomy(model), []
    for example in examples:
        trace = anatomy.trace(example)
        with anatomy.analysis():
            shift = Pushforward(trace, keep=False).logits(AlongDirection(moved))[0]
        each = delta_log_probs(shift, trace.logits)
        found.append(each.gather(-1, trace.targets[:, None]).double().sum())
    return torch.stack(found)
