"""What is sampled of the machine: against /proc, and a GPU whose numbers are known."""

import os
import time
from pathlib import Path

import pytest
import torch

from lrmc_ray.train.measures import SystemMetrics


def proc(path, name):
    """A value of /proc in megabytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def test_memory_is_that_of_proc():
    ballast = bytearray(os.urandom(1 << 20) * 64)
    found = SystemMetrics(torch.device("cpu")).sample()
    total, available = (proc("/proc/meminfo", name) for name in ("MemTotal:", "MemAvailable:"))
    used = found["system/system_memory_usage_megabytes"]
    assert used == pytest.approx(total - available, abs=0.1 * total)
    assert found["system/system_memory_usage_percentage"] == pytest.approx(100 * used / total)
    own = found["system/process_memory_usage_megabytes"]
    assert own == pytest.approx(proc("/proc/self/status", "VmRSS:"), rel=0.1)
    assert own > len(ballast) / 1e6
    assert all(name.startswith("system/") and "gpu" not in name for name in found)


def test_a_busy_process_is_seen_and_an_idle_one_is_not():
    system = SystemMetrics(torch.device("cpu"))
    before, start = time.process_time(), time.monotonic()
    while time.process_time() - before < 0.3:
        pass
    share = 100 * (time.process_time() - before) / (time.monotonic() - start)
    busy = system.sample()
    assert busy["system/process_cpu_utilization_percentage"] == pytest.approx(share, rel=0.25)
    assert 0 < busy["system/cpu_utilization_percentage"] <= 100
    time.sleep(0.3)
    assert system.sample()["system/process_cpu_utilization_percentage"] < 0.5 * share


@pytest.mark.parametrize("has_utilization", [True, False])
def test_a_gpu_is_watched_where_there_is_one(monkeypatch, has_utilization):
    def utilization(device):
        if not has_utilization:
            raise ModuleNotFoundError("nvidia-ml-py is not installed")
        return 37

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30_000_000, 80_000_000))
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    found = SystemMetrics(torch.device("cuda", 1)).sample()
    gpu = {name: value for name, value in found.items() if "gpu" in name}
    expected = {
        "system/gpu_1_memory_usage_megabytes": 50.0,
        "system/gpu_1_memory_usage_percentage": 62.5,
    }
    if has_utilization:
        expected["system/gpu_1_utilization_percentage"] = 37.0
    assert gpu == expected


def test_names_are_those_of_mlflow():
    """So that its page shows them where it shows its own."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monitor = CPUMonitor()
    monitor.collect_metrics()
    theirs = {f"system/{name}" for name in monitor.aggregate_metrics()}
    assert theirs <= set(SystemMetrics(torch.device("cpu")).sample())
