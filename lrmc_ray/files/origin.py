"""``lrmc.json`` in a tuned model's directory: what it was made from, and how it is scored."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import write_json
from lrmc_ray.files.names import BEST_MODEL
from lrmc_ray.method.names import Blend

ORIGIN_FILE = "lrmc.json"


class Ancestor(BaseModel):
    """A model that was tuned before, and became the base of a later one."""

    model_config = ConfigDict(extra="allow")

    base: str
    """Name or directory of the model that it was made from."""
    data: list[str] = []
    study: str | None = None
    trial: int | None = None
    blend: float | None = None
    blend_form: Blend = "even"


class Origin(BaseModel):
    """The file. Paths are absolute, as they were on the machine that made the model."""

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1] = Field(1, alias="schema")
    study: str | None = None
    """The search that chose it; None for a training by itself."""
    trial: int | None = None
    model: dict[str, Any]
    """The base."""
    data: list[str]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    forgetting_weight: float
    output: str
    """Where its base's scores are."""
    blend: float | None = None
    """How far it is from the base, 0, to the trial's model, 1; None for that model itself."""
    blend_form: Blend = "even"
    """How that is spread over the layers; ``depth``: ``blend`` is that of the first one."""
    dtype: str = "float32"
    """Of the weights."""
    ancestors: list[Ancestor] = []
    """What the base was made by, where it was tuned, too; the first one first."""

    @property
    def template_options(self) -> dict[str, Any]:
        """What the chat template was given besides the messages when the model was taught."""
        return dict(self.model.get("template_options") or {})

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Settings with which a command scores the model as it was scored.

        No choice was made by the scores of a training by itself, so that all items are asked.
        """
        chosen = {} if self.study else {"test_share": 0}
        return {
            "model": self.model,
            "evaluate": {**self.evaluate, **chosen},
            "search": {"forgetting_weight": self.forgetting_weight},
        }


def origin_of(
    settings: RunSettings,
    output: Path,
    *,
    train: dict[str, Any] | None = None,
    study: str | None = None,
    trial: int | None = None,
    limit: int | None = None,
    blend: float | None = None,
    blend_form: Blend = "even",
    dtype: str = "float32",
) -> Origin:
    """The origin of a model that was made with ``settings``.

    Args:
        settings: All of them.
        output: The command's output directory.
        train: What the trial changed of ``settings.train``, all of it; None if nothing.
        study: The search.
        trial: Its number there.
        limit: Items per task of the last scoring; None for that of ``settings``.
        blend: How far from the base it is; None for the trained model itself.
        blend_form: How that is spread over the layers.
        dtype: Of the weights.
    """
    values = settings.model_dump(mode="json")
    evaluate = values["evaluate"]
    for group in ("domain_tasks", "general_tasks"):
        evaluate[group] = [_absolute(name) for name in evaluate[group]]
    if limit is not None:
        evaluate["limit"] = limit
    return Origin(
        study=study,
        trial=trial,
        model={**values["model"], "name": _absolute(values["model"]["name"])},
        data=[_absolute(source) for source in values["data"]["train"]],
        train=train or values["train"],
        evaluate=evaluate,
        forgetting_weight=settings.search.forgetting_weight,
        output=str(output.resolve()),
        blend=blend,
        blend_form=blend_form,
        dtype=dtype,
        ancestors=ancestors_of(Path(values["model"]["name"])),
    )


def ancestors_of(base: Path) -> list[Ancestor]:
    """What a base was made by; nothing where it is no directory, or does not say.

    Raises:
        DataError: what it says is damaged.
    """
    own = read_origin(base) if base.is_dir() else None
    if own is None:
        return []
    first = str(own.model["name"])
    made = Ancestor(
        base=first,
        data=own.data,
        study=own.study,
        trial=own.trial,
        blend=own.blend,
        blend_form=own.blend_form,
    )
    return [*own.ancestors, made]


def check_tuned(directory: Path) -> None:
    """Refuse what is no tuned model's directory; where a search is, its best model is named.

    Raises:
        IncompleteArtifactError: says what to give in its place.
    """
    if not directory.is_dir():
        raise IncompleteArtifactError(
            f"{directory} does not exist; give the directory of a tuned model"
        )
    if not (directory / "config.json").is_file():
        below = sorted([*directory.glob(BEST_MODEL), *directory.glob(f"*/{BEST_MODEL}")])
        named = " or ".join(map(str, below)) or "the directory of a tuned model"
        raise IncompleteArtifactError(
            f"{directory} must be a model's directory, and has no config.json; give {named}"
        )


def write_origin(directory: Path, origin: Origin) -> None:
    """Write it into the model's directory."""
    write_json(directory / ORIGIN_FILE, origin.model_dump(by_alias=True))


def read_origin(directory: Path) -> Origin | None:
    """What a model's directory says; None if it says nothing.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / ORIGIN_FILE
    try:
        return Origin.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; remove the file") from None


def _absolute(name: str) -> str:
    """A path as it is from everywhere; any other name as it is."""
    domain, equals, path = name.rpartition("=")
    if "/" not in path and not Path(path).suffix:
        return name  # the name of a task or of shipped data, whatever lies in this folder
    return f"{domain}{equals}{Path(path).resolve()}" if Path(path).exists() else name
