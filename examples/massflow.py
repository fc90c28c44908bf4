"""Where did the probability of a rejected answer go when it was pushed down?

python examples/massflow.py
"""

import lddyn
from lddyn.demo.world import build_world, falling_pair

world = build_world()
row = world.preference_pairs[falling_pair(world, candidates=16)]
both = lddyn.encode_row(world.tokenizer, row, ("chosen", "rejected"))

for name in ("dpo", "dpo+nll"):
    objective = lddyn.preference(name, both["chosen"], both["rejected"])
    flow = lddyn.massflow(
        world.model, both["rejected"], objective, lr=2e-4, tokenizer=world.tokenizer
    )
    summary = flow.summary()
    most, falls = summary["argmax_gains_most"], summary["argmax_falls"]
    print(f"{name}: the likeliest other token gains most at {most:.0%} of positions,")
    print(f"     and falls at {falls:.0%}")
    if name == "dpo":
        print(flow)
