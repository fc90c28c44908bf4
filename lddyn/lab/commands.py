"""`lddyn lab NAME`: one command an experiment. Nothing heavy is imported before one runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lddyn.console import one_line_errors
from lddyn.lab import EXPERIMENTS

app = typer.Typer(
    help="The paper's experiments, with K measured: pictures, tables, and a page that says whether "
    "what was expected was seen.",
    no_args_is_help=True,
)

Out = Annotated[
    Path | None,
    typer.Option(help="Folder for everything. Default: lab/NAME.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew: delete what --out holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


def launch(
    name: str, out: Path | None, seed: int, fresh: bool, as_json: bool, **options: Any
) -> dict[str, Any]:
    """Runs an experiment, prints its claims or its JSON; errors are one line."""
    with one_line_errors():
        folder = out or Path("lab") / name
        if fresh and (folder / "identity.json").exists():
            shutil.rmtree(folder)
        experiment = importlib.import_module(f"lddyn.lab.{name}")
        results: dict[str, Any] = experiment.run(folder, seed=seed, progress=True, **options)
        if as_json:
            typer.echo(json.dumps(results, indent=1))
        else:
            _print(results, folder)
        return results


def _print(results: Mapping[str, Any], folder: Path) -> None:
    for sentence in results["seen"]:
        typer.echo(sentence)
    for claim in results["claims"]:
        typer.echo(f"  {claim['name']}: {claim['verdict']}. {claim['ours']}")
    typer.echo(f"{folder / 'index.html'}")


@app.command("all")
def everything(
    out: Out = None, seed: Seed = 0, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Every experiment at its defaults, and one scoreboard of all claims."""
    from lddyn.lab import scoreboard

    folder = out or Path("lab")
    found = []
    # With --json, standard output is the one document.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        for name in EXPERIMENTS:
            typer.echo(f"\n{name}: {EXPERIMENTS[name]}")
            command = next(c for c in app.registered_commands if c.name == name)
            assert command.callback is not None
            found.append(command.callback(out=folder / name, seed=seed, fresh=fresh))
        document = scoreboard.write(found, folder)
    typer.echo(json.dumps(document, indent=1) if as_json else str(folder / "scoreboard.md"))


@app.command("mnist")
def mnist(
    out: Out = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
    network: Annotated[str, typer.Option(help="lenet (the paper's) or mlp.")] = "lenet",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with train-images-idx3-ubyte and train-labels-idx1-ubyte, .gz or not. "
            "Default: scikit-learn's handwritten digits.",
            show_default=False,
        ),
    ] = None,
    torchvision: Annotated[
        str | None,
        typer.Option(
            help="One of torchvision's sets instead: MNIST, FashionMNIST, KMNIST; downloaded to "
            "--data.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="At least 5. The paper's code: 100.")] = 50,
    train: Annotated[int, typer.Option(help="Images to learn. The paper's code: 2000.")] = 1000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Of the first epoch, then a cosine. The paper's: 1e-3.")
    ] = 3e-3,
    momentum: Annotated[float, typer.Option(help="Of the first run; the second has none.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Times θ, added to the gradient.")] = 5e-4,
    probes: Annotated[int, typer.Option(help="Images a class and side where K is measured.")] = 6,
) -> dict[str, Any]:
    """Handwritten digits: one step, accumulated influence, the kernel over training."""
    return launch(
        "mnist", out, seed, fresh, as_json, network=network, data=data, torchvision=torchvision,
        epochs=epochs, train=train, batch=batch, learning_rate=learning_rate, momentum=momentum,
        weight_decay=weight_decay, probes=probes,
    )  # fmt: skip


@app.command("squeeze")
def squeeze(
    out: Out = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
    cases: Annotated[int, typer.Option(help="Random predictions for the lemma's claims.")] = 10_000,
    labels: Annotated[int, typer.Option(help="Labels of the regimes and cases.")] = 50,
    large: Annotated[int, typer.Option(help="Labels of the large regime.")] = 1000,
) -> dict[str, Any]:
    """Where the probability goes when one label is pushed down."""
    options = {"cases": cases, "labels": labels, "large": large}
    return launch("squeeze", out, seed, fresh, as_json, **options)


@app.command("bigram")
def bigram(
    out: Out = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
    length: Annotated[int, typer.Option(help="Words of the text.")] = 20_000,
    steps: Annotated[int, typer.Option(help="Of training, before the negative step.")] = 1500,
    pairs: Annotated[int, typer.Option(help="Contexts and unseen words to push.")] = 60,
    repeats: Annotated[int, typer.Option(help="Pushes of the same word.")] = 30,
    strength: Annotated[float, typer.Option(help="Learning rate times K of the pushed word.")] = 1,
) -> dict[str, Any]:
    """The same negative step in a table of logits and in shared features."""
    options = {
        "length": length, "steps": steps, "pairs": pairs, "repeats": repeats, "strength": strength,
    }  # fmt: skip
    return launch("bigram", out, seed, fresh, as_json, **options)


@app.command("objectives")
def objectives(
    out: Out = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
    cases: Annotated[int, typer.Option(help="Random pairs per objective.")] = 200,
    labels: Annotated[int, typer.Option(help="Labels of the softmax that descends.")] = 50,
    steps: Annotated[int, typer.Option(help="Of its gradient descent.")] = 300,
) -> dict[str, Any]:
    """The residuals of twelve objectives and where they push."""
    options = {"cases": cases, "labels": labels, "steps": steps}
    return launch("objectives", out, seed, fresh, as_json, **options)
