"""A decomposition told in words, and as one self-contained HTML page.

`tell` writes the plain sentences that the command line prints; `write_html` puts them, the tables,
the pictures and a token × token table to point at into a single file: no network, no other files,
readable from file:// on a phone, light or dark. Token texts and names are untrusted: the template
escapes everything, and the page's script writes them with textContent only.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.files import plain, replace_file
from lddyn.report.figures import plot_decomposition
from lddyn.report.page import render, versions, word
from lddyn.text import printable, signed, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lddyn.steps.decomposition import Decomposition, Observed
    from lddyn.steps.verify import Verification

__all__ = [
    "read_run",
    "tell",
    "verification_from_dict",
    "verification_to_dict",
    "write_html",
    "write_run",
]

_LARGEST_TABLE = 40_000  # cells of a token × token table in the page; the pictures show larger ones
_TOLD = 4  # token texts named in a sentence

# ---------------------------------------------------------------------------------------------
# Words


def _size(value: float) -> str:
    """A magnitude without its sign."""
    return signed(abs(value)).lstrip("+")


def _moved(value: float) -> str:
    """What a change is called: "rose by 0.42 nats"."""
    if abs(value) < 5e-7:
        return "did not move"
    return f"{'rose' if value > 0 else 'fell'} by {_size(value)} nats"


def _source(name: str) -> str:
    """A source of change, as it is called in a sentence."""
    if name in ("history", "weight decay"):
        return f"the optimizer's {name}" if name == "history" else name
    return ("y−" if name == "y-" else name) + " tokens"


def _role(dec: Decomposition, observed: Observed) -> str:
    """The update sequence that this response is, or ""."""
    for name, at in observed.sequences.items():
        if [t.token_id for t in dec.update_tokens[at]] == observed.token_ids:
            return name
    return ""


def _title(dec: Decomposition, observed: Observed) -> str:
    """Name of a response, with its role in the update."""
    role = _role(dec, observed).replace("y-", "y−")
    name = printable(observed.name)
    return f"{role} ({name})" if role and role != observed.name else name


def _through(dec: Decomposition, observed: Observed) -> str:
    """Which token texts carry the largest part: "61 % of the lowering by y− came through …"."""
    sums = {k: float(observed.influence[:, at].sum()) for k, at in observed.sequences.items()}
    total = float(observed.delta_logp.sum())
    agreeing = {k: v for k, v in sums.items() if v * total > 0}
    if not agreeing:
        return ""
    name = max(agreeing, key=lambda k: abs(agreeing[k]))
    sign = math.copysign(1.0, total)
    effects: dict[str, float] = {}
    at = observed.sequences[name]
    for token, value in zip(
        dec.update_tokens[at], observed.influence[:, at].sum(0).tolist(), strict=True
    ):
        effects[token.text] = effects.get(token.text, 0.0) + sign * value
    gross = sum(v for v in effects.values() if v > 0)
    ordered = sorted((k for k in effects if effects[k] > 0), key=lambda k: -effects[k])
    chosen: list[str] = []
    covered = 0.0
    for text in ordered[:_TOLD]:
        if chosen and covered >= 0.6 * gross:
            break
        chosen.append(text)
        covered += effects[text]
    quoted = ", ".join(f"‘{visible(t, 24)}’" for t in chosen)
    what = "raising" if total > 0 else "lowering"
    by = "y−" if name == "y-" else name
    return f"{100 * covered / gross:.0f} % of the {what} by {by} came through {quoted}"


def tell(dec: Decomposition, verification: Verification | None = None) -> list[str]:
    r"""The decomposition in plain words, one sentence an item.

    Args:
        dec: The decomposition.
        verification: Its check against real steps, `dec.verify()`, if it was made.

    Returns:
        What the step was; what happened to each response, what made it and through which tokens;
        what that means for y+ and y−; how far the prediction can be trusted.

    Example:
        >>> # print("\n".join(lddyn.report.tell(dec)))
    """
    settings = dec.settings
    beta = f", β = {settings['beta']:g}" if "beta" in settings else ""
    said = [
        f"One {settings.get('objective', 'custom')} step with {settings.get('optimizer', '?')}, "
        f"learning rate {dec.lr:g}{beta}; the loss before it is {dec.loss:.4g}."
    ]
    roles: dict[str, Observed] = {}
    for observed in dec:
        role = _role(dec, observed)
        roles.setdefault(role, observed)
        change = float(observed.delta_logp.sum())
        parts = {k: float(v.sum()) for k, v in observed.by_sequence().items()}
        causes = ", ".join(f"{signed(v)} from {_source(k)}" for k, v in parts.items())
        through = _through(dec, observed)
        before = float(observed.logp.sum())
        said.append(
            f"{_title(dec, observed)} {_moved(change)} (log π {signed(before, 4)} → "
            f"{signed(before + change, 4)}): {causes}" + (f"; {through}." if through else ".")
        )
    if "y+" in roles and "y-" in roles:
        said += _tell_pair(roles["y+"], roles["y-"])
    said.append(_tell_error(dec, verification))
    return said


def _tell_pair(chosen: Observed, rejected: Observed) -> list[str]:
    """What the step did to the margin of a preference pair."""
    up, down = float(chosen.delta_logp.sum()), float(rejected.delta_logp.sum())
    said = []
    if up < 0:
        own, other = (float(chosen.by_sequence()[k].sum()) for k in ("y+", "y-"))
        said.append(
            f"y+ fell although the step pushes it up: its own tokens gave {signed(own)}, and "
            f"pushing y− down took {signed(other)} through what the two share."
        )
    margin = up - down
    verb = "widened" if margin > 0 else "narrowed"
    why = "because y− fell further than y+" if up < 0 and margin > 0 else ""
    said.append(
        f"The margin log π(y+) − log π(y−) {verb} by {_size(margin)} nats"
        + (f", {why}." if why else ".")
    )
    return said


def _tell_error(dec: Decomposition, verification: Verification | None) -> str:
    """How far to trust the numbers."""
    rule = {
        "start": "the kernel at the start of the step",
        "midpoint": "the kernel at the midpoint of the step",
        "simpson": "Simpson's rule along the step",
    }[dec.rule]
    if verification is None:
        error = max(abs(float(o.error_estimate.sum())) for o in dec)
        return (
            f"Computed by {rule}; not checked against a real step. The predictions at the start "
            f"and at the midpoint of the step differ by at most {_size(error)} nats per response."
        )
    measured, predicted = verification.measured[0], verification.predicted[0]
    said = (
        f"A real step measured {signed(float(measured.sum()), 6)} nats over all responses where "
        f"{signed(float(predicted.sum()), 6)} was predicted (relative error "
        f"{verification.relative_error:.1e}; {rule})"
    )
    if math.isfinite(verification.slope):
        said += (
            f"; as the learning rate shrinks, the error falls with slope {verification.slope:.2f} "
            f"(expected {verification.expected})"
        )
    return said + "."


# ---------------------------------------------------------------------------------------------
# Verification as JSON


def verification_to_dict(verification: Verification) -> dict[str, Any]:
    """A verification as plain numbers for JSON; a slope that is not known is None."""
    slope = verification.slope
    return {
        "lrs": list(verification.lrs),
        "errors": list(verification.errors),
        "relative_error": verification.relative_error,
        "slope": slope if math.isfinite(slope) else None,
        "expected": verification.expected,
        "dtype": verification.dtype,
        "measured": verification.measured.tolist(),
        "predicted": verification.predicted.tolist(),
    }


def verification_from_dict(values: Mapping[str, Any]) -> Verification:
    """Reads back what `verification_to_dict` wrote."""
    import torch

    from lddyn.steps.verify import Verification

    slope = values["slope"]
    return Verification(
        lrs=list(values["lrs"]),
        measured=torch.tensor(values["measured"], dtype=torch.float64),
        predicted=torch.tensor(values["predicted"], dtype=torch.float64),
        errors=list(values["errors"]),
        slope=math.nan if slope is None else float(slope),
        expected=int(values["expected"]),
        dtype=str(values["dtype"]),
    )


def _per_response(dec: Decomposition, verification: Verification) -> dict[str, float]:
    """Measured Δ log π of every response at the first learning rate."""
    measured, start = {}, 0
    for observed in dec:
        stop = start + len(observed.token_ids)
        measured[observed.name] = float(verification.measured[0, start:stop].sum())
        start = stop
    return measured


# ---------------------------------------------------------------------------------------------
# A run on disk


def summarise(dec: Decomposition, verification: Verification | None = None) -> dict[str, Any]:
    """`dec.summary()` with the story and, in short, the verification; ready for JSON."""
    summary: dict[str, Any] = {**dec.summary(), "story": tell(dec, verification)}
    if verification is not None:
        full = verification_to_dict(verification)
        for key in ("measured", "predicted"):
            full[key] = [sum(row) for row in full[key]]
        summary["verification"] = full
        for entry, measured in zip(
            summary["observed"], _per_response(dec, verification).values(), strict=True
        ):
            entry["measured"] = measured
    found: dict[str, Any] = plain(summary)
    return found


def write_run(
    directory: str | Path,
    decs: Mapping[str, Decomposition],
    verifications: Mapping[str, Verification | None],
    *,
    title: str,
    story: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run: decompositions, verification, summary, pictures, and the page.

    Args:
        directory: Where; created. A decomposition named "" goes there, others into a folder of
            their name.
        decs: The decompositions by name.
        verifications: Their verifications by the same names; None where there is none.
        title: Heading of the page.
        story: Sentences to open the page with.
        extra: Facts for the page's last table.
        facts: Further entries for summary.json.

    Returns:
        Path of the page, `report.html`.

    Cost: as `write_html`, and again as much for the pictures in print resolution.
    """
    directory = Path(directory)
    summary: dict[str, Any] = {
        "title": title,
        "opening": list(story),
        "extra": dict(extra or {}),
        **(facts or {}),
    }
    pictures = {}
    for name, dec in decs.items():
        place = directory / name
        dec.save(place / "decomposition")
        pictures[name] = plot_decomposition(dec, place)
        verification = verifications.get(name)
        if verification is not None:
            _write(place / "verification.json", verification_to_dict(verification))
        if name:
            summary[name] = summarise(dec, verification)
        else:
            summary |= summarise(dec, verification)
    _write(directory / "summary.json", summary)
    return write_html(
        decs,
        directory / "report.html",
        title=title,
        verification={k: v for k, v in verifications.items() if v is not None},
        story=story,
        extra=extra,
        figures=pictures,
    )


def read_run(
    directory: str | Path,
) -> tuple[dict[str, Decomposition], dict[str, Verification | None], dict[str, Any]]:
    """Read what `write_run` wrote: decompositions, verifications, and summary.json.

    Args:
        directory: The run.

    Raises:
        FileNotFoundError: If there is no decomposition in it.
        ValueError: If a file is damaged.
    """
    from lddyn.steps.decomposition import Decomposition

    directory = Path(directory)
    places = {
        "" if p.parent == directory else p.parent.name: p.parent
        for p in [
            directory / "decomposition.json",
            *sorted(directory.glob("*/decomposition.json"), key=lambda p: p.stat().st_mtime_ns),
        ]
        if p.is_file()
    }
    if not places:
        raise FileNotFoundError(
            f"{directory}: no decomposition.json there, nor one folder below; `lddyn decompose "
            "--out` writes it"
        )
    decs = {name: Decomposition.load(place / "decomposition") for name, place in places.items()}
    verifications: dict[str, Verification | None] = {}
    for name, place in places.items():
        path = place / "verification.json"
        try:
            verifications[name] = (
                verification_from_dict(json.loads(path.read_text(encoding="utf-8")))
                if path.is_file()
                else None
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a verification of lddyn ({error!r})") from error
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise ValueError(f"{directory / 'summary.json'}: not JSON ({error})") from error
    return decs, verifications, summary


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(path, text + "\n")


# ---------------------------------------------------------------------------------------------
# The page


def write_html(
    dec: Decomposition | Mapping[str, Decomposition],
    path: str | Path,
    *,
    title: str = "What one finetuning step did",
    verification: Verification | Mapping[str, Verification] | None = None,
    story: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    figures: Sequence[Figure] | Mapping[str, Sequence[Figure]] | None = None,
) -> Path:
    """Write one self-contained HTML page about one decomposition, or several.

    Args:
        dec: The decomposition; a mapping names several, each gets a section.
        path: The file to write; its directory is created.
        title: Heading of the page.
        verification: Result of `dec.verify()`; a mapping by the same names for several.
        story: Sentences to put before everything else.
        extra: Facts for the table at the end (model, data, seconds, …).
        figures: What `plot_decomposition` returned, to not draw it again; a mapping for several.

    Returns:
        The path written.

    Cost: the drawing, about a second per picture, and about 0.2 MB per picture.

    Example:
        >>> # lddyn.report.write_html(dec, "report.html", verification=dec.verify())
    """
    several = dict(dec) if isinstance(dec, Mapping) else {"": dec}

    def of(values: Any, name: str) -> Any:
        return values.get(name) if isinstance(values, Mapping) else values

    sections = [
        _section(number, name, one, of(verification, name), of(figures, name))
        for number, (name, one) in enumerate(several.items())
    ]
    facts = {**(extra or {}), "made with": versions()}
    text = render(
        "decomposition.html", title=title, story=list(story or []), sections=sections, facts=facts
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def _section(
    number: int,
    name: str,
    dec: Decomposition,
    verification: Verification | None,
    figures: Sequence[Figure] | None,
) -> dict[str, Any]:
    """All that the template needs for one decomposition."""
    sources = list(dict.fromkeys(k for o in dec for k in o.by_sequence()))
    measured = _per_response(dec, verification) if verification is not None else {}
    rows = []
    for observed in dec:
        parts = {k: float(v.sum()) for k, v in observed.by_sequence().items()}
        rows.append(
            {
                "name": _title(dec, observed),
                "tokens": len(observed.token_ids),
                "before": signed(float(observed.logp.sum()), 5),
                "predicted": signed(float(observed.delta_logp.sum()), 5),
                "sign": word(float(observed.delta_logp.sum())),
                "measured": signed(measured[observed.name], 5) if measured else "",
                "error": signed(float(observed.error_estimate.sum()), 2),
                "parts": [signed(parts.get(k, 0.0)) for k in sources],
                "strongest": [
                    {
                        "text": visible(t.text, 24),
                        "place": f"{t.sequence.replace('y-', 'y−')}[{t.index}]",
                        "nats": signed(v),
                        "sign": word(v),
                        "share": 100 * abs(v) / largest,
                    }
                    for strongest in [dec.strongest(observed, 6)]
                    for largest in [max((abs(v) for _, v in strongest), default=1.0) or 1.0]
                    for t, v in strongest
                ],
            }
        )
    pictures = [
        {"name": str(f.get_label()), "data": _png(f)}
        for f in (plot_decomposition(dec) if figures is None else figures)
    ]
    return {
        "number": number,
        "name": {"sft": "The SFT step", "dpo": "The DPO step"}.get(name, name),
        "story": tell(dec, verification),
        "sources": [k.replace("y-", "y−") for k in sources],
        "rows": rows,
        "measured": bool(measured),
        "names": [row["name"] for row in rows],
        "tokens": token_data(dec),
        "pictures": pictures,
        "verification": _verification_rows(verification),
        "settings": _settings(dec),
    }


def _settings(dec: Decomposition) -> dict[str, str]:
    shown = {
        **dec.settings,
        "learning rate": f"{dec.lr:g}",
        "rule": dec.rule,
        "loss": f"{dec.loss:.6g}",
    }
    worst = max(o.agreement for o in dec)
    shown["factors against push"] = f"largest difference {worst:.1e} of the largest row"
    return {str(k).replace("_", " "): str(plain(v)) for k, v in shown.items() if v is not None}


def _verification_rows(verification: Verification | None) -> dict[str, Any] | None:
    if verification is None:
        return None
    rows = zip(
        verification.lrs,
        verification.measured.sum(1).tolist(),
        verification.predicted.sum(1).tolist(),
        verification.errors,
        strict=True,
    )
    return {
        "rows": [
            {
                "lr": f"{lr:.3g}",
                "measured": signed(m, 7),
                "predicted": signed(p, 7),
                "error": f"{e:.2e}",
            }
            for lr, m, p, e in rows
        ],
        "slope": f"{verification.slope:.3f}" if math.isfinite(verification.slope) else "unknown",
        "expected": verification.expected,
        "dtype": verification.dtype.removeprefix("torch."),
    }


def token_data(dec: Decomposition) -> dict[str, Any]:
    """Texts and influence tables for the page's script, with three significant digits."""
    responses = []
    for observed in dec:
        large = observed.influence.numel() > _LARGEST_TABLE
        responses.append(
            {
                "name": _title(dec, observed),
                "tokens": [visible(t) for t in observed.tokens],
                "delta": [_short(v) for v in observed.delta_logp.tolist()],
                "columns": [_short(v) for v in observed.influence.sum(0).tolist()],
                "influence": None
                if large
                else [[_short(v) for v in row] for row in observed.influence.tolist()],
            }
        )
    return {
        "responses": responses,
        "sequences": [
            {
                "name": name.replace("y-", "y−"),
                "start": at.start,
                "tokens": [visible(t.text) for t in dec.update_tokens[at]],
            }
            for name, at in dec[0].sequences.items()
        ],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}") if math.isfinite(value) else 0.0


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
