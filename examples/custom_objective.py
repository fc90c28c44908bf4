"""A loss of your own: any function of the per-token log-probs, by autograd.

python examples/custom_objective.py
"""

from functools import partial

import torch
from torch import Tensor

import lddyn
from lddyn.demo.world import build_world


def loss(log_probs: list[Tensor], floor: float) -> Tensor:
    """DPO without a reference model; tokens of y− below `floor` nats are not pushed down."""
    up, down = log_probs  # (tokens,) each, in nats
    pushed = torch.where(down > floor, down, down.detach())
    return -torch.nn.functional.logsigmoid(0.1 * (up.sum() - pushed.sum()))


world = build_world()
row = world.preference_pairs[0]
both = lddyn.encode_row(world.tokenizer, row, ("chosen", "rejected", "irr_train"))
pair = [both["chosen"], both["rejected"]]
for name, floor in (("plain", -float("inf")), ("gated", -4.0)):
    objective = lddyn.Objective(partial(loss, floor=floor), pair, ["y+", "y-"])
    dec = lddyn.decompose(world.model, both, objective, lr=2e-4)
    moves = ", ".join(f"{o.name} {float(o.delta_logp.sum()):+.4f}" for o in dec)
    print(f"{name}: {moves} nats")
print(dec.verify())  # real steps on this loss: the error falls as the square of the learning rate
