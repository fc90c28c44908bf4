"""Every loss that has a name of TRL's: its value and its gradient against TRL's own trainers.

The file runs with any tested TRL (0.24, 1.9, 1.16); what a version lacks is skipped by name.
docs/losses.md lists the results.
"""

import contextlib
import copy
import io
import warnings

import pytest
import torch
import transformers
import zoo

import lddyn
from lddyn.objectives import LOSSES

trl = pytest.importorskip("trl")
from packaging.version import Version  # noqa: E402

torch.set_num_threads(1)

OLD = Version(trl.__version__) < Version("1.0")
WORDS = [f"w{i}" for i in range(61)]
ROWS = [
    {"prompt": "w1 w5 w6", "chosen": " w7 w8", "rejected": " w9 w10 w11 w12 w13 w20"},
    {"prompt": "w2 w5", "chosen": " w30 w31 w32 w33 w34", "rejected": " w40"},
    {"prompt": "w3 w5 w9", "chosen": " w21", "rejected": " w22 w23 w24"},
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="module")
def policy():
    return zoo.build("llama").eval()


@pytest.fixture(scope="module")
def reference():
    return zoo.build("llama", seed=4).eval().requires_grad_(False)


def trainer_of(name, folder, tokenizer, rows, policy, reference=None, **options):
    """TRL's trainer of this name on these rows, quiet, with copies of the models."""
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(trl, f"{name}Trainer") and (name in ("DPO", "SFT", "KTO") or OLD):
            module = trl
        else:
            module = pytest.importorskip(f"trl.experimental.{name.lower()}")
        config, kind = getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")
        settings = {
            "per_device_train_batch_size": len(rows),
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        models = {"model": copy.deepcopy(policy)}
        if reference is not None:
            models["ref_model"] = copy.deepcopy(reference)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer = kind(
                **models,
                args=config(str(folder), **{**settings, **options}),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
    trainer.model.eval()
    return trainer


def trainers_answer(trainer, **options):
    """The loss of all rows as one batch, and its gradient by parameter name."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    trainer.model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = trainer.compute_loss(trainer.model, batch, **options)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in trainer.model.named_parameters()}


def our_answer(policy, objective):
    """The loss and its gradient by the objective's weights, through the plain model."""
    prepared = objective.prepare(lddyn.Anatomy(policy))
    each = [zoo.token_log_probs(policy, e) for e in prepared.examples]
    loss, weights = prepared.weights([lp.detach() for lp in each])
    total = sum((w * lp).sum() for w, lp in zip(weights, each, strict=True))
    named = dict(policy.named_parameters())
    return loss, dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def assert_same(trainer, policy, objective, **options):
    (expected, gradient), (loss, ours) = (
        trainers_answer(trainer, **options),
        our_answer(policy, objective),
    )
    assert loss == pytest.approx(expected, rel=2e-4, abs=1e-6)
    flat = torch.cat([g.flatten() for g in gradient.values()])
    other = torch.cat([ours[n].flatten() for n in gradient])
    assert float((flat - other).norm()) <= 1e-3 * float(flat.norm()) and float(flat.norm()) > 0


def pairs_of(trainer):
    """The trainer's own token ids as examples, (chosen, rejected)."""
    keys = "prompt_input_ids" if OLD else "prompt_ids"
    sides = [f"{side}_{'input_ids' if OLD else 'ids'}" for side in ("chosen", "rejected")]
    rows = list(trainer.train_dataset)
    return [[lddyn.Example(row[keys], row[side]) for row in rows] for side in sides]


def labelled(ids, labels):
    """An example of a whole sequence and its labels, −100 where a token does not count."""
    start = next(i for i, label in enumerate(labels) if label != -100)
    return lddyn.Example(ids[:start], ids[start:], [label != -100 for label in labels[start:]])


# ----- DPO

DPO_CASES = {
    **{name: ([name], {}) for name in LOSSES if LOSSES[name].trl.startswith("DPO")},
    "dpo": (["sigmoid"], {}),
    "robust, ε = 0.3": (["robust"], {"label_smoothing": 0.3}),
    "robust": (["robust"], {"label_smoothing": 0.1}),
    "exo_pair": (["exo_pair"], {"label_smoothing": 1e-3}),
    "aot, ε = 0.2": (["aot"], {"label_smoothing": 0.2}),
    "ipo, β = 0.5": (["ipo"], {"beta": 0.5}),
    "mixture": (["sigmoid", "sft"], {"loss_weights": [0.7, 0.4]}),
    "MPO": (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    "two losses": (["ipo", "hinge"], {"beta": 0.3}),
    "forward_kl": (["sigmoid"], {"f_divergence_type": "forward_kl"}),
    "js_divergence": (["sigmoid"], {"f_divergence_type": "js_divergence"}),
    "js_divergence, ipo": (["ipo"], {"f_divergence_type": "js_divergence"}),
    "alpha_divergence": (
        ["sigmoid"],
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
    ),
    "ld_alpha": (["sigmoid"], {"ld_alpha": 0.4}),
}


def dpo_trainer(folder, tokenizer, policy, reference):
    return trainer_of(
        "DPO", folder, tokenizer, ROWS, policy, reference, **({} if OLD else {"max_length": None})
    )


@pytest.fixture(scope="module")
def dpo(tmp_path_factory, tokenizer, policy, reference):
    return dpo_trainer(tmp_path_factory.mktemp("dpo"), tokenizer, policy, reference)


SET = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
}


def configure(trainer, names, options):
    """Give a trainer these loss types and options, as its __init__ would."""
    settings = {**SET, **options}
    weights = settings.pop("loss_weights")
    for key, value in settings.items():
        setattr(trainer, key, value)
        setattr(trainer.args, key, value)
    renamed = [{"aot_unpaired": "aot_pair"}.get(n, n) if OLD else n for n in names]
    trainer.loss_types = trainer.loss_type = renamed
    trainer.loss_weights = weights or [1.0] * len(names)
    if OLD:
        from trl.trainer.dpo_config import FDivergenceType

        trainer.f_divergence_type = FDivergenceType(settings["f_divergence_type"])
        from trl.trainer.utils import RunningMoments

        trainer.running = RunningMoments(trainer.accelerator)


@pytest.mark.case("a loss of TRL's DPOTrainer by its name")
@pytest.mark.parametrize("case", DPO_CASES)
def test_losses_of_the_dpo_trainer(dpo, policy, reference, case):
    names, options = DPO_CASES[case]
    if OLD and "sigmoid_norm" in names:
        pytest.skip(f"TRL {trl.__version__} has no sigmoid_norm")
    if OLD and case in ("forward_kl", "alpha_divergence", "ld_alpha"):
        pytest.skip(f"TRL {trl.__version__} has no {case}, or another formula of it")
    if OLD and case == "two losses":
        pytest.skip(f"TRL {trl.__version__} divides all log-probs by lengths where one loss is ipo")
    if case == "js_divergence, ipo" and Version(trl.__version__) < Version("1.16"):
        pytest.skip(f"TRL {trl.__version__} leaves log 2 out of js_divergence, which moves ipo")
    configure(dpo, names, options)
    given = {k: v for k, v in options.items() if k != "loss_weights"}
    if OLD and "bco_pair" in names:  # rewards are measured from their running mean
        chosen, rejected = pairs_of(dpo)
        values = [
            zoo.token_log_probs(m, e).sum().detach()
            for m in (policy, reference)
            for e in [*chosen, *rejected]
        ]
        half = len(values) // 2
        given["delta"] = 0.1 * float(
            torch.stack(values[:half]).sub(torch.stack(values[half:])).mean()
        )
    loss = lddyn.Loss(names, options.get("loss_weights"), **given)
    assert_same(dpo, policy, lddyn.preference(loss, *pairs_of(dpo), reference=reference))


def test_label_smoothing_of_sigmoid_is_cdpo_where_the_trainer_reads_it(dpo, policy, reference):
    """TRL 0.24 smooths sigmoid; later ones ignore label_smoothing there."""
    configure(dpo, ["sigmoid"], {"label_smoothing": 0.1})
    loss = lddyn.Loss("cdpo", label_smoothing=0.1) if OLD else lddyn.Loss("dpo")
    assert_same(dpo, policy, lddyn.preference(loss, *pairs_of(dpo), reference=reference))


@pytest.mark.case("the loss of like=trainer, its reference and rows included")
@pytest.mark.parametrize("names", [["ipo"], ["hinge", "sft"]])
def test_the_loss_of_like_trainer(dpo, names):
    """Token ids of the raw rows, loss and reference by the trainer alone."""
    from lddyn.objectives.like import objective_like

    configure(dpo, names, {"beta": 0.4})
    dpo.args.loss_type, dpo.args.loss_weights = names, None
    options = lddyn.RowOptions.like(dpo)
    rows = [lddyn.encode_row(dpo.processing_class, row, options=options) for row in ROWS]
    pairs = [(row["chosen"], row["rejected"]) for row in rows]
    objective = objective_like(lddyn.TrainerSettings.of(dpo), pairs, dpo.model)
    assert_same(dpo, dpo.model, objective)
    dec = lddyn.decompose(dpo.model, pairs[0], pairs, like=dpo)
    assert dec.loss == pytest.approx(trainers_answer(dpo)[0], rel=2e-4)


# ----- KTO


@pytest.mark.case("KTO on single responses with a label")
@pytest.mark.parametrize("kind", ["kto", "kto, z > 0", "apo_zero_unpaired"])
def test_losses_of_the_kto_trainer(tmp_path, tokenizer, policy, reference, kind):
    rows = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r, side in zip(ROWS, ("chosen", "rejected", "chosen"), strict=True)
    ]
    if "z" in kind.split():  # of two models one finds mismatched responses likelier
        policy, reference = copy.deepcopy(reference).requires_grad_(True), policy
    options = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    options["loss_type"] = kind.split(",")[0]
    trainer = trainer_of("KTO", tmp_path, tokenizer, rows, policy, reference, **options)
    dataset = list(trainer.train_dataset)
    if OLD:
        ours = [labelled(r["completion_input_ids"], r["completion_labels"]) for r in dataset]
    else:
        ours = [lddyn.Example(r["prompt_ids"], r["completion_ids"]) for r in dataset]
    labels = [bool(r["label"]) for r in dataset]
    objective = lddyn.KTO(ours, labels, reference=reference, **options)
    assert_same(trainer, policy, objective)
    if options["loss_type"] == "kto":
        assert (objective.prepare(lddyn.Anatomy(policy)).kl > 0) == ("z" in kind.split())


@pytest.mark.case("KTO on paired rows")
def test_kto_of_pairs_is_what_the_trainer_makes_of_paired_rows(
    tmp_path, tokenizer, policy, reference
):
    pairs = ROWS[:1]
    trainer = trainer_of(
        "KTO", tmp_path, tokenizer, pairs, policy, reference, per_device_train_batch_size=2
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = float(trainer.compute_loss(trainer.model, batch).detach())
    ids = [tokenizer(ROWS[0][k])["input_ids"] for k in ("prompt", "chosen", "rejected")]
    both = [lddyn.Example(ids[0], [*y, 1]) for y in ids[1:]]
    single = lddyn.KTO(both, [True, False], reference=reference)
    z = single.prepare(lddyn.Anatomy(policy)).kl
    objective = lddyn.preference("kto", *both, reference=reference, baseline=z)
    assert our_answer(policy, objective)[0] == pytest.approx(expected, rel=1e-4)


# ----- CPO, SimPO, ORPO

CPO_CASES = {
    "cpo": ("sigmoid", {"cpo_alpha": 1.0, "label_smoothing": 0.1}),
    "cpo_hinge": ("hinge", {"cpo_alpha": 0.0}),
    "cpo_ipo": ("ipo", {"cpo_alpha": 0.5}),
    "simpo": ("simpo", {"cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7}),
    "simpo, NLL": ("simpo", {"cpo_alpha": 0.3, "beta": 2.0, "simpo_gamma": 0.7}),
    "AlphaPO": ("simpo", {"cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.2, "alpha": 0.25}),
}


@pytest.fixture(scope="module")
def cpo(tmp_path_factory, tokenizer, policy):
    return trainer_of("CPO", tmp_path_factory.mktemp("cpo"), tokenizer, ROWS, policy)


def whole_pairs(trainer):
    rows = list(trainer.train_dataset)
    return [
        [labelled(r[f"{side}_input_ids"], r[f"{side}_labels"]) for r in rows]
        for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("case", CPO_CASES)
def test_losses_of_the_cpo_trainer(cpo, policy, case):
    kind, options = CPO_CASES[case]
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.5}
    for key, value in {**defaults, **options, "loss_type": kind}.items():
        setattr(cpo, key, value)
    objective = lddyn.preference(
        case.split(",")[0].replace("AlphaPO", "simpo"), *whole_pairs(cpo), **options
    )
    assert_same(cpo, policy, objective)


def test_the_loss_of_the_orpo_trainer(tmp_path, tokenizer, policy):
    trainer = trainer_of("ORPO", tmp_path, tokenizer, ROWS, policy, beta=0.3)
    assert_same(trainer, policy, lddyn.preference("orpo", *whole_pairs(trainer), beta=0.3))


# ----- SFT


@pytest.fixture(scope="module")
def sft(tmp_path_factory, tokenizer, policy):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    return trainer_of("SFT", tmp_path_factory.mktemp("sft"), tokenizer, rows, policy)


def sft_examples(trainer):
    found = []
    for row in trainer.train_dataset:
        labels = row.get("labels")
        if labels is None:
            mask = row["completion_mask"]
            labels = [i if m else -100 for i, m in zip(row["input_ids"], mask, strict=True)]
        found.append(labelled(list(row["input_ids"]), labels))
    return found


@pytest.mark.parametrize("items", [None, 40])
def test_the_loss_of_the_sft_trainer(sft, policy, items):
    """The mean over all tokens of the batch; num_items_in_batch counts all micro-batches."""
    examples = sft_examples(sft)
    count = sum(map(len, examples))
    objective = lddyn.SFT(examples)
    if items is not None:
        objective = lddyn.Objective(lambda lp: -torch.cat(lp).sum() / items, examples)
    given = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    assert_same(sft, policy, objective, **given)
    assert count == sum(len(r["chosen"].split()) + 1 for r in ROWS)


def test_dft_of_the_sft_trainer(tmp_path, tokenizer, policy):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    trainer = trainer_of("SFT", tmp_path, tokenizer, rows, policy, loss_type="dft")
    assert_same(trainer, policy, lddyn.SFT(sft_examples(trainer), loss_type="dft"))


@pytest.mark.case("tokens normalised over gradient accumulation")
def test_accumulation_is_one_batch_of_all_tokens(tmp_path, tokenizer, policy):
    """A real SGD step of the trainer over two micro-batches is the step of SFT on both."""
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS[:2]]
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    trainer = trainer_of("SFT", tmp_path, tokenizer, rows, policy, **options)
    examples = sft_examples(trainer)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer.train()
    _, gradient = our_answer(policy, lddyn.SFT(examples))
    after = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        step = parameter.detach() - 1e-2 * gradient[name]
        assert torch.allclose(after[name], step, atol=2e-5), name
