"""Weights of rows in trainers of TRL: rows left out and repeated, parts, processes, refusals."""

import copy
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.nn.functional import cross_entropy
from watched_runs import new_model, rows

import lddyn

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

SETTINGS = {
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}
UNEVEN = [0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.25, 0.25]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from watched_runs import WORDS

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{w: i + 3 for i, w in enumerate(WORDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    found.chat_template = (
        "{% for m in messages %}{{ ' ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + ' <eos>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    return found


def completions():
    """Rows of SFT, with 2 to 9 tokens to learn."""
    words = [row["chosen"] for row in rows(8)]
    return [
        {"prompt": row["prompt"], "completion": "".join(words[: 1 + i % 3])[: 9 + 8 * (i % 4)]}
        for i, row in enumerate(rows(8))
    ]


def chats():
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in completions()
    ]


def labelled():
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 != 1}
        for i, row in enumerate(rows(8))
    ]


def scorer():
    import transformers

    torch.manual_seed(0)
    config = copy.deepcopy(new_model(dropout=0.0).config)
    config.num_labels = 1
    return transformers.LlamaForSequenceClassification(config)


def make(kind, folder, tokenizer, data, **options):
    """A trainer of TRL on these rows."""
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    else:
        name = {"sft": "SFT", "kto": "KTO", "reward": "Reward", "dpo": "DPO"}[kind]
        Config, Trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    model = scorer() if kind == "reward" else new_model(dropout=0.0)
    more = {"ref_model": new_model(seed=1, dropout=0.0)} if kind in ("dpo", "kto") else {}
    return Trainer(
        model,
        args=Config(str(folder), **{**SETTINGS, **options}),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        **more,
    )


def moved(kind, folder, tokenizer, data, weights=None, normalise=True, **options):
    """Δθ of a run, and the losses that it logs; without weights it is the trainer's own."""
    if weights is not None:
        data = [{**row, "weight": w} for row, w in zip(data, weights, strict=True)]
    trainer = make(kind, folder, tokenizer, data, **options)
    if weights is not None:
        lddyn.integrations.trl.weighted(trainer, normalise=normalise)
    before = flat(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return flat(trainer.model) - before, losses


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def close(one, other):
    return float((one - other).norm() / other.norm()) < 1e-4


ROWS = {
    "sft": completions,
    "kto": labelled,
    "reward": lambda: rows(8),
    "cpo": lambda: rows(8),
    "dpo": lambda: rows(8),
}
KINDS = {
    "sft": ("sft", {}),
    "sft, padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft, prompts counted": ("sft", {"completion_only_loss": False}),
    "sft, dft": ("sft", {"loss_type": "dft"}),
    "sft, tokens counted apart": ("sft", {"average_tokens_across_devices": False}),
    "kto": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "reward": ("reward", {"center_rewards_coefficient": 0.1}),
    "cpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "dpo": ("dpo", {}),
    "dpo, a sum": ("dpo", {"loss_type": ["sigmoid", "bco_pair"]}),
    "dpo, ipo": ("dpo", {"loss_type": "ipo"}),
}


@pytest.fixture
def run(tmp_path, tokenizer):
    def run(name, data, *args, **more):
        kind, options = KINDS[name]
        options = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        return moved(kind, tmp_path, tokenizer, data, *args, **{**options, **more})

    return run


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_rows_of_weight_1_and_2(name, run):
    data = ROWS[KINDS[name][0]]()
    # Weights of 1 are the trainer's own run, logged losses included, to the bit.
    ones, own = run(name, data, [1.0] * 8), run(name, data)
    assert torch.equal(ones[0], own[0]) and ones[1] == own[1]
    # A weight of 2 is the row written twice, in one batch of all.
    twice = run(name, data, [2.0, 1, 1, 0, 1, 2, 1, 0], gradient_accumulation_steps=8)
    copies = [data[i] for i in (0, 0, 1, 2, 4, 5, 5, 6)]
    assert close(twice[0], run(name, copies, gradient_accumulation_steps=8)[0])
    # The logged loss is that of the rows without weights.
    assert twice[1] == pytest.approx([sum(own[1]) / 2], rel=0.05)


@pytest.mark.case("a column of row weights, which TRL ignores")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_rows_are_left_out_and_parts_count_together(name, run):
    data = ROWS[KINDS[name][0]]()
    # Weights of 0 and 1: the run without the rows, to the bit.
    zeros = run(name, data, [1, 0, 0, 1, 0, 1, 1, 0])[0]
    kept = [data[i] for i in (0, 3, 5, 6)]
    assert torch.equal(zeros, run(name, kept, gradient_accumulation_steps=2)[0])
    # Parts of a step count together, and so do rows of a part.
    parts = run(name, data, UNEVEN)[0]
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert close(run(name, data, UNEVEN, **one)[0], parts) and not close(zeros, parts)


def test_tiny_weights_are_those_of_their_ratio(tmp_path, tokenizer):
    """Where the weighted count of tokens is below 1, by which the trainer would not divide."""
    options = {"per_device_train_batch_size": 8}
    one = moved("sft", tmp_path, tokenizer, completions(), UNEVEN, **options)[0]
    tiny = [w * 1e-4 for w in UNEVEN]
    assert close(moved("sft", tmp_path, tokenizer, completions(), tiny, **options)[0], one)
    none = moved("sft", tmp_path, tokenizer, completions(), [0.0] * 8, **options)[0]
    assert not none.any()
    own = moved("sft", tmp_path, tokenizer, completions(), [1e-4] * 8, normalise=False, **options)
    whole = moved("sft", tmp_path, tokenizer, completions(), **options)[0]
    assert float(own[0].norm() / whole.norm()) == pytest.approx(1e-4, rel=0.05)


def test_sft_is_that_of_autograd(tmp_path, tokenizer):
    """Assistant tokens alone, one step: Σ a ℓ over Σ a of the tokens, written here."""
    options = {"per_device_train_batch_size": 8, "assistant_only_loss": True}
    found = moved("sft", tmp_path, tokenizer, chats(), UNEVEN, **options)[0]
    model, total, count = new_model(dropout=0.0), 0.0, 0.0
    for row, weight in zip(chats(), UNEVEN, strict=True):
        made = tokenizer.apply_chat_template(
            row["messages"], return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = (torch.tensor(made[k]) for k in ("input_ids", "assistant_masks"))
        labels = torch.where(mask.bool(), ids, -100)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + weight * cross_entropy(logits, labels, reduction="sum")
        count += weight * int((labels != -100).sum())
    before = flat(model)
    (total / count).backward()
    torch.optim.SGD(model.parameters(), 1e-2).step()
    assert close(found, flat(model) - before)


def test_ktos_baseline_is_that_of_all_rows(tmp_path, tokenizer):
    """A weight scales its row's gradient, at the baseline that the trainer estimates."""
    options = {"per_device_train_batch_size": 4, "learning_rate": 10.0, "normalise": False}
    sums = torch.zeros(())
    for i, weight in enumerate(UNEVEN[:3]):
        alone = [float(i == j) for j in range(4)]
        one = moved("kto", tmp_path, tokenizer, labelled()[:4], alone, **options)[0]
        sums = sums + weight * one
    assert close(moved("kto", tmp_path, tokenizer, labelled()[:4], UNEVEN[:4], **options)[0], sums)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_two_processes_count_together(kind, tmp_path, tokenizer):
    data = ROWS[kind]()
    options = {"per_device_train_batch_size": 2}
    alone = moved(
        kind, tmp_path, tokenizer, data, UNEVEN, gradient_accumulation_steps=2, **options
    )[0]

    def work():
        torch.save(
            moved(kind, tmp_path, tokenizer, data, UNEVEN, **options)[0],
            tmp_path / f"{torch.distributed.get_rank()}.pt",
        )

    run_ranks(work, tmp_path)
    for rank in range(2):
        assert close(torch.load(tmp_path / f"{rank}.pt"), alone)


REFUSED = {
    "aot": ("dpo", {"loss_type": "aot"}, "sorts the pairs of a batch"),
    "sft term": ("dpo", {"loss_type": ["sigmoid", "sft"]}, "'sft' is a mean over the tokens of"),
    "packed": ("sft", {"packing": True, "max_length": 16}, "packing=True: rows are joined"),
    "liger": ("sft", {"use_liger_kernel": True}, "use_liger_kernel=True"),
    "cpo's NLL": ("cpo", {"cpo_alpha": 1.0}, "set cpo_alpha=0, or leave rows out"),
    "column": ("kto", {}, "the training set has no column 'weight'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_weights_is_refused(name, tmp_path, tokenizer):
    kind, options, message = REFUSED[name]
    made = {k: v for k, v in options.items() if k != "use_liger_kernel"}  # needs a GPU's package
    trainer = make(kind, tmp_path, tokenizer, ROWS[kind](), **made)
    trainer.args.use_liger_kernel = "use_liger_kernel" in options
    with pytest.raises(ValueError, match=message):
        lddyn.integrations.trl.weighted(trainer)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-1.0, "weight must be finite numbers of 0 or more"),
        (float("nan"), "weight must be finite numbers of 0 or more"),
        (None, "rows of the training set have no weight"),
    ],
)
def test_weights_that_cannot_be_read(bad, message, run):
    with pytest.raises(ValueError, match=message):
        run("dpo", rows(8), [bad] * 8)


def test_trainers_with_losses_of_their_own_are_refused(tmp_path, tokenizer):
    import transformers
    from trl.experimental.gkd import GKDTrainer

    data = [{**row, "weight": 1.0} for row in completions()]
    trainer = make("sft", tmp_path, tokenizer, data)
    own = type("Own", (trl.SFTTrainer,), {})
    trainer.__class__ = GKDTrainer
    with pytest.raises(ValueError, match=r"weighted is for DPOTrainer, .* got GKDTrainer; leave"):
        lddyn.integrations.trl.weighted(trainer)
    trainer.__class__ = own  # a user's
    trainer.compute_loss_func = lambda *_, **__: None
    with pytest.raises(ValueError, match="compute_loss_func may be no sum over rows"):
        lddyn.integrations.trl.weighted(trainer)
    trainer.compute_loss_func, trainer.aux_loss_enabled = None, True
    with pytest.raises(ValueError, match="set router_aux_loss_coef=0"):
        lddyn.integrations.trl.weighted(trainer)
    plain = transformers.Trainer(
        new_model(),
        transformers.TrainingArguments(str(Path(tmp_path)), use_cpu=True, report_to="none"),
        train_dataset=datasets.Dataset.from_list(data),
    )
    with pytest.raises(ValueError, match="got Trainer; leave rows out of the file"):
        lddyn.integrations.trl.weighted(plain)
