"""Which pairs of a preference file lower the chosen responses? Write the file without them.

    python examples/diagnose_pairs.py

`lddyn diagnose --model … --data pairs.jsonl --out report`, then `lddyn filter report --drop 4 --out
kept`, does the same.
"""

import json
import tempfile
from pathlib import Path

import lddyn
from lddyn.demo.world import build_world
from lddyn.sets.filter import filter_rows

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
diagnosis = lddyn.diagnose(world.model, pairs, "dpo", beta=0.1)
print(diagnosis.explain())

harmful = int((diagnosis.contribution < 0).sum())
filtered = filter_rows(rows, diagnosis, drop=min(4, harmful))
for i in filtered.dropped_rows:
    change, outcome = float(diagnosis.contribution[i]), diagnosis.outcomes[i]
    print(f"row {i}: contribution {change:+.3g}, {outcome}:{rows[i]['rejected']}")
filtered.write(folder)
print(f"{len(filtered.kept)} rows are in {folder / 'kept.jsonl'}")
