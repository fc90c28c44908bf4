"""How exact, and of which order: errors against a float64 oracle, slopes against real steps.

    python benchmarks/truth.py --out benchmarks/results/NAME.json

The models are the tiny ones of tests/zoo.py; the oracle is an explicit Jacobian in true float64.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from record import record
from torch import Tensor

import lddyn
from lddyn.engine.gram import Side, factored_gram, token_gram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import zoo

ARCHITECTURES = (  # noqa: SIM905
    "gpt2 llama mistral qwen2 qwen3 gemma2 gemma3_text gpt_neox phi3 opt olmo2 falcon granite "
    "mixtral qwen3_moe olmoe"
).split()


def add_lora(model):
    """A LoRA adapter with non-zero factors on every linear layer but the head."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    return adapted.eval()


def errors(model, attention: str) -> dict[str, float]:
    """Largest normalised error of the Gram by both routes and of the V-resolved shift."""
    observed, updated = zoo.examples()
    rows = [zoo.oracle_jacobian(model, e) for e in (observed, updated)]
    exact = rows[0] @ rows[1].T
    norms = rows[0].norm(dim=1)[:, None] * rows[1].norm(dim=1)
    anatomy = lddyn.Anatomy(model, attention)
    one, other = (Side.log_probs(anatomy.trace(e)) for e in (observed, updated))

    def worst(table: Tensor) -> float:
        return float(((table.double() - exact) / norms).abs().max())

    found = {
        "paired": worst(token_gram([one], [other])),
        "pushed": worst(factored_gram([one], [other])),
    }
    opened = lddyn.Anatomy(model, attention)
    dec = lddyn.decompose(opened, observed, lddyn.SFT(updated, reduction="sum"), lr=1.0)
    found["influence"] = worst(dec[0].influence)
    step = {n: g for n, g in zip(names(model), split(model, rows[1].sum(0)), strict=True)}
    moved = exact_shift(model, observed, step)
    scale = moved.abs().max()
    found["delta_log_probs"] = float(
        (dec[0].delta_log_probs().double() - moved).abs().max() / scale
    )
    found["covered"] = float(
        sum(e.rule != "not reached (zero gradient)" for e in anatomy.ledger.values())
        / len(anatomy.ledger)
    )
    return found


def names(model) -> list[str]:
    """Trainable parameters in order."""
    return [n for n, p in model.named_parameters() if p.requires_grad]


def split(model, flat: Tensor) -> list[Tensor]:
    """A flat gradient as one tensor per trainable parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def exact_shift(model, example, step: dict[str, Tensor]) -> Tensor:
    """d log π(·) / ds along θ + s·step in true float64: J step, as the transpose of Jᵀ u."""
    double = zoo.double(model).eval()
    parameters = {n: p for n, p in double.named_parameters() if n in step}
    with lddyn.true_float64():
        logits = double(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        values = logits.log_softmax(-1)[list(example.positions)]
        u = torch.zeros_like(values, requires_grad=True)
        rows = torch.autograd.grad(
            values, list(parameters.values()), u, create_graph=True, allow_unused=True
        )
        total = sum(
            (g * step[n]).sum() for n, g in zip(parameters, rows, strict=True) if g is not None
        )
        return torch.autograd.grad(total, u)[0]


def plain_torch(model) -> float:
    """The same normalised error for a plain backward pass per token in the model's own dtype."""
    observed, updated = zoo.examples()
    exact = [zoo.oracle_jacobian(model, e) for e in (observed, updated)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [
        zoo.jacobian(zoo.token_log_probs(model, e), parameters).double()
        for e in (observed, updated)
    ]
    norms = exact[0].norm(dim=1)[:, None] * exact[1].norm(dim=1)
    return float(((rows[0] @ rows[1].T - exact[0] @ exact[1].T) / norms).abs().max())


def exactness() -> list[dict]:
    """One row per architecture and setting."""
    rows = []
    for name in ARCHITECTURES:
        for tied in (False, True):
            for attention in ("lddyn", "eager"):
                for lora in (False, True):
                    model = zoo.build(name, tie_word_embeddings=tied).eval()
                    model = add_lora(model) if lora else model
                    row = {
                        "model": name,
                        "tied": tied,
                        "attention": attention,
                        "lora": lora,
                        **errors(model, attention),
                    }
                    low = zoo.build(name, tie_word_embeddings=tied).eval()
                    low = (add_lora(low) if lora else low).to(torch.bfloat16)
                    row["bfloat16"] = errors(low, attention)["influence"]
                    row["bfloat16, plain torch"] = plain_torch(low)
                    rows.append(row)
                    print(row, flush=True)
    return rows


def orders() -> list[dict]:
    """Slopes of ‖measured − predicted‖ against the learning rate, in true float64."""
    rows = []
    observed, updated = zoo.examples()
    other = lddyn.Example(prompt_ids=[5, 9, 12], response_ids=[40, 8, 30, 2])
    cases = {
        "SGD": (torch.optim.SGD, {}, None),
        "SGD, clipped": (torch.optim.SGD, {}, 0.5),
        "SGD, momentum 0.9": (torch.optim.SGD, {"momentum": 0.9}, None),
        "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}, None),
        "RMSprop": (torch.optim.RMSprop, {}, None),
    }
    # The largest step is the one whose predictions at the start and at the midpoint differ by this
    # share: small enough for one power to dominate, large enough to stay above rounding.
    shares = {"start": 0.01, "midpoint": 0.01, "simpson": 0.05}
    for title, (kind, options, clip) in cases.items():
        for update in (lddyn.SFT(updated, reduction="sum"), lddyn.DPO(updated, other, beta=0.5)):
            model = zoo.build("llama").double()
            optimizer = kind(model.parameters(), lr=1e-5, **options)

            def decompose(
                rate: float, rule: str, model=model, optimizer=optimizer, clip=clip, update=update
            ):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                return lddyn.decompose(
                    model,
                    [observed, updated],
                    update,
                    optimizer=optimizer,
                    max_grad_norm=clip,
                    rule=rule,
                )

            with lddyn.true_float64():
                for _ in range(2):  # a state with a history
                    optimizer.zero_grad()
                    (-zoo.token_log_probs(model, updated).sum()).backward()
                    optimizer.step()
                optimizer.zero_grad()
                dec = decompose(1e-5, "start")
                gap = torch.cat([o.error_estimate for o in dec]).norm()
                relative = float(gap / torch.cat([o.delta_logp for o in dec]).norm())
            for rule, expected in (("start", 2), ("midpoint", 3), ("simpson", 5)):
                rate = 1e-5 * shares[rule] / relative
                with lddyn.true_float64():
                    check = decompose(rate, rule).verify([rate * 0.6**k for k in range(6)])
                rows.append(
                    {
                        "optimizer": title,
                        "objective": update.title,
                        "rule": rule,
                        "expected": expected,
                        "slope": check.slope,
                        "lrs": check.lrs,
                        "errors": check.errors,
                    }
                )
                print(
                    {k: rows[-1][k] for k in ("optimizer", "objective", "rule", "slope")},
                    [f"{e:.1e}" for e in check.errors],
                    flush=True,
                )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", choices=["exactness", "orders"], default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only != "orders":
        record(args.out, "exactness", exactness())
    if args.only != "exactness":
        record(args.out, "orders", orders())


if __name__ == "__main__":
    main()
