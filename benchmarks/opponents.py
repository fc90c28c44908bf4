"""Other ways to an exact M x L influence table: torch alone, by hand, and other libraries.

Each function takes a model and two sequences and returns ⟨∇ log π(y_m), ∇ log π(y_l)⟩, (M, L).
Libraries that give the Gram of a batch with itself (`self_only`) see one sequence on both sides.
None of them needs lddyn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """χ = [prompt; response], as ids."""

    prompt: list[int]
    response: list[int]

    @property
    def ids(self) -> list[int]:
        """The whole sequence."""
        return self.prompt + self.response

    @property
    def positions(self) -> list[int]:
        """Where the response tokens are predicted."""
        return list(range(len(self.prompt) - 1, len(self.ids) - 1))

    @property
    def targets(self) -> list[int]:
        """The response tokens."""
        return self.response


Run = Callable[[nn.Module, Tokens, Tokens], Tensor]


@dataclass
class Method:
    """One way to the table.

    Attributes:
        run: (model, observed, updated) -> (M, L).
        attention: The model's attention implementation.
        covers: The parameters whose gradients it sees.
        needs: The package it is made of.
        self_only: It gives the Gram of one sequence's tokens only.
    """

    run: Run
    attention: str = "eager"
    covers: str = "all"
    needs: str = ""
    self_only: bool = False

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


def log_probs(model, example: Tokens, parameters=None) -> Tensor:
    """log π(y_m) of the response tokens by a plain forward."""
    ids = torch.tensor([example.ids])
    arguments = {"use_cache": False, "logits_to_keep": torch.tensor(example.positions)}
    if parameters is None:
        out = model(input_ids=ids, **arguments)
    else:
        out = torch.func.functional_call(model, parameters, (ids,), arguments)
    return out.logits[0].log_softmax(-1).gather(1, torch.tensor(example.targets)[:, None])[:, 0]


def token_losses(model, example: Tokens) -> Tensor:
    """log π(y_m) of replica m of the sequence: one loss token per member of a batch."""
    count = len(example.targets)
    ids = torch.tensor([example.ids]).expand(count, -1).contiguous()
    logits = model(
        input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(example.positions)
    ).logits
    own = torch.arange(count)
    return logits[own, own].log_softmax(-1)[own, torch.tensor(example.targets)]


def head_factors(model, example: Tokens, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The head's input at the predicting positions (M, d), and e_y − π there (M, V)."""
    rows = -torch.softmax(hidden @ model.lm_head.weight.detach().T, -1)
    rows[torch.arange(len(rows)), torch.tensor(example.targets)] += 1
    return hidden, rows


# --------------------------------------------------------------------------- torch alone


def textbook(model, observed: Tokens, updated: Tokens) -> Tensor:
    """Per-token Jacobian rows by vmap(vjp); the Gram of the rows, parameter by parameter.

    One side's rows are materialised; the other's come 16 at a time, which halves the memory.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    pulls = [
        torch.func.vjp(lambda p, e=example: log_probs(model, e, p), parameters)
        for example in (observed, updated)
    ]
    unit_rows = [torch.eye(len(values), dtype=values.dtype) for values, _ in pulls]
    rows = torch.func.vmap(pulls[0][1])(unit_rows[0])[0]
    columns = []
    for part in unit_rows[1].split(16):
        other = torch.func.vmap(pulls[1][1])(part)[0]
        columns.append(sum(rows[n].flatten(1) @ other[n].flatten(1).T for n in parameters))
    return torch.cat(columns, dim=1)


def ntk_vector_products(model, observed: Tokens, updated: Tokens) -> Tensor:
    """vjp of one token of χu, jvp of χo along it: a gradient the size of the model per token."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    values, pull = torch.func.vjp(lambda p: log_probs(model, updated, p), parameters)
    columns = []
    for cotangent in torch.eye(len(values)):
        (direction,) = pull(cotangent)
        _, tangent = torch.func.jvp(
            lambda p: log_probs(model, observed, p), (parameters,), (direction,)
        )
        columns.append(tangent.detach())
    return torch.stack(columns, dim=1)


class Recorder:
    """Inputs and outputs of the modules that own weights, and of the norms, in one forward pass."""

    def __init__(self, model: nn.Module):
        self.calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self.hidden: list[Tensor] = []
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)  # something must start the graph
        self.hooks = [model.lm_head.register_forward_hook(self._head)]
        for name, module in model.named_modules():
            if name != "lm_head" and next(module.parameters(recurse=False), None) is not None:
                self.hooks.append(module.register_forward_hook(self._call(name)))

    def _head(self, module, args, out) -> None:
        self.hidden.append(args[0].detach())

    def _call(self, name: str):
        def hook(module, args, out) -> None:
            self.calls.append((name, module, args[0].detach(), out))

        return hook

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self.hooks:
            hook.remove()


def unit(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies by its gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


Factors = dict[str, tuple[nn.Module, Tensor, Tensor]]  # name -> module, input (T, …), (M, T, d_out)


def batched_factors(model, example: Tokens) -> tuple[Factors, tuple[Tensor, Tensor]]:
    """One graph of one sequence; all cotangents at once by is_grads_batched."""
    recorder = Recorder(model)
    values = log_probs(model, example)
    recorder.close()
    gradients = torch.autograd.grad(
        values, [c[3] for c in recorder.calls], torch.eye(len(values)), is_grads_batched=True
    )
    factors = {
        name: (module, x[0], g[:, 0])
        for (name, module, x, _), g in zip(recorder.calls, gradients, strict=True)
    }
    return factors, head_factors(model, example, recorder.hidden[0][0])


def expanded_factors(model, example: Tokens) -> tuple[Factors, tuple[Tensor, Tensor]]:
    """The sequence M times in a batch, one loss token each: one ordinary backward pass."""
    recorder = Recorder(model)
    values = token_losses(model, example)
    recorder.close()
    gradients = torch.autograd.grad(values.sum(), [c[3] for c in recorder.calls])
    factors = {
        name: (module, x[0], g)
        for (name, module, x, _), g in zip(recorder.calls, gradients, strict=True)
    }
    return factors, head_factors(model, example, recorder.hidden[0][0])


def contract(one, other) -> Tensor:
    """Pushes the factors of one side onto the other's tokens, and pairs them there."""
    (factors_o, (h_o, v_o)), (factors_u, (h_u, v_u)) = one, other
    total = (h_o @ h_u.T) * (v_o @ v_u.T)
    for name, (module, x_o, g_o) in factors_o.items():
        _, x_u, g_u = factors_u[name]
        if isinstance(module, nn.Linear):
            pushed = torch.matmul(x_u @ x_o.T, g_o)
        elif isinstance(module, nn.Embedding):
            pushed = torch.matmul((x_u[:, None] == x_o).to(g_o.dtype), g_o)
        else:  # a gain: Σ_t δ_t ∘ x̂_t, broadcast
            gains = [
                torch.einsum("mtd,td->md", g, unit(module, x)) for g, x in ((g_o, x_o), (g_u, x_u))
            ]
            total += gains[0] @ gains[1].T
            continue
        total += pushed.flatten(1) @ g_u.flatten(1).T
    return total


def batched_grads(model, observed: Tokens, updated: Tokens) -> Tensor:
    """One whole graph per sequence, hooks, is_grads_batched, push-then-pair."""
    return contract(batched_factors(model, observed), batched_factors(model, updated))


def batch_expansion(model, observed: Tokens, updated: Tokens) -> Tensor:
    """Replicas with one loss token each, hooks, push-then-pair."""
    return contract(expanded_factors(model, observed), expanded_factors(model, updated))


def structured_derivatives(model, observed: Tokens, updated: Tokens) -> Tensor:
    """neural-tangents' third implementation, in torch.

    Cotangents of the outputs of every primitive that reads a parameter (one reverse pass, batched),
    contracted with the two primitive Jacobians in the order of its paper: the product of the
    Jacobians first (for a weight the identity on the outputs times the Gram of the inputs), then
    the cotangents.
    """
    (factors_o, (h_o, v_o)), (factors_u, (h_u, v_u)) = (
        batched_factors(model, e) for e in (observed, updated)
    )
    total = torch.einsum("mi,li,mv,lv->ml", h_o, h_u, v_o, v_u)
    for name, (module, x_o, g_o) in factors_o.items():
        _, x_u, g_u = factors_u[name]
        if isinstance(module, nn.Linear):
            middle = torch.einsum("si,ti->st", x_o, x_u)
        elif isinstance(module, nn.Embedding):
            middle = (x_o[:, None] == x_u).to(g_o.dtype)
        else:
            middle = torch.einsum("sj,tj->stj", unit(module, x_o), unit(module, x_u))
            for o, rows in enumerate(g_o):
                total[o] += torch.einsum("tj,ltj->l", torch.einsum("sj,stj->tj", rows, middle), g_u)
            continue
        total += torch.einsum("mtj,ltj->ml", torch.einsum("msj,st->mtj", g_o, middle), g_u)
    return total


# --------------------------------------------------------------------------- by hand


def hand_written(onednn: bool) -> Run:
    """The engine of `llama_engine.py`."""

    def run(model, observed: Tokens, updated: Tokens) -> Tensor:
        from llama_engine import Engine

        def tensors(x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
            return torch.tensor(x.ids), torch.tensor(x.positions), torch.tensor(x.targets)

        one = tensors(observed)
        return Engine(model, onednn).gram(one, one if observed is updated else tensors(updated))

    return run


# --------------------------------------------------------------------------- libraries


def torchjd_gramian(replicas: bool) -> Run:
    """torchjd's autogram: the Gram of the Jacobian of many losses."""

    def run(model, observed: Tokens, updated: Tokens) -> Tensor:
        from torchjd.autogram import Engine

        engine = Engine(model, batch_dim=0 if replicas else None)
        losses = (token_losses if replicas else log_probs)(model, observed)
        return engine.compute_gramian(losses)

    return run


def opacus_gram(model, observed: Tokens, updated: Tokens) -> Tensor:
    """opacus' per-sample gradients of replicas of the sequence."""
    from opacus import GradSampleModule

    # In training mode, or its hooks record nothing; the model has no dropout.
    module = GradSampleModule(model.train(), loss_reduction="sum")
    token_losses(module, observed).sum().backward()
    rows = [p.grad_sample.flatten(1) for p in module.parameters()]
    return sum(r @ r.T for r in rows)


def dattri_similarity(mode: str) -> Run:
    """dattri-llm: hooks on linear layers of a batch of replicas, then its similarity."""

    def run(model, observed: Tokens, updated: Tokens) -> Tensor:
        from dattri_llm.gradient.callbacks import HookManagerCallback
        from dattri_llm.gradient.hooks import REGISTER_ALL, HookManager, HookManagerConfig

        class Keep(HookManagerCallback):
            gradient = None

            def on_step_end(self, record) -> None:
                self.gradient = record.gradient

        sides = {}
        for example in (observed, updated):
            if id(example) in sides:
                continue
            keep = Keep()
            manager = HookManager(
                model, HookManagerConfig(hook_types={}, linear_io=REGISTER_ALL), [keep]
            )
            with manager.collect(deregister_on_exit=True):
                token_losses(model, example).sum().backward()
            sides[id(example)] = keep.gradient
            model.zero_grad()
        one, other = sides[id(observed)], sides[id(updated)]
        return one.similarity(other, reduce="all", mode=mode).detach()

    return run


METHODS = {
    "hand-written Llama": Method(hand_written(onednn=False)),
    "hand-written Llama, oneDNN": Method(hand_written(onednn=True)),
    "torch.func eager": Method(textbook),
    "torch.func sdpa": Method(textbook, attention="sdpa"),
    "batched grads eager": Method(batched_grads),
    "batched grads sdpa": Method(batched_grads, attention="sdpa"),
    "batch expansion": Method(batch_expansion, attention="sdpa"),
    "NTK-vector products": Method(ntk_vector_products),
    "structured derivatives": Method(structured_derivatives),
    "torchjd": Method(torchjd_gramian(False), needs="torchjd", self_only=True),
    "torchjd, replicas": Method(torchjd_gramian(True), needs="torchjd", self_only=True),
    "opacus": Method(opacus_gram, needs="opacus", self_only=True),
    "dattri-llm": Method(dattri_similarity("auto"), needs="dattri_llm", covers="no norms"),
    "dattri-llm, factored": Method(
        dattri_similarity("factorized"), needs="dattri_llm", covers="no norms"
    ),
}
