"""The manifest for KubeRay: its schema, and the rules that hold for the other cluster files."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from lrmc_ray.cluster.cluster_file import load_cluster, placeholders
from lrmc_ray.errors import ConfigError
from tests.support.kuberay import NETWORK_POLICY, RAY_CLUSTER

PATH = Path(__file__).parents[2] / "clusters" / "kuberay.yaml"


@pytest.fixture
def manifest():
    return yaml.safe_load(PATH.read_text())


@pytest.fixture
def cluster(manifest):
    return manifest["items"][0]


def groups(cluster):
    spec = cluster["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_it_is_of_the_schema(manifest):
    assert (manifest["apiVersion"], manifest["kind"], len(manifest["items"])) == ("v1", "List", 2)
    for schema in (RAY_CLUSTER, NETWORK_POLICY):
        jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest["items"][0], RAY_CLUSTER)
    jsonschema.validate(manifest["items"][1], NETWORK_POLICY)


def change(cluster, path, value):
    changed = copy.deepcopy(cluster)
    *outer, last = path
    inner = changed
    for key in outer:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "headGroupSpec"], None),
        (["spec", "workerGroupSpecs", 0, "groupName"], None),
        (["spec", "workerGroupSpecs", 0, "maxReplicas"], "8"),
        (["spec", "workerGroupSpecs", 0, "maxWorkers"], 8),
        (["spec", "headGroupSpec", "resources"], {"CPU": 0}),
        (["spec", "headGroupSpec", "rayStartParams"], {"num-gpus": 0}),
        (["spec", "authOptions", "mode"], "on"),
        (["spec", "autoscalerOptions", "env", 0], {"value": "0"}),
        (["spec", "headGroupSpec", "template", "spec", "containers"], None),
    ],
)
def test_the_schema_finds_mistakes(cluster, path, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(change(cluster, path, value), RAY_CLUSTER)


def test_the_head_runs_no_training_and_workers_come_and_go(cluster):
    spec = cluster["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert 0 < spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 3600
    head, worker = groups(cluster)
    assert head["resources"] == {"CPU": "0", "lrmc_trial": "64"}
    assert 0 == worker["minReplicas"] == worker["replicas"] < worker["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    asked = container["resources"]
    assert asked["limits"] == asked["requests"]  # Ray takes what is there from the limits
    assert asked["limits"]["nvidia.com/gpu"] == "1"


def test_nothing_is_open(manifest, cluster):
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    containers = [c for group in groups(cluster) for c in group["template"]["spec"]["containers"]]
    for environment in [spec["autoscalerOptions"]["env"], *(c["env"] for c in containers)]:
        assert {entry["name"]: entry["value"] for entry in environment} == {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "AUTOSCALER_METRIC_PORT": "-1",
            "DASHBOARD_METRIC_PORT": "-1",
        }
    own = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}
    policy = manifest["items"][1]["spec"]
    assert policy["podSelector"] == own
    assert policy["ingress"] == [{"from": [{"podSelector": own}]}]


def test_all_pods_share_the_directory_and_the_version_is_the_tested_one(cluster):
    assert cluster["spec"]["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-" in PATH.read_text()
    images = set()
    for group in groups(cluster):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        assert mounted["shared"] == "/mnt/shared"
        assert pod["securityContext"]["runAsNonRoot"]
    (image,) = images
    assert re.search("@sha256:", image)


def test_what_only_the_user_knows_is_marked(manifest):
    marked = placeholders(manifest)
    assert len(marked) == 5
    assert all(any(w in m for w in ("image", "claimName", "gpu.product")) for m in marked)


def test_the_doctor_says_who_checks_it():
    with pytest.raises(ConfigError, match="kubectl apply --dry-run=server"):
        load_cluster(PATH)
