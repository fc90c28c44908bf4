"""K between the token logits of two responses: applied, contracted, restricted, and its norm.

python examples/kernel_operator.py
"""

import torch

import lddyn
from lddyn.demo.world import build_world

world = build_world()
row = world.preference_pairs[0]
both = lddyn.encode_row(world.tokenizer, row, ("chosen", "rejected"))
K = lddyn.ntk(world.model, both["chosen"], both["rejected"])
print("K is", " x ".join(map(str, K.shape)), "and is never formed")

influence = K.gram()  # ⟨∇ log π(y_m), ∇ log π(y_l)⟩ of every two tokens, exact
m, place = divmod(int(influence.abs().argmax()), influence.shape[1])
print(f"strongest pair of tokens: {m}, {place}: {influence[m, place]:+.3g}")

# K G is what a step with residual G does to all logits; K.T goes the other way.
G = torch.randn(K.shape[2:])
moved = K @ G
v = torch.randn(K.shape[:2])
assert torch.allclose((v * moved).sum(), ((K.T @ v) * G).sum(), rtol=1e-3)

top = K.top_tokens(4)
print("K between", world.tokenizer.convert_ids_to_tokens(top.tolist()), "at the first two tokens:")
print(K.restrict(top)[0, :, 0, :])

norm = K.frobenius(rtol=0.3)  # of every two tokens, sampled, with standard errors
print(f"‖K‖_F of the first two tokens: {norm.value[0, 0]:.3g} ± {norm.stderr[0, 0]:.1g}")
