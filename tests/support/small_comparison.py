"""The command that compares two methods on a small model."""

import sys
from pathlib import Path

from tests.support.tiny import make_data


def compare_command(tmp_path: Path, model: Path, *more: str) -> list[str]:
    """``lrmc compare`` of two methods, with its data and output in ``tmp_path``."""
    data = tmp_path / "train.jsonl"
    if not data.is_file():
        make_data(data)
    return [
        *(sys.executable, "-m", "lrmc_ray.compare", "--space", "compare_smoke"),
        *("--model", str(model), "--train-data", str(data), "--output", str(tmp_path / "runs")),
        *("--domain-tasks", "capitals", "--general-tasks", "plain_english"),
        *("evaluate.limit=6", "evaluate.drift_samples=2", *more),
    ]
