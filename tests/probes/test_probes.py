"""Probing sets: built, read, written by a service; and the pass against one response at a time."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from lddyn.demo import world as demo
from lddyn.lab.probes.measure import one_by_one
from lddyn.probes.build import build, sample
from lddyn.probes.endpoint import Endpoint, write
from lddyn.probes.measure import measure
from lddyn.probes.probe_set import TYPES, ProbeSet

AUTHORS = Path(
    os.environ.get("LDDYN_HH_PROBES")
    or Path(__file__).parents[3] / "shared" / "data" / "hh-helpful" / "probes.jsonl"
)


@pytest.fixture(scope="module")
def world(small_worlds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield demo.build_world(small_worlds, progress=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def probes(world):
    rows = [
        {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in world.preference_pairs[:12]
    ]
    return build(rows[:8], rows[8:], model=world.model, tokenizer=world.tokenizer, max_new_tokens=9)


def test_build_makes_the_free_types(probes):
    written = {"chosen_gptsemantic", "chosen_gptformat", "reject_gptsemantic", "reject_gptformat"}
    assert set(TYPES) - set(probes.fields) - {"chosen_initial", "chosen_selfr"} == (
        written | {"irr_hum"}
    )
    chosen = [row["chosen"] for row in probes.rows]
    for row in probes.rows:
        assert row["irr_train"] in chosen and row["irr_train"] != row["chosen"]
        assert row["irr_test"] not in chosen
        assert sorted(row["random_permute"].split()) == sorted(row["chosen"].split())
        assert len(row["random_nonhum"].split()) == len(row["chosen"].split())
        assert row["random_permute"][0] == row["random_nonhum"][0] == " "


def test_build_is_seeded(world, probes):
    rows = [
        {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in world.preference_pairs[:12]
    ]
    again = build(
        rows[:8], rows[8:], model=world.model, tokenizer=world.tokenizer, max_new_tokens=9
    )
    assert again.rows == probes.rows
    assert build(rows[:8], rows[8:], seed=1).rows != build(rows[:8], rows[8:]).rows


def test_build_keeps_what_is_there_and_refuses_leaks(world):
    rows = [{**row, "irr_train": "mine"} for row in world.preference_pairs[:4]]
    assert {row["irr_train"] for row in build(rows[:2], rows[2:]).rows} == {"mine"}
    with pytest.raises(ValueError, match="1 of whose prompts"):
        build(rows[:3], rows[2:3])


def test_split_by_prompt(world):
    rows = world.preference_pairs[:10] * 2
    train, test = ProbeSet(rows).split(0.3, seed=1)
    assert len(test) == 6 and len(train) == 14
    assert not {r["prompt"] for r in train.rows} & {r["prompt"] for r in test.rows}
    with pytest.raises(ValueError, match="both sides"):
        ProbeSet(rows).split(0.0)


def test_read_and_save(tmp_path, probes):
    probes.save(tmp_path / "p.jsonl")
    assert ProbeSet.read(tmp_path / "p.jsonl").rows == list(probes.rows)
    assert len(ProbeSet.read(tmp_path / "p.jsonl", limit=3)) == 3
    assert {row["empty"] for row in probes.table() if row["group"] != "answers"} == {0}
    with pytest.raises(ValueError, match="row 0 of the probing set has no text under 'prompt'"):
        ProbeSet([{"chosen": "a"}])
    with pytest.raises(ValueError, match="none of the response fields"):
        ProbeSet([{"prompt": "a"}])


def test_each_response_is_cut_by_its_own_length(world):
    long = " ".join(["the lamp is yellow"] * 40)
    row = {"prompt": "Human: " + "what is it? " * 20, "chosen": " red", "rejected": f" {long}"}
    encoded = ProbeSet([row]).encode(world.tokenizer, max_length=120, max_prompt_length=30)
    chosen, rejected = encoded.examples
    assert len(chosen.prompt_ids) > 60  # the long response does not change what this one is given
    assert len(rejected.prompt_ids) == 30 and rejected.length == 120
    with pytest.raises(ValueError, match="fields must be among"):
        ProbeSet([row]).encode(world.tokenizer, fields=["nonsense"])


@pytest.mark.parametrize("tokens", [None, 40])
def test_measure_is_the_pass_of_one_response_at_a_time(world, probes, tokens):
    encoded = probes.encode(world.tokenizer)
    ours, theirs = (
        measure(world.model, encoded, tokens=tokens),
        one_by_one(world.model, encoded.examples),
    )
    for name in ("tokens", "log_prob", "greedy", "rest", "entropy", "peakiness", "energy"):
        a, b = getattr(theirs, name), getattr(ours, name)
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name


def test_measure_counts_masked_and_short_responses(world):
    from lddyn import Example

    examples = [
        Example([5, 6, 7], [8, 9, 10, 11], response_mask=[False, True, False, True]),
        Example([5, 6, 7], [8]),
        Example([6], [8, 9]),
        Example([6], [8, 9, 3], response_mask=[True, False, False]),
    ]
    ours, theirs = measure(world.model, examples), one_by_one(world.model, examples)
    assert ours.tokens.tolist() == [2, 1, 2, 1]
    assert torch.allclose(ours.log_prob, theirs.log_prob, rtol=1e-5)


def test_log_of_one_minus_the_largest_is_finite_when_it_saturates(world):
    import copy

    sure = copy.deepcopy(world.model)
    with torch.no_grad():
        sure.lm_head.weight *= 300
    row = world.preference_pairs[0]
    encoded = ProbeSet([row]).encode(world.tokenizer)
    ours, theirs = measure(sure, encoded), one_by_one(sure, encoded.examples)
    assert torch.isfinite(ours.rest).all() and ours.rest.min() < -100
    assert torch.allclose(ours.rest, theirs.rest, rtol=1e-4)


def test_grid_and_select(world, probes):
    encoded = probes.encode(world.tokenizer)
    grid = encoded.grid(torch.arange(len(encoded.examples)))
    assert grid.shape == (8, len(probes.fields))
    some = encoded.select([3, 1], ["rejected", "chosen"])
    assert [e.name for e in some.examples] == ["rejected", "chosen"] * 2
    assert some.examples[1] == encoded.examples[int(grid[3, 0])]


def test_sample_is_the_model_s(world):
    prompts = [row["prompt"] for row in world.preference_pairs[:5]]
    greedy = sample(world.model, world.tokenizer, prompts, max_new_tokens=7)
    assert greedy == [world.greedy(p, 7).partition("\n\nHuman:")[0] for p in prompts]
    drawn = [
        sample(
            world.model,
            world.tokenizer,
            prompts,
            max_new_tokens=7,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sample_without_an_eos_token_has_all_its_tokens(world):
    import copy

    endless = copy.deepcopy(world.tokenizer)
    endless.eos_token = None
    (text,) = sample(
        world.model,
        endless,
        [world.preference_pairs[0]["prompt"]],
        max_new_tokens=7,
        generator=torch.Generator().manual_seed(0),
        stop="no such text",
    )
    assert len(endless(text)["input_ids"]) >= 5
    with pytest.raises(ValueError, match="needs its tokenizer, got None"):
        build(world.preference_pairs[:2], world.preference_pairs[2:4], model=world.model)


# --------------------------------------------------------------------------- the service


class Service(BaseHTTPRequestHandler):
    """Fails as told, then answers with the last word of what it was asked."""

    failures: ClassVar[list] = []
    seen: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Service.seen.append({**body, "key": self.headers.get("Authorization"), "path": self.path})
        if Service.failures:
            self.send_response(Service.failures.pop(0))
            self.end_headers()
            return
        text = f"reply {len(Service.seen)}"
        reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = HTTPServer(("127.0.0.1", 0), Service)
    Service.failures, Service.seen = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", wait=0.01, timeout=5)
    server.shutdown()
    thread.join()
    server.server_close()


def test_write_asks_for_what_is_missing_and_resumes(service, tmp_path):
    rows = [
        {"prompt": f"Q{i}", "chosen": f" good {i}", "rejected": f" bad {i}", "irr_hum": " kept"}
        for i in range(2)
    ]
    Service.failures = [503, 429]
    done = write(ProbeSet(rows), service, tmp_path / "j.jsonl", fields=["chosen_gptsemantic"])
    assert len(Service.seen) == 4 and Service.seen[0]["path"] == "/v1/chat/completions"
    assert "Reference sentence: good 0" in Service.seen[0]["messages"][1]["content"]
    assert done.rows[0]["chosen_gptsemantic"] == " reply 3" and done.rows[0]["irr_hum"] == " kept"
    # an interrupted line is asked for again, whole ones are not
    journal = tmp_path / "j.jsonl"
    journal.write_text(journal.read_text()[:-5])
    again = write(ProbeSet(rows), service, journal, fields=["chosen_gptsemantic"])
    assert len(Service.seen) == 5 and again.rows[0] == done.rows[0]
    with pytest.raises(ValueError, match="fields must be among"):
        write(ProbeSet(rows), service, journal, fields=["random_permute"])
    whole = journal.read_bytes()
    for damaged in (whole.replace(b"reply", b"rep1y", 1), b'{"key": "a"}\n', b"[]\n", b"\xff\n"):
        journal.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{journal}: line \d"):
            write(ProbeSet(rows), service, journal, fields=["chosen_gptsemantic"])


def test_a_refusal_is_not_tried_again(service, tmp_path, monkeypatch):
    Service.failures = [401]
    with pytest.raises(RuntimeError, match="refused the request: status 401"):
        service.ask("hello")
    assert len(Service.seen) == 1
    Service.failures = [500] * 5
    with pytest.raises(RuntimeError, match="failed 5 times, at last: status 500"):
        service.ask("hello")
    monkeypatch.setenv("A_KEY", "secret")
    Endpoint(service.url, "m", "A_KEY").ask("hello")
    assert Service.seen[-1]["key"] == "Bearer secret"
    with pytest.raises(RuntimeError, match="no key under NOT_THERE"):
        Endpoint(service.url, "m", "NOT_THERE").ask("hello")


def test_the_authors_file_is_read_as_it_is():
    if not AUTHORS.exists():
        pytest.skip(f"the authors' probing set is not at {AUTHORS} (LDDYN_HH_PROBES names it)")
    probes = ProbeSet.read(AUTHORS)
    assert len(probes) == 500 and probes.fields == tuple(TYPES)
    empty = {row["type"]: row["empty"] for row in probes.table()}
    assert empty["chosen_initial"] == 21 and empty["rejected"] == 1


def test_measure_takes_an_anatomy_and_says_little(world, probes):
    import lddyn

    encoded = probes.encode(world.tokenizer)
    measured = measure(world.model, encoded)
    again = measure(lddyn.Anatomy(world.model), encoded)
    assert torch.equal(measured.log_prob, again.log_prob)
    assert measured.summary()["log_prob"] == pytest.approx(
        float(measured.log_prob.sum() / measured.tokens.sum())
    )
    assert json.loads(json.dumps(measured.summary()))["examples"] == len(encoded.examples)
    assert repr(measured).startswith(f"Measured({len(encoded.examples)} examples, log_prob -")
    assert repr(measure(world.model, [])) == "Measured(0 examples)"
    assert repr(encoded).startswith(f"Encoded({len(encoded.examples)} examples: 8 prompts, types ")
    assert len(repr(measured)) < 120 and len(repr(encoded)) < 250


def test_measure_leaves_every_module_in_its_own_mode(world, probes):
    model = world.model.train()
    model.model.norm.eval()  # as one that the user keeps frozen
    before = [module.training for module in model.modules()]
    measure(model, probes.encode(world.tokenizer).examples[:2])
    assert [module.training for module in model.modules()] == before
    model.eval()
