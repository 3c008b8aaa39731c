"""Settings: one frozen class per stage, read from TOML and the command line."""

from lrmc_ray.config.base import CT_RADIO, DEMO, ENGLISH, GEMMA, PACKET_FILTER, Settings
from lrmc_ray.config.reading import apply_overrides, find_space, load_settings, read_toml
from lrmc_ray.config.run import RunSettings
from lrmc_ray.config.search import (
    AUTOMATIC,
    Objective,
    ParameterRange,
    SearchSettings,
    trial_settings,
)
from lrmc_ray.config.stages import (
    STORAGE_SCHEMES,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    RecordSettings,
    ResourceSettings,
    check_storage_uri,
)
from lrmc_ray.config.train import TrainSettings
from lrmc_ray.config.validation import SettingsType, validate

__all__ = [
    "AUTOMATIC",
    "CT_RADIO",
    "DEMO",
    "ENGLISH",
    "GEMMA",
    "PACKET_FILTER",
    "STORAGE_SCHEMES",
    "DataSettings",
    "EvaluateSettings",
    "ModelSettings",
    "Objective",
    "ParameterRange",
    "RecordSettings",
    "ResourceSettings",
    "RunSettings",
    "SearchSettings",
    "Settings",
    "SettingsType",
    "TrainSettings",
    "apply_overrides",
    "check_storage_uri",
    "find_space",
    "load_settings",
    "read_toml",
    "trial_settings",
    "validate",
]
