"""Settings of the model, the data, recording, scoring, and of what the machines give."""

import math
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from lrmc_ray.config.base import DEMO, Range, Settings, Strings
from lrmc_ray.errors import ConfigError

STORAGE_SCHEMES = ("s3", "gs", "file")


class ModelSettings(Settings):
    """Which model is taught."""

    name: str = DEMO
    """Directory or Hugging Face id of a causal LM; ``demo`` is SmolLM2-135M-Instruct,
    ``gemma-270m`` Gemma 3 270M, whose terms are to be accepted."""
    revision: str | None = None
    """Commit, branch or tag on the Hub; none for a directory."""
    template_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, exclude_if=lambda options: not options
    )
    """What the chat template is given besides the messages, the same when learning and scoring, for
    example ``{enable_thinking = false}``."""

    @field_validator("template_options")
    @classmethod
    def _no_own_names(cls, options: dict[str, Any]) -> dict[str, Any]:
        taken = {"messages", "tools", "documents", "chat_template", "add_generation_prompt"}
        taken |= {"tokenize", "continue_final_message", "conversation", "return_dict"}
        if wrong := sorted(taken & options.keys()):
            raise ValueError(f"{wrong[0]} is set by the command itself; remove it")
        return options


class DataSettings(Settings):
    """What it is taught."""

    train: Strings = (DEMO,)
    """Files, folders, patterns or data sets of the Hub, ``DOMAIN=`` before one that has a domain of
    its own; ``demo`` is NL2SQL, ``packet_filter`` questions about network traffic, ``ct_radio``
    radio exam questions, ``english`` general text to replay."""
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
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights while recording. With ``bf16`` the head, the logits and the softmax stay
    float32, so that probabilities are those of the rounded model."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, most in (("k_max", self.k_max), ("prompt_k_max", self.prompt_k_max)):
            if most < self.k_min and not (name == "prompt_k_max" and most == 0):
                raise ValueError(
                    f"{name} must be at least k_min, got {most} < {self.k_min}; lower record.k_min"
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
    test_share: float = Field(0.5, ge=0, lt=1)
    """Share of every domain task's items that no trial is chosen by, kept for the end. ``nl2sql``,
    ``packet_filter`` and ``ct_radio`` have such items already. 0 keeps none."""
    test_seed: int = 0
    """Which items these are."""
    drift_samples: int = Field(16, ge=0)
    """Texts on which KL(base || tuned) is measured; 0 switches it off."""


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
    hang_seconds: float | None = Field(None, gt=0)
    """Time without progress after which a trial, a comparison's run or a scoring task is ended as
    hanging, with the stacks of its processes in the log; by default ten times the longest pause so
    far, or ten steps of the forecast, and at least ten minutes, thirty until it has begun."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and torch threads, of a worker or an actor."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker, and of an actor without ``gpus_per_actor``, at most 1; a fraction lets
    several share one."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs of a recording actor; over several, a whole number, it spreads the model's layers. By
    default as many as ``gpus_per_worker``."""
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom resources of a worker or an actor, as nodes were started with: ``{nvme = 1}``."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the node of a worker or an actor must have:
    ``{"ray.io/accelerator-type" = "L4"}``."""
    storage: str | None = None
    """Where nodes that share no disk keep what they exchange: ``s3://BUCKET/PREFIX``,
    ``gs://BUCKET/PREFIX``, with the parameters that pyarrow knows, or ``file:///DIR``."""

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
        if self.gpus_per_worker > 1:
            raise ValueError(
                "gpus_per_worker must be at most 1, since a worker uses one GPU, got "
                f"{self.gpus_per_worker:g}, whose others would be held and not used; train a model "
                "that one does not hold with train.parallel = 'shard' and more workers, and record "
                f"it with resources.gpus_per_actor = {math.ceil(self.gpus_per_worker)} or "
                "record.precision = 'bf16'"
            )
        if (self.gpus_per_actor or 0) > 1 and self.gpus_per_actor % 1:  # type: ignore[operator]
            raise ValueError(
                "gpus_per_actor must be a whole number where it is above 1, since an actor of "
                f"several GPUs has them for itself, got {self.gpus_per_actor:g}; round it"
            )
        if reserved := {"CPU", "GPU", "memory", "lrmc_trial"} & self.custom.keys():
            raise ValueError(
                f"custom must not name {sorted(reserved)[0]}; use cpus_per_worker or "
                "gpus_per_worker"
            )
        return self

    def of_actors(self) -> Self:
        """The same, with the GPUs of an actor for those of a worker."""
        if self.gpus_per_actor is None:
            return self
        return self.model_copy(update={"gpus_per_worker": self.gpus_per_actor})

    def whole_gpus_of_actor(self) -> int:
        """Devices over which an actor spreads the model; 1 without GPUs, or with a part of one."""
        return max(1, int(self.of_actors().gpus_per_worker))

    def of_worker(self) -> dict[str, float]:
        """What one worker or actor needs, by Ray's names."""
        need: dict[str, float] = {"CPU": self.cpus_per_worker}
        if self.gpus_per_worker:
            need["GPU"] = self.gpus_per_worker
        return need | self.custom
