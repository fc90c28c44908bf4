"""Tables of the SFT experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lddyn.lab.curves import Curves
from lddyn.lab.record import Lab, Rows


def kernel_means(run: Curves) -> dict[str, dict[str, list[float]]]:
    """Type → quantity → mean over prompts at every point."""
    rows = run.raw["kernel"]
    points = sorted({row["update"] for row in rows})
    return {
        name: {
            key: [
                float(
                    np.mean(
                        [r[key] for r in rows if r["update"] == point and r["observed"] == name]
                    )
                )
                for point in points
            ]
            for key in ("norm", "lbk_norm", "sign")
        }
        for name in run.fields
        if any(r["observed"] == name for r in rows)
    }


def write_tables(
    lab: Lab,
    run: Curves,
    maps: Mapping[str, np.ndarray],
    fields: Sequence[str],
    accuracy: Rows,
) -> None:
    """Writes every table of the experiment."""
    lab.table("curves", run.rows("sft"))
    lab.table("kernel", run.raw["kernel"])
    lab.table("accuracy", accuracy)
    lab.table(
        "influence",
        [
            {"when": when, "update": u, "observed": o, "value": round(float(mean[i, j]), 4)}
            for when, mean in ((w, np.nanmean(m.astype(float), axis=0)) for w, m in maps.items())
            for i, u in enumerate(fields)
            for j, o in enumerate(fields)
        ],
    )
    lab.table(
        "first_order",
        [
            {
                "update": p["update"],
                "type": name,
                "predicted": float(f"{a:.5g}"),
                "measured": float(f"{b:.5g}"),
            }
            for p in run.raw["explained"]
            for name, a, b in zip(
                run.raw["explained types"], p["predicted"]["chosen"], p["measured"], strict=True
            )
        ],
    )


def kernel_grid(rows: Rows, key: str) -> np.ndarray:
    """One quantity of the table of kernels, (prompts, updates, types); NaN where there is none."""
    places = ("prompt", "update", "observed")
    names = [list(dict.fromkeys(row[place] for row in rows)) for place in places]
    grid = np.full([len(n) for n in names], np.nan)
    for row in rows:
        grid[tuple(n.index(row[p]) for n, p in zip(names, places, strict=True))] = row[key]
    return grid
