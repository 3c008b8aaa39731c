"""Settings of a search: what it varies, what it looks for, how long it goes on."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from lrmc_ray.config.base import Settings, as_tuple
from lrmc_ray.config.train import TrainSettings
from lrmc_ray.config.validation import validate

Objective = Literal["combined", "budget", "pareto"]
"""What a search looks for; see ``SearchSettings.objective``."""

AUTOMATIC = {"tau": 0.999, "delta_max": 180.0}
"""Settings of ``train`` whose range can be found automatically, and the largest that it may be."""


class ParameterRange(Settings):
    """One searched setting of ``train``."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Search the logarithm."""
    choices: Annotated[tuple[float | str, ...] | None, BeforeValidator(as_tuple)] = None
    """Values to choose from, in place of low and high."""
    range: Literal["auto"] | None = None
    """``auto``: low and high are those that ``lrmc suggest`` finds for this model and data."""
    when: dict[str, float | str] = Field(default_factory=dict)
    """Searched only in trials with these settings of ``train``: ``{optimizer = "moclip"}``."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.range is not None:
            if (self.low, self.high, self.choices) != (None, None, None) or self.log:
                raise ValueError('range = "auto" stands alone, without low, high, log and choices')
            return self
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give either low and high, or choices, not both")
            if not self.choices:
                raise ValueError("choices must not be empty")
            return self
        if self.low is None or self.high is None:
            raise ValueError("low and high must both be given, or choices")
        if not self.low < self.high:
            raise ValueError(f"low < high must hold, got low={self.low}, high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs low > 0, got {self.low}")
        return self


class SearchSettings(Settings):
    """Which trials are run, and what makes one better."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Names the study in MLflow and on disk, behind the name of its training data."""
    trials: int = Field(10, ge=1)
    """Trials in all, the defaults and the yardstick included."""
    objective: Objective = "combined"
    """``combined``: the largest combined score. ``budget``: the largest domain gain with at most
    ``max_forgetting``. ``pareto``: the whole front, of which the knee is taken."""
    forgetting_weight: float = Field(1.0, ge=0)
    """``combined`` = domain gain - forgetting_weight * forgetting."""
    max_forgetting: float = Field(0.01, ge=-1, le=1)
    """Forgetting that ``budget`` allows, as a fraction: 0.01 is one point of 100."""
    yardstick_lr: float | None = Field(3e-5, gt=0, lt=1)
    """Learning rate of the plain fine-tuning trial; none leaves it out."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of Optuna's sampler."""
    startup_trials: int = Field(4, ge=1)
    """Random trials before the sampler (TPE) models the objective."""
    early_stopping: Literal["median", "none"] = "none"
    """``median``: a trial that is worse on the way than half of the others before it ends there;
    not for ``pareto``, which has no one score."""
    early_stopping_after: float = Field(0.5, gt=0, lt=1)
    """Share of its steps after which a trial is scored on the way."""
    early_stopping_items: int = Field(16, ge=2)
    """Items per task, the first ones, on which it is scored; no answers are generated."""
    early_stopping_trials: int = Field(4, ge=2)
    """Other trials that must have been scored on the way before one may be stopped."""
    trial_timeout_seconds: float | None = Field(None, gt=0)
    """Time after which a trial is stopped as failed; by default ten times the longest that has
    ended, and at least ten minutes."""
    final_limit: int | None = Field(None, ge=2)
    """Test items per domain task of the last scoring; by default as many as ``evaluate.limit``."""
    keep_models: Literal["best", "all"] = "best"
    """Which tuned models stay on disk."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.early_stopping != "none" and self.objective == "pareto":
            raise ValueError(
                f"early_stopping must be 'none' with objective = 'pareto', got "
                f"'{self.early_stopping}': a trial has no one score to be stopped by; set "
                "search.early_stopping"
            )
        return self

    @property
    def stops_early(self) -> bool:
        """Whether any trial of this search may be stopped early."""
        return self.early_stopping == "median" and self.trials > self.early_stopping_trials


def trial_settings(base: TrainSettings, params: Mapping[str, Any]) -> TrainSettings:
    """``base`` with one trial's ``params`` laid over it.

    Raises:
        ConfigError: a parameter is unknown or out of range.
    """
    values = base.model_dump()
    for name, value in params.items():
        field = TrainSettings.model_fields.get(name)
        is_whole = isinstance(value, float) and value.is_integer()
        # Ranges and choices are read as floats, whatever they are of.
        values[name] = int(value) if field and field.annotation is int and is_whole else value
    return validate(TrainSettings, values, "trial")
