"""Adds one section to a results file, with the machine, versions and commit that made it."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Processor, cores, versions, date and commit of this run."""
    import os

    import torch
    import transformers

    import lddyn

    processor = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
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
