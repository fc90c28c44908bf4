"""Grams of loss gradients by other libraries, each called the way its users would.

A method takes a model and rows (token ids, of which those from `first` on are counted) and returns
⟨∇ Σ log π, ∇ Σ log π⟩ between all rows, with what it keeps of them and the parameters it sees. Loss
tokens of one sequence are rows with one counted token each: prefixes of that sequence. Their
batches are cut to the longest prefix, which is 0.6 of the work of whole replicas.

Runs wherever torch, transformers and the library are: none of this needs lddyn, except its rows.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

BATCH = 16  # rows: the fastest of 8, 16, 32 and 64 for most methods
IGNORED = -100


class Row(NamedTuple):
    """Token ids, of which those from `first` on are counted."""

    ids: list[int]
    first: int


class Answer(NamedTuple):
    """A Gram, the bytes kept to compare with more rows later, the parameters that count."""

    gram: Tensor
    stored: int
    covers: list[str]


@dataclass
class Method:
    """One way to the Gram.

    Attributes:
        run: (model, rows) -> Answer.
        env: Which interpreter runs it: a name for --python; "" for that of the driver.
        needs: The module that must be there.
        cases: "tokens" (loss tokens of one sequence), "sequences" (whole sequences), or both.
        exact: It estimates nothing.
        note: What a reader must know.
    """

    run: Callable[[nn.Module, list[Row]], Answer]
    env: str = ""
    needs: str = ""
    cases: tuple[str, ...] = ("tokens", "sequences")
    exact: bool = False
    note: str = ""

    @property
    def missing(self) -> bool:
        """Whether its package is not installed here."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


# --------------------------------------------------------------------------- rows and losses


def batches(rows: list[Row], size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (n, T) and labels (n, T) by batch: label t is predicted at t, or ignored."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        length = max(len(row.ids) for row in part) - 1
        ids = torch.zeros(len(part), length, dtype=torch.long)
        labels = torch.full((len(part), length), IGNORED)
        for i, row in enumerate(part):
            ids[i, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
            labels[i, row.first - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.first :])
        yield ids, labels


def losses(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """−Σ log π of each row; logits only from the first position that any row counts."""
    first = int((labels != IGNORED).any(0).nonzero()[0])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    return nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, first:], ignore_index=IGNORED, reduction="none"
    ).sum(1)


def loss_of_batch(model: nn.Module, batch: tuple[Tensor, Tensor], *_) -> Tensor:
    """`losses` of what `batches` yields."""
    return losses(model, batch[0], batch[1])


def names_of(model: nn.Module, kinds: tuple[type, ...]) -> list[str]:
    """Parameters of the modules of these kinds."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for own, _ in module.named_parameters(recurse=False)
    ]


def everything(model: nn.Module) -> list[str]:
    """All parameters."""
    return [name for name, _ in model.named_parameters()]


def nbytes(tensors) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def of_features(parts: list[Tensor], covers: list[str]) -> Answer:
    """The Gram of features (rows, …), summed over parts."""
    flat = [part.detach().flatten(1) for part in parts]
    return Answer(sum(f @ f.T for f in flat), nbytes(flat), covers)


def joined(batch_parts: list[list[Tensor]]) -> list[Tensor]:
    """Features of all batches, part by part."""
    return [torch.cat([b.detach().flatten(1) for b in part]) for part in zip(*batch_parts)]  # noqa: B905


def the_sequence(rows: list[Row]) -> Row:
    """The one sequence that loss-token rows are prefixes of."""
    return Row(rows[-1].ids, rows[0].first)


# --------------------------------------------------------------------------- lddyn


def lddyn_exact(model, rows: list[Row]) -> Answer:
    """The exact token Gram of one sequence."""
    import lddyn

    ids, first = the_sequence(rows)
    example = lddyn.Example(prompt_ids=ids[:first], response_ids=ids[first:])
    return Answer(lddyn.ntk(model, example, example).gram(), 0, everything(model))


def lddyn_sketch(k: int, **settings) -> Callable:
    """lddyn's features: of the tokens of one sequence, or of whole sequences."""

    def run(model, rows: list[Row]) -> Answer:
        import lddyn

        tokens = all(len(row.ids) == row.first + 1 for row in rows)
        used = [the_sequence(rows)] if tokens and len(rows) > 1 else rows
        examples = [
            lddyn.Example(prompt_ids=ids[:first], response_ids=ids[first:]) for ids, first in used
        ]
        found = lddyn.features(
            model,
            examples,
            lddyn.Sketch(k=k, seed=0, **settings),
            by="token" if tokens else "sequence",
        )
        return Answer(found.gram().value, nbytes([found.rows]), everything(model))

    return run


def lddyn_gradients(model, rows: list[Row]) -> Answer:
    """Gradients of whole sequences: rows with room for every number, so that none is sketched."""
    k = 8 * (model.num_parameters() + len(everything(model)))
    return lddyn_sketch(k)(model, rows)


# --------------------------------------------------------------------------- torch alone


def losses_of_tokens(model, rows: list[Row]) -> Iterator[Tensor]:
    """−Σ log π of each row, one at a time; those of one sequence's tokens share a forward pass."""
    if all(len(row.ids) == row.first + 1 for row in rows):
        ids, first = the_sequence(rows)
        inputs, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[first:])
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=len(targets)).logits[0]
        yield from nn.functional.cross_entropy(logits, targets, reduction="none")
    else:
        for ids, labels in batches(rows, 1):
            yield losses(model, ids, labels)[0]


def torch_loop(model, rows: list[Row]) -> Answer:
    """One backward pass a row, gradients kept, one product a parameter."""
    parameters = dict(model.named_parameters())
    kept: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses_of_tokens(model, rows):
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, found):  # noqa: B905
            kept[name].append(gradient.flatten())
    return of_features([torch.stack(g) for g in kept.values()], everything(model))


def torch_batched(model, rows: list[Row]) -> Answer:
    """One forward pass, hooks, is_grads_batched, factors paired: by hand, for a Llama."""
    from opponents import Tokens, batched_factors, contract

    ids, first = the_sequence(rows)
    factors = batched_factors(model, Tokens(ids[:first], ids[first:]))
    return Answer(contract(factors, factors), 0, everything(model))


# --------------------------------------------------------------------------- exact libraries


def opacus(model, rows: list[Row]) -> Answer:
    """Per-sample gradients by its hooks, and by its functional fallback for the norms."""
    from opacus import GradSampleModule

    module = GradSampleModule(model.train(), loss_reduction="sum")  # hooks need training mode
    parts = []
    for batch in batches(rows):
        loss_of_batch(module, batch).sum().backward()
        parts.append([p.grad_sample for p in module.parameters()])
        module.zero_grad()  # also drops the samples
    return of_features(joined(parts), everything(model))


def torchjd_replicas(model, rows: list[Row]) -> Answer:
    """Its autogram on a batch of rows."""
    from torchjd.autogram import Engine

    ((ids, labels),) = batches(rows, len(rows))
    gram = Engine(model, batch_dim=0).compute_gramian(losses(model, ids, labels))
    return Answer(gram, 0, everything(model))


def torchjd_tokens(model, rows: list[Row]) -> Answer:
    """Its autogram on the token losses of one sequence: one forward pass, no replicas."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=None)  # first: it records the forward pass
    values = torch.stack(list(losses_of_tokens(model, rows)))
    return Answer(engine.compute_gramian(values), 0, everything(model))


def dattri_llm(mode: str = "", rank: int = 0) -> Callable:
    """dattri-llm's hooks; exact by similarity, norms declared by hand, or LoGra of rank²."""

    def run(model, rows: list[Row]) -> Answer:
        from dattri_llm.gradient.callbacks import HookManagerCallback
        from dattri_llm.gradient.hooks import REGISTER_ALL, HookManager, HookManagerConfig

        class Keep(HookManagerCallback):
            def on_step_end(self, record) -> None:
                self.gradient = record.gradient

        keep, settings = Keep(), {}
        covers = names_of(model, (nn.Linear, nn.Embedding))
        if rank:
            settings = {
                "projection_kwargs": {"__default__": {"proj_dim": rank, "proj_max_batch_size": 64}}
            }
            settings["capture_style"] = "materialized"
        else:
            norms = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
            covers = everything(model)
            settings = {
                "hook_types": dict.fromkeys(norms, "linear_io"),
                "layer_types": dict.fromkeys(norms, "nn.RMSNorm"),
                "module_kwargs": {
                    n: {
                        "has_bias": False,
                        "normalized_shape": tuple(m.weight.shape),
                        "eps": m.variance_epsilon,
                    }
                    for n, m in norms.items()
                },
            }
        config = HookManagerConfig(linear_io=REGISTER_ALL, **settings)
        manager, parts = HookManager(model, config, [keep]), []
        with manager.collect(deregister_on_exit=True):
            for batch in batches(rows, BATCH if rank else len(rows)):
                loss_of_batch(model, batch).sum().backward()
                model.zero_grad()
                parts.append(keep.gradient)
        if rank:
            layers = sorted(parts[0].data)
            return of_features(joined([[part.data[x] for x in layers] for part in parts]), covers)
        gradient = parts[0]
        gram = gradient.similarity(gradient, reduce="all", mode=mode).detach()
        return Answer(gram, gradient.nbytes, covers)

    return run


def kronfluence(rank: int | None) -> Callable:
    """Pairwise scores of all rows with themselves, identity in place of the inverse Hessian."""

    def run(model, rows: list[Row]) -> Answer:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Loss(Task):
            def compute_train_loss(self, batch, model, sample=False):
                return loss_of_batch(model, batch).sum()

            def compute_measurement(self, batch, model):
                return loss_of_batch(model, batch).sum()

        task, covers = Loss(), names_of(model, (nn.Linear,))
        ready = prepare_model(model, task)

        def collate(some):
            return next(batches(some, len(some)))

        from kronfluence.utils.dataset import DataLoaderKwargs

        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "peers",
                ready,
                task,
                cpu=True,
                output_dir=folder,
                disable_tqdm=True,
                log_level=40,
            )
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
            analyzer.fit_all_factors(
                "identity",
                rows,
                per_device_batch_size=BATCH,
                factor_args=FactorArguments(strategy="identity"),
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "identity",
                rows,
                rows,
                per_device_query_batch_size=len(rows),
                per_device_train_batch_size=BATCH,
                score_args=ScoreArguments(
                    query_gradient_low_rank=rank,
                    damping_factor=0.0,
                    query_gradient_accumulation_steps=1,
                ),
            )
            gram = analyzer.load_pairwise_scores("scores")["all_modules"]
        weights = [m for m in model.modules() if isinstance(m, nn.Linear)]
        per_row = sum(rank * sum(m.weight.shape) if rank else m.weight.numel() for m in weights)
        return Answer(gram, 4 * len(rows) * per_row, covers)

    return run


# --------------------------------------------------------------------------- sketches


def bergson(projection: int, target: str = "per_module", tokens: bool = False) -> Callable:
    """bergson's collector in memory; `tokens`: what it calls per-token, of one sequence."""

    def run(model, rows: list[Row]) -> Answer:
        from bergson.collector.collector import CollectorComputer
        from bergson.collector.in_memory_collector import InMemoryCollector
        from bergson.config import IndexConfig
        from bergson.gradients import GradientProcessor
        from datasets import Dataset

        used = [the_sequence(rows)] if tokens else rows
        with tempfile.TemporaryDirectory() as folder:
            config = IndexConfig(
                run_path=f"{folder}/run",
                attribute_tokens=tokens,
                projection_dim=projection,
                projection_target=target,
            )
            Path(config.partial_run_path).mkdir()
            data = Dataset.from_dict(
                {
                    "input_ids": [row.ids for row in used],
                    "labels": [[IGNORED] * r.first + r.ids[r.first :] for r in used],
                    "length": [len(row.ids) for row in used],
                }
            )
            processor = GradientProcessor(
                projection_dim=projection or None, projection_target=target, projection_seed=0
            )
            collector = InMemoryCollector(
                model=model, data=data, cfg=config, processor=processor, skip_hessians=True
            )
            order = [list(range(i, min(i + BATCH, len(used)))) for i in range(0, len(used), BATCH)]
            computer = CollectorComputer(
                model, data, collector=collector, batches=order, cfg=config
            )
            computer.run_with_collector_hooks(desc="rows")
        return of_features(list(collector.gradients.values()), names_of(model, (nn.Linear,)))

    return run


def dattri_logra(size: int) -> Callable:
    """dattri's LoGra: the gradients that its cache() keeps."""

    def run(model, rows: list[Row]) -> Answer:
        from dattri.algorithm.logra import LoGraAttributor
        from dattri.task import AttributionTask

        covers = names_of(model, (nn.Linear,))

        def loss(model, batch, device):
            return losses(model, batch["input_ids"], batch["labels"]).sum()

        def collate(some):  # a dictionary: it takes the first row alone of anything else
            return dict(zip(("input_ids", "labels"), next(batches(some, len(some)))))  # noqa: B905

        task = AttributionTask(loss, model, checkpoints=model.state_dict())
        attributor = LoGraAttributor(task, hessian="Identity", proj_dim=size, device="cpu")
        loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, collate_fn=collate)
        attributor.cache(loader)
        count = len(loader)
        parts = [attributor.offload_manager.retrieve_gradients(i) for i in range(count)]
        return of_features(joined(parts), covers)

    return run


def logix(rank: int) -> Callable:
    """LogIX's gradient log behind its random LoRA."""

    def run(model, rows: list[Row]) -> Answer:
        from logix import LogIX
        from logix.config import LoRAConfig

        covers, parts = names_of(model, (nn.Linear,)), []
        with tempfile.TemporaryDirectory() as folder:
            log = LogIX("peers")
            log.log_dir = log.config.log_dir = folder
            log.watch(model)
            log.add_lora(lora_config=LoRAConfig(init="random", rank=rank))
            log.setup({"grad": ["log"]})
            for batch in batches(rows):
                with log(data_id=[str(i) for i in range(len(batch[0]))]):
                    loss_of_batch(model, batch).sum().backward()
                found = log.get_log(copy=True)[1]
                model.zero_grad()
                parts.append([found[name]["grad"] for name in sorted(found)])
        return of_features(joined(parts), covers)

    return run


def tensor_sketch(size: int) -> Callable:
    """step-decomposed-influence: TensorSketch of `size` numbers a matrix."""

    def run(model, rows: list[Row]) -> Answer:
        from sdi.estimators import ProjectedTracInSDI

        kinds = (nn.Linear, nn.Embedding)
        estimator = ProjectedTracInSDI(
            model=model,
            target_modules=[m for m in model.modules() if isinstance(m, kinds)],
            projection_size=size,
            seed=0,
            loss_reduction="sum",
            expected_steps=1,
        )
        found = estimator.featurize_loader(loader=batches(rows), loss_fn=loss_of_batch)
        estimator.close()
        return of_features(list(found.phi.values()), names_of(model, kinds))

    return run


def trak(size: int) -> Callable:
    """TRAK's features by its projector for CPU; its own scale undone, which is known."""

    def run(model, rows: list[Row]) -> Answer:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput

        class LogProb(AbstractModelOutput):
            def __init__(self) -> None:
                pass

            @staticmethod
            def get_output(model, weights, buffers, ids, labels):
                logits = torch.func.functional_call(
                    model, (weights, buffers), (ids[None],), {"use_cache": False}
                ).logits[0]
                return nn.functional.cross_entropy(
                    logits, labels, ignore_index=IGNORED, reduction="sum"
                )

            def get_out_to_loss_grad(self, model, weights, buffers, batch):
                return torch.ones(len(batch[0]), 1)

        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                model,
                LogProb(),
                len(rows),
                save_dir=folder,
                device="cpu",
                proj_dim=size,
                use_half_precision=False,
                logging_level=40,
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            # One batch: its projector is the cost, and is made again for every batch.
            for batch in batches(rows, len(rows)):
                traker.featurize(batch, num_samples=len(batch[0]))
            found = torch.from_numpy(traker.saver.current_store["grads"][:].copy())
        scale = (traker.num_params_for_grad / size) ** 0.5
        return of_features([found * scale], everything(model))

    return run


LIGHT, BERGSON, LOGIX = "peers", "bergson", "logix"  # environments: see docs/peers.md
TOKENS = ("tokens",)
METHODS = {
    "lddyn": Method(lddyn_exact, cases=TOKENS, exact=True),
    "lddyn, gradients": Method(
        lddyn_gradients, needs="lddyn.features", cases=("sequences",), exact=True
    ),
    # About as many numbers as 8 × 8 and 45 × 45 a layer.
    "lddyn, two-sided 1920": Method(lddyn_sketch(1920), needs="lddyn.features"),
    "lddyn, two-sided 60000": Method(lddyn_sketch(60000), needs="lddyn.features"),
    "lddyn, TensorSketch 1920": Method(
        lddyn_sketch(1920, kind="tensorsketch"), needs="lddyn.features"
    ),
    "lddyn, sparse 1920": Method(lddyn_sketch(1920, kind="sjlt"), needs="lddyn.features"),
    "lddyn, TensorSketch 60000": Method(
        lddyn_sketch(60000, kind="tensorsketch"), needs="lddyn.features"
    ),
    "torch, factors by hand": Method(torch_batched, cases=TOKENS, exact=True),
    "torch, loop": Method(torch_loop, exact=True),
    "opacus": Method(opacus, LIGHT, "opacus", exact=True),
    "torchjd, one forward": Method(torchjd_tokens, LIGHT, "torchjd", TOKENS, exact=True),
    "torchjd": Method(torchjd_replicas, LIGHT, "torchjd", exact=True),
    "dattri-llm": Method(dattri_llm("auto"), LIGHT, "dattri_llm", exact=True),
    "dattri-llm, factored": Method(dattri_llm("factorized"), LIGHT, "dattri_llm", exact=True),
    "kronfluence": Method(kronfluence(None), LIGHT, "kronfluence", exact=True),
    "bergson": Method(bergson(0), BERGSON, "bergson", exact=True),
    "kronfluence, rank 8": Method(kronfluence(8), LIGHT, "kronfluence"),
    "bergson, 8 × 8": Method(bergson(8), BERGSON, "bergson"),
    "bergson, 45 × 45": Method(bergson(45), BERGSON, "bergson"),
    "bergson, global 256": Method(bergson(256, "global"), BERGSON, "bergson"),
    "dattri-llm, LoGra 8": Method(dattri_llm(rank=8), LIGHT, "dattri_llm"),
    "dattri-llm, LoGra 45": Method(dattri_llm(rank=45), LIGHT, "dattri_llm"),
    "dattri, LoGra 64": Method(dattri_logra(64), LIGHT, "dattri"),
    "dattri, LoGra 2025": Method(dattri_logra(2025), LIGHT, "dattri"),
    "LogIX, rank 8": Method(logix(8), LOGIX, "logix"),
    "LogIX, rank 45": Method(logix(45), LOGIX, "logix"),
    "TensorSketch 64": Method(tensor_sketch(64), LIGHT, "sdi"),
    "TensorSketch 2048": Method(tensor_sketch(2048), LIGHT, "sdi"),
    "TRAK, 2048": Method(trak(2048), LIGHT, "trak"),
}


def main(name: str, folder: Path) -> None:
    """Writes the Gram of the rows of a folder (`model`, `rows.json`) by one method, `gram.npy`."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    rows = [Row(*row) for row in json.loads((folder / "rows.json").read_text())]
    answer = METHODS[name].run(model.eval(), rows)
    np.save(folder / "gram.npy", answer.gram.detach().double().numpy())
    print(json.dumps({"bytes_per_row": answer.stored / len(rows)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
