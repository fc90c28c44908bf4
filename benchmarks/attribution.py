"""lddyn's features inside dattri's attributor, judged by dattri's LDS beside dattri's LoGra.

    python benchmarks/attribution.py MODEL PAIRS.jsonl --out benchmarks/results/NAME.json

Needs `pip install dattri==0.3.0`. SFT on half of the training responses, many halves; the truth is
log π of held-out responses after each. A score of (training, test) pairs is as good as its sums
over each half order those: the linear datamodeling score, Spearman's ρ per test response, averaged.

LoGra's gradients are those that its cache keeps, of training and test responses alike: scores of
its own `attribute` have nothing in common with exact ones here (rank correlation 0.05, of these
0.82).
"""

from __future__ import annotations

import copy
import logging
import warnings

import torch
from dattri.algorithm.base import BaseInnerProductAttributor
from dattri.algorithm.logra import LoGraAttributor
from dattri.metric import lds
from dattri.task import AttributionTask
from pairs import arguments, finetune, load, read
from peer_methods import Row, batches, joined, losses
from record import record
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lddyn
from lddyn.probes.measure import measure


class Inner(BaseInnerProductAttributor):
    """Its inner product, of rows made elsewhere; damped as influence is, or plain (None)."""

    def __init__(self, task: AttributionTask, train: Tensor, test: Tensor, damping: float | None):
        super().__init__(task)
        self.train, self.test, self.damping = train, test, damping

    def generate_train_rep(self, ckpt_idx: int, data: tuple[Tensor, ...]) -> Tensor:
        return self.train[data[0][0]]

    def generate_test_rep(self, ckpt_idx: int, data: tuple[Tensor, ...]) -> Tensor:
        return self.test[data[0][0]]

    def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
        """(XᵀX/n + λ)⁻¹ x by Woodbury, λ in units of the mean ‖row‖²/n."""
        if self.damping is None:
            return test_rep
        x, n = self.train, len(self.train)
        gram = x @ x.T / n
        scale = self.damping * gram.diagonal().mean()
        inside = torch.linalg.solve(gram + scale * torch.eye(n), x @ test_rep.T / n)
        return (test_rep - inside.T @ x) / scale


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--halves", type=int, default=32)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start, tokenizer = load(args.model)
    pairs = read(args.pairs, tokenizer, args.train + args.test, 160)
    train, test = pairs[: args.train], pairs[args.train :]

    generator, halves, truth = torch.Generator().manual_seed(0), [], []
    for seed in range(args.halves):
        half = torch.randperm(len(train), generator=generator)[: len(train) // 2]
        model = copy.deepcopy(start)
        finetune(model, [train[i] for i in half], 3, 1e-4, seed)
        halves.append(half)
        truth.append(measure(model, [p[0] for p in test]).log_prob)
        print(seed, float(truth[-1].mean()), flush=True)
    ground = torch.stack(truth).double(), torch.stack(halves)
    model = copy.deepcopy(start)
    finetune(model, train, 3, 1e-4, 0)

    task = AttributionTask(
        lambda model, batch, device: losses(model, batch["input_ids"], batch["labels"]).sum(),
        model,
        checkpoints=model.state_dict(),
    )
    sides = [[p[0] for p in side] for side in (train, test)]
    places = [
        DataLoader(TensorDataset(torch.arange(len(side))), batch_size=len(side)) for side in sides
    ]
    both = sides[0] + sides[1]
    feats = lddyn.features(model, both, lddyn.Sketch(k=8192), by="sequence").vectors()
    rows = [Row(list(e.ids), len(e.prompt_ids)) for e in both]

    def collate(some: list[Row]) -> dict[str, Tensor]:
        return dict(zip(("input_ids", "labels"), next(batches(some, len(some))), strict=True))

    loader = DataLoader(rows, batch_size=8, collate_fn=collate)
    logra = LoGraAttributor(task, hessian="Identity", proj_dim=2025, device="cpu")
    logra.cache(loader)
    parts = [logra.offload_manager.retrieve_gradients(i) for i in range(len(loader))]
    n, scores = len(train), {}
    for maker, x in (("lddyn", feats), ("dattri's LoGra", torch.cat(joined(parts), 1))):
        for name, damping in (("plain", None), ("damped 0.1", 0.1), ("damped 1", 1.0)):
            scores[f"{maker}, {name}"] = Inner(task, x[:n], x[n:], damping).attribute(*places)
    result = {}
    for name, score in scores.items():
        rho = lds(score.double(), ground)[0]
        picks = torch.randint(len(rho), (2000, len(rho)), generator=generator)
        low, high = rho[picks].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        result[name] = {"lds": float(rho.mean()), "low": low, "high": high}
        print(name, result[name], flush=True)
    record(
        args.out,
        "attribution",
        {
            "train": len(train),
            "test": len(test),
            "halves": len(halves),
            "ways": result,
            "numbers": {"lddyn": feats.shape[1], "LoGra": sum(x.shape[1] for x in joined(parts))},
        },
    )


if __name__ == "__main__":
    main()
