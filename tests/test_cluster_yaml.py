"""cluster.yaml: Ray's own validation, and what it must never open."""

import copy
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config():
    """As the cluster launcher sees it, defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full = prepare_config(copy.deepcopy(yaml.safe_load(TEXT)))
    validate_config(full)
    return full


def test_workers_may_come_and_go_and_the_head_runs_no_training(config):
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert head["resources"]["lrmc_trial"] > 0
    workers = [kind for name, kind in types.items() if name != config["head_node_type"]]
    assert workers
    for kind in workers:
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= config["max_workers"]
        assert kind["resources"]["GPU"] >= 1
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_nothing_listens_for_the_world(config):
    assert "0.0.0.0" not in TEXT
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for command in starts:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
        if "--head" in command:
            assert "--dashboard-host=127.0.0.1" in command
        if "mlflow server" in command:
            assert "--host 127.0.0.1" in command
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_no_secret_is_written_in_it():
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|password|secret_?key", TEXT, re.I)
    assert "~/.ray/auth_token" in TEXT  # where the user's own lies
