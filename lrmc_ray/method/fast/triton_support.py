"""Whether Triton's kernels can be used: they are a further way, never the only one."""

import functools
import importlib.util
import logging
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

SWITCH = "LRMC_TRITON"
"""Environment variable: ``1`` lets losses and steps on a GPU go through the kernels."""
_LEAST_CAPABILITY = (8, 0)
_log = logging.getLogger(__name__)


@functools.cache
def is_installed() -> bool:
    """Whether Triton is there, which comes with torch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def is_wanted() -> bool:
    """Whether the kernels may be chosen by themselves.

    Not unless it is asked for: no GPU has run them yet (``benchmarks/gpu_round.sh`` is to show that
    they are right and fast there).
    """
    return os.environ.get(SWITCH) == "1"


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as tests have it do."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def works_on_gpu() -> bool:
    """Whether a kernel can be compiled and started; tried once.

    Triton wants a C compiler and Python's headers at its first kernel, and the kernels want a GPU
    with the shared memory of compute capability 8.0. Without them the losses and the optimizer go
    on by torch's operators; the log says what Triton could not do.
    """
    if not is_installed() or torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return False
    try:
        from lrmc_ray.method.fast.rounding_triton import set_to_one

        set_to_one[(1,)](torch.zeros(1, device="cuda"))
    except Exception as error:  # whatever a compiler, a driver or Triton itself raises
        _log.warning(
            "Triton cannot be used, so losses and steps take longer: %s",
            str(error).partition("\n")[0],
        )
        return False
    return True


def at_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Where kernels for ``tensor`` start: Triton takes the current device, whatever the tensors."""
    found: AbstractContextManager[object] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return found
