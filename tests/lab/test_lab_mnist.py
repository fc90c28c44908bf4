"""Experiment 1: K and A·K·G against float64 by finite steps, data files, a run that was stopped."""

import doctest
import gzip
import json
import sys
import types

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from lddyn.cli.lab import app
from lddyn.lab import EXPERIMENTS, mnist
from lddyn.lab.mnist import images, measure
from lddyn.lab.record import Lab
from lddyn.lab.settings import Mnist

TINY = {"network": "mlp", "epochs": 6, "train": 200, "batch": 50, "probes": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["lenet", "mlp"])
def network(request):
    module = measure.NETWORKS[request.param]()
    return module, measure._initial(module, generator())


def some(count, seed):
    pixels = torch.randn(count, 1, 28, 28, generator=generator(seed))
    return pixels, torch.randint(10, (count,), generator=generator(seed))


# --------------------------------------------------------------------------- K and A K G


def test_the_network_is_the_papers():
    module = measure.NETWORKS["lenet"]()
    sizes = [tuple(p.shape) for p in module.parameters() if p.dim() > 1]
    assert sizes == [(6, 1, 5, 5), (16, 6, 5, 5), (60, 400), (42, 60), (10, 42)]


def test_parameters_are_drawn_as_torch_draws_them(network):
    module, theta = network
    for name, drawn in measure._named(module, theta).items():
        theirs = dict(module.named_parameters())[name]
        bound = float(theirs.detach().abs().max())
        assert drawn.shape == theirs.shape
        if theirs.numel() > 1000:
            assert float(drawn.abs().max()) == pytest.approx(bound, rel=0.02)


def test_kernel_against_float64_and_its_symmetry(network, monkeypatch):
    module, theta = network
    observed, updated = some(5, 1)[0], some(3, 2)[0]
    truth = torch.empty(5, 3, 10, 10, dtype=torch.float64)
    module.double()
    parameters = list(module.parameters())
    torch.nn.utils.vector_to_parameters(theta.double(), parameters)

    def rows(image):
        z = module(image.double()[None])[0]
        gradients = [torch.autograd.grad(one, parameters, retain_graph=True) for one in z]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])

    for o, x in enumerate(observed):
        for u, y in enumerate(updated):
            truth[o, u] = rows(x) @ rows(y).T
    monkeypatch.setattr(measure, "_CHUNK", 2)  # ragged chunks
    found = measure.kernel(module, theta.double(), observed.double(), updated.double())
    assert torch.allclose(found, truth, rtol=1e-11, atol=1e-11)
    turned = measure.kernel(module, theta.double(), updated.double(), observed.double())
    assert torch.allclose(found, turned.permute(1, 0, 3, 2), rtol=1e-12, atol=1e-12)
    single = measure.kernel(module, theta, observed, updated)
    assert (single - truth).norm() < 1e-6 * truth.norm()


def test_prediction_is_the_derivative_of_a_step_and_misses_its_square(network):
    module, theta = network
    module, theta = module.double(), theta.double()
    observed, (updated, classes) = some(4, 1)[0].double(), some(2, 2)
    updated = updated.double()
    predicted = measure.predict(module, theta, observed, updated, classes)
    assert predicted.shape == (4, 2, 10)
    missed = []
    for u in range(2):
        leaf = theta.clone().requires_grad_()
        z = measure.logits(module, leaf, updated[u : u + 1])
        (gradient,) = torch.autograd.grad(functional.cross_entropy(z, classes[u : u + 1]), leaf)

        def log_pi(rate, gradient=gradient):
            return measure.logits(module, theta - rate * gradient, observed).log_softmax(-1)

        # The middle quotient's own error is of third order.
        slope = (log_pi(1e-5) - log_pi(-1e-5)) / 2e-5
        assert torch.allclose(predicted[:, u], slope, rtol=1e-5, atol=1e-6)
        missed.append([(log_pi(r) - log_pi(0) - r * predicted[:, u]).norm() for r in (1e-5, 1e-4)])
    for small, large in missed:
        assert torch.log10(large / small) == pytest.approx(2, abs=0.02)
    probabilities = measure.logits(module, theta, observed).softmax(-1)
    # πᵀ A = 0: to first order probability is only moved.
    assert (probabilities[:, None] * predicted).sum(-1).abs().max() < 1e-12


def test_a_step_is_torchs_and_its_parts_add_up(tmp_path):
    """Two epochs with momentum and weight decay: θ as torch.optim.SGD leaves it."""
    options = Mnist(
        network="mlp", epochs=5, train=100, batch=32, lr=1e-3, weight_decay=5e-2, probes=2
    )
    lab = Lab("mnist", tmp_path, progress=False)
    halves = measure.halve(lab, options)
    descent = measure.Descent("momentum", 0.9, 1e-3, cosine=True)
    with torch.no_grad():
        state = measure._begin(lab, options, halves)
        theta, first = state["theta"], state["first"]
        records = [measure._epoch(lab, options, halves, descent, state, e) for e in range(2)]
    module = measure.NETWORKS["mlp"]().double()
    torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, 1e-6)
    for epoch in range(2):
        assert records[epoch]["learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        order = torch.randperm(100, generator=lab.generator("order", epoch))
        for batch in order.split(32):
            z = module(halves.learned.pixels[batch].double())
            optimizer.zero_grad()
            functional.cross_entropy(z, halves.learned.classes[batch]).backward()
            optimizer.step()
        schedule.step()
    theirs = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    assert (state["theta"] - theirs).norm() < 1e-5 * (theirs - theta).norm()
    # Steps are small, so that what they were predicted to do is what they did.
    observed = halves.unseen.pixels[halves.observed].double()
    total = measure.logits(module, theirs, observed).log_softmax(-1) - first
    assert (state["sums"].sum(0) - total).norm() < 0.01 * total.norm()


def test_without_momentum_a_class_gets_its_akg(tmp_path):
    options = Mnist(
        network="mlp",
        epochs=5,
        train=80,
        batch=80,
        lr=1e-3,
        momentum=0.0,
        weight_decay=0.0,
        probes=2,
    )
    lab = Lab("mnist", tmp_path, progress=False)
    halves = measure.halve(lab, options)
    descent = measure.Descent("plain", 0.0, 1e-3, cosine=False)
    module = measure.NETWORKS["mlp"]().double()
    learned, observed = halves.learned, halves.unseen.pixels[halves.observed].double()
    with torch.no_grad():
        state = measure._begin(lab, options, halves)
        each = measure.predict(
            module, state["theta"], observed, learned.pixels.double(), learned.classes
        )
        measure._epoch(lab, options, halves, descent, state, 0)
    for c in range(10):
        expected = 1e-3 / 80 * each[:, learned.classes == c].sum(1)
        assert torch.allclose(state["sums"][c], expected, rtol=1e-3, atol=1e-8)
    assert state["sums"][10].abs().max() == 0


# --------------------------------------------------------------------------- images


def idx(content, *shape):
    head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return head + bytes(content)


def write_set(folder, classes, side=28, zipped=False):
    count = len(classes)
    numbers = torch.randint(256, (count * side * side,), generator=generator()).tolist()
    folder.mkdir(exist_ok=True)
    for name, content in (
        ("train-images-idx3-ubyte", idx(numbers, count, side, side)),
        ("train-labels-idx1-ubyte", idx(classes, count)),
    ):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return torch.tensor(numbers).reshape(count, 1, side, side)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    classes = list(range(10)) * 2
    numbers = write_set(tmp_path / "set", classes, zipped=zipped)
    found = images.load(tmp_path / "set")
    assert found.classes.tolist() == classes and not found.published
    assert torch.allclose(found.pixels * 0.3081 + 0.1307, numbers / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with 00 00 08 01, got an empty file"),
        (b"\x00\x00\x0d\x01rest", "expected an IDX file of bytes in 1 dim.*got 00 00 0d 01"),
        (idx(b"", 2, 2), "got 00 00 08 02"),
        (idx(b"", 3)[:6], "expected a head of 8 bytes, got 6"),
        (idx(b"ab", 3), r"expected 3 bytes for shape \(3,\), got 2"),
        (idx(b"abcd", 3), r"expected 3 bytes for shape \(3,\), got 4"),
        (gzip.compress(idx(b"abc", 3), mtime=0)[:-9], "expected a whole gzip file, got"),
        (b"\x1f\x8bnonsense", "expected a whole gzip file, got"),
    ],
)
def test_corrupt_files_are_named(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"labels: .*{message}"):
        images.read_idx(path, dimensions=1)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte or .*\.gz, found neither"
    ):
        images.load(tmp_path)
    write_set(tmp_path / "a", list(range(10)))
    (tmp_path / "a" / "train-labels-idx1-ubyte").write_bytes(idx(range(9), 9))
    with pytest.raises(ValueError, match="as many images as labels, got 10 and 9"):
        images.load(tmp_path / "a")
    write_set(tmp_path / "b", list(range(10)), side=27)
    with pytest.raises(ValueError, match="28×28 pixels, got 27×27"):
        images.load(tmp_path / "b")
    write_set(tmp_path / "c", [1, 2, 3])
    with pytest.raises(ValueError, match=r"must be 0 … 9, got \[1, 2, 3\]"):
        images.load(tmp_path / "c")


def test_torchvision_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="--torchvision MNIST needs torchvision"):
        images.load(torchvision="MNIST")

    class Set:
        def __init__(self, root, train, download):
            assert (root, train, download) == (str(tmp_path), True, True)
            self.data = torch.full((10, 28, 28), 255, dtype=torch.uint8)
            self.targets = list(range(10))

    datasets = types.ModuleType("torchvision.datasets")
    datasets.MNIST = Set
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    found = images.load(tmp_path, torchvision="MNIST")
    assert found.published and found.pixels.shape == (10, 1, 28, 28)
    with pytest.raises(ValueError, match="has no 'SVHN'"):
        images.load(tmp_path, torchvision="SVHN")


def test_scikit_learn_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"install lddyn\[lab\]"):
        images.load()


# --------------------------------------------------------------------------- the experiment


def test_a_run_that_was_stopped_goes_on_to_the_same_results(tmp_path, monkeypatch):
    whole = mnist.run(tmp_path / "whole", Mnist(**TINY), progress=False)

    epoch = measure._epoch

    def stopped(lab, options, halves, descent, state, number):
        if descent.name == "plain" and number == 5:
            raise KeyboardInterrupt
        return epoch(lab, options, halves, descent, state, number)

    monkeypatch.setattr(measure, "_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        mnist.run(tmp_path / "parts", Mnist(**TINY), progress=False)
    done = []

    def counted(lab, options, halves, descent, state, number):
        done.append((descent.name, number))
        return epoch(lab, options, halves, descent, state, number)

    monkeypatch.setattr(measure, "_epoch", counted)
    parts = mnist.run(tmp_path / "parts", Mnist(**TINY), progress=False)
    assert done == [("plain", 5)]
    for key in ("claims", "seen", "expected", "figures", "tables"):
        assert parts[key] == whole[key]
    for name in whole["tables"]:
        first, second = (
            (tmp_path / kind / "tables" / f"{name}.json").read_text() for kind in ("whole", "parts")
        )
        assert first == second

    names = [claim["name"] for claim in whole["claims"]]
    assert names[:2] == ["Prop. 1", "Fig. 1b"] and len(names) == 13
    proposition = whole["claims"][0]
    assert proposition["verdict"] == "agrees" and abs(proposition["value"] - 2) < 0.02
    assert all(low <= high for low, high in (claim["interval"] for claim in whole["claims"]))
    for name in whole["figures"]:
        assert (tmp_path / "whole" / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    rows = json.loads((tmp_path / "whole" / "tables" / "maps.json").read_text())
    for o in range(10):
        found = sum(row["mean_prediction"] for row in rows if row["class_observed"] == o)
        assert found == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"network": "resnet"}, "lenet or mlp, got 'resnet'"),
        ({"epochs": 4}, "epochs must be at least 5, got 4"),
        ({"momentum": 1.0}, "momentum must be below 1, got 1.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"train": 1797}, "fewer than 1797, got 1797"),
        ({"train": 30, "probes": 20}, "probes needs 20 training images of class 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        mnist.run(tmp_path, Mnist(**{**TINY, **changed}), progress=False)


def test_the_command(tmp_path):
    numbers = [c for c in range(10) for _ in range(8)]
    write_set(tmp_path / "set", numbers)
    arguments = [
        "mnist",
        "--out",
        str(tmp_path / "out"),
        "--network",
        "mlp",
        "--epochs",
        "5",
        "--train",
        "40",
        "--probes",
        "2",
        "--images",
        str(tmp_path / "set"),
    ]
    assert "mnist" in EXPERIMENTS  # `lab all` runs it
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "images from IDX files" in told.stdout and "Prop. 1: agrees" in told.stdout
    other = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert other.exit_code == 2 and "seed (there 0, now 1)" in other.stderr
    write_set(tmp_path / "set", numbers[::-1])
    other = CliRunner().invoke(app, arguments)
    assert other.exit_code == 2 and "images (there" in other.stderr
    fresh = CliRunner().invoke(app, [*arguments, "--seed", "1", "--fresh", "--json"])
    assert json.loads(fresh.stdout)["seed"] == 1


@pytest.mark.parametrize("module", [measure, mnist, images])
def test_examples_in_docstrings_run(module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(module).failed == 0
