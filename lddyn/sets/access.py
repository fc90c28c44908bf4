"""The model as a diagnosis uses it: forward passes, gradients of responses, and pushes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.door import check_repeatable, check_separate
from lddyn.engine.gradient import flat_gradient, gradient_of, unflatten
from lddyn.engine.guard import evaluating
from lddyn.engine.logits import own_response
from lddyn.engine.pushforward import log_prob_shifts
from lddyn.engine.reference_policy import (
    Reference,
    adapters_switched,
    reference_log_probs,
)
from lddyn.engine.sharded import Shards, gradient_in_place, is_sharded, reshard
from lddyn.engine.trace import Trace
from lddyn.errors import DisagreementError, UnrepeatableModelError, UnsupportedModelError
from lddyn.ranks import ALONE, Ranks

__all__ = ["Access", "trainable_parameters"]


def trainable_parameters(model: nn.Module | Anatomy) -> list[nn.Parameter]:
    """The trainable parameters of a model, in its order.

    Raises:
        ValueError: If there is none.
    """
    parameters = [p for p in Anatomy.module_of(model).parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model has requires_grad=True: no step moves it")
    return parameters


class Access:
    """A model, its trainable parameters, and its Anatomy where it has one.

    Args:
        model: A causal LM of transformers, or its Anatomy, that `check_whole` has let in.
        probe: An example to try a push on.

    Attributes:
        model: The module.
        parameters: Its trainable parameters; gradients of them are flat, one after the other.
        unavailable: Reason why the model cannot be pushed through, so that token gradients and LBK
            are unavailable, and passes run the model itself, one sequence after the other; empty if
            it can.
        shards: How the parameters are divided among processes, by FSDP2.

    Raises:
        UnsupportedModelError: If trainable weights are split in several ways, or some are whole.
        ValueError: If no parameter is trainable, or two of them share memory.
        UnrepeatableModelError: If the model's logits change from one pass to the next.
    """

    def __init__(self, model: nn.Module | Anatomy, probe: Example):
        self.model: nn.Module = Anatomy.module_of(model)
        self.parameters = trainable_parameters(self.model)
        self._own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        check_separate(self.model)
        self.shards = Shards.of(self._own)
        self.unavailable = ""
        self._anatomy: Anatomy | None = None
        if is_sharded(self.model):
            self.unavailable = (
                "its weights are split over processes (FSDP 2), which make every pass together; "
                "save the model and diagnose the saved one for tokens and LBK"
            )
            return
        try:
            self._anatomy = Anatomy.of(model)
            still = {n: p.new_zeros(()).expand(p.shape) for n, p in self.anatomy.trainable.items()}
            log_prob_shifts(self.anatomy.trace(probe), [still])
        except UnrepeatableModelError:
            raise
        except (DisagreementError, UnsupportedModelError) as error:
            with evaluating(self.model):
                check_repeatable(lambda: own_response(self.model, probe).logits)
            self._anatomy, self.unavailable = None, str(error)

    @property
    def size(self) -> int:
        """Number of trainable values, P."""
        return sum(p.numel() for p in self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the first trainable parameter is."""
        return self.parameters[0].device

    @property
    def named(self) -> dict[str, Tensor]:
        """Name → trainable parameter, in the order of `parameters`."""
        if self._anatomy is not None:
            return dict(self._anatomy.trainable)
        return dict(self._own)

    @property
    def looked_up(self) -> set[str]:
        """Parameters whose gradients may be given by rows: embeddings, and the head's weight."""
        if self._anatomy is None:
            return set()
        used = {n for n, entry in self._anatomy.ledger.items() if "embedding" in entry.ops}
        head = self._anatomy.head_weight
        return used if head is None else used | {head}

    @property
    def anatomy(self) -> Anatomy:
        """The Anatomy.

        Raises:
            UnsupportedModelError: If the model has none; the message says why.
        """
        if self._anatomy is None:
            raise UnsupportedModelError(self.unavailable)
        return self._anatomy

    def reference_log_probs(
        self, reference: Reference, examples: Sequence[Example], ranks: Ranks = ALONE
    ) -> Tensor:
        """Log π_ref of N chosen, then N rejected responses, (2, N) float64, nats.

        The processes divide the pairs.
        """
        n = len(examples) // 2
        mine = ranks.share(range(n))
        part = [examples[side * n + i] for side in range(2) for i in mine]
        whole = torch.zeros(2, n, dtype=torch.float64)
        if part:
            whole[:, mine] = self._reference_log_probs(reference, part)
        ranks.add_up(whole)
        return whole

    def _reference_log_probs(self, reference: Reference, examples: Sequence[Example]) -> Tensor:
        if self._anatomy is not None or isinstance(reference, Anatomy):
            return reference_log_probs(reference, self.anatomy, examples)
        policy = reference if isinstance(reference, nn.Module) else self.model
        with contextlib.ExitStack() as stack:
            if isinstance(reference, str):
                stack.enter_context(adapters_switched(self.model, reference))
            stack.enter_context(evaluating(policy))
            stack.enter_context(torch.no_grad())
            values = [float(own_response(policy, e).log_probs.sum()) for e in examples]
        reshard(policy)
        return torch.tensor(values, dtype=torch.float64).view(2, -1)

    def own_gradient(self, value: Tensor) -> Mapping[str, Tensor]:
        """The gradient of a scalar of the model's own pass; split where parameters are.

        Where parameters are split, all processes have the same scalar, and call this.
        """
        if is_sharded(self.model):
            return gradient_in_place(value, self.model, self._own)
        return gradient_of(value, self.named)

    def gradient(self, example: Example) -> Tensor:
        """∇θ log π(y | x), (P,) float32 on the host."""
        return flat_gradient(own_response(self.model, example).log_probs.sum(), self.parameters)

    def push(self, example: Example, directions: Sequence[Tensor]) -> tuple[Trace, Tensor]:
        """Change of log π of the whole vocabulary along D flat directions.

        Returns:
            The trace of the example, and (D, M, V) nats per unit of each direction.
        """
        trace = self.anatomy.trace(example)
        named = [unflatten(flat, self.anatomy.trainable) for flat in directions]
        return trace, log_prob_shifts(trace, named)
