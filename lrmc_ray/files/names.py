"""Names of files that more than one room knows."""

from pathlib import Path

SETTINGS_FILE = "settings.json"
"""The settings of a search or a comparison, beside what it has found."""

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
MODEL = "model"
ADAPTER = "adapter"
"""In a model's directory: the adapters that are merged into it, by themselves."""
BEST_MODEL = "best_model"
"""In a search's directory: the model of the trial that it chose."""
MODEL_CARD = "README.md"
CHECKPOINTS = "checkpoints"
CHECKPOINT_NOW = "checkpoint_now"
"""A file of this name asks rank 0 for a checkpoint; it removes the file when that is saved."""
STACKS = "stacks.txt"
"""Where the processes of a run that hung were when it was ended."""
RUNG = "rung.json"
"""A trial's score on the way and what follows from it: to go on, or to stop early."""


def default_tracking_uri(output: Path) -> str:
    """The SQLite database of an output directory."""
    return f"sqlite:///{output.absolute() / 'mlflow.db'}"
