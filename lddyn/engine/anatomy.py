"""A causal language model divided into its parts: embedding, blocks, norm, head.

No architecture is assumed. The boundaries of the parts are found in one recorded forward pass:

    front    token ids -> input of the first block             (embeddings, positions, their norms)
    block i  input of block i -> input of block i + 1          (one decoder layer)
    tail     output of the last block -> input of the head      (final norm, projections)
    head     z = post(W h + b)                                  (closed form; post is elementwise)

A *segment* (front, block or tail) is replayed from its stored input with gradients enabled, while a
`Watch` intercepts every operation that uses a trainable parameter. Products such as y = x Wᵀ become
*taps*: pairs (activations x, gradient edge of y), from which every gradient of W is a sum of outer
products. Any other use of a parameter is *direct*: autograd differentiates with respect to the
parameter itself. The ledger records each use. A use outside of all segments raises an error.

A model whose blocks pass more than a hidden state to each other (keys and values that blocks
share, several streams, blocks that run twice) is one segment, "model": it is as exact, and needs
the memory of all blocks at once. `Anatomy.joined` says why.

    skeleton    the model's parts, and its forward pass with some of them replaced
    recognise   norms, activations and rotary embeddings in closed form
    ledger      the watch over parameters
    replay      segments computed again, with gradients
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lddyn.data.example import Example
from lddyn.engine import replay
from lddyn.engine.blocks import Call, SeamError, is_slice, join_hidden, split_hidden
from lddyn.engine.door import check_repeatable, foreign_forward, unwrapped
from lddyn.engine.guard import undisturbed
from lddyn.engine.ledger import HEAD, POST, TAIL, WHOLE, Watch
from lddyn.engine.realised import realised_log_probs
from lddyn.engine.skeleton import Skeleton, beside, first_stream
from lddyn.engine.streamed import present
from lddyn.engine.trace import Batch, Replay, Trace
from lddyn.engine.trial import OWN_ATTENTION, Trial, fallbacks
from lddyn.engine.turns import turn
from lddyn.errors import NonFiniteError, UnsupportedModelError

_EXTENDS = Trial("a prefix sees the angles and masks of the whole sequence")


class Anatomy(Skeleton):
    """A Hugging Face causal LM opened at its seams, with the ledger of its trainable parameters.

    Args:
        model: Any causal LM of transformers (or a LoRA-type peft model around one). Only
            parameters with requires_grad=True are part of the kernel.
        attention: "lddyn" (this library's attention where the model lets it be chosen, the
            model's own eager code elsewhere) or "eager".
        allow_frozen: Accept a model without trainable parameters, for forward passes only.

    Raises:
        ValueError: If attention is none of the two.
        UnsupportedModelError: If no stack of blocks, head or embedding can be found, or if a
            trainable parameter is used where no segment can see it.

    After every call the model is as it was before: modes, attention and expert implementation,
    requires_grad, gradients and random state, also after an exception. Two threads may analyse two
    models at a time; analyses of one model take turns.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> anatomy = lddyn.Anatomy(transformers.LlamaForCausalLM(config))
        >>> anatomy.segments
        ['front', 'block 0', 'block 1', 'tail']
        >>> trace = anatomy.trace(lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5]))
        >>> anatomy.ledger["model.layers.0.mlp.up_proj.weight"].rule
        'factored'
    """

    def __init__(self, model: nn.Module, attention: str = "lddyn", allow_frozen: bool = False):
        if attention not in ("lddyn", "eager"):
            raise ValueError(f"attention must be 'lddyn' or 'eager', got {attention!r}")
        with turn(model):
            super().__init__(model, attention, allow_frozen)
        self._logits_checked = False
        self.checked: set[str] = set()  # what `backward_check` has found right
        self._post_is_identity: bool | None = None  # None: not known to be elementwise yet

    @classmethod
    def of(cls, model: nn.Module | Anatomy, *, allow_frozen: bool = False) -> Anatomy:
        """The Anatomy of a model: an Anatomy is returned as it is, a module is opened.

        Every public function that takes a model calls this first, so that a caller who asks
        several questions opens the model once, and chooses its attention there.

        Args:
            model: A causal LM of transformers, or an Anatomy.
            allow_frozen: As in `Anatomy`, for a module that is opened here.

        Raises:
            UnsupportedModelError: If a module cannot be opened.
        """
        return model if isinstance(model, Anatomy) else cls(model, allow_frozen=allow_frozen)

    @staticmethod
    def module_of(model: nn.Module | Anatomy) -> nn.Module:
        """The module of a model, without the wrappers of trainers, for plain passes."""
        return model.model if isinstance(model, Anatomy) else unwrapped(model)

    def inherit(self, original: Anatomy) -> None:
        """Takes over what trials found out about a model of which this is a copy.

        Only what depends on the model's code: its values may differ.
        """
        if self.attention == original.attention:
            self._logits_checked = original._logits_checked
            self.keeps_attention = original.keeps_attention
        self._post_is_identity = original._post_is_identity
        own = dict(self.base.named_modules())
        pairs = ((m, own.get(name)) for name, m in original.base.named_modules())
        copies = {old: new for old, new in pairs if new is not None and type(new) is type(old)}
        self.recogniser.inherit(original.recogniser, copies)

    def check_limits(self, example: Example) -> None:
        """Raises an ExampleError if the model cannot read an example."""
        rows = self.base.get_input_embeddings().weight.shape[0]
        example.check_model_limits(rows, self.max_positions)

    # ----- tracing

    @undisturbed
    def trace(self, example: Example) -> Trace:
        """One forward pass that stores the input of every block and extends the ledger.

        Raises:
            ValueError: If a token id is outside the vocabulary or the sequence too long.
            NonFiniteError: If a weight or logit is NaN or infinite.
            UnsupportedModelError: If the seams do not fit, or a parameter cannot be placed.

        Cost: one forward pass; T d floats per block.
        """
        self.check_limits(example)
        if not self.joined:
            try:
                return self._trace(example)
            except SeamError as error:
                self.join(str(error))
        return self._trace(example)

    def _trace(self, example: Example) -> Trace:
        ids = torch.tensor([example.ids], device=self.device)
        positions = torch.tensor(list(example.positions), device=self.device)
        inputs: list[Tensor] = []
        calls: list[Call] = []
        outputs: list[Tensor] = []
        captured: list[Tensor] = []
        watch = Watch(self, tapping=False)
        if self.joined:
            watch.segment = WHOLE

        def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
            x, args, kwargs = split_hidden(args, kwargs)
            if i != len(inputs):
                raise SeamError(f"block {i} ran out of order (call {len(inputs)})")
            if outputs and outputs[-1] is not x and not torch.equal(outputs[-1], x):
                raise SeamError(
                    f"the input of block {i} is not the output of block {i - 1}: the model does "
                    "something between its blocks that lddyn cannot replay"
                )
            inputs.append(x.detach())
            calls.append((args, kwargs))
            watch.segment = f"block {i}"
            result = original(*join_hidden(x, args), **kwargs)
            watch.segment = TAIL
            self.tuples[i] = len(result) if isinstance(result, tuple | list) else 0
            outputs.append(result[0] if self.tuples[i] else result)
            return result

        def head(h: Tensor) -> Tensor:
            own = self.head.widen(first_stream(h.detach()))
            watch.segment = POST
            with watch.paused():
                captured.append(own.reshape(-1, own.shape[-1])[positions])
            return self.no_logits(h)

        with self.analysis(), torch.no_grad():
            with watch, self.patched(block, head):
                self.run(ids)
            if len(captured) != 1:
                raise UnsupportedModelError(
                    f"{type(self.base).__name__} ran its head {len(captured)} times in one forward "
                    f"pass; expected once{foreign_forward(self.base)}"
                )
            if len(inputs) != len(self.blocks):
                raise SeamError(
                    f"{type(self.base).__name__} ran {len(inputs)} of {len(self.blocks)} blocks"
                )
            if outputs:
                inputs.append(outputs[-1].detach())
            for name in (self.head_weight, self.head_bias):
                if name is not None:
                    self.ledger[name].ops.add("linear")
                    self.ledger[name].segments.add(HEAD)
            self._check_placed()
            hidden = captured[0]
            logits, slope = self.head_logits(hidden)
        trace = Trace(
            self,
            example,
            ids,
            positions,
            torch.tensor(list(example.targets), device=self.device),
            inputs,
            hidden,
            logits,
            slope,
            watch.work,
            {ids.shape[1]: calls},
        )
        if not bool(torch.isfinite(logits).all()):
            self._explain_non_finite(trace)
        if not self._logits_checked:
            difference, limit = self._attention_difference(trace)
            if not difference <= limit:
                with self.analysis(own_attention=False):
                    check_repeatable(lambda: self._selected_logits(trace.ids, trace.positions))
                if not self.keeps_attention and self.own_attention == "sdpa":
                    self.keeps_attention = True
                    return self._trace(example)
                raise UnsupportedModelError(
                    f"the logits differ by {difference:.1e} (limit {limit:g}) from those of the "
                    "model's own attention on a sequence with another last token: the model is not "
                    "causal, its attention is not one that lddyn knows (try attention='eager'), or "
                    "an adapter acts outside of the model's own layers"
                )
            self._logits_checked = True
        return trace

    def _attention_difference(self, trace: Trace) -> tuple[float, float]:
        """How far the logits are from the model's own attention with another last token; a limit.

        Tells a model that is not causal, or whose attention takes arguments that ours ignores. The
        length stays, because rotary embeddings may depend on it.
        """
        ids = trace.ids.clone()
        others = ids[ids != ids[0, -1]]
        ids[0, -1] = others[0] if len(others) else (ids[0, -1] + 1) % self.vocabulary
        with self.analysis(own_attention=False), torch.no_grad():
            own = self._selected_logits(ids, trace.positions, self.model)
        own, ours = (x - x.mean(-1, keepdim=True) for x in (own.to(trace.logits), trace.logits))
        difference = float((own - ours).norm() / ours.norm().clamp(min=1e-30))
        if not math.isfinite(difference):  # squares of large logits overflow
            own, ours = own.double(), ours.double()
            difference = float((own - ours).norm() / ours.norm())
        return difference, OWN_ATTENTION.of(trace.hidden.dtype)

    def _check_placed(self) -> None:
        for entry in self.ledger.values():
            if POST in entry.segments:
                raise UnsupportedModelError(
                    f"{entry.parameter} is used after the head by {sorted(entry.ops)}: freeze it "
                    "(requires_grad=False) or move it before the head"
                )
            if HEAD in entry.segments and entry.direct:
                raise UnsupportedModelError(
                    f"{entry.parameter} is the head's weight and is also used by "
                    f"{sorted(entry.ops - {'linear'})}, which has no factor rule"
                )

    def _explain_non_finite(self, trace: Trace) -> None:
        saved = getattr(self.base, "name_or_path", "")
        model = f"the model {saved}" if saved else "the model"
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(present(parameter)).all()):
                count = int((~torch.isfinite(parameter)).sum())
                raise NonFiniteError(
                    f"parameter {name} has {count} non-finite of {parameter.numel()} values: "
                    f"{model} is broken; go back to an earlier checkpoint"
                )
        for i, x in enumerate(trace.inputs):
            if not bool(torch.isfinite(x).all()):
                where = f"the input of block {i}" if i < len(self.blocks) else "the last output"
                raise NonFiniteError(
                    f"{where} is not finite on example {trace.example.name!r} though all weights "
                    f"are: the forward pass overflows in {x.dtype}; use a wider dtype"
                )
        row = int((~torch.isfinite(trace.logits)).any(dim=1).nonzero()[0, 0])
        raise NonFiniteError(
            f"the logits of response token {row} are not finite on example "
            f"{trace.example.name!r}: use a wider dtype"
        )

    # ----- the head

    def head_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (M, V) in at least float32 and the elementwise slope of what follows the head."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        raw = self.head.project(hidden.to(precise))
        if self.head.bias is not None:
            raw = raw + self.head.bias.to(precise)
        if self._post_is_identity:
            return raw, None
        logits, slope = self._post(raw)
        if self._post_is_identity is None and bool(torch.isfinite(logits).all()):
            probe = raw[:1].clone()
            probe[:, ::2] += 0.5
            moved = self._post(probe)[0]
            if not torch.equal(moved[:, 1::2], logits[:1, 1::2]):
                raise UnsupportedModelError(
                    "what the model does to its logits after the head mixes tokens of the "
                    "vocabulary; lddyn handles elementwise functions (scaling, soft-capping)"
                )
            far = torch.linspace(-1e4, 1e4, raw.shape[1]).to(raw)[None]
            self._post_is_identity = slope is None and torch.equal(self._post(far)[0], far)
        return logits, slope

    def _post(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = raw.detach().requires_grad_(True)
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)

        def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
            return self.output(i, split_hidden(args, kwargs)[0])

        with torch.enable_grad(), self.patched(block, lambda h: beside(h, raw[None])):
            logits = self.run(ids).logits[0]
            if logits is raw or (logits.shape == raw.shape and torch.equal(logits, raw)):
                return raw.detach(), None
            (slope,) = torch.autograd.grad(logits.sum(), raw)
        return logits.detach().to(raw.dtype), slope

    # ----- plain passes, with their graph

    def response_logits(self, example: Example) -> Tensor:
        """Logits (M, V) by the model's own forward, with its graph, in at least float32."""
        ids = torch.tensor([example.ids], device=self.device)
        return self._selected_logits(ids, torch.tensor(list(example.positions), device=self.device))

    def response_hidden(self, example: Example) -> Tensor:
        """The head's inputs (M, d) by the model's own forward, with their graph."""
        captured: list[Tensor] = []
        positions = torch.tensor(list(example.positions), device=self.device)

        def head(h: Tensor) -> Tensor:
            own = self.head.widen(first_stream(h))
            captured.append(own.reshape(-1, own.shape[-1])[positions])
            return self.no_logits(h)

        with self.patched(self.whole, head):
            self.run(torch.tensor([example.ids], device=self.device))
        return captured[0]

    def response_log_probs(self, example: Example) -> Tensor:
        """Log π(y_m) (M,) by the model's own forward, with its graph; in nats."""
        logits = self.response_logits(example)
        return realised_log_probs(logits, torch.tensor(example.targets, device=logits.device))

    def _selected_logits(
        self, ids: Tensor, positions: Tensor, model: nn.Module | None = None
    ) -> Tensor:
        """Logits of some positions by the model's own forward; `model`: with its adapters'."""
        original = self.head.module.forward

        def head(h: Tensor) -> Any:
            own = first_stream(h)
            return beside(h, original(own.reshape(-1, own.shape[-1])[positions][None]))

        with self.patched(self.whole, head):
            logits: Tensor = self.run(ids, model).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    # ----- replays

    def calls(self, trace: Trace | Batch, length: int) -> list[Call]:
        """Masks, rotary angles and other arguments of every block for a prefix of the sequence."""
        return replay.calls(self, trace, length)

    def prefix(self, trace: Trace, length: int) -> int:
        """How many tokens to replay for cotangents that reach the first `length` tokens.

        As many; but the whole sequence where the blocks' arguments depend on its length (rotary
        embeddings that rescale), so that a prefix would not be what the forward pass saw.
        """
        if self.joined:
            return trace.length
        with self.analysis():
            whole = trace.calls[trace.length]
            short = self.calls(trace, length)
        return length if is_slice(short, whole) else trace.length

    def extends(self, short: int, long: int) -> bool:
        """Whether the first `short` tokens have the same arguments in a sequence of `long`."""

        def check() -> bool:
            ids, lists = torch.zeros(1, long, dtype=torch.long, device=self.device), []
            for length in (short, long):
                with self.analysis():
                    lists.append(replay.arguments(self, ids[:, :length]))
            return is_slice(*lists)

        return not self.joined and _EXTENDS.passes(self, (short, long), check)

    def batch(self, ids: Tensor, apart: bool, keep: bool) -> Batch:
        """One forward pass over sequences (B, T) that stores what replays need.

        Call inside `analysis()`, after a `trace`.

        Args:
            ids: Token ids.
            apart: As in `replay`.
            keep: Keep the autograd graph of every segment, detached from the other segments. A
                later pull-back then needs no replay, and its result is the same to the bit.

        Cost: one forward pass; T d floats per block and sequence, or with `keep` all that a
        backward pass needs.
        """
        return replay.forward_batch(self, ids, apart, keep)

    def replay(
        self, trace: Trace | Batch, segment: int, length: int, rows: Tensor | None = None
    ) -> Replay:
        """Recomputes one segment on a prefix with gradients on. Call inside `analysis()`.

        Args:
            trace: The stored forward pass. Where a batch's sequences are `apart`, gains are
                differentiated at the outputs of their norms instead of directly, so that each
                sequence has its own.
            segment: 0 is the front, 1 … B the blocks, B + 1 the tail.
            length: Tokens of the prefix.
            rows: Run a block or the tail on these positions alone, with gains as above (see
                `rowwise`).

        Returns:
            A Replay; its output has the shape of a hidden state, (1, length, d) or (1, rows, d).
            The tail's output is the head's input at every position.
        """
        return replay.replay(self, trace, segment, length, rows)

    # ----- for people

    def fallbacks(self) -> dict[str, str]:
        """Faster ways that this model did not fit so far: what was tried -> why it failed."""
        return fallbacks(self) | fallbacks(self.recogniser.owner) | fallbacks(self.model)

    def ledger_table(self) -> list[dict[str, Any]]:
        """One row per trainable parameter: name, shape, rule, operations, segments."""
        return [
            {
                "parameter": e.parameter,
                "shape": list(e.shape),
                "rule": e.rule,
                "ops": sorted(e.ops),
                "segments": sorted(e.segments),
            }
            for e in self.ledger.values()
        ]
