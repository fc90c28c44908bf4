"""Preference pairs of random tokens, and diagnoses with a Gram of choice."""

from dataclasses import replace

import torch
import zoo

import lddyn
from lddyn.sets.rows import Gram


def some_pairs(count=5):
    generator = torch.Generator().manual_seed(2)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist()

    found = []
    for _ in range(count):
        prompt, shared = draw(3, 6), draw(1, 3)
        found.append(tuple(lddyn.Example(prompt, shared + draw(2, 6)) for _ in range(2)))
    return found


def with_gram(found, gram):
    """The diagnosis as if these were the inner products of its gradients."""
    return replace(found, step=replace(found.step, gram=Gram(gram)))


def log_probs(model, example):
    return zoo.token_log_probs(model, example).sum()
