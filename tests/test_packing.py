"""Packed and cached logits against the model's own, one sequence at a time."""

import pytest
import torch
import zoo

from lddyn import Example, packing
from lddyn.packing import response_logits

# Shared prompts, equal lengths, a single token, masks, a prompt that is another one's beginning.
EXAMPLES = [
    Example([5, 9, 33], [21, 9, 40, 7]),
    Example([5, 9], [33, 2]),
    Example([5, 9, 33], [8]),
    Example([5, 9, 33], [7, 7, 3, 21], response_mask=[False, True, False, True]),
    Example([12], [4, 40, 9, 5, 6, 61]),
    Example([5, 9, 33], [60, 2], response_mask=[True, False]),
]
# Capped scores, sinks, ALiBi, a window below the trial's sequences, code without the interface.
CACHED = {"gemma2", "gpt_oss", "bloom", "mistral", "stablelm", "falcon"}


def own(model, examples=EXAMPLES):
    """Logits of the counted tokens, example by example, from the model's own attention."""
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0, list(e.positions)]
                for e in examples
            ]
        )


def collected(parts):
    """Logits by example, and targets in the same order."""
    logits, targets, owners = (torch.cat(x) for x in zip(*parts, strict=True))
    order = owners.argsort(stable=True)
    return logits[order], targets[order].tolist()


@pytest.mark.parametrize("tokens", [None, 9])
@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_logits_are_the_model_s_own(name, tokens):
    model = zoo.build(name).eval()
    with torch.no_grad():
        logits, targets = collected(response_logits(model, EXAMPLES, tokens=tokens))
    truth = own(model)
    assert targets == [t for e in EXAMPLES for t in e.targets]
    assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max()
    if tokens is None:
        assert packing._can_be_packed(model) == (name not in CACHED)


@pytest.mark.parametrize("way", [packing._packed, packing._cached])
def test_both_ways_in_half_precision_and_with_lora(way):
    models = (zoo.build("llama").eval().bfloat16(), zoo.lora("qwen2").eval())
    for model in models:
        assert packing._can_be_packed(model)
        with torch.no_grad():
            logits, _ = collected(way(model, EXAMPLES, 100))
        truth = own(model)
        error = 16 * torch.finfo(truth.dtype).eps
        assert (logits - truth).norm() <= error * truth.norm()


def test_without_cpu_flash_attention(monkeypatch):
    """The plain form, which other devices take, is the same function."""
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))  # (B, H, T, d)
    for causal in (True, False):
        fast = packing._attend(query, key, value, 0.7, causal)
        wide = torch.cat([value, value], -1)  # of another width than the keys
        plain = packing._attend(query, key, wide, 0.7, causal)
        assert torch.allclose(fast[0], plain[0][..., :4], atol=1e-6)
        assert torch.allclose(fast[1], plain[1], atol=1e-6)


def test_a_model_whose_tokens_meet_elsewhere_is_not_packed():
    """One that mixes neighbours outside its attention, as convolutions and state spaces do."""

    class Mixing(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])

    model = zoo.build("llama").eval()
    assert packing._can_be_packed(model)
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)
    assert not packing._trial(model)


def test_the_model_s_attention_is_its_own_again():
    model = zoo.build("llama").eval()
    with torch.no_grad():
        for _ in response_logits(model, EXAMPLES, tokens=9):
            assert model.config._attn_implementation == "eager"  # between two parts as well


def test_sequences_beyond_a_window_are_cached(monkeypatch):
    model = zoo.build("mistral", sliding_window=9).eval()
    assert packing._can_be_packed(model)
    long = [Example([5, 9, 33], list(range(3, 15))), Example([5, 9, 33], [8, 9])]
    monkeypatch.setattr(packing, "_packed", None)
    with torch.no_grad():
        logits, _ = collected(response_logits(model, long))
    truth = own(model, long)
    assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max()
