"""The folder of an experiment: steps that are done once, tables, figures, claims, and a page.

lab = Lab("squeeze", out, seed=0, options={...})
curve = lab.once("curve", measure)          # from disk, if this was done before
lab.table("curve", curve)                   # tables/curve.json, tables/curve.parquet
lab.figure("curve", figure)                 # figures/curve.png, figures/curve.pdf
lab.claim(Claim(...))
lab.finish("what was expected", "what was seen")    # results.json, index.html
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import glob
import hashlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from lddyn import __version__
from lddyn.files import digest_of, json_safe, read_sealed, replace_file, sealed, subfolder
from lddyn.report import render
from lddyn.report.canvas import save_picture
from lddyn.results import load_result, save_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AGREES",
    "DISAGREES",
    "UNTESTABLE",
    "Claim",
    "Lab",
    "Results",
    "Row",
    "Rows",
    "anew",
    "write_json",
]

T = TypeVar("T")
Row = dict[str, Any]  # one row of a table: column → number, text, or what is nested in it
Rows = Sequence[Row]
Results = dict[str, Any]  # what results.json holds
AGREES, DISAGREES, UNTESTABLE = "agrees", "disagrees", "not testable at this scale"
Verdict = Literal["agrees", "disagrees", "not testable at this scale"]
# All that experiments write into their folder: what --fresh deletes, and nothing else.
CONTENT = (
    "results.json",
    "index.html",
    "steps",
    "tables",
    "figures",
    "states",
    "checkpoints",
    "probes.jsonl",
    "written.jsonl",
    "identity.json",
)
_anew: ContextVar[bool] = ContextVar("anew", default=False)


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Within the block an experiment deletes its earlier results before it writes to its folder."""
    token = _anew.set(True)
    try:
        yield
    finally:
        _anew.reset(token)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, put to the test.

    Attributes:
        name: Short and unique within the experiment: "sft 1".
        text: What is claimed.
        source: Where: "§4.1, result 1".
        published: The published number or observation.
        corrected: What the published material says once its mistakes are corrected; empty if it
            has none here.
        ours: What was measured here, with its unit.
        verdict: "agrees", "disagrees" or "not testable at this scale".
        reason: Why the verdict, honestly.
        value: The deciding statistic.
        interval: Its 95 % interval; none where an end is not finite.
    """

    name: str
    text: str
    source: str
    published: str
    ours: str
    verdict: Verdict
    reason: str
    corrected: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.verdict not in (AGREES, DISAGREES, UNTESTABLE):
            raise ValueError(
                f"verdict of claim {self.name!r} must be {AGREES!r}, {DISAGREES!r} or "
                f"{UNTESTABLE!r}, got {self.verdict!r}"
            )
        if self.interval is not None and not all(map(math.isfinite, self.interval)):
            object.__setattr__(self, "interval", None)  # nothing was measured: nothing is printed


@dataclass
class Lab:
    """The folder of one experiment.

    Attributes:
        name: Of the experiment; its page is titled by it.
        folder: Where everything goes; made if it is not there.
        seed: Of all random numbers.
        options: Everything else that decides the results. A folder made with other options, or by
            other code of lddyn, is refused, with the names of what differs; so is one with files of
            other origin that would be overwritten. What is read from files is declared by `reads`.
        progress: Show bars on standard error.

    Example:
        >>> lab = Lab("example", "out/example", seed=0, options={"steps": 3})
        >>> lab.once("squares", lambda: [i * i for i in range(3)])
        [0, 1, 4]
    """

    name: str
    folder: Path
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    identity: dict[str, Any] = field(default_factory=dict, init=False)
    claims: list[Claim] = field(default_factory=list, init=False)
    figures: dict[str, str] = field(default_factory=dict, init=False)
    tables: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.perf_counter()
        self.identity = {
            "experiment": self.name,
            "seed": self.seed,
            "options": json_safe(self.options),
            "made by": {"lddyn": __version__, "code": _code(), "torch": str(torch.__version__)},
            "inputs": {},
        }
        old = _identity(self.folder)
        if old is None:
            foreign = [name for name in CONTENT if (self.folder / name).exists()]
            if foreign:
                raise ValueError(
                    f"{self.folder} holds {', '.join(foreign)} of no experiment of lddyn, which "
                    "would be overwritten: give another --out"
                )
        elif _anew.get():
            _must_be(old, self.folder, self.name)
        else:
            self._must_equal({**old, "inputs": {}})
            self.identity["inputs"] = old.get("inputs", {})
        self._anew = _anew.get()
        if not self._anew:
            write_json(self.folder / "identity.json", self.identity)

    def reads(self, **inputs: Any) -> None:
        """Declares the experiment's inputs by digests of their content, as from `store.identify`.

        Called before the first step that depends on it; kept in identity.json and results.json.

        Raises:
            ValueError: If steps of the folder were made of another content; names it.
        """
        before = self.identity["inputs"]
        self.identity["inputs"] = {**before, **json_safe(inputs)}
        self._must_equal({**self.identity, "inputs": {**self.identity["inputs"], **before}})
        self._begin()
        write_json(self.folder / "identity.json", self.identity)

    def _begin(self) -> None:
        """Clears the folder if it is to begin anew; a refused experiment deletes nothing."""
        if self._anew:
            self._anew = False
            Lab.clear(self.folder, self.name)
            write_json(self.folder / "identity.json", self.identity)

    def _must_equal(self, there: Mapping[str, Any]) -> None:
        """Refuses a folder with another identity."""
        a, b = _flat(there), _flat(self.identity)
        differ = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        if differ:
            said = ", ".join(f"{k} (there {a.get(k)!r}, now {b.get(k)!r})" for k in differ)
            raise ValueError(
                f"{self.folder} holds an experiment with other settings: {said}; give another "
                "--out, the same settings, or --fresh to begin anew"
            )

    @staticmethod
    def clear(folder: str | Path, name: str) -> None:
        """Deletes what an experiment of this name left in a folder, and no other file there.

        Raises:
            ValueError: If the folder holds another experiment.
        """
        folder = Path(folder)
        old = _identity(folder)
        if old is None:
            return
        _must_be(old, folder, name)
        for part in CONTENT:  # the identity last: a folder half cleared is still known
            path = folder / part
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------------ randomness and progress

    def generator(self, *labels: str | int) -> torch.Generator:
        """A generator whose numbers depend on the seed and these labels only."""
        text = "\0".join(map(str, (self.name, self.seed, *labels)))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def bar(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """The items, with a progress bar."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        bar: Iterable[T] = tqdm(
            items, desc=label, total=total, disable=not self.progress, leave=False
        )
        return bar

    # ------------------------------------------------------------------ results

    def once(self, name: str, make: Callable[[], T]) -> T:
        """A step's result: from disk if an earlier run got this far, else made and kept.

        Args:
            name: Of the step.
            make: Returns what JSON can hold; large arrays belong into files of `self.path`.
        """
        path = self.path("steps", f"{name}.json")
        if path.exists():
            value: T = _read(path)["value"]
            return value
        start = time.perf_counter()
        made = json_safe(make())
        write_json(path, {"value": made, "seconds": time.perf_counter() - start})
        return made  # type: ignore[no-any-return]

    def seconds(self, name: str) -> float:
        """The seconds that a step took when it was made."""
        return float(_read(self.path("steps", f"{name}.json"))["seconds"])

    def keep_tensors(self, folder: str, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a checkpoint, whole and with its digest, into a folder of the experiment's."""
        save_result(self.path(folder, name), "lddyn.lab.Tensors", 1, tensors, {})

    def tensors(self, folder: str, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `keep_tensors`.

        Raises:
            ValueError: If the checkpoint is missing or damaged.
        """
        return load_result(self.path(folder, name), "lddyn.lab.Tensors", 1)[0]

    def forget_tensors(self, folder: str, name: str) -> None:
        """Removes a checkpoint that is of no use any more."""
        for path in self.path(folder, "x").parent.glob(f"{glob.escape(name)}.*"):
            path.unlink(missing_ok=True)

    def path(self, *parts: str) -> Path:
        """A path in the folder; its parent folder is made, and must be no link."""
        self._begin()
        path = Path(*parts)
        return subfolder(self.folder, *path.parent.parts) / path.name

    def table(self, name: str, rows: Rows) -> None:
        """Every number of a figure, as tables/NAME.json and, with pyarrow, tables/NAME.parquet."""
        rows = [json_safe(dict(row)) for row in rows]
        text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
        replace_file(self.path("tables", f"{name}.json"), text + "\n")
        self.tables.append(name)
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:  # an extra
            return
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), buffer)
        replace_file(self.path("tables", f"{name}.parquet"), buffer.getvalue())

    def figure(self, name: str, figure: Figure, caption: str = "") -> None:
        """A picture, as figures/NAME.png and .pdf; its caption says what to look at."""
        save_picture(figure, self.path("figures", f"{name}.png"), "png", 110)
        save_picture(figure, self.path("figures", f"{name}.pdf"), "pdf", 110)
        self.figures[name] = caption

    def claim(self, claim: Claim) -> None:
        """A line of the scoreboard."""
        if any(claim.name == other.name for other in self.claims):
            raise ValueError(f"claim {claim.name!r} was made already")
        self.claims.append(claim)

    def finish(self, expected: Sequence[str], seen: Sequence[str]) -> Results:
        """Writes results.json and index.html.

        Args:
            expected: Sentences: what the paper predicts.
            seen: Sentences: what happened here.

        Returns:
            What results.json holds.
        """
        from lddyn import environment

        steps = sorted(self.path("steps", "x").parent.glob("*.json"))
        took = {p.stem: _read(p)["seconds"] for p in steps}
        results = json_safe(
            {
                "experiment": self.name,
                "seed": self.seed,
                "options": self.options,
                "inputs": self.identity["inputs"],
                "expected": list(expected),
                "seen": list(seen),
                "claims": [asdict(claim) for claim in self.claims],
                "figures": self.figures,
                "tables": self.tables,
                "seconds": {"this run": time.perf_counter() - self._began, "steps": took},
                "versions": environment.env()["versions"],
                "made by": _made_by(),
            }
        )
        write_json(self.path("results.json"), results)
        pictures = {
            name: base64.b64encode(self.path("figures", f"{name}.png").read_bytes()).decode("ascii")
            for name in self.figures
        }
        title = f"lddyn lab {self.name}"
        page = render("lab.html", title=title, results=results, pictures=pictures)
        replace_file(self.path("index.html"), page)
        return results  # type: ignore[no-any-return]


def _identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the experiment in a folder; None if there is none."""
    path = folder / "identity.json"
    try:
        content = read_sealed(path)
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.keys() >= {"experiment", "seed", "options"}
    return content if ours else None


def _must_be(identity: Mapping[str, Any], folder: Path, name: str) -> None:
    if identity["experiment"] != name:
        raise ValueError(
            f"{folder} holds experiment {identity['experiment']}, not {name}: give another --out"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as a flat dict; names of inner levels are joined by blanks: "model weights"."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        if not isinstance(value, Mapping):
            flat[name] = value
        elif name in ("options", "made by", "inputs"):
            flat |= _flat(value)
        else:
            flat |= {f"{name} {inner}": v for inner, v in _flat(value).items()}
    return flat


def _made_by() -> dict[str, Any]:
    """Machine, date and commit of this run, without a user's name or path.

    There is a commit only if git knows the package's files: an installed package may lie in the
    checkout of something else. "-dirty" marks files that differ from it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]

    def git(*command: str) -> str:
        try:
            return subprocess.run(
                ["git", *command],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("ls-files", Path(__file__).name) and git(
        "describe", "--always", "--dirty", "--exclude=*"
    )
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": datetime.date.today().isoformat(),
        "commit": commit or None,
    }


def _code() -> str:
    """Digest of the package's Python code, on which the results of steps depend."""
    package = Path(__file__).parents[1]
    return digest_of(*(path.read_bytes() for path in sorted(package.rglob("*.py"))))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file by this content and its digest, whole or not at all."""
    replace_file(path, sealed(content))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete the file, and its step runs anew") from error
