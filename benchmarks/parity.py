"""Every loss type of the installed TRL against lddyn's `like=trainer`, as a table.

    python benchmarks/parity.py                                    # prints the table
    python benchmarks/parity.py --only "DPO ipo,SFT"               # some of it, by beginnings
    python benchmarks/parity.py --out benchmarks/results/parity.json   # adds this TRL's column
    python benchmarks/parity.py --page docs/losses.md              # writes its table into the page

Each case makes TRL's trainer on three rows and a tiny model. `lddyn.RowOptions.like(trainer)` cuts
the rows, `like=trainer` chooses loss and reference; compared are the token ids, `compute_loss` and
its gradient. A case is right if all agree, "said" if they differ and a remark says why, "refused"
if lddyn raises a ValueError that names the trainer, and WRONG otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from record import provenance
from torch import nn
from transformers import PreTrainedTokenizerFast

import lddyn
from lddyn.objectives.like import objective_like, row_remarks
from lddyn.settings import TrainerSettings, router_remark

RESULTS = Path(__file__).parent / "results/parity.json"
LOSS, GRADIENT = 2e-4, 1e-3  # largest relative errors of a right case, float32
PAIRS = [
    {"prompt": "Say the colour:", "chosen": " red and blue", "rejected": " no"},
    {"prompt": "Where do cats sleep?", "chosen": " In the sun", "rejected": " On two plus two"},
    {"prompt": "Is it warm?", "chosen": " Yes", "rejected": " The kettle is red"},
]
# The space at the end of the prompt becomes a part of the response's first token.
MERGED = [{"prompt": "Is it warm? ", "chosen": "Yes", "rejected": "The kettle is red"}]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row, side in zip(PAIRS, ("chosen", "rejected", "chosen"), strict=True)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["chosen"]},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": row["rejected"]},
        ]
    }
    for row in PAIRS
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words of remarks on what lddyn does not follow, of some versions.
NAMED = {
    "bco_pair": "running mean",
    "MPO": "running mean",
    "ld_alpha": "another formula",
    "f_divergence_type=alpha_divergence": "another formula",
    "use_weighting": "use_weighting",
}
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


@dataclasses.dataclass(frozen=True)
class Case:
    """One trainer with its options.

    Attributes:
        trainer: "SFT", "DPO", …, as in TRL's class names.
        name: Of the case.
        options: Of its config.
        rows: Its data.
        model: "plain", "lora" or "moe".
        reference: Whether the trainer gets a reference model.
        said: Words of the remark on what lddyn does not follow; "": nothing may differ.
    """

    trainer: str
    name: str
    options: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    model: str = "plain"
    reference: bool = False
    said: str = ""

    @property
    def title(self) -> str:
        """Trainer and name."""
        return f"{self.trainer} {self.name}"


def cases() -> Iterator[Case]:
    """All cases of the installed TRL: its loss types, then settings that change loss or rows."""
    for name in loss_types("SFT", ("nll", "dft")):
        yield Case("SFT", name, {"loss_type": name}, COMPLETIONS)
    yield Case("SFT", "completion_only_loss=False", {"completion_only_loss": False}, COMPLETIONS)
    merged = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in MERGED]
    yield Case("SFT", "tokens that merge with the prompt's", {}, merged, said="tokens merge")
    yield Case("SFT", "messages", {}, CHATS)
    yield Case("SFT", "assistant_only_loss", {"assistant_only_loss": True}, CHATS)
    yield Case("SFT", "max_length=9", {"max_length": 9}, COMPLETIONS)
    yield Case("SFT", "mixture of experts", {}, COMPLETIONS, "moe", said="auxiliary loss")
    smooth = {"label_smoothing_factor": 0.1}
    yield Case("SFT", "label_smoothing_factor", smooth, COMPLETIONS, said="label_smoothing_factor")
    for name in loss_types("DPO", ("sigmoid",)):
        given = {"robust": 0.2, "exo_pair": 0.01}.get(name)
        smooth = {} if given is None else {"label_smoothing": given}
        options = {"loss_type": [name], "beta": 0.3, **smooth}
        yield Case("DPO", name, options, PAIRS, reference=True, said=NAMED.get(name, ""))
    for name, options in (
        ("label_smoothing", {"label_smoothing": 0.1}),
        ("MPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
        ("rpo_alpha", {"rpo_alpha": 0.5}),
        ("ld_alpha", {"ld_alpha": 0.4}),
        *((f"f_divergence_type={f}", {"f_divergence_type": f}) for f in DIVERGENCES),
        ("reference_free", {"reference_free": True}),
        ("use_weighting", {"use_weighting": True}),
        ("max_length=9", {"max_length": 9}),
        ("max_length=9, keep_end", {"max_length": 9, "truncation_mode": "keep_end"}),
        ("precompute_ref_log_probs", {"precompute_ref_log_probs": True}),
    ):
        yield Case("DPO", name, options, PAIRS, reference=True, said=NAMED.get(name, ""))
    yield Case(
        "DPO",
        "tokens that merge with the prompt's",
        {},
        MERGED,
        reference=True,
        said="tokens merge",
    )
    yield Case("DPO", "no ref_model", {}, PAIRS)
    yield Case("DPO", "LoRA, reference by switching it off", {}, PAIRS, "lora")
    for name in loss_types("KTO", ("kto", "apo_zero_unpaired")):
        options = {"loss_type": name, "desirable_weight": 1.3, "undesirable_weight": 0.7}
        yield Case("KTO", name, options, LABELLED, reference=True)
    for name in loss_types("CPO", ("sigmoid", "hinge", "ipo", "simpo", "alphapo")):
        yield Case("CPO", name, {"loss_type": name, "beta": 0.5}, PAIRS)
    yield Case("CPO", "simpo, cpo_alpha=0", {"loss_type": "simpo", "cpo_alpha": 0.0}, PAIRS)
    yield Case("ORPO", "orpo", {"beta": 0.3}, PAIRS)
    for other in ("BCO", "Reward", "GRPO", "RLOO", "OnlineDPO", "GKD", "SDPO"):
        yield Case(other, "config", {}, PAIRS)


def module_of(trainer: str) -> Any:
    """The module of TRL that has this trainer, or None."""
    folder = {"OnlineDPO": "online_dpo"}.get(trainer, trainer.lower())
    for name in ("trl", f"trl.experimental.{folder}"):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            if hasattr(module, f"{trainer}Config"):
                return module
    return None


def loss_types(trainer: str, default: Sequence[str]) -> list[str]:
    """The names that the config's help lists as values of `loss_type`."""
    module = module_of(trainer)
    if module is None:
        return []
    field = getattr(module, f"{trainer}Config").__dataclass_fields__.get("loss_type")
    text = str(field.metadata.get("help", "")) if field is not None else ""
    listed = re.findall(r"[`'\"]([a-z_]+)[`'\"]", text)
    others = ("loss_weights", "loss_type", "lm_head", "use_liger_kernel")
    names = [n for n in dict.fromkeys(listed) if n not in others]
    return names or list(default)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the rows, so that tokens merge as real ones do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    how = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(row.values()) for row in PAIRS] * 4, how)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(kind: str, seed: int = 0) -> nn.Module:
    """A tiny Llama, with a LoRA adapter for "lora", or a mixture of experts for "moe"."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 384,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config = transformers.Qwen3MoeConfig(
            **sizes, **experts, head_dim=8, router_aux_loss_coef=0.01, mlp_only_layers=[]
        )
        return transformers.Qwen3MoeForCausalLM(config)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    if kind == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def make_trainer(case: Case, model: nn.Module, tokenizer: Any, folder: str) -> Any:
    """TRL's trainer of a case; its config alone where the case is about the config."""
    module = module_of(case.trainer)
    config = getattr(module, f"{case.trainer}Config")
    settings = {
        "per_device_train_batch_size": len(case.rows),
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **case.options,
    }
    missing = set(case.options) - config.__dataclass_fields__.keys()
    if missing:
        raise NotImplementedError(f"has no {', '.join(sorted(missing))}")
    if case.name == "config":
        known = {k: v for k, v in settings.items() if k in config.__dataclass_fields__}
        known.pop("per_device_train_batch_size")
        return config(folder, **known)
    models = {"model": model}
    if case.reference:
        models["ref_model"] = make_model(case.model, seed=1).requires_grad_(False)
    if not hasattr(module, f"{case.trainer}Trainer"):
        raise NotImplementedError("has no such trainer")
    kind = getattr(module, f"{case.trainer}Trainer")
    data = Dataset.from_list([dict(row) for row in case.rows])
    return kind(
        **models, args=config(folder, **settings), train_dataset=data, processing_class=tokenizer
    )


def trainers_answer(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The trainer's loss of all its rows as one batch, and its gradient."""
    trainer.model.eval().zero_grad()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss.detach()), {n: p.grad for n, p in named if p.grad is not None}


def update_rows(case: Case, encoded: Sequence[Mapping[str, lddyn.Example]]) -> list[Any]:
    """The rows as `like=` takes them: examples, pairs, or examples with labels."""
    if case.trainer == "SFT":
        return [next(iter(examples.values())) for examples in encoded]
    if case.trainer == "KTO":
        labels = [row["label"] for row in case.rows]
        return [(e["completion"], label) for e, label in zip(encoded, labels, strict=True)]
    return [(examples["chosen"], examples["rejected"]) for examples in encoded]


def our_answer(
    model: nn.Module, settings: TrainerSettings, rows: list[Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of like=, and its gradient through the plain model."""
    objective = objective_like(settings, rows, model).prepare(lddyn.Anatomy(model))
    each = []
    for example in objective.examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        each.append(logits[list(example.positions), list(example.targets)])
    loss, weights = objective.weights([lp.detach() for lp in each])
    model.zero_grad()
    sum((w * lp).sum() for w, lp in zip(weights, each, strict=True)).backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def trainers_ids(trainer: Any) -> list[list[int]]:
    """Token ids of all sequences that the trainer has made of its rows, each whole."""
    found = []
    for row in trainer.train_dataset:
        if "input_ids" in row:
            found.append(list(row["input_ids"]))
            continue
        prompt = list(row.get("prompt_ids") or row.get("prompt_input_ids") or ())
        for side in ("chosen", "rejected", "completion"):
            ids = row.get(f"{side}_ids") or row.get(f"{side}_input_ids")
            if ids is not None:
                whole = f"{side}_labels" in row
                found.append(list(ids) if whole else [*prompt, *ids])
    return found


def try_out(case: Case, tokenizer: Any) -> str:
    """The verdict of a case."""
    if module_of(case.trainer) is None:
        return "–"
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(case.model)
        if case.model == "plain":  # TRL loads a reference of its own from where the model is from
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder)
        try:
            trainer = make_trainer(case, model, tokenizer, folder)
        except (NotImplementedError, ValueError) as error:
            return f"TRL {error}" if isinstance(error, NotImplementedError) else "TRL refuses it"
        if case.name == "config":
            return _verdict_of_config(trainer, case, tokenizer)
        settings = TrainerSettings.of(trainer)
        options = lddyn.RowOptions.like(trainer)
        encoded = [lddyn.encode_row(tokenizer, row, options=options) for row in case.rows]
        try:
            ours = our_answer(trainer.model.eval(), settings, update_rows(case, encoded))
        except ValueError as error:
            return f"refused: {error}"
        try:
            theirs = trainers_answer(trainer)
        except (AttributeError, RuntimeError) as error:
            return f"TRL fails: {type(error).__name__}"
    sequences = [list(e.ids) for examples in encoded for e in examples.values()]
    cut = options.max_length
    kept = slice(None, cut) if options.truncation_mode == "keep_start" else slice(-(cut or 0), None)
    wanted = [ids[kept] for ids in trainers_ids(trainer)]
    same = sorted(sequences) == sorted(wanted)
    loss = abs(ours[0] - theirs[0]) / max(abs(theirs[0]), 1e-6)
    gradient = _distance(ours[1], theirs[1])
    if loss <= LOSS and gradient <= GRADIENT:
        return "right" if same else "right, other tokens outside the loss"
    examples = [example for fields in encoded for example in fields.values()]
    remarks = [*settings.remarks, *row_remarks(settings, examples)]
    remarks.append(router_remark(model.config, settings) or "")
    said = [remark for remark in remarks if case.said and case.said in remark]
    if said:
        return f"said: {said[0]}"
    return f"WRONG: loss {ours[0]:.6g} for {theirs[0]:.6g}, gradient off by {gradient:.1%}" + (
        "" if same else ", other token ids"
    )


def _verdict_of_config(config: Any, case: Case, tokenizer: Any) -> str:
    """Whether lddyn refuses a trainer whose loss it does not have."""
    encoded = lddyn.encode_row(tokenizer, PAIRS[0])
    for rows in ((encoded["chosen"], encoded["rejected"]), encoded["chosen"]):
        try:
            made = objective_like(TrainerSettings.of(config), rows, make_model("plain"))
        except ValueError as error:
            verdict = f"refused: {error}"
            continue
        return f"WRONG: read as {made.name}"
    return verdict


def _distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all parameters."""
    names = ours.keys() | theirs.keys()
    zero = torch.zeros(())
    apart = sum(float((ours.get(n, zero) - theirs.get(n, zero)).square().sum()) for n in names)
    return (apart / max(sum(float(g.square().sum()) for g in theirs.values()), 1e-12)) ** 0.5


def table(results: Mapping[str, Any]) -> str:
    """All recorded versions side by side as a table of Markdown, and what was said below it."""
    versions = list(results)
    titles = list(dict.fromkeys(t for v in versions for t in results[v]["cases"]))
    lines = ["| case | " + " | ".join(versions) + " |", "|" + "---|" * (len(versions) + 1)]
    sentences: dict[str, None] = {}
    for title in titles:
        verdicts = [results[v]["cases"].get(title, "–") for v in versions]
        lines.append(f"| {title} | " + " | ".join(v.split(":")[0] for v in verdicts) + " |")
        said = next((v.split(": ", 1)[1] for v in verdicts if v.startswith("said: ")), None)
        if said is not None:
            sentences[f"- {title}: “{said}”"] = None
    return "\n".join([*lines, "", "Said:", "", *sentences])


def with_table(page: str, results: Mapping[str, Any]) -> str:
    """The page with the table between its marks."""
    begin, end = "<!-- parity:begin -->", "<!-- parity:end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table(results)}\n{end}{rest.split(end)[1]}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="beginnings of titles, with commas")
    parser.add_argument("--out", type=Path, help="JSON file that receives this version's verdicts")
    parser.add_argument("--page", type=Path, help="page that receives the table of RESULTS")
    options = parser.parse_args()
    if options.page is not None:
        options.page.write_text(
            with_table(options.page.read_text(), json.loads(RESULTS.read_text()))
        )
        return 0
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    wanted, tokenizer, verdicts = tuple(options.only.split(",")), make_tokenizer(), {}
    for case in cases():
        if not case.title.startswith(wanted):
            continue
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            try:
                verdict = try_out(case, tokenizer)
            except Exception as error:
                verdict = f"WRONG: {type(error).__name__}: {error}"
        verdicts[case.title] = verdict
        print(f"{case.title:45} {verdict}", flush=True)
    if options.out is not None:
        results = json.loads(options.out.read_text()) if options.out.exists() else {}
        results[f"TRL {trl.__version__}"] = {**provenance(), "cases": verdicts}
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return any("WRONG" in verdict for verdict in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
