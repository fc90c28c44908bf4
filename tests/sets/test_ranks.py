"""Processes that divide the passes of a diagnosis get the diagnosis of one."""

import json
import sys

import pytest
import torch
import zoo
from preference_pairs import some_pairs
from ranks import run_ranks

import lddyn
from lddyn.ranks import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks with threads of BLAS")


def together(work, folder):
    """What `work(ranks)` returns in each of two processes."""

    def printed():
        with Ranks.of_torchrun() as ranks:
            print(json.dumps(work(ranks)))

    return [json.loads(text) for text in run_ranks(printed, folder)]


def numbers(diagnosis):
    """All numbers of a diagnosis as lists."""
    run = diagnosis.forecast
    parts = {"gram": diagnosis.gram, "change": diagnosis.step.change}
    parts["observed"] = diagnosis.step.observed_effects
    parts |= {} if run is None else {"run": run.change, "effects": run.effects}
    facts = getattr(diagnosis.step.readings, "facts", {})
    parts |= {f"facts.{k}": v for k, v in facts.items()}
    for name, values in diagnosis.step.readings.token_facts.items():
        parts[f"tokens.{name}"] = torch.cat(list(values)).double()
    if isinstance(diagnosis, lddyn.Diagnosis):
        parts["reference"] = diagnosis.step.reference
        measured = (diagnosis.validation or {"scores": []})["scores"]
        parts["real steps"] = torch.tensor([[row["own"]["rho"] for row in measured]])
        for pair, seen in diagnosis.close_ups.items():
            parts[f"close-up.{pair}"] = torch.cat([seen.own.flatten(), *seen.others.values()])
    return {k: v.double().tolist() for k, v in parts.items()}


@pytest.mark.parametrize(("sketched", "single"), [(False, False), (True, True)])
def test_two_processes_get_the_diagnosis_of_one(model, run, tmp_path, sketched, single):
    pairs = some_pairs()
    rows = [pair[0] for pair in pairs] if single else pairs
    options = {"observe": [pairs[0][1]], "run": lddyn.Run(lr=1e-4, epochs=2, batch=2)}
    options |= {"sketch": lddyn.Sketch(k=512)} if sketched else {}
    if not single:
        other = zoo.build("llama", seed=1).eval()
        options |= {"close_ups": 1, "lbk": True, "validate": 4, "reference": other}

    def work(ranks):
        return numbers(
            lddyn.diagnose(model, rows, "sft" if single else "dpo", ranks=ranks, **options)
        )

    alone = work(Ranks())
    both = together(work, tmp_path)
    for answer in both:
        assert answer.keys() == alone.keys()
        for name, values in alone.items():
            one, two = (torch.tensor(x) for x in (values, answer[name]))
            scale = float(one.abs().amax()) or 1.0
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert both[0] == both[1]


def test_different_rows_are_refused(model, tmp_path):
    pairs = some_pairs()

    def work(ranks):
        try:
            lddyn.diagnose(model, pairs[ranks.rank :], close_ups=0, ranks=ranks)
        except RuntimeError as error:
            return str(error)

    for error in together(work, tmp_path):
        assert "model and rows must be the same in all 2 processes" in error


def test_values_arrive_as_they_were(tmp_path):
    def work(ranks):
        return ranks.gather({"é": [0.1 * (ranks.rank + 1)] * (1 + 9 * ranks.rank)})

    wanted = [{"é": [0.1]}, {"é": [0.2] * 10}]
    assert together(work, tmp_path) == [wanted, wanted]
