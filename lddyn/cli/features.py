"""`lddyn features … | store … | plan`: gradients of a whole data set, sketched and stored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lddyn.cli.command import OUTPUT, Answer
from lddyn.cli.console import warn
from lddyn.cli.options import (
    SKETCH,
    By,
    Memory,
    ModelOptions,
    RequiredOut,
    ResponseOptions,
    Seed,
    SketchKind,
)
from lddyn.files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lddyn.data.example import Example
    from lddyn.engine.anatomy import Anatomy
    from lddyn.sketches.layout import Layout
    from lddyn.sketches.sketch import Sketch
    from lddyn.store.query import Hits
    from lddyn.store.store import Store

Stores = Annotated[
    list[Path],
    typer.Argument(
        metavar="STORE…",
        help="Folders of stores.",
        exists=True,
        file_okay=False,
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class SketchOptions:
    """How gradients become rows of numbers."""

    kind: Annotated[
        SketchKind, typer.Option(help="Kind of the sketch.", rich_help_panel=SKETCH)
    ] = "twosided"
    k: Annotated[
        int,
        typer.Option(
            "-k", help="How many numbers a gradient is sketched to.", rich_help_panel=SKETCH
        ),
    ] = 4096
    repeats: Annotated[
        int,
        typer.Option(
            help="Independent sketches that these numbers are divided among; their spread gives "
            "the standard error.",
            rich_help_panel=SKETCH,
        ),
    ] = 8
    rank: Annotated[
        int, typer.Option(help="Rank that the kind lowrank keeps.", rich_help_panel=SKETCH)
    ] = 1
    seed: Seed = 0

    def make(self) -> Sketch:
        """The sketch."""
        from lddyn.sketches.sketch import Sketch

        return Sketch(self.kind, k=self.k, seed=self.seed, repeats=self.repeats, rank=self.rank)


def build(
    model: ModelOptions,
    rows: ResponseOptions,
    sketch: SketchOptions,
    out: RequiredOut,
    by: By = "token",
    store_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Number type in the store.", rich_help_panel=OUTPUT),
    ] = "float32",
    memory: Memory = "auto",
) -> Answer:
    """Sketch the gradient of every response token of a data set into a store.

    --out FOLDER is the store. A run that was interrupted continues where it stopped. Under
    `torchrun -m lddyn features build …` the processes divide the examples; the store is the same.
    """
    began = time.perf_counter()
    from lddyn.ranks import Ranks
    from lddyn.store.build import build_store

    made = sketch.make()
    with Ranks.of_torchrun() as ranks:
        tokenizer, anatomy, examples, left_out = _open(model, rows, quiet=ranks.rank != 0)
        built = build_store(
            anatomy,
            examples,
            out,
            made,
            tokenizer=tokenizer,
            by=by,
            dtype=store_dtype,
            memory=memory,
            progress=True,
            ranks=ranks,
        )
    if built is None:  # the first process answers
        return Answer(None)
    seconds = round(time.perf_counter() - began, 3)
    document = built.to_dict() | {"left_out": left_out, "seconds": seconds}
    return Answer(document, [built.store.explain(), f"({seconds:.1f} s)"])


_NAMED = 20  # rows that are named before the rest is counted


def _open(
    model: ModelOptions, rows: ResponseOptions, quiet: bool = False
) -> tuple[PreTrainedTokenizerBase, Anatomy, dict[int, Example], list[str]]:
    """Tokenizer, opened model, responses by their number, and why others were left out."""
    from lddyn.data.data_set import distinct_examples
    from lddyn.engine.anatomy import Anatomy

    content = rows.read()
    tokenizer, anatomy = model.load_tokenizer(), Anatomy(model.load())
    examples, left_out = distinct_examples(
        tokenizer,
        content,
        rows.names,
        rows.encoding,
        check=anatomy.check_limits,
        skip=not rows.strict,
    )
    if not examples:
        why = f"; the first: {left_out[0]}" if left_out else ""
        raise ValueError(f"{rows.data} has no response that can be used{why}")
    if left_out and not quiet:
        for line in left_out[:_NAMED]:
            warn(f"left out: {line}")
        if len(left_out) > _NAMED:
            warn(f"{len(left_out)} left out in all: --json lists them")
    return tokenizer, anatomy, examples, left_out


def plan(
    model: ModelOptions,
    rows: ResponseOptions,
    rtol: Annotated[
        float | None,
        typer.Option(
            help="Relative error of the whole table that you accept. Default: exact.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        SketchKind | None,
        typer.Option(
            help="Kind of sketch to consider. Default: twosided and lowrank.",
            show_default=False,
            rich_help_panel=SKETCH,
        ),
    ] = None,
    by: By = "token",
    memory: Memory = "auto",
) -> Answer:
    """How to compare all tokens of a data set, exactly or by sketches, and what each way costs."""
    import lddyn

    _, anatomy, examples, left_out = _open(model, rows)
    sketch = None if kind is None else lddyn.Sketch(kind)
    way = lddyn.plan(
        anatomy, list(examples.values()), by=by, rtol=rtol, memory=memory, sketch=sketch
    )
    return Answer(way.to_dict() | {"left_out": len(left_out)}, [way.explain()])


def query(
    store: Annotated[
        Path,
        typer.Argument(
            metavar="STORE",
            help="Folder of the store.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ],
    example: Annotated[
        str | None,
        typer.Option(
            help="Content id of the stored example to ask about, or its beginning.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        int | None,
        typer.Option(
            help="Number of the example in the data set, instead of --example.", show_default=False
        ),
    ] = None,
    token: Annotated[
        int | None,
        typer.Option(help="Ask about this token of its response only, from 0.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="How many answers for each token.")] = 10,
    sign: Annotated[
        Literal["up", "down", "both"],
        typer.Option(help="up: what raises the token; down: what lowers it."),
    ] = "both",
    by: By = "token",
    own: Annotated[
        bool, typer.Option("--own", help="Tokens of the example itself may be answers, too.")
    ] = False,
    memory: Memory = "256MiB",
) -> Answer:
    """Which stored tokens or sequences raise or lower the tokens of a stored example most."""
    from lddyn.store.store import Store

    opened = Store.open(store, layout=_layout(store))
    name = _example_id(opened, example, index)
    span = opened.span(name)
    tokens = opened.tokens(span.start, span.stop)
    places = list(range(len(tokens)))
    if token is not None:
        places = [i for i in places if int(tokens.response_index[i]) == token]
        if not places:
            raise ValueError(
                f"--token must be one of {tokens.response_index.tolist()}, got {token}"
            )
    hits = opened.query(
        opened.rows(span.start, span.stop)[places],
        count,
        sign=sign,
        by=by,
        memory=memory,
        exclude=() if own else [name],
    )
    asked = [
        {"response_index": int(tokens.response_index[i]), "token_id": int(tokens.token_id[i])}
        for i in places
    ]
    queries = [
        {**query, "hits": of_query}
        for query, of_query in zip(asked, hits.to_dict()["queries"], strict=True)
    ]
    document = {"store": str(store), "example_id": name, "by": by, "queries": queries}
    whole = opened.identity.get("rows") == "sequence"
    return Answer(document, _tell_hits(hits, asked, name, whole))


def _tell_hits(
    hits: Hits, asked: Sequence[Mapping[str, int]], name: str, whole: bool
) -> Iterator[str]:
    """The hits under a line for each token; `whole`: a row of the store is a whole sequence."""
    for number, query in enumerate(asked):
        token = f"token {query['response_index']} (id {query['token_id']}) of {name}"
        yield f"all of {name}" if whole else token
        yield from (f"  {hit.explain()}" for hit in hits[number])


def _layout(path: Path) -> Layout | None:
    """The layout that the rows of a store were made with. None: they are plain vectors."""
    from lddyn.sketches.layout import Layout
    from lddyn.store.store import Store

    described = Store.open(path).layout_json
    return None if described is None else Layout.from_dict(described)


def _example_id(store: Store, example: str | None, index: int | None) -> str:
    """Content id of the one stored example that --example or --index names."""
    if (example is None) == (index is None):
        raise ValueError("give --example or --index: which stored example do you ask about?")
    if index is not None:
        name = store.example_at(index)
        if name is None:
            raise ValueError(f"--index must be the number of a stored example, got {index}")
        return name
    names = [name for name in store.example_ids if name.startswith(example or "")]
    if len(names) != 1:
        raise ValueError(
            f"--example must be the beginning of one content id, got {example!r}, which "
            f"{len(names)} stored examples begin with"
        )
    return names[0]


def verify(stores: Stores) -> Answer:
    """Read every byte of stores and check it; the exit status is 1 if anything is damaged."""
    from lddyn.errors import StoreCorruptError
    from lddyn.store.store import Store

    documents: list[JsonObject] = []
    summaries: dict[Path, str] = {}
    for path in stores:
        document: JsonObject = {"path": str(path)}
        try:
            store = Store.open(path)
            document |= store.to_dict()
            summaries[path] = store.explain()
            problems = store.verify()
        except StoreCorruptError as error:
            problems = [str(error)]
        documents.append({**document, "problems": problems})

    def tell() -> Iterator[str]:
        for path, document in zip(stores, documents, strict=True):
            if path in summaries:
                yield summaries[path]
            yield from (f"  {problem}" for problem in document["problems"] or ["nothing wrong"])

    passed = not any(document["problems"] for document in documents)
    return Answer({"stores": documents}, tell(), passed)


def ls(stores: Stores) -> Answer:
    """What stores hold, and which model and data they belong to."""
    from lddyn.store.store import Store

    opened = [Store.open(path) for path in stores]

    def tell() -> Iterator[str]:
        for store in opened:
            yield store.explain()
            for name, content in (("identity", store.identity), ("layout", store.layout_json)):
                shown = dict(content or {})
                if "parts" in shown:  # of a sketch: one or more for every parameter
                    shown["parts"] = f"{len(shown['parts'])} (--json shows them)"
                if shown:
                    yield f"  {name}: {json.dumps(shown, ensure_ascii=False)}"

    return Answer({"stores": [store.to_dict() for store in opened]}, tell())


def merge(stores: Stores, out: RequiredOut) -> Answer:
    """Make one store of the stores of several processes, in the order of the data set."""
    from lddyn.store.store import Store

    store = Store.merge(stores, out)
    return Answer(store.to_dict(), [store.explain()])
