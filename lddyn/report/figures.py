"""Pictures of a decomposition: token × token heat maps, one line per response, where it passed.

Blue is raised, red is lowered, everywhere; sequences of the update have colours of their own, the
same in every picture. Figures are drawn off screen, without pyplot: no window, no global state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lddyn.text import printable, signed, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lddyn.steps.decomposition import Decomposition, Observed

__all__ = [
    "FAINT",
    "INK",
    "LOWERED",
    "RAISED",
    "blank_figure",
    "plot_blocks",
    "plot_decomposition",
    "plot_influence",
    "plot_overview",
    "sequence_colours",
    "tidy",
]

RAISED, LOWERED = "#2166ac", "#b2182b"  # the ends of ColorBrewer's RdBu, safe for colour-blind eyes

_DIVERGING = "RdBu"

INK, FAINT = "#222222", "#888888"

_SEQUENCES = ("#1b9e77", "#c05ca0", "#e6ab02", "#4f8fcb", "#a6761d", "#666633")

_OTHERS = {"history": "#7f7f7f", "weight decay": "#b8a070"}

_DPI = 150

_LONGEST = 14  # characters of a token's text on an axis


def sequence_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per source of change: update sequences, history, weight decay."""
    colours: dict[str, str] = {}
    for name in names:
        number = len([n for n in colours if n not in _OTHERS])
        colours[name] = _OTHERS.get(name) or _SEQUENCES[number % len(_SEQUENCES)]
    return colours


def _pretty(name: str) -> str:
    """y- with a real minus."""
    return "y−" if name == "y-" else printable(name)


@cache
def _glyphs() -> frozenset[int]:
    """Characters that the default font can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _drawable(text: str) -> str:
    """The text, with □ for characters that the font does not have."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in text)


def _label(text: str) -> str:
    """A token's text as an axis shows it."""
    return _drawable(visible(text, _LONGEST))


def blank_figure(width: float, height: float, name: str) -> Figure:
    """An off-screen figure; its label is its file name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_label(name)
    return figure


def _plain(artist: Any) -> Any:
    """Text that is shown as it is: "$" starts no formula."""
    artist.set_parse_math(False)
    return artist


def tidy(axes: Axes, *, keep: Sequence[str] = ("left", "bottom")) -> None:
    """Only the spines that carry a scale, thin ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)
        spine.set_linewidth(0.6)
    axes.tick_params(width=0.6, length=2.5, color=FAINT, labelcolor=INK, labelsize=8)


def _lettering(texts: Sequence[str], cell: float) -> tuple[int, float, float]:
    """For labels `cell` inches apart: label every n-th, font size, inches of the longest label."""
    every = max(1, int(np.ceil(0.07 / cell)))
    size = float(np.clip(cell * every * 72 * 0.8, 4.8, 9.0 if every == 1 else 6.0))
    letters = max((len(_label(t)) for t in texts[::every]), default=1)
    return every, size, 0.06 + letters * size * 0.62 / 72


def _token_ticks(
    axes: Axes, axis: Literal["x", "y"], positions: Any, texts: Sequence[str], cell: float
) -> None:
    """Token texts on an axis, `cell` inches apart, thinned out where there is no room for all."""
    every, size, _ = _lettering(texts, cell)
    at = np.asarray(positions)[::every]
    labels = [_label(t) for t in texts][::every]
    if axis == "x":
        axes.set_xticks(at, labels, rotation=90, fontsize=size)
        shown = axes.get_xticklabels()
    else:
        axes.set_yticks(at, labels, fontsize=size)
        shown = axes.get_yticklabels()
    for label in shown:
        _plain(label)
    axes.tick_params(axis=axis, length=1.5, pad=1.5)


def _columns(sequences: dict[str, slice], gap: float) -> dict[str, np.ndarray]:
    """Left edge of every update token's column, the sequences set apart."""
    edges, offset = {}, 0.0
    for name, at in sequences.items():
        count = at.stop - at.start
        edges[name] = offset + np.arange(count, dtype=float)
        offset += count + gap
    return edges


def plot_influence(dec: Decomposition, observed: Observed, index: int = 0) -> Figure:
    """The token × token table of one response: what update token l did to observed token m.

    Args:
        dec: The decomposition.
        observed: One of its responses.
        index: Its number, for the file name.

    Returns:
        A figure with the heat map, the column sums above it and the row sums beside it.
    """
    from matplotlib.colors import AsinhNorm

    table = observed.influence.double().cpu().numpy()
    m, n = table.shape
    names = list(observed.sequences)
    parts = {k: v.double().cpu().numpy() for k, v in observed.by_sequence().items()}
    colours = sequence_colours(list(parts))
    gap = max(0.6, 0.02 * n) if len(names) > 1 else 0.0
    span = n + gap * (len(names) - 1)
    cell_x = float(np.clip(12.5 / span, 0.05, 0.34))
    cell_y = float(np.clip(9.0 / m, 0.05, 0.34))
    cell_x, cell_y = min(cell_x, 2.2 * cell_y), min(cell_y, 2.2 * cell_x)
    wide, high = max(2.4, span * cell_x), max(1.2, m * cell_y)
    cell_x, cell_y = wide / span, high / m

    # Everything in inches, from the lower left corner.
    texts = [t.text for t in dec.update_tokens]
    below = 0.08 + _lettering(texts, cell_x)[2]
    left = 0.42 + _lettering(observed.tokens, cell_y)[2]
    above, beside, title = 0.75, 1.25, 0.95
    legend = 0.62
    width = max(left + wide + 0.12 + beside + 0.25, 6.4)
    height = legend + below + high + 0.1 + above + title
    figure = blank_figure(width, height, f"influence-{index}-{_slug(observed.name)}")

    def place(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, h / height))

    base = legend + below
    heat = place(left, base, wide, high)
    top = place(left, base + high + 0.1, wide, above)
    side = place(left + wide + 0.12, base, beside, high)

    sizes = np.abs(table)
    largest = float(sizes.max()) or 1.0
    # A few entries are far larger than the rest: the colours grow slower beyond 5 % of the largest.
    norm = AsinhNorm(0.05 * largest, -largest, largest)
    edges = _columns(observed.sequences, gap)
    centres = np.concatenate([edges[k] + 0.5 for k in names])
    mesh = None
    for name in names:
        at = observed.sequences[name]
        x = np.append(edges[name], edges[name][-1] + 1)
        mesh = heat.pcolormesh(
            x, np.arange(m + 1), table[:, at], cmap=_DIVERGING, norm=norm, rasterized=True
        )
        heat.add_patch(
            _rectangle(x[0], 0, x[-1] - x[0], m, fill=False, edgecolor=FAINT, linewidth=0.5)
        )
    heat.set_xlim(0, span)
    heat.set_ylim(m, 0)
    for spine in heat.spines.values():
        spine.set_visible(False)
    _token_ticks(heat, "x", centres, texts, cell_x)
    _token_ticks(heat, "y", np.arange(m) + 0.5, observed.tokens, cell_y)
    _plain(
        heat.set_ylabel(_drawable(f"tokens of {printable(observed.name)}"), fontsize=9, color=INK)
    )

    sums = table.sum(0)
    top.bar(centres, sums, width=0.8, color=[RAISED if s > 0 else LOWERED for s in sums])
    top.axhline(0, color=INK, linewidth=0.6)
    top.set_xlim(0, span)
    top.set_xticks([])
    top.margins(y=0.12)
    tidy(top, keep=("left",))
    top.locator_params(axis="y", nbins=4)
    top.set_ylabel("column\nsum, nats", fontsize=7.5, color=INK)
    for name in names:
        total = parts[name].sum()
        x0, x1 = edges[name][0], edges[name][-1] + 1
        top.plot(
            [x0, x1],
            [1.04, 1.04],
            transform=top.get_xaxis_transform(),
            clip_on=False,
            color=colours[name],
            linewidth=2.2,
            solid_capstyle="butt",
        )
        _plain(
            top.text(
                (x0 + x1) / 2,
                1.1,
                _drawable(f"{_pretty(name)}: {signed(total)}"),
                transform=top.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8.5,
                color=INK,
            )
        )

    rows = np.arange(m) + 0.5
    _stacked(side, rows, parts, colours, thickness=0.8)
    net = sum(parts.values())
    side.plot(net, rows, "D", color=INK, markersize=float(np.clip(cell_y * 72 * 0.4, 1.4, 4)))
    side.axvline(0, color=INK, linewidth=0.6)
    side.set_ylim(m, 0)
    side.set_yticks([])
    side.margins(x=0.08)
    tidy(side, keep=("bottom",))
    side.locator_params(axis="x", nbins=3)
    side.set_xlabel("row sum, nats", fontsize=7.5, color=INK)
    side.set_title("by source, ◆ net", fontsize=7.5, color=INK, pad=3)

    bar = place(left, 0.4, min(wide, 3.6), 0.1)
    assert mesh is not None
    scale = figure.colorbar(mesh, cax=bar, orientation="horizontal")
    ticks = [-largest, -0.1 * largest, 0, 0.1 * largest, largest]
    scale.set_ticks(ticks, labels=[signed(t, 2) for t in ticks])
    scale.ax.minorticks_off()
    scale.outline.set_linewidth(0.4)
    bar.tick_params(labelsize=7, length=2, color=FAINT)
    note = "nats: change of log π of the row's token made by the column's token (arcsinh scale)"
    figure.text(left / width, 0.06 / height, note, fontsize=7, color=INK)

    change = float(observed.delta_logp.sum())
    verb = "rose" if change > 0 else "fell"
    _plain(
        figure.text(
            0.18 / width,
            1 - 0.12 / height,
            _drawable(f"{printable(observed.name)} {verb} by {signed(change).lstrip('+−')} nats"),
            va="top",
            fontsize=12.5,
            weight="bold",
            color=INK,
        )
    )
    _plain(
        figure.text(
            0.18 / width, 1 - 0.4 / height, _step_line(dec), va="top", fontsize=8, color="#555555"
        )
    )
    return figure


def _rectangle(x: float, y: float, w: float, h: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), w, h, clip_on=False, **style)


def _stacked(
    axes: Axes,
    at: np.ndarray,
    parts: dict[str, np.ndarray],
    colours: dict[str, str],
    thickness: float,
) -> None:
    """Horizontal bars of every source, positive ones to the right of 0, negative to the left."""
    right, left = np.zeros(len(at)), np.zeros(len(at))
    for name, values in parts.items():
        start = np.where(values > 0, right, left)
        axes.barh(at, values, left=start, height=thickness, color=colours[name], linewidth=0)
        right, left = right + values.clip(min=0), left + values.clip(max=0)


def _step_line(dec: Decomposition) -> str:
    """The step in one line: objective, optimizer, learning rate, loss, rule."""
    named = dec.settings
    beta = f", β {named['beta']:g}" if "beta" in named else ""
    clip = named.get("clip_factor", 1.0)
    clipped = f", clipped ×{clip:.2g}" if clip != 1.0 else ""
    return _drawable(
        f"one {named.get('objective', 'custom')} step, {named.get('optimizer', '')} lr {dec.lr:g}"
        f"{beta}{clipped}, loss {dec.loss:.3g}, rule {dec.rule}"
    )


def plot_overview(dec: Decomposition) -> Figure:
    """One line per observed response, token by token, and its total split by source.

    Args:
        dec: The decomposition.

    Returns:
        A figure: on the left Δ log π of each token, on the right what y+, y−, … add up to.
    """
    count = len(dec)
    longest = max(len(o.tokens) for o in dec)
    texts = count <= 12
    wide = float(np.clip(0.105 * longest, 4.2, 9.5))
    cell = min(wide / longest, 0.125)  # of the lettering
    under = 0.1 + max(_lettering(o.tokens, cell)[2] for o in dec) if texts else 0.12
    high = 0.95 if count <= 8 else 0.6
    left, right, gap, title, foot = 0.95, 3.0, 1.55, 0.95, 0.6
    names = list(dict.fromkeys(k for o in dec for k in o.by_sequence()))
    width = left + wide + gap + right + 0.3
    panel = high + under + 0.16
    height = title + count * panel + foot
    figure = blank_figure(width, height, "overview")

    def place(x: float, y: float, w: float, h: float, **share: Any) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, h / height), **share)

    first: Axes | None = None
    bars_at = []
    for i, observed in enumerate(dec):
        bottom = height - title - i * panel - high
        bars_at.append(bottom + high / 2)
        axes = place(left, bottom, wide, high, sharey=first)
        first = first or axes
        values = observed.delta_logp.double().cpu().numpy()
        x = np.arange(len(values)) + 0.5
        axes.fill_between(
            x, values, 0, where=values >= 0, color=RAISED, alpha=0.22, linewidth=0, interpolate=True
        )
        axes.fill_between(
            x,
            values,
            0,
            where=values <= 0,
            color=LOWERED,
            alpha=0.22,
            linewidth=0,
            interpolate=True,
        )
        axes.plot(x, values, color=INK, linewidth=0.9)
        axes.plot(x, values, ".", color=INK, markersize=2.4)
        axes.axhline(0, color=FAINT, linewidth=0.6)
        axes.set_xlim(0, longest)
        tidy(axes, keep=("left",))
        axes.locator_params(axis="y", nbins=4)
        if texts:
            _token_ticks(axes, "x", x, observed.tokens, cell)
        else:
            axes.set_xticks([])
        _plain(
            axes.set_title(
                _drawable(printable(observed.name)),
                loc="left",
                fontsize=8.5,
                weight="bold",
                color=INK,
                pad=2,
            )
        )
        axes.set_ylabel("Δ log π, nats", fontsize=7.5, color=INK)

    bars = place(left + wide + gap, foot, right, height - title - foot + 0.16)
    bars.set_ylim(foot, height - title + 0.16)
    colours = sequence_colours(names)
    at = np.array(bars_at)
    totals = {
        k: np.array([float(o.by_sequence()[k].sum()) if k in o.by_sequence() else 0.0 for o in dec])
        for k in names
    }
    _stacked(bars, at, totals, colours, thickness=min(0.5, 0.4 * panel))
    net = np.array([float(o.delta_logp.sum()) for o in dec])
    bars.plot(net, at, "D", color=INK, markersize=5, zorder=5)
    reach = max(
        float(sum(np.clip(v, 0, None) for v in totals.values()).max()),
        float(-sum(np.clip(v, None, 0) for v in totals.values()).min()),
        1e-30,
    )
    low = min(0.0, float(sum(np.clip(v, None, 0) for v in totals.values()).min()))
    top = max(0.0, float(sum(np.clip(v, 0, None) for v in totals.values()).max()))
    bars.set_xlim(low - 0.12 * reach, top + 0.12 * reach)
    for y, value in zip(at, net, strict=True):
        bars.annotate(
            f"net {signed(value)}",
            (value, y),
            xytext=(0, 22 if panel > 1.3 else 15),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
    bars.axvline(0, color=INK, linewidth=0.6)
    bars.set_yticks(at, [_drawable(printable(o.name)) for o in dec], fontsize=8)
    for label in bars.get_yticklabels():
        _plain(label)
    tidy(bars, keep=("bottom",))
    bars.tick_params(axis="y", length=0)
    bars.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    bars.set_axisbelow(True)
    bars.set_xlabel("Δ log π of the whole response, nats", fontsize=8, color=INK)
    handles = [
        _rectangle(0, 0, 1, 1, facecolor=colours[k], label=_drawable(f"from {_pretty(k)}"))
        for k in names
    ]
    legend = bars.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(names),
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    for label in legend.get_texts():
        _plain(label)
    figure.text(
        0.18 / width,
        1 - 0.12 / height,
        "What the step did to every response",
        va="top",
        fontsize=12.5,
        weight="bold",
        color=INK,
    )
    _plain(
        figure.text(
            0.18 / width, 1 - 0.4 / height, _step_line(dec), va="top", fontsize=8, color="#555555"
        )
    )
    return figure


def plot_blocks(dec: Decomposition) -> Figure:
    """Where in the network the change passed: nats per block, one panel per response.

    Args:
        dec: The decomposition.

    Returns:
        The figure; its bars add up to each response's Δ log π.
    """
    per_response = [o.by_parameter("block") for o in dec]
    names = sorted({k for parts in per_response for k in parts}, key=_depth)
    count = len(dec)
    lines = -(-count // 6)
    columns = -(-count // lines)
    wide, high = 1.75, max(1.1, 0.22 * len(names))
    left, title, foot, gap = 1.6, 0.85, 0.5, 0.85
    width = left + columns * (wide + 0.25) + 0.2
    height = title + lines * (high + gap) - gap + foot
    figure = blank_figure(width, height, "blocks")
    first: Axes | None = None
    y = np.arange(len(names))
    for i, (observed, parts) in enumerate(zip(dec, per_response, strict=True)):
        line, column = divmod(i, columns)
        axes = figure.add_axes(
            (
                (left + column * (wide + 0.25)) / width,
                (height - title - line * (high + gap) - high) / height,
                wide / width,
                high / height,
            ),
            sharex=first,
        )
        first = first or axes
        values = np.array([parts.get(k, 0.0) for k in names])
        axes.barh(y, values, height=0.72, color=[RAISED if v > 0 else LOWERED for v in values])
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.set_ylim(len(names) - 0.5, -0.5)
        tidy(axes, keep=("bottom",))
        axes.set_yticks(y, names if column == 0 else [])
        for label in axes.get_yticklabels():
            _plain(label)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=3)
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("nats", fontsize=7.5, color=INK)
        change = signed(float(observed.delta_logp.sum()))
        total = f"{_drawable(printable(observed.name))}\n{change} nats"
        _plain(axes.set_title(total, fontsize=8.5, color=INK, pad=3))
    figure.text(
        0.18 / width,
        1 - 0.12 / height,
        "Through which block the change passed",
        va="top",
        fontsize=12.5,
        weight="bold",
        color=INK,
    )
    return figure


def _depth(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, blocks by number, then head and the rest."""
    if name == "embedding":
        return 0, 0, name
    number = re.fullmatch(r"block (\d+)", name)
    return (1, int(number[1]), name) if number else (2, 0, name)


def _slug(name: str) -> str:
    """A response's name as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40] or "response"


def plot_decomposition(dec: Decomposition, directory: str | Path | None = None) -> list[Figure]:
    """All pictures of a decomposition: overview, blocks, and one heat map per response.

    Args:
        dec: The decomposition.
        directory: Also write `overview`, `blocks` and `influence-<i>-<name>` there, each as .png
            and .pdf. Created if it is not there.

    Returns:
        The figures, in this order; `figure.get_label()` is the file name without its ending.

    Example:
        >>> # figures = lddyn.decompose(...).plot("runs/mine")
    """
    figures = [plot_overview(dec), plot_blocks(dec)]
    figures += [plot_influence(dec, o, i) for i, o in enumerate(dec)]
    if directory is not None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            for ending in ("png", "pdf"):
                # No creation date: the same decomposition gives the same bytes.
                metadata = {"CreationDate": None} if ending == "pdf" else {"Software": "lddyn"}
                figure.savefig(
                    directory / f"{figure.get_label()}.{ending}", dpi=_DPI, metadata=metadata
                )
    return figures
