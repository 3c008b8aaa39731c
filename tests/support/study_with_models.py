"""The synthetic study with models that are real, if tiny: those that its scores say they are of."""

import json
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.files.artifacts import write_json, write_manifest
from lrmc_ray.files.names import SETTINGS_FILE
from lrmc_ray.models.identity import model_fingerprint
from lrmc_ray.tune.choice import model_of
from tests.support.synthetic_study import TRAIN, edit, make_study, save_scores
from tests.support.tiny import make_model

KEPT = (1, 3)
"""Trials whose models are there: plain fine-tuning, and the best one."""


def make_study_with_models(directory: Path, base: Path) -> Path:
    """Write it to ``directory``; ``base`` is the model that all trials began with."""
    make_study(directory)
    settings = RunSettings.model_validate(
        {"model": {"name": str(base)}, "search": {"name": "demo"}, "train": TRAIN}
    )
    values = settings.model_dump(mode="json")
    write_json(directory / SETTINGS_FILE, values)
    edit(directory, settings={**values, "search": {**values["search"], "seed": 5}})
    name_model(directory / "base_scores", base)
    for number in KEPT:
        model = make_model(model_of(directory, number), seed=number)
        (model / "model.safetensors").chmod(0o600)
        name_model(directory / f"trials/{number:04d}/scores", model)
    return directory


def name_model(scores: Path, model: Path) -> None:
    """Let scores be those of ``model``."""
    write_manifest(scores, {"kind": "scores", "identity": {"model": model_fingerprint(model)}})


def add_blend(
    directory: Path, trial: int, weight: float, rows: list[dict[str, Any]], form: str = "even"
) -> None:
    """Let a blend of a trial have these scores, as ``lrmc blend`` leaves them."""
    folder = f"blends/scores/{trial}-{weight:g}" + ("-depth" if form == "depth" else "")
    save_scores(directory / folder, rows, "blend")
    path = directory / "blend.json"
    file = json.loads(path.read_text()) if path.exists() else {"schema": 1, "points": []}
    point = {"trial": trial, "weight": weight, "form": form, "tuned": "-"}
    point["base_scores"] = "base_scores"
    file["points"].append({**point, "scores": folder})
    path.write_text(json.dumps(file))
