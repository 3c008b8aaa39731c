"""The whole recording job under kill -9, as benchmarks/faults.py runs it; a node that joins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import make_data

ROOT = Path(__file__).parents[2]
KEYS = [
    *("rows_expected", "rows_lost", "rows_duplicated", "unreadable_files"),
    *("recomputed_share", "corruptions_injected", "corruptions_detected"),
]


def faults(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/faults.py", *argv], cwd=ROOT, capture_output=True, text=True
    )


def test_the_dispatcher_knows_its_stages():
    assert faults("--help").returncode == 0
    unknown = faults("--stage", "cook")
    assert unknown.returncode == 2
    assert "invalid choice: 'cook'" in unknown.stderr
    shown = faults("--stage", "record", "--help")
    assert shown.returncode == 0
    assert "--kills" in shown.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_nothing_is_lost_however_recording_is_killed():
    argv = ["--stage", "record", "--kills", "10", "--seed", "3", "--rows", "600"]
    result = faults(*argv, "--corruptions", "70")
    assert result.returncode == 0, result.stdout + result.stderr
    scoreboard = json.loads(result.stdout.splitlines()[-1])
    assert list(scoreboard) == KEYS
    assert scoreboard["rows_expected"] >= 600
    assert scoreboard["rows_lost"] == scoreboard["rows_duplicated"] == 0
    assert scoreboard["unreadable_files"] == 0
    assert scoreboard["corruptions_injected"] == scoreboard["corruptions_detected"] == 70


JOIN = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=1)
import ray
ray.init(address=cluster.address, log_to_driver=False)
import lrmc_ray.record.prepare as prepare
import lrmc_ray.record.run as module
from lrmc_ray.config import load_settings
prepare.SMALLEST_SHARD_TOKENS = 1500
seen = set()
settings = load_settings(None, sys.argv[2:])
original = module.run_actors
def counted(*arguments):
    for part in original(*arguments):
        seen.add(part["name"])
        if len(seen) == 3:
            cluster.add_node(num_cpus=1)
        yield part
module.run_actors = counted
module.record(settings, Path(sys.argv[1]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_node_that_joins_is_put_to_work(tiny_model, tmp_path):
    """Ray Data looks at the cluster about every 20 seconds."""
    data = make_data(tmp_path / "train.jsonl", num_rows=10_000)
    log = tmp_path / "passes"
    environment = {"LRMC_TESTING": "1", "LRMC_FAULT_LOG": str(log), "RAY_AUTH_MODE": "disabled"}
    result = subprocess.run(
        [
            *(sys.executable, "-c", JOIN, str(tmp_path / "runs")),
            *(f'model.name="{tiny_model}"', f'data.train="{data}"', "train.tau=0.9"),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split() for line in log.read_text().splitlines()]
    actors = {pid for point, pid, *_ in lines if point == "record.shard_started"}
    assert len(actors) == 2
