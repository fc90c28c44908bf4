"""Segments of a model computed again, with gradients, from what a forward pass stored.

`replay` runs one segment on a prefix, on some rows, or for a batch of sequences, and returns its
taps. `forward_batch` is the forward pass of a batch, which may keep the graphs of all segments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lddyn.engine import layers
from lddyn.engine.blocks import Call, at_rows, check_side_inputs, join_hidden, split_hidden
from lddyn.engine.guard import require
from lddyn.engine.ledger import TAIL, WHOLE, Watch
from lddyn.engine.skeleton import Skeleton, first_stream
from lddyn.engine.trace import Batch, Direct, Replay, Trace
from lddyn.engine.undo import Undo, shielded


def calls(skeleton: Skeleton, trace: Trace | Batch, length: int) -> list[Call]:
    """Masks, rotary angles and other arguments of every block for a prefix of the sequence."""
    if length not in trace.calls:
        trace.calls[length] = arguments(skeleton, trace.ids[:, :length])
    return trace.calls[length]


def arguments(skeleton: Skeleton, ids: Tensor) -> list[Call]:
    """The same for token ids (B, T), by a forward pass without blocks. Call inside an analysis."""
    gathered: list[Call] = []

    def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
        x, args, kwargs = split_hidden(args, kwargs)
        gathered.append((args, kwargs))
        return skeleton.output(i, x)

    with torch.no_grad(), skeleton.patched(block, skeleton.no_logits):
        skeleton.run(ids)
    return gathered


@contextlib.contextmanager
@shielded
def _requiring(parameters: Mapping[str, Tensor]) -> Iterator[list[Direct]]:
    """Parameters that require their gradients within, with the edges at which they get them."""
    with Undo() as undo:
        require(parameters.values(), undo)
        yield [Direct(name, get_gradient_edge(p), p.shape) for name, p in parameters.items()]


@contextlib.contextmanager
@shielded
def _recognised(skeleton: Skeleton, watch: Watch, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Norms, activations and rotary embeddings of these modules in closed form within."""
    with Undo() as undo:
        skeleton.recogniser.replace(modules, skeleton.head.module, watch, undo)
        yield


def forward_batch(skeleton: Skeleton, ids: Tensor, apart: bool, keep: bool) -> Batch:
    """The forward pass of `Anatomy.batch`."""
    if skeleton.joined:
        replay = _replay_whole(skeleton, ids)
        hidden = replay.output.detach().view(len(ids), ids.shape[1], -1)
        return Batch(ids, hidden, [], {}, [replay] if keep else [], apart=False)
    inputs: list[Tensor] = []
    gathered: list[Call] = []
    replays: list[Replay] = []
    lowest = skeleton.lowest_segment()
    watch = Watch(skeleton, tapping=True, batch=(len(ids), ids.shape[1]))
    direct = {} if apart else {name: skeleton.trainable[name] for name in sorted(skeleton.direct)}

    def cut(h: Tensor) -> Tensor:
        """Ends a segment at its output; returns the input of the next."""
        if keep:
            label = skeleton.segments[len(replays)]
            own = [d for d in edges if label in skeleton.ledger[d.name].segments]
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
        gathered.append((args, kwargs))
        watch.segment = f"block {i}"
        result = original(*join_hidden(x, args), **kwargs)
        watch.segment = TAIL
        return skeleton.output(i, cut(result[0] if skeleton.tuples[i] else result))

    def head(h: Tensor) -> Tensor:
        cut(skeleton.head.widen(h))
        watch.active = False
        return skeleton.no_logits(h)

    with (
        _requiring(direct) as edges,
        watch,
        _recognised(skeleton, watch, skeleton.base.modules()),
        skeleton.patched(block, head),
    ):
        skeleton.run(ids)
    hidden = inputs.pop().detach()
    return Batch(ids, hidden, inputs, {ids.shape[1]: gathered}, replays, apart)


def replay(
    skeleton: Skeleton,
    trace: Trace | Batch,
    segment: int,
    length: int,
    rows: Tensor | None = None,
) -> Replay:
    """One segment computed again, as in `Anatomy.replay`."""
    if skeleton.joined:
        return _replay_whole(skeleton, trace.ids[:, :length])
    label = skeleton.segments[segment]
    apart = isinstance(trace, Batch) and trace.apart
    direct = {
        name: skeleton.trainable[name]
        for name in sorted(skeleton.direct)
        if rows is None and not apart and label in skeleton.ledger[name].segments
    }
    watch = Watch(
        skeleton,
        tapping=True,
        batch=(len(trace.ids), length) if isinstance(trace, Batch) else None,
    )
    watch.segment = label
    x: Tensor | None = None
    if segment > 0:
        kept = slice(0, length) if rows is None else rows
        x = trace.inputs[segment - 1][:, kept].detach().requires_grad_(True)
    with _requiring(direct) as edges:
        if x is not None and segment <= len(skeleton.blocks):
            args, kwargs = calls(skeleton, trace, length)[segment - 1]
            if rows is not None:
                args, kwargs = at_rows((args, kwargs), length, rows)
            output = _run_block(skeleton, watch, segment - 1, x, (args, kwargs))
        else:
            tokens = length if rows is None else len(rows)  # models reshape by their input's
            output = _run_outside(skeleton, watch, x, trace.ids[:, :tokens])
    return Replay(output, x, watch.taps, edges, watch.gains, watch.routed)


def _replay_whole(skeleton: Skeleton, ids: Tensor) -> Replay:
    """The head's input, (1, T, d), by the whole model."""
    captured: list[Tensor] = []
    watch = Watch(skeleton, tapping=True)
    watch.segment = WHOLE

    def head(h: Tensor) -> Tensor:
        captured.append(skeleton.head.widen(first_stream(h)))
        watch.active = False
        return skeleton.no_logits(h)

    with (
        _requiring({name: skeleton.trainable[name] for name in sorted(skeleton.direct)}) as edges,
        watch,
        _recognised(skeleton, watch, skeleton.base.modules()),
        skeleton.patched(skeleton.whole, head),
    ):
        skeleton.run(ids)
    output = captured[0].reshape(*ids.shape, -1)
    return Replay(output, None, watch.taps, edges, watch.gains, watch.routed)


def _run_block(skeleton: Skeleton, watch: Watch, i: int, x: Tensor, call: Call) -> Tensor:
    """The output of block i for a hidden state and its other arguments."""
    block, (args, kwargs) = skeleton.blocks[i], call
    with watch, _recognised(skeleton, watch, block.modules()):
        try:
            # Hooks of a block belong to the segments around it, which run the whole model.
            result = block.forward(*join_hidden(x, args), **kwargs)
        except layers.Stopped:
            return x
    output: Tensor = result[0] if isinstance(result, tuple | list) else result
    return output


def _run_outside(skeleton: Skeleton, watch: Watch, x: Tensor | None, ids: Tensor) -> Tensor:
    """The first block's input; or the head's input, for an output x of the last block."""
    captured: list[Tensor] = []

    def block(i: int, original: Any, args: Any, kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        if x is None and i == 0:
            check_side_inputs(args, kwargs)
            captured.append(hidden)
        watch.active = x is not None and i == len(skeleton.blocks) - 1
        return skeleton.output(i, x if watch.active and x is not None else hidden.detach())

    def head(h: Tensor) -> Tensor:
        if x is not None:
            captured.append(skeleton.head.widen(h))
        watch.active = False
        return skeleton.no_logits(h)

    watch.active = x is None
    inside = {m for b in skeleton.blocks for m in b.modules()}
    outside = [m for m in skeleton.base.modules() if m not in inside]
    with watch, _recognised(skeleton, watch, outside), skeleton.patched(block, head):
        skeleton.run(ids)
    return captured[0]
