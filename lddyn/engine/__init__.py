"""A causal LM opened at its seams: traces, replays, pullbacks, pushforwards, Grams.

anatomy        opens a model; skeleton, blocks, recognise, ledger, guard and replay are its parts
trace          the stored forward pass, and one segment computed again
factors        token gradients as factors, and their pairing; token_factors: for other tools
pullback       cotangents from the head down; rowwise and sequences are its two special cases
pushforward    parameter changes and factors from the embeddings up: J Δθ
linearized     tangents through one segment, by the transpose of its pullback
gradient       plain backward passes; realised: log π with a derivative that does not cancel
backward_check holds every model once to a plain backward pass
gram           inner products of gradients, of tokens and of sequences
logits         log π of responses; packed, cached and grouping are how many share a pass
trial          questions about a model that are answered by trying once
stream/        models that do not fit in memory
"""

from lddyn.lazy import attributes

__getattr__, __dir__ = attributes(__name__, {})
