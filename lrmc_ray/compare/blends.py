"""Models between the base and a run's: made, scored on the test split, and removed again.

What they score is in ``blends.json`` of the run's directory, and from there in ``compare.json``.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.config import RunSettings
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.files.artifacts import PARTIAL, write_json
from lrmc_ray.files.names import MODEL
from lrmc_ray.method.names import Blend
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.loading import load_model
from lrmc_ray.models.saving import save_model

BLENDS_FILE = "blends.json"


@dataclass(frozen=True)
class BlendPlace:
    """Which model between the two."""

    form: Blend
    weight: float

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.weight:g}" + (" by depth" if self.form == "depth" else "")


def blend_places(even: Sequence[float], depth: Sequence[float]) -> list[BlendPlace]:
    """Those that settings ask for, each form by rising weight."""
    places = [BlendPlace("even", weight) for weight in sorted(even)]
    return places + [BlendPlace("depth", weight) for weight in sorted(depth)]


def score_blends(
    settings: RunSettings,
    directory: Path,
    base_scores: Path,
    places: Sequence[BlendPlace],
    *,
    stored_as: str,
) -> None:
    """Score the models between the base and the one that the run in ``directory`` has trained.

    Args:
        settings: of the run.
        directory: of the run; the scores are kept there.
        base_scores: the base model's on the test split.
        places: which ones.
        stored_as: name of the run's training in a storage.

    Raises:
        EvaluationError: scoring failed.
    """
    from lrmc_ray.method.baselines.interpolation import interpolate

    source, base = directory / "training" / MODEL, local_directory(settings.model)
    made = directory / f"blend{PARTIAL}"
    found = []
    try:
        for number, place in enumerate(places):
            tuned = load_model(source)
            before = dict(load_model(base).named_parameters())
            interpolate(dict(tuned.named_parameters()), before, place.weight, place.form)
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            save_model(tuned, source, made)
            scores = evaluate(
                settings,
                made,
                directory,
                split="test",
                base=base_scores,
                here=True,
                stored_as=f"{stored_as}/blend-{number}",
            )
            found.append({**asdict(place), "scores": str(scores.relative_to(directory))})
    finally:
        shutil.rmtree(made, ignore_errors=True)
    write_json(directory / BLENDS_FILE, found)


def read_blends(directory: Path, name: str) -> list[dict[str, Any]]:
    """What :func:`score_blends` left in a run's directory, which the comparison calls ``name``."""
    try:
        found = json.loads((directory / BLENDS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [{**one, "scores": f"{name}/{one['scores']}"} for one in found]
