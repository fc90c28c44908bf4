"""The passes of a watched run: when they are made, and what they measure.

`trainer` calls a `Watcher` from transformers' events, `loop` from an optimizer's steps. A pass runs
the probes (`lddyn.probes`) through the model in evaluation mode, without gradients, when the budget
of time allows it. Weights and random numbers of the run are equal to the bit with and without
passes. An error inside ends the watching with a warning; training goes on.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.data.tokenizer import Tokenizer
from lddyn.engine.door import check_whole, unwrapped
from lddyn.engine.pushforward import Direction, batched_shifts
from lddyn.engine.sharded import reshard
from lddyn.integrations.budget import Budget, budget_share
from lddyn.integrations.dynamics_file import DynamicsFile, Row
from lddyn.integrations.processes import Processes
from lddyn.probes.measure import measure
from lddyn.probes.probe_set import LABELS, Encoded, ProbeSet
from lddyn.report import write_dynamics

__all__ = ["Probes", "Watcher"]

_LOG = logging.getLogger("lddyn")

_LONG = 20.0  # seconds of a first pass that a user should know of

Probes = str | Path | ProbeSet | Encoded | Mapping[str, Sequence[Example]]

# Receives a row, its names beginning with "lddyn/", and the step.
Log = Callable[[dict[str, float], int], object]


@dataclass
class _Run:
    """A run that is being watched.

    Attributes:
        probes: What a pass measures.
        few: The probes whose latest step is predicted.
        processes: This process among those that train.
        file: Where rows are written. None: another process writes them.
        start: Log-prob of each example in the first pass, (N,), nats.
        budget: Time for passes, counted from here.
        before: Weights, and log-probs of `few`, before the step that is being explained.
        over: No further pass is made.
        left_out: Steps of `every` whose passes the budget left out.
    """

    probes: Encoded
    few: Encoded
    processes: Processes
    file: DynamicsFile | None
    start: Tensor | None
    budget: Budget
    before: tuple[Direction, Tensor] | None = None
    over: bool = False
    left_out: set[int] = field(default_factory=set)


class Watcher:
    """Passes over probes within a budget of time: `LearningDynamicsCallback` and `loop.Watch`.

    Attributes:
        budget: Most seconds of passes for each second of training.
        rows: One dict per pass, with "step".
        folder: Folder of the latest run.
        fixed_folder: Folder of every run. None: each run has its own.
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
        self.budget = budget_share(budget)
        self.probes, self.every, self.predict, self.prompts = probes, every, predict, prompts
        self.folder = self.fixed_folder = None if folder is None else Path(folder)
        self.rows: list[Row] = []
        self._run: _Run | None = None
        self._failed = False  # an error of this process in this run

    # ----- events

    def begin(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        folder: str | Path,
        step: int,
        log: Log,
    ) -> None:
        """Begin to watch a run: the first pass is made, or rows from before a checkpoint are read.

        Args:
            model: The model as it is trained, wrapped or not.
            tokenizer: For probes that are text.
            folder: Folder of the run, unless the watcher has a folder of its own.
            step: Steps made before.
            log: Receives the row.
        """
        self._run, self._failed, self.rows = None, False, []
        processes = Processes(model)
        if not processes.watches:
            return
        model = unwrapped(model)
        run = None
        with self._safely("begin"):
            check_whole(model, allow_fsdp2=True)
            run = self._prepare(tokenizer, processes, Path(folder), step)
        first_pass, failed = processes.vote(not self.rows, self._failed)
        if run is None or failed:
            return
        self._run = run
        if first_pass:
            self._pass(run, "begin", model, step, log)
            self._tell_cost(run)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Copy the weights before the step that makes `step`, if a pass is to explain that step."""
        run = self._run
        if run is None or not self.predict or run.processes.sharded or not self._due(run, step):
            return
        model = unwrapped(model)
        with self._safely("step"), run.budget.paid():
            weights = {
                n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
            }
            run.before = weights, measure(model, run.few).log_prob

    def after_step(self, model: nn.Module, step: int, log: Log) -> None:
        """Make a pass after `step` if one is due."""
        run = self._run
        if run is not None and (run.before is not None or self._due(run, step)):
            self._pass(run, "step", unwrapped(model), step, log)

    def end(self, model: nn.Module, step: int, log: Log, *, measured: bool = False) -> None:
        """Make a last pass, whatever the budget, and draw the rows as a page.

        Args:
            model: The model after `step`.
            step: The last step.
            log: Receives the row.
            measured: Whether the weights need no pass.
        """
        run = self._run
        if run is None:
            return
        done = measured or (bool(self.rows) and self.rows[-1]["step"] == step)
        if self._agreed(run, not done):
            self._pass(run, "end", unwrapped(model), step, log)
        if run.file is not None and self.rows and not self._failed:
            self._tell_left_out(run)
            with self._safely("page"):
                write_dynamics(self.rows, run.file.path.with_name("index.html"), labels=LABELS)

    @property
    def overhead(self) -> float:
        """Seconds of passes over seconds of training, in the run that is watched; 0 before one."""
        return 0.0 if self._run is None else self._run.budget.overhead

    # ----- when a pass is made

    def _due(self, run: _Run, step: int) -> bool:
        if self.every is not None and step % self.every:
            return False
        affordable = run.budget.affords(2)  # with room for the last pass
        if not affordable and self.every is not None:
            run.left_out.add(step)
        return self._agreed(run, affordable)

    def _agreed(self, run: _Run, wish: bool) -> bool:
        """Whether the first process wishes a pass; once a process has failed, there is none."""
        if run.over:
            return False
        wish, run.over = run.processes.vote(wish, self._failed)
        return wish and not run.over

    def _tell_cost(self, run: _Run) -> None:
        """Warn of a first pass that took long: what it will cost is known only now."""
        cost = run.budget.cost
        if run.file is not None and cost > _LONG:
            warnings.warn(
                f"lddyn's first pass over {len(run.probes.examples)} probes took {cost:.0f} s; "
                f"budget={self.budget:g} lets one follow every {cost / self.budget:.0f} s of "
                "training, and the last one is made in any case: give fewer probes (prompts=), "
                "or a larger budget",
                stacklevel=4,
            )

    def _tell_left_out(self, run: _Run) -> None:
        """Warn of passes that were asked for and that the budget left out."""
        if run.left_out:
            warnings.warn(
                f"lddyn left out {len(run.left_out)} of the passes that every={self.every} asks "
                f"for: a pass takes {run.budget.cost:.2g} s, and budget={self.budget:g} is the "
                "share of training's time that passes may take; raise budget, or give fewer probes",
                stacklevel=4,
            )

    # ----- what a pass does

    def _pass(self, run: _Run, where: str, model: nn.Module, step: int, log: Log) -> None:
        with self._safely(where):
            with run.budget.paid():
                means, each = _measure(run, model)
                reshard(model)
            run.budget.complete_pass()
            row = {"step": step, "overhead": run.budget.overhead if self.rows else 0.0, **means}
            self.rows.append(row)
            if run.file is not None:
                run.file.append(row, each.tolist())
                finite = {k: v for k, v in row.items() if k != "step" and math.isfinite(v)}
                log({f"lddyn/{k}": v for k, v in finite.items()}, step)

    # ----- beginning

    def _prepare(
        self, tokenizer: Tokenizer | None, processes: Processes, folder: Path, step: int
    ) -> _Run:
        probes = self._encoded(tokenizer)
        few = probes.select(range(min(self.predict, probes.prompts)))
        file = start = None
        if processes.first:
            self.folder = self.fixed_folder or folder
            file = DynamicsFile(self.folder, probes)
            self.rows, start = file.resume(step)
        if processes.sharded and self.predict:
            warnings.warn(
                f"lddyn leaves out predict={self.predict}: parameters are sharded over "
                "processes, and J Δθ needs them whole; give predict=0",
                stacklevel=5,
            )
        return _Run(probes, few, processes, file, start, Budget(self.budget))

    def _encoded(self, tokenizer: Tokenizer | None) -> Encoded:
        probes = self.probes
        if isinstance(probes, Encoded):
            return probes
        if isinstance(probes, Mapping):
            fields = tuple(probes)
            cells = [(i, j) for j, name in enumerate(fields) for i in range(len(probes[name]))]
            examples = [e for name in fields for e in probes[name]]
            count = max((len(x) for x in probes.values()), default=0)
            if not examples:
                raise ValueError("probes must hold at least one example, got none")
            return Encoded(examples, torch.tensor(cells), count, fields)
        if not isinstance(probes, ProbeSet):
            probes = ProbeSet.read(probes, limit=self.prompts)
        if tokenizer is None:
            raise ValueError("the trainer has no processing_class (tokenizer): give encoded probes")
        encoded = probes.encode(getattr(tokenizer, "tokenizer", tokenizer))  # of a processor
        return encoded.select(range(min(self.prompts or encoded.prompts, encoded.prompts)))

    # ----- safety

    @contextmanager
    def _safely(self, where: str) -> Iterator[None]:
        """Turn an error inside into a warning and the end of watching; keep random numbers."""
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                yield
        except Exception as error:
            self._failed = True
            if self._run is not None:
                self._run.before = None
            _LOG.debug("traceback", exc_info=True)
            warnings.warn(
                f"lddyn stopped watching ({where}): {type(error).__name__}: {error}; training "
                "goes on (LDDYN_LOG=DEBUG shows the traceback)",
                stacklevel=4,
            )


def _measure(run: _Run, model: nn.Module) -> tuple[dict[str, float], Tensor]:
    """Means over prompts of one pass, by "quantity/type", and each example's log-prob; nats."""
    measured = measure(model, run.probes)
    run.start = measured.log_prob if run.start is None else run.start
    means = _means(
        run.probes,
        {
            "log_prob": measured.log_prob,
            "change": measured.log_prob - run.start,
            "greedy": measured.greedy,
            "entropy": measured.entropy / measured.tokens,
        },
    )
    if run.before is not None:
        (weights, log_prob), run.before = run.before, None
        step = measure(model, run.few).log_prob - log_prob
        first_order = _first_order(model, run.few.examples, weights)
        means |= _means(run.few, {"step": step, "first_order": first_order})
    return means, measured.log_prob


def _means(probes: Encoded, quantities: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over prompts by "quantity/type"; NaN for a type without responses."""
    return {
        f"{quantity}/{name}": float(mean)
        for quantity, values in quantities.items()
        for name, mean in zip(probes.fields, probes.grid(values).nanmean(0), strict=True)
    }


def _first_order(model: nn.Module, examples: Sequence[Example], before: Direction) -> Tensor:
    """Σ_m [J Δθ]_m of each example, (N,), nats: first-order change of log π, J at the new weights.

    Args:
        model: The model after the step.
        examples: N of them.
        before: The trainable weights before the step, by name.
    """
    step = {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for index, shift in batched_shifts(model, examples, [step]):
        sums[index] = shift.realised.double().sum()
    return sums
