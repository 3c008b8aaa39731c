"""Settings: one frozen class per stage, read from TOML, changed by ``section.key=value``.

A run is described by one TOML file with a section per stage (``tune_spaces/demo.toml`` shows all
of them). Everything that changes the science is in ``model``, ``data``, ``record``, ``train`` and
``evaluate`` and enters the fingerprints; ``resources`` only says where and how fast it runs.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from lrmc_ray.errors import ConfigError, IncompleteArtifactError

DEMO = "demo"
"""Names the embedded model and the embedded data."""
CT = "ct"
"""Names the task of radio exam questions, and its training data."""
ENGLISH = "english"
"""Names general text to be replayed: sentences that no task of ours asks about."""
STORAGE_SCHEMES = ("s3", "gs", "file")


def _as_tuple(value: Any) -> Any:
    """TOML has lists only, and one string may stand for a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Strings = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
Range = Annotated[tuple[int, int], BeforeValidator(_as_tuple)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Betas = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]


class Settings(BaseModel):
    """Base of all settings: unknown keys, wrong types and non-finite numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSettings(Settings):
    """Which model is taught."""

    name: str = DEMO
    """Directory or Hugging Face id of a causal LM; ``demo`` is SmolLM2-135M-Instruct."""
    revision: str | None = None
    """Commit, branch or tag on the Hub; none for a directory."""


class DataSettings(Settings):
    """What it is taught."""

    train: Strings = (DEMO,)
    """JSONL or Parquet files, folders or patterns, ``DOMAIN=`` before one that has a domain of its
    own; ``demo`` is NL2SQL, ``ct`` radio exam questions, ``english`` general text to replay."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of one sample, prompt included."""
    on_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a longer sample."""
    on_bad_row: Literal["error", "skip"] = "error"
    """``skip`` leaves out rows that cannot be used and lists them in rejects.jsonl."""
    max_rejected_share: float = Field(0.05, ge=0, le=1)
    """Largest share of the rows that ``skip`` may leave out."""


class RecordSettings(Settings):
    """Stage 0: how much of the base model's distribution is kept."""

    tau: float | None = Field(None, gt=0, le=1)
    """Probability that each recorded set reaches; by default the largest that training asks for."""
    k_min: int = Field(2, ge=1)
    """Fewest candidates of a position; training can cut to fewer, not to more."""
    k_max: int = Field(1024, ge=1)
    """Most candidates of a supervised position."""
    prompt_k_max: int = Field(64, ge=0)
    """Most candidates of a prompt position (for the anchor); 0 records none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, most in (("k_max", self.k_max), ("prompt_k_max", self.prompt_k_max)):
            if most < self.k_min and not (name == "prompt_k_max" and most == 0):
                raise ValueError(
                    f"{name} must be at least k_min, got {most} < {self.k_min}; lower record.k_min"
                )
        return self


class TrainSettings(Settings):
    """Stage 1: the loss, the optimizer and the budget."""

    loss: Literal["restricted", "full", "soft", "active_only", "dft", "kl_to_base"] = "restricted"
    """``restricted`` is the paper's, ``full`` ordinary fine-tuning, the others baselines."""
    base_kl_weight: float = Field(1.0, ge=0)
    """Weight of KL(base || model) with ``kl_to_base``, which holds the base model beside."""
    tau: float = Field(0.99, gt=0, le=1)
    """Probability that the candidates of a position cover."""
    k_min: int = Field(1, ge=1)
    """Fewest candidates; 2 keeps positions active of which the base model was sure."""
    keep_gold: bool = True
    """False, an ablation: no position where the gold token is not among the candidates anyway."""
    tail_samples: int = Field(1024, ge=0)
    """Sampled tokens that stand for the mass outside the candidates, at most the vocabulary; 0 is
    the paper's loss."""
    anchor_weight: float = Field(1.0, ge=0)
    """Weight of the KL to the base model on prompt positions; 0 is the paper."""
    optimizer: Literal["moclip", "adamw", "adam_atan2", "c_adamw", "mofo"] = "moclip"
    """``adam_atan2`` is MoClip without the cap, the others are baselines."""
    lr: float = Field(3e-5, gt=0, lt=1)
    """Peak learning rate."""
    betas: Betas | None = None
    """Decay of the moments; default (0.9, 0.99) for MoClip, (0.9, 0.999) for AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, multiplied by the learning rate."""
    mofo_share: float = Field(0.15, gt=0, le=1)
    """Share of each tensor that ``mofo`` moves in a step."""
    l2_sp_weight: float = Field(0.0, ge=0)
    """Weight of half the squared distance from the base's weights (L2-SP), in the loss."""
    delta_max: float = Field(90.0, gt=0, le=180)
    """Largest angle between gradient and momentum, in degrees; 180 switches the cap off, that of
    weights, too."""
    clip: Literal["scale", "cautious", "momentum", "project", "rotate", "none"] = "cautious"
    """Reading of the cap, see ``method/moclip.py``. ``cautious`` is ``scale``, and leaves out of a
    step the weights that would move against their gradient."""
    angle: Literal["tensor", "global"] = "tensor"
    """One angle per tensor, or one for the whole model."""
    second_moment: Literal["raw", "capped"] = "raw"
    """Whether the second moment sees the gradient before or after the cap."""
    atan2_scale: float = Field(1.0, gt=0)
    """Factor a of the step a * atan2(m, sqrt(v)). With 1 a learning rate means what it does to
    AdamW, where the step is small; Adam-atan2 has 1.27, which is a larger learning rate."""
    compile_optimizer: bool = False
    """Compile the step of ``moclip`` and ``adam_atan2``: a third of its time, after some seconds at
    the first; needs a C++ compiler on every node. Its rounding is its own."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly."""
    steps: int = Field(30, ge=1)
    """Optimizer updates."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data, rounded up to whole steps; replaces ``steps``."""
    domain_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How often per epoch the samples of a domain are used (patterns allowed); by default 1."""
    replay_share: float | None = Field(None, ge=0, lt=1)
    """Share of the samples that are of the domain ``replay``: general text against forgetting.
    By default it is a domain as any other."""
    freeze: Patterns = ()
    """Parameters that stay as they are, by pattern: ``model.layers.[0-9].*``."""
    lora_rank: int = Field(0, ge=0)
    """Rank of low-rank adapters that are trained in place of the weights; 0 trains the weights."""
    lora_alpha: int = Field(16, ge=1)
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: Patterns = ()
    """Names of the linear layers that get an adapter; by default all but the output head."""
    packing: bool = True
    """Compute prefixes that samples of a micro-batch share once, without padding, where that is
    cheaper; the loss is the same up to rounding."""
    gradient_checkpointing: Literal["auto", False, "selective", "full"] = "auto"
    """What the backward pass computes again, for less memory and the same result: ``selective``
    what is cheap (norms, activation functions), ``full`` whole layers, about a third more time,
    ``auto`` what is cheap in micro-batches of 2,048 tokens and more, and nothing in others."""
    batch_size: int = Field(8, ge=1)
    """Samples per step, over all workers."""
    micro_batches: int = Field(4, ge=1)
    """Fixed parts of a batch; at least the largest number of workers."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradient clipping by norm; none by default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` runs the forward pass under autocast; weights stay float32."""
    reduction: Literal["strict", "fast"] = "strict"
    """``strict``: bit-identical for every number of workers; ``fast``: one all-reduce."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Order of the samples, dropout and sampled tails."""
    checkpoint_every: int = Field(10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept; the best one is kept as well."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations on held-out samples; 0 holds out none."""
    holdout_share: float = Field(0.05, gt=0, lt=1)
    """Share of the samples that is held out where ``evaluate_every`` is set; at least one."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model: the last, or those with the least held-out loss."""
    refresh_every: int = Field(0, ge=0)
    """Steps after which the candidates of the coming samples are recorded again with the current
    model; 0 keeps the base model's."""
    probe_every: int = Field(10, ge=0)
    """Steps between measurements of the outside mass; 0 switches them off."""
    probe_positions: int = Field(64, ge=2)
    """Positions per measurement, each over the full vocabulary."""
    max_bad_steps: int = Field(5, ge=1)
    """Consecutive steps without a finite gradient after which training fails."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"micro_batches must not exceed batch_size, got {self.micro_batches} > "
                f"{self.batch_size}; lower train.micro_batches"
            )
        if self.epochs is None and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps must not exceed steps, got {self.warmup_steps} > {self.steps}; "
                "lower train.warmup_steps"
            )
        if self.betas and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.export == "best" and not self.evaluate_every:
            raise ValueError(
                "evaluate_every must be at least 1 with export = 'best', got 0: there is nothing "
                "to choose by; set train.evaluate_every"
            )
        if self.freeze and self.lora_rank:
            raise ValueError(
                "freeze must be empty with adapters, which leave all weights as they are, got "
                f"lora_rank = {self.lora_rank}; use train.lora_targets"
            )
        if self.refresh_every and self.loss == "soft":
            raise ValueError(
                "refresh_every must be 0 with loss = 'soft', whose targets are the base model's; "
                "leave one of them out"
            )
        if self.refresh_every and not self.keep_gold:
            raise ValueError(
                "refresh_every must be 0 with keep_gold = false, which is about the recorded sets; "
                "leave one of them out"
            )
        if self.l2_sp_weight and self.lora_rank:
            raise ValueError(
                "l2_sp_weight must be 0 with adapters, which leave all weights as they are, got "
                f"lora_rank = {self.lora_rank}; leave one of them out"
            )
        if self.replay_share is not None and "replay" in self.domain_weights:
            raise ValueError(
                "domain_weights must not name the domain replay, whose share is replay_share, got "
                f"{sorted(self.domain_weights)}; leave one of them out"
            )
        return self


class EvaluateSettings(Settings):
    """How a model is scored, the base and every tuned one alike."""

    domain_tasks: Strings = ("nl2sql",)
    """Tasks that should improve: ours, or any name that lm-eval knows."""
    general_tasks: Strings = ("wordnet", "capitals", "plain_english")
    """Tasks that must not get worse."""
    batch_tokens: int = Field(2048, ge=1)
    """Most tokens of one forward pass, padding included; a longer sequence runs alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights during evaluation."""
    limit: int | None = Field(None, ge=2)
    """Items per task; none for all. An interval needs at least two."""
    drift_samples: int = Field(16, ge=0)
    """Texts on which KL(base || tuned) is measured; 0 switches it off."""


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
    choices: Annotated[tuple[float | str, ...] | None, BeforeValidator(_as_tuple)] = None
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

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Names the study in MLflow and on disk."""
    trials: int = Field(10, ge=1)
    """Trials in all, the defaults and the yardstick included."""
    objective: Literal["combined", "budget", "pareto"] = "combined"
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
    """Items per domain task of the last scoring, on questions that no choice was made on; by
    default as many as ``evaluate.limit``."""
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


def check_storage_uri(uri: str) -> str:
    """``uri``, if it is one of a storage and holds no secret.

    Raises:
        ConfigError: it is not; the message does not repeat what might be a secret.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        parts = urlsplit("")
    form = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///DIR"
    if parts.scheme not in STORAGE_SCHEMES:
        raise ConfigError(f"storage must be {form}, got the scheme {parts.scheme!r}")
    # A secret may itself hold a slash, so that what follows is no host any more.
    if {"@", ":"} & set(parts.netloc) or any(w in parts.query for w in ("secret", "password")):
        raise ConfigError(
            f"storage must be {form}, without credentials, which would be in files and logs; "
            "every node needs them in its environment (AWS_ACCESS_KEY_ID), its role, or "
            "~/.aws/credentials"
        )
    place = parts.path if parts.scheme == "file" else parts.netloc
    if not place.strip("/") or (parts.scheme == "file" and parts.netloc):
        raise ConfigError(f"storage must be {form}, got {uri}")
    return uri


class ResourceSettings(Settings):
    """Where it runs; does not change a result (``train.reduction = "strict"``)."""

    workers: Range | None = None
    """Fewest and most training workers of a trial; derived by default."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials side by side; derived by default."""
    actors: Range | None = None
    """Fewest and most recording actors; derived by default."""
    resize_seconds: float = Field(60.0, gt=0)
    """How often training looks for workers that it could add."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and torch threads, of a worker or an actor."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker or an actor; a fraction lets several share one."""
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom resources of a worker or an actor, as nodes were started with: ``{nvme = 1}``."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the node of a worker or an actor must have:
    ``{"ray.io/accelerator-type" = "L4"}``."""
    storage: str | None = None
    """Where nodes that share no disk keep what they exchange: ``s3://BUCKET/PREFIX``,
    ``gs://BUCKET/PREFIX``, with the parameters that pyarrow knows, or ``file:///DIR``. For
    ``record`` and ``train``."""

    @field_validator("storage")
    @classmethod
    def _is_storage(cls, uri: str | None) -> str | None:
        return uri if uri is None else check_storage_uri(uri)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, limits in (("workers", self.workers), ("actors", self.actors)):
            if limits and not 1 <= limits[0] <= limits[1]:
                raise ValueError(
                    f"{name} must be [fewest, most] with 1 <= fewest <= most, got {list(limits)}"
                )
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(
                "gpus_per_worker must be a whole number or at most 1: only one GPU can be shared, "
                f"got {self.gpus_per_worker}"
            )
        if reserved := {"CPU", "GPU", "memory", "lrmc_trial"} & self.custom.keys():
            raise ValueError(
                f"custom must not name {sorted(reserved)[0]}; use cpus_per_worker or "
                "gpus_per_worker"
            )
        return self

    def of_worker(self) -> dict[str, float]:
        """What one worker or actor needs, by Ray's names."""
        need: dict[str, float] = {"CPU": self.cpus_per_worker}
        if self.gpus_per_worker:
            need["GPU"] = self.gpus_per_worker
        return need | self.custom


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
                raise ValueError(f"parameters.{name} is no setting of train{_suggest(name)}")
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
        return self

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

    def recorded_tau(self) -> float:
        """The tau at which Stage 0 records: one from which every trial can be cut."""
        return self.record.tau if self.record.tau is not None else self.wanted_tau()


SettingsType = TypeVar("SettingsType", bound=Settings)

_RULES = {
    "model_type": "must be a section of settings",
    "dict_type": "must be a section of settings",
    "tuple_type": "must be a list",
    "missing": "is missing",
    "too_short": "must not be empty",
}
"""What pydantic says in Python's terms, in TOML's."""
_SHOULD = re.compile("^[A-Z][a-z]+ should")


def _suggest(key: str, known: Iterable[str] = TrainSettings.model_fields) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f". Did you mean '{close[0]}'?" if close else ""


def _locate(
    settings: type[Settings], location: tuple[Any, ...]
) -> tuple[type[Settings], FieldInfo | None]:
    """The section that ``location`` leads to, and the last known setting on the way."""
    field = None
    for part in location:
        if field is not None:
            inner = (get_args(field.annotation) or (field.annotation,))[-1]
            if isinstance(inner, type) and issubclass(inner, Settings):
                settings = inner
        field = settings.model_fields.get(str(part), field)
    return settings, field


def validate(
    settings: type[SettingsType],
    values: Mapping[str, Any],
    source: str,
    *,
    of_file: Mapping[str, Any] | None = None,
) -> SettingsType:
    """``settings`` made from ``values``.

    Args:
        settings: a class of settings.
        values: by section and key.
        source: where they come from.
        of_file: what ``source`` says, before the command line changed it; what is wrong with
            ``values`` but not with this is the command line's fault.

    Raises:
        ConfigError: with every broken setting, its value, the rule and the nearest known name.
    """
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        problems = _in_words(settings, error)
    own = set(problems)
    if of_file is not None:
        try:
            settings.model_validate(dict(of_file))
            own = set()
        except ValidationError as error:
            own = set(_in_words(settings, error))
    blamed = {
        source: [problem for problem in problems if problem in own],
        "command line": [problem for problem in problems if problem not in own],
    }
    raise ConfigError(
        "; ".join(f"{name}: {'; '.join(lines)}" for name, lines in blamed.items() if lines)
    )


def _in_words(settings: type[Settings], error: ValidationError) -> list[str]:
    """Every problem with its value, the rule and the nearest known name."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        section, field = _locate(settings, problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = _suggest(str(problem["loc"][-1]), section.model_fields)
            lines.append(f"unknown setting {key}{close}")
        elif problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}" if key else message)
        else:
            rule = _RULES.get(problem["type"]) or _SHOULD.sub("must", problem["msg"])
            rule = rule.replace("False", "false")
            text = " ".join((field.description or "").split()) if field else ""
            meaning = f" ({text})" if text else ""
            lines.append(f"{key} {rule}, got {problem['input']!r}{meaning}")
    return lines


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


def find_space(name: str) -> Path:
    """The space file ``name``: a path, or one of those shipped in ``tune_spaces/``.

    Raises:
        IncompleteArtifactError: there is no such file.
    """
    here = Path(__file__).parent
    shipped = [folder for folder in (here / "tune_spaces", here.parent / "tune_spaces")]
    if Path(name).is_file():
        return Path(name)
    for folder in shipped:
        for candidate in (folder / Path(name).name, folder / f"{Path(name).name}.toml"):
            if candidate.is_file() and Path(name).parent.name in ("", "tune_spaces"):
                return candidate
    names = sorted({path.name for folder in shipped for path in folder.glob("*.toml")})
    raise IncompleteArtifactError(
        f"space file {name} does not exist; give a path, or one of those that are shipped: "
        + ", ".join(names)
    )


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: the file is not TOML.
        IncompleteArtifactError: the file does not exist.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteArtifactError(f"{path} does not exist; give a settings file") from None
    except ValueError as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``values`` with every ``section.key=value`` laid over it; values are written as in TOML.

    A bare word that is not TOML is taken as a string, so ``train.loss=full`` needs no quotes.

    Raises:
        ConfigError: an override has no ``=`` or no key.
    """
    result = _copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"an override is written section.key=value, got {override!r}; "
                "for example train.lr=1e-5"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            value = text
        table = result
        for part in parts[:-1]:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key} cannot be set: {part} is not a section")
            table = inner
        table[parts[-1]] = value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def load_settings(space: Path | None, overrides: Iterable[str] = ()) -> RunSettings:
    """The settings of a run from its TOML file (defaults without one) and the overrides.

    Raises:
        ConfigError: see :func:`validate`.
    """
    values = read_toml(space) if space is not None else {}
    source = str(space) if space is not None else "settings"
    return validate(RunSettings, apply_overrides(values, overrides), source, of_file=values)
