"""Packed and cached logits against the model's own, one sequence at a time."""

import threading

import pytest
import torch
import transformers
import zoo

from lddyn import Example
from lddyn.engine import logits, packed
from lddyn.engine.cached import cached_logits
from lddyn.engine.logits import alone_logits, fastest, response_logits, sequence_log_probs
from lddyn.engine.packed import packed_logits
from lddyn.engine.trial import fallbacks
from lddyn.probes.measure import measure

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
CACHED = {"gemma2", "gemma3_text", "gpt_oss", "bloom", "mistral", "stablelm", "falcon"}


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
        assert fastest(model, 7) is (cached_logits if name in CACHED else packed_logits)


@pytest.mark.parametrize("way", [packed_logits, cached_logits])
def test_both_ways_in_half_precision_and_with_lora(way):
    models = (zoo.build("llama").eval().bfloat16(), zoo.lora("qwen2").eval())
    for model in models:
        with torch.no_grad():
            assert fastest(model, 7) is packed_logits
            logits, _ = collected(way(model, EXAMPLES, 100))
        truth = own(model)
        error = 16 * torch.finfo(truth.dtype).eps
        assert (logits - truth).norm() <= error * truth.norm()


def test_a_padded_batch_has_each_sequence_s_log_prob_and_gradient():
    model = zoo.build("llama").eval()
    total = sequence_log_probs(model, EXAMPLES)
    parameters = list(model.parameters())
    for example, value in zip(EXAMPLES, total, strict=True):
        truth = zoo.token_log_probs(model, example).sum()
        assert torch.allclose(value, truth, atol=1e-5)
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        expected = torch.autograd.grad(truth, parameters)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("scores", [1 << 26, 60])  # all at once, two rows at a time
def test_without_cpu_flash_attention(monkeypatch, scores):
    """The plain form, which other devices take, is the same function."""
    monkeypatch.setattr(packed, "_SCORES", scores)
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))  # (B, H, T, d)
    for causal in (True, False):
        fast = packed._attend(query, key, value, 0.7, causal)
        wide = torch.cat([value, value], -1)  # of another width than the keys
        plain = packed._attend(query, key, wide, 0.7, causal)
        assert torch.allclose(fast[0], plain[0][..., :4], atol=1e-6)
        assert torch.allclose(fast[1], plain[1], atol=1e-6)


class Mixing(torch.nn.Module):
    """A layer that also sees its left neighbour, as convolutions and state spaces do."""

    def __init__(self, inner, share):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x):
        return self.inner(x + self.share * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_tokens_meet_elsewhere_is_read_alone(dtype):
    """Even where that does less than rounding does."""
    model = zoo.build("llama").eval().to(dtype)
    with torch.no_grad():
        assert fastest(model, 7) is packed_logits
        model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp, 0.1)
        assert fastest(model, 10) is not packed_logits  # of another length, so tried anew
    assert "packed into one sequence" in str(fallbacks(model))


# Caches that cannot be copied row by row, one that the model does not use at all, and rotary
# embeddings that are stretched by the longest sequence of a forward.
ALONE = {
    "lfm2": ("lfm2", {**zoo._COMMON, "layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"vocab_size": 89, "hidden_size": 32, "num_hidden_layers": 2}),
    "rwkv": ("rwkv", {"vocab_size": 89, "hidden_size": 32, "num_hidden_layers": 2}),
    "dynamic rope": (
        "llama",
        {
            **zoo._COMMON,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
}


@pytest.mark.parametrize("name", sorted(ALONE))
def test_models_that_are_read_alone(name):
    kind, options = ALONE[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    examples = [*EXAMPLES, Example(list(range(3, 20)), [8, 9, 7])]
    with torch.no_grad():
        assert fastest(model, 20) is alone_logits
        logits, _ = collected(response_logits(model, examples))
    assert torch.allclose(logits, own(model, examples), atol=1e-6)


def test_longer_sequences_are_tried_anew():
    model = zoo.build("llama").eval()
    for trial in (logits._CAN_PACK, logits._CAN_CACHE):
        trial.settle(model, "", False, "tried before", size=20)
    with torch.no_grad():
        assert fastest(model, 20) is alone_logits
        assert fastest(model, 21) is packed_logits


def test_threads_share_a_model():
    """One at a time; its attention and mode are its own afterwards."""
    model, failed = zoo.build("llama").train(), []

    def work():
        try:
            for _ in range(5):
                measure(model, EXAMPLES)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert model.config._attn_implementation == "eager"
    assert all(module.training for module in model.modules())


def test_the_model_s_attention_is_its_own_again():
    model = zoo.build("llama").eval()
    with torch.no_grad():
        for _ in response_logits(model, EXAMPLES, tokens=9):
            assert model.config._attn_implementation == "eager"  # between two parts as well


def test_sequences_beyond_a_window_are_cached(monkeypatch):
    model = zoo.build("mistral", sliding_window=9).eval()
    with torch.no_grad():
        assert fastest(model, 9) is packed_logits
    long = [Example([5, 9, 33], list(range(3, 15))), Example([5, 9, 33], [8, 9])]
    monkeypatch.setattr(packed, "packed_logits", None)
    with torch.no_grad():
        logits, _ = collected(response_logits(model, long))
    truth = own(model, long)
    assert (logits - truth).abs().max() <= 2e-5 * truth.abs().max()
