"""What a training process uses of its machine: processor, memory, GPU."""

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


import contextlib
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


_STATUS = Path("/proc/self/status")


_CLEAR = Path("/proc/self/clear_refs")


class Usage:
    """CPU seconds and peak memory of this process from now on."""

    def __init__(self, device: "torch.device") -> None:
        """Begin to count; on a GPU its memory is what counts."""
        self._device = device
        self._cpu = time.process_time()
        if device.type == "cuda":
            import torch

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
            import torch

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
