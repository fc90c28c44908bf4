"""Do lddyn's features tell scikit-learn what training will do to responses that it did not see?

    python benchmarks/kernel_methods.py MODEL PAIRS.jsonl --out benchmarks/results/NAME.json

SFT on the chosen responses of some pairs, then DPO on these pairs. Measured is Δ log π of the
responses of *other* prompts. Kernel ridge regression, five folds over those prompts, learns the
change of some responses and foretells the others': from lddyn's features of their gradients, from
the model's hidden states, from words, from length. Beside it what needs no learning: the inner
product of a response's features with those of the data, Σ (g+ − g−), the first order of Eq. 7.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from pairs import arguments, finetune, load, read
from record import record
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, GroupKFold

import lddyn
from lddyn.probes.measure import measure


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one: similarities are cosines."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def hidden_states(model: Any, examples: list[lddyn.Example]) -> np.ndarray:
    """The mean state of each response below the head, centred."""
    found = []
    with torch.no_grad():
        for e in examples:
            ids = torch.tensor([e.ids])
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            found.append(states[list(e.positions)].mean(0).numpy())
    return np.stack(found) - np.mean(found, 0)


def by_ridge(described: np.ndarray, target: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Every response's change by a ridge that did not see its prompt; strength by inner folds."""
    kernel, out = described @ described.T, np.zeros_like(target)
    kernel *= len(kernel) / np.trace(kernel)
    ridge = KernelRidge(kernel="precomputed")
    for train, test in GroupKFold(5).split(target, groups=prompts):
        grid = GridSearchCV(ridge, {"alpha": np.logspace(-3, 2, 11)}, cv=5)
        mean = target[train].mean()
        grid.fit(kernel[np.ix_(train, train)], target[train] - mean)
        out[test] = grid.predict(kernel[np.ix_(test, train)]) + mean
    return out


def correlation(predicted: np.ndarray, target: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """Spearman's, with 95 % intervals by bootstrap over prompts."""
    generator, places = (
        np.random.default_rng(0),
        [np.flatnonzero(prompts == p) for p in set(prompts)],
    )
    drawn = []
    for _ in range(2000):
        picks = generator.integers(len(places), size=len(places))
        rows = np.concatenate([places[i] for i in picks])
        drawn.append(spearmanr(predicted[rows], target[rows])[0])
    low, high = np.quantile(drawn, [0.025, 0.975])
    rho = spearmanr(predicted, target)[0]
    return {"rho": float(rho), "low": float(low), "high": float(high)}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--learned", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    pairs = read(args.pairs, tokenizer, args.count, 192)
    learned, others = pairs[: args.learned], [e for pair in pairs[args.learned :] for e in pair]
    prompts = np.arange(len(others)) // 2
    finetune(model, learned, 3, 1e-3, 0)

    feats = lddyn.features(model, others, lddyn.Sketch(k=8192), by="sequence")
    sides = [[p[side] for p in learned] for side in (0, 1)]
    up, down = (lddyn.features(model, side, by="sequence", layout=feats.layout) for side in sides)
    x = feats.vectors().numpy()
    step = (up.vectors() - down.vectors()).sum(0).numpy()
    words = TfidfVectorizer().fit_transform(tokenizer.decode(e.response_ids) for e in others)
    length = np.log([[len(e)] for e in others])
    before, moved = measure(model, others).log_prob, []
    dpo = lddyn.Loss("dpo", beta=0.1)
    reference = torch.stack([measure(model, side).log_prob for side in sides])
    for seed in range(args.seeds):
        trained = copy.deepcopy(model)
        finetune(trained, learned, args.epochs, 1e-4, seed, dpo, reference=reference)
        moved.append((measure(trained, others).log_prob - before).numpy())
    target = np.mean(moved, 0)
    first = x @ step
    described = {
        "lddyn's features": unit(x),
        "hidden states": unit(hidden_states(model, others)),
        "words (tf-idf)": words.toarray(),
        "log length": length - length.mean(),
    }
    count = np.array([len(e) for e in others])
    ways: dict[str, dict[str, dict[str, float]]] = {}
    for kind, of in (("total", 1.0), ("per token", 1.0 / count)):
        measured = target * of
        found = {"first order, nothing learned": correlation(first * of, measured, prompts)}
        for name, rows in described.items():
            predicted = by_ridge(rows, measured, prompts)
            found[f"ridge on {name}"] = correlation(predicted, measured, prompts)
        ways[kind] = found
    record(
        args.out,
        "kernel methods",
        {
            "learned": len(learned),
            "responses": len(others),
            "seeds": args.seeds,
            "epochs": args.epochs,
            "mean": float(target.mean()),
            "sd": float(target.std()),
            "between_orders": float(np.corrcoef(moved)[0, 1:].mean()),
            "ways": ways,
            "points": [
                [round(float(v), 3) for v in row] for row in zip(first, target, strict=True)
            ],
        },
    )


if __name__ == "__main__":
    main()
