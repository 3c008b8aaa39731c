"""Settings of a comparison: a run's settings, and the methods that are compared.

A space file (``tune_spaces/compare.toml``) has the sections of any run, which all methods share,
``[compare]``, and one ``[methods.NAME]`` each, whose ``train`` is laid over the shared ``[train]``.
``[[effects]]`` name pairs of methods that differ in one part.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from lrmc_ray.config import RunSettings, Settings, TrainSettings, trial_settings
from lrmc_ray.config.base import as_tuple
from lrmc_ray.errors import ConfigError

NAME = r"^[a-z0-9][a-z0-9_]{0,31}$"

LEAST_ITEMS = 4
"""Of a general task: half of them choose the learning rate, half are reported."""

LearningRate = Annotated[float, Field(gt=0, lt=1)]

LearningRates = Annotated[tuple[LearningRate, ...], Field(min_length=1), BeforeValidator(as_tuple)]

BlendWeights = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(as_tuple)]

Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
]


class CompareSettings(Settings):
    """How the methods are compared."""

    name: str = Field("compare", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Names the comparison on disk."""
    learning_rates: LearningRates = (5e-6, 1e-5, 3e-5, 1e-4)
    """Tried by every method on the first seed, unless it has its own."""
    seeds: Seeds = (0, 1, 2)
    """The first chooses the learning rate, all are reported."""
    reference: str = "sft"
    """The method that all others are set against, seed by seed."""
    blend_weights: BlendWeights = ()
    """Where models between the base, 0, and every reported one, 1, are scored, too (WiSE-FT); set
    before the first run."""
    depth_blend_weights: BlendWeights = ()
    """The same with a weight that grows from this one in the first layer to 1 in the last
    (LiNeS)."""
    keep_models: bool = False
    """Keep every tuned model; otherwise each is removed once it is scored."""
    run_timeout_seconds: float | None = Field(None, gt=0)
    """Time after which a run is stopped as failed; by default ten times the longest that has
    ended, and at least ten minutes."""


class MethodSettings(Settings):
    """One method."""

    title: str = Field(min_length=1, max_length=60)
    """What tables and figures call it."""
    label: str = Field("", max_length=24)
    """A short name: the figures show the method in a colour, under this name. Without one it is
    grey, unless it is the reference or the best."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``train`` that make it what it is."""
    learning_rates: LearningRates | None = None
    """Its own, where those of the others do not fit: adapters need larger ones."""
    seeds: Seeds | None = None
    """Its own, where it needs fewer or more of them; the first is that of the others."""


class EffectSettings(Settings):
    """One part of the methods, whose effect is the mean difference of ``pairs``."""

    title: str = Field(min_length=1, max_length=60)
    """What tables call it."""
    pairs: Annotated[
        tuple[Annotated[tuple[str, str], BeforeValidator(as_tuple)], ...],
        Field(min_length=1),
        BeforeValidator(as_tuple),
    ]
    """Names of methods that differ in this part alone: with it, without it."""


class CompareSpace(RunSettings):
    """Everything, as one TOML file says it."""

    compare: CompareSettings = CompareSettings()
    methods: dict[Annotated[str, Field(pattern=NAME)], MethodSettings] = Field(min_length=1)
    """By name."""
    effects: Annotated[tuple[EffectSettings, ...], BeforeValidator(as_tuple)] = ()
    """Which part of a method does it: each is reported once its methods are."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        for name, values in self._lists().items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must differ from one another, got {list(values)}")
        precisions = {
            self.train.precision,
            *(m.train.get("precision") for m in self.methods.values()),
        }
        if "auto" in precisions:
            raise ValueError(
                "train.precision must be fp32 or bf16 in a comparison, got auto: methods differ in "
                "what they say alone; choose one"
            )
        for name, method in self.methods.items():
            for key in ("lr", "seed"):
                if key in method.train:
                    raise ValueError(
                        f"methods.{name}.train must not set {key}, which the comparison chooses; "
                        "see compare.learning_rates and compare.seeds"
                    )
            if method.seeds and method.seeds[0] != self.compare.seeds[0]:
                raise ValueError(
                    f"methods.{name}.seeds must begin with that of compare.seeds, "
                    f"{self.compare.seeds[0]}, which chooses the learning rate, got "
                    f"{list(method.seeds)}"
                )
        if self.compare.reference not in self.methods:
            raise ValueError(
                f"compare.reference must name one of the methods ({', '.join(self.methods)}), got "
                f"{self.compare.reference!r}"
            )
        for effect in self.effects:
            for pair in effect.pairs:
                if unknown := [name for name in pair if name not in self.methods]:
                    raise ValueError(
                        f"effects: {effect.title!r} must have pairs of methods "
                        f"({', '.join(self.methods)}), got {unknown[0]!r}"
                    )
                if pair[0] == pair[1]:
                    raise ValueError(
                        f"effects: {effect.title!r} must have pairs of two methods that differ, "
                        f"got {pair[0]!r} twice"
                    )
        if self.evaluate.limit is not None and self.evaluate.limit < LEAST_ITEMS:
            raise ValueError(
                f"evaluate.limit must be at least {LEAST_ITEMS}, got {self.evaluate.limit}: half "
                "of the general items choose the learning rate, half are reported"
            )
        return self

    def _lists(self) -> dict[str, tuple[float, ...]]:
        lists: dict[str, tuple[float, ...]] = {
            "compare.learning_rates": self.compare.learning_rates,
            "compare.seeds": self.compare.seeds,
            "compare.blend_weights": self.compare.blend_weights,
            "compare.depth_blend_weights": self.compare.depth_blend_weights,
        }
        for name, method in self.methods.items():
            if method.learning_rates is not None:
                lists[f"methods.{name}.learning_rates"] = method.learning_rates
            if method.seeds is not None:
                lists[f"methods.{name}.seeds"] = method.seeds
        return lists

    def train_of(self, method: str, *, lr: float, seed: int) -> TrainSettings:
        """The settings of ``train`` of one run.

        Raises:
            ConfigError: the method's settings are unknown, out of range, or contradict each other.
        """
        changes = {**self.methods[method].train, "lr": lr, "seed": seed}
        try:
            return trial_settings(self.train, changes)
        except ConfigError as error:
            raise ConfigError(f"methods.{method}: {error}") from None

    def learning_rates_of(self, method: str) -> tuple[float, ...]:
        """The learning rates that a method tries."""
        return self.methods[method].learning_rates or self.compare.learning_rates

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds that are reported of a method."""
        return self.methods[method].seeds or self.compare.seeds

    def run_settings(self, train: TrainSettings) -> RunSettings:
        """One run by itself, as the stages take it."""
        own = {"compare", "methods", "effects", "parameters"}
        values: Mapping[str, Any] = self.model_dump(exclude=own)
        record = {**values["record"], "tau": self.recorded_tau()}
        return RunSettings.model_validate(
            {**values, "record": record, "train": train.model_dump(), "parameters": {}}
        )

    def _largest(self, name: str) -> float:
        """The largest value that a number of ``train`` has in any method."""
        return float(
            max(getattr(self.train_of(method, lr=1e-5, seed=0), name) for method in self.methods)
        )
