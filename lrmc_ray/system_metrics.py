"""What a training run uses of its machine, sampled at every step into ``metrics.jsonl``.

Under MLflow's own names where it has one (``mlflow.system_metrics``), so that its page shows them
under "System metrics". They are part of the local log like all metrics: a dead MLflow server loses
none, and no thread runs beside training. Percentages of CPUs are means since the sample before.
"""

import contextlib
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_MEGABYTE = 1e6


class SystemMetrics:
    """Samples of this node and of this process, rank 0's."""

    def __init__(self, device: "torch.device") -> None:
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


def _gpu(device: "torch.device") -> dict[str, float]:
    import torch

    name = f"system/gpu_{device.index or 0}"
    free, total = torch.cuda.mem_get_info(device)
    metrics = {
        f"{name}_memory_usage_megabytes": (total - free) / _MEGABYTE,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # without NVIDIA's package for it
        metrics[f"{name}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return metrics
