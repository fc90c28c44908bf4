"""Renders benchmarks/results/*.json: tables into the README and docs/, plots beside the results.

python benchmarks/report.py                 # rewrites each page between its markers
python benchmarks/report.py --check         # fails if a page is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pages import diagnosis, exactness, other_libraries, plots, speed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {
    "sketches": exactness.sketches,
    "planner": exactness.planner,
    "one step": diagnosis.one_step,
    "objectives": diagnosis.objectives,
    "diagnosed": diagnosis.diagnosed,
    "dropped pairs": diagnosis.dropped_pairs,
    "dropped pairs, TRL": diagnosis.dropped_trl,
    "attribution": diagnosis.attribution,
    "halves": diagnosis.halves,
    "real-llm": diagnosis.real_llm,
    "kernel methods": diagnosis.kernel_methods,
    "dropped pairs, tuned on": diagnosis.dropped_pairs,
    "reported": diagnosis.reported,
    "streaming": speed.streaming,
    "store": speed.store,
    "memory": speed.memory,
    "dialogue": exactness.dialogue,
    "influence": speed.influence,
    "scaling": speed.scaling,
    "peers": other_libraries.peers,
    "peers-trained": other_libraries.peers,
    "exactness": exactness.exactness,
    "orders": exactness.orders,
    "ops": speed.ops,
    "lowrank": exactness.lowrank,
    "norms-large": speed.norms_large,
    "versions": exactness.versions,
}
WHOLE = ("real-llm",)  # files whose sections are rows of one table
IN_README = {"dropped pairs": diagnosis.dropped_pairs_in_short}


def renderer(name: str):
    """The function that renders a section, or None."""
    return speed.influence if name.startswith("influence-") else SECTIONS.get(name)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    original = dict(pages)
    for path in sorted(RESULTS.glob("*.json")):
        sections = json.loads(path.read_text())
        if path.stem in WHOLE:
            sections = {path.stem: {"result": sections}}
        for name, section in sections.items():
            start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            for page, text in pages.items():
                short = IN_README.get(name) if page.name == "README.md" else None
                render = short or renderer(name)
                if render and start in text:
                    before, rest = text.split(start, 1)
                    after = rest.split(end, 1)[1]
                    pages[page] = f"{before}{start}\n{render(section)}\n{end}{after}"
            if name == "scaling" and not args.check:
                plots.plot_scaling(section, RESULTS / "scaling.png")
            if name == "sketches" and not args.check:
                plots.plot_sketches(section, RESULTS / "sketches.png")
            if name == "kernel methods" and not args.check:
                plots.plot_kernel_methods(section, RESULTS / "kernel-methods.png")
    stale = [page for page in PAGES if pages[page] != original[page]]
    for page in stale:
        if args.check:
            print(
                f"{page.relative_to(ROOT)} is not what benchmarks/results says: "
                "run benchmarks/report.py"
            )
        else:
            page.write_text(pages[page], encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
