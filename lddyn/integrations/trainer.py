"""What training does to the belief in other responses, watched from inside transformers' Trainer.

    trainer = Trainer(...)      # or TRL's SFTTrainer, DPOTrainer
    trainer.add_callback(LearningDynamicsCallback("probes.jsonl", trainer=trainer))

When passes are made, and what they leave alone, is in `lddyn.integrations.watcher`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from lddyn.integrations.watcher import Probes, Watcher

__all__ = ["LearningDynamicsCallback"]


class LearningDynamicsCallback(Watcher, TrainerCallback):  # type: ignore[misc]
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
        super().__init__(
            probes, every=every, budget=budget, predict=predict, prompts=prompts, folder=folder
        )
        self.trainer = trainer
        self._now: tuple[Any, Any] | None = None  # state and control of the event

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Encodes the probes, and makes the first pass or reads those of before."""
        self._now = state, control
        tokenizer, folder = kwargs.get("processing_class"), Path(args.output_dir) / "lddyn"
        self.begin(kwargs["model"], tokenizer, folder, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the weights of before a step that is to be explained."""
        self.before_step(kwargs["model"], state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a pass if one is due."""
        self._now = state, control
        self.after_step(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a last pass if the budget has room for it, and draws the rows as a page."""
        # The trainer may have put the best checkpoint back: those are not the last step's weights.
        restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
        self._now = state, control
        self.end(kwargs["model"], state.global_step, measured=restored)

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes a row into the trainer's log and dashboard, or into its history alone."""
        assert self._now is not None
        state, control = self._now
        if self.trainer is None:
            state.log_history.append({**values, "step": step})
            return
        # `Trainer.log` itself, not TRL's, which would empty its own metrics; and the row of the
        # trainer is still to be written.
        should_log = control.should_log
        Trainer.log(self.trainer, values)
        control.should_log = should_log
