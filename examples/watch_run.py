"""Watch TRL's DPOTrainer with one line. Needs trl: `pip install ".[lab]"`.

python examples/watch_run.py
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from lddyn.demo.world import build_world
from lddyn.integrations.trl import watch

world = build_world()
fields = ("prompt", "chosen", "rejected")
rows = [{k: row[k] for k in fields} for row in world.preference_pairs[:32]]
folder = tempfile.mkdtemp()
start = str(Path(folder) / "start")  # TRL loads the reference model from the policy's folder
world.model.save_pretrained(start)
config = DPOConfig(
    folder,
    max_steps=8,
    learning_rate=3e-4,
    per_device_train_batch_size=4,
    logging_steps=2,
    bf16=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
trainer = DPOTrainer(
    start,
    args=config,
    train_dataset=Dataset.from_list(rows),
    processing_class=world.tokenizer,
)
# The one line. By default measuring may take 5 % of the time, too little for eight steps.
watch(trainer, every=4, budget="1000%")
trainer.train()

for row in trainer.state.log_history:
    if "lddyn/log_prob/chosen" in row:
        means = {k.removeprefix("lddyn/"): v for k, v in row.items() if "log_prob" in k}
        print(row["step"], {k: round(v, 3) for k, v in means.items()})
print("every log-prob:", Path(folder) / "lddyn" / "dynamics.jsonl")
