"""All settings of one command, checked against each other."""

import re
from typing import Any, Self

from pydantic import (
    Field,
    model_validator,
)

from lrmc_ray.command_line import nearest
from lrmc_ray.config.base import DEMO, ENGLISH, Settings
from lrmc_ray.config.search import AUTOMATIC, ParameterRange, SearchSettings, trial_settings
from lrmc_ray.config.stages import (
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    RecordSettings,
    ResourceSettings,
)
from lrmc_ray.config.train import TrainSettings
from lrmc_ray.errors import ConfigError


class RunSettings(Settings):
    """Everything, as one TOML file says it."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    record: RecordSettings = RecordSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    search: SearchSettings = SearchSettings()
    parameters: dict[str, ParameterRange] = Field(default_factory=dict)
    """Searched settings of ``train`` by name."""
    resources: ResourceSettings = ResourceSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, searched in self.parameters.items():
            if name not in TrainSettings.model_fields:
                hint = nearest(name, TrainSettings.model_fields)
                raise ValueError(f"parameters.{name} is no setting of train{hint}")
            self._check_condition(name, searched)
            if searched.range == "auto" and name not in AUTOMATIC:
                raise ValueError(
                    f'parameters.{name}: range = "auto" is known for {" and ".join(AUTOMATIC)} '
                    "only; give low and high"
                )
            for value in searched.choices or (searched.low, searched.high):
                if value is None:
                    continue  # not yet known
                try:
                    trial_settings(self.train, {name: value})
                except ConfigError as error:
                    raise ValueError(f"parameters.{name}: {error}") from None
        if self._largest("k_min") > self.record.k_min:
            raise ValueError(
                f"train.k_min must not exceed record.k_min, got {self._largest('k_min'):g} > "
                f"{self.record.k_min}; raise record.k_min"
            )
        if self.record.tau is not None and self.record.tau < self.wanted_tau():
            raise ValueError(
                f"record.tau must be at least every tau that training asks for, got "
                f"{self.record.tau} < {self.wanted_tau()}; leave record.tau out"
            )
        if self._largest("anchor_weight") > 0 and self.record.prompt_k_max == 0:
            raise ValueError(
                "train.anchor_weight > 0 needs recorded prompt positions, got "
                "record.prompt_k_max = 0; set it to 64, or train.anchor_weight to 0"
            )
        parallel = self.parameters.get("parallel")
        if "shard" in (self.train.parallel, *((parallel and parallel.choices) or ())):
            self._check_sharded()
        return self

    def _check_sharded(self) -> None:
        if self.resources.storage is not None:
            raise ValueError(
                "resources.storage must be left out with train.parallel = 'shard', got "
                f"{self.resources.storage}: workers save and load their shards in one directory "
                "that all of them see; use a shared file system"
            )
        if self.search.early_stopping != "none":
            raise ValueError(
                "search.early_stopping must be 'none' with train.parallel = 'shard', got "
                f"{self.search.early_stopping!r}: no worker has the whole model to score on the way"
            )

    def _check_condition(self, name: str, searched: ParameterRange) -> None:
        for key, value in searched.when.items():
            if key not in TrainSettings.model_fields:
                raise ValueError(f"parameters.{name}.when: {key} is no setting of train")
            other = self.parameters.get(key)
            if other is None:
                possible: tuple[Any, ...] = (getattr(self.train, key),)
            elif other.when:
                raise ValueError(
                    f"parameters.{name}.when: {key} has a condition itself, got {other.when}; "
                    "put both conditions here"
                )
            else:
                possible = other.choices or ()
            if value not in possible:
                raise ValueError(
                    f"parameters.{name}.when: {key} never is {value!r}: it must be one of "
                    f"{list(possible)}, by parameters.{key}.choices or train.{key}"
                )

    def wanted_tau(self) -> float:
        """The largest tau that training, or any trial of the search, asks for."""
        return self._largest("tau")

    def _largest(self, name: str) -> float:
        """The largest value that a number of ``train`` has, in any trial of the search."""
        searched = self.parameters.get(name)
        values = [getattr(self.train, name)]
        if searched is not None and searched.range == "auto":
            values.append(AUTOMATIC[name])
        elif searched is not None:
            values += searched.choices or (searched.high,)
        return float(max(values))

    def study_name(self) -> str:
        """What a search is called: by its training data, and by ``search.name`` behind it.

        The demo's data need not be named beside it.
        """
        sources = [name for name in self.data.train if name != ENGLISH]
        if self.search.name is not None and set(sources) <= {DEMO}:
            return self.search.name
        more = f"-and-{len(sources) - 1}-more" if len(sources) > 1 else ""
        parts = [_data_name(sources[0] if sources else ENGLISH) + more, self.search.name]
        return "-".join(filter(None, parts))

    def recorded_tau(self) -> float:
        """The tau at which Stage 0 records: one from which every trial can be cut."""
        return self.record.tau if self.record.tau is not None else self.wanted_tau()


def _data_name(source: str) -> str:
    """A file's or folder's name without its ending, or that of a data set of the Hub."""
    path = source.rpartition("=")[2].removeprefix("hf://").partition("@")[0]
    parts = [part for part in path.split("/") if part not in ("", ".", "..") and "*" not in part]
    stem = parts[-1].partition(".")[0] if parts else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:40] or "data"
