"""`lddyn lab NAME`: one command an experiment. Nothing heavy is imported before one runs.

The options of an experiment are the parameters of its `run`, with the same defaults;
tests/lab/test_lab.py holds them equal.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lddyn.cli.command import OUTPUT, Answer, commands, group
from lddyn.cli.options import DATA, MODEL, Out, Seed
from lddyn.lab import EXPERIMENTS

app = group(
    "The paper's experiments, with K measured: pictures, tables, and a page that says for each "
    "expected effect whether it was seen."
)

_TRAINING = "Training"


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Where an experiment writes, and how it begins. The default folder is lab/NAME."""

    out: Out = None
    seed: Seed = 0
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Begin anew: delete what the experiment left in the folder. Default: continue.",
            rich_help_panel=OUTPUT,
        ),
    ] = False


class _Arguments:
    """The options of one experiment, as arguments of its `run`."""

    def arguments(self) -> dict[str, Any]:
        """Parameter → value."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def launch(name: str, lab: LabOptions, options: _Arguments) -> Answer:
    """Runs an experiment."""
    folder = lab.out or Path("lab") / name
    return _answer(_results(name, folder, lab, options), folder)


def _results(name: str, folder: Path, lab: LabOptions, options: _Arguments) -> dict[str, Any]:
    arguments = options.arguments()
    from lddyn.lab.record import anew

    experiment = importlib.import_module(f"lddyn.lab.{name}")
    with anew() if lab.fresh else contextlib.nullcontext():
        results: dict[str, Any] = experiment.run(folder, seed=lab.seed, progress=True, **arguments)
    return results


def _answer(results: Mapping[str, Any], folder: Path) -> Answer:
    def tell() -> Iterator[str]:
        yield from results["seen"]
        for claim in results["claims"]:
            yield f"  {claim['name']}: {claim['verdict']}. {claim['ours']}"
        yield f"page: {folder / 'index.html'}"

    return Answer(results, tell())


# --------------------------------------------------------------------------- with a language model


@dataclass(frozen=True, kw_only=True)
class LanguageOptions(_Arguments):
    """A model and rows with the paper's response types."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a causal LM; needs --data. Default: the demo's, trained "
            "here.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Data file in the format of the authors' probing files. Default: the demo's rows.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    rows: Annotated[
        int,
        typer.Option(
            "--limit",
            help="Read only this many rows, from the first; a fifth of the prompts is held out.",
            rich_help_panel=DATA,
        ),
    ] = 248
    prompts: Annotated[
        int, typer.Option(help="Training prompts that are watched.", rich_help_panel=DATA)
    ] = 40


Updates = Annotated[
    int, typer.Option(help="Training steps, of 4 rows each.", rich_help_panel=_TRAINING)
]

Every = Annotated[
    int,
    typer.Option(
        help="Steps between two measurements of all log-probs.", rich_help_panel=_TRAINING
    ),
]

Lr = Annotated[float, typer.Option(help="Learning rate η.", rich_help_panel=_TRAINING)]

SftLr = Annotated[float, typer.Option(help="Learning rate of SFT.", rich_help_panel=_TRAINING)]


@dataclass(frozen=True, kw_only=True)
class ProbesOptions(LanguageOptions):
    """Options of `lddyn lab probes`."""

    endpoint: Annotated[
        str,
        typer.Option(
            help="URL of a chat service that writes missing responses. Default: nothing is sent."
        ),
    ] = ""
    endpoint_model: Annotated[str, typer.Option(help="Name of the service's model.")] = ""
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the service's key.")
    ] = ""


def probes(lab: LabOptions, options: ProbesOptions) -> Answer:
    """The probing set: the paper's response types, built or read, and one pass over them."""
    return launch("probes", lab, options)


@dataclass(frozen=True, kw_only=True)
class SftOptions(LanguageOptions):
    """Options of `lddyn lab sft`."""

    updates: Updates = 400
    every: Every = 20
    lr: Lr = 5e-5
    kernel_points: Annotated[int, typer.Option(help="How many times K is measured.")] = 3
    kernel_prompts: Annotated[int, typer.Option(help="Prompts that K is measured for.")] = 4
    explained: Annotated[
        int, typer.Option(help="Steps that are decomposed and compared with what they did.")
    ] = 8
    accuracy_steps: Annotated[
        int, typer.Option(help="Steps at each of several learning rates, for the error's order.")
    ] = 3


def sft(lab: LabOptions, options: SftOptions) -> Answer:
    """SFT: log-probs of every response type over training, with the kernel measured."""
    return launch("sft", lab, options)


@dataclass(frozen=True, kw_only=True)
class DpoOptions(LanguageOptions):
    """Options of `lddyn lab dpo`."""

    lengths: Annotated[
        str,
        typer.Option(
            metavar="STEPS,STEPS,…",
            help="Steps of SFT before DPO; each is a run of its own.",
            rich_help_panel=_TRAINING,
        ),
    ] = "0,100,400"
    updates: Updates = 200
    every: Every = 20
    sft_lr: SftLr = 5e-5
    lr: Lr = 2e-5
    explained: Annotated[
        int, typer.Option(help="Steps that are decomposed and compared with what they did.")
    ] = 5
    new_tokens: Annotated[
        int, typer.Option(help="Most tokens of a response that the model writes.")
    ] = 32

    def arguments(self) -> dict[str, Any]:
        """Parameter → value, with the lengths as numbers."""
        try:
            lengths = tuple(int(text) for text in self.lengths.split(","))
        except ValueError:
            raise ValueError(
                f"--lengths must be whole numbers separated by commas, got {self.lengths!r}"
            ) from None
        return super().arguments() | {"lengths": lengths}


def dpo(lab: LabOptions, options: DpoOptions) -> Answer:
    """DPO: the terms of y+ and y− at every probe, and where the probability of y− went."""
    return launch("dpo", lab, options)


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(LanguageOptions):
    """Options of `lddyn lab extend`."""

    sft_updates: Annotated[
        int, typer.Option(help="Steps of SFT before DPO.", rich_help_panel=_TRAINING)
    ] = 300
    updates: Updates = 200
    every: Every = 20
    sft_lr: SftLr = 5e-5
    lr: Lr = 2e-5
    new_tokens: Annotated[
        int, typer.Option(help="Most tokens of a response that the model writes.")
    ] = 40


def extend(lab: LabOptions, options: ExtendOptions) -> Answer:
    """SFT on both responses before DPO, compared with SFT on the chosen one."""
    return launch("extend", lab, options)


# --------------------------------------------------------------------------- without one


@dataclass(frozen=True, kw_only=True)
class MnistOptions(_Arguments):
    """Options of `lddyn lab mnist`."""

    network: Annotated[
        Literal["lenet", "mlp"], typer.Option(help="lenet is the paper's.", rich_help_panel=MODEL)
    ] = "lenet"
    data: Annotated[
        Path | None,
        typer.Option(
            "--images",
            help="Folder with train-images-idx3-ubyte and train-labels-idx1-ubyte, .gz or not. "
            "Default: scikit-learn's handwritten digits.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    torchvision: Annotated[
        str | None,
        typer.Option(
            help="One of torchvision's sets instead: MNIST, FashionMNIST, KMNIST; it is downloaded "
            "to --images.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None
    epochs: Annotated[
        int,
        typer.Option(
            help="Epochs of the run, 5 or more. The paper's code: 100.", rich_help_panel=_TRAINING
        ),
    ] = 50
    train: Annotated[
        int,
        typer.Option(help="Images that are learned. The paper's code: 2000.", rich_help_panel=DATA),
    ] = 1000
    batch: Annotated[
        int, typer.Option(help="Images in a batch of the run.", rich_help_panel=_TRAINING)
    ] = 64
    learning_rate: Annotated[
        float,
        typer.Option(
            "--lr",
            help="Learning rate η of the first epoch; it falls as a cosine. The paper's: 1e-3.",
            rich_help_panel=_TRAINING,
        ),
    ] = 3e-3
    momentum: Annotated[
        float,
        typer.Option(
            help="Momentum of the first run; the second has none.", rich_help_panel=_TRAINING
        ),
    ] = 0.9
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay.", rich_help_panel=_TRAINING)
    ] = 5e-4
    probes: Annotated[
        int, typer.Option(help="Images per class and per side of K at which K is measured.")
    ] = 6


def mnist(lab: LabOptions, options: MnistOptions) -> Answer:
    """Handwritten digits: one step, accumulated influence, and the kernel over training."""
    return launch("mnist", lab, options)


@dataclass(frozen=True, kw_only=True)
class SqueezeOptions(_Arguments):
    """Options of `lddyn lab squeeze`."""

    cases: Annotated[int, typer.Option(help="Random cases on which claims are checked.")] = 10_000
    labels: Annotated[int, typer.Option(help="Labels of the softmax.")] = 50
    large: Annotated[int, typer.Option(help="Labels of the large softmax.")] = 1000


def squeeze(lab: LabOptions, options: SqueezeOptions) -> Answer:
    """One softmax: where the probability goes when one label is pushed down."""
    return launch("squeeze", lab, options)


@dataclass(frozen=True, kw_only=True)
class BigramOptions(_Arguments):
    """Options of `lddyn lab bigram`."""

    length: Annotated[int, typer.Option(help="Words of the training text.")] = 20_000
    steps: Annotated[
        int, typer.Option(help="Steps of gradient descent.", rich_help_panel=_TRAINING)
    ] = 1500
    pairs: Annotated[int, typer.Option(help="Pairs of a context and a word to push down.")] = 60
    repeats: Annotated[
        int, typer.Option("--pushes", help="How many times a word is pushed down.")
    ] = 30
    strength: Annotated[
        float, typer.Option(help="Learning rate times K of the word that is pushed down.")
    ] = 1


def bigram(lab: LabOptions, options: BigramOptions) -> Answer:
    """The same negative step in a table of logits and in a model with shared features."""
    return launch("bigram", lab, options)


@dataclass(frozen=True, kw_only=True)
class ObjectivesOptions(_Arguments):
    """Options of `lddyn lab objectives`."""

    cases: Annotated[int, typer.Option(help="Random cases on which claims are checked.")] = 200
    labels: Annotated[int, typer.Option(help="Labels of the softmax.")] = 50
    steps: Annotated[
        int, typer.Option(help="Steps of gradient descent.", rich_help_panel=_TRAINING)
    ] = 300


def objectives(lab: LabOptions, options: ObjectivesOptions) -> Answer:
    """The residuals of twelve objectives, and which tokens they push."""
    return launch("objectives", lab, options)


# --------------------------------------------------------------------------- all of them

_OPTIONS: dict[str, type[_Arguments]] = {
    "probes": ProbesOptions,
    "sft": SftOptions,
    "dpo": DpoOptions,
    "extend": ExtendOptions,
    "mnist": MnistOptions,
    "squeeze": SqueezeOptions,
    "bigram": BigramOptions,
    "objectives": ObjectivesOptions,
}


def everything(lab: LabOptions) -> Answer:
    """Every experiment with its defaults, and one scoreboard of all claims."""
    from lddyn.lab import scoreboard

    folder = lab.out or Path("lab")
    results = []
    for name, title in EXPERIMENTS.items():
        typer.echo(f"\n{name}: {title}", err=True)
        own = folder / name
        results.append(_results(name, own, replace(lab, out=own), _OPTIONS[name]()))
    document = scoreboard.write(results, folder)
    return Answer(document, [f"scoreboard: {folder / 'scoreboard.md'}"])


commands(app, probes, sft, dpo, extend, mnist, squeeze, bigram, objectives)
commands(app, everything, name="all")
