"""A network that learns handwritten digits: its K, its steps predicted and taken (paper §2).

A network learns ten classes; z are its logits, π = softmax z, and one step on (x_u, y_u) changes

    Δ log π(·|x_o) = −η A(x_o) K(x_o, x_u) G(x_u, y_u) + O(η²),
    A = I − 1 πᵀ(x_o),  K = (∇θ z(x_o)) (∇θ z(x_u))ᵀ (10 × 10),  G = π(x_u) − e_y.

Whole training runs are predicted the same way: a step moves θ by Δθ, and A (∇θ z(x_o)) Δθ is its
first-order prediction. Δθ is a sum over sources, the ten classes of the update images and weight
decay: momentum is linear in the gradients, so every source keeps a velocity of its own, and what
momentum remembers of a class is attributed to that class. Without momentum a class's part is the
sum of −η/B A K G over its images in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional

from lddyn.files import digest_of
from lddyn.lab.mnist.images import Images
from lddyn.lab.mnist.images import load as load_images
from lddyn.lab.record import Lab, Row
from lddyn.lab.settings import Mnist

__all__ = [
    "CLASSES",
    "FITTED",
    "NETWORKS",
    "Descent",
    "Halves",
    "adapt",
    "descend",
    "halve",
    "jacobian",
    "kernel",
    "logits",
    "one_step",
    "predict",
]

CLASSES = 10
SOURCES = CLASSES + 1  # whose last is weight decay
_CHUNK = 32  # images whose Jacobians are taken at once
_UNSEEN = 10_000  # at most, as many as the paper's
_STATES = "states"  # folder of the states on disk
_SEGMENT = 5  # epochs between two states on disk
_FLOOR = 1e-6  # learning rate at the end of the cosine, as in the paper's code
_FOURS = 20  # update images of the one-step panels
FITTED = tuple(10.0**k for k in (-6, -5.5, -5, -4.5, -4, -3.5, -3))  # learning rates of the slope
_BEYOND = (10**-2.5, 1e-2, 10**-1.5, 1e-1)  # where the second order is no longer all


# --------------------------------------------------------------------------- the network and its K


def _lenet() -> nn.Module:
    """The paper's network: two convolutions and three layers, tanh and average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 60),
        nn.Tanh(),
        nn.Linear(60, 42),
        nn.Tanh(),
        nn.Linear(42, CLASSES),
    )


def _mlp() -> nn.Module:
    """LeNet's three layers on the pixels themselves."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 60),
        nn.Tanh(),
        nn.Linear(60, 42),
        nn.Tanh(),
        nn.Linear(42, CLASSES),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lenet": _lenet, "mlp": _mlp}


def _initial(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """(P,) as torch draws them, uniform in ±1/√fan-in, from our generator."""
    parts = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in (layer.weight, layer.bias):
                assert parameter is not None
                parts.append((torch.rand(parameter.numel(), generator=generator) * 2 - 1) * bound)
    return torch.cat(parts)


def _named(module: nn.Module, theta: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters by name out of (…, P), in the module's order."""
    named, offset = {}, 0
    for name, parameter in module.named_parameters():
        end = offset + parameter.numel()
        named[name] = theta[..., offset:end].unflatten(-1, tuple(parameter.shape))
        offset = end
    return named


def logits(module: nn.Module, theta: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Logits z (N, 10) at the parameters θ (P,), for images (N, 1, 28, 28)."""
    z: torch.Tensor = functional_call(module, _named(module, theta), (pixels,))
    return z


def jacobian(module: nn.Module, theta: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """∇θ z, exact, by reverse mode.

    Args:
        module: From images to 10 logits.
        theta: Its parameters, (P,).
        pixels: (N, 1, 28, 28), of the same dtype.

    Returns:
        (N, 10, P); memory 10 N P numbers.
    """

    def one(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = functional_call(module, parameters, (image[None],))[0]
        return z

    parts = vmap(jacrev(one), (None, 0), chunk_size=_CHUNK)(_named(module, theta), pixels)
    return torch.cat([part.flatten(2) for part in parts.values()], 2)


def kernel(
    module: nn.Module, theta: torch.Tensor, observed: torch.Tensor, updated: torch.Tensor
) -> torch.Tensor:
    """K(x_o, x_u) = (∇θ z(x_o)) (∇θ z(x_u))ᵀ for every pair, exact up to rounding.

    Args:
        module: From images to 10 logits.
        theta: Its parameters, (P,).
        observed: x_o, (N_o, 1, 28, 28).
        updated: x_u, (N_u, 1, 28, 28).

    Returns:
        (N_o, N_u, 10, 10). Cost: 10 (N_o + N_u) backward passes and 200 N_o N_u P FLOPs; memory
        10 N_u P numbers and a chunk of the observed ones.

    Example:
        >>> import torch
        >>> from lddyn.lab.mnist import measure
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
        >>> theta, x = torch.zeros(50), torch.ones(1, 1, 2, 2)
        >>> measure.kernel(module, theta, x, x)[0, 0].diagonal()[:2]  # ⟨x, x⟩ + 1
        tensor([5., 5.])
    """
    columns = jacobian(module, theta, updated)
    rows = [
        torch.einsum("ovp,uwp->ouvw", jacobian(module, theta, chunk), columns)
        for chunk in observed.split(_CHUNK)
    ]
    return torch.cat(rows)


def adapt(probabilities: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """A Δz = Δz − ⟨π, Δz⟩ along the last dimension: the change of log π that Δz makes."""
    return change - (probabilities * change).sum(-1, keepdim=True)


def predict(
    module: nn.Module,
    theta: torch.Tensor,
    observed: torch.Tensor,
    updated: torch.Tensor,
    classes: torch.Tensor,
) -> torch.Tensor:
    """−A K G: Δ log π(·|x_o) in nats per unit of learning rate, for a step on one (x_u, y_u).

    Args:
        module: From images to 10 logits.
        theta: Its parameters, (P,).
        observed: x_o, (N_o, 1, 28, 28).
        updated: x_u, (N_u, 1, 28, 28).
        classes: y_u, (N_u,).

    Returns:
        (N_o, N_u, 10): for each pair, all ten labels.

    Example:
        >>> import torch
        >>> from lddyn.lab.mnist import measure
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
        >>> theta, x = torch.zeros(50), torch.ones(1, 1, 2, 2)
        >>> change = measure.predict(module, theta, x, x, torch.tensor([4]))[0, 0]
        >>> round(float(change[4]), 4), round(float(change[0]), 4)
        (4.5, -0.5)
    """
    pull = _residual(module, theta, updated, classes)
    moved = -torch.einsum("ouvw,uw->ouv", kernel(module, theta, observed, updated), pull)
    return adapt(logits(module, theta, observed).softmax(-1)[:, None], moved)


def _residual(
    module: nn.Module, theta: torch.Tensor, pixels: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """G = π − e_y of cross-entropy, (N, 10)."""
    probabilities = logits(module, theta, pixels).softmax(-1)
    return probabilities - functional.one_hot(classes, CLASSES).to(probabilities.dtype)


def _gradients(
    module: nn.Module, theta: torch.Tensor, pixels: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """∇θ of each image's cross-entropy, (N, P)."""

    def loss(
        parameters: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        z = functional_call(module, parameters, (image[None],))
        return functional.cross_entropy(z, label[None])

    parts = vmap(grad(loss), (None, 0, 0))(_named(module, theta), pixels, classes)
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


# --------------------------------------------------------------------------- data and training


@dataclass(frozen=True)
class Halves:
    """Images to learn, images never learned, and the probes among each, sorted by class."""

    learned: Images
    unseen: Images
    updates: torch.Tensor  # indices of the probes among the learned: x_u
    observed: torch.Tensor  # among the unseen: x_o


def halve(lab: Lab, settings: Mnist) -> Halves:
    """Loads the images and divides them at random.

    Raises:
        ValueError: If too few are left to observe, or of a class; or the experiment's folder was
            made with other images.
    """
    images = load_images(settings.images, settings.torchvision)
    lab.reads(
        images=digest_of(*(part.numpy().tobytes() for part in (images.pixels, images.classes)))
    )
    if settings.train >= len(images.classes):
        raise ValueError(
            f"train must leave images to observe: fewer than {len(images.classes)}, got "
            f"{settings.train}"
        )
    order = torch.randperm(len(images.classes), generator=lab.generator("split"))
    learned = _part(images, order[: settings.train])
    unseen = _part(images, order[settings.train :][:_UNSEEN])
    return Halves(
        learned,
        unseen,
        _probes(learned, settings.probes, "training"),
        _probes(unseen, settings.probes, "other"),
    )


def _part(images: Images, at: torch.Tensor) -> Images:
    return Images(images.pixels[at], images.classes[at], images.source, images.published)


def _probes(images: Images, count: int, name: str) -> torch.Tensor:
    """The first images of every class: indices (10 count,), sorted by class."""
    by_class = [(images.classes == c).nonzero()[:count, 0] for c in range(CLASSES)]
    for c, these in enumerate(by_class):
        if len(these) < count:
            raise ValueError(
                f"probes needs {count} {name} images of class {c}, there are {len(these)}"
            )
    return torch.cat(by_class)


@dataclass(frozen=True)
class Descent:
    """One training run: how θ moves, and where its states are."""

    name: str
    momentum: float
    learning_rate: float
    cosine: bool

    def rate(self, epoch: int, epochs: int) -> float:
        """The learning rate of an epoch."""
        if not self.cosine:
            return self.learning_rate
        share = (1 + math.cos(math.pi * epoch / epochs)) / 2
        return _FLOOR + (self.learning_rate - _FLOOR) * share


def descend(lab: Lab, settings: Mnist, halves: Halves, descent: Descent) -> Row:
    """Trains, or goes on; returns the records of the epochs and the last state's tensors."""
    records: list[dict[str, float]] = []
    segments = range(0, settings.epochs, _SEGMENT)
    for start in lab.bar(segments, f"training, {descent.name}"):
        end = min(start + _SEGMENT, settings.epochs)

        def make(start: int = start, end: int = end) -> list[dict[str, float]]:
            if start:
                state = lab.tensors(_STATES, _state(descent, start))
            else:
                state = _begin(lab, settings, halves)
            made = [_epoch(lab, settings, halves, descent, state, e) for e in range(start, end)]
            lab.keep_tensors(_STATES, _state(descent, end), state)
            if start:
                # Two segments back is of no use any more: the one before is on disk, complete.
                lab.forget_tensors(_STATES, _state(descent, start - _SEGMENT))
            return made

        records += lab.once(f"{descent.name} {end}", make)
    return {"epochs": records, **lab.tensors(_STATES, _state(descent, settings.epochs))}


def _state(descent: Descent, epoch: int) -> str:
    return f"{descent.name} {epoch}"


def _begin(lab: Lab, settings: Mnist, halves: Halves) -> dict[str, torch.Tensor]:
    """The state before training.

    theta (P,), in float64 so that steps far smaller than θ are not rounded away; velocity (11, P)
    by source; sums and pulls (11, N_o, 10): accumulated predictions of Δ log π and of Δπ; first
    (N_o, 10): log π at the start; kernel (N_o, N_u, 10, 10), norms (epoch, N_u, N_o): ‖K‖_F,
    drifts: ‖K^t − K^{t−1}‖_F.
    """
    module = NETWORKS[settings.network]()
    theta = _initial(module, lab.generator("weights"))
    observed = halves.unseen.pixels[halves.observed]
    k = kernel(module, theta, observed, halves.learned.pixels[halves.updates])
    blank = torch.zeros(SOURCES, len(observed), CLASSES, dtype=torch.float64)
    norms = k.norm(dim=(-2, -1)).T[None].contiguous()
    return {
        "theta": theta.double(),
        "velocity": torch.zeros(SOURCES, len(theta)),
        "sums": blank,
        "pulls": blank.clone(),
        "first": logits(module, theta.double(), observed.double()).log_softmax(-1),
        "kernel": k,
        "norms": norms,
        "drifts": norms[:0].clone(),
    }


def _epoch(
    lab: Lab,
    settings: Mnist,
    halves: Halves,
    descent: Descent,
    state: dict[str, torch.Tensor],
    epoch: int,
) -> dict[str, float]:
    """One epoch, in place; every step is predicted before it is taken."""
    module = NETWORKS[settings.network]()
    learned, observed = halves.learned, halves.unseen.pixels[halves.observed]
    rate = descent.rate(epoch, settings.epochs)
    order = torch.randperm(len(learned.classes), generator=lab.generator("order", epoch))
    theta, velocity = state["theta"], state["velocity"]
    precise = observed.double()
    before = logits(module, theta, precise).log_softmax(-1)
    missed = moved = 0.0
    for batch in order.split(settings.batch):
        rounded = theta.float()
        gradients = _gradients(module, rounded, learned.pixels[batch], learned.classes[batch])
        velocity *= descent.momentum
        velocity.index_add_(0, learned.classes[batch], gradients, alpha=1 / len(batch))
        velocity[CLASSES] += settings.weight_decay * rounded
        change = -rate * velocity.double()
        predicted = adapt(before.exp(), _pushed(module, rounded, observed, change.float()).double())
        theta = theta + change.sum(0)
        after = logits(module, theta, precise).log_softmax(-1)
        state["sums"] += predicted
        state["pulls"] += before.exp() * predicted
        missed += float((after - before - predicted.sum(0)).square().sum())
        moved += float((after - before).square().sum())
        before = after
    state["theta"] = theta
    if epoch + 1 == settings.early:
        state["early"] = theta.clone()
    theta = theta.float()
    k = kernel(module, theta, observed, learned.pixels[halves.updates])
    state["norms"] = torch.cat([state["norms"], k.norm(dim=(-2, -1)).T[None]])
    drift = (k - state["kernel"]).norm(dim=(-2, -1)).T[None]
    state["drifts"] = torch.cat([state["drifts"], drift])
    state["kernel"] = k
    seen = logits(module, theta, learned.pixels)
    unseen = logits(module, theta, halves.unseen.pixels)
    return {
        "epoch": epoch + 1,
        "learning_rate": rate,
        "loss": float(functional.cross_entropy(seen, learned.classes)),
        "unseen_loss": float(functional.cross_entropy(unseen, halves.unseen.classes)),
        "unseen_accuracy": float((unseen.argmax(-1) == halves.unseen.classes).double().mean()),
        "explained": 1 - missed / moved,
    }


def _pushed(
    module: nn.Module, theta: torch.Tensor, pixels: torch.Tensor, directions: torch.Tensor
) -> torch.Tensor:
    """(∇θ z) Δθ by forward mode: (R, N, 10) for directions (R, P)."""

    def one(direction: torch.Tensor) -> torch.Tensor:
        tangent: torch.Tensor = jvp(lambda at: logits(module, at, pixels), (theta,), (direction,))[
            1
        ]
        return tangent

    moved: torch.Tensor = vmap(one)(directions)
    return moved


# --------------------------------------------------------------------------- one step on a "4"


def one_step(settings: Mnist, halves: Halves, theta: torch.Tensor) -> Row:
    """Steps on single 4s, in float64: predicted and measured Δ log π of every observed probe.

    Returns:
        norms (N_o, N_u), predicted and measured (N_o, N_u, 10) at the training's learning rate,
        rates and residuals (rates, N_u): ‖measured − predicted‖ over all o and labels,
        dissimilar: the class whose training images have the smallest mean ‖K‖_F with the 4s,
        similar: the one with the largest, of those that are not 4.
    """
    module = NETWORKS[settings.network]().double()
    fours = (halves.learned.classes == 4).nonzero()[:_FOURS, 0]
    updated, classes = halves.learned.pixels[fours].double(), halves.learned.classes[fours]
    observed = halves.unseen.pixels[halves.observed].double()
    # The classes are chosen by training images, the claims tested on others.
    chosen = kernel(module, theta, halves.learned.pixels[halves.updates].double(), updated)
    by_class = chosen.norm(dim=(-2, -1)).mean(1).unflatten(0, (CLASSES, -1)).mean(1)
    others = [c for c in range(CLASSES) if c != 4]
    predicted = predict(module, theta, observed, updated, classes)
    gradients = _gradients(module, theta, updated, classes)
    before = logits(module, theta, observed).log_softmax(-1)

    def measure(rate: float) -> torch.Tensor:
        moved = [logits(module, theta - rate * g, observed).log_softmax(-1) for g in gradients]
        return torch.stack(moved, 1) - before[:, None]

    rates = sorted((*FITTED, *_BEYOND))
    residuals = [(measure(r) - r * predicted).square().sum((0, 2)).sqrt().tolist() for r in rates]
    rate = settings.lr
    return {
        "similar": max(others, key=lambda c: float(by_class[c])),
        "dissimilar": min(others, key=lambda c: float(by_class[c])),
        "norms": kernel(module, theta, observed, updated).norm(dim=(-2, -1)).tolist(),
        "predicted": (rate * predicted).tolist(),
        "measured": measure(rate).tolist(),
        "pulls": (-_residual(module, theta, updated, classes)).tolist(),
        "fours": fours.tolist(),
        "rates": rates,
        "residuals": residuals,
    }
