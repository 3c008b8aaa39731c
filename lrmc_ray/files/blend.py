"""``blend.json`` in a study's directory: scores of models between the base and a trial's."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import write_json
from lrmc_ray.method.names import Blend

BLEND_FILE = "blend.json"
BLENDS = "blends"
"""The folder of the scores."""


class BlendPoint(BaseModel):
    """One model between the base and a trial's."""

    model_config = ConfigDict(extra="allow")

    trial: int = Field(ge=0)
    weight: float = Field(ge=0, lt=1)
    form: Blend = "even"
    """``depth``: ``weight`` is that of the first layer, and grows to 1 in the last."""
    tuned: str
    """Fingerprint of the trial's model."""
    base_scores: str
    """What it is compared with, relative to the study's directory."""
    scores: str
    """Relative to the study's directory."""

    @property
    def place(self) -> tuple[int, str, float]:
        """Which model it is: the trial's number, form and weight."""
        return (self.trial, self.form, self.weight)


class BlendFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1] = Field(1, alias="schema")
    points: list[BlendPoint] = []

    def point(self, trial: int, weight: float, form: Blend = "even") -> BlendPoint | None:
        """What was measured of a trial at a weight; None if nothing."""
        return next((p for p in self.points if p.place == (trial, form, weight)), None)

    def add(self, point: BlendPoint) -> None:
        """Add a point, in place of an older one of the same trial, form and weight."""
        others = [p for p in self.points if p.place != point.place]
        self.points = sorted([*others, point], key=lambda p: p.place)


def read_blend(study_directory: Path) -> BlendFile:
    """What a study has; an empty one where nothing was measured.

    Raises:
        DataError: the file is damaged.
    """
    path = study_directory / BLEND_FILE
    try:
        return BlendFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return BlendFile()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}; remove the file and run `lrmc blend` again"
        ) from None


def write_blend(study_directory: Path, blend: BlendFile) -> None:
    """Write it, atomically."""
    write_json(study_directory / BLEND_FILE, blend.model_dump(by_alias=True))
