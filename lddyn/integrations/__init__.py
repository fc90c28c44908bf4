"""lddyn inside what people train with: `trainer` (transformers), `trl`, `loop` (all others)."""
