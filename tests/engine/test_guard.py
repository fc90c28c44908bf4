"""What an analysis changes, who may see it, and that it is changed back."""

import copy
import gc
import sys
import threading
import types
import weakref

import pytest
import torch
import transformers
import zoo

import lddyn
from lddyn.engine import guard
from lddyn.engine.anatomy import Anatomy
from lddyn.engine.recognise import with_global
from lddyn.engine.turns import turn_of
from lddyn.engine.undo import Undo
from lddyn.probes.measure import measure

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


# --------------------------------------------------------------------------- undoing


class Thing:
    pass


def test_changes_are_undone_last_first_and_once():
    thing, order = Thing(), []
    thing.kept = 1
    undo = Undo()
    undo.set(thing, "kept", 2)
    undo.set(thing, "new", 3)
    undo.set(thing, "kept", 4)
    undo.add(lambda: order.append("last"))
    assert (thing.kept, thing.new) == (4, 3)
    undo.restore()
    assert vars(thing) == {"kept": 1} and order == ["last"]
    thing.kept = 5
    undo.restore()
    assert thing.kept == 5 and order == ["last"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_restore_can_be_called_again(interrupt):
    thing, calls = Thing(), []
    undo = Undo()
    undo.set(thing, "one", 1)

    def interrupted():
        calls.append("called")
        if len(calls) == 1:
            raise interrupt

    undo.add(interrupted)
    undo.set(thing, "two", 2)
    with pytest.raises(interrupt):
        undo.restore()
    assert vars(thing) == {"one": 1}
    undo.restore()
    assert vars(thing) == {} and len(calls) == 2


def test_an_error_of_one_action_does_not_keep_the_others():
    thing = Thing()

    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), Undo() as undo:
        undo.set(thing, "one", 1)
        undo.add(broken)
        undo.set(thing, "two", 2)
    assert vars(thing) == {}


# --------------------------------------------------------------------------- locks


def test_one_lock_a_model_whatever_it_is_wrapped_in():
    model, other = zoo.build("llama"), zoo.build("llama")
    assert turn_of(model) is turn_of(model)
    assert turn_of(model) is not turn_of(other)
    adapted = zoo.lora("llama")
    assert turn_of(adapted) is turn_of(adapted.get_base_model())
    compiled = torch.compile(model, backend="eager")
    assert turn_of(compiled) is turn_of(model)


def test_a_lock_does_not_keep_its_model():
    model = zoo.build("llama")
    Anatomy(model).trace(zoo.examples()[0])
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def test_an_anatomy_is_freed_without_the_garbage_collector():
    """A cycle of references would keep the weights of shifted copies until a collection."""
    model = zoo.build("llama")
    anatomy = Anatomy(model)
    trace = anatomy.trace(zoo.examples()[0])
    with anatomy.analysis():
        for segment in range(len(anatomy.segments)):
            anatomy.replay(trace, segment, trace.length)
    gc.collect()
    gc.disable()
    try:
        known = weakref.ref(anatomy)
        del anatomy, trace
        assert known() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------- other models


def in_thread(work):
    """Runs a function in another thread; returns its result."""
    out = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the other thread waits for the analysis"
    return out[0]


def plain(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "mixtral", "cohere"])
@pytest.mark.parametrize("shared", [False, True], ids=["own config", "one config"])
def test_another_model_of_the_class_is_undisturbed_within_a_replay(name, shared):
    """A forward of another model, in another thread while a block of ours runs: the same bits."""
    model = zoo.build(name).eval()
    other = copy.deepcopy(model)
    if shared:
        other = type(model)(model.config).eval()
    before, seen = plain(other), []
    anatomy = Anatomy(model)
    trace = anatomy.trace(zoo.examples()[0])

    def beside(module, args):
        seen.append(in_thread(lambda: plain(other)))

    inside = (".1.mlp", ".1.self_attn", ".1.attention", ".norm", ".final_layer_norm")
    own = [m for n, m in model.named_modules() if n.endswith(inside)]
    handles = [module.register_forward_pre_hook(beside) for module in own]
    with anatomy.analysis():
        seen.append(in_thread(lambda: plain(other)))
        for segment in range(len(anatomy.segments)):
            anatomy.replay(trace, segment, trace.length)
    for handle in handles:
        handle.remove()
    assert len(seen) > 1
    assert all(torch.equal(logits, before) for logits in seen)


def test_two_models_are_analysed_side_by_side():
    """Each thread waits within its analysis until the other is in its own."""
    models = [zoo.build("llama"), zoo.build("llama", seed=1)]
    observed, updated = zoo.examples()
    expected = [lddyn.ntk(m, observed, updated).gram() for m in models]
    both, grams = threading.Barrier(2, timeout=60), {}

    def work(i):
        anatomy = Anatomy(models[i])
        with anatomy.analysis():
            both.wait()
            grams[i] = lddyn.ntk(anatomy, observed, updated).gram()
            both.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(grams) == [0, 1]
    assert all(torch.equal(grams[i], expected[i]) for i in range(2))


def test_no_python_module_is_changed_within_an_analysis():
    model = zoo.build("llama")
    file = sys.modules[type(model).__module__]
    anatomy = Anatomy(model)
    trace = anatomy.trace(zoo.examples()[0])
    before, within = dict(vars(file)), []
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(lambda *_: within.append(dict(vars(file))))
    with anatomy.analysis():
        anatomy.replay(trace, 1, trace.length)
    handle.remove()
    assert within and all(x.keys() == before.keys() for x in within)
    assert all(x[key] is before[key] for x in within for key in before)


# --------------------------------------------------------------------------- functions


OFFSET = 1


def shift(x):
    return x + OFFSET


def shifted(x, *, times=2):
    return shift(x) * times


def wrapping(function):
    import functools

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 100

    return wrapper


def test_a_copy_of_a_function_finds_another_global(monkeypatch):
    def value(original, file):
        assert original is shift and file == __name__
        return lambda x: -x

    turned = with_global(shifted, "shift", value)
    assert (shifted(3), turned(3), turned(3, times=1)) == (8, -6, -3)
    wrapped = wrapping(shifted)
    assert (wrapped(3), with_global(wrapped, "shift", value)(3)) == (108, 94)
    assert with_global(shift, "shift", value) is None
    assert with_global(wrapping(shift), "shift", value) is None

    live = with_global(shifted, "shift", lambda original, file: lambda x: original(x))
    monkeypatch.setattr(sys.modules[__name__], "OFFSET", 5)  # other globals are the file's own
    assert live(3) == 16


def test_accelerate_s_forward_is_turned_too():
    """A forward that was kept as `_old_forward` has its rotary embedding in closed form."""
    from lddyn.engine.recognise import ROTATES

    model = zoo.build("llama")
    observed, updated = zoo.examples()
    expected = lddyn.ntk(model, observed, updated).gram()
    for block in model.model.layers:
        attention = block.self_attn
        attention._old_forward = attention.forward
        attention.forward = types.MethodType(
            lambda self, *args, **kwargs: self._old_forward(*args, **kwargs), attention
        )
    anatomy = Anatomy(model)
    assert torch.equal(lddyn.ntk(anatomy, observed, updated).gram(), expected)
    assert ROTATES.verdicts(anatomy.recogniser.owner)


# --------------------------------------------------------------------------- compiled code


def test_compiled_code_is_run_plainly_for_a_compiled_model_alone():
    stance = torch._dynamo.eval_frame._stance
    with guard.eager_code(list(zoo.build("llama").modules())):
        assert torch._dynamo.eval_frame._stance.stance == stance.stance == "default"
    compiled = torch.compile(zoo.build("llama"), backend="eager")
    inplace = zoo.build("llama")
    inplace.compile(backend="eager")
    first = guard.eager_code(list(compiled.modules()))
    with guard.eager_code(list(inplace.modules())):
        first.__enter__()
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"  # the first is not done
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_model_compiled_in_place_has_the_same_gram():
    model = zoo.build("llama")
    observed, updated = zoo.examples()
    expected = lddyn.ntk(model, observed, updated).gram()
    model.compile(backend="eager")
    assert torch.equal(lddyn.ntk(model, observed, updated).gram(), expected)


def test_a_config_is_the_same_object_afterwards():
    model = transformers.AutoModelForCausalLM.from_config(zoo.build("gemma2").config).eval()
    configs = [m.__dict__.get("config") for m in model.modules()]
    anatomy = Anatomy(model)
    with anatomy.analysis():
        assert model.config is not configs[0]
        assert model.config._attn_implementation == "lddyn"
        assert configs[0]._attn_implementation != "lddyn"
    measure(model, list(zoo.examples()))
    assert all(m.__dict__.get("config") is c for m, c in zip(model.modules(), configs, strict=True))
