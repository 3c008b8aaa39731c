"""Memory that a benchmark measures."""

import ctypes
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory during ``function`` over that before it; None where it cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None, f"no {field} in /proc/self/status"
    return int(found.group(1)) * 1024
