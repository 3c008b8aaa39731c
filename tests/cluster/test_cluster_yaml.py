"""The shipped cluster files: Ray's own validation, our rules, and what the rules find."""

import copy
from pathlib import Path

import pytest
import yaml

from lrmc_ray.cluster.cluster_file import cluster_slots, load_cluster, placeholders, problems
from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import ConfigError, IncompleteArtifactError, ResourceError

ROOT = Path(__file__).parents[2]
FOR_KUBECTL = ROOT / "clusters" / "kuberay.yaml"
FILES = [ROOT / "cluster.yaml", *sorted({*(ROOT / "clusters").glob("*.yaml")} - {FOR_KUBECTL})]
AWS, GCP, LOCAL = FILES
CLOUDS = [AWS, GCP]


def names(path):
    return path.name


def prepared(config):
    """As the cluster launcher sees it, defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def test_the_three_files_are_there():
    assert [load_cluster(path)["provider"]["type"] for path in FILES] == ["aws", "gcp", "local"]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_ray_accepts_it(path):
    full = prepared(load_cluster(path))
    assert full["available_node_types"]
    assert full["head_node_type"] in full["available_node_types"]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_rule_is_broken_before_and_after_ray_filled_in_its_defaults(path):
    assert problems(load_cluster(path)) == []
    assert problems(prepared(load_cluster(path))) == []


@pytest.mark.parametrize("path", FILES, ids=names)
def test_what_only_the_user_knows_is_marked(path):
    assert placeholders(load_cluster(path))


@pytest.mark.parametrize("path", CLOUDS, ids=names)
def test_workers_on_spot_come_and_go_and_the_head_runs_no_training(path):
    config = prepared(load_cluster(path))
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "lrmc_trial": 64}
    workers = [kind for name, kind in types.items() if name != config["head_node_type"]]
    assert workers
    for kind in workers:
        assert 0 == kind["min_workers"] < kind["max_workers"] <= config["max_workers"]
        assert kind["resources"]["GPU"] >= 1
        node = kind["node_config"]
        market = node.get("InstanceMarketOptions", {}).get("MarketType")
        model = [entry["provisioningModel"] for entry in node.get("scheduling", [])]
        assert market == "spot" or model == ["SPOT"]
    assert 0 < config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("path", FILES, ids=names)
def test_the_package_is_installed_in_the_versions_that_were_tested(path):
    config = load_cluster(path)
    install = [command for command in config["setup_commands"] if "pip install" in command]
    assert any("constraints.txt" in c and "lrmc_ray" in c for c in install)
    assert any("/mnt/shared" in command for command in config["setup_commands"])
    assert any(target.rstrip("/").endswith("lrmc_ray") for target in config["file_mounts"])
    excluded = set(config["rsync_exclude"])
    assert {".git", ".venv", "runs"} <= excluded


# Every rule catches what it is for


def broken(path, change):
    config = load_cluster(path)
    change(config)
    return problems(config)


def set_start(config, index, old, new):
    commands = config["head_start_ray_commands"]
    assert old in commands[index]
    commands[index] = commands[index].replace(old, new)


def image(config, value):
    config["available_node_types"]["gpu"]["node_config"] = {
        **config["available_node_types"]["gpu"]["node_config"],
        "ImageId": value,
    }


UNSAFE = {
    "dashboard for the world": (
        lambda c: set_start(c, 1, "127.0.0.1", "0.0.0.0"),
        "listens for the world",
    ),
    "dashboard by name": (
        lambda c: set_start(c, 1, "--dashboard-host=127.0.0.1", "--dashboard-host=head.example"),
        "dashboard-host=127.0.0.1",
    ),
    "no token": (lambda c: set_start(c, 1, "RAY_AUTH_MODE=token ", ""), "RAY_AUTH_MODE=token"),
    "metrics for everyone": (
        lambda c: set_start(c, 1, "RAY_enable_metrics_collection=0", ""),
        "must have RAY_enable_metrics_collection=0",
    ),
    "the autoscaler's metrics": (
        lambda c: set_start(c, 1, "AUTOSCALER_METRIC_PORT=-1", ""),
        "must have AUTOSCALER_METRIC_PORT=-1",
    ),
    "the dashboard's metrics": (
        lambda c: set_start(c, 1, "DASHBOARD_METRIC_PORT=-1", "DASHBOARD_METRIC_PORT=44227"),
        "must have DASHBOARD_METRIC_PORT=-1",
    ),
    "metrics switched off too late": (
        lambda c: c["head_start_ray_commands"].__setitem__(
            1,
            c["head_start_ray_commands"][1].replace("AUTOSCALER_METRIC_PORT=-1 ", "")
            + " ; AUTOSCALER_METRIC_PORT=-1",
        ),
        "must have AUTOSCALER_METRIC_PORT=-1",
    ),
    "worker without token": (
        lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
        "worker_start_ray_commands must start with RAY_AUTH_MODE=token",
    ),
    "Ray's own start": (lambda c: c.pop("head_start_ray_commands"), "must be given"),
    "MLflow for the world": (
        lambda c: set_start(c, 2, "--host 127.0.0.1", "--host 0.0.0.0"),
        "MLflow has no password",
    ),
    "MLflow's default host": (lambda c: set_start(c, 2, "--host 127.0.0.1", ""), "no password"),
    "MLflow's jobs": (
        lambda c: set_start(c, 2, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", ""),
        "must be false",
    ),
    "an open port": (
        lambda c: c["provider"].update(
            security_group={
                "IpPermissions": [
                    {"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
                ]
            }
        ),
        "opens ports 8265 to 8265",
    ),
    "a range of ports that has ssh in it": (
        lambda c: c["provider"].update(
            security_group={
                "IpPermissions": [
                    {"FromPort": 22, "ToPort": 10001, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}
                ]
            }
        ),
        "opens ports 22 to 10001",
    ),
    "no token file": (lambda c: c.update(file_mounts={"~/x": "."}), "bring the token"),
    "an access key": (
        lambda c: c["setup_commands"].append("export AWS_ACCESS_KEY_ID=AKIA" + "A" * 16),
        "an AWS access key",
    ),
    "a password in an address": (
        lambda c: set_start(c, 2, "sqlite:///$HOME/mlflow.db", "postgresql://me:pw@db/mlflow"),
        "a password in an address",
    ),
    "a secret in the environment": (
        lambda c: c["setup_commands"].append("export HF_TOKEN=abcdefgh12345678"),
        "holds a secret",
    ),
    "a token of the Hub": (
        lambda c: c["setup_commands"].append("huggingface-cli login hf_" + "a" * 34),
        "a Hugging Face token",
    ),
    "a private key": (
        lambda c: c["setup_commands"].append("echo '-----BEGIN OPENSSH PRIVATE KEY-----' > k"),
        "a private key",
    ),
    "a key in the checkout": (
        lambda c: c["auth"].update(ssh_private_key="keys/id_ed25519"),
        "outside of the checkout",
    ),
    "an image that changes": (lambda c: image(c, "latest_dlami"), "must be one image"),
    "no image": (lambda c: image(c, ""), "must be one image"),
    "a docker tag": (
        lambda c: c.update(docker={"image": "rayproject/ray:2.60.0-gpu", "container_name": "r"}),
        "pinned by its digest",
    ),
    "the old metadata service": (
        lambda c: c["available_node_types"]["gpu"]["node_config"].pop("MetadataOptions"),
        "IMDSv2",
    ),
    "a disk in the clear": (
        lambda c: c["available_node_types"]["gpu"]["node_config"].update(
            BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 100}}]
        ),
        "Encrypted: true",
    ),
    "no limit": (lambda c: c.pop("max_workers"), "max_workers must be set"),
    "no limit of a kind": (
        lambda c: c["available_node_types"]["gpu"].pop("max_workers"),
        "min_workers <= max_workers",
    ),
    "negative": (
        lambda c: c["available_node_types"]["gpu"].update(min_workers=-1),
        "min_workers <= max_workers",
    ),
    "never idle": (lambda c: c.update(idle_timeout_minutes=600), "idle_timeout_minutes"),
    "training on the head": (
        lambda c: c["available_node_types"]["head"].update(resources={"CPU": 8}),
        "the head's resources",
    ),
}


@pytest.mark.parametrize(("change", "said"), UNSAFE.values(), ids=UNSAFE)
def test_what_is_unsafe_is_found(change, said):
    found = broken(AWS, change)
    assert any(said in text for text in found)
    assert len(found) <= 2  # one change may break a general rule and a special one


def test_rules_of_the_other_providers():
    def family(config):
        disk = config["available_node_types"]["gpu"]["node_config"]["disks"][0]
        disk["initializeParams"] = {"sourceImage": "projects/p/global/images/family/common-cu"}

    found = broken(GCP, family)
    assert found
    assert all("not a family" in text for text in found)
    (found,) = broken(LOCAL, lambda c: set_start(c, 1, "--num-cpus=0", "--num-cpus=8"))
    assert "--num-cpus=0" in found


def test_ssh_may_be_open_and_a_pinned_image_may_be_used():
    def change(config):
        config["provider"]["security_group"] = {
            "IpPermissions": [{"FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
        }
        config["docker"] = {"image": "r@sha256:" + "0" * 64, "container_name": "r"}
        image(config, "ami-0123456789abcdef0")

    assert broken(AWS, change) == []


# How many workers it brings


@pytest.mark.parametrize(
    ("resources", "slots"),
    [
        ({"gpus_per_worker": 1}, 8),
        ({"gpus_per_worker": 0.5}, 16),
        ({"gpus_per_worker": 0.25, "cpus_per_worker": 4}, 16),  # the CPUs are fewer
        ({}, 64),
        ({"cpus_per_worker": 3}, 16),  # two of three on each node, whatever the total
    ],
)
def test_workers_that_fit_side_by_side(resources, slots):
    assert cluster_slots(load_cluster(AWS), ResourceSettings(**resources)) == slots


def test_the_head_is_no_place_for_workers():
    config = load_cluster(AWS)
    config["available_node_types"]["head"] |= {"resources": {"CPU": 64}, "max_workers": 1}
    assert cluster_slots(config, ResourceSettings()) == 64


def test_the_limit_of_the_whole_cluster_counts():
    config = load_cluster(AWS)
    config["max_workers"] = 3
    assert cluster_slots(config, ResourceSettings(gpus_per_worker=1)) == 3


def test_what_does_not_fit_is_refused_with_what_to_change():
    with pytest.raises(ResourceError, match=r"1 GPU each must fit.*at most 1 on a node") as caught:
        cluster_slots(load_cluster(AWS), ResourceSettings(gpus_per_worker=1, cpus_per_worker=99))
    assert "lower resources.cpus_per_worker or resources.gpus_per_worker" in str(caught.value)
    with pytest.raises(ResourceError, match="0 nodes with zone = a"):
        cluster_slots(load_cluster(AWS), ResourceSettings(labels={"zone": "a"}))
    with pytest.raises(ConfigError, match="do not say what they have"):
        cluster_slots(load_cluster(LOCAL), ResourceSettings())


def test_files_that_are_none(tmp_path):
    with pytest.raises(IncompleteArtifactError, match="does not exist"):
        load_cluster(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_cluster(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([1]))
    with pytest.raises(ConfigError, match="section `provider`"):
        load_cluster(tmp_path / "list.yaml")
