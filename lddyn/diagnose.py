"""Why do my chosen log-probs fall? Which pairs of a preference set do it, under which objective.

To first order a step of rate lr on pair j moves log π of sequence i by

    lr (w_j+ ⟨g_i, g_j+⟩ + w_j− ⟨g_i, g_j−⟩),     g = ∇θ log π(y | x),  w± = −∂L/∂ log π(y±)

so three scalars a pair, ‖g+‖², ‖g−‖² and ⟨g+, g−⟩, say what it does to itself (Yuan et al., 2024,
"gradient entanglement"), and the Gram of all sequences' gradients says what pairs do to each other.
The objective enters through w alone: all of `PREFERENCES` are compared without training any.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lddyn import ops
from lddyn.anatomy import evaluating, undisturbed
from lddyn.examples import Example
from lddyn.features import features
from lddyn.objectives import PREFERENCES, Pair, hyperparameters
from lddyn.pullback import DEFAULT_MEMORY, parse_memory
from lddyn.shards import replace_file
from lddyn.sketch import Sketch

__all__ = ["Diagnosis", "diagnose"]

Pairs = Sequence[tuple[Example, Example]]

# What a score means; the sign of those that foretell the chosen log-prob: + if more is better.
SCORES = {
    "set_chosen": "d log π(y+) by a step on the whole set, per unit of lr",
    "own_chosen": "d log π(y+) by a step on this pair alone",
    "set_rejected": "d log π(y−) by a step on the whole set",
    "own_rejected": "d log π(y−) by a step on this pair alone",
    "gives": "mean d log π(y+) of all pairs by this pair's share of a step on the set",
    "norm_chosen": "‖g+‖²",
    "norm_rejected": "‖g−‖²",
    "inner": "⟨g+, g−⟩",
    "head_inner": "the head's part of ⟨g+, g−⟩, from one forward pass (NTHR, summed)",
    "ches": "⟨S+, S−⟩ − ‖S+‖², S the sum of last hidden states (Razin et al., 2025)",
    "ches_per_token": "⟨S+, S−⟩/(|y+||y−|) − ‖S+‖²/|y+|²",
    "edit_distance": "of the tokens, over the longer length",
    "similarity": "cosine of the mean last hidden states of y+ and y−",
    "log_prob_chosen": "log π(y+), nats",
    "log_prob_rejected": "log π(y−), nats",
    "valley": "mean log π of the tokens of y−: the lower, the deeper in a valley (paper §3.3)",
    "tau": "mean ‖π‖² − π_y over y−: only tokens likelier than this gain when y− is pushed down",
    "margin": "log-ratio of y+ minus that of y−, nats",
    "weight_chosen": "w+ = −∂L/∂ log π(y+)",
    "weight_rejected": "w− = −∂L/∂ log π(y−)",
}


@dataclass(frozen=True)
class Diagnosis:
    """What a preference set does to a model's belief in its own responses, to first order.

    Attributes:
        objective: Name of the loss; `parameters` are its hyper-parameters.
        parameters: Of the loss.
        pairs: The (chosen, rejected) examples, N of them.
        scores: Name -> (N,) float64; `SCORES` says what each is.
        gram: ⟨g_i, g_j⟩ (2N, 2N): all chosen, then all rejected.
        stderr: Its standard errors where it was sketched, else None.
        log_probs: (2, N) nats; `reference` those of the reference.
        reference: (2, N) nats.
    """

    objective: str
    parameters: Mapping[str, float]
    pairs: Pairs
    scores: Mapping[str, Tensor]
    gram: Tensor
    stderr: Tensor | None
    log_probs: Tensor
    reference: Tensor

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def fate(self) -> list[str]:
        """What a step on the whole set does to each pair: chosen first, then rejected."""
        words = {True: "up", False: "down"}
        both = zip(self.scores["set_chosen"] > 0, self.scores["set_rejected"] > 0, strict=True)
        return [f"{words[bool(a)]}, {words[bool(b)]}" for a, b in both]

    def set_stderr(self) -> Tensor | None:
        """Standard errors of set_chosen and set_rejected, (2, N); None where the Gram is exact.

        Entries of the Gram are taken as independent, which simulations bear out.
        """
        if self.stderr is None:
            return None
        variance = _effects(self.stderr**2, self._weights() ** 2).sum(1)
        return variance.sqrt().view(2, -1) / len(self)

    def worst(self, count: int | None = None) -> list[int]:
        """Pairs by what they give to all chosen responses, the most harmful first."""
        return self.scores["gives"].argsort(stable=True)[:count].tolist()

    def culprits(self, pair: int, count: int = 5) -> list[tuple[int, float]]:
        """The pairs that pull this pair's chosen log-prob down most, (pair, d log π per lr)."""
        effect = _effects(self.gram, self._weights())[: len(self)][pair] / len(self)
        order = effect.argsort(stable=True)[:count].tolist()
        return [(int(j), float(effect[j])) for j in order if effect[j] < 0]

    def under(self, objective: str, **parameters: float) -> Diagnosis:
        """The same pairs under another loss of `PREFERENCES`; no model is needed."""
        return _assemble(
            objective, parameters, self.pairs, self.gram, self.stderr, self.log_probs,
            self.reference, self.scores,
        )  # fmt: skip

    def objectives(self) -> list[dict[str, Any]]:
        """One row per loss: what a step on the set does, in shares and means.

        This diagnosis' own objective has its own parameters, the others have their defaults.

        The means are of d log π over ‖step‖: losses differ in scale, and a rate is tuned to each.
        """
        found = []
        for name in PREFERENCES:
            other = self if name == self.objective else self.under(name)
            weights = other._weights().flatten() / len(self)
            size = math.sqrt(max(float(weights @ self.gram @ weights), 0.0)) or 1.0
            up, fall = other.scores["set_chosen"], other.scores["set_rejected"]
            found.append({
                "objective": name,
                "chosen_falls": float((up < 0).double().mean()),
                "both_fall": float(((up < 0) & (fall < 0)).double().mean()),
                "chosen": float(up.mean()) / size,
                "rejected": float(fall.mean()) / size,
            })  # fmt: skip
        return found

    def table(self) -> list[dict[str, Any]]:
        """One dict per pair, in order: "pair", "fate", and all scores."""
        return [
            {"pair": i, "fate": fate} | {name: float(x[i]) for name, x in self.scores.items()}
            for i, fate in enumerate(self.fate)
        ]

    def tell(self) -> list[str]:
        """The diagnosis in sentences."""
        n, up, fall = len(self), self.scores["set_chosen"], self.scores["set_rejected"]
        own = self.scores["own_chosen"]
        both = int(((up < 0) & (fall < 0)).sum())
        lines = [
            f"A small {self.objective} step on all {n} pairs lowers log π(y+) of "
            f"{int((up < 0).sum())} of them, and both responses of {both}.",
            f"By its own step alone, {int((own < 0).sum())} pairs would lower their own chosen "
            "response" + (
                ": −w− ⟨g+, g−⟩ exceeds w+ ‖g+‖² there, what is pushed down is too like what is "
                "pulled up." if bool((own < 0).any()) else "."
            ),
        ]  # fmt: skip
        error = self.set_stderr()
        if error is not None:
            unsure = int((up.abs() < 2 * error[0]).sum())
            lines.append(
                f"Inner products between pairs are estimates: for {unsure} of {n} pairs log π(y+) "
                "may as well rise as fall, it is within two standard errors of 0. More memory, or "
                "a larger sketch, tells."
            )
        gives = self.scores["gives"]
        harmful = gives[gives < 0]
        if len(harmful):
            top = self.worst(max(1, n // 10))
            share = float(gives[top].clamp(max=0).sum() / harmful.sum())
            named = ", ".join(map(str, top[:5]))
            lines.append(
                f"{len(harmful)} pairs pull the chosen responses down on the whole; the worst "
                f"{len(top)} do {share:.0%} of it (pairs {named}{' …' if len(top) > 5 else ''})."
            )
        rows = self.objectives()
        others = [o for o in rows if o["objective"] not in ("sft", "unlikelihood")]
        best = max(others, key=lambda row: float(row["chosen"]))
        mine = next(o for o in rows if o["objective"] == self.objective)
        lines.append(
            f"Of the losses of both responses, for a step of the same length, {best['objective']} "
            f"raises the chosen responses most "
            f"({best['chosen']:+.3g} nats a unit, {best['chosen_falls']:.0%} of pairs falling; "
            f"{self.objective}: {mine['chosen']:+.3g}, {mine['chosen_falls']:.0%})."
        )
        return lines

    def correlations(self, measured: Tensor, seed: int = 0) -> list[dict[str, Any]]:
        """Spearman's rank correlation of every score with a measured change of log π(y+).

        Args:
            measured: (N,) nats, what training did.
            seed: Of the bootstrap over pairs (2,000 times), 95 % intervals.

        Returns:
            Rows "score", "rho", "low", "high", by |rho|, falling.

        Raises:
            ValueError: If `measured` is not one finite number per pair.
        """
        from scipy.stats import rankdata

        target = measured.double().cpu()
        if target.shape != (len(self),) or not bool(target.isfinite().all()):
            raise ValueError(
                f"measured must be {len(self)} finite numbers, one per pair, got shape "
                f"{tuple(target.shape)}, {int((~target.isfinite()).sum())} of them not finite"
            )
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self), (2000, len(self)), generator=generator)

        def rho(x: Tensor, y: Tensor) -> Tensor:
            ranks = [torch.from_numpy(rankdata(v.numpy(), axis=-1)) for v in (x, y)]
            a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
            found: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-300)
            return found

        found = []
        for name, score in self.scores.items():
            drawn = rho(score[picks], target[picks])
            low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
            found.append(
                {"score": name, "rho": float(rho(score, target)), "low": low, "high": high}
            )
        return sorted(found, key=lambda row: -abs(row["rho"]))

    def save(self, folder: str | Path, places: Sequence[int] | None = None) -> Path:
        """Writes diagnosis.json (`to_dict`) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "diagnosis.json"
        text = json.dumps(self.to_dict(places), indent=1, allow_nan=False)
        replace_file(path, text + "\n")
        return path

    def to_dict(self, places: Sequence[int] | None = None) -> dict[str, Any]:
        """Everything but the Gram, as JSON can hold it: `table`, `tell`, `objectives`, meanings.

        Args:
            places: The row of the data that each pair comes from, for "row" in the table.
        """
        table = self.table()
        for pair, row in enumerate(table if places is not None else ()):
            row["row"] = places[pair]  # type: ignore[index]
        error = self.set_stderr()
        if error is not None:
            for row, chosen, rejected in zip(table, *error.tolist(), strict=True):
                row |= {"set_chosen_stderr": chosen, "set_rejected_stderr": rejected}
        return {
            "objective": self.objective,
            "parameters": dict(self.parameters),
            "told": self.tell(),
            "objectives": _finite(self.objectives()),
            "worst": self.worst(),
            "fates": dict(Counter(self.fate)),
            "pairs": _finite(table),
            "meaning": SCORES,
        }

    def _weights(self) -> Tensor:
        return torch.stack([self.scores["weight_chosen"], self.scores["weight_rejected"]])


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with None for what is not a finite number."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]


@undisturbed
def diagnose(
    model: nn.Module,
    pairs: Pairs,
    objective: str = "dpo",
    *,
    reference: nn.Module | Tensor | None = None,
    memory: int | str = DEFAULT_MEMORY,
    sketch: Sketch | None = None,
    progress: bool = False,
    **parameters: float,
) -> Diagnosis:
    """What one step on a preference set does to every pair's log-probs, and which pairs do it.

    Args:
        model: A causal LM of transformers; only parameters with requires_grad=True move.
        pairs: (chosen, rejected) examples.
        objective: A loss of `lddyn.objectives.PREFERENCES`: dpo, ipo, simpo, …
        reference: The reference model, or its log-probs (2, N) in nats. None: the model itself, as
            when training begins.
        memory: Workspace for gradients. Where those of all sequences fit, the Gram is exact;
            otherwise it is estimated from `features(by="sequence")`, with standard errors.
        sketch: For that case. Default: `Sketch()`. Given, it is used in any case.
        progress: Show a bar over sequences.
        **parameters: Hyper-parameters of the loss.

    Returns:
        Diagnosis of N pairs; scores in float64.

    Raises:
        ValueError: If there is no pair, the loss or a parameter is unknown, or an example is too
            long for the model.

    Cost: a forward and a backward pass a sequence (two where the Gram is sketched), and (2N)²
    inner products of gradients.

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
    hyperparameters(objective, parameters)  # what is wrong with them is said before the work
    examples = [p[0] for p in pairs] + [p[1] for p in pairs]
    config: Any = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for example in examples:
        example.check_model_limits(vocabulary, context)
    parts = [p for p in model.parameters() if p.requires_grad]
    if not parts:
        raise ValueError("no parameter of the model has requires_grad=True: no step moves it")
    bytes_needed = len(examples) * sum(p.numel() for p in parts) * 4
    exact = sketch is None and bytes_needed <= parse_memory(memory)
    listed, facts, gram, close = _look(model, examples, parts, exact, progress)
    stderr = None
    if gram is None:
        estimate = features(
            model, examples, sketch or Sketch(), by="sequence", memory=memory, progress=progress
        ).gram()
        gram, stderr = estimate.value.double().cpu(), estimate.stderr.double().cpu()
        n = len(pairs)
        for i, own in enumerate(close):  # what was computed exactly stays exact
            places = (i, n + i)
            for a in (0, 1):
                for b in (0, 1):
                    gram[places[a], places[b]] = own[a, b]
                    stderr[places[a], places[b]] = 0.0
    log_probs = torch.tensor(listed, dtype=torch.float64).view(2, -1)
    if isinstance(reference, nn.Module):
        with evaluating(reference), torch.no_grad():
            given = [float(_forward(reference, e)[0].sum()) for e in examples]
        reference = torch.tensor(given, dtype=torch.float64).view(2, -1)
    kept = log_probs if reference is None else reference.double().cpu()
    if kept.shape != log_probs.shape:
        raise ValueError(f"reference must be log-probs (2, {len(pairs)}), got {tuple(kept.shape)}")
    return _assemble(objective, parameters, pairs, gram, stderr, log_probs, kept, facts)


# --------------------------------------------------------------------------- one sequence


def _forward(model: nn.Module, example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """Log π of the counted tokens (M,), their logits (M, V) and last hidden states (M, d)."""
    device = next(model.parameters()).device
    captured: list[Tensor] = []
    # Not output_hidden_states=True: transformers leaves its hooks on the blocks then.
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        out = model(input_ids=torch.tensor([example.ids], device=device), use_cache=False)
    finally:
        hook.remove()
    at = list(example.positions)
    logits = out.logits[0, at]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.tensor(list(example.targets), device=device)
    log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return log_probs, logits, captured[-1][0, at]


def _look(
    model: nn.Module, examples: Sequence[Example], parts: list[nn.Parameter], exact: bool,
    progress: bool,
) -> tuple[list[float], dict[str, Tensor], Tensor | None, list[Tensor]]:  # fmt: skip
    """Log-probs, facts of every pair; the Gram if `exact`, else that of each pair, (2, 2)."""
    n = len(examples) // 2
    log_probs_of = [0.0] * len(examples)
    facts: dict[str, list[float]] = {}
    one: dict[str, Any] = {}
    order = [k for i in range(n) for k in (i, n + i)]  # pair by pair
    rows = torch.empty(len(examples), sum(p.numel() for p in parts)) if exact else None
    close: list[Tensor] = []
    last: Tensor | None = None
    with evaluating(model), torch.enable_grad():
        for k in tqdm(order, desc="sequences", disable=not progress, leave=False):
            log_probs, logits, hidden = _forward(model, examples[k])
            gradient = _flat(log_probs.sum(), parts)
            found = _sequence(examples[k], log_probs, logits.detach(), hidden.detach())
            log_probs_of[k] = found["log_prob"]
            if k < n:
                one = found
            else:  # now, as logits of all sequences would not fit into memory
                for name, value in _facts(examples[k - n], examples[k], one, found).items():
                    facts.setdefault(name, []).append(value)
            if rows is not None:
                rows[k] = gradient
            elif k >= n:
                assert last is not None
                close.append(_gram([last, gradient]))
            last = gradient if rows is None else None
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in facts.items()}
    return log_probs_of, tensors, None if rows is None else _gram(rows), close


def _flat(value: Tensor, parts: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(value, parts, allow_unused=True)
    zeros = (g if g is not None else torch.zeros_like(p) for g, p in zip(found, parts, strict=True))
    return torch.cat([g.detach().flatten().float().cpu() for g in zeros])


def _gram(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """In chunks of columns, summed in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(rows[0]), 1 << 18):
        part = torch.stack([row[start : start + (1 << 18)] for row in rows])
        total += (part @ part.T).double()
    return total


def _sequence(
    example: Example, log_probs: Tensor, logits: Tensor, hidden: Tensor
) -> dict[str, Any]:
    targets = torch.tensor(list(example.targets), device=logits.device)
    square = ops.residual(logits.contiguous(), targets)[3].double()
    return {
        "log_prob": float(log_probs.detach().double().sum()),
        "tau": float((square - log_probs.detach().double().exp()).mean()),
        "logits": logits.cpu(),
        "targets": targets.cpu(),
        "hidden": hidden.float().cpu(),
    }


# --------------------------------------------------------------------------- scores


def _facts(
    chosen: Example, rejected: Example, one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, float]:
    """Scores of a pair that do not depend on the objective."""
    inner = ops.residual_gram(one["logits"], one["targets"], other["logits"], other["targets"])
    s, r = (x["hidden"].double().sum(0) for x in (one, other))
    m, k = len(chosen), len(rejected)
    longer = max(len(chosen.response_ids), len(rejected.response_ids))
    return {
        "head_inner": float((inner * (one["hidden"] @ other["hidden"].T)).sum()),
        "ches": float(s @ r - s @ s),
        "ches_per_token": float(s @ r / (m * k) - s @ s / m**2),
        "edit_distance": edit_distance(chosen.response_ids, rejected.response_ids) / longer,
        "similarity": float(torch.nn.functional.cosine_similarity(s, r, dim=0)),
        "valley": other["log_prob"] / k,
        "tau": other["tau"],
    }


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def _weights(
    objective: str, parameters: Mapping[str, float], pairs: Pairs, log_probs: Tensor,
    reference: Tensor,
) -> Tensor:  # fmt: skip
    """w± = −∂L/∂ log π(y±), (2, N), by autograd; a loss is of one pair, elementwise."""
    lengths = torch.tensor([[len(e) for e in pair] for pair in pairs]).T
    with torch.enable_grad():
        both = log_probs.clone().requires_grad_()
        loss = PREFERENCES[objective](Pair(*both, *(both - reference), *lengths), **parameters)
        return -torch.autograd.grad(loss.sum(), both)[0]


def _effects(gram: Tensor, weights: Tensor) -> Tensor:
    """D log π of sequence i by a step on pair j, (2N, N), per unit of lr."""
    n = weights.shape[1]
    return gram[:, :n] * weights[0] + gram[:, n:] * weights[1]


def _assemble(
    objective: str, parameters: Mapping[str, float], pairs: Pairs, gram: Tensor,
    stderr: Tensor | None, log_probs: Tensor, reference: Tensor, facts: Mapping[str, Tensor],
) -> Diagnosis:  # fmt: skip
    n = len(pairs)
    parameters = hyperparameters(objective, parameters)
    weights = _weights(objective, parameters, pairs, log_probs, reference)
    effects = _effects(gram, weights)
    each, index = effects.mean(1), torch.arange(n)
    computed = {
        "set_chosen": each[:n],
        "own_chosen": effects[index, index],
        "set_rejected": each[n:],
        "own_rejected": effects[n + index, index],
        "gives": effects[:n].mean(0) / n,
        "norm_chosen": gram[index, index],
        "norm_rejected": gram[n + index, n + index],
        "inner": gram[index, n + index],
        "log_prob_chosen": log_probs[0],
        "log_prob_rejected": log_probs[1],
        "margin": (log_probs - reference)[0] - (log_probs - reference)[1],
        "weight_chosen": weights[0],
        "weight_rejected": weights[1],
    }
    merged = {**facts, **computed}
    scores = {name: merged[name] for name in SCORES}
    return Diagnosis(objective, dict(parameters), pairs, scores, gram, stderr, log_probs, reference)
