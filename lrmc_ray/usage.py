"""What a process has used since some moment: CPU seconds, and the most memory at once."""

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

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
