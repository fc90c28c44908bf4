"""`lddyn lab NAME`: one command an experiment. Nothing heavy is imported before one runs.

Options and defaults are those of each experiment's `run`; tests/test_lab.py holds them equal.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lddyn.cli.console import one_line_errors
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

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin anew: delete what the experiment left in --out.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


def launch(
    name: str, out: Path | None, seed: int, fresh: bool, as_json: bool, **options: Any
) -> dict[str, Any]:
    """Runs an experiment, prints its claims or its JSON; errors are one line."""
    with one_line_errors():
        from lddyn.lab.record import anew

        folder = out or Path("lab") / name
        experiment = importlib.import_module(f"lddyn.lab.{name}")
        with anew() if fresh else contextlib.nullcontext():
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


Model = Annotated[
    str | None,
    typer.Option(
        help="Name or folder of a causal LM; needs --data. Default: the demo's, made here."
    ),
]

Data = Annotated[str | None, typer.Option(help="Rows in the format of the authors' probing files.")]


@app.command("probes")
def probes(
    out: Out = None,
    seed: Seed = 0,
    model: Model = None,
    data: Data = None,
    rows: Annotated[int, typer.Option(help="Rows that are read.")] = 248,
    prompts: Annotated[int, typer.Option(help="Prompts in the probing set.")] = 40,
    endpoint: Annotated[
        str, typer.Option(help="Service that writes missing responses; without it nothing is sent.")
    ] = "",
    endpoint_model: Annotated[str, typer.Option(help="The model's name there.")] = "",
    key_variable: Annotated[str, typer.Option(help="Environment variable with the key.")] = "",
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """The probing set: the paper's response types, built or read, and the pass over it."""
    return launch(
        "probes",
        out,
        seed,
        fresh,
        as_json,
        model=model,
        data=data,
        rows=rows,
        prompts=prompts,
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        key_variable=key_variable,
    )


Rows = Annotated[int, typer.Option(help="Rows that are read; a fifth is held out.")]

Prompts = Annotated[int, typer.Option(help="Training prompts that are probes.")]

Updates = Annotated[int, typer.Option(help="Steps, of 4 rows each.")]

Every = Annotated[int, typer.Option(help="Updates between probe passes.")]

Rate = Annotated[float, typer.Option(help="Learning rate of RMSprop.")]


@app.command("sft")
def sft(
    out: Out = None,
    seed: Seed = 0,
    model: Model = None,
    data: Data = None,
    rows: Rows = 248,
    prompts: Prompts = 40,
    updates: Updates = 400,
    every: Every = 20,
    lr: Rate = 5e-5,
    kernel_points: Annotated[int, typer.Option(help="How often K is measured.")] = 3,
    kernel_prompts: Annotated[int, typer.Option(help="Prompts that it is measured for.")] = 4,
    explained: Annotated[int, typer.Option(help="Updates predicted to first order.")] = 8,
    accuracy_steps: Annotated[int, typer.Option(help="Updates at each of other rates.")] = 3,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """SFT: every response type over training, with the kernel measured."""
    return launch(
        "sft",
        out,
        seed,
        fresh,
        as_json,
        model=model,
        data=data,
        rows=rows,
        prompts=prompts,
        updates=updates,
        every=every,
        lr=lr,
        kernel_points=kernel_points,
        kernel_prompts=kernel_prompts,
        explained=explained,
        accuracy_steps=accuracy_steps,
    )


@app.command("dpo")
def dpo(
    out: Out = None,
    seed: Seed = 0,
    model: Model = None,
    data: Data = None,
    rows: Rows = 248,
    prompts: Prompts = 40,
    lengths: Annotated[
        str, typer.Option(help="Updates of SFT before DPO, separated by commas.")
    ] = "0,100,400",
    updates: Updates = 200,
    every: Every = 20,
    sft_lr: Annotated[float, typer.Option(help="Learning rate of SFT.")] = 5e-5,
    lr: Annotated[float, typer.Option(help="Learning rate of DPO.")] = 2e-5,
    explained: Annotated[int, typer.Option(help="Updates taken apart into terms.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of a sample.")] = 32,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """DPO: the two terms at every probe, and where the mass of y− went."""
    with one_line_errors():
        try:
            several = tuple(int(text) for text in lengths.split(","))
        except ValueError:
            raise ValueError(
                f"lengths must be whole numbers separated by commas, got {lengths!r}"
            ) from None
    return launch(
        "dpo",
        out,
        seed,
        fresh,
        as_json,
        model=model,
        data=data,
        rows=rows,
        prompts=prompts,
        lengths=several,
        updates=updates,
        every=every,
        sft_lr=sft_lr,
        lr=lr,
        explained=explained,
        new_tokens=new_tokens,
    )


@app.command("extend")
def extend(
    out: Out = None,
    seed: Seed = 0,
    model: Model = None,
    data: Data = None,
    rows: Rows = 248,
    prompts: Prompts = 40,
    sft_updates: Annotated[int, typer.Option(help="Steps of SFT.")] = 300,
    updates: Updates = 200,
    every: Every = 20,
    sft_lr: Annotated[float, typer.Option(help="Learning rate of SFT.")] = 5e-5,
    lr: Annotated[float, typer.Option(help="Learning rate of DPO.")] = 2e-5,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of a greedy answer.")] = 40,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """SFT on both responses before DPO, against SFT on the chosen one."""
    return launch(
        "extend",
        out,
        seed,
        fresh,
        as_json,
        model=model,
        data=data,
        rows=rows,
        prompts=prompts,
        sft_updates=sft_updates,
        updates=updates,
        every=every,
        sft_lr=sft_lr,
        lr=lr,
        new_tokens=new_tokens,
    )


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
        "mnist",
        out,
        seed,
        fresh,
        as_json,
        network=network,
        data=data,
        torchvision=torchvision,
        epochs=epochs,
        train=train,
        batch=batch,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        probes=probes,
    )


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
        "length": length,
        "steps": steps,
        "pairs": pairs,
        "repeats": repeats,
        "strength": strength,
    }
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
