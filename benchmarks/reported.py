"""A DPO run whose chosen log-probs fall, watched, diagnosed on its way, and its report.

python benchmarks/reported.py MODEL PAIRS.jsonl --folder FOLDER --out results/reported.json

SFT on the chosen responses; DPO by TRL, watched; a diagnosis of its first checkpoint; the page,
with what the rest of the run did to y+ beside the prediction. FOLDER keeps models and page.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from pairs import arguments, dpo_trainer, encoded_rows, finetune, load
from record import record

import lddyn
from lddyn.integrations.trl import watch
from lddyn.probes.measure import measure
from lddyn.probes.probe_set import LABELS
from lddyn.report import explain_diagnosis, explain_dynamics, read_dynamics
from lddyn.sets.diagnosis import Diagnosis
from lddyn.sets.pairs import PairSet
from lddyn.sets.readings import Readings
from lddyn.sets.rows import Gram
from lddyn.sets.step import SetStep
from lddyn.sets.summary import summarise


def train(start: Path, folder: Path, data: list[dict[str, str]], steps: int, each: int) -> None:
    """DPO of the model in `start`, with a checkpoint every `each` steps, watched."""
    trainer = dpo_trainer(
        start,
        folder,
        data,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=each,
        save_only_model=True,
    )
    watch(trainer, every=2, budget="300%", predict=4)  # a run of a minute has no time to spare
    trainer.train()


def many(diagnosis: Diagnosis, count: int) -> Diagnosis:
    """A diagnosis of so many pairs, these again and again: for the size of its page."""
    at = torch.arange(count) % len(diagnosis)
    both = torch.cat([at, len(diagnosis) + at])
    known = diagnosis.step.readings
    readings = Readings(
        known.log_probs[:, at],
        {name: x[at] for name, x in known.facts.items()},
        {name: [x[i] for i in at.tolist()] for name, x in known.token_facts.items()},
    )
    pairs = PairSet.of(diagnosis.pairs[i] for i in at.tolist())
    gram = Gram(diagnosis.gram[both][:, both])
    return Diagnosis(SetStep(diagnosis.loss, pairs, readings, gram, diagnosis.reference[:, at]))


# The first pair opened, eight in the table, and the map of effects.
_OPENED = """
document.querySelector('.pairs .open').click();
[...document.querySelectorAll('.pairs tbody')].slice(8).forEach(row => row.hidden = true);
const map = document.querySelector('.map select');
map.value = 1; map.dispatchEvent(new Event('change')); document.activeElement.blur()
"""


def pictures(page: Path, folder: Path) -> None:
    """The pictures of docs/report.md and the README, by the browser that the tests use."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "report"))
    from browser import Browser
    from PIL import Image

    with tempfile.TemporaryDirectory() as profile:
        tab = Browser(Path(profile) / "profile")

        def top(name: str) -> float:
            at: float = tab.js(f"document.querySelector('#{name}').getBoundingClientRect().top")
            return at + float(tab.js("scrollY"))

        def take(name: str, start: float, height: float, width: int) -> None:
            clip = {"x": 0, "y": start, "width": width, "height": height, "scale": 1}
            shot = tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
            image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
            image.quantize(220, dither=Image.Dither.NONE).save(folder / name, optimize=True)

        tab.open(page)
        take("report.png", 0, top("step") - 15, 1200)
        tab.open(page, dark=True)
        tab.js(_OPENED)
        take("report-dark.png", top("pairs") - 15, top("tokens") - top("pairs"), 1200)
        tab.open(page, width=390, height=844)
        take("report-phone.png", 0, 1500, 390)
        tab.close()


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, folder="keeps models and page")
    parser.add_argument("--pictures", type=Path, help="folder for those of docs/report.md")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--checkpoint", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    short = list(itertools.islice(encoded_rows(args.pairs, tokenizer, 128), args.count))
    data, pairs = [row for row, _ in short], [pair for _, pair in short]
    start, run = args.folder / "sft", args.folder / "dpo"
    if not (run / f"checkpoint-{args.steps}").exists():
        finetune(model, pairs, 3, 1e-3, 0)
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        train(start, run, data, args.steps, args.checkpoint)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    (args.folder / "pairs.jsonl").write_text(text, encoding="utf-8")

    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    reference = torch.stack([measure(load(start)[0], x).log_prob for x in sides])
    model = load(run / f"checkpoint-{args.checkpoint}")[0]
    diagnosis = lddyn.diagnose(model, pairs, "dpo", beta=args.beta, reference=reference, lbk=True)
    end = load(run / f"checkpoint-{args.steps}")[0]
    moved = [measure(end, x).log_prob - diagnosis.log_probs[k] for k, x in enumerate(sides)]
    page = diagnosis.report(
        args.folder / "report" / "index.html",
        model,
        tokenizer,
        watched=run,
        measured=moved[0],
        extra={"model": f"{Path(args.model).name} after SFT and {args.checkpoint} steps of DPO"},
    )
    if args.pictures:
        pictures(page, args.pictures)
    large = many(diagnosis, 500).report(args.folder / "large" / "index.html")
    record(
        args.out,
        "reported",
        {
            "pairs": len(pairs),
            "beta": args.beta,
            "steps": args.steps,
            "checkpoint": args.checkpoint,
            "explanation": explain_diagnosis(summarise(diagnosis, measured=moved[0])),
            "run": explain_dynamics(read_dynamics(run), LABELS),
            "chosen_falls": float((diagnosis.scores["set_chosen"] < 0).double().mean()),
            "measured_falls": float((moved[0] < 0).double().mean()),
            "measured": [float(x.mean()) for x in moved],
            "correlations": diagnosis.correlations(moved[0]),
            "bytes": {str(len(diagnosis)): page.stat().st_size, "500": large.stat().st_size},
        },
    )


if __name__ == "__main__":
    main()
