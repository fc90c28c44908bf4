"""Gradient features as plain vectors for scikit-learn: which answers does the model learn alike?

    python examples/features_sklearn.py

The demo's answers are of eight kinds. They are clustered by their gradients: two answers are alike
if a step on one changes the log-prob of the other.
"""

import numpy as np
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

import lddyn
from lddyn.demo.world import build_world

world = build_world()
rows = world.preference_pairs[:64]
examples = [lddyn.encode(world.tokenizer, row["prompt"], row["chosen"]) for row in rows]
feats = lddyn.features(world.model, examples, lddyn.Sketch(k=16384), by="sequence")

x = feats.vectors().numpy()  # inner products estimate those of the gradients
x /= np.linalg.norm(x, axis=1, keepdims=True)
topics = [row["topic"] for row in rows]
clusters = SpectralClustering(len(set(topics)), affinity="precomputed", random_state=0)
labels = clusters.fit_predict((x @ x.T).clip(0))
for label in sorted(set(labels)):
    inside = [topic for topic, other in zip(topics, labels, strict=True) if other == label]
    print(label, {topic: inside.count(topic) for topic in sorted(set(inside))})
print(
    f"agreement with the kinds: {adjusted_rand_score(topics, labels):.2f} (1: equal, 0: by chance)"
)
