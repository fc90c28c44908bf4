"""Threads and interrupts: who waits for whom, and that every change of a model is undone."""

import copy
import signal
import threading
import time

import interrupts
import pytest
import torch
import zoo

import lddyn
from lddyn.engine import head, logits, reference_policy
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.guard import evaluating
from lddyn.engine.turns import switching, turn, turn_of
from lddyn.probes.measure import measure

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where a shell started the tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


IDS = torch.tensor([[5, 9, 33, 4, 8, 1]])
LIMIT = 30  # seconds until a thread counts as hanging


def plain(model):
    with torch.no_grad():
        return model(IDS).logits


class Threads:
    """Threads that all end within the limit, and whose errors are raised."""

    def __init__(self):
        self.threads, self.errors = [], []

    def start(self, work):
        def run():
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def join(self):
        end = time.monotonic() + LIMIT
        for thread in self.threads:
            thread.join(max(end - time.monotonic(), 0.01))
        assert not any(thread.is_alive() for thread in self.threads), "a thread hangs"
        if self.errors:
            raise self.errors[0]


@pytest.fixture
def threads():
    started = Threads()
    yield started
    started.join()


# --------------------------------------------------------------------------- threads


@pytest.mark.case("threads: two analyses and a forward")
def test_two_analyses_and_forward_passes_of_one_model(threads):
    """Analyses wait for each other; forward passes return what they return alone, to the bit."""
    model = zoo.build("llama").eval()
    observed, updated = zoo.examples()
    kernel = lddyn.ntk(model, observed, updated).gram()
    step = lddyn.decompose(model, observed, lddyn.SFT(updated), 1e-3)[0].influence
    alone, before = plain(model), interrupts.state(model)
    grams, influences, wrong, done = [], [], [], []

    def analyse():
        grams.append(lddyn.ntk(model, observed, updated).gram())
        done.append(1)

    def decompose():
        influences.append(lddyn.decompose(model, observed, lddyn.SFT(updated), 1e-3)[0].influence)
        done.append(1)

    def forward():
        while len(done) < 2:
            time.sleep(0.001)
            wrong.append(not torch.equal(plain(model), alone))

    for work in (analyse, decompose, forward):
        threads.start(work)
    threads.join()
    assert torch.equal(grams[0], kernel) and torch.equal(influences[0], step)
    assert wrong and not any(wrong)
    assert interrupts.state(model) == before


def test_a_forward_pass_waits_until_the_model_is_whole(threads):
    """Whichever module another thread enters first."""
    model = zoo.build("llama").train()
    hidden, layer = torch.randn(1, 3, 32), model.model.layers[0].mlp
    works = [lambda: plain(model), lambda: model.model(IDS)[0], lambda: layer(hidden)]
    alone, out = [work() for work in works], {}
    anatomy = Anatomy(model)
    with anatomy.analysis(), anatomy.patched(anatomy.whole, lambda h: h):
        for number, work in enumerate(works):
            threads.start(lambda n=number, w=work: out.update({n: w()}))
        time.sleep(0.05)
        assert not out
    threads.join()
    assert all(torch.equal(out[number], value) for number, value in enumerate(alone))


def test_an_analysis_lets_a_forward_pass_finish_the_module_it_is_in(threads):
    model = zoo.build("llama").train()
    mlp, inside, go = model.model.layers[0].mlp, threading.Event(), threading.Event()
    alone, out, order = plain(model), [], []

    def slow(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go.wait(LIMIT)
            order.append(("forward", module.training))

    mlp.act_fn.register_forward_pre_hook(slow)
    threads.start(lambda: out.append(plain(model)))
    assert inside.wait(LIMIT)
    threading.Timer(0.05, go.set).start()
    with evaluating(model):
        order.append(("analysis", mlp.training))
        assert not out
    threads.join()
    assert order == [("forward", True), ("analysis", False)]
    assert torch.equal(out[0], alone)


def test_threads_that_need_each_other_s_models_are_told(threads):
    one, other = zoo.build("llama"), zoo.build("llama")
    both, told = threading.Barrier(2, timeout=LIMIT), []

    def work(first, second):
        try:
            with turn(first):
                both.wait()
                with turn(second):
                    pass
        except RuntimeError as error:
            told.append(str(error))

    threads.start(lambda: work(one, other))
    threads.start(lambda: work(other, one))
    threads.join()
    assert told and "each needs the model of the other one" in told[0]
    assert not turn_of(one).lock.locked() and not turn_of(other).lock.locked()


def test_a_copy_of_a_switched_model_has_no_gates():
    model = zoo.build("llama").eval()
    with switching(model):
        twin = copy.deepcopy(model)
        assert all("_compiled_call_impl" in vars(m) for m in model.modules())
        assert not any("_compiled_call_impl" in vars(m) for m in twin.modules())
    assert not any("_compiled_call_impl" in vars(m) for m in model.modules())


def test_a_turn_ends_with_its_error(threads):
    model = zoo.build("llama").eval()
    with pytest.raises(lddyn.ExampleError):
        lddyn.ntk(model, *[lddyn.Example([1], [10**6])] * 2)
    threads.start(lambda: lddyn.ntk(model, *zoo.examples()).gram())


@pytest.mark.case("threads: training beside an analysis")
def test_a_backward_pass_waits_and_keeps_its_gradients(threads):
    """Its forward pass was before the analysis; without waiting, frozen weights got no gradient."""
    model = zoo.build("llama").eval()
    weight = model.model.layers[0].mlp.up_proj.weight
    handle = weight.register_hook(lambda gradient: 2 * gradient)
    loss = model(IDS).logits.sum()
    threads.start(loss.backward)  # rounds as a thread does, which has its own number of threads
    threads.join()
    alone = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss, began, done = model(IDS).logits.sum(), threading.Event(), []

    def backward():
        began.set()
        loss.backward()
        done.append(1)

    with Anatomy(model).analysis():
        threads.start(backward)
        assert began.wait(LIMIT)
        time.sleep(0.05)
        assert not done
    threads.join()
    assert all(torch.equal(p.grad, alone[n]) for n, p in model.named_parameters())
    handle.remove()
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_optimizer_step_during_an_analysis_is_an_error():
    model = zoo.build("llama").eval()
    weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="changed while it was analysed"), turn(model):
        torch.optim.SGD([weight], 0.1).step()  # without a gradient: nothing moves
        with torch.no_grad():
            weight.mul_(1.1)
    with turn(model):
        pass


# --------------------------------------------------------------------------- interrupts


def guards(model):
    """Enters every guard of the engine once."""
    anatomy = Anatomy(model)
    names = list(anatomy.trainable)[:2]
    anatomy.direct = set(names)
    one_layer = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def analyse():
        with (
            anatomy.analysis(),
            anatomy.differentiating(),
            anatomy.patched(anatomy.whole, lambda h: h),
        ):
            pass

    def rest():
        with evaluating(model):
            logits.own_response(model, zoo.examples()[0])
        head._only_linear(one_layer)
        measure(model, zoo.examples()[:1])

    return [analyse, rest]


def adapters(model):
    anatomy = Anatomy(model)

    def work():
        with reference_policy.policy_of("adapter-off", anatomy):
            pass

    return [work]


@pytest.mark.case("Ctrl-C while a model is changed")
@pytest.mark.parametrize("kind", ["guards", "adapters"])
def test_ctrl_c_at_any_line_leaves_the_model_as_it_was(kind):
    """At every fifth line; `make torture` interrupts at all of them."""
    model = zoo.build("llama").train() if kind == "guards" else zoo.lora("llama").train()
    works = guards(model) if kind == "guards" else adapters(model)
    tried = 0
    for work in works:
        before, lines = interrupts.state(model), interrupts.places(work)
        assert interrupts.state(model) == before
        # Each line at its first and its last time.
        numbers = {lines.index(line) for line in lines}
        numbers |= {len(lines) - 1 - lines[::-1].index(line) for line in lines}
        for number in sorted(numbers)[::5]:
            came = interrupts.interrupted(work, number)
            assert came is not False, f"{lines[number]}: no interrupt came"
            changed = [k for k, v in interrupts.state(model).items() if v != before[k]]
            assert not changed, f"{lines[number]} left {changed[:3]} changed"
            tried += came is True
    assert tried > 20


def test_ctrl_c_ends_a_wait_for_another_thread(threads):
    model = zoo.build("llama")
    before, leave, entered = signal.getsignal(signal.SIGINT), threading.Event(), threading.Event()

    def hold():
        with turn(model):
            entered.set()
            assert leave.wait(LIMIT)

    threads.start(hold)
    assert entered.wait(LIMIT)
    main = threading.main_thread().ident
    threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), turn(model):
        pass
    leave.set()
    threads.join()
    assert signal.getsignal(signal.SIGINT) is before
    with turn(model):
        pass
