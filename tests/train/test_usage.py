"""CPU seconds and peak memory, against work and allocations of known size."""

import subprocess
import sys
import time
from pathlib import Path

import torch

from lrmc_ray.train.measures import Usage

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_cpu_seconds_are_those_of_work_and_not_of_waiting():
    usage = Usage(CPU)
    time.sleep(0.3)
    assert usage.cpu_seconds < 0.1
    start = time.process_time()
    while time.process_time() - start < 0.2:
        pass
    assert 0.2 <= usage.cpu_seconds < 0.4


PEAK = """
import torch
from lrmc_ray.train.measures import Usage

MIB = 2**20
CPU = torch.device("cpu")
before = bytearray(300 * MIB)  # larger than what comes after
del before
usage = Usage(CPU)
low = usage.peak_bytes
block = bytearray(200 * MIB)
del block
print((usage.peak_bytes - low) // MIB, (Usage(CPU).peak_bytes - usage.peak_bytes) // MIB)
"""


def test_the_peak_is_that_since_it_was_begun_and_stays_when_memory_is_given_back():
    """In a process of its own: one that has freed memory before may take it from there."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, later = map(int, done.stdout.split())
    assert 190 <= peak < 230
    assert later < 10
