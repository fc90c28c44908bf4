"""Where the objectives push: fields on the simplex, and descent of a softmax of many labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lddyn.lab.objectives.residuals import (
    CHOSEN,
    OBJECTIVES,
    REJECTED,
    SETTINGS,
    build,
    coefficients,
)
from lddyn.lab.record import Lab, Row
from lddyn.steps.flow import softmax_step


def pushes(
    name: str, good: Tensor, bad: Tensor, reference: Tensor, chosen: int, rejected: int
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """A step's coefficients on the softmax at χ+, on that at χ−, and (c+, c−).

    Args:
        name: Of the objective.
        good: log π at χ+, (V,).
        bad: log π at χ−, (V,).
        reference: log π_ref of both, (V,).
        chosen: y+.
        rejected: y−.
    """
    objective = build(
        name,
        CHOSEN,
        REJECTED,
        (float(reference[chosen]), float(reference[rejected])),
        SETTINGS[name],
    )
    c = coefficients(objective, [good[chosen, None], bad[rejected, None]])
    on_good, on_bad = torch.zeros_like(good), torch.zeros_like(bad)
    on_good[chosen], on_bad[rejected] = c[0], -c[1]
    return on_good, on_bad, c


def descend(
    name: str, start: Tensor, chosen: int, rejected: int, steps: int, *, shared: bool
) -> list[tuple[Tensor, tuple[float, float]]]:
    """Gradient descent on logits: log π at χ− and (c+, c−) before every step.

    The learning rate makes |c+| + |c−| of the first step 0.1 for every objective. `shared`: y+ and
    y− are labels of one softmax, as first tokens of two responses are; else each has its own,
    which begin alike, as later tokens have.
    """
    good = bad = start
    on_good, on_bad, _ = pushes(name, good, bad, start, chosen, rejected)
    rate = 0.1 / float(on_good.abs().sum() + on_bad.abs().sum())
    path = []
    for _ in range(steps + 1):
        on_good, on_bad, c = pushes(name, good, bad, start, chosen, rejected)
        path.append((bad, c))
        if shared:
            good = bad = bad + softmax_step(bad, rate * (on_good + on_bad))
        else:
            good = good + softmax_step(good, rate * on_good)
            bad = bad + softmax_step(bad, rate * on_bad)
    return path


STARTS = {"valley": (0.12, 0.03, 0.85), "peak": (0.3, 0.5, 0.2)}  # π of y+, y−, the other


def fields(lab: Lab, resolution: int = 12) -> Row:
    """dπ on the simplex and the path from the reference, by objective and start."""
    by_start: Row = {}
    for where, point in STARTS.items():
        start = torch.tensor(point, dtype=torch.float64).log()
        by_start[where] = {}
        for name in lab.bar(OBJECTIVES, f"simplex, {where}"):
            arrows = []
            for i in range(1, resolution):
                for j in range(1, resolution - i):
                    probs = torch.tensor([i, j, resolution - i - j]).double() / resolution
                    on_good, on_bad, _ = pushes(name, probs.log(), probs.log(), start, 0, 1)
                    on = on_good + on_bad
                    move = on - on.sum() * probs
                    arrows.append([*probs.tolist(), *(probs * (move - probs @ move)).tolist()])
            path = descend(name, start, 0, 1, 250, shared=True)[::5]
            by_start[where][name] = {"arrows": arrows, "path": [p.exp().tolist() for p, _ in path]}
    return by_start


# Which label y− is: unlikely; the model's second choice; its own answer, as on-policy samples
# mostly are; and unlikely, in one softmax with y+.
SITUATIONS = ("valley", "second", "likeliest", "valley, same context")


def flows(lab: Lab, labels: int, steps: int) -> Row:
    """Curves of y−, y* and the other labels of the softmax at χ−, under each objective."""
    logits = 2.5 * torch.randn(labels, generator=lab.generator("flow"), dtype=torch.float64)
    start = logits.log_softmax(-1)
    order = start.argsort(descending=True).tolist()
    chosen = order[3]
    curves, summary = [], []
    for where in SITUATIONS:
        rejected = order[{"second": 1, "likeliest": 0}.get(where, int(0.8 * labels))]
        star = order[0] if rejected != order[0] else order[1]
        others = torch.ones(labels, dtype=torch.bool)
        others[[star, chosen, rejected]] = False
        for name in lab.bar(OBJECTIVES, where):
            path = descend(name, start, chosen, rejected, steps, shared="same" in where)
            for step in range(0, steps + 1, max(1, steps // 25)):
                now, c = path[step]
                values = {"y-": now[rejected], "y*": now[star], "others": now[others].logsumexp(0)}
                curves.append(
                    {
                        "situation": where,
                        "objective": name,
                        "step": step,
                        "c-": _digits(c[1]),
                        **{k: _digits(float(v)) for k, v in values.items()},
                    }
                )
            (first, c), (end, last) = path[0], path[-1]
            summary.append(
                {
                    "situation": where,
                    "objective": name,
                    "c- at the start": c[1],
                    "c- at the end": last[1],
                    "change of log y-": float((end - first)[rejected]),
                    "change of log others": float((end - first)[others].mean()),
                    "change of y*": float(end[star].exp() - first[star].exp()),
                    "others that fall": float((end < first)[others].double().mean()),
                }
            )
    return {"curves": curves, "summary": summary}


def _digits(value: float) -> float:
    """As precise as a picture."""
    return float(f"{value:.5g}")
