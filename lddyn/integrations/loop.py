"""A training loop of one's own, accelerate's, or FSDP's, watched through its optimizer.

with Watch(model, optimizer, "probes.jsonl", tokenizer=tokenizer, folder="runs/watch"):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The optimizer's own hooks tell when a step is made, so the loop stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lddyn.integrations.watcher import Probes, Watcher

__all__ = ["Watch"]


class Watch(Watcher):
    """Tracks log π of probe responses over the steps of an optimizer.

    What is measured, kept in FOLDER/dynamics.jsonl and promised is that of
    `LearningDynamicsCallback`. With accelerate, or DistributedDataParallel, every process makes a
    Watch and the first one watches; under FSDP all of them take part in each pass. Steps that
    accelerate or a GradScaler leaves out are no steps. `accelerator.register_for_checkpointing`
    takes it; a checkpoint is loaded before ``with``, where watching begins.

    Args:
        model: A causal LM of transformers, as it is trained: wrapped or not.
        optimizer: Its optimizer, accelerate's wrapper of one included.
        probes: A file or `ProbeSet` (encoded with `tokenizer`), an `Encoded` set, or examples by
            name.
        folder: For dynamics.jsonl. A file of an earlier run there is renamed, unless `step` says
            that this run goes on with it.
        tokenizer: For a file or a `ProbeSet`.
        log: Called with a dict of numbers and the step: ``accelerator.log``, ``wandb.log``.
        step: Steps made before; the next one is one more. `load_state_dict` sets it, too.
        every: Steps between passes. None: as often as the budget allows.
        budget: Most time for passes, as a share of that of training: "5%" or 0.05.
        predict: Prompts for ``step`` and ``first_order``. 0: none.
        prompts: Only the first so many of a `ProbeSet`. None: all.

    Attributes:
        rows: One dict a pass, with "step".
        step: Steps made so far.

    Raises:
        ValueError: If the budget is not a positive share, or every is not positive.
        TypeError: If the optimizer is none of torch's.

    Cost: a forward pass over the probes a pass; with `predict`, three more over those prompts.

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
        tokenizer: Any = None,
        log: Callable[[dict[str, float], int], Any] | None = None,
        step: int = 0,
        every: int | None = None,
        budget: float | str = "5%",
        predict: int = 0,
        prompts: int | None = 64,
    ):
        super().__init__(
            probes, every=every, budget=budget, predict=predict, prompts=prompts, folder=folder
        )
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # accelerate's wrapper skips steps; the hooks are of true ones
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.model, self.tokenizer, self.step = model, tokenizer, step
        self.optimizer = optimizer
        self._logger = log
        self._hooks: list[RemovableHandle] = []

    def start(self) -> Watch:
        """Makes the first pass and watches the optimizer's steps from now on; so does ``with``."""
        assert self.folder is not None
        self.close()
        self.begin(self.model, self.tokenizer, self.folder, self.step)
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._ahead),
            self.optimizer.register_step_post_hook(self._behind),
        ]
        return self

    def _ahead(self, *_: Any) -> None:
        self.before_step(self.model, self.step + 1)

    def _behind(self, *_: Any) -> None:
        self.step += 1
        self.after_step(self.model, self.step)

    def log(self, values: dict[str, float], step: int) -> None:
        """Hands a row to the function given as `log`."""
        if self._logger is not None:
            self._logger(values, step)

    def close(self) -> None:
        """Leaves the optimizer alone; makes a last pass within the budget, and draws the page."""
        if self._hooks:
            self._release()
            self.end(self.model, self.step)

    def _release(self) -> None:
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
        if error is not None:  # other processes may not get here: no pass together
            self._release()
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The steps made, for a checkpoint; rows are in the folder."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the steps of a checkpoint; called before `start`.

        Args:
            state: What `state_dict` returned.
        """
        self.step = int(state["step"])
