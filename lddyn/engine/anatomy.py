"""A causal language model opened at its seams: embed | blocks | norm | head.

Nothing here knows an architecture. The seams are found by watching one forward pass:

    front    token ids -> input of the first block             (embeddings, positions, their norms)
    block i  input of block i -> input of block i + 1          (one decoder layer)
    tail     output of the last block -> input of the head      (final norm, projections)
    head     z = post(W h + b)                                  (closed form; post is elementwise)

A *segment* (front, block or tail) is replayed from its stored input with gradients switched on
while a `TorchFunctionMode` watches every operation that consumes a trainable parameter. The
product y = x Wᵀ and its relatives become *taps*: the pair (activations x, gradient edge of y) from
which every gradient of W is a sum of outer products. Any other use of a parameter is *direct*: the
parameter is differentiated as a small tensor of its own. The ledger records each use; a parameter
that is used where no segment can see it raises.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from lddyn.data.example import Example
from lddyn.engine import layers
from lddyn.engine.guard import (
    ATTENTION,
    EXPERTS,
    LOCK,
    evaluating,
    implemented_by,
    no_autocast,
    register_attention,
    replaced_attribute,
    undisturbed,
)
from lddyn.engine.head import project
from lddyn.engine.ledger import FRONT, HEAD, POST, TAIL, Gain, LedgerEntry, Watch
from lddyn.engine.recognise import (
    at_rows,
    bind_block,
    check_side_inputs,
    find_blocks,
    is_slice,
    join_hidden,
    split_hidden,
)
from lddyn.engine.streamed import is_streamed, present
from lddyn.engine.trace import Batch, Replay, Trace
from lddyn.errors import NonFiniteError, UnsupportedModelError


class Anatomy:
    """A Hugging Face causal LM opened at its seams, with the ledger of its trainable parameters.

    Args:
        model: Any causal LM of transformers (or a LoRA-type peft model around one). Only
            parameters with requires_grad=True are part of the kernel.
        attention: "lddyn" (this library's attention where the model lets it be chosen, the
            model's own eager code elsewhere) or "eager".
        allow_frozen: Accept a model without trainable parameters, for forward passes only.

    Raises:
        UnsupportedModelError: If no stack of blocks, head or embedding can be found, or if a
            trainable parameter is used where no segment can see it.

    The model is left as it was found: modes, attention and expert implementation, requires_grad,
    gradients and random state, also after an exception.
    """

    def __init__(self, model: nn.Module, attention: str = "lddyn", allow_frozen: bool = False):
        if attention not in ("lddyn", "eager"):
            raise ValueError(f"attention must be 'lddyn' or 'eager', got {attention!r}")
        model = getattr(model, "_orig_mod", model)  # a torch.compile wrapper
        self.model = model
        self.attention = attention
        peft: Any = model
        base = peft.get_base_model() if hasattr(model, "get_base_model") else peft
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
        self.base = base
        self.head: Any = base.get_output_embeddings()
        if self.head is None:
            raise UnsupportedModelError(f"{type(base).__name__} has no output embedding (lm_head)")
        if not isinstance(self.head, nn.Linear):
            raise UnsupportedModelError(
                f"the head must be an nn.Linear, got {type(self.head).__name__}: merge adapters "
                "on lm_head first (lddyn takes the head in closed form)"
            )
        self.blocks = find_blocks(base)
        with LOCK:  # another thread's analysis may have switched gradients off
            self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable and not allow_frozen:
            raise UnsupportedModelError(
                "no parameter has requires_grad=True: nothing can be updated, K is zero"
            )
        self.trainable_by_id = {id(p): (n, p) for n, p in self.trainable.items()}
        self.ledger = {n: LedgerEntry(n, tuple(p.shape)) for n, p in self.trainable.items()}
        self.direct: set[str] = set()
        self.head_weight = self.trainable_by_id.get(id(self.head.weight), (None,))[0]
        self.head_bias = self.trainable_by_id.get(id(self.head.bias), (None,))[0]
        self.streamed = any(map(is_streamed, model.parameters()))
        self._logits_checked = False
        self._post_is_identity: bool | None = None  # known once it is known to be elementwise
        if self.blocks[0]._forward_pre_hooks or self.blocks[-1]._forward_hooks:
            # Elsewhere a hook that changes a hidden state is seen: one block's output is not the
            # next one's input.
            raise UnsupportedModelError(
                f"the first or last block ({type(self.blocks[0]).__name__}) has forward hooks at "
                "the end of the stack, which a replay would run at the wrong place: remove them, "
                "or hook a module inside the block"
            )
        self._tuples = [0] * len(self.blocks)  # length of the tuple block i returns; 0: a tensor
        # What the modules of a block were recognised as, on their first replay.
        self._norms: dict[nn.Module, layers.Norm | None] = {}
        self._activations: dict[nn.Module, bool] = {}
        self._rotary: dict[str, bool] = {}  # by the Python module that defines the function
        self.rowwise: dict[str, bool] = {}  # segments known to act on every position by itself
        self.apart: bool | None = None  # whether the sequences of a batch are known to be
        self._extends: dict[tuple[int, int], bool] = {}  # by both lengths

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

    # ----- facts

    @property
    def segments(self) -> list[str]:
        """Segment names from input to output, the head excluded."""
        return [FRONT, *(f"block {i}" for i in range(len(self.blocks))), TAIL]

    @property
    def device(self) -> torch.device:
        """Where the head lives, and with it ids and cotangents."""
        device: torch.device = self.head.weight.device
        return device

    @property
    def vocabulary(self) -> int:
        """V, rows of the head."""
        return int(self.head.weight.shape[0])

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
        """Longest sequence the model was built for, if it says so."""
        return getattr(self.base.config, "max_position_embeddings", None)

    def check_limits(self, example: Example) -> None:
        """Raises an ExampleError if the model cannot read an example."""
        rows = self.base.get_input_embeddings().weight.shape[0]
        example.check_model_limits(rows, self.max_positions)

    # ----- leaving no trace

    @contextlib.contextmanager
    def analysis(self, own_attention: bool = True) -> Iterator[None]:
        """Evaluation mode, own attention, no weight gradients; everything restored on exit.

        One thread at a time: the model, and functions of its Python module, are changed inside.
        """
        with LOCK:
            yield from self._analysis(own_attention)

    def _analysis(self, own_attention: bool) -> Iterator[None]:
        register_attention()
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        # Some rotary embeddings rewrite their (small) buffers as sequences grow.
        buffers = [
            (m, n, b, b.clone())
            for m in self.model.modules()
            for n, b in m._buffers.items()
            if b is not None and b.numel() <= 1 << 16
        ]
        own = self.attention
        if own == "lddyn" and not getattr(self.base, "_supports_attention_backend", False):
            own = "eager"
        names = {EXPERTS: "eager"} | ({ATTENTION: own} if own_attention else {})
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            with (
                implemented_by(self.model, names),
                evaluating(self.model),
                torch.inference_mode(False),
                torch.enable_grad(),
                no_autocast(self.device),
                torch.compiler.set_stance("force_eager"),  # replays patch what compiled code froze
            ):
                yield
        finally:
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def differentiating(self) -> Iterator[None]:
        """Within an analysis: every trainable parameter requires its gradient."""
        parameters = list(self.trainable.values())
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    # ----- the skeleton: the model's own forward with blocks and head replaced

    @contextlib.contextmanager
    def _patched(
        self, block: Callable[..., Any], head: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        """Replaces every block's forward by block(i, original, args, kwargs), and the head's."""
        modules = [*self.blocks, self.head]
        previous = [m.__dict__.get("forward") for m in modules]
        originals = [m.forward for m in modules]
        try:
            for i, module in enumerate(self.blocks):
                module.forward = bind_block(block, i, originals[i])
            self.head.forward = head
            yield
        finally:
            for module, old in zip(modules, previous, strict=True):
                if old is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = old

    @contextlib.contextmanager
    def _recognised(self, watch: Watch, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Norms, activations and rotary embeddings replaced by their closed forms in `layers`.

        A module is recognised by what it computes: on its first replay its output is compared with
        the closed form, and it stays as it is where they differ.
        """
        with contextlib.ExitStack() as stack:
            for module in modules:
                if module is self.head or list(module.children()):
                    continue
                bind: Any = None
                parameters = list(module.parameters())
                kind = type(module).__module__.split(".")[-1]
                if kind in ("activation", "activations") and not parameters:
                    bind = self._activation(module, module.forward, watch)
                elif all(p.dim() == 1 for p in parameters):
                    bind = self._norm(module, module.forward, watch)
                if bind is not None:
                    stack.enter_context(replaced_attribute(module, "forward", bind))
            for name in {type(m).__module__ for b in self.blocks for m in b.modules()}:
                function = getattr(sys.modules.get(name), "apply_rotary_pos_emb", None)
                if function is not None:
                    bind = self._rotation(name, function)
                    stack.enter_context(
                        replaced_attribute(sys.modules[name], "apply_rotary_pos_emb", bind)
                    )
            yield

    @staticmethod
    def _touched(original: Callable[..., Any], x: Tensor, watch: Watch) -> set[str]:
        """Trainable parameters that a module uses, its own or another's; it may also raise here."""
        before, watch.touched = watch.touched, set()
        taps = len(watch.taps)
        original(x)
        del watch.taps[taps:]
        found, watch.touched = watch.touched, before
        return found

    def _norm(
        self, module: nn.Module, original: Callable[..., Tensor], watch: Watch
    ) -> Callable[..., Tensor]:
        def norm(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(x, Tensor) or x.numel() == 0:
                return original(*args, **kwargs)
            if module not in self._norms:
                touched = self._touched(original, x, watch)
                own = {self.trainable_by_id.get(id(p), ("",))[0] for p in module.parameters()}
                with watch.paused():
                    found = layers.recognise_norm(module, original, x) if touched <= own else None
                self._norms[module] = found
            found = self._norms[module]
            if found is None:
                return original(x)
            now: Any = module  # its parameters may have been replaced
            found = replace(
                found, weight=getattr(now, "weight", None), bias=getattr(now, "bias", None)
            )
            with torch._C.DisableTorchFunction():
                out, normalized = found(x)
                weight, bias = (
                    self.trainable_by_id.get(id(p), (None,))[0] for p in (found.weight, found.bias)
                )
                if out.requires_grad and watch.active:
                    edge = get_gradient_edge(out)
                    watch.gains.append(Gain(weight, bias, normalized, edge))
                return out

        return norm

    def _activation(
        self, module: nn.Module, original: Callable[..., Tensor], watch: Watch
    ) -> Callable[..., Tensor]:
        def activation(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() < 2:
                return original(*args, **kwargs)
            if module not in self._activations:
                touched = self._touched(original, x, watch)
                with watch.paused():
                    self._activations[module] = not touched and layers.is_elementwise(original, x)
            with watch.paused():
                found = layers.activate(original, x) if self._activations[module] else None
            if found is None:
                return original(x)
            with torch._C.DisableTorchFunction():
                out = found.output
            watch.activated[id(out)] = (out, out._version, found)
            return out

        return activation

    def _rotation(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def rotation(*args: Any, **more: Any) -> Any:
            if more or len(args) != 4 or not all(isinstance(x, Tensor) for x in args):
                return original(*args, **more)
            q, k, cos, sin = args
            plain = (
                self._rotary.get(name, True)
                and q.dim() == k.dim() == 4
                and q.shape[0] == k.shape[0]
                and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
                and k.shape[2:] == q.shape[2:]
            )
            # Angles of zero, a lone first token's, tell no convention of pairs from another.
            if not plain or (name not in self._rotary and not bool(sin.any())):
                return original(q, k, cos, sin)
            with torch._C.DisableTorchFunction():
                found = tuple(layers.rotate(x, cos[0], sin[0]) for x in (q, k))
            if name not in self._rotary:
                expected = original(q, k, cos, sin)
                limit = 64 * torch.finfo(q.dtype).eps
                self._rotary[name] = all(
                    bool(((x - y).abs().max() <= limit * y.abs().max()).item())
                    for x, y in zip(found, expected, strict=True)
                )
                if not self._rotary[name]:
                    return expected
            return found

        return rotation

    def _output(self, i: int, x: Tensor) -> Any:
        """X in the shape in which block i returns its output."""
        return (x, *[None] * (self._tuples[i] - 1)) if self._tuples[i] else x

    def _whole(self, i: int, forward: Any, args: Any, kwargs: Any) -> Any:
        """A block as part of a plain pass; a streamed one is run again on the way back."""
        if self.streamed and torch.is_grad_enabled():
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return forward(*args, **kwargs)

    def _run(self, ids: Tensor) -> Any:
        return self.base(input_ids=ids, use_cache=False, return_dict=True)

    def _dummy(self, h: Tensor) -> Tensor:
        return h.new_zeros(()).expand(1, 1, self.vocabulary)

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
        ids = torch.tensor([example.ids], device=self.device)
        positions = torch.tensor(list(example.positions), device=self.device)
        inputs: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []
        captured: list[Tensor] = []
        watch = Watch(self, tapping=False)

        def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
            x, args, kwargs = split_hidden(args, kwargs)
            if i != len(inputs):
                raise UnsupportedModelError(f"block {i} ran out of order (call {len(inputs)})")
            if outputs and outputs[-1] is not x and not torch.equal(outputs[-1], x):
                raise UnsupportedModelError(
                    f"the input of block {i} is not the output of block {i - 1}: the model does "
                    "something between its blocks that lddyn cannot replay"
                )
            inputs.append(x.detach())
            calls.append((args, kwargs))
            watch.segment = f"block {i}"
            result = original(*join_hidden(x, args), **kwargs)
            watch.segment = TAIL
            self._tuples[i] = len(result) if isinstance(result, tuple | list) else 0
            outputs.append(result[0] if self._tuples[i] else result)
            return result

        def head(h: Tensor) -> Tensor:
            watch.segment = POST
            captured.append(h.detach().reshape(-1, h.shape[-1])[positions])
            return self._dummy(h)

        with self.analysis(), torch.no_grad():
            with watch, self._patched(block, head):
                self._run(ids)
            if len(inputs) != len(self.blocks) or len(captured) != 1:
                raise UnsupportedModelError(
                    f"{type(self.base).__name__} ran {len(inputs)} of {len(self.blocks)} blocks "
                    f"and its head {len(captured)} times in one forward pass; expected all and once"
                )
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
            self._check_logits(trace)
            self._logits_checked = True
        return trace

    def _check_logits(self, trace: Trace) -> None:
        """The same logits must come from the model's own attention, without the last token.

        Tells a model that is not causal, or whose attention takes arguments that ours ignores.
        """
        with self.analysis(own_attention=False), torch.no_grad():
            own = self._selected_logits(trace.ids[:, :-1], trace.positions)
        own, ours = (x - x.mean(-1, keepdim=True) for x in (own.to(trace.logits), trace.logits))
        difference = float((own - ours).norm() / ours.norm().clamp(min=1e-30))
        limit = 1e-3 if trace.hidden.element_size() >= 4 else 0.2
        if not difference <= limit:
            raise UnsupportedModelError(
                f"the logits differ by {difference:.1e} (limit {limit:g}) from those of the "
                "model's own attention on the sequence without its last token: the model is not "
                "causal, or its attention is not one that lddyn knows (try attention='eager')"
            )

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
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(present(parameter)).all()):
                count = int((~torch.isfinite(parameter)).sum())
                raise NonFiniteError(
                    f"parameter {name} has {count} non-finite of {parameter.numel()} values: the "
                    "model is broken; go back to an earlier checkpoint"
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

    def head_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (M, V) in at least float32 and the elementwise slope of what follows the head."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        raw = project(hidden.to(precise), self.head.weight)
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
            return self._output(i, split_hidden(args, kwargs)[0])

        with torch.enable_grad(), self._patched(block, lambda h: raw[None]):
            logits = self._run(ids).logits[0]
            if logits is raw or (logits.shape == raw.shape and torch.equal(logits, raw)):
                return raw.detach(), None
            (slope,) = torch.autograd.grad(logits.sum(), raw)
        return logits.detach().to(raw.dtype), slope

    def response_logits(self, example: Example) -> Tensor:
        """Logits (M, V) by the model's own forward, with its graph, in at least float32."""
        ids = torch.tensor([example.ids], device=self.device)
        return self._selected_logits(ids, torch.tensor(list(example.positions), device=self.device))

    def response_hidden(self, example: Example) -> Tensor:
        """The head's inputs (M, d) by the model's own forward, with their graph."""
        captured: list[Tensor] = []
        positions = torch.tensor(list(example.positions), device=self.device)

        def head(h: Tensor) -> Tensor:
            captured.append(h.reshape(-1, h.shape[-1])[positions])
            return self._dummy(h)

        with self._patched(self._whole, head):
            self._run(torch.tensor([example.ids], device=self.device))
        return captured[0]

    def response_log_probs(self, example: Example) -> Tensor:
        """Log π(y_m) (M,) by the model's own forward, with its graph; in nats."""
        logits = self.response_logits(example)
        targets = torch.tensor(list(example.targets), device=logits.device)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def _selected_logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        original = self.head.forward

        def head(h: Tensor) -> Any:
            return original(h.reshape(-1, h.shape[-1])[positions][None])

        with self._patched(self._whole, head):
            logits: Tensor = self._run(ids).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    # ----- replays

    def calls(
        self, trace: Trace | Batch, length: int
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Masks, rotary angles and other arguments of every block for a prefix of the sequence."""
        if length not in trace.calls:
            trace.calls[length] = self._arguments(trace.ids[:, :length])
        return trace.calls[length]

    def _arguments(self, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
            x, args, kwargs = split_hidden(args, kwargs)
            found.append((args, kwargs))
            return self._output(i, x)

        with torch.no_grad(), self._patched(block, self._dummy):
            self._run(ids)
        return found

    def prefix(self, trace: Trace, length: int) -> int:
        """How many tokens to replay for cotangents that reach `length` tokens: as many.

        The whole sequence where the blocks' other arguments depend on the length (rotary embeddings
        that rescale), so that a prefix would not be what the forward pass saw.
        """
        with self.analysis():
            whole = trace.calls[trace.length]
            short = self.calls(trace, length)
        return length if is_slice(short, whole) else trace.length

    def extends(self, short: int, long: int) -> bool:
        """Whether tokens see nothing of how many follow them: as `prefix`, for any sequence."""
        if (short, long) not in self._extends:
            found, ids = [], torch.zeros(1, long, dtype=torch.long, device=self.device)
            for length in (short, long):
                with self.analysis():
                    found.append(self._arguments(ids[:, :length]))
            self._extends[short, long] = is_slice(*found)
        return self._extends[short, long]

    def batch(self, ids: Tensor, apart: bool, keep: bool) -> Batch:
        """One forward pass over sequences (B, T) that stores what replays need.

        Call inside `analysis()`, after a `trace`.

        Args:
            ids: Token ids.
            apart: As in `replay`.
            keep: Keep the segments, cut off each other, as if they had been replayed: their bits
                are those of a replay.

        Cost: one forward pass; T d floats per block and sequence, or with `keep` all that a
        backward pass needs.
        """
        inputs: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        replays: list[Replay] = []
        lowest = self.lowest_segment()
        watch = Watch(self, tapping=True, batch=(len(ids), ids.shape[1]))
        direct = {} if apart else {name: self.trainable[name] for name in sorted(self.direct)}
        for parameter in direct.values():
            parameter.requires_grad_(True)
        edges = [(name, get_gradient_edge(p), p.shape) for name, p in direct.items()]

        def cut(h: Tensor) -> Tensor:
            """The output of a segment, and with it the input of the next."""
            if keep:
                label = self.segments[len(replays)]
                own = [edge for edge in edges if label in self.ledger[edge[0]].segments]
                start = inputs[-1] if inputs else None
                replays.append(Replay(h, start, watch.taps, own, watch.gains, watch.routed))
            watch.taps, watch.gains = [], []
            with watch.paused():
                inputs.append(h.detach().requires_grad_(len(inputs) + 1 >= lowest))
            return inputs[-1]

        def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
            h, args, kwargs = split_hidden(args, kwargs)
            check_side_inputs(args, kwargs)
            x = h if i else cut(h)
            calls.append((args, kwargs))
            watch.segment = f"block {i}"
            result = original(*join_hidden(x, args), **kwargs)
            watch.segment = TAIL
            return self._output(i, cut(result[0] if self._tuples[i] else result))

        def head(h: Tensor) -> Tensor:
            cut(h)
            watch.active = False
            return self._dummy(h)

        try:
            recognised = self._recognised(watch, self.base.modules())
            with watch, recognised, self._patched(block, head):
                self._run(ids)
        finally:
            for parameter in direct.values():
                parameter.requires_grad_(False)
        hidden = inputs.pop().detach()
        return Batch(ids, hidden, inputs, {ids.shape[1]: calls}, replays, apart)

    def replay(
        self, trace: Trace | Batch, segment: int, length: int, rows: Tensor | None = None
    ) -> Replay:
        """Recomputes one segment on a prefix with gradients on. Call inside `analysis()`.

        segment 0 is the front, 1 … B the blocks, B + 1 the tail. The output has the shape of a
        hidden state (1, length, d); the tail's output is the head's input at every position. With
        `rows`, a block or the tail runs on these positions alone, (1, rows, d), and gains are
        differentiated at the outputs of their norms instead of directly (see `rowwise`); so they
        are in a batch whose sequences are kept `apart`.
        """
        names = self.segments
        label = names[segment]
        apart = isinstance(trace, Batch) and trace.apart
        direct = [
            (n, self.trainable[n])
            for n in sorted(self.direct)
            if rows is None and not apart and label in self.ledger[n].segments
        ]
        kept = slice(0, length) if rows is None else rows
        batch = (len(trace.ids), length) if isinstance(trace, Batch) else None
        watch = Watch(self, tapping=True, batch=batch)
        watch.segment = label
        captured: list[Tensor] = []
        x: Tensor | None = None
        edges = []
        for name, parameter in direct:
            parameter.requires_grad_(True)
            edges.append((name, get_gradient_edge(parameter), parameter.shape))
        try:
            if 0 < segment < len(names) - 1:
                x = trace.inputs[segment - 1][:, kept].detach().requires_grad_(True)
                args, kwargs = self.calls(trace, length)[segment - 1]
                if rows is not None:
                    args, kwargs = at_rows((args, kwargs), length, rows)
                with watch, self._recognised(watch, self.blocks[segment - 1].modules()):
                    try:
                        result = self.blocks[segment - 1](*join_hidden(x, args), **kwargs)
                    except layers.Stopped:
                        result = x
                captured.append(result[0] if isinstance(result, tuple | list) else result)
            else:
                if segment > 0:
                    x = trace.inputs[-1][:, kept].detach().requires_grad_(True)

                def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
                    hidden, args, kwargs = split_hidden(args, kwargs)
                    if segment == 0 and i == 0:
                        check_side_inputs(args, kwargs)
                        captured.append(hidden)
                    watch.active = segment > 0 and i == len(self.blocks) - 1
                    return self._output(i, x if watch.active and x is not None else hidden.detach())

                def head(h: Tensor) -> Tensor:
                    if segment > 0:
                        captured.append(h)
                    watch.active = False
                    return self._dummy(h)

                watch.active = segment == 0
                tokens = length if rows is None else len(rows)  # models reshape by their input's
                inside = {m for b in self.blocks for m in b.modules()}
                outside = [m for m in self.base.modules() if m not in inside]
                with watch, self._recognised(watch, outside), self._patched(block, head):
                    self._run(trace.ids[:, :tokens])
        finally:
            for _, parameter in direct:
                parameter.requires_grad_(False)
        return Replay(captured[0], x, watch.taps, edges, watch.gains, watch.routed)

    # ----- the ledger, for people

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
