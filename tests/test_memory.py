"""Budgets of memory, errors of allocators, CPU threads."""

import sys
import threading
from dataclasses import dataclass

import pytest
import torch
import typer
import zoo

import lddyn
from lddyn.cli.console import one_line_errors
from lddyn.lab.experiment import experiment
from lddyn.lab.settings import Settings, option
from lddyn.memory import Budget, cpu_threads, in_gib, is_out_of_memory, name_memory, parse_memory
from lddyn.probes.measure import measure
from lddyn.store.build import build_store


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2**31),
        ("500MB", 500 * 10**6),
        (" 1.5 gib ", 3 * 2**29),
        ("4194304", 4194304),
        (4096, 4096),
        ("1TiB", 2**40),
        ("auto", 2**32),
    ],
)
def test_budgets(text, expected):
    assert parse_memory(text) == expected
    assert parse_memory(text, torch.device("cpu")) == expected


@pytest.mark.parametrize("bad", ["", "GiB", "2 sheep", "nan GiB", "infGB", True, None, "2GiB3"])
def test_what_is_no_budget(bad):
    with pytest.raises(ValueError, match="memory must look like '2GiB'"):
        parse_memory(bad)


@pytest.mark.parametrize("bad", ["1", "4096", "16"])
def test_a_budget_of_a_few_bytes_lacks_its_unit(bad):
    with pytest.raises(ValueError, match=rf"at least 64KiB, got '{bad}', which .* give a unit"):
        parse_memory(bad)


@pytest.mark.parametrize("bad", [0, -1, "-2GiB", "0"])
def test_a_budget_is_positive(bad):
    with pytest.raises(ValueError, match="memory must be positive"):
        parse_memory(bad)


def test_auto_on_a_gpu_is_a_third_of_what_is_free(monkeypatch):
    free = [2**30, 0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free)
    assert parse_memory("auto", torch.device("cuda")) == 2**32
    free[0] = 3 * 2**33
    assert parse_memory("auto", torch.device("cuda")) == 2**33


def test_errors_of_allocators():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_sizes_for_people():
    sizes = [1023, 2**20, 2**30, 15 * 2**30, 2**40, 16_060_522_496]
    shown = ["1,023 bytes", "0.000977 GiB", "1.00 GiB", "15.0 GiB", "1024 GiB", "15.0 GiB"]
    assert [in_gib(size) for size in sizes] == shown


def test_threads_are_restored_whoever_leaves_last():
    before = torch.get_num_threads()
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    with cpu_threads(1):
        with cpu_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

    entered, leave = threading.Event(), threading.Event()

    def other():
        with cpu_threads(1):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with cpu_threads(1):
        thread.start()
        assert entered.wait(30)
    assert torch.get_num_threads() == 1  # the other is still within
    leave.set()
    thread.join()
    with cpu_threads(3):
        pass
    assert torch.get_num_threads() == before


def test_a_number_counts_vectors_and_auto_does_not():
    number, auto = Budget.of("1GiB"), Budget.of("auto")
    assert (number.total, number.strict, auto.strict) == (2**30, True, False)
    assert number.beside(2**29) == 2**29 and number.beside(2**30) == 2**27
    assert auto.beside(2**40) == auto.total and auto.holds(2**40)
    assert number.holds(2**30) and not number.holds(2**30 + 1)
    number.require(2**30, "this", "try that")
    auto.require(2**40, "this", "try that")
    with pytest.raises(lddyn.MemoryBudgetError, match=r"this needs 8.12 GiB .*'8192MiB'.*try that"):
        number.require(2**33, "this", "try that")


def test_a_remedy_is_named_once():
    error = torch.OutOfMemoryError("no room\nat this line")
    name_memory(error, "2GiB")
    name_memory(error)
    first, second = str(error).splitlines()
    assert first.startswith("no room: ") and "(it was '2GiB')" in first and second == "at this line"
    assert str(error).count("--memory") == 1


# --------------------------------------------------------------------------- half-way


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama", num_hidden_layers=2, vocab_size=64).eval()


def rows(count):
    return [lddyn.Example([5, 9, i], [21, 9 + i, 40]) for i in range(count)]


def pairs(count):
    return [
        (lddyn.Example([5, i], [21, i + 3]), lddyn.Example([5, i], [i, 7])) for i in range(count)
    ]


class Failing:
    """Replaces a function by one that runs out of memory at its nth call, and at all later ones."""

    def __init__(self, monkeypatch, place, name, calls, error):
        module = sys.modules[place]
        self.original, self.left, self.error = getattr(module, name), calls, error
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.original(*args, **kwargs)


def no_room():
    return torch.OutOfMemoryError("no room (made up)")


def state(model):
    weights = {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    own = {n: dict(vars(m)) for n, m in model.named_modules()}
    return weights, own


def assert_restored(model, before):
    weights, own = before
    for name, parameter in model.named_parameters():
        value, requires, grad = weights[name]
        assert torch.equal(parameter, value) and (parameter.requires_grad, parameter.grad) == (
            requires,
            grad,
        )
    for name, module in model.named_modules():
        assert vars(module).keys() == own[name].keys() and module.training == own[name]["training"]


@pytest.mark.parametrize("error", [MemoryError(), no_room()], ids=["host", "device"])
def test_a_store_keeps_what_was_built_before_memory_ran_out(model, tmp_path, monkeypatch, error):
    some, sketch, before = rows(5), lddyn.Sketch(k=900), state(model)
    whole = build_store(model, some, tmp_path / "whole", sketch).store
    with monkeypatch.context() as patch:
        Failing(patch, "lddyn.sketches.features", "visit_tokens", 3, error)
        with pytest.raises(type(error), match=r"give a smaller memory= \(--memory\)"):
            build_store(model, some, tmp_path / "s", sketch)
    assert_restored(model, before)
    kept = lddyn.Store.open(tmp_path / "s")
    assert len(kept.example_ids) == 3
    assert torch.equal(kept.rows(0, 9), whole.rows(0, 9))
    assert build_store(model, some, tmp_path / "s", sketch).written == 2
    assert torch.equal(lddyn.Store.open(tmp_path / "s").rows(0, 15), whole.rows(0, 15))


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("what", ["ntk", "product", "decompose", "features"])
def test_a_model_is_whole_after_memory_ran_out(model, monkeypatch, what, calls):
    one, other = rows(2)
    K = lddyn.ntk(model, one, other)
    work = {
        "ntk": lambda: lddyn.ntk(model, one, other).gram(),
        "product": lambda: K @ torch.ones(3, 64),
        "decompose": lambda: lddyn.decompose(model, one, lddyn.SFT(other), 1e-3),
        "features": lambda: lddyn.features(model, [one], lddyn.Sketch(k=900)),
    }[what]
    expected, before = work() if what == "product" else None, state(model)
    with monkeypatch.context() as patch:
        for place in ("lddyn.engine.pullback", "lddyn.engine.pushforward"):
            name = "pull" if place.endswith("pullback") else "push"
            Failing(patch, place, name, calls, no_room())
        with pytest.raises(torch.OutOfMemoryError, match=r"no room .*--memory"):
            work()
    assert_restored(model, before)
    if expected is not None:
        assert torch.equal(K @ torch.ones(3, 64), expected)


def test_a_diagnosis_keeps_what_was_ranked_before_memory_ran_out(model, monkeypatch):
    run = lddyn.Run(lr=1e-3, epochs=1, batch=2)
    seen, before = [], state(model)
    whole = lddyn.diagnose(model, pairs(3), run=run, close_ups=0)
    with monkeypatch.context() as patch:
        Failing(patch, "lddyn.sets.segments", "read_rows", 0, no_room())
        with pytest.raises(torch.OutOfMemoryError, match="--memory"):
            lddyn.diagnose(model, pairs(3), run=run, close_ups=0, so_far=seen.append)
    assert_restored(model, before)  # the weights had been moved
    assert len(seen) == 1 and torch.equal(seen[0].gram, whole.gram)


def test_measuring_goes_on_with_less_at_a_time(model, monkeypatch):
    some, before = rows(6), state(model)
    whole, asked, calls = measure(model, some, tokens=16), [], []
    module = sys.modules["lddyn.probes.measure"]
    statistics, logits = module._statistics, module.response_logits

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise no_room()
        return statistics(*args)

    def recorded(model, examples, *, tokens):
        asked.append((tokens, len(examples)))
        return logits(model, examples, tokens=tokens)

    monkeypatch.setattr(module, "_statistics", failing)
    monkeypatch.setattr(module, "response_logits", recorded)
    again = measure(model, some, tokens=16)
    assert_restored(model, before)
    assert [tokens for tokens, _ in asked] == [16, 8] and 0 < asked[1][1] < asked[0][1] == 6
    assert torch.allclose(again.log_prob, whole.log_prob, rtol=1e-5)
    assert torch.allclose(again.entropy, whole.entropy, rtol=1e-5)


def test_one_response_too_large_says_what_to_do(model, monkeypatch):
    with monkeypatch.context() as patch:
        Failing(patch, "lddyn.probes.measure", "_statistics", 0, no_room())
        with pytest.raises(torch.OutOfMemoryError, match=r"one response at a time .* shorter"):
            measure(model, rows(2))


@dataclass(frozen=True)
class Sized(Settings):
    """An experiment of two steps."""

    cases: int = option(3, "Number of cases.")


def test_an_experiment_keeps_its_steps_when_memory_runs_out(tmp_path, capsys):
    made = []

    @experiment("sized", Sized)
    def run(lab, settings):
        """Makes a small step and a large one."""
        first = lab.once("small", lambda: made.append("small") or settings.cases)
        return lab.once("large", lambda: large(first))

    def large(first):
        made.append("large")
        if made.count("large") == 1:
            error = MemoryError()
            name_memory(error, "2GiB")  # as an analysis inside does
            raise error
        return 2 * first

    with pytest.raises(typer.Exit) as stopped, one_line_errors():
        run(tmp_path, progress=False)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.exit_code == 2
    assert line.startswith("error: MemoryError: the machine's memory ran out: ")
    assert str(tmp_path) in line and "the same command again" in line and "--cases" in line
    assert line.count("memory ran out") == 1 and "--memory" not in line
    assert run(tmp_path, progress=False) == 6 and made == ["small", "large", "large"]


def test_a_command_out_of_memory_names_its_options(capsys):
    with pytest.raises(typer.Exit), one_line_errors():
        raise no_room()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(option in line for option in ("no room", "--memory", "--limit", "--adapter"))
