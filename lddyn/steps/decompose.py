"""Δ log π = −η A K G: one finetuning step, decomposed and verified.

    influence[m, l] = −η w_l ⟨∇ log π(y_m | χo), ∇ log π(y_l | χu)⟩       (nats)

is what update token l did to observed token m. Its row sums are the first-order change of
log π(y_m); along a finite step the observed gradient is taken at the start (error η²), at the
midpoint (η³) or by Simpson's rule (η⁵). Each change is computed twice, by pairing factors and by
pushing the whole step forward, and the two must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lddyn.data.example import Example
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import undisturbed
from lddyn.memory import DEFAULT_MEMORY
from lddyn.objectives.like import Update
from lddyn.settings import Like
from lddyn.steps.decomposition import Decomposition
from lddyn.steps.passes import make_passes
from lddyn.steps.setup import make_setup


@undisturbed
def decompose(
    model: nn.Module | Anatomy,
    observed: Example | Sequence[Example] | Mapping[str, Example],
    update: Update,
    lr: float | None = None,
    *,
    like: Like = None,
    optimizer: str | torch.optim.Optimizer | None = None,
    max_grad_norm: float | None = None,
    rule: str = "start",
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
) -> Decomposition:
    """Decomposes one finetuning step: what each update token did to each observed token.

        Δ log π(y_m | χo) = −η Σ_l w_l ⟨∇ log π(y_m | χo), P ∇ log π(y_l | χu)⟩ + history + decay

    Args:
        model: A causal LM of transformers, with or without a LoRA adapter, or its Anatomy. Not
            changed.
        observed: Responses to watch; a mapping names them.
        update: SFT(...), DPO(...), preference(...) or any Objective. With `like` also the rows of
            one batch alone: Examples for SFT, pairs (chosen, rejected), or (example, label) of KTO.
        lr: Learning rate η; may be left out when `optimizer` is an object with its own.
        like: How a run trains: a TRL config, a TrainingArguments, a trainer, a mapping of their
            arguments or a file of them (`lddyn.TrainerSettings`). Objective, reference, learning
            rate, optimizer and clipping are its own where they are not given here; what is not
            followed of it is said in `explain()`.
        optimizer: "sgd", "adamw", "adam", "rmsprop" (fresh), or a torch.optim object at its real
            state (SGD, Adam, AdamW, RMSprop). Default: that of `like`, else "sgd".
        max_grad_norm: Clip the gradient's global norm first, as trainers do; 0: no clipping.
        rule: Where on the step the observed gradients are taken: "start", "midpoint", "simpson";
            the error against the real step falls as η², η³, η⁵.
        memory: Bytes, or "2GiB", for all that is held beyond the model and the result: at least one
            vector of all trainable values. Little of it takes more time. "auto": a workspace of
            4 GiB beside these vectors (a third of what is free on a GPU).
        progress: Show progress bars.

    Returns:
        Decomposition, with one Observed per response.

    Raises:
        TypeError: If the update is no Objective, or the optimizer is not one of those.
        ValueError: For a bad argument, token id, or loss; the message says which.
        MemoryBudgetError: If memory is a number, and less than the vectors of the step need.
        UnsupportedModelError: If the model cannot be opened.
        NonFiniteError: If a weight, activation or logit is NaN or infinite.
        DisagreementError: If two computations of the same change differ by more than rounding: an
            operation of this model has a wrong derivative, or uses a parameter where lddyn cannot
            follow it. The message names the token or the parameter.

    Cost: 2 N_θ (Σ_m p_m + Σ_l p_l) FLOPs for the table under SGD, with N_θ the number of parameters
        and p_m the position of token m in its sequence. Under a diagonal P (Adam, RMSprop) about
        L · 4 N_θ (T_u + Σ T_o), with L update tokens and T_u, T_o the lengths of the update and of
        the observed sequences. Memory: one vector of all trainable values,
        up to three more for Adam, and where there is room a shifted copy of them.

    Source: paper Eq. 5-7 (SFT, DPO); optimizers and finite steps go beyond it.

    Example:
        >>> import lddyn, transformers
        >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ex = lddyn.Example(prompt_ids=[1, 2], response_ids=[3, 4, 5], name="chosen")
        >>> dec = lddyn.decompose(model, ex, lddyn.SFT(ex), lr=1e-3)
        >>> dec[0].influence.shape, bool(dec[0].delta_logp.sum() > 0)
        (torch.Size([3, 3]), True)
    """
    return make_passes(
        make_setup(
            model, observed, update, lr, optimizer, max_grad_norm, rule, memory, progress, like
        )
    )
