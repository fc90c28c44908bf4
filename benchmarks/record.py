"""Adds one section to a results file, with the machine, versions and commit that made it.

python benchmarks/record.py .benchmarks/latest.json benchmarks/results/NAME.json    # section "ops"
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Processor, cores, versions, date and commit of this run."""
    import os

    import torch
    import transformers

    import lddyn

    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = os.environ.get("LDDYN_COMMIT", "")  # for a copy without a repository
    if not commit and shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,  # wherever it was called from
        ).stdout.strip()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lddyn": lddyn.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def record(path: str | Path, section: str, result: Any) -> None:
    """Writes `section` of the JSON file at `path`; other sections stay."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    content[section] = {"made_by": provenance(), "result": result}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def ops_section(run: dict[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark measured: one case per op, sizes and way, ratios to the reference."""
    from lddyn import ops

    cases = []
    for entry in run["benchmarks"]:
        info = entry["extra_info"]
        op = entry["name"].split("[")[0].removeprefix("bench_")
        cases.append(
            {
                "op": op,
                "case": entry["group"].removeprefix(f"{op} "),
                "way": entry["params"]["way"],
                "seconds": entry["stats"]["median"],
                "match": info["match"],
                "error": info["error"],
                "bound": info["bound"],
                "device": info["device"],
                "percent_of_ceiling": info[f"percent_of_{info['bound']}_ceiling"],
            }
        )
    reference = {(c["op"], c["case"]): c["seconds"] for c in cases if c["way"] == "reference"}
    for case in cases:
        case["times_reference"] = case["seconds"] / reference[case["op"], case["case"]]
    names = dict.fromkeys(c["op"] for c in cases)
    about = {name: getattr(ops, name).__doc__.splitlines()[0].rstrip(".") for name in names}
    return {"about": about, "cases": cases}


if __name__ == "__main__":
    record(sys.argv[2], "ops", ops_section(json.loads(Path(sys.argv[1]).read_text())))
