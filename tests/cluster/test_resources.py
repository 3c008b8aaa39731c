"""Requests that cannot be met answer at once, on one machine and attached to a cluster.

Each stage runs in this process, by its own
``main``, on a cluster of two nodes of two cores; nothing here waits for a model.
"""

import json
import os
import socket
import time

import pytest

from lrmc_ray.cluster.checks import check_model_shared, check_shared
from lrmc_ray.cluster.resources import (
    TRIAL_SLOT,
    Node,
    check_trial_slots,
    cluster_nodes,
    worker_slots,
)
from lrmc_ray.cluster.session import no_preemption, ray_session, watches_preemption
from lrmc_ray.config import ResourceSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import IncompleteArtifactError, ResourceError
from lrmc_ray.evaluate import command as evaluate
from lrmc_ray.record import command as record
from lrmc_ray.train import command as train
from lrmc_ray.tune import command as tune
from tests.support.tiny import make_data

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SECONDS = 30.0
STORE = 80 * 2**20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two raylets of two cores, one with a label and a custom resource, and their driver."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": STORE}
    made = Cluster(
        initialize_head=True,
        head_node_args={**node, "include_dashboard": False, "resources": {TRIAL_SLOT: 4}},
    )
    made.add_node(**node, labels={"zone": "b"}, resources={"nvme": 1})
    with ray_session(made.address, log=tmp_path_factory.mktemp("ray") / "ray.log"):
        yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "train.jsonl", num_rows=12)


def ran(main, *argv, capsys) -> tuple[int, float, str]:
    start = time.monotonic()
    code = run_command(main, list(map(str, argv)))
    return code, time.monotonic() - start, capsys.readouterr().err


IMPOSSIBLE = {
    "GPUs where there are none": ("resources.gpus_per_worker=1", "0 GPU (at most 0 on a node)"),
    "half a GPU": ("resources.gpus_per_worker=0.5", "0.5 GPU"),
    # The cluster has four cores; no node has three.
    "more cores than a node": ("resources.cpus_per_worker=3", "4 CPU (at most 2 on a node)"),
    "an unknown resource": ("resources.custom={tpu = 1}", "0 tpu"),
    "an unknown label": ('resources.labels={zone = "z"}', "0 nodes with zone = z"),
}


@pytest.mark.parametrize("override", IMPOSSIBLE)
@pytest.mark.parametrize(
    "stage", [record, train, evaluate, tune], ids=lambda m: m.__name__.split(".")[1]
)
def test_the_impossible_answers_at_once(
    cluster, tiny_model, data, tmp_path, capsys, stage, override
):
    asked, said = IMPOSSIBLE[override]
    code, seconds, error = ran(
        stage.main,
        *("--address", cluster.address, "--model", tiny_model, "--train-data", data),
        *("--output", tmp_path, "--domain-tasks", "capitals", "--general-tasks", "plain_english"),
        asked,
        capsys=capsys,
    )
    assert code == 6, error
    assert seconds < SECONDS
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "lower resources." in line


@pytest.mark.parametrize(
    ("stage", "asked"),
    [
        (record, "resources.actors=[9, 9]"),
        (tune, "resources.workers=[9, 9]"),
    ],
    ids=["record", "tune"],
)
def test_more_than_fit_side_by_side(cluster, tiny_model, data, tmp_path, capsys, stage, asked):
    code, seconds, error = ran(
        stage.main,
        *("--address", cluster.address, "--model", tiny_model, "--train-data", data),
        *("--output", tmp_path, "--domain-tasks", "capitals", "--general-tasks", "plain_english"),
        *(asked, "search.trials=1"),
        capsys=capsys,
    )
    assert (code, seconds < SECONDS) == (6, True), error


def test_slots_are_counted_node_by_node_with_labels_and_custom_resources(cluster):
    assert worker_slots(ResourceSettings()) == 4
    assert worker_slots(ResourceSettings(cpus_per_worker=2)) == 2
    assert worker_slots(ResourceSettings(labels={"zone": "b"})) == 2
    assert worker_slots(ResourceSettings(custom={"nvme": 0.5})) == 2
    assert sorted(node.resources["CPU"] for node in cluster_nodes()) == [2.0, 2.0]


def test_recording_actors_go_where_the_label_is(cluster, tiny_model, data, tmp_path, capsys):
    """A record made only where there is nvme is the record that one machine makes."""
    argv = ("--model", tiny_model, "--train-data", data, "--output", tmp_path, "--json")
    placed = ('resources.labels={zone = "b"}', "resources.custom={nvme = 0.5}")
    assert run_command(record.main, list(map(str, (*argv, *placed)))) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 12


class Group:
    def __init__(self, name, resources, count):
        self.name, self.resources, self.max_count = name, resources, count


def test_nodes_that_the_autoscaler_may_start_count(cluster, monkeypatch):
    """A cluster whose GPU nodes are all asleep can still run what needs them."""
    from ray._private.state import state

    groups = [Group("head", {TRIAL_SLOT: 64.0}, 1), Group("gpu", {"CPU": 8.0, "GPU": 1.0}, 3)]
    config = type("Config", (), {"node_group_configs": groups})
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    assert worker_slots(ResourceSettings(gpus_per_worker=1)) == 3
    assert worker_slots(ResourceSettings(gpus_per_worker=0.5)) == 6
    with pytest.raises(ResourceError, match=r"3 GPU \(at most 1 on a node\)"):
        worker_slots(ResourceSettings(gpus_per_worker=1, cpus_per_worker=9))


def test_gpus_that_nothing_uses_are_named_once(cluster, monkeypatch, caplog):
    nodes = [Node({"CPU": 8.0, "GPU": 2.0}, count=3)]
    monkeypatch.setattr("lrmc_ray.cluster.resources.cluster_nodes", lambda: nodes)
    assert worker_slots(ResourceSettings(gpus_per_worker=0.5)) == 12
    assert not caplog.messages
    assert [worker_slots(ResourceSettings()) for _ in range(2)] == [24, 24]
    (message,) = caplog.messages
    assert "6 GPU(s)" in message
    assert "resources.gpus_per_worker = 0" in message


def test_a_process_that_asked_for_no_gpu_sees_none(cluster, monkeypatch):
    """Else every recording actor of a CPU search would put its model onto the first GPU."""
    import ray

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    node = cluster.add_node(
        num_cpus=1, num_gpus=1, resources={"card": 1}, object_store_memory=STORE
    )

    def visible():
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    try:
        seen = {
            gpus: ray.remote(visible).options(num_gpus=gpus, resources={"card": 0.1}).remote()
            for gpus in (0, 1)
        }
        assert {gpus: ray.get(ref, timeout=60) for gpus, ref in seen.items()} == {0: "", 1: "0"}
    finally:
        cluster.remove_node(node)


def test_a_cluster_without_places_for_trials_is_refused(cluster, monkeypatch):
    check_trial_slots()
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(ResourceError, match=r"--resources='\{\"lrmc_trial\": 64\}'"):
        check_trial_slots()


def test_with_a_storage_trials_run_where_the_command_does(cluster, monkeypatch):
    """They keep what they make in the command's output directory, which no other node sees."""
    import ray

    check_trial_slots("s3://bucket/runs")
    nodes = [
        node | {"Resources": node["Resources"] | {TRIAL_SLOT: 64.0}}
        for node in ray.nodes()
        if node["Alive"]
    ]
    own = ray.get_runtime_context().get_node_id()
    (other,) = (node["NodeManagerAddress"] for node in nodes if node["NodeID"] != own)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    check_trial_slots()  # with a shared disk they may run anywhere
    with pytest.raises(ResourceError, match=rf"no other may have it; {other} has it"):
        check_trial_slots("s3://bucket/runs")


# What nodes must see


def test_directories_that_all_nodes_see(cluster, tmp_path, tiny_model):
    check_shared(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []  # the probe is gone
    check_model_shared(tiny_model)


def test_directories_that_a_node_does_not_see(cluster, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("lrmc_ray.cluster.checks._sees", lambda path, content: False)
    with pytest.raises(IncompleteArtifactError, match="must be seen by every node") as caught:
        check_shared(tmp_path)
    assert "--output DIR" in str(caught.value)
    assert not list(tmp_path.glob(".shared_*"))
    with pytest.raises(IncompleteArtifactError, match="HF_HOME and LRMC_CACHE"):
        check_model_shared(tiny_model)


def test_beside_other_nodes_a_trial_leaves_scoring_to_tasks_and_preemption_is_watched(cluster):
    import ray

    class Trial:
        def can_hold(self, count):
            from lrmc_ray.cluster.resources import can_hold_cores

            return can_hold_cores(count)

    trial = ray.remote(num_cpus=0)(Trial).remote()
    assert not ray.get(trial.can_hold.remote(1))
    assert watches_preemption()


@pytest.mark.parametrize("wanted", [None, "1", "0"])
def test_a_machine_of_ones_own_is_watched_for_preemption_only_if_wanted(wanted, monkeypatch):
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name, raising=False)
    if wanted is not None:
        monkeypatch.setenv(name, wanted)
    before = watches_preemption()
    assert before == (wanted != "0")
    with no_preemption():
        assert watches_preemption() == (wanted == "1")
    assert (os.environ.get(name), watches_preemption()) == (wanted, before)


# Addresses where there is no cluster


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("kind", ["nobody", "unknown host", "no address", "something else"])
def test_an_address_that_leads_nowhere_answers_at_once(tmp_path, free_port, kind, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("lrmc_ray.cluster.session.ANSWER_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {
            "nobody": f"127.0.0.1:{free_port}",
            "unknown host": "no-such-host.invalid:6379",
            "no address": "rubbish",
            "something else": f"127.0.0.1:{server.getsockname()[1]}",
        }[kind]
        start = time.monotonic()
        with (
            pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}"),
            ray_session(address, log=tmp_path / "ray.log"),
        ):
            pass
    assert time.monotonic() - start < SECONDS
