"""Streamed models: the same numbers to the bit, within the budget, and refusals that explain."""

import importlib
import json
import re
import sys
import threading

import peft
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

import lddyn
from lddyn.engine.anatomy import Anatomy
from lddyn.errors import NonFiniteError, UnsupportedModelError
from lddyn.store.identity import identify

pieces = importlib.import_module("lddyn.engine.stream.pieces")
streaming = importlib.import_module("lddyn.engine.stream.model")
OBSERVED, UPDATED = zoo.examples()


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def saved(folder, name="llama", shard="30KB", dtype=None, **changes):
    """A tiny model as safetensors shards."""
    model = zoo.build(name, **changes)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def least(source, **options):
    """The memory that the refusal of one byte asks for."""
    with pytest.raises(ValueError, match="memory must hold") as refusal:
        lddyn.stream(source, 1, **options)
    return int(re.search(r"memory=(\d+)", str(refusal.value))[1])


def tight(folder, **options):
    """A streamed model with one slot."""
    model = lddyn.stream(folder, least(folder, **options), **options)
    assert weights_of(model).slots == 1
    return model


def weights_of(model):
    return next(p for p in model.parameters() if hasattr(p, "fetch")).fetch.args[0]()


def grams(model, *methods):
    operator = lddyn.ntk(model, OBSERVED, UPDATED)
    return [operator.gram(method=method) for method in methods or ("paired", "pushed")]


def same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_grams_are_those_of_the_model_in_memory(name, tmp_path):
    saved(tmp_path, name)
    same(grams(tight(tmp_path)), grams(loaded(tmp_path)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_other_way_to_tie_the_head(name, tmp_path):
    tied = transformers.AutoConfig.for_model(name).tie_word_embeddings
    saved(tmp_path, name, tie_word_embeddings=not tied)
    same(grams(tight(tmp_path)), grams(loaded(tmp_path)))


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_any_number_of_slots(slots, tmp_path):
    saved(tmp_path, num_hidden_layers=5)
    weights = weights_of(lddyn.stream(tmp_path, "1GiB"))
    assert weights.slots == 5
    memory = weights.resident_bytes + slots * weights.slot_bytes
    model = lddyn.stream(tmp_path, memory + weights.slot_bytes // 2)
    assert weights_of(model).slots == slots
    same(grams(model), grams(loaded(tmp_path)))
    assert (weights_of(model).reads == 5) == (slots == 5)


def test_the_operator_is_that_of_the_model_in_memory(tmp_path):
    saved(tmp_path)
    cotangents = torch.randn(len(UPDATED.response_ids), zoo.VOCABULARY)

    def answers(model):
        operator = lddyn.ntk(model, OBSERVED, UPDATED)
        form = operator.lowrank(4, probes=4)
        return [
            operator @ cotangents,
            operator.explain().body,
            form @ cotangents,
            operator.frobenius().value,
            operator.restrict([3, 7]),
        ]

    for one, other in zip(answers(tight(tmp_path)), answers(loaded(tmp_path)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_weights_are_converted_as_they_are_read(name, tmp_path, monkeypatch):
    saved(tmp_path, name, dtype=torch.bfloat16)
    monkeypatch.setattr(pieces, "_STAGE", 64)
    plain = tight(tmp_path)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    same(grams(plain), grams(loaded(tmp_path, dtype=torch.bfloat16)))
    wide = tight(tmp_path, dtype=torch.float32)
    same(grams(wide), grams(loaded(tmp_path, dtype=torch.float32)))


def test_what_an_architecture_keeps_in_float32_stays_so(tmp_path, monkeypatch):
    saved(tmp_path)
    kind = transformers.LlamaForCausalLM
    monkeypatch.setattr(
        kind, "_keep_in_fp32_modules_strict", ["up_proj", "layers.*.input_layernorm"]
    )
    model, plain = (tight(tmp_path, dtype=torch.bfloat16), loaded(tmp_path, dtype=torch.bfloat16))
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if hasattr(one, "fetch"):
            one.fetch()
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_without_a_table_of_conversions(name, tmp_path, monkeypatch):
    """As in transformers 4, whose files have the model's own names."""
    saved(tmp_path, name, shard="1GB")
    if name == "gpt2":  # saved from the model without its head
        rewrite(
            tmp_path,
            lambda t: t.update({k.removeprefix("transformer."): t.pop(k) for k in list(t)}),
        )
    expected = grams(loaded(tmp_path), "paired")
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    same(grams(tight(tmp_path), "paired"), expected)


def test_one_file_and_host_memory(tmp_path):
    saved(tmp_path, shard="1GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()
    same(grams(tight(tmp_path)), grams(loaded(tmp_path)))
    model, cpu = loaded(tmp_path), torch.device("cpu")
    streamed = streaming._assemble(model, pieces.from_host(model), least(tmp_path), cpu)
    assert streamed is model and weights_of(model).slots == 1
    same(grams(model), grams(loaded(tmp_path)))


def test_weights_that_blocks_share_stay_in_memory(tmp_path):
    model = zoo.build("llama")
    first, second = model.model.layers
    second.mlp = first.mlp
    origins = pieces.from_host(model)
    streamed = streaming._assemble(model, origins, 10**9, torch.device("cpu"))
    assert not hasattr(first.mlp.up_proj.weight, "fetch")
    assert hasattr(first.self_attn.q_proj.weight, "fetch")
    assert bool(streamed(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all())


def test_a_store_knows_it_as_the_same_model(tmp_path):
    saved(tmp_path)
    assert identify(tight(tmp_path)) == identify(loaded(tmp_path))


# --------------------------------------------------------------------------- within the budget


def test_the_budget_is_kept_to_the_byte(tmp_path):
    saved(tmp_path, num_hidden_layers=4)
    memory = least(tmp_path)
    with pytest.raises(ValueError, match=f"{memory - 1:,}"):
        lddyn.stream(tmp_path, memory - 1)
    model = lddyn.stream(tmp_path, memory)
    grams(model)
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    held |= {b.data_ptr(): b.nbytes for b in model.buffers()}
    absent = 4 * 9 * 3  # one number each for the weights of three blocks
    assert sum(held.values()) <= memory + absent
    whole = sum(p.nbytes for p in model.parameters())
    assert whole > 2 * memory


def test_an_absent_weight_is_nan(tmp_path):
    model = tight(saved(tmp_path))
    last = model.model.layers[-1].mlp.up_proj.weight
    assert bool(last.isnan().all()) and last.untyped_storage().nbytes() == 4
    last.fetch()
    assert torch.equal(last, loaded(tmp_path).model.layers[-1].mlp.up_proj.weight)


def test_a_graph_that_outlives_its_weights_raises(tmp_path):
    model = tight(saved(tmp_path))
    loss = model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_are_read_only(tmp_path):
    model = tight(saved(tmp_path))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.fetch()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.up_proj.weight was changed in place"):
        grams(model)


def test_other_threads_build_modules_with_values():
    with streaming._parameters_on_meta():
        assert torch.nn.Linear(2, 2).weight.is_meta
        built = []
        thread = threading.Thread(target=lambda: built.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert not built[0].weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_a_streamed_model_is_neither_copied_nor_converted(tmp_path):
    import copy

    model = tight(saved(tmp_path))
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"converted to torch\.float64"):
        grams(model.double())


# --------------------------------------------------------------------------- decompositions


def adapted(model):
    """A LoRA adapter on a model, with the same random numbers each time."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_adapter_is_decomposed_and_verified(optimizer, tmp_path):
    saved(tmp_path)
    update = lddyn.SFT(UPDATED)
    streamed, plain = adapted(tight(tmp_path)), adapted(loaded(tmp_path))
    decs = [
        lddyn.decompose(m, OBSERVED, update, 1e-5, optimizer=optimizer) for m in (streamed, plain)
    ]
    for ask in (
        lambda dec: dec[0].influence,
        lambda dec: dec[0].delta_log_probs(),
        lambda dec: dec[0].error_estimate,
        lambda dec: dec[0].token_effects(1),
    ):
        one, other = map(ask, decs)
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())
    assert decs[0].verify(lrs=[1e-5], dtype=None).relative_error < 0.05
    with pytest.raises(UnsupportedModelError, match="use dtype=None"):
        decs[0].verify()


def test_a_step_of_streamed_weights_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"18 streamed weights are trainable.*bytes"):
        lddyn.decompose(tight(saved(tmp_path)), OBSERVED, lddyn.SFT(UPDATED), 1e-4)


# --------------------------------------------------------------------------- what is wrong is said


def rewrite(folder, change):
    """The folder's one file with its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_weight_and_a_wrong_shape(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    saved(tmp_path, shard="1GB")
    rewrite(tmp_path, lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(ValueError, match=r"up_proj.weight is stored with shape \(39, 32\)"):
        lddyn.stream(tmp_path, "1GiB")
    rewrite(tmp_path, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"1 weights are not in the model's files, {name}"):
        lddyn.stream(tmp_path, "1GiB")


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    saved(tmp_path, shard="1GB", num_hidden_layers=3)
    rewrite(tmp_path, lambda t: t[name][1, 2].fill_(torch.inf))
    with pytest.raises(NonFiniteError, match=f"{name} has 1 non-finite"):
        grams(tight(tmp_path))


def test_damaged_files(tmp_path):
    path = saved(tmp_path, shard="1GB") / "model.safetensors"
    sound = path.read_bytes()
    model = tight(tmp_path)
    path.write_bytes(sound[:-40_000])
    with pytest.raises(ValueError, match=r"model.safetensors ends inside model.layers"):
        grams(model)
    length = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 4]
    other = json.dumps(header).encode()
    for wrong, message in (
        (sound[:-1], "is at bytes"),
        (b"", "not a sound safetensors file"),
        (b"\xff" * 16, "its header has"),
        ((20).to_bytes(8, "little") + b"\x80" * 40, "no JSON object"),
        (len(other).to_bytes(8, "little") + other + sound[8 + length :], "has 4 bytes for shape"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            lddyn.stream(tmp_path, "1GiB")
    path.unlink()
    with pytest.raises(ValueError, match="safetensors only"):
        lddyn.stream(tmp_path, "1GiB")


def test_an_index_names_files_beside_it(tmp_path):
    saved(tmp_path / "a")
    index = tmp_path / "a" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"])
    for name in ("../model.safetensors", "absent.safetensors"):
        content["weight_map"][first] = name
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no file beside it"):
            lddyn.stream(tmp_path / "a", "1GiB")
    content["weight_map"][first] = max(content["weight_map"].values())
    index.write_text(json.dumps(content))


def test_no_code_of_the_model_runs(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        lddyn.stream(tmp_path, "1GiB")
    assert not (tmp_path / "ran").exists()


def test_arguments(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="'2GiB'"):
        lddyn.stream(tmp_path, "much")
    with pytest.raises(FileNotFoundError, match=r"config\.json and weights"):
        lddyn.stream(tmp_path / "absent", "1GiB")
    with pytest.raises(ValueError, match="give device='cuda'"):
        lddyn.stream(loaded(tmp_path), "1GiB")
    with pytest.raises(ValueError, match="or streamed already"):
        lddyn.stream(tight(tmp_path), "1GiB", device="cuda")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        lddyn.stream(tmp_path, "1GiB")


def test_an_anatomy_says_that_its_weights_are_streamed(tmp_path):
    saved(tmp_path)
    assert Anatomy(tight(tmp_path)).streamed
    assert not Anatomy(loaded(tmp_path)).streamed


def test_whole_sequences_of_a_streamed_model_are_the_same_to_the_bit(tmp_path):
    folder, sketch = saved(tmp_path), lddyn.Sketch(k=2400)
    rows = [
        lddyn.features(model, [OBSERVED, UPDATED], sketch, by="sequence").rows
        for model in (loaded(folder).eval(), tight(folder))
    ]
    assert torch.equal(*rows)
