"""How the C library deals with the memory of tensors that are freed.

A training step frees and takes the same memory again, gigabytes of it. glibc gives it back to the
kernel in between, which has to clear every page before it hands it out again: a fifth of a step's
processor time on a CPU. Told to keep it, it takes it from what was freed.
"""

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 32 * 2**20
"""Bytes of a block; glibc allows no more. Its own bound grows up to here."""
_FREE = 2**31 - 1
"""Bytes at the end of the heap that are not given back."""


def keep_freed_memory() -> bool:
    """Have this process keep the memory of freed blocks; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(
            mallopt(_M_TRIM_THRESHOLD, _FREE)
        )
    return False


def give_back_memory() -> bool:
    """Give the memory of freed blocks back to the kernel; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        return True
    return False
