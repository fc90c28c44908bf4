"""Why do my chosen log-probs fall? Which pairs of a preference set do it, under which objective.

One pass over a preference set: gradients of whole responses, paired with each other, and what one
forward pass tells of a pair. `lddyn.sets.diagnosis` holds what is found, and what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.gradient import flat_gradient, flatten, gradient_of_logits, unflatten
from lddyn.engine.gram import sequence_gram
from lddyn.engine.guard import evaluating, undisturbed
from lddyn.engine.logits import own_response
from lddyn.engine.pushforward import log_prob_shifts
from lddyn.engine.trace import Trace
from lddyn.entk.proxies import lbk
from lddyn.errors import UnsupportedModelError
from lddyn.memory import DEFAULT_MEMORY, parse_memory
from lddyn.objectives import Loss
from lddyn.sets.diagnosis import SCORES, Diagnosis, Pairs, Touched, assemble
from lddyn.sets.forecast import Forecast, Run
from lddyn.sets.validate import validate_without
from lddyn.sketches.features import features
from lddyn.sketches.sketch import Sketch

__all__ = ["diagnose"]


@undisturbed
def diagnose(
    model: nn.Module,
    pairs: Pairs,
    objective: str = "dpo",
    *,
    reference: nn.Module | Tensor | None = None,
    memory: int | str = DEFAULT_MEMORY,
    sketch: Sketch | None = None,
    run: Run | None = None,
    tokens: int = 4,
    validate: int = 0,
    progress: bool = False,
    **parameters: float,
) -> Diagnosis:
    """What one step on a preference set does to every pair's log-probs, and which pairs do it.

    Args:
        model: A causal LM of transformers; only parameters with requires_grad=True move.
        pairs: (chosen, rejected) examples.
        objective: A name of the table in `lddyn.Loss`: dpo, ipo, simpo, …
        reference: The reference model, or its log-probs (2, N) in nats. None: the model itself, as
            when training begins.
        memory: Workspace for gradients. Where those of all sequences fit, the Gram is exact;
            otherwise it is estimated from `features(by="sequence")`, with standard errors.
        sketch: For that case. Default: `Sketch()`. Given, it is used in any case.
        run: How you will train: `found.foretold` is what that does, `found.simulate` what other
            runs do. For this the gradients of all sequences must fit into memory.
        tokens: Look at the tokens of so many of the most harmful pairs, and of as many whose chosen
            response falls most. Exact in any case.
        validate: Take so many real steps of SGD, each on a batch of pairs drawn without repeats and
            from the same start, on a copy of the model; `found.validated` holds the scores' rank
            correlations with what they did.
        progress: Show a bar over sequences.
        **parameters: Hyper-parameters of the loss.

    Returns:
        Diagnosis of N pairs; scores in float64.

    Raises:
        ValueError: If there is no pair, the loss or a parameter is unknown, `tokens` is negative,
            an example is too long for the model, or a run is given and gradients do not fit.

    Cost: a forward and a backward pass a sequence (two where the Gram is sketched), a push of one
    direction a pair for LBK and a dozen for a named pair (each about four forward passes), and
    (2N)² inner products of gradients.

    Source: paper Eq. 6-7; Yuan et al. 2024 (2410.13828); Razin et al. 2025 (2410.08847); Deng et
    al. 2025 (2505.18830).

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> pairs = [(lddyn.Example([1, 2], [3, 4]), lddyn.Example([1, 2], [3, 5])),
        ...          (lddyn.Example([6, 2], [7, 4]), lddyn.Example([6, 2], [8, 9]))]
        >>> found = lddyn.diagnose(model, pairs, beta=0.1)
        >>> len(found), len(found.fate), found.gram.shape
        (2, 2, torch.Size([4, 4]))
    """
    pairs = [(chosen, rejected) for chosen, rejected in pairs]
    if not pairs:
        raise ValueError("pairs must hold at least one (chosen, rejected), got none")
    if validate < 0 or (validate and len(pairs) < 4):
        raise ValueError(
            f"validate must be a number of steps, on 4 pairs or more, got {validate} on "
            f"{len(pairs)} pairs"
        )
    if tokens < 0:
        raise ValueError(f"tokens must be a number of pairs, 0 or more, got {tokens}")
    Loss(objective, **parameters)  # what is wrong with them is said before the work
    examples = [p[0] for p in pairs] + [p[1] for p in pairs]
    config: Any = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for example in examples:
        example.check_model_limits(vocabulary, context)
    if isinstance(reference, Tensor) and reference.shape != (2, len(pairs)):
        got = tuple(reference.shape)
        raise ValueError(f"reference must be log-probs (2, {len(pairs)}), got {got}")
    parts = [p for p in model.parameters() if p.requires_grad]
    if not parts:
        raise ValueError("no parameter of the model has requires_grad=True: no step moves it")
    bytes_needed = len(examples) * sum(p.numel() for p in parts) * 4
    exact = sketch is None and bytes_needed <= parse_memory(memory)
    if run is not None and not exact:
        raise ValueError(
            f"a run can be foretold where the gradients of all sequences fit: memory must be "
            f"{bytes_needed} bytes, got {memory!r}, and no sketch"
        )
    look = _Look(model, parts, pairs)
    gram, stderr, same = look.all(exact, progress), None, look.same()
    if not exact:
        estimate = features(
            model, examples, sketch or Sketch(), by="sequence", memory=memory, progress=progress
        ).gram()
        value, stderr = estimate.value.double().cpu(), estimate.stderr.double().cpu()
        known = gram != 0  # what was computed exactly stays exact
        gram, stderr = torch.where(known, gram, value), stderr.masked_fill(known, 0.0)
        stderr = stderr[same][:, same]
    gram = gram[same][:, same]
    kept = look.log_probs
    if isinstance(reference, nn.Module):
        with evaluating(reference), torch.no_grad():
            given = [float(own_response(reference, e).log_probs.sum()) for e in examples]
        kept = torch.tensor(given, dtype=torch.float64).view(2, -1)
    elif reference is not None:
        kept = reference.double().cpu()
    found = assemble(
        objective, parameters, pairs, gram, stderr, look.log_probs, kept, look.facts, look.marks
    )
    if run is not None:
        if look.unopened:
            raise UnsupportedModelError(f"no run can be foretold of this model: {look.unopened}")
        if run.optimizer == "adamw":
            found = replace(found, adam=look.precondition(found, run.batch))
        foretold = look.foretell(found.simulate(run), progress)
        measured = dict(zip(("run_chosen", "run_rejected"), foretold.change, strict=True))
        linear = foretold.path[-1, 0] - foretold.path[0, 0]
        scores = {**found.scores, **measured, "run_linear": linear, "run_gives": foretold.gives}
        ordered = {name: scores[name] for name in SCORES}
        found = replace(found, foretold=foretold, scores=ordered)
    named = dict.fromkeys(found.worst(tokens) + found.falling(tokens))
    culprits = {i: [j for j, _ in found.culprits(i, 4) if j != i][:3] for i in named}
    touched = look.tokens(culprits, progress)
    found = replace(found, touched=touched, unopened=look.unopened)
    if validate:
        batch = 8 if run is None else run.batch
        found = replace(found, validated=validate_without(model, found, validate, batch, progress))
    return found


class _Look:
    """What is read off the model: all pairs in one pass, then the tokens of some.

    Attributes:
        log_probs: (2, N) nats.
        facts: Scores that do not depend on the objective.
        marks: What one forward pass says of each token, by pair.
        unopened: Why gradients of tokens cannot be had of this model, or "".
    """

    def __init__(self, model: nn.Module, parts: list[nn.Parameter], pairs: Pairs):
        self.model, self.parts, self.pairs = model, parts, pairs
        self.log_probs = torch.zeros(2, len(pairs), dtype=torch.float64)
        self.facts: dict[str, Tensor] = {}
        self.marks: dict[str, list[Tensor]] = {}
        self.mean = torch.zeros(sum(p.numel() for p in parts))  # of g+
        self.rows: Tensor | None = None  # all gradients, if they fit
        self.diagonal: Tensor | None = None  # P of Adam
        self.unopened = ""
        try:
            self.anatomy = Anatomy(model)
            self._push(pairs[0][0], [self.mean])
        except UnsupportedModelError as error:
            self.unopened = str(error)

    def all(self, exact: bool, progress: bool) -> Tensor:
        """The Gram (2N, 2N) of sequences, chosen first; only that of each pair if not `exact`."""
        n = len(self.pairs)
        gram = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
        rows = torch.empty(2 * n, len(self.mean)) if exact else None
        facts: dict[str, list[float]] = {}
        bar = tqdm(self.pairs, desc="pairs", disable=not progress, leave=False)
        with evaluating(self.model), torch.enable_grad():
            for i, pair in enumerate(bar):
                seen = []
                for side, example in enumerate(pair):
                    out = own_response(self.model, example)
                    gradient = flat_gradient(out.log_probs.sum(), self.parts)
                    logits, hidden = out.logits.detach(), out.hidden.detach()
                    found = _sequence(example, out.log_probs, logits, hidden)
                    seen.append(found | {"gradient": gradient})
                    self.log_probs[side, i] = found["log_prob"].sum()
                one, other = seen
                self.mean += one["gradient"] / n
                fact, marks = _facts(pair[0], pair[1], one, other)
                fact["lbk"] = self._lbk(pair[0], other)
                for name, value in fact.items():
                    facts.setdefault(name, []).append(value)
                for name, each in marks.items():
                    self.marks.setdefault(name, []).append(each)
                if rows is not None:
                    rows[i], rows[n + i] = one["gradient"], other["gradient"]
                else:
                    at = torch.tensor([i, n + i])
                    gram[at[:, None], at] = sequence_gram([x["gradient"] for x in seen])
        self.rows = rows
        self.facts = {name: torch.tensor(x, dtype=torch.float64) for name, x in facts.items()}
        return gram if rows is None else sequence_gram(rows)

    def same(self) -> Tensor:
        """The row of the Gram to read for each of its rows: equal responses are one, (2N,).

        Their gradients cancel in a step. What rounding leaves of it would be read as an effect.
        """
        n, rows = len(self.pairs), torch.arange(2 * len(self.pairs))
        for i, (chosen, rejected) in enumerate(self.pairs):
            if chosen.content_id == rejected.content_id:
                rows[n + i] = i
        return rows

    def precondition(self, found: Diagnosis, batch: int) -> tuple[Tensor, float]:
        """J P Jᵀ for Adam's P of the start, 1/(√v + ε), and Σ v; see `lddyn.sets.forecast`."""
        assert self.rows is not None
        n, rows = len(self.pairs), self.rows
        up, down = (found.scores[f"weight_{x}"].float()[:, None] for x in ("chosen", "rejected"))
        self.diagonal = torch.empty_like(self.mean)
        total = 0.0
        for start in range(0, rows.shape[1], _COLUMNS):
            at = slice(start, start + _COLUMNS)
            part = rows[:, at]
            pulls = up * part[:n] + down * part[n:]
            mean = pulls.mean(0).square()
            v = mean + (pulls.square().mean(0) - mean).clamp(min=0) / batch
            total += float(v.sum(dtype=torch.float64))
            self.diagonal[at] = 1 / (v.sqrt() + 1e-8)
        return sequence_gram(rows, self.diagonal), total

    def foretell(self, forecast: Forecast, progress: bool) -> Forecast:
        """The forecast with its net step taken in all logits, and every y+ divided among pairs."""
        assert self.rows is not None
        n, net = len(self.pairs), forecast.coefficients
        step = net.flatten().float() @ self.rows
        step = step if self.diagonal is None else step * self.diagonal
        change, effects = torch.zeros(2, n).double(), torch.zeros(n, n).double()
        for i, pair in enumerate(tqdm(self.pairs, desc="run", disable=not progress, leave=False)):
            for side, example in enumerate(pair):
                trace, moved = self._push(example, [step])
                before = trace.logits.double().log_softmax(-1)
                at = trace.targets[:, None]
                halfway, after = ((before + s * moved[0]).log_softmax(-1) for s in (0.5, 1.0))
                change[side, i] = (after - before).gather(1, at).sum()
                if side == 0:
                    mean = (before.exp() + 4 * halfway.exp() + after.exp()) / 6
                    rows = (-mean).scatter_add(1, at, torch.ones_like(mean))
                    gradient = gradient_of_logits(self.anatomy, example, rows)
                    flat = flatten(gradient)
                    flat = flat if self.diagonal is None else flat * self.diagonal
                    inner = (self.rows @ flat).double().view(2, n)
                    effects[i] = (net * inner).sum(0)
        return replace(forecast, change=change, effects=effects, curved=True)

    def tokens(self, culprits: Mapping[int, Sequence[int]], progress: bool) -> dict[int, Touched]:
        """The tokens of the pairs that are keys; of others against a key's chosen response."""
        touched: dict[int, Touched] = {}
        if self.unopened:
            return touched
        for i, others in tqdm(culprits.items(), desc="tokens", disable=not progress, leave=False):
            with evaluating(self.model), torch.enable_grad():
                own = [
                    flat_gradient(own_response(self.model, e).log_probs.sum(), self.parts)
                    for e in self.pairs[i]
                ]

            def inner(pair: int, directions: list[Tensor]) -> Tensor:
                found = []
                for trace, moved in (self._push(e, directions) for e in self.pairs[pair]):
                    at = trace.targets[None, :, None].expand(len(moved), -1, 1)
                    found.append(moved.gather(2, at)[:, :, 0])
                return torch.cat(found, 1).double().cpu()

            touched[i] = Touched(
                inner(i, [*own, self.mean]), {j: inner(j, own[:1])[0] for j in others}
            )
        return touched

    def _push(self, example: Example, directions: Sequence[Tensor]) -> tuple[Trace, Tensor]:
        """Δ log π of the whole vocabulary (D, M, V) along flat directions."""
        trace = self.anatomy.trace(example)
        named = [unflatten(flat, self.anatomy.trainable) for flat in directions]
        return trace, log_prob_shifts(trace, named)

    def _lbk(self, chosen: Example, rejected: Mapping[str, Any]) -> float:
        """Of a step on y−, at y+."""
        if self.unopened:
            return float("nan")
        trace, moved = self._push(chosen, [rejected["gradient"]])
        cotangents = ops.residual(rejected["logits"], rejected["targets"])[0]
        if not bool(cotangents.any()):
            return 0.0
        return float(lbk(moved[0].cpu(), trace.logits.cpu(), cotangents))


def _sequence(
    example: Example, log_probs: Tensor, logits: Tensor, hidden: Tensor
) -> dict[str, Any]:
    targets = torch.tensor(list(example.targets), device=logits.device)
    square = ops.residual(logits.contiguous(), targets)[3].double()
    log_prob = log_probs.detach().double()
    prob = log_prob.exp()
    # In one softmax, pushing y down moves π_v by π_v (π_v − τ), τ = ‖π‖² − π_y: what rises takes
    # all that is freed.
    pi = logits.double().softmax(-1)
    rising = (pi * (pi - (square - prob)[:, None])).clamp(min=0).scatter(1, targets[:, None], 0.0)
    return {
        "log_prob": log_prob.cpu(),
        "tau": float((square - prob).mean()),
        "squeeze": float(rising.amax(1).sum() / rising.sum().clamp(min=1e-300)),
        "logits": logits.cpu(),
        "targets": targets.cpu(),
        "hidden": hidden.float().cpu(),
    }


def _facts(
    chosen: Example, rejected: Example, one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What of a pair, and of each of its tokens, does not depend on the objective."""

    def nthr(x: Mapping[str, Any]) -> Tensor:
        inner = ops.residual_gram(one["logits"], one["targets"], x["logits"], x["targets"])
        summed: Tensor = (inner.double() * (one["hidden"] @ x["hidden"].T).double()).sum(0)
        return summed

    h, r = (x["hidden"].double() for x in (one, other))
    up, down = h.sum(0), r.sum(0)
    m, k = len(chosen), len(rejected)
    longer = max(len(chosen.response_ids), len(rejected.response_ids))
    marks = {
        "nthr": torch.cat([nthr(one), nthr(other)]),
        "ches": torch.cat([-h @ up, r @ up]),
        "log_prob": torch.cat([one["log_prob"], other["log_prob"]]),
    }
    facts = {
        "head_inner": float(marks["nthr"][m:].sum()),
        "ches": float(up @ down - up @ up),
        "ches_per_token": float(up @ down / (m * k) - up @ up / m**2),
        "edit_distance": edit_distance(chosen.response_ids, rejected.response_ids) / longer,
        "similarity": float(torch.nn.functional.cosine_similarity(up, down, dim=0)),
        "valley": float(other["log_prob"].mean()),
        "tau": other["tau"],
        "squeeze": other["squeeze"],
    }
    return facts, marks


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


_COLUMNS = 1 << 18  # of gradients in one product
