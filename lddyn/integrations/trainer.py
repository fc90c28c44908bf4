"""Watching transformers' Trainer, and the trainers of TRL that derive from it.

trainer = Trainer(...)  # or SFTTrainer, DPOTrainer
trainer.add_callback(LearningDynamicsCallback("probes.jsonl", trainer=trainer))
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lddyn.integrations.watcher import Probes, Watcher

__all__ = ["LearningDynamicsCallback"]


class LearningDynamicsCallback(Watcher, TrainerCallback):  # type: ignore[misc]
    """Tracks log π of probe responses over training, within a budget of time.

    Each pass over the probes logs, under ``lddyn/``, means over prompts in nats, by response type:

    - ``log_prob/TYPE``: log π of the response, summed over its tokens
    - ``change/TYPE``: its change since the first pass
    - ``greedy/TYPE``: Σ log max π along the response (paper §4.1): confidence of the likeliest
      tokens
    - ``entropy/TYPE``: entropy of the predictions, per token
    - ``overhead``: seconds of passes over seconds of training

    With `predict`, a pass also explains the latest step, for the first prompts: ``step/TYPE`` is
    the measured change of log π in that step, ``first_order/TYPE`` the predicted one, J Δθ with the
    optimizer's actual Δθ and J at the new weights.

    All rows, with the log-prob of each example, are appended to FOLDER/dynamics.jsonl. Training
    that resumes from a checkpoint with the same probes goes on with them; a file of an earlier run,
    or of other probes, is renamed to dynamics-1.jsonl, dynamics-2.jsonl, … The end of training
    draws the rows as a page, FOLDER/index.html.

    Weights and random numbers of the run are equal to the bit with and without the callback. An
    error inside ends the watching with a warning; training goes on.

    Args:
        probes: A file or `ProbeSet` (encoded with the trainer's tokenizer at the start), an
            `Encoded` set, or lists of examples by name.
        every: Optimizer steps between passes. None: as often as the budget allows.
        budget: Most seconds of passes for each second of training: "5%" or 0.05. A pass that would
            exceed it waits. The first pass, at the start, and the last are always made.
        predict: Number of prompts for ``step`` and ``first_order``; needs memory for a copy of the
            trainable parameters during that step. 0: none.
        prompts: Number of prompts of a `ProbeSet` that are used, the first ones. None: all.
        folder: Folder of rows and page. None: OUTPUT_DIR/lddyn.
        trainer: The trainer, whose log and dashboard then receive the rows beside its own. None:
            rows are in ``state.log_history`` and the file only.

    Attributes:
        rows: One dict per pass, with "step".

    Raises:
        ValueError: If the budget is not a positive share, or every is not positive.

    Cost: one forward pass over the probes per pass; with `predict`, three more over its prompts.

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
        super().__init__(
            probes, every=every, budget=budget, predict=predict, prompts=prompts, folder=folder
        )
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Encode the probes, and make the first pass or read the rows of before."""
        tokenizer, folder = kwargs.get("processing_class"), Path(args.output_dir) / "lddyn"
        log = partial(self._log, state, control)
        self.begin(kwargs["model"], tokenizer, folder, state.global_step, log)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the weights before a step that is to be explained."""
        self.before_step(kwargs["model"], state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make a pass if one is due."""
        self.after_step(kwargs["model"], state.global_step, partial(self._log, state, control))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make a last pass, and draw the rows as a page."""
        # A best checkpoint that the trainer has loaded holds other weights than the last step's.
        restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
        log = partial(self._log, state, control)
        self.end(kwargs["model"], state.global_step, log, measured=restored)

    def _log(
        self, state: TrainerState, control: TrainerControl, values: dict[str, float], step: int
    ) -> None:
        """Write a row into the trainer's log and dashboard, or into its history alone."""
        if self.trainer is None:
            state.log_history.append({**values, "step": step})
            return
        # `log` of the base class: TRL's own would empty the metrics that it has collected. It
        # clears should_log, but the trainer's own row of this step is still to be written.
        should_log = control.should_log
        Trainer.log(self.trainer, values)
        control.should_log = should_log
