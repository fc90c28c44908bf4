"""A causal language model's parts, and its own forward pass with some of them replaced.

The skeleton is what is left of a model when blocks and head are taken out: embeddings, masks,
rotary angles, norms. The engine runs the model's own forward with blocks and head replaced, so that
it needs no code for any architecture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lddyn.data.context import position_limit, rope_types
from lddyn.engine import door, guard
from lddyn.engine.blocks import RunBlock, bind_block, find_blocks
from lddyn.engine.head import find_head
from lddyn.engine.ledger import FRONT, HEAD, TAIL, WHOLE, LedgerEntry
from lddyn.engine.recognise import Recogniser
from lddyn.engine.streamed import is_streamed
from lddyn.engine.turns import switching
from lddyn.engine.undo import Undo, shielded
from lddyn.errors import UnsupportedModelError


class Skeleton:
    """The parts of a model, the ledger of its parameters, and forward passes with replaced parts.

    Attributes:
        model: The model as it was given, without torch.compile's and trainers' wrappers.
        base: The transformers model inside of adapters.
        head: Its output layer, and what adapters add to it.
        blocks: Its decoder layers; none where the model is one segment.
        own_attention: The attention that its config names.
        keeps_attention: Whether it attends by that (SDPA), from which its eager code differs.
        joined: Why the model is one segment; empty where it is replayed block by block.
        streamed: Whether some weights are in memory only while their block runs.
        recomputes: Whether plain passes run blocks again on the way back: their graphs would hold
            streamed weights, or more than memory allows.
        attention: "lddyn" or "eager".
        trainable: Parameters with requires_grad=True, by canonical name.
        ledger: How each of them is accounted for.
        direct: Those that are differentiated directly, not as factors.
    """

    def __init__(self, model: nn.Module, attention: str, allow_frozen: bool):
        model = door.unwrapped(model)
        self.model, self.attention = model, attention
        base: Any = door.inside_adapters(model)
        if not hasattr(base, "get_output_embeddings") or not hasattr(base, "config"):
            raise UnsupportedModelError(
                f"expected a transformers causal LM (with get_output_embeddings and config), got "
                f"{type(model).__name__}: load it with AutoModelForCausalLM"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                "prompt-learning adapters (prompt, prefix or p-tuning) add virtual tokens that no "
                "Example holds; LoRA-type adapters are supported"
            )
        if any(
            getattr(adapter, "alora_invocation_tokens", None)
            for adapter in getattr(model, "peft_config", {}).values()
        ):
            raise UnsupportedModelError(
                "an activated LoRA (alora_invocation_tokens) acts on the tokens after its "
                "invocation alone, which peft finds in the whole sequence: a part of the model "
                "cannot be run again by itself; an ordinary LoRA can be analysed"
            )
        door.check_whole(model)
        door.check_unmerged(model)
        door.check_separate(model)
        self.base, self.head = base, find_head(base)
        self.blocks, self.joined = find_blocks(base), ""
        self.scales_with_length = "dynamic" in rope_types(base.config)
        self.own_attention = getattr(base.config, "_attn_implementation", None)
        self.keeps_attention = False
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable and not allow_frozen:
            raise UnsupportedModelError(
                "no parameter has requires_grad=True: nothing can be updated, K is zero"
            )
        self.trainable_by_id = {id(p): (n, p) for n, p in self.trainable.items()}
        self.ledger = {n: LedgerEntry(n, tuple(p.shape)) for n, p in self.trainable.items()}
        self.direct: set[str] = set()
        self.head_weight = self._name_of(self.head.weight)
        self.head_bias = self._name_of(self.head.bias)
        self.streamed = any(map(is_streamed, model.parameters()))
        self.recomputes = self.streamed
        self.recogniser = Recogniser({key: name for key, (name, _) in self.trainable_by_id.items()})
        # Length of the tuple that block i returns; 0 where it returns a tensor. Known by a trace.
        self.tuples = [0] * len(self.blocks)
        if not self.blocks:
            self.join(f"{type(base).__name__} has no nn.ModuleList of blocks")
        elif self.blocks[0]._forward_pre_hooks or self.blocks[-1]._forward_hooks:
            # Elsewhere a hook that changes a hidden state is seen: one block's output is not the
            # next one's input.
            self.join(
                f"the first or last block ({type(self.blocks[0]).__name__}) has forward hooks, "
                "which a replay of the block would run at the wrong place"
            )

    def join(self, reason: str) -> None:
        """Makes one segment of the whole model, which is always right and needs more memory.

        Args:
            reason: Why the model cannot be replayed block by block.

        Raises:
            UnsupportedModelError: If weights are streamed: they are in memory a block at a time.
        """
        if self.streamed:
            raise UnsupportedModelError(
                f"streamed weights need a model that can be replayed block by block: {reason}"
            )
        self.joined, self.blocks, self.tuples = reason, [], []
        for entry in self.ledger.values():
            head = entry.segments & {HEAD}
            entry.segments = head | ({WHOLE} if entry.segments - head else set())

    def _name_of(self, parameter: Tensor | None) -> str | None:
        return self.trainable_by_id.get(id(parameter), (None,))[0]

    # ----- facts

    @property
    def segments(self) -> list[str]:
        """Segment names from input to output, the head excluded."""
        if self.joined:
            return [WHOLE]
        return [FRONT, *(f"block {i}" for i in range(len(self.blocks))), TAIL]

    @property
    def device(self) -> torch.device:
        """The head's device, which is that of ids and cotangents too."""
        return self.head.device

    @property
    def vocabulary(self) -> int:
        """V, rows of the head."""
        return self.head.vocabulary

    @property
    def tied(self) -> bool:
        """Whether the head's weight is also used by another segment."""
        return self.head_weight is not None and bool(
            self.ledger[self.head_weight].segments - {HEAD}
        )

    def shared(self) -> list[str]:
        """Parameters that more than one segment uses (a head tied to the embedding included)."""
        return [e.parameter for e in self.ledger.values() if len(e.segments) > 1]

    def lowest_segment(self) -> int:
        """Index of the first segment that holds a trainable parameter: pullbacks stop there."""
        names = self.segments
        used = {s for e in self.ledger.values() for s in e.segments if s in names}
        return min((names.index(s) for s in used), default=len(names))

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model was built for, in tokens; None if its config has no limit."""
        return position_limit(self.base.config)

    # ----- changing the model, and changing it back

    @contextlib.contextmanager
    @shielded
    def analysis(self, own_attention: bool = True) -> Iterator[None]:
        """Evaluation mode, lddyn's attention, no weight gradients; everything restored on exit.

        Threads that analyse the same model take turns.

        Args:
            own_attention: Use `self.attention`; False: the one that the model's config names.
        """
        with switching(self.model) as undo:
            guard.register_attention()
            modules = list(self.model.modules())
            guard.freeze(modules, undo)
            guard.keep_buffers(modules, undo)
            attention = self.attention
            if attention == "lddyn" and not getattr(
                self.base, "_supports_attention_backend", False
            ):
                attention = "eager"
            names = {**guard.QUIET, guard.EXPERTS: "eager"}
            own = getattr(self.base.config, "_attn_implementation", None)
            if own_attention and not self.keeps_attention:
                names[guard.ATTENTION] = attention
            elif own != self.own_attention is not None:  # within another analysis
                names[guard.ATTENTION] = self.own_attention
            guard.implement(modules, names, undo)
            guard.evaluate(modules, undo)
            guard.strip_forwards(self.model, undo)
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                guard.no_autocast(self.device),
                guard.eager_code(modules),
            ):
                yield

    @contextlib.contextmanager
    @shielded
    def differentiating(self, recompute: bool = False) -> Iterator[None]:
        """Within an analysis: every trainable parameter requires its gradient.

        Args:
            recompute: Whether plain passes run every block again on the way back, in the place of
                keeping its graph.
        """
        with Undo() as undo:
            guard.require(self.trainable.values(), undo)
            # A mode of torch functions (`true_float64`) does not reach a block that runs again.
            recompute &= not torch._C._len_torch_function_stack()
            undo.set(self, "recomputes", recompute or self.recomputes)
            yield

    @contextlib.contextmanager
    @shielded
    def untied(self, wanted: bool = True) -> Iterator[Tensor | None]:
        """Within `differentiating`: the embedding reads a leaf of its own with the head's memory.

        Autograd sums the gradients of a weight's uses beside them; those of two leaves can be taken
        one after the other.

        Yields:
            The embedding's leaf; None where it is not tied to a trainable head, or not wanted.
        """
        table: Any = self.base.get_input_embeddings()
        own = self.head.weight
        tied = own is not None and getattr(table, "weight", None) is own
        if not (wanted and tied and self.head_weight) or own is None:
            yield None
            return
        with Undo() as undo:
            leaf = nn.Parameter(own.detach())
            undo.add(functools.partial(table._parameters.__setitem__, "weight", own))
            table._parameters["weight"] = leaf
            yield leaf

    # ----- forward passes with replaced parts

    @contextlib.contextmanager
    @shielded
    def patched(self, block: RunBlock, head: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replaces every block's forward by block(i, original, args, kwargs), and the head's."""
        with Undo() as undo:
            for i, module in enumerate(self.blocks):
                undo.set(module, "forward", bind_block(block, i, module.forward))
            undo.set(self.head.module, "forward", head)
            yield

    def run(self, ids: Tensor, model: nn.Module | None = None) -> Any:
        """The model's own forward pass on token ids (B, T); `model`: one that is around it."""
        if self.scales_with_length:
            guard.reset_scaling(self.base)
        try:
            return (model or self.base)(input_ids=ids, use_cache=False, return_dict=True)
        except RuntimeError as error:
            where = door.misplaced(self.base, self.device) if "same device" in str(error) else ""
            if where:
                raise UnsupportedModelError(where) from error
            raise

    def output(self, i: int, x: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """A hidden state in the form in which block i returns its output."""
        return (x, *[None] * (self.tuples[i] - 1)) if self.tuples[i] else x

    def whole(self, i: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A block as part of a plain pass; one that `recomputes` is run again on the way back."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return forward(*args, **kwargs)

    def no_logits(self, hidden: Tensor) -> Tensor:
        """Zeros (1, 1, V) that stand for the head's output where nobody reads it."""
        return beside(hidden, hidden.new_zeros(()).expand(1, 1, self.vocabulary))


def first_stream(hidden: Tensor) -> Tensor:
    """The head's inputs (B, T, d), of which some models have several: (B, streams, T, d).

    ProphetNet predicts the next tokens but one by further streams; logits are those of the first.
    """
    return hidden[:, 0] if hidden.dim() == 4 else hidden


def beside(hidden: Tensor, logits: Tensor) -> Tensor:
    """The head's output (B, M, V) with the axis of streams that its input has."""
    return logits[:, None] if hidden.dim() == 4 else logits
