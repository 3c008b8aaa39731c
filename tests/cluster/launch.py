"""clusters/local.yaml, filled in for the hosts of a lab."""

import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.lab import ROOT, Lab

SETTINGS = {
    "PYTHONPATH": "$HOME/lrmc_ray",  # what `ray up` copied, not what is installed
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A lost host is noticed after 6 seconds instead of 30.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # A host that is cut off ends its own processes after this, instead of a minute: until then
    # its worker holds the lock of the one that writes.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}


def filled_in(lab: Lab, *, cpus: int) -> dict[str, Any]:
    """The shipped file with addresses, key and a Python that is there already, and small stores.

    Everything else is as it is shipped: copying the package and the token, the order of the
    commands, the token, the MLflow server, what listens where.
    """
    text = (ROOT / "clusters" / "local.yaml").read_text(encoding="utf-8")
    store = "--object-store-memory=100000000"
    for change, value in (
        ("CHANGE-head", lab.hosts["head"].address),
        ("CHANGE-worker-1", lab.hosts["worker1"].address),
        ("CHANGE-worker-2", lab.hosts["worker2"].address),
        ("CHANGE-user", "root"),
        ("~/.ssh/id_ed25519", str(lab.directory / "key")),
        ("python3 -m venv ~/venv", f"ln -s {sys.prefix} ~/venv"),
        ("~/venv/bin/pip install -q -e ~/lrmc_ray -c ~/constraints.txt", "true"),
        ("--head --port", f"--head --include-dashboard=false {store} --port"),
        ("--address=$RAY", f"{store} --num-cpus={cpus} --address=$RAY"),
    ):
        assert text.count(change) >= 1, change
        text = text.replace(change, value)
    assert "CHANGE" not in text.partition("cluster_name")[2]
    config: dict[str, Any] = yaml.safe_load(text)
    exports = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    config["setup_commands"].append(
        f"grep -q OMP_NUM ~/.bashrc || echo 'export {exports}' >> ~/.bashrc"
    )
    return config


def write_config(lab: Lab, *, cpus: int) -> Path:
    """The path of :func:`filled_in` as a file."""
    path = lab.directory / "local.yaml"
    path.write_text(yaml.safe_dump(filled_in(lab, cpus=cpus), sort_keys=False), encoding="utf-8")
    return path
