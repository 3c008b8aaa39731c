"""How many workers fit: arithmetic on what nodes have and a worker needs. No Ray here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import ResourceError

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


def check_slots(nodes: Iterable[Node], resources: ResourceSettings, least: int, what: str) -> int:
    """Workers that fit on ``nodes``, if they are ``least`` or more.

    Args:
        nodes: all there are, and those that the autoscaler may start.
        resources: what a worker needs.
        least: workers without which nothing runs.
        what: what a worker is called, for example ``"training worker"``.

    Raises:
        ResourceError: fewer fit; says what is missing on how many nodes, and what to change.
    """
    nodes = list(nodes)
    slots = count_slots(nodes, resources)
    if slots >= least:
        return slots
    raise ResourceError(
        f"{least} {what}{'s' if least > 1 else ''} of {_text(resources)} must fit, "
        f"{slots} {'do' if slots != 1 else 'does'}: the cluster has {_totals(nodes, resources)} on "
        f"{sum(node.count for node in nodes)} nodes; {_remedy(resources, slots)}"
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


def _remedy(resources: ResourceSettings, slots: int) -> str:
    if slots:
        return "lower the first number of resources.workers or resources.actors, or add nodes"
    named = ["resources.cpus_per_worker"]
    named += ["resources.gpus_per_worker"] if resources.gpus_per_worker else []
    named += ["resources.custom"] if resources.custom else []
    named += ["resources.labels"] if resources.labels else []
    return f"lower {' or '.join(named)}, or add nodes that have it"
