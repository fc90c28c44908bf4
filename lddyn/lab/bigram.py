"""The same negative step in a table of logits and in shared features: the poster's 2-gram example.

Three bigram language models read the same text. In a table every context has logits of its own,
so K between two contexts is exactly zero and the squeeze stays where it was made; in a factorised
model and in a network contexts share features, and it leaks. Every step is a real one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lddyn.lab.record import Claim, Lab
from lddyn.lab.shares import Share, verdict
from lddyn.report.canvas import FAINT, INK, LOWERED, RAISED, blank_figure, tidy
from lddyn.steps.flow import Flow, leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRONG = 0.5  # rank correlation
KINDS = ("table", "factorised", "network")
COLOURS = {"table": "#d55e00", "factorised": "#009e73", "network": "#0072b2"}
WORDS = {
    "article": "the a this that my every",
    "adjective": "red old small bright quiet wild",
    "noun": "cat dog bird fox horse child",
    "verb": "sees finds likes hears calls follows",
    "adverb": "often never soon slowly gladly",
    "end": ".",
}
# Which kinds of word follow which, and how often.
GRAMMAR = {
    "article": {"adjective": 0.4, "noun": 0.6},
    "adjective": {"noun": 0.85, "adjective": 0.15},
    "noun": {"verb": 0.65, "end": 0.25, "adverb": 0.1},
    "verb": {"article": 0.7, "adverb": 0.2, "end": 0.1},
    "adverb": {"verb": 0.4, "article": 0.3, "end": 0.3},
    "end": {"article": 1.0},
}


# ---------------------------------------------------------------------------------------------
# Text and models


def vocabulary() -> tuple[list[str], list[str]]:
    """The words, and the kind of each."""
    pairs = [(word, kind) for kind, words in WORDS.items() for word in words.split()]
    return [w for w, _ in pairs], [k for _, k in pairs]


def transitions(generator: torch.Generator) -> Tensor:
    """P(next | word), (V, V): the grammar, and a taste of each word's own."""
    words, kinds = vocabulary()
    taste = 1.5 * torch.randn(len(words), len(words), generator=generator, dtype=torch.float64)
    taste = taste + 1.5 * torch.randn(len(words), generator=generator, dtype=torch.float64)
    chances = torch.zeros_like(taste)
    for i, kind in enumerate(kinds):
        for follower, share in GRAMMAR[kind].items():
            at = torch.tensor([k == follower for k in kinds])
            chances[i, at] = share * taste[i, at].softmax(0)
    return chances


def count_bigrams(chances: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """How often each pair of words occurs in a text of `length` words, (V, V)."""
    words, _ = vocabulary()
    # Uniform numbers against cumulated chances: one draw a word.
    steps = torch.rand(length, generator=generator, dtype=torch.float64).tolist()
    cumulated = chances.cumsum(1)
    counts = torch.zeros_like(chances)
    word = words.index(".")
    for step in steps:
        following = int(torch.searchsorted(cumulated[word], step, right=True))
        following = min(following, len(words) - 1)
        counts[word, following] += 1
        word = following
    return counts


class Bigram(nn.Module):
    """Logits of the next word at every context, (V, V): a table, E Uᵀ, or W₂ tanh(W₁ e)."""

    def __init__(self, kind: str, size: int, generator: torch.Generator, width: int = 16):
        super().__init__()

        def normal(*shape: int, scale: float) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(scale * drawn)

        self.kind = kind
        if kind == "table":
            self.table = nn.Parameter(torch.zeros(size, size, dtype=torch.float64))
            return
        self.embedding = normal(size, width, scale=1.0)
        if kind == "network":
            self.hidden = normal(2 * width, width, scale=width**-0.5)
            width *= 2
        self.head = normal(size, width, scale=0.5 * width**-0.5)

    def forward(self) -> Tensor:
        """Logits (context, next word)."""
        if self.kind == "table":
            return self.table
        features: Tensor = self.embedding
        if self.kind == "network":
            features = torch.tanh(features @ self.hidden.T)
        return features @ self.head.T


def train(
    model: Bigram, counts: Tensor, checkpoints: Sequence[int], rate: float = 0.02
) -> dict[int, Bigram]:
    """Adam on the whole text's cross-entropy; copies after so many steps."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    weight = counts / counts.sum()
    kept = {}
    for step in range(max(checkpoints) + 1):
        if step in checkpoints:
            kept[step] = copy.deepcopy(model)
        optimizer.zero_grad()
        (-(weight * model().log_softmax(-1)).sum()).backward()
        optimizer.step()
    return kept


def kernel(model: Bigram) -> Tensor:
    """K[c, v, c', v'] = ⟨∇ z(v | c), ∇ z(v' | c')⟩, all of it, by an explicit Jacobian."""
    parameters = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, ()))(
        {k: v.detach() for k, v in parameters.items()}
    )
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)
    return torch.einsum("cvp,dwp->cvdw", flat, flat)


def push_down(model: Bigram, context: int, label: int, strength: float) -> tuple[Bigram, Tensor]:
    """One SGD step that lowers log π(label | context), and log π of all contexts after it.

    Its learning rate gives the pushed logit the same influence on itself in every model:
    η ‖∇ z(label | context)‖² = strength, which in a table is η = strength.
    """
    parameters = list(model.parameters())
    logits = model()
    reach = torch.autograd.grad(logits[context, label], parameters, retain_graph=True)
    rate = strength / float(sum((g * g).sum() for g in reach))
    gradients = torch.autograd.grad(logits[context].log_softmax(-1)[label], parameters)
    pushed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, gradient in zip(pushed.parameters(), gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)
        return pushed, pushed().log_softmax(-1)


# ---------------------------------------------------------------------------------------------
# Measurements


def rare_pairs(counts: Tensor, number: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Contexts that the text has often enough, and words that never follow them there."""
    unseen = ((counts == 0) & (counts.sum(1, keepdim=True) >= 30)).nonzero()
    chosen = torch.randperm(len(unseen), generator=generator)[:number]
    return [(int(c), int(y)) for c, y in unseen[chosen]]


def consequences(
    before: Tensor, after: Tensor, context: int, label: int, blocks: Tensor | None = None
) -> dict[str, Any]:
    """What one push did at its own context and at the others."""
    labels = torch.full((len(before),), label)
    flow = Flow.of(before, after - before, labels)
    here = torch.zeros(len(before), dtype=torch.bool)
    here[context] = True
    distance = flow.change.abs().sum(1) / 2  # total variation
    star = int(flow.leading[context, 0])
    change = flow.change[context].clone()
    change[label] = -torch.inf
    row = {
        "label before": float(before[context, label].exp()),
        "argmax before": float(before[context, star].exp()),
        "argmax change": float(flow.argmax[context]),
        "argmax rises": bool(flow.argmax[context] > 0),
        "argmax gains most": bool(flow.argmax[context] >= change.max()),  # equal ones may tie
        "others fall": float(flow.losers[context]) / (before.shape[1] - 1),
        "others lose": float(-flow.lost[context]),
        "label change": float(flow.label[context]),
        "entropy": float(flow.entropy[context]),
        "moved here": float(distance[context]),
        "moved elsewhere": float(distance[~here].sum()),
        "label falls elsewhere": float((flow.label[~here] < 0).double().mean()),
        "argmax rises elsewhere": float((flow.change[~here, star] > 0).double().mean()),
    }
    if blocks is not None:
        row["kernel rank correlation"] = _rank_correlation(blocks[context][~here], distance[~here])
    return row


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; NaN where one of the two does not vary."""
    if float(a.max() - a.min()) == 0 or float(b.max() - b.min()) == 0:
        return math.nan
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _average(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over pairs, and half the width of their 95 % intervals for what is drawn."""
    means: dict[str, float] = {}
    for key in rows[0]:
        values = torch.tensor([float(r[key]) for r in rows], dtype=torch.float64)
        means[key] = float(values.mean())
        means[f"{key} ±"] = 1.96 * float(values.std()) / len(rows) ** 0.5
    return means


def measure(
    lab: Lab, length: int, steps: int, pairs: int, repeats: int, strength: float
) -> dict[str, Any]:
    """Trains the models and pushes."""
    counts = count_bigrams(transitions(lab.generator("grammar")), length, lab.generator("text"))
    size = len(counts)
    chosen = rare_pairs(counts, pairs, lab.generator("pairs"))
    checkpoints = sorted({0, *(round(steps * 2.0**-k) for k in range(9)), steps})
    words, _ = vocabulary()
    # The picture's push: a context and a word that the grammar does not allow there.
    shown = (words.index("dog"), words.index("quiet"))
    result: dict[str, Any] = {"longer": [], "repeated": [], "kernels": [], "shown": {}, "pairs": []}
    result["context"], result["label"] = shown
    for kind in KINDS:
        model = Bigram(kind, size, lab.generator("model", kind))
        kept = train(model, counts, checkpoints)
        final = kept[steps]
        full = kernel(final)
        blocks = torch.linalg.matrix_norm(full.permute(0, 2, 1, 3))
        apart = ~torch.eye(size, dtype=torch.bool)
        between = full.permute(0, 2, 1, 3)[apart]
        result["kernels"].append(
            {
                "model": kind,
                "parameters": sum(p.numel() for p in final.parameters()),
                "entries between contexts": between.numel(),
                "nonzero": int((between != 0).sum()),
                "largest": float(between.abs().max()),
                "norm between / within": float(between.norm() / blocks.diagonal().norm()),
            }
        )
        before = final().log_softmax(-1).detach()
        _, after = push_down(final, *shown, strength)
        result["shown"][kind] = {
            "kernel": blocks.tolist(),
            "before": before.tolist(),
            "delta": (after - before).tolist(),
        }
        for step in lab.bar(checkpoints, f"{kind}: pushes"):
            start = kept[step]
            before = start().log_softmax(-1).detach()
            norms = blocks if step == steps else None
            rows = []
            for context, label in chosen:
                _, after = push_down(start, context, label, strength)
                rows.append(consequences(before, after, context, label, norms))
            if step == steps:
                result["pairs"] += [
                    {"model": kind, "context": words[c], "label": words[y], **row}
                    for (c, y), row in zip(chosen, rows, strict=True)
                ]
                rows = [{k: v for k, v in r.items() if "rank" not in k} for r in rows]
            loss = -float((counts / counts.sum() * before).sum())
            result["longer"].append({"model": kind, "steps": step, "loss": loss, **_average(rows)})
        before = final().log_softmax(-1).detach()
        moving = {pair: final for pair in chosen[: max(4, pairs // 4)]}
        for number in lab.bar(range(repeats + 1), f"{kind}: repeated pushes"):
            rows = []
            for (context, label), at in moving.items():
                now = at().log_softmax(-1).detach()
                star = int(leading(before[context][None], torch.tensor([label]), 1))
                rows.append(
                    {
                        "argmax": float(now[context, star].exp()),
                        "label": float(now[context, label]),
                        "entropy": float(-(now[context].exp() * now[context]).sum()),
                        "moved elsewhere": float(
                            ((now.exp() - before.exp()).abs().sum(1) / 2).sum()
                            - (now[context].exp() - before[context].exp()).abs().sum() / 2
                        ),
                    }
                )
            result["repeated"].append({"model": kind, "pushes": number, **_average(rows)})
            moving = {pair: push_down(at, *pair, strength)[0] for pair, at in moving.items()}
    return result


# ---------------------------------------------------------------------------------------------
# Pictures


def draw_leak(found: dict[str, Any]) -> Figure:
    """Kernel norms between contexts, and Δ log π of every word at every context."""
    from matplotlib.colors import AsinhNorm, LogNorm

    words, kinds = vocabulary()
    size = len(words)
    figure = blank_figure(11.0, 7.6, "leak")
    norms = torch.tensor([found["shown"][k]["kernel"] for k in KINDS], dtype=torch.float64)
    deltas = torch.tensor([found["shown"][k]["delta"] for k in KINDS], dtype=torch.float64)
    context, label = found["context"], found["label"]
    star = [
        int(
            leading(
                torch.tensor(found["shown"][k]["before"], dtype=torch.float64)[context][None],
                torch.tensor([label]),
                1,
            )
        )
        for k in KINDS
    ]
    starts = [i for i in range(size) if i == 0 or kinds[i] != kinds[i - 1]]
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], size], strict=True)]
    names = [kinds[i] + ("s" if kinds[i] != "end" else "") for i in starts]
    norm = AsinhNorm(0.02, -1.0, 1.0)
    for i, kind in enumerate(KINDS):
        left = 0.09 + 0.285 * i
        top = figure.add_axes((left, 0.7, 0.15, 0.217))
        relative = norms[i] / norms[i].diagonal().mean()
        top.imshow(
            relative.clamp(min=1e-9).numpy(),
            cmap="Greys",
            norm=LogNorm(1e-3, 1.0),
            interpolation="nearest",
        )
        top.set_facecolor("white")
        axes = figure.add_axes((left, 0.09, 0.26, 0.49))
        mesh = axes.imshow(
            deltas[i].numpy(), cmap="RdBu", norm=norm, interpolation="nearest", aspect="auto"
        )
        for place in (top, axes):
            tidy(place, keep=())
            place.set_xticks([])
            place.set_yticks([])
            for at in starts[1:]:
                place.axhline(at - 0.5, color=FAINT, linewidth=0.3)
                place.axvline(at - 0.5, color=FAINT, linewidth=0.3)
        axes.set_xticks([m - 0.5 for m in middles], names, rotation=35, ha="right", fontsize=7.5)
        axes.tick_params(length=0)
        if i == 0:
            axes.set_yticks([m - 0.5 for m in middles], [f"after {n}" for n in names], fontsize=7.5)
        if i == len(KINDS) - 1:
            axes.annotate(
                f"after\n“{words[context]}”",
                (size - 0.5, context),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                color=INK,
                weight="bold",
                annotation_clip=False,
            )
        for column, text, colour in (
            (label, f"↓ {words[label]}", LOWERED),
            (star[i], f"y* {words[star[i]]}", RAISED),
        ):
            axes.annotate(
                text,
                (column, -0.5),
                xytext=(0, 2),
                textcoords="offset points",
                fontsize=8,
                ha="center",
                va="bottom",
                color=colour,
                weight="bold",
                annotation_clip=False,
            )
        row = next(r for r in found["kernels"] if r["model"] == kind)
        figure.text(left, 0.928, kind, fontsize=11, weight="bold", color=COLOURS[kind])
        share = row["nonzero"] / row["entries between contexts"]
        note = "exactly 0" if row["nonzero"] == 0 else f"{100 * share:.0f} % not 0"
        figure.text(
            left + 0.16, 0.855, f"between\ncontexts\n{note}", fontsize=8.5, color=INK, va="top"
        )
    figure.text(
        0.012,
        0.975,
        "The same push: what the models share, and what it does to every context",
        fontsize=13,
        weight="bold",
        color=INK,
    )
    figure.text(
        0.085,
        0.632,
        "Δ log π of the next word (column) in every context (row)",
        fontsize=9.5,
        color=INK,
        weight="bold",
    )
    figure.text(0.012, 0.77, "‖K‖ of\ncontext ×\ncontext", fontsize=8.5, color=INK)
    bar = figure.add_axes((0.66, 0.633, 0.2, 0.012))
    scale = figure.colorbar(mesh, cax=bar, orientation="horizontal")
    scale.set_ticks([-1, -0.1, 0, 0.1, 1], labels=["−1", "−0.1", "0", "+0.1", "+1 nat"])
    scale.ax.minorticks_off()
    scale.outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2)
    return figure


def draw_longer(found: dict[str, Any]) -> Figure:
    """The squeeze by steps of training before the push, and by pushes."""
    figure = blank_figure(11.0, 6.0, "longer")
    panels = (
        (
            "longer",
            "steps",
            "others fall",
            "share of other words that fall",
            "Train longer: more others fall",
        ),
        ("longer", "steps", "others lose", "probability the others lose", "… and lose more"),
        ("longer", "steps", "moved elsewhere", "moved in other contexts together", "… and leak"),
        ("repeated", "pushes", "argmax", "probability of y*", "Push again: y* takes all"),
        ("repeated", "pushes", "entropy", "entropy in the context, nats", "… entropy goes"),
        (
            "repeated",
            "pushes",
            "moved elsewhere",
            "moved in other contexts together",
            "… and leaks on",
        ),
    )
    for place, (table, across, key, text, title) in enumerate(panels):
        line, column = divmod(place, 3)
        axes = figure.add_axes((0.06 + 0.305 * column, 0.585 - 0.485 * line, 0.235, 0.33))
        for kind in KINDS:
            rows = [r for r in found[table] if r["model"] == kind]
            x = [r[across] for r in rows]
            y = [r[key] for r in rows]
            spread = [r[f"{key} ±"] for r in rows]
            axes.plot(x, y, "-", color=COLOURS[kind], linewidth=1.8)
            axes.fill_between(
                x,
                [a - b for a, b in zip(y, spread, strict=True)],
                [a + b for a, b in zip(y, spread, strict=True)],
                color=COLOURS[kind],
                alpha=0.16,
                linewidth=0,
            )
            if place in (2, 5):
                axes.annotate(
                    kind,
                    (x[-1], y[-1]),
                    xytext=(4, -3),
                    textcoords="offset points",
                    fontsize=8.5,
                    color=COLOURS[kind],
                    weight="bold",
                    annotation_clip=False,
                )
        if table == "longer":
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(0, max(r["steps"] for r in found["longer"]))
        axes.set_xlabel(
            "steps of training before the push" if table == "longer" else "pushes of the same word",
            fontsize=8.5,
        )
        axes.set_ylabel(text, fontsize=8.5)
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
        axes.set_ylim(0, 1.02 if key in ("argmax", "others fall") else None)
        tidy(axes)
    return figure


# ---------------------------------------------------------------------------------------------
# The experiment


def run(
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
    length: int = 20_000,
    steps: int = 1500,
    pairs: int = 60,
    repeats: int = 30,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Runs the experiment.

    Args:
        out: Folder for everything.
        seed: Of all random numbers.
        progress: Show bars on standard error.
        length: Words of the text.
        steps: Of training (Adam on the whole text).
        pairs: Contexts and unseen words to push.
        repeats: Pushes of the same word.
        strength: η K[y, y] of a push.

    Returns:
        What results.json holds.
    """
    if length < 100 or steps < 2 or pairs < 4 or repeats < 1 or not strength > 0:
        raise ValueError(
            "length must be at least 100, steps 2, pairs 4, repeats 1 and strength positive, got "
            f"{length}, {steps}, {pairs}, {repeats} and {strength}"
        )
    options = {
        "length": length,
        "steps": steps,
        "pairs": pairs,
        "repeats": repeats,
        "strength": strength,
    }
    lab = Lab("bigram", Path(out), seed, options, progress)
    found = lab.once("pushes", lambda: measure(lab, length, steps, pairs, repeats, strength))
    for name in ("kernels", "longer", "repeated", "pairs"):
        lab.table(name, found[name])
    lab.table(
        "shown",
        [
            {
                "model": kind,
                "context": c,
                **{k: [float(f"{x:.4g}") for x in v[c]] for k, v in found["shown"][kind].items()},
            }
            for kind in KINDS
            for c in range(len(found["shown"][kind]["before"]))
        ],
    )
    lab.figure(
        "leak",
        draw_leak(found),
        "Above: ‖K‖ between contexts, darker is larger, white below 0.001 of the diagonal. Below: "
        "in a table the push stays in its row; features share it.",
    )
    lab.figure("longer", draw_longer(found), "Means over pairs, with 95 % intervals.")
    return _conclude(lab, found)


def _trend(found: dict[str, Any], kind: str, key: str, table: str = "longer") -> tuple[float, str]:
    """Last less first of a curve, and both ends in words."""
    rows = [r for r in found[table] if r["model"] == kind]
    return rows[-1][key] - rows[0][key], f"{rows[0][key]:.3g} → {rows[-1][key]:.3g}"


def _mean(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Of independent values, with the normal 95 % interval."""
    given = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(given.std()) / len(given) ** 0.5
    return float(given.mean()), (float(given.mean()) - half, float(given.mean()) + half)


def _conclude(lab: Lab, found: dict[str, Any]) -> dict[str, Any]:
    kernels = {row["model"]: row for row in found["kernels"]}
    pairs = {k: [r for r in found["pairs"] if r["model"] == k] for k in KINDS}
    poster = "poster §5, 2-gram example"
    nothing = "a picture; its content is not preserved"

    table, network = kernels["table"], kernels["network"]
    moved = max(r["moved elsewhere"] for r in pairs["table"])
    lab.claim(
        Claim(
            "table",
            "With logits of its own, a context keeps the squeeze to itself.",
            poster,
            nothing,
            f"{table['nonzero']} of {table['entries between contexts']:,} entries of K between "
            f"contexts are not zero; most that moved elsewhere: {moved:g}",
            verdict(table["nonzero"] == 0 and moved == 0.0),
            "explicit Jacobians, real steps",
            value=float(table["nonzero"]),
        )
    )
    leaks = {
        k: sum(r["moved elsewhere"] for r in v) / sum(r["moved here"] for r in v)
        for k, v in pairs.items()
    }
    beside, beside_range = _mean([r["moved elsewhere"] / r["moved here"] for r in pairs["network"]])
    lab.claim(
        Claim(
            "leak",
            "Through shared features it leaks to other contexts.",
            poster,
            nothing,
            f"per unit moved in its context {leaks['network']:.3g} moved elsewhere (factorised "
            f"{leaks['factorised']:.3g}); mean over pushes {beside:.3g}; "
            f"{network['nonzero'] / network['entries between contexts']:.1%} of the entries of K "
            "between contexts are not zero",
            verdict(beside_range[0] > 1),
            f"network, {len(pairs['network'])} pushes, total variation summed over all other "
            "contexts; refuted if the interval, over pushes, is not above 1: if no more moved in "
            "them together than in the pushed one",
            value=beside,
            interval=beside_range,
        )
    )
    share, share_range = _mean([r["label falls elsewhere"] for r in pairs["network"]])
    rises, _ = _mean([r["argmax rises elsewhere"] for r in pairs["network"]])
    lab.claim(
        Claim(
            "leak, squeeze",
            "What leaks is the squeeze: the pushed word falls there, too.",
            poster,
            nothing,
            f"the word falls in {100 * share:.3g} % of the other contexts, the pushed context's y* "
            f"rises in {100 * rises:.3g} %",
            verdict(share_range[0] > 0.95),
            "network; agrees if the interval, over pushes, lies above 95 %; contexts whose "
            "features point the other way move the other way",
            value=share,
            interval=share_range,
        )
    )
    middle, ranks = _mean([r["kernel rank correlation"] for r in pairs["network"]])
    lab.claim(
        Claim(
            "kernel",
            "It leaks most to contexts with a large ‖K‖.",
            "§2, Proposition 1",
            "the change is proportional to K",
            f"rank correlation of ‖K‖ and what moved, over contexts: {middle:.3f}",
            verdict(ranks[0] > _STRONG),
            f"network, mean over pushes; refuted if the interval is not above {_STRONG:g}",
            "",
            middle,
            ranks,
        )
    )
    for kind in KINDS:
        most = Share(sum(r["argmax gains most"] for r in pairs[kind]), len(pairs[kind]))
        lab.claim(
            Claim(
                f"argmax, {kind}",
                "The likeliest other word gains most.",
                "§3.3",
                "guaranteed to rise",
                f"{most}; it rises in {sum(r['argmax rises'] for r in pairs[kind])}",
                verdict(most.count == most.total) if kind == "table" else most.rule,
                "a theorem here, one softmax: refuted by one exception"
                if kind == "table"
                else "no theorem, features are shared between words, too: agrees if the interval "
                "lies above 95 %",
                "",
                most.value,
                most.interval,
            )
        )
    for kind in KINDS:
        fall, falls = _trend(found, kind, "others fall")
        lose, loses = _trend(found, kind, "others lose")
        first, last = (
            r
            for r in found["longer"]
            if r["model"] == kind and r["steps"] in (0, lab.options["steps"])
        )
        noise = first["others lose ±"] + last["others lose ±"]
        lab.claim(
            Claim(
                f"longer, {kind}",
                "Train longer → stronger.",
                poster,
                "an arrow",
                f"others that fall {falls}, probability they lose {loses}, for the same push",
                verdict(fall > 0 and lose > noise),
                f"0 to {lab.options['steps']} steps; both must grow, the second beyond its "
                "intervals",
                value=lose,
                interval=(lose - noise, lose + noise),
            )
        )
    for kind in KINDS:
        gain, gains = _trend(found, kind, "argmax", "repeated")
        _, entropies = _trend(found, kind, "entropy", "repeated")
        lab.claim(
            Claim(
                f"again, {kind}",
                "N repetitions make it stronger.",
                poster,
                "an arrow, N times",
                f"π(y*) {gains}, entropy {entropies} nats in {lab.options['repeats']} pushes",
                verdict(gain > 0),
                "mean over pushed words, real steps",
                value=gain,
            )
        )
    _, first = _trend(found, "network", "moved elsewhere")
    return lab.finish(
        [
            "In a table of logits K is block-diagonal by context: a negative step squeezes its own "
            "context and touches no other. Shared features carry it to other contexts.",
            "The longer the model was trained, and the more often the step is repeated, the "
            "stronger the squeeze.",
        ],
        [
            f"Of the table's K between contexts {table['nonzero']} entries are not zero, of the "
            f"network's {network['nonzero'] / network['entries between contexts']:.0%}.",
            f"The network moves {leaks['network']:.2g} of probability in other contexts for each 1 "
            f"in the pushed one; before training and after: {first}.",
            "Training longer makes the same push take more from other words in "
            + ", ".join(
                c.name.split(", ")[1]
                for c in lab.claims
                if c.name.startswith("longer") and c.verdict == "agrees"
            )
            + "; in the network the likeliest word gained most in "
            f"{next(c.ours for c in lab.claims if c.name == 'argmax, network').split(';')[0]}.",
        ],
    )
