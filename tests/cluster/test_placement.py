"""How many workers fit, and what a request that cannot be met is told."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.cluster.beforehand import check_machine
from lrmc_ray.cluster.resources import ACTOR, Node, check_slots, count_slots, slots_on
from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import ResourceError


@pytest.mark.parametrize(
    ("node", "need", "slots"),
    [
        ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 1}, 1),
        ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.25}, 4),
        ({"CPU": 3, "GPU": 1}, {"CPU": 1, "GPU": 0.25}, 3),
        ({"CPU": 8, "GPU": 1.0}, {"CPU": 1, "GPU": 1 / 3}, 3),
        ({"CPU": 8, "nvme": 0.3}, {"CPU": 1, "nvme": 0.1}, 3),  # 2.9999999999999996 in floats
        ({"CPU": 8}, {"CPU": 1, "GPU": 1}, 0),
        ({"CPU": 8, "nvme": 2}, {"CPU": 2, "nvme": 1}, 2),
        ({}, {"CPU": 1}, 0),
    ],
)
def test_workers_on_one_node(node, need, slots):
    assert slots_on(node, need) == slots


@given(
    nodes=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), max_size=6),
    cpus=st.integers(1, 5),
    gpus=st.sampled_from([0, 0.25, 0.5, 1]),
)
@settings(deadline=None, derandomize=True)
def test_as_many_as_can_be_put_on_the_nodes_one_by_one(nodes, cpus, gpus):
    placed = 0
    for free_cpus, free_gpus in nodes:
        while free_cpus >= cpus and free_gpus >= gpus:
            free_cpus, free_gpus, placed = free_cpus - cpus, free_gpus - gpus, placed + 1
    resources = ResourceSettings(cpus_per_worker=cpus, gpus_per_worker=gpus)
    assert count_slots([Node({"CPU": c, "GPU": g}) for c, g in nodes], resources) == placed


def test_labels_choose_the_nodes():
    nodes = [
        Node({"CPU": 4}, {"zone": "a"}),
        Node({"CPU": 4}, {"zone": "b"}, count=3),
        Node({"CPU": 4}),
    ]
    assert count_slots(nodes, ResourceSettings()) == 20
    assert count_slots(nodes, ResourceSettings(labels={"zone": "b"})) == 12
    assert count_slots(nodes, ResourceSettings(labels={"zone": "b", "disk": "nvme"})) == 0


@pytest.mark.parametrize(
    ("resources", "least", "said"),
    [
        (
            {"cpus_per_worker": 5},
            1,
            "1 actor of 5 CPU each must fit, 0 do: the cluster has 8 CPU (at most 4 on a node) on "
            "2 nodes; lower resources.cpus_per_worker, or add nodes that have it",
        ),
        (
            {"gpus_per_worker": 0.5},
            2,
            "2 actors of 1 CPU, 0.5 GPU each must fit, 0 do: the cluster has 8 CPU (at most 4 on a "
            "node), 0 GPU (at most 0 on a node) on 2 nodes; lower resources.cpus_per_worker or "
            "resources.gpus_per_worker, or add nodes that have it",
        ),
        (
            {"cpus_per_worker": 4},
            3,
            "3 actors of 4 CPU each must fit, 2 do: the cluster has 8 CPU (at most 4 on a node) on "
            "2 nodes; lower the first number of resources.workers, or add nodes",
        ),
        (
            {"labels": {"zone": "c"}},
            1,
            "1 actor of 1 CPU each, where zone = c, must fit, 0 do: the cluster has 8 CPU (at most "
            "4 on a node), 0 nodes with zone = c on 2 nodes; lower resources.cpus_per_worker or "
            "resources.labels, or add nodes that have it",
        ),
    ],
)
def test_the_answer_says_what_is_missing_and_what_to_do(resources, least, said):
    nodes = [Node({"CPU": 4.0}), Node({"CPU": 4.0})]
    with pytest.raises(ResourceError, match=f"^{re.escape(said)}$") as caught:
        check_slots(nodes, ResourceSettings(**resources), least, "actor")
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("resources", "workers", "said"),
    [
        # Four actors without a GPU, then one worker that has the only one.
        ({"gpus_per_worker": 1, "gpus_per_actor": 0, "actors": (4, 4)}, True, None),
        (
            {"gpus_per_actor": 1, "actors": (2, 2)},
            True,
            f"2 {ACTOR}s of 1 CPU, 1 GPU each must fit, 1 does: this machine has 8 CPU, 1 GPU; "
            "lower the first number of resources.actors, or join a cluster (--address)",
        ),
        (
            {"gpus_per_worker": 1, "gpus_per_actor": 0, "workers": (2, 2)},
            True,
            "2 workers of 1 CPU, 1 GPU each must fit, 1 does: this machine has 8 CPU, 1 GPU; "
            "lower the first number of resources.workers, or join a cluster (--address)",
        ),
        ({"gpus_per_worker": 1, "gpus_per_actor": 0, "workers": (2, 2)}, False, None),
        (
            {"gpus_per_worker": 1, "gpus_per_actor": 2},
            False,
            f"1 {ACTOR} of 1 CPU, 2 GPU each must fit, 0 do: this machine has 8 CPU, 1 GPU; lower "
            "resources.cpus_per_worker or resources.gpus_per_actor, or join a cluster (--address)",
        ),
    ],
)
def test_workers_and_actors_are_looked_at_apart(resources, workers, said, monkeypatch):
    """On a machine of eight cores and one GPU; recording alone needs no workers."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    given = ResourceSettings(**resources)
    if said is None:
        check_machine(given, workers=workers, actors=True)
        return
    with pytest.raises(ResourceError, match=f"^{re.escape(said)}$"):
        check_machine(given, workers=workers, actors=True)


def test_what_fits_is_counted():
    assert check_slots([Node({"CPU": 4.0}, count=2)], ResourceSettings(), 8, "actor") == 8


def test_what_a_worker_needs():
    resources = ResourceSettings(cpus_per_worker=2, gpus_per_worker=0.5, custom={"nvme": 1.0})
    assert resources.of_worker() == {"CPU": 2, "GPU": 0.5, "nvme": 1.0}
    assert ResourceSettings().of_worker() == {"CPU": 1}
