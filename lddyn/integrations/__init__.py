"""lddyn inside the tools that people train with: `trainer` (transformers), `trl`."""
