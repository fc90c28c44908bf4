"""A decomposition told in words, and as one self-contained HTML page.

`tell` writes the plain sentences that the command line prints; `write_html` puts them, the tables,
the pictures and a token × token table to point at into a single file: no network, no other files,
readable from file:// on a phone, light or dark. Token texts and names are untrusted: the template
escapes everything, and the page's script writes them with textContent only.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.figures import plot_decomposition, printable, signed, visible
from lddyn.shards import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lddyn.decompose import Decomposition, Observed, Verification

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

    from lddyn.decompose import Verification

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


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become None, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


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
    from lddyn.decompose import Decomposition

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
    facts = {**(extra or {}), "made with": _versions()}
    text = template(_PAGE).render(
        title=title, story=list(story or []), sections=sections, facts=facts
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def _versions() -> str:
    names = ("lddyn", "torch", "transformers")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


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
                "sign": _sign(float(observed.delta_logp.sum())),
                "measured": signed(measured[observed.name], 5) if measured else "",
                "error": signed(float(observed.error_estimate.sum()), 2),
                "parts": [signed(parts.get(k, 0.0)) for k in sources],
                "strongest": [
                    {
                        "text": visible(t.text, 24),
                        "place": f"{t.sequence.replace('y-', 'y−')}[{t.index}]",
                        "nats": signed(v),
                        "sign": _sign(v),
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
        "tokens": _token_data(dec),
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


def _sign(value: float) -> str:
    return "up" if value > 0 else "down" if value < 0 else "zero"


def _token_data(dec: Decomposition) -> dict[str, Any]:
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


def template(text: str) -> Any:
    """A page's template: what it is given is escaped, and a name that is not given is an error."""
    from jinja2 import Environment, StrictUndefined

    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(text)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
  script-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink:#1d1d1f; --soft:#5f6368; --paper:#fff; --card:#f6f7f9;
  --line:#dfe1e5; --up:#2166ac; --down:#b2182b; --up-rgb:33,102,172; --down-rgb:178,24,43 }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e8e8ea; --soft:#a3a7ad; --paper:#16181c; --card:#1f2227; --line:#343941;
    --up:#78b1e6; --down:#f08a94; --up-rgb:67,147,225; --down-rgb:225,77,91 }
  img { filter: brightness(.92) } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { margin-top: 2.4rem; font-size: 1.35rem }
h3 { margin: 1.8rem 0 .4rem; font-size: 1.05rem }
.lead { font-size: 1.08rem; background: var(--card); border-radius: .6rem; padding: .9rem 1.2rem }
.lead p { margin: .45rem 0 } .soft { color: var(--soft); font-size: .88rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 600 }
.up { color: var(--up) } .down { color: var(--down) }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)) }
.card { background: var(--card); border-radius: .6rem; padding: .6rem .9rem; min-width: 0 }
.card h4 { margin: 0 0 .3rem; font-size: .92rem; overflow-wrap: anywhere }
.bar { display: grid; grid-template-columns: 7.5rem 1fr 4.2rem; gap: .5rem; font-size: .84rem;
  align-items: center } .bar code { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.bar i { display: block; height: .6rem; border-radius: .2rem }
.bar i.up { background: var(--up) } .bar i.down { background: var(--down) }
.bar span { text-align: right; font-variant-numeric: tabular-nums }
.text { background: var(--card); border-radius: .6rem; padding: .6rem .8rem; margin: .4rem 0;
  line-height: 2.05; font: .85rem/2.05 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.text span { padding: .18rem .1rem; border-radius: .2rem; cursor: pointer; overflow-wrap: anywhere }
.text span.on { outline: 2px solid var(--ink) }
.says { min-height: 1.6rem; font-size: .9rem }
figure { margin: 1rem 0 } figure img { max-width: 100%; height: auto; border-radius: .4rem }
select { font: inherit; padding: .2rem .5rem; max-width: 100% }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
.grid { max-height: 32rem; overflow: auto } .grid table { font-size: .7rem }
.grid th, .grid td { padding: 0 .2rem; border: 0; min-width: 1rem; height: 1.1rem;
  font-weight: 400; text-align: right } .grid thead th { writing-mode: vertical-rl;
  text-align: right; vertical-align: bottom; padding: .2rem 0 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if story %}
<div class="lead">{% for sentence in story %}<p>{{ sentence }}</p>{% endfor %}</div>
{% endif %}
{% for section in sections %}
<section>
{% if section.name %}<h2>{{ section.name }}</h2>{% endif %}
<div class="lead">{% for sentence in section.story %}<p>{{ sentence }}</p>{% endfor %}</div>

<h3>Every response, in nats</h3>
<div class="scroll"><table>
<thead><tr><th>response</th><th>tokens</th><th>log π before</th><th>predicted Δ</th>
{% if section.measured %}<th>measured Δ</th>{% endif %}<th>start − midpoint</th>
{% for source in section.sources %}<th>from {{ source }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}
<tr><td>{{ row.name }}</td><td>{{ row.tokens }}</td><td>{{ row.before }}</td>
<td class="{{ row.sign }}"><b>{{ row.predicted }}</b></td>
{% if section.measured %}<td>{{ row.measured }}</td>{% endif %}<td>{{ row.error }}</td>
{% for part in row.parts %}<td>{{ part }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

<h3>Which token did what</h3>
<p class="soft">Blue was raised, red was lowered. Point at (or tap) a token of the response to see
which tokens of the update moved it, or a token of the update to see what it moved.</p>
<div class="who" data-section="{{ section.number }}">
<p><select aria-label="response">
{% for row in section.rows %}<option value="{{ loop.index0 }}">{{ row.name }}</option>{% endfor %}
</select></p>
<div class="observed"></div>
<p class="says soft"></p>
<div class="updated"></div>
<details><summary>token × token table, nats</summary><div class="grid"></div></details>
<noscript><p class="soft">This part needs scripts; the pictures below show the same.</p></noscript>
</div>
<script type="application/json"
  id="tokens-{{ section.number }}">{{ section.tokens|tojson }}</script>

<h3>Strongest tokens of the update</h3>
<div class="cards">
{% for row in section.rows %}
<div class="card"><h4>on {{ row.name }}</h4>
{% for t in row.strongest %}
<div class="bar" title="{{ t.place }}"><code>{{ t.text }} <small>{{ t.place }}</small></code>
<div><i class="{{ t.sign }}" style="width:{{ '%.1f' % t.share }}%"></i></div>
<span>{{ t.nats }}</span></div>
{% endfor %}</div>
{% endfor %}
</div>

<h3>Pictures</h3>
{% for picture in section.pictures %}
<figure><img alt="{{ picture.name }}" src="data:image/png;base64,{{ picture.data }}"></figure>
{% endfor %}

{% if section.verification %}
<h3>Checked against real steps</h3>
<p>A real optimizer step was taken on a copy of the model ({{ section.verification.dtype }}) at each
learning rate. ‖error‖ is the norm of measured − predicted over all observed tokens; its log-log
slope is <b>{{ section.verification.slope }}</b>, expected {{ section.verification.expected }}.</p>
<div class="scroll"><table><thead><tr><th>learning rate</th><th>measured Δ, nats</th>
<th>predicted Δ, nats</th><th>‖error‖, nats</th></tr></thead><tbody>
{% for row in section.verification.rows %}
<tr><td>{{ row.lr }}</td><td>{{ row.measured }}</td><td>{{ row.predicted }}</td>
<td>{{ row.error }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}

<details><summary>settings</summary><div class="scroll"><table>
{% for key, value in section.settings.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></div></details>
</section>
{% endfor %}

<h2>Method</h2>
<p>influence[m, l] = −η w<sub>l</sub> ⟨∇ log π(y<sub>m</sub> | χ<sub>o</sub>), P ∇ log
π(y<sub>l</sub> | χ<sub>u</sub>)⟩ is what update token l did to observed token m: the decomposition
Δ log π = −η A K G of Ren &amp; Sutherland, <i>Learning Dynamics of LLM Finetuning</i> (ICLR 2025),
with the empirical NTK computed exactly, not bounded. Rows sum to the change of each token; the sum
was computed a second time, by one push of the whole step, and both agree.</p>
<div class="scroll"><table>
{% for key, value in facts.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></div>

<script>
"use strict";
const nats = v => (v > 0 ? "+" : v < 0 ? "−" : "") + String(Math.abs(v)).replace("e-", "e−");
const make = (tag, text, parent) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.append(e);
  return e;
};
const tint = (v, largest) => {
  const a = Math.asinh(20 * Math.abs(v) / largest) / Math.asinh(20) * .75;
  return a < .01 ? "transparent" : `rgba(var(--${v > 0 ? "up" : "down"}-rgb),${a.toFixed(3)})`;
};
const size = list => list.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-30);
for (const who of document.querySelectorAll(".who")) {
  const data = JSON.parse(document.getElementById("tokens-" + who.dataset.section).textContent);
  const find = c => who.querySelector(c);
  const select = find("select"), says = find(".says"), grid = find(".grid");
  const show = () => {
    const r = data.responses[Number(select.value)], all = data.sequences.flatMap(s => s.tokens);
    find(".observed").replaceChildren(); find(".updated").replaceChildren();
    const label = (box, text) => make("div", text, box).className = "soft";
    const spans = (box, tokens) => {
      const text = make("div", undefined, box); text.className = "text";
      return tokens.map(t => {
        const s = make("span", t, text);
        text.append("\\u200b");
        return s;
      });
    };
    label(find(".observed"), r.name);
    const top = spans(find(".observed"), r.tokens);
    const low = data.sequences.flatMap(s => {
      label(find(".updated"), "update: " + s.name); return spans(find(".updated"), s.tokens);
    });
    let held = null;
    const entry = r.influence ? size(r.influence.map(size)) : 1;
    const paint = (list, values, what, largest = size(values)) => {
      list.forEach((s, i) => {
        s.style.background = tint(values[i], largest);
        s.title = what(i) + nats(values[i]) + " nats";
      });
    };
    const rest = () => {
      [...top, ...low].forEach(s => s.classList.remove("on"));
      paint(top, r.delta, i => `Δ log π of ${r.tokens[i]}: `);
      paint(low, r.columns, i => `${all[i]} on the whole response: `);
      says.textContent = "";
    };
    const ask = (span, list, values, sentence) => {
      rest();
      span.classList.add("on");
      paint(list, values, () => "", entry);
      says.textContent = sentence;
    };
    const listen = (span, act) => {
      span.addEventListener("mouseenter", () => held || act());
      span.addEventListener("mouseleave", () => held || rest());
      span.addEventListener("click", () => {
        held = held === span ? null : span; rest(); if (held) act();
      });
    };
    rest();
    grid.replaceChildren();
    if (!r.influence) { make("p", "too large for a table; see the pictures", grid); return; }
    top.forEach((s, m) => listen(s, () => ask(s, low, r.influence[m],
      `‘${r.tokens[m]}’ moved by ${nats(r.delta[m])} nats; below, what each token did to it`)));
    low.forEach((s, l) => listen(s, () => ask(s, top, r.influence.map(row => row[l]),
      `‘${all[l]}’ moved the response by ${nats(r.columns[l])} nats; above, each of its tokens`)));
    const fill = () => {
      if (grid.firstChild) return;
      const table = make("table", undefined, grid), head = make("tr", undefined,
        make("thead", undefined, table)), body = make("tbody", undefined, table);
      make("th", "", head); all.forEach(t => make("th", t, head));
      const largest = size(r.influence.map(size));
      r.influence.forEach((row, m) => {
        const line = make("tr", undefined, body); make("th", r.tokens[m], line);
        row.forEach((v, l) => {
          const cell = make("td", undefined, line); cell.style.background = tint(v, largest);
          cell.title = `${r.tokens[m]} [${m}] by ${all[l]}: ${nats(v)} nats`;
        });
      });
    };
    find("details").ontoggle = fill;
    if (find("details").open) fill();
  };
  select.addEventListener("change", show);
  show();
}
</script>
</body>
</html>
"""
