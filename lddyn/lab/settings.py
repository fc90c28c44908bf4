"""The settings of the experiments: one dataclass each, for Python and for `lddyn lab NAME`.

`run` takes an instance; the command line makes an option of every field, with the field's help.
Nothing heavy is imported here, so that `lddyn lab NAME --help` is fast.

    lddyn.lab.sft.run("lab/sft", Sft(updates=100))          lddyn lab sft --updates 100
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

MODEL, DATA, TRAINING = "Model", "Data", "Training"  # panels of the command line's help

__all__ = [
    "Bigram",
    "Dpo",
    "Extend",
    "LanguageModel",
    "Mnist",
    "Objectives",
    "Probes",
    "Settings",
    "Sft",
    "Squeeze",
]


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    positive: bool = False,
    panel: str | None = None,
    decisive: bool = True,
) -> Any:
    """A field: its default, its help on the command line, and which values it may have.

    Args:
        default: Its value if none is given.
        help: One sentence for the command line.
        least: Smallest value that is allowed.
        positive: Whether the value must be larger than 0.
        panel: Heading of the command line's help under which the option stands.
        decisive: Whether the results depend on it: if so, a folder made with another value is
            refused.
    """
    bounds = {"least": least, "positive": positive}
    about = {"help": help, "panel": panel, "decisive": decisive}
    return field(default=default, metadata={**about, **bounds})


@dataclass(frozen=True)
class Settings:
    """The settings on which an experiment's results depend, besides its seed.

    Raises:
        ValueError: If a value is out of bounds; names the field.
    """

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, bounds = getattr(self, each.name), each.metadata
            if bounds["positive"] and not value > 0:
                raise ValueError(f"{each.name} must be positive, got {value}")
            if bounds["least"] is not None and value < bounds["least"]:
                raise ValueError(f"{each.name} must be at least {bounds['least']}, got {value}")

    def decisive(self) -> dict[str, Any]:
        """The fields that the results depend on, with their values."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.metadata["decisive"]
        }


@dataclass(frozen=True)
class Mnist(Settings):
    """Handwritten digits: one step, accumulated influence, the kernel over training.

    The paper takes 2,000 images, 100 epochs and a learning rate of 1e-3. The defaults take 1,000 of
    scikit-learn's digits and learn as much in fewer steps.
    """

    network: Literal["lenet", "mlp"] = option("lenet", "lenet is the paper's.", panel=MODEL)
    images: str | None = option(
        None,
        "Folder with train-images-idx3-ubyte and train-labels-idx1-ubyte, .gz or not. Default: "
        "scikit-learn's handwritten digits.",
        panel=DATA,
    )
    torchvision: str | None = option(
        None,
        "Name of a data set of torchvision (MNIST, FashionMNIST, KMNIST); it is downloaded to "
        "--images.",
        panel=DATA,
    )
    epochs: int = option(50, "Epochs of training.", least=5, panel=TRAINING)
    train: int = option(1000, "Number of training images.", least=1, panel=DATA)
    batch: int = option(64, "Images per step.", least=1, panel=TRAINING)
    lr: float = option(
        3e-3,
        "Learning rate of the first epoch; it falls along a cosine.",
        positive=True,
        panel=TRAINING,
    )
    momentum: float = option(
        0.9, "Momentum of the first run; the second run has none.", least=0, panel=TRAINING
    )
    weight_decay: float = option(5e-4, "Weight decay.", panel=TRAINING)
    probes: int = option(6, "Images per class, on each side, between which K is measured.", least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in ("lenet", "mlp"):
            raise ValueError(f"network must be lenet or mlp, got {self.network!r}")
        if not self.momentum < 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum}")

    @property
    def early(self) -> int:
        """The epoch after which training counts as late: a fifth of all."""
        return max(1, self.epochs // 5)


@dataclass(frozen=True)
class Squeeze(Settings):
    """Where the probability goes when one label is pushed down."""

    cases: int = option(10_000, "Random predictions on which the claims are tested.", least=100)
    labels: int = option(50, "Number of labels V.", least=20)
    large: int = option(1000, "Number of labels of the large example.", least=20)


@dataclass(frozen=True)
class Bigram(Settings):
    """The same negative step in a table of logits and in shared features."""

    length: int = option(20_000, "Words of the training text.", least=100, panel=DATA)
    steps: int = option(1500, "Training steps before the negative step.", least=2, panel=TRAINING)
    pairs: int = option(60, "Number of (context, unseen word) pairs that are pushed.", least=4)
    pushes: int = option(30, "How often the same word is pushed.", least=1)
    strength: float = option(
        1.0, "Learning rate times ‖∇ logit‖² of the pushed word.", positive=True
    )


@dataclass(frozen=True)
class Objectives(Settings):
    """The residuals of twelve objectives and where they push."""

    cases: int = option(200, "Random pairs per objective.", least=10)
    labels: int = option(50, "Number of labels of the softmax that is trained.", least=20)
    steps: int = option(300, "Steps of its gradient descent.", least=10, panel=TRAINING)


@dataclass(frozen=True)
class LanguageModel(Settings):
    """Settings that all experiments with a language model have."""

    model: str | None = option(
        None,
        "Name or folder of a causal LM of transformers; needs --data. Default: the demo's model.",
        panel=MODEL,
    )
    data: str | None = option(
        None, "Rows in the format of the authors' probing files; needs --model.", panel=DATA
    )
    limit: int = option(
        248, "Number of rows to read; a fifth is held out.", positive=True, panel=DATA
    )
    prompts: int = option(
        40, "Number of training prompts in the probing set.", positive=True, panel=DATA
    )


@dataclass(frozen=True)
class Probes(LanguageModel):
    """The probing set: the paper's response types, built or read, and the pass over it."""

    endpoint: str = option(
        "",
        "Address of a service with OpenAI's interface that writes the missing responses. Without "
        "it nothing is sent anywhere.",
    )
    endpoint_model: str = option("", "Name of the model at the endpoint.")
    key_variable: str = option(
        "", "Environment variable that holds the endpoint's key.", decisive=False
    )


@dataclass(frozen=True)
class Sft(LanguageModel):
    """SFT: every response type over training, with the kernel measured."""

    updates: int = option(400, "Number of steps, of 4 rows each.", positive=True, panel=TRAINING)
    every: int = option(
        20, "Steps between two measurements of the probing set.", positive=True, panel=TRAINING
    )
    lr: float = option(5e-5, "Learning rate of RMSprop.", positive=True, panel=TRAINING)
    kernel_points: int = option(3, "At how many points of training K is measured.", least=0)
    kernel_prompts: int = option(
        4, "For how many prompts K is measured; four or more give intervals.", least=1
    )
    kernel_tokens: int = option(
        6, "Evenly spaced tokens of each response between which K is measured.", least=1
    )
    explained: int = option(8, "How many steps are predicted to first order.", least=0)
    accuracy_steps: int = option(
        3, "Steps of each run that tests the first order at other learning rates.", least=0
    )


@dataclass(frozen=True)
class Dpo(LanguageModel):
    """DPO: the two terms at every probe, and where the mass of y− went."""

    lengths: tuple[int, ...] = option(
        (0, 100, 400), "Numbers of SFT steps before DPO, separated by commas.", panel=TRAINING
    )
    updates: int = option(
        200, "Number of DPO steps, of 4 pairs each.", positive=True, panel=TRAINING
    )
    every: int = option(
        20, "Steps between two measurements of the probing set.", positive=True, panel=TRAINING
    )
    sft_lr: float = option(5e-5, "Learning rate of SFT.", positive=True, panel=TRAINING)
    lr: float = option(2e-5, "Learning rate of DPO.", positive=True, panel=TRAINING)
    explained: int = option(
        5, "How many steps of the longest run are split into the two terms.", least=0
    )
    new_tokens: int = option(32, "Largest length of a sampled response, tokens.", positive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = tuple(sorted(set(self.lengths)))
        if not lengths or lengths[0] < 0:
            raise ValueError(f"lengths must be numbers of steps, got {self.lengths}")
        object.__setattr__(self, "lengths", lengths)


@dataclass(frozen=True)
class Extend(LanguageModel):
    """SFT on both responses before DPO, against SFT on the chosen one."""

    sft_updates: int = option(300, "Number of SFT steps.", positive=True, panel=TRAINING)
    updates: int = option(200, "Number of DPO steps.", positive=True, panel=TRAINING)
    every: int = option(
        20, "Steps between two measurements of the probing set.", positive=True, panel=TRAINING
    )
    sft_lr: float = option(5e-5, "Learning rate of SFT.", positive=True, panel=TRAINING)
    lr: float = option(2e-5, "Learning rate of DPO.", positive=True, panel=TRAINING)
    new_tokens: int = option(40, "Largest length of a greedy answer, tokens.", positive=True)
