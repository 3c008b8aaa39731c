"""``train.precision = "auto"``: bf16 where the hardware computes in it and a first batch allows it.

The first global batch of a run goes forward and backward twice with the base's weights, in float32
and under autocast of bf16. Of the losses L and the gradients g of all that is trained::

    |L_bf16 - L_fp32| <= LOSS_DISTANCE |L_fp32|
    ||g_bf16 - g_fp32|| <= GRADIENT_DISTANCE ||g_fp32||

A search asks once, so that its trials can be compared with each other.
"""

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lrmc_ray.cluster.resources import task_options
from lrmc_ray.config import RunSettings, TrainSettings
from lrmc_ray.errors import LrmcError, TrainingError
from lrmc_ray.files.place import Place, place_of
from lrmc_ray.files.study import FoundPrecision
from lrmc_ray.models.directory import local_directory, send_model
from lrmc_ray.record.stored import record_here

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_log = logging.getLogger(__name__)

LOSS_DISTANCE = 0.01
"""Of the loss, relative."""

GRADIENT_DISTANCE = 0.1
"""Of the gradient, relative; that of another batch is further away by more than its own length."""

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of processors that multiply in bf16, as the Linux kernel calls them on x86 and on ARM."""

CPUINFO = Path("/proc/cpuinfo")


class Distances(NamedTuple):
    """How far bf16 is from float32 on one batch, relative."""

    loss: float
    gradient: float


def with_precision(settings: RunSettings, record: Path) -> RunSettings:
    """``settings`` with ``train.precision``, if it is ``auto``, turned into what it comes to.

    Needs a running Ray session: a worker tries it, on hardware as training will have.

    Args:
        settings: of a run, or what the trials of a search have in common.
        record: the finished record to train on.
    """
    if settings.train.precision != "auto":
        return settings
    return taking(settings, find_precision(settings, record))


def taking(settings: RunSettings, found: FoundPrecision) -> RunSettings:
    """``settings`` with the precision that was found."""
    train = settings.train.model_copy(update={"precision": found.precision})
    return settings.model_copy(update={"train": train})


def find_precision(settings: RunSettings, record: Path) -> FoundPrecision:
    """What ``auto`` comes to, found by a Ray task with the resources of a training worker.

    Raises:
        TrainingError: the task failed; the message has the cause.
        LrmcError: training would refuse the same.
    """
    import ray

    resources, place = settings.resources, place_of(settings.resources.storage)
    remote = ray.remote(_try_out).options(**task_options(resources))
    sent = send_model(place, local_directory(settings.model))
    path = str(record.resolve())
    task = remote.remote(settings.train, path, sent, place, resources.cpus_per_worker)
    try:
        found: FoundPrecision = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LrmcError):
            raise error.cause from None
        raise _failure(error.cause) from error
    except ray.exceptions.RayError as error:
        raise _failure(error) from error
    _log.info("train.precision = %s: %s", found.precision, found.reason)
    return found


def _failure(cause: object) -> TrainingError:
    return TrainingError(
        f"trying bf16 on the first batch failed: {cause!r}; set train.precision to fp32 or bf16"
    )


def _try_out(
    train: TrainSettings, record: str, model: str, place: Place, threads: int
) -> FoundPrecision:
    """Runs in a Ray task."""
    import torch

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not computes_bf16(device):
        kind = "GPU" if device.type == "cuda" else "processor"
        return FoundPrecision("fp32", f"this {kind} does not compute in bf16 by itself")
    return judge(
        distances(train, record_here(place, Path(record)), place.here(model), device=device)
    )


def judge(found: Distances) -> FoundPrecision:
    """Whether the two are near enough; one that is not finite is not."""
    is_near = found.loss <= LOSS_DISTANCE and found.gradient <= GRADIENT_DISTANCE
    return FoundPrecision(
        "bf16" if is_near else "fp32",
        f"on the first batch bf16 moves the loss by {found.loss:.2%} and the gradient by "
        f"{found.gradient:.1%} (allowed are {LOSS_DISTANCE:.0%} and {GRADIENT_DISTANCE:.0%})",
    )


def computes_bf16(device: "torch.device") -> bool:
    """Whether the hardware multiplies in bf16 itself; elsewhere it would be slower than fp32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_FLAGS & _processor_flags())


@functools.cache
def _processor_flags() -> set[str]:
    """What the kernel says of the first processor; nothing where there is no such file."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    of_first = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return set(" ".join(of_first).split())


def distances(
    train: TrainSettings, record: Path, model_directory: Path, *, device: "torch.device"
) -> Distances:
    """Loss and gradient of the first global batch in bf16 against float32, in this process.

    Args:
        train: of the run; its precision does not matter.
        record: the finished record.
        model_directory: the base model.
        device: where to compute.
    """
    import torch

    from lrmc_ray.method.training_loop import StepOptions, compute_gradients
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.models.borders import longest_packed
    from lrmc_ray.record.reader import Records
    from lrmc_ray.train.learner import Learner
    from lrmc_ray.train.samples import TrainingSamples

    settings = train.model_copy(update={"precision": "fp32"})
    samples = TrainingSamples(Records(record), settings)
    learner = Learner(settings, model_directory, device, samples)
    parameters = list(learner.trainable.parameters.values())

    def of(autocast: "torch.dtype | None") -> "tuple[float, list[Tensor]]":
        options = StepOptions(
            num_micro_batches=settings.micro_batches,
            autocast=autocast,
            attention_cost=learner.attention_cost,
            pack_up_to=longest_packed(learner.model.config),
            base=learner.base,
        )
        batch = [samples[index] for index in samples.indices_of_step(0)]
        batches = options.divide(batch, learner.loss.activity)
        found = compute_gradients(
            *(learner.trained_model, parameters, batches, learner.loss, options, WorkerGroup()),
            step=0,
        )
        supervised = max(1, sum(one.num_supervised for one in batches))
        prompt = max(1, sum(one.num_prompt for one in batches))
        loss = found.loss_sum / supervised + settings.anchor_weight * found.anchor_sum / prompt
        return loss, [p.grad for p in parameters if p.grad is not None]

    loss, gradients = of(None)
    loss_bf16, gradients_bf16 = of(torch.bfloat16)
    apart = [one - other for one, other in zip(gradients_bf16, gradients, strict=True)]
    return Distances(
        _ratio(abs(loss_bf16 - loss), abs(loss)), _ratio(_length(apart), _length(gradients))
    )


def _length(tensors: Sequence["Tensor"]) -> float:
    """Of all of them as one vector."""
    import torch

    return math.hypot(
        *(float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in tensors)
    )


def _ratio(part: float, whole: float) -> float:
    """0 where both are; infinite where the whole alone is, or where either is not a number."""
    if part == 0 and math.isfinite(whole):
        return 0.0
    found = part / whole if whole else math.inf
    return found if math.isfinite(found) else math.inf
