"""Names of what a training run keeps in its directory."""

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
MODEL = "model"
CHECKPOINTS = "checkpoints"
CHECKPOINT_NOW = "checkpoint_now"
"""A file of this name asks rank 0 for a checkpoint; it removes the file when that is saved."""
