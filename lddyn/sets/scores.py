"""The scores of a pair and of a token: what each one means."""

from __future__ import annotations

__all__ = ["SCORES", "TOKENS"]

# Score of a pair -> its meaning. A derivative is in nats per unit of the learning rate.
SCORES = {
    "set_chosen": "d log π(y+) of this pair by a step on the whole set, per unit of lr",
    "own_chosen": "d log π(y+) of this pair by a step on this pair alone, per unit of lr",
    "set_rejected": "d log π(y−) of this pair by a step on the whole set, per unit of lr",
    "own_rejected": "d log π(y−) of this pair by a step on this pair alone, per unit of lr",
    "contribution": "mean d log π(y+) of all pairs by this pair's part of a step on the set",
    "run_chosen": "predicted Δ log π(y+) of this pair by a whole run, nats (with run=…)",
    "run_rejected": "predicted Δ log π(y−) of this pair by a whole run, nats (with run=…)",
    "run_contribution": "this pair's part of the mean Δ log π(y+) of all pairs by the run, nats",
    "norm_chosen": "‖g+‖², g+ the gradient of log π(y+)",
    "norm_rejected": "‖g−‖², g− the gradient of log π(y−)",
    "inner": "⟨g+, g−⟩",
    "entanglement": "⟨g+, g−⟩ / ‖g+‖²: above 1, DPO's step on this pair lowers its y+",
    "lbk": "LBK, the paper's lower bound of ‖K‖, for a step on y− at y+ (of pairs looked at)",
    "head_inner": "the output layer's part of ⟨g+, g−⟩, from one forward pass (NTHR, summed)",
    "ches": "CHES: ⟨S+, S−⟩ − ‖S+‖², S the sum of last hidden states (Razin et al., 2025)",
    "ches_per_token": "CHES by length: ⟨S+, S−⟩/(|y+||y−|) − ‖S+‖²/|y+|²",
    "edit_distance": "edit distance of the two responses' tokens, divided by the longer length",
    "similarity": "cosine of the mean last hidden states of y+ and y−",
    "log_prob_chosen": "log π(y+), nats",
    "log_prob_rejected": "log π(y−), nats",
    "valley": "mean log π of the tokens of y−, nats: the lower, the less likely y− is (paper §3.3)",
    "tau": "threshold τ = ‖π‖² − π_y, mean over y−: lowering y raises only tokens with π > τ",
    "squeeze": "part of the probability that lowering y− frees in a softmax which one token gets",
    "margin": "log-ratio of y+ to the reference minus that of y−, nats",
    "weight_chosen": "w+ = ∂L/∂ log π(y+): a step raises y+ where it is negative",
    "weight_rejected": "w− = ∂L/∂ log π(y−): a step lowers y− where it is positive",
}

# Score of a token -> its meaning. Those of a pair's tokens add up to the pair's score of that name.
TOKENS = {
    "own_chosen": "d log π(y+) by this token's part of a step on its pair alone, per unit of lr",
    "own_rejected": "d log π(y−) by this token's part of a step on its pair alone, per unit of lr",
    "contribution": "mean d log π(y+) of all pairs by this token's part of a step on the set",
    "nthr": "Σ_k ⟨e − π, e_k − π_k⟩⟨h, h_k⟩ over tokens k of y+ (Deng et al., 2025); over y−, the "
    "sum is head_inner",
    "ches": "the token's part of CHES: ⟨S+, h⟩ of a token of y−, −⟨S+, h⟩ of one of y+",
    "log_prob": "log π of the token, nats",
}
