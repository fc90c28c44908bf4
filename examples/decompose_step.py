"""Take one DPO step apart: which tokens raised and which lowered the chosen answer?

python examples/decompose_step.py
"""

import lddyn
from lddyn.demo.world import build_world, falling_pair

world = build_world()  # trains a small Llama the first time, half a minute; then from the cache
row = world.preference_pairs[falling_pair(world, candidates=16)]
responses = lddyn.encode_row(world.tokenizer, row, ("chosen", "rejected"))
print(row["prompt"], "\n  y+", row["chosen"], "\n  y-", row["rejected"], "\n")

dpo = lddyn.DPO(responses["chosen"], responses["rejected"], beta=0.1)
dec = lddyn.decompose(world.model, responses, dpo, lr=2e-4, rule="midpoint")
for name in responses:
    parts = {k: float(v.sum()) for k, v in dec[name].by_sequence().items()}
    print(f"{name}: {parts['y+']:+.4f} nats from y+, {parts['y-']:+.4f} from y-")
for token, nats in dec.strongest(dec["chosen"], 5):
    print(f"  {nats:+.4f} on the chosen answer by {token.text!r} of {token.sequence}")

# Is the prediction right? Six real steps on float64 copies of the model.
print(dec.verify())
