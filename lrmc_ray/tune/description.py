"""What ``study.json`` says of a search: its identity, versions and data."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.files.artifacts import (
    file_digest,
)


def study_identity(settings: RunSettings) -> dict[str, Any]:
    """What makes two searches the same one: all but how many trials, how fast, and what follows."""
    identity = settings.model_dump(mode="json", exclude={"resources"})
    for key in ("trials", "keep_models", "trial_timeout_seconds", "final_limit"):
        del identity["search"][key]
    return identity


def json_ready(value: Any) -> Any:
    """The value as JSON would give it back."""
    return json.loads(json.dumps(value))


def relative_path(path: Path, directory: Path) -> str:
    """``path`` as seen from ``directory``."""
    import os

    return os.path.relpath(path.resolve(), directory.resolve())


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    names = ("lrmc-ray", "ray", "torch", "transformers", "optuna", "mlflow", "lm-eval", "pyarrow")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def datasets(settings: RunSettings) -> list[dict[str, str]]:
    """Name, digest and path of every training file."""
    from lrmc_ray.record.sources import training_files

    return [
        {"name": path.stem, "digest": file_digest(path)[:32], "source": str(path)}
        for path in training_files(settings)
    ]


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flat_settings(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
