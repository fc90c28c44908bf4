"""One decomposed step in sentences, and as one self-contained HTML page.

`explain_step` writes the sentences that the console prints; `write_step_page` puts them, the
tables, the pictures and a token × token table to point at into a single file: no network, no other
files, readable from file:// on a phone, light or dark. Token texts and names are untrusted: the
template escapes everything, and the page's script writes them with textContent only.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lddyn.files import JsonObject, json_safe, replace_file
from lddyn.report.canvas import save_picture
from lddyn.report.data import CheckData, Checks, ResponseData, StepData, Steps
from lddyn.report.figures import plot_step
from lddyn.report.page import render, versions, word
from lddyn.text import printable, signed, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "explain_distance",
    "explain_settings",
    "explain_step",
    "measured_totals",
    "strongest",
    "token_tables",
    "write_step_page",
]

_LARGEST_TABLE = 40_000  # cells of a token × token table in the page; the pictures show larger ones
_NAMED = 4  # token texts named in a sentence
_NOTABLE = 1e-3  # nats of a margin at the start that are more than rounding
_HANDED_ON = (
    " (a trainer of TRL 1 that begins with this adapter takes a copy of it as the reference, which "
    "is reference='self' before its first step)"
)
_FAR = 300.0  # nats between policy and reference on one response

# ---------------------------------------------------------------------------------------------
# Sentences


def _size(value: float) -> str:
    """A magnitude without its sign."""
    return signed(abs(value)).lstrip("+")


def _moved(value: float) -> str:
    """A change in words: "rose by 0.42 nats"."""
    if abs(value) < 5e-7:
        return "did not move"
    return f"{'rose' if value > 0 else 'fell'} by {_size(value)} nats"


def _source(name: str) -> str:
    """A source of change, as it is called in a sentence."""
    if name in ("history", "weight decay"):
        return f"the optimizer's {name}" if name == "history" else name
    return ("y−" if name == "y-" else name) + " tokens"


def _role(step: StepData, response: ResponseData) -> str:
    """Name of the update sequence with the same tokens as this response, or ""."""
    for name, (start, stop) in step["sequences"].items():
        if [t["token_id"] for t in step["update_tokens"][start:stop]] == response["token_ids"]:
            return name
    return ""


def _title(step: StepData, response: ResponseData) -> str:
    """Name of a response, with its role in the update."""
    role = _role(step, response).replace("y-", "y−")
    name = printable(response["name"])
    return f"{role} ({name})" if role and role != response["name"] else name


def _column_sums(response: ResponseData) -> list[float]:
    """What each update token did to the whole response, nats."""
    return [sum(column) for column in zip(*response["influence"], strict=True)]


def strongest(step: StepData, response: ResponseData, count: int) -> list[JsonObject]:
    """Update tokens with the largest effect on a response: their `TokenData` with "nats"."""
    sums = _column_sums(response)
    order = sorted(range(len(sums)), key=lambda i: -abs(sums[i]))[:count]
    return [{**step["update_tokens"][i], "nats": sums[i]} for i in order]


def _through(step: StepData, response: ResponseData) -> str:
    """Which token texts carry the largest part: "61 % of the lowering by y− came through …"."""
    sums = _column_sums(response)
    by = {name: sum(sums[start:stop]) for name, (start, stop) in step["sequences"].items()}
    total = sum(response["delta_logp"])
    agreeing = {k: v for k, v in by.items() if v * total > 0}
    if not agreeing:
        return ""
    name = max(agreeing, key=lambda k: abs(agreeing[k]))
    sign = math.copysign(1.0, total)
    effects: dict[str, float] = {}
    start, stop = step["sequences"][name]
    for token, value in zip(step["update_tokens"][start:stop], sums[start:stop], strict=True):
        effects[token["text"]] = effects.get(token["text"], 0.0) + sign * value
    gross = sum(v for v in effects.values() if v > 0)
    ordered = sorted((k for k in effects if effects[k] > 0), key=lambda k: -effects[k])
    chosen: list[str] = []
    covered = 0.0
    for text in ordered[:_NAMED]:
        if chosen and covered >= 0.6 * gross:
            break
        chosen.append(text)
        covered += effects[text]
    quoted = ", ".join(f"‘{visible(t, 24)}’" for t in chosen)
    what = "raising" if total > 0 else "lowering"
    source = "y−" if name == "y-" else name
    return f"{100 * covered / gross:.0f} % of the {what} by {source} came through {quoted}"


def explain_step(step: StepData, check: CheckData | None = None) -> list[str]:
    """A decomposed step in plain words, one sentence an item.

    Args:
        step: The step, `Decomposition.to_dict()`.
        check: Its check against real steps, `Verification.to_dict()`, if there is one.

    Returns:
        What the step was; what happened to each response, what caused it and through which tokens;
        what that means for y+ and y−; how far the prediction can be trusted.
    """
    settings = step["settings"]
    beta = f", β = {settings['beta']:g}" if "beta" in settings else ""
    sentences = [
        f"One {settings.get('objective', 'custom')} step with {settings.get('optimizer', '?')}, "
        f"learning rate {step['lr']:g}{beta}; the loss before it is {step['loss']:.4g}."
    ]
    if step["lr"] == 0:
        sentences.append(
            "A learning rate of 0 moves nothing, as in the first step of a warm-up: every change "
            "is 0."
        )
    elif not any(token["weight"] for token in step["update_tokens"]):
        sentences.append(
            "Every token of the update has weight 0, as in a group of equal rewards or a pair past "
            "its margin: the loss moves nothing."
        )
    sentences += explain_settings(settings)
    roles: dict[str, ResponseData] = {}
    for response in step["observed"]:
        roles.setdefault(_role(step, response), response)
        sentences.append(_explain_response(step, response))
    if "y+" in roles and "y-" in roles:
        sentences += _explain_pair(roles["y+"], roles["y-"])
    return [*sentences, *_explain_rounding(step, check), _explain_error(step, check)]


def explain_settings(settings: Mapping[str, Any]) -> list[str]:
    """What the trainer's settings did to the step: reference, clipping, dropout, what is left out.

    Args:
        settings: `Decomposition.settings`.
    """
    sentences = []
    if "reference" in settings:
        text = f"The reference is {settings['reference']}"
        if "margin_at_start" in settings:
            margin = settings["margin_at_start"]
            text += f"; the margin against it before the step is {signed(margin, 4)} nats"
            if abs(margin) > _NOTABLE:
                text += ", where a run that begins at its reference has 0"
                if "adapters off" in settings["reference"]:
                    text += _HANDED_ON
        sentences.append(text + ".")
        sentences += explain_distance(settings.get("reference_distance", 0.0))
    clip = settings.get("clip_factor", 1.0)
    if clip < 1:
        sentences.append(f"The gradient was clipped to max_grad_norm: multiplied by {clip:.4g}.")
    if settings.get("dropout_off"):
        sentences.append("Dropout is off: the step is that of the model in evaluation mode.")
    return [*sentences, *settings.get("remarks", [])]


def explain_distance(distance: float) -> list[str]:
    """A sentence where policy and reference are so far apart that it may be a mistake."""
    if distance < _FAR:
        return []
    return [
        f"The reference is up to {distance:.3g} nats away from the model on one response: were its "
        "log-probs computed on the same tokens?"
    ]


def _explain_rounding(step: StepData, check: CheckData | None) -> list[str]:
    """What 16-bit weights leave of the step, and which changes are below their rounding."""
    settings = step["settings"]
    if "rounding" not in settings:
        return []
    dtype = str(settings.get("dtype", "")).removeprefix("torch.")
    share, rounding = settings["weights_moved"], settings["rounding"]
    text = f"In {dtype} the step changes {_percentage(share)} of the weights that it should move."
    small = [o["name"] for o in step["observed"] if abs(sum(o["delta_logp"])) < rounding[o["name"]]]
    most = max(rounding.values())
    text += f" Log π of a response is rounded by about ±{_size(most)} nats"
    if small:
        text += f"; the changes of {', '.join(small[:4])} are smaller than that"
    sentences = [text + "."]
    own = None if check is None else check["own_step"]
    if check is not None and own:
        sentences.append(
            f"A real step in {dtype} changed {_percentage(own['moved'])} of all weights, and log π "
            f"of all responses by {signed(own['measured'], 6)} nats (before rounding: "
            f"{signed(sum(check['measured'][0]), 6)})."
        )
    return sentences


def _percentage(share: float | None) -> str:
    """A part of all in percent, with two digits where it is small."""
    return "none" if not share else f"{100 * share:.2g} %"


def _explain_response(step: StepData, response: ResponseData) -> str:
    """What happened to one response, and through which tokens."""
    change, before = sum(response["delta_logp"]), sum(response["logp"])
    causes = ", ".join(
        f"{signed(sum(v))} from {_source(k)}" for k, v in response["by_sequence"].items()
    )
    through = _through(step, response)
    return (
        f"{_title(step, response)} {_moved(change)} (log π {signed(before, 4)} → "
        f"{signed(before + change, 4)}): {causes}" + (f"; {through}." if through else ".")
    )


def _explain_pair(chosen: ResponseData, rejected: ResponseData) -> list[str]:
    """What the step did to the margin of a preference pair."""
    up, down = sum(chosen["delta_logp"]), sum(rejected["delta_logp"])
    sentences = []
    if up < 0:
        own, other = (sum(chosen["by_sequence"][k]) for k in ("y+", "y-"))
        sentences.append(
            f"y+ fell although the step raises it by itself: the tokens of y+ changed it by "
            f"{signed(own)} nats, and lowering y− changed it by {signed(other)} nats, through the "
            "weights that both responses use."
        )
    margin = up - down
    verb = "widened" if margin > 0 else "narrowed"
    why = ", because y− fell further than y+" if up < 0 and margin > 0 else ""
    sentences.append(f"The margin log π(y+) − log π(y−) {verb} by {_size(margin)} nats{why}.")
    return sentences


def _explain_error(step: StepData, check: CheckData | None) -> str:
    """How far to trust the numbers."""
    rule = {
        "start": "the kernel at the start of the step",
        "midpoint": "the kernel at the midpoint of the step",
        "simpson": "Simpson's rule along the step",
    }[step["rule"]]
    if check is None:
        error = max(abs(sum(o["error_estimate"])) for o in step["observed"])
        return (
            f"Computed by {rule}; not checked against a real step. The predictions at the start "
            f"and at the midpoint of the step differ by at most {_size(error)} nats per response."
        )
    measured, predicted = sum(check["measured"][0]), sum(check["predicted"][0])
    text = (
        f"A real step measured {signed(measured, 6)} nats over all responses where "
        f"{signed(predicted, 6)} was predicted (relative error "
        f"{check['relative_error']:.1e}; {rule})"
    )
    if check["slope"] is not None:
        text += (
            f"; as the learning rate shrinks, the error falls with slope {check['slope']:.2f} "
            f"(expected {check['expected']})"
        )
    return text + "."


def measured_totals(step: StepData, check: CheckData) -> dict[str, float]:
    """Response -> its measured Δ log π at the first learning rate, nats."""
    totals, start = {}, 0
    for response in step["observed"]:
        stop = start + len(response["token_ids"])
        totals[response["name"]] = sum(check["measured"][0][start:stop])
        start = stop
    return totals


# ---------------------------------------------------------------------------------------------
# The page


def write_step_page(
    steps: Steps,
    path: str | Path,
    *,
    title: str = "What one finetuning step did",
    checks: Checks | None = None,
    opening: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    figures: Mapping[str, Sequence[Figure]] | None = None,
) -> Path:
    """Writes one self-contained HTML page about one decomposed step, or several.

    Args:
        steps: Name -> step; each gets a section under its name, "" has no heading.
        path: The file to write; its folder is created.
        title: Heading of the page.
        checks: Name -> check against real steps, for the steps that have one.
        opening: Sentences before everything else.
        facts: Rows of the table at the end (model, data, seconds, …).
        figures: Name -> pictures that `plot_step` returned. Default: they are drawn.

    Returns:
        The path written.

    Cost: the drawing, about a second per picture, and about 0.2 MB per picture.
    """
    sections = [
        _section(number, name, step, (checks or {}).get(name), (figures or {}).get(name))
        for number, (name, step) in enumerate(steps.items())
    ]
    text = render(
        "step.html",
        title=title,
        opening=list(opening),
        sections=sections,
        facts={**(facts or {}), "made with": versions()},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path


def _section(
    number: int,
    name: str,
    step: StepData,
    check: CheckData | None,
    figures: Sequence[Figure] | None,
) -> JsonObject:
    """All that the template needs for one step."""
    sources = list(dict.fromkeys(k for o in step["observed"] for k in o["by_sequence"]))
    measured = {} if check is None else measured_totals(step, check)
    rows = [_response_row(step, response, sources, measured) for response in step["observed"]]
    pictures = [
        {"name": str(f.get_label()), "data": _png(f)}
        for f in (plot_step(step) if figures is None else figures)
    ]
    return {
        "number": number,
        "name": {"sft": "The SFT step", "dpo": "The DPO step"}.get(name, name),
        "sentences": explain_step(step, check),
        "sources": [k.replace("y-", "y−") for k in sources],
        "rows": rows,
        "measured": bool(measured),
        "names": [row["name"] for row in rows],
        "tokens": token_tables(step),
        "pictures": pictures,
        "check": _check_rows(check),
        "settings": _settings(step),
    }


def _response_row(
    step: StepData,
    response: ResponseData,
    sources: Sequence[str],
    measured: Mapping[str, float],
) -> JsonObject:
    """One line of the table of responses, and its strongest update tokens."""
    parts = {k: sum(v) for k, v in response["by_sequence"].items()}
    change = sum(response["delta_logp"])
    top = strongest(step, response, 6)
    largest = max((abs(t["nats"]) for t in top), default=1.0) or 1.0
    return {
        "name": _title(step, response),
        "tokens": len(response["token_ids"]),
        "before": signed(sum(response["logp"]), 5),
        "predicted": signed(change, 5),
        "sign": word(change),
        "measured": signed(measured[response["name"]], 5) if measured else "",
        "error": signed(sum(response["error_estimate"]), 2),
        "parts": [signed(parts.get(k, 0.0)) for k in sources],
        "strongest": [
            {
                "text": visible(t["text"], 24),
                "place": f"{t['sequence'].replace('y-', 'y−')}[{t['index']}]",
                "nats": signed(t["nats"]),
                "sign": word(t["nats"]),
                "share": 100 * abs(t["nats"]) / largest,
            }
            for t in top
        ],
    }


def _settings(step: StepData) -> dict[str, str]:
    shown = {
        **step["settings"],
        "learning rate": f"{step['lr']:g}",
        "rule": step["rule"],
        "loss": f"{step['loss']:.6g}",
    }
    worst = max(o["agreement"] for o in step["observed"])
    shown["factors against push"] = f"largest difference {worst:.1e} of the largest row"
    return {str(k).replace("_", " "): str(json_safe(v)) for k, v in shown.items() if v is not None}


def _check_rows(check: CheckData | None) -> JsonObject | None:
    if check is None:
        return None
    rows = zip(check["lrs"], check["measured"], check["predicted"], check["errors"], strict=True)
    return {
        "rows": [
            {
                "lr": f"{lr:.3g}",
                "measured": signed(sum(m), 7),
                "predicted": signed(sum(p), 7),
                "error": f"{e:.2e}",
            }
            for lr, m, p, e in rows
        ],
        "slope": "unknown" if check["slope"] is None else f"{check['slope']:.3f}",
        "expected": check["expected"],
        "dtype": check["dtype"].removeprefix("torch."),
    }


def token_tables(step: StepData) -> JsonObject:
    """Texts and influence tables for the page's script, with three significant digits."""
    responses = []
    for response in step["observed"]:
        table = response["influence"]
        large = sum(map(len, table)) > _LARGEST_TABLE
        responses.append(
            {
                "name": _title(step, response),
                "tokens": [visible(t) for t in response["tokens"]],
                "delta": [_short(v) for v in response["delta_logp"]],
                "columns": [_short(v) for v in _column_sums(response)],
                "influence": None if large else [[_short(v) for v in row] for row in table],
            }
        )
    return {
        "responses": responses,
        "sequences": [
            {
                "name": name.replace("y-", "y−"),
                "start": start,
                "tokens": [visible(t["text"]) for t in step["update_tokens"][start:stop]],
            }
            for name, (start, stop) in step["sequences"].items()
        ],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}") if math.isfinite(value) else 0.0


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    save_picture(figure, buffer, "png", 110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
