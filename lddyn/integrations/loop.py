"""Watching a training loop of your own, accelerate's, or FSDP2's, through its optimizer.

    with Watch(model, optimizer, "probes.jsonl", tokenizer=tokenizer, folder="runs/watch"):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

The loop stays as it is: hooks of the optimizer tell when a step is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lddyn.data.tokenizer import Tokenizer
from lddyn.integrations.watcher import Probes, Watcher
from lddyn.optimizers import unwrapped_optimizer

__all__ = ["Watch"]


class Watch(Watcher):
    """Tracks log π of probe responses over the steps of an optimizer.

    It measures, writes and guarantees what `LearningDynamicsCallback` does; the folder is `folder`
    itself. With accelerate or DistributedDataParallel every process makes a Watch and the first
    one watches; under FSDP2 all of them take part in each pass. Steps that accelerate or a
    GradScaler skips are not counted. `accelerator.register_for_checkpointing` accepts a Watch; load
    a checkpoint before ``with``, where watching begins.

    Args:
        model: A causal LM of transformers, as it is trained, wrapped or not.
        optimizer: Its optimizer; accelerate's wrapper of one will do.
        probes: A file or `ProbeSet` (encoded with `tokenizer`), an `Encoded` set, or lists of
            examples by name.
        folder: Folder of dynamics.jsonl and index.html. A file of an earlier run there is renamed,
            unless `step` says that this run goes on with it.
        tokenizer: Needed for a file or a `ProbeSet`.
        log: Called with a dict of numbers and the step: ``accelerator.log``, ``wandb.log``.
        step: Steps made before; `load_state_dict` sets it, too.
        every: Steps between passes. None: as often as the budget allows.
        budget: Most seconds of passes for each second of training: "5%" or 0.05.
        predict: Number of prompts for ``step`` and ``first_order``. 0: none.
        prompts: Number of prompts of a `ProbeSet` that are used, the first ones. None: all.

    Attributes:
        rows: One dict per pass, with "step".
        step: Steps made so far.

    Raises:
        ValueError: If the budget is not a positive share, or every is not positive.
        TypeError: If the optimizer is not a torch.optim.Optimizer.

    Cost: one forward pass over the probes per pass; with `predict`, three more over its prompts.

    Example:
        >>> import lddyn, torch, transformers
        >>> from lddyn.integrations.loop import Watch
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> probes, ids = {"greeting": [lddyn.Example([1, 2], [3, 4])]}, torch.tensor([[1, 2, 3]])
        >>> with Watch(model, optimizer, probes, folder="watched", budget="10000%") as watch:
        ...     for _ in range(2):
        ...         model(input_ids=ids, labels=ids).loss.backward()
        ...         optimizer.step()
        >>> [row["step"] for row in watch.rows]
        [0, 1, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        probes: Probes,
        *,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        log: Callable[[dict[str, float], int], object] | None = None,
        step: int = 0,
        every: int | None = None,
        budget: float | str = "5%",
        predict: int = 0,
        prompts: int | None = 64,
    ):
        super().__init__(probes, every=every, budget=budget, predict=predict, prompts=prompts)
        # accelerate's wrapper also counts the steps that it skips
        optimizer = unwrapped_optimizer(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.model, self.tokenizer, self.step = model, tokenizer, step
        self.optimizer = optimizer
        self.folder = self._own_folder = Path(folder)
        self._log = log or _no_log
        self._hooks: list[RemovableHandle] = []

    def start(self) -> Watch:
        """Make the first pass and watch the optimizer's steps from now on, as ``with`` does."""
        self.close()
        self.begin(self.model, self.tokenizer, self._own_folder, self.step, self._log)
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_optimizer_step),
            self.optimizer.register_step_post_hook(self._after_optimizer_step),
        ]
        return self

    def close(self) -> None:
        """Remove the hooks, make a last pass, and draw the page."""
        if self._hooks:
            self._remove_hooks()
            self.end(self.model, self.step, self._log)

    def state_dict(self) -> dict[str, int]:
        """The number of steps made, for a checkpoint; the rows are in the folder."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the steps of a checkpoint; call it before `start`.

        Args:
            state: What `state_dict` returned.
        """
        self.step = int(state["step"])

    def _before_optimizer_step(self, *_: object) -> None:
        self.before_step(self.model, self.step + 1)

    def _after_optimizer_step(self, *_: object) -> None:
        self.step += 1
        self.after_step(self.model, self.step, self._log)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Watch:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._remove_hooks()  # no last pass: other processes may not arrive at it
        self.close()


def _no_log(values: dict[str, float], step: int) -> None:
    """Rows are written to the folder only."""
