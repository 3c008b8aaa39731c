"""What a run measures of itself: counts, metrics of a step, held-out loss, and the machine."""

import contextlib
import dataclasses
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.files.metrics_log import MetricsLog
from lrmc_ray.files.names import LEDGER, METRICS
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.measure import held_out_batches, held_out_nll, outside_mass
from lrmc_ray.method.microbatch import MicroBatch, Sample
from lrmc_ray.method.step_result import StepResult
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.train.learner import Learner
from lrmc_ray.train.ledger import Ledger

_log = logging.getLogger(__name__)


class Counts:
    """Sums over all steps of a run, those before a checkpoint included."""

    def __init__(self) -> None:
        self.totals = {
            "processed_tokens": 0,
            "original_tokens": 0,
            "padded_tokens": 0,
            "shared_tokens": 0,
            "bad_steps": 0,
            "supervised_positions": 0,
        }
        """By their names in the manifest."""

    def add(self, result: StepResult) -> None:
        """Count one more step."""
        self.totals["processed_tokens"] += result.num_processed
        self.totals["original_tokens"] += result.num_tokens
        self.totals["shared_tokens"] += result.num_shared
        self.totals["padded_tokens"] += result.num_padded
        self.totals["supervised_positions"] += result.num_supervised
        self.totals["bad_steps"] += not result.is_applied


def step_metrics(
    result: StepResult,
    *,
    seconds: float,
    epoch: float,
    world_size: int,
    outside: Mapping[str, float],
    optimizer: Any,
) -> dict[str, float]:
    """What is logged of one step, by its names in ``metrics.jsonl`` and MLflow.

    Args:
        result: of the step.
        seconds: that it took, everything between two steps included.
        epoch: how often every sample has been used, this step included.
        world_size: number of workers.
        outside: what :meth:`Probe.shared` returns.
        optimizer: asked for its angles if it measures them.
    """
    metrics = {
        "train/loss": result.loss,
        "train/anchor_kl": result.anchor,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.lr,
        "train/epoch": epoch,
        "train/supervised_tokens_per_second": result.num_supervised / seconds,
        "train/tokens_per_second": result.num_tokens / seconds,
        "train/processed_share": result.num_processed / result.num_tokens,
        "train/shared_share": result.num_shared / max(1, result.num_processed),
        "train/padding_share": 1
        - (result.num_processed - result.num_shared) / max(1, result.num_padded),
        "train/step_seconds": seconds,
        "subset/k_mean": result.mean_candidates,
        "subset/active_share": result.num_active / max(1, result.num_supervised),
        "elastic/world_size": float(world_size),
        **outside,
    }
    statistics = getattr(optimizer, "angle_statistics", None)
    if statistics is not None:
        angles = statistics()
        metrics["moclip/angle_deg"] = angles.mean_deg
        metrics["moclip/clipped_share"] = angles.clipped_share
    return metrics


class Probe:
    """The probability that the current model puts outside the candidates, now and then."""

    def __init__(
        self,
        settings: TrainSettings,
        head: Callable[[], OutputHead],
        *,
        group: WorkerGroup,
        device: torch.device,
    ) -> None:
        """Measure at every ``settings.probe_every``-th step.

        Args:
            settings: of the run.
            head: gives that of the model that is trained, whole at steps that are due.
            group: this worker and the others.
            device: where tensors are that workers exchange.
        """
        self._settings = settings
        self._head = head
        self._group = group
        self._device = device
        self._own = (0.0, 0.0, 0)

    def is_due(self, step: int) -> bool:
        """Whether it is time to measure at ``step``."""
        every = self._settings.probe_every
        return bool(every) and step % every == 0

    def measure(self, step: int, hidden_BTD: Tensor, batch: MicroBatch) -> None:
        """Measure at ``step`` on this worker, which has the positions in ``batch``."""
        if not self.is_due(step):
            return
        where = batch.supervised
        self._own = outside_mass(
            hidden_BTD[where.row_N, where.column_N],
            self._head(),
            where.candidates,
            num_positions=self._settings.probe_positions,
            seed=step,
        )

    def shared(self, step: int) -> dict[str, float]:
        """The metric of what was measured at ``step``, on whichever worker; all ask together."""
        if not self.is_due(step):
            return {}
        shared = torch.tensor(self._own, dtype=torch.float64, device=self._device)
        self._own = (0.0, 0.0, 0)
        self._group.sum_(shared)
        mean, stderr, num_positions = shared.tolist()
        if not num_positions:
            return {}
        stale = 1 - self._settings.tau
        if self._group.rank == 0 and mean - 2 * stderr > stale + 0.01:
            _log.warning(
                "step %d: the tuned model puts %.3f of its probability outside the candidates, "
                "more than 1 - tau = %.3f: the subsets are getting stale; train.refresh_every "
                "records them again",
                step,
                mean,
                stale,
            )
        return {"subset/rho": mean}


class HeldOut:
    """The loss on samples that are never trained on, and where it was lowest."""

    def __init__(
        self,
        settings: TrainSettings,
        samples: list[Sample],
        learner: Learner,
        *,
        group: WorkerGroup,
    ) -> None:
        """Score at every ``settings.evaluate_every``-th step, and at the last.

        Args:
            settings: of the run.
            samples: that are held out.
            learner: has the model that is trained.
            group: this worker and the others, who share the samples.
        """
        self._settings = settings
        self.batches = held_out_batches(samples)
        self._learner = learner
        self._group = group
        self.best: dict[str, float] = {}
        """``held_out_nll`` and ``step`` of the best model so far; empty if there is none."""

    @property
    def best_step(self) -> int | None:
        """Steps done at the best model so far."""
        return int(self.best["step"]) if self.best else None

    def score(self, done: int) -> dict[str, float]:
        """The metric after ``done`` steps, where it is time; all workers ask together."""
        every = self._settings.evaluate_every
        if not every or (done % every and done < self._settings.steps):
            return {}
        learner = self._learner
        learner.model.eval()
        with learner.whole_head() as head:
            model = dataclasses.replace(learner.language_model, head=head)
            nll = held_out_nll(model, self.batches, self._group, autocast=learner.autocast)
        learner.model.train()
        if math.isfinite(nll) and nll < self.best.get("held_out_nll", math.inf):
            self.best = {"held_out_nll": nll, "step": done}
        return {"train/held_out_nll": nll}


class Costs:
    """Seconds, processor time and memory of a run, those before a checkpoint included."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing.

        Args:
            device: whose memory counts if it is a GPU.
        """
        self._device = device
        self._before: dict[str, Any] = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_bytes": 0}
        self.start()

    def start(self) -> None:
        """Begin to count: what came before in this process was not training."""
        self._started = time.monotonic()
        self._usage = Usage(self._device)

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return float(self._before["seconds"]) + time.monotonic() - self._started

    def state(self, world_size: int) -> dict[str, Any]:
        """What a checkpoint keeps. Rank 0 asks, and takes the others to have done as much."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self._before["cpu_seconds"] + world_size * self._usage.cpu_seconds,
            "peak_memory_bytes": max(self._before["peak_memory_bytes"], self._usage.peak_bytes),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self._before = {name: state[name] for name in self._before}

    def total(self, group: WorkerGroup) -> dict[str, Any]:
        """Those of all workers, by their names in the manifest; all ask together."""
        seconds = self.seconds
        used = group.gather((self._usage.cpu_seconds, self._usage.peak_bytes))
        return {
            "train_seconds": round(seconds, 2),
            "cpu_seconds": round(self._before["cpu_seconds"] + sum(cpu for cpu, _ in used), 2),
            "peak_memory_bytes": max(
                self._before["peak_memory_bytes"], *(peak for _, peak in used)
            ),
        }


@dataclass(frozen=True)
class StepLog:
    """What rank 0 writes of every step: its metrics, the machine's, and the ledger's line."""

    metrics: MetricsLog
    ledger: Ledger
    system: "SystemMetrics"
    world_size: int
    """Of this attempt."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path, *, world_size: int, device: torch.device) -> Iterator[Self]:
        """Go on with the files in ``directory``.

        Args:
            directory: of the run.
            world_size: number of workers.
            device: watched, too, if it is a GPU.
        """
        with MetricsLog(directory / METRICS) as metrics, Ledger(directory / LEDGER) as ledger:
            yield cls(metrics, ledger, SystemMetrics(device), world_size)

    def write(self, result: StepResult, metrics: Mapping[str, float]) -> None:
        """Append one step.

        Raises:
            OSError: the disk is full.
        """
        self.metrics.log(result.step + 1, {**metrics, **self.system.sample()})
        self.ledger.write(
            step=result.step,
            sample_ids=result.sample_ids,
            world_size=self.world_size,
            loss=result.loss,
            applied=result.is_applied,
        )

    def sync(self) -> None:
        """Have the ledger on the disk, as it must be before a checkpoint."""
        self.ledger.sync()


_STATUS = Path("/proc/self/status")


_CLEAR = Path("/proc/self/clear_refs")


class Usage:
    """CPU seconds and peak memory of this process from now on."""

    def __init__(self, device: torch.device) -> None:
        """Begin to count; on a GPU its memory is what counts."""
        self._device = device
        self._cpu = time.process_time()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5")  # the kernel forgets the peak so far
        except OSError:  # not allowed everywhere: then it is the peak since the process began
            return

    @property
    def cpu_seconds(self) -> float:
        """Of all threads."""
        return time.process_time() - self._cpu

    @property
    def peak_bytes(self) -> int:
        """The most resident memory at once; on a GPU, the most that tensors held."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_MEGABYTE = 1e6


class SystemMetrics:
    """Samples of this node and of this process, rank 0's."""

    def __init__(self, device: torch.device) -> None:
        """Begin; ``device`` is watched too if it is a GPU."""
        self._device = device if device.type == "cuda" else None
        self._process = psutil.Process()
        self.sample()  # what the first real one is measured from

    def sample(self) -> dict[str, float]:
        """The metrics now; takes well under a millisecond."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        metrics = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": used / _MEGABYTE,
            "system/system_memory_usage_percentage": 100 * used / memory.total,
            "system/process_cpu_utilization_percentage": self._process.cpu_percent(),
            "system/process_memory_usage_megabytes": self._process.memory_info().rss / _MEGABYTE,
        }
        return metrics if self._device is None else metrics | _gpu(self._device)


def _gpu(device: torch.device) -> dict[str, float]:
    name = f"system/gpu_{device.index or 0}"
    free, total = torch.cuda.mem_get_info(device)
    metrics = {
        f"{name}_memory_usage_megabytes": (total - free) / _MEGABYTE,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # without NVIDIA's package for it
        metrics[f"{name}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return metrics
