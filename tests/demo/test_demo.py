"""The demo's world: language, training, cache, and the pair that falls."""

import json
import shutil
import subprocess
import sys

import platformdirs
import pytest
import torch

from lddyn.data.audit import audit
from lddyn.data.encode import encode
from lddyn.data.rows import encode_row
from lddyn.demo import world as demo
from lddyn.demo.cache import cache_root
from lddyn.demo.language import make_corpus, make_items

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the demo does, for the same reason
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A cache with the world after one step."""
    cache = tmp_path_factory.mktemp("once")
    demo.build_world(cache, progress=False, steps=1)
    return cache


@pytest.fixture(scope="module")
def world(cache):
    return demo.build_world(cache, progress=False, steps=STEPS)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log_prob(world, prompt, response):
    ex = encode(world.tokenizer, prompt, response)
    with torch.no_grad():
        logits = world.model(input_ids=torch.tensor([ex.ids])).logits[0].double()
    return logits.log_softmax(-1)[list(ex.positions), list(ex.targets)].sum().item()


def test_build_world_trains(world):
    assert world.stats["loss"] < 6.0 < torch.log(torch.tensor(1024.0)).item()
    assert world.stats["parameters"] == sum(p.numel() for p in world.model.parameters())
    assert not world.stats["cached"]
    assert not world.model.training
    assert world.path.is_dir()
    assert {p.dtype for p in world.model.parameters()} == {torch.float32}


def test_build_world_is_cached(world, cache):
    again = demo.build_world(cache, progress=False, steps=STEPS)
    assert again.stats["cached"]
    assert again.stats["loss"] == world.stats["loss"]
    assert torch.equal(weights(again.model), weights(world.model))
    assert again.tokenizer.get_vocab() == world.tokenizer.get_vocab()
    assert again.tokenizer.eos_token_id == world.tokenizer.eos_token_id
    assert again.preference_pairs == world.preference_pairs
    assert not list(cache.glob(".building-*"))


def test_build_world_does_not_depend_on_the_number_of_threads(world, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        other = demo.build_world(tmp_path, progress=False, steps=STEPS)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weights(world.model), weights(other.model))


def test_build_world_is_deterministic_and_leaves_the_random_state(tmp_path):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = demo.build_world(tmp_path / "a", progress=False, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = demo.build_world(tmp_path / "b", progress=False, steps=2)
    assert torch.equal(weights(first.model), weights(second.model))
    assert first.preference_pairs == second.preference_pairs
    loaded = demo.build_world(tmp_path / "b", progress=False, steps=2)
    assert torch.equal(weights(first.model), weights(loaded.model))
    other = demo.build_world(tmp_path / "b", seed=1, progress=False, steps=2)
    assert not torch.equal(weights(first.model), weights(other.model))
    assert first.preference_pairs != other.preference_pairs
    assert len(list((tmp_path / "b").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "model.safetensors").write_bytes(b"nothing"),
        lambda p: (p / "tokenizer.json").unlink(),
        lambda p: (p / "manifest.json").write_text("{"),
        lambda p: (p / "manifest.json").write_text('{"stats": {}, "sha256": {}}'),
    ],
    ids=["weights", "tokenizer", "manifest", "empty-manifest"],
)
def test_broken_cache_is_rebuilt(tmp_path, damage, once):
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    first = demo.build_world(tmp_path, progress=False, steps=1)
    assert first.stats["cached"]
    damage(first.path)
    with pytest.warns(UserWarning, match="is damaged"):
        second = demo.build_world(tmp_path, progress=False, steps=1)
    assert not second.stats["cached"]
    assert torch.equal(weights(first.model), weights(second.model))


def test_one_flipped_bit_is_noticed(tmp_path, once):
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    first = demo.build_world(tmp_path, progress=False, steps=1)
    path = first.path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="not what was written"):
        demo.build_world(tmp_path, progress=False, steps=1)


def test_no_cache_is_a_warning_not_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.warns(UserWarning, match="not cached"):
        world = demo.build_world(file, progress=False, steps=1)
    assert world.path is None
    assert file.read_text() == "in the way"


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("LDDYN_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    assert demo.build_world(progress=False, steps=1).path.parent == tmp_path
    monkeypatch.delenv("LDDYN_CACHE_DIR")
    assert cache_root() == platformdirs.user_cache_path("lddyn", appauthor=False)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_root() == tmp_path / "xdg" / "lddyn"


def test_a_folder_for_every_seed_and_length(world, cache):
    assert world.path == demo.world_folder(cache, steps=STEPS)
    others = {demo.world_folder(cache, seed, steps=n) for seed in (0, 1) for n in (None, STEPS)}
    assert len(others) == 4 and world.path in others
    assert demo.world_folder(cache) == demo.world_folder(cache, steps=500)


def test_a_world_is_told_in_a_line(world):
    assert repr(world).startswith("World(a Llama of 9") and len(repr(world)) < 100


def test_build_world_refuses_bad_steps(tmp_path):
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        demo.build_world(tmp_path, steps=0)


def test_language_is_large_and_clean():
    items = make_items(0)
    texts = set(make_corpus(items, 0))
    assert len(texts) > 1500
    assert not [text for text in texts if "{" in text or "  " in text]
    assert all(text.endswith(".") for text in texts)
    for item in items:
        answers = [item.good, item.other, item.near, item.near_other, item.unhelpful]
        assert len(set(answers)) == 5


def test_pairs_pass_the_audit(world):
    found = audit(
        world.tokenizer, world.preference_pairs, world.probe_fields, config=world.model.config
    )
    assert found.ok, str(found)
    assert found.n_responses == len(world.preference_pairs) * len(world.probe_fields)
    assert audit(world.tokenizer, world.sft_pairs).ok
    assert len(world.sft_pairs) == len(world.preference_pairs) > 200


def test_probe_fields(world):
    for row in world.preference_pairs:
        assert set(world.probe_fields) | {"prompt", "kind", "topic"} == set(row)
        assert row["chosen"] not in {row[f] for f in world.probe_fields if f != "chosen"}
        assert sorted(row["random_permute"].split()) == sorted(row["chosen"].split())
    chosen = {row["chosen"] for row in world.preference_pairs}
    assert all(row["irr_train"] in chosen for row in world.preference_pairs)
    assert all(row["irr_test"] not in chosen for row in world.preference_pairs)
    assert {row["kind"] for row in world.preference_pairs} == {"near", "unhelpful", "unrelated"}


def test_near_pairs_share_their_wording(world):
    def shared(row):
        left, right = (encode(world.tokenizer, "x", row[f]).targets for f in ("chosen", "rejected"))
        return len(set(left) & set(right)) / len(set(left) | set(right))

    rows = world.preference_pairs
    near = [shared(row) for row in rows if row["kind"] == "near"]
    apart = [shared(row) for row in rows if row["kind"] == "unrelated"]
    assert sum(near) / len(near) > 0.6 > 0.4 > sum(apart) / len(apart)


def test_rows_encode(world):
    row = world.preference_pairs[0]
    encoded = encode_row(world.tokenizer, row, world.probe_fields)
    assert list(encoded) == [
        "chosen",
        "rejected",
        *world.probe_fields[1:3],
        *world.probe_fields[4:],
    ]
    assert "".join(encoded["chosen"].token_texts) == row["chosen"] + "<|endoftext|>"


def test_sft_raises_the_chosen_answers_of_a_copy(world):
    before = weights(world.model).clone()
    tuned = demo.sft(world, progress=False, steps=5)
    assert torch.equal(weights(world.model), before)
    for row in world.preference_pairs[:5]:
        now = log_prob(tuned, row["prompt"], row["chosen"])
        assert now > log_prob(world, row["prompt"], row["chosen"])
    assert tuned.stats["sft_loss"] > 0
    assert all(p.grad is None for p in tuned.model.parameters())


def test_falling_pair_predicts_the_sign(world):
    index = demo.falling_pair(world, candidates=6)
    row = world.preference_pairs[index]
    assert row["kind"] == "near"
    lowest = {}
    near = [i for i, r in enumerate(world.preference_pairs) if r["kind"] == "near"][:6]
    for i in near:
        r = world.preference_pairs[i]
        tuned = demo.World(**{**world.__dict__, "model": _after_dpo_step(world, r, lr=1e-4)})
        lowest[i] = log_prob(tuned, r["prompt"], r["chosen"]) - log_prob(
            world, r["prompt"], r["chosen"]
        )
    assert min(lowest, key=lowest.get) == index
    with pytest.raises(ValueError, match="kind must be one of"):
        demo.falling_pair(world, kind="nearly")


def _after_dpo_step(world, row, lr):
    import copy

    model = copy.deepcopy(world.model)
    total = 0.0
    for field, sign in (("chosen", 1.0), ("rejected", -1.0)):
        ex = encode(world.tokenizer, row["prompt"], row[field])
        logits = model(input_ids=torch.tensor([ex.ids])).logits[0]
        chosen = logits.log_softmax(-1)[list(ex.positions), list(ex.targets)].sum()
        total = total + sign * 0.05 * chosen  # beta (1 - a) at the start: 0.1 / 2
    total.backward()
    with torch.no_grad():
        for p in model.parameters():
            p += lr * p.grad
    return model


def test_greedy_stops(world):
    answer = world.greedy(world.preference_pairs[0]["prompt"], max_new_tokens=3)
    assert isinstance(answer, str)
    assert len(world.tokenizer(answer)["input_ids"]) <= 4


def test_import_is_light():
    code = "import sys; import lddyn.demo; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifest_is_json_with_the_loss(world):
    manifest = json.loads((world.path / "manifest.json").read_text())
    assert manifest["stats"]["loss"] == world.stats["loss"]
    assert "model.safetensors" in manifest["sha256"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_world_answers_and_a_chosen_answer_falls(tmp_path):
    world = demo.build_world(tmp_path, progress=False)
    assert world.stats["loss"] < 0.5
    tuned = demo.sft(world, progress=False)
    rows = tuned.preference_pairs
    right = [tuned.greedy(row["prompt"]) == row["chosen"] for row in rows[:30]]
    assert sum(right) >= 20
    index = demo.falling_pair(tuned)
    before = log_prob(tuned, rows[index]["prompt"], rows[index]["chosen"])
    stepped = demo.World(**{**tuned.__dict__, "model": _after_dpo_step(tuned, rows[index], 1e-4)})
    assert log_prob(stepped, rows[index]["prompt"], rows[index]["chosen"]) < before
