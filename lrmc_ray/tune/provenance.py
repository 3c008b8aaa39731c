"""What a result rests on, as ``study.json`` and ``compare.json`` tell it."""

import importlib.metadata
import platform
from pathlib import Path

from lrmc_ray.config import RunSettings
from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.files.study import TrainingFile
from lrmc_ray.record.sources import training_files

PACKAGES = ("lrmc-ray", "ray", "torch", "transformers", "optuna", "mlflow", "lm-eval", "pyarrow")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def datasets(settings: RunSettings) -> list[TrainingFile]:
    """Every file of training data."""
    return [_described(path) for path in training_files(settings)]


def _described(path: Path) -> TrainingFile:
    return TrainingFile(name=path.stem, digest=file_digest(path)[:32], source=str(path))
