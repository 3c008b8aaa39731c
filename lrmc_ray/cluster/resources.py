"""How many workers fit on a machine or cluster, and holding cores of it."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import ResourceError
from lrmc_ray.files.beats import beat

ACTOR = "recording actor"
"""What messages call it."""

_ROUNDING = 1e-9
"""Three thirds of a GPU are one."""


@dataclass(frozen=True)
class Node:
    """A node, or a kind of nodes that the autoscaler may start."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    count: int = 1
    """Nodes of this kind."""


def slots_on(node: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Workers that need ``need`` each and fit on one node."""
    return int(min(node.get(name, 0.0) / amount + _ROUNDING for name, amount in need.items()))


def count_slots(nodes: Iterable[Node], resources: ResourceSettings) -> int:
    """Workers that fit on ``nodes`` side by side."""
    need, labels = resources.of_worker(), resources.labels
    return sum(
        node.count * slots_on(node.resources, need)
        for node in nodes
        if all(node.labels.get(name) == value for name, value in labels.items())
    )


def check_slots(
    nodes: Iterable[Node],
    resources: ResourceSettings,
    least: int,
    what: str,
    *,
    of: str = "the cluster",
) -> int:
    """Workers that fit on ``nodes``, if they are ``least`` or more.

    Args:
        nodes: all there are, and those that the autoscaler may start.
        resources: what a worker needs.
        least: workers without which nothing runs.
        what: what a worker is called, for example ``"training worker"``.
        of: whose the nodes are; one machine is called so.

    Raises:
        ResourceError: fewer fit; says what is missing on how many nodes, and what to change.
    """
    nodes = list(nodes)
    slots = count_slots(nodes, resources)
    if slots >= least:
        return slots
    if of == "the cluster":
        there = f"{_totals(nodes, resources)} on {sum(node.count for node in nodes)} nodes"
        remedy = _remedy(resources, slots, what)
    else:
        need = resources.of_worker()
        there = ", ".join(f"{nodes[0].resources.get(name, 0.0):g} {name}" for name in need)
        there += " and no labels" if resources.labels else ""
        lower = _remedy(resources, slots, what).partition(", or add")[0]
        remedy = f"{lower}, or join a cluster (--address)"
    raise ResourceError(
        f"{least} {what}{'s' if least > 1 else ''} of {_text(resources)} must fit, "
        f"{slots} {'do' if slots != 1 else 'does'}: {of} has {there}; {remedy}"
    )


def _text(resources: ResourceSettings) -> str:
    parts = [f"{amount:g} {name}" for name, amount in resources.of_worker().items()]
    labels = [f"{name} = {value}" for name, value in resources.labels.items()]
    return ", ".join(parts) + (f" each, where {' and '.join(labels)}," if labels else " each")


def _totals(nodes: Iterable[Node], resources: ResourceSettings) -> str:
    nodes = list(nodes)
    parts = []
    for name in resources.of_worker():
        total = sum(node.count * node.resources.get(name, 0.0) for node in nodes)
        most = max((node.resources.get(name, 0.0) for node in nodes), default=0.0)
        parts.append(f"{total:g} {name} (at most {most:g} on a node)")
    for name, value in resources.labels.items():
        with_label = sum(node.count for node in nodes if node.labels.get(name) == value)
        parts.append(f"{with_label} nodes with {name} = {value}")
    return ", ".join(parts)


def _remedy(resources: ResourceSettings, slots: int, what: str) -> str:
    if slots:
        setting = "resources.actors" if what == ACTOR else "resources.workers"
        return f"lower the first number of {setting}, or add nodes"
    named = ["resources.cpus_per_worker"]
    is_apart = what == ACTOR and resources.gpus_per_actor is not None
    gpus = "resources.gpus_per_actor" if is_apart else "resources.gpus_per_worker"
    named += [gpus] if resources.gpus_per_worker else []
    named += ["resources.custom"] if resources.custom else []
    named += ["resources.labels"] if resources.labels else []
    return f"lower {' or '.join(named)}, or add nodes that have it"


_log = logging.getLogger(__name__)
TRIAL_SLOT = "lrmc_trial"
"""Custom resource of the node where searches run: one unit per waiting trial driver.

A trial's driver only waits for its workers. Were it to hold CPUs, the elastic policy, which counts
all CPUs of a node, would ask for workers that can never start.
"""
TRIAL_SLOTS = 64
HELD_SECONDS = 5.0
"""How often a process that waits for cores says that it does not hang."""


def local_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cluster_nodes() -> list[Node]:
    """The nodes that are alive, and the kinds of nodes that the autoscaler may still start."""
    import ray
    from ray._private.state import state

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [Node(node["Resources"], node.get("Labels", {})) for node in alive]
    config = state.get_cluster_config()  # written by the autoscaler; there is no public interface
    for group in config.node_group_configs if config is not None else ():
        is_head = dict(group.resources).get(TRIAL_SLOT, 0) > 0
        running = sum(node.labels.get("ray.io/node-group") == group.name for node in nodes)
        if group.max_count > running and not is_head:
            labels = {"ray.io/node-group": group.name}
            nodes.append(Node(dict(group.resources), labels, group.max_count - running))
    return nodes


def worker_slots(resources: ResourceSettings, *, least: int = 1, what: str = "worker") -> int:
    """Workers that fit into the cluster, nodes that the autoscaler may start included.

    Raises:
        ResourceError: fewer than ``least``: asking Ray for them would wait for ever.
    """
    nodes = cluster_nodes()
    gpus = sum(node.count * node.resources.get("GPU", 0.0) for node in nodes)
    is_wanted = what == ACTOR and resources.gpus_per_actor == 0
    if gpus and not resources.gpus_per_worker and not is_wanted:
        _say_unused(gpus)
    return check_slots(nodes, resources, least, what)


@functools.cache
def _say_unused(gpus: float) -> None:
    """Once a process: on the CPU by default, on a machine with a GPU, is rarely what was meant."""
    _log.warning(
        "%g GPU(s) and none is used, since resources.gpus_per_worker = 0; 1 gives each worker one, "
        "0.5 lets two share one",
        gpus,
    )


def task_options(resources: ResourceSettings) -> dict[str, Any]:
    """Options of a Ray task that has what a training worker has, and is started again twice."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker,
        "resources": dict(resources.custom),
        "label_selector": dict(resources.labels) or None,
        "max_retries": 2,
        # A trial's own placement group has no CPUs to give.
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None),
    }


def can_hold_cores(count: int) -> bool:
    """Whether :func:`held_cores` can give this process ``count`` cores of its own node.

    Only an actor can: when it dies, `release_orphaned_groups` knows whose the cores were. And only
    with one node: beside others, the cores of this one may all be busy while those of others idle.
    """
    import ray

    if ray.get_runtime_context().get_actor_id() is None:
        return False
    alive = [node for node in ray.nodes() if node["Alive"]]
    return len(alive) == 1 and alive[0]["Resources"].get("CPU", 0) >= count


def fits_here(resources: ResourceSettings) -> bool:
    """Whether this process can work in place of a worker: cores of its node are all it takes."""
    needs = (resources.gpus_per_worker, resources.custom, resources.labels)
    return not any(needs) and can_hold_cores(resources.cpus_per_worker)


@contextlib.contextmanager
def held_cores(count: int) -> Iterator[None]:
    """Cores of this node for work in this very process, waited for until they are free."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    node = ray.get_runtime_context().get_node_id()
    # Without a name: Ray allows one group of each name, and trials hold cores side by side.
    group = placement_group([{"CPU": count}], bundle_label_selector=[{"ray.io/node-id": node}])
    try:
        while not group.wait(HELD_SECONDS):
            beat()
        yield
    finally:
        remove_placement_group(group)


def check_trial_slots(storage: str | None = None) -> None:
    """Refuse a cluster without a place for the drivers of trials.

    With a storage in place of a shared disk that is this node alone: they keep what they make in
    the output directory.

    Raises:
        ResourceError: no node has the custom resource, or another than this one.
    """
    import ray

    if not ray.cluster_resources().get(TRIAL_SLOT):
        raise ResourceError(
            f"a search needs a node with the custom resource {TRIAL_SLOT}, no node has it; start "
            f"the head with --resources='{{\"{TRIAL_SLOT}\": {TRIAL_SLOTS}}}', as cluster.yaml does"
        )
    own = ray.get_runtime_context().get_node_id()
    others = [
        node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and node["Resources"].get(TRIAL_SLOT)
    ]
    if storage is not None and others:
        raise ResourceError(
            f"with --storage a search runs on the node that has the custom resource {TRIAL_SLOT}, "
            f"and no other may have it; {', '.join(others)} has it. Run the command there, on the "
            "head, or give --output DIR on a file system that all nodes share"
        )
