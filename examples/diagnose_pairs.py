"""Which pairs of a preference file pull the chosen responses down? Write it without the worst.

    python examples/diagnose_pairs.py

`lddyn diagnose --model … --data pairs.jsonl --out report`, then `lddyn filter report --drop 4 --out
kept`, does the same.
"""

import json
import tempfile
from pathlib import Path

import lddyn
from lddyn.demo.world import build_world

world = build_world()
folder = Path(tempfile.mkdtemp())
data = folder / "pairs.jsonl"  # your file
data.write_text("".join(json.dumps(row) + "\n" for row in world.preference_pairs[:24]))

print(lddyn.audit(world.tokenizer, data, config=world.model.config), "\n")

rows = list(lddyn.rows(data))
pairs = []
for row in rows:
    both = lddyn.encode_row(world.tokenizer, row)
    pairs.append((both["chosen"], both["rejected"]))
found = lddyn.diagnose(world.model, pairs, "dpo", beta=0.1)
print("\n".join(found.tell()))

gone = [i for i in found.worst(4) if found.scores["gives"][i] < 0]
for i in gone:
    print(f"row {i}: gives {found.scores['gives'][i]:+.3g}, {found.fate[i]}:{rows[i]['rejected']}")
kept = folder / "kept.jsonl"
kept.write_text("".join(json.dumps(row) + "\n" for i, row in enumerate(rows) if i not in gone))
print(f"{len(rows) - len(gone)} rows are in {kept}")
