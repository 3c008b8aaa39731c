"""Start Ray for one command, or join a cluster, and leave nothing behind."""

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import file_digest
from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import IncompleteArtifactError, LrmcError, ResourceError
from lrmc_ray.placement import Node, check_slots
from lrmc_ray.storage import CHECK_SECONDS, Storage, check_storage

_log = logging.getLogger(__name__)

TRIAL_SLOT = "lrmc_trial"
"""Custom resource of the node where searches run: one unit per waiting trial driver.

A trial's driver only waits for its workers. Were it to hold CPUs, the elastic policy, which counts
all CPUs of a node, would ask for workers that can never start.
"""
TRIAL_SLOTS = 64
RAY_LOG = "ray.log"
ANSWER_SECONDS = 10.0
"""How long a cluster's head may take to accept a connection."""
PROBE_SECONDS = 20.0
"""How long a node may take to say whether it sees the output directory."""
HELD_SECONDS = 60.0
"""How often a process that waits for cores says so."""
SHARED_SECONDS = 5.0
"""How long a file may take to be seen by another node."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the commands show their own
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables on stdout
    # A trial's process that is slow to end its thread would make the next trial fail in its place.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in the settings mean the same in every trial
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a run that has ended is noticed that much sooner
    # A worker whose peer was cut off is stuck in a collective; it is killed right afterwards.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
    "RAY_AUTH_MODE": "token",
    "RAY_enable_metrics_collection": "0",  # its port is open to the world, and asks for no token
    "AUTOSCALER_METRIC_PORT": "-1",  # so are these two's: with no port, they are not served
    "DASHBOARD_METRIC_PORT": "-1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process that asked for no GPU sees none
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


_PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray Train's switch for the process that tells workers that their node will be taken away."""


def watches_preemption() -> bool:
    """Whether Ray Train asks if nodes are about to be taken away; not on a machine of one's own."""
    return os.environ.get(_PREEMPTION_WATCHER, "1") not in ("0", "false", "False")


@contextlib.contextmanager
def _no_preemption() -> Iterator[None]:
    if _PREEMPTION_WATCHER in os.environ:  # as the user wants it
        yield
        return
    os.environ[_PREEMPTION_WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[_PREEMPTION_WATCHER]


def local_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def ray_session(
    address: str = "local",
    *,
    log: Path,
    num_cpus: int | None = None,
    verbose: bool = False,
    storage: str | None = None,
) -> Iterator[None]:
    """Ray for the duration of a command; a session that is already running is used as it is.

    Args:
        address: ``local`` starts Ray on this machine, ``auto`` or ``host:port`` joins a cluster.
        log: file for what Ray's own processes say, unless ``verbose``; in the output directory,
            which all nodes of a cluster must see where there is no ``storage``.
        num_cpus: cores that a local session may use; all by default.
        verbose: show the workers' output.
        storage: what all nodes of a cluster must reach in place of the output directory.

    Raises:
        ResourceError: the cluster cannot be reached.
        IncompleteArtifactError: some node does not see the output directory, or the storage.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    with (
        contextlib.nullcontext() if verbose else _stderr_to(log),
        _no_preemption() if address == "local" else contextlib.nullcontext(),
    ):
        handler = signal.getsignal(signal.SIGTERM)
        _start(address, num_cpus, verbose)
        _keep_sigterm(handler)
        try:
            if address != "local" and storage is not None:
                check_storage_seen(storage)
            elif address != "local":
                check_shared(log.parent)
            yield
        finally:
            ray.shutdown()


def _keep_sigterm(handler: Any) -> None:
    """Take SIGTERM back from Ray, whose own handler aborts the process three seconds after it.

    What ends in good order, such as the checkpoints of running trials, may take longer.
    """
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _start(address: str, num_cpus: int | None, verbose: bool) -> None:
    import ray

    if address == "local":
        _ensure_token()
        ray.init(
            address="local",
            num_cpus=num_cpus or local_cpus(),
            resources={TRIAL_SLOT: TRIAL_SLOTS},
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level="WARNING",
        )
        return
    _check_answers(address)
    try:
        # The nodes were started with an environment of their own.
        env_vars = {name: os.environ[name] for name in _ENVIRONMENT if name != "RAY_AUTH_MODE"}
        ray.init(
            address=address,
            runtime_env={"env_vars": env_vars},
            log_to_driver=verbose,
            logging_level="WARNING",
        )
    except ray.exceptions.AuthenticationError as error:
        raise ResourceError(
            f"the Ray cluster at {address} does not accept this machine's token "
            f"({str(error).strip().splitlines()[0]}); copy ~/.ray/auth_token from its head, with "
            "mode 600"
        ) from None
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from None


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes.

    Raises:
        ResourceError: nothing answers, or it is no address.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(f"{host}:{port}"):
        raise _no_cluster(address, ConnectionError("something else than Ray listens there"))


def _speaks_grpc(target: str) -> bool:
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


def _no_cluster(address: str, error: Exception) -> ResourceError:
    return ResourceError(
        f"no Ray cluster answers at {address} ({error}); start one with `ray up cluster.yaml`, "
        "give --address auto on its head or host:6379, or leave --address out to use this machine"
    )


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
    if gpus and not resources.gpus_per_worker:
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
            _log.debug("waiting for %d cores", count)
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


def check_shared(directory: Path) -> None:
    """Refuse an output directory that some node of the cluster does not see.

    The driver writes a file there, and a task on every node looks for it.

    Raises:
        IncompleteArtifactError: a node does not see the file; names the nodes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / f".shared_{os.urandom(8).hex()}"
    path.write_text(path.name, encoding="utf-8")
    try:
        blind = _nodes_without(_sees, str(path), path.name)
    finally:
        path.unlink(missing_ok=True)
    if blind:
        raise IncompleteArtifactError(
            "the output directory must be seen by every node of the cluster; "
            f"{directory.resolve()} is not by {', '.join(blind)}. Mount a shared file system (NFS, "
            "EFS, Filestore) at the same place on all nodes and give --output DIR on it, or "
            "--storage s3://BUCKET/PREFIX"
        )


def check_storage_seen(uri: str) -> None:
    """Refuse a storage that some node of the cluster cannot use.

    Raises:
        IncompleteArtifactError: a node does not find what the driver wrote, or cannot write; names
            the nodes.
    """
    storage = Storage(uri)
    name = f".shared_{os.urandom(8).hex()}"
    storage.write(name, name.encode())
    try:
        blind = _nodes_without(_reads, uri, name, seconds=CHECK_SECONDS + PROBE_SECONDS)
    finally:
        storage.delete(name)
    if blind:
        raise IncompleteArtifactError(
            f"the storage must be read and written by every node of the cluster; {uri} is not by "
            f"{', '.join(blind)}. See to the credentials there (AWS_ACCESS_KEY_ID when Ray is "
            "started, an instance role, or ~/.aws/credentials) and to the network"
        )


def check_model_shared(directory: Path) -> None:
    """Refuse a model that some node of the cluster cannot load.

    Raises:
        IncompleteArtifactError: a node does not see its files; names the nodes.
    """
    path = directory / "config.json"
    blind = _nodes_without(_sees, str(path.resolve()), path.read_text(encoding="utf-8"))
    if blind:
        raise IncompleteArtifactError(
            f"the model must be seen by every node of the cluster; {directory} is not by "
            f"{', '.join(blind)}. Copy it to the shared file system and give --model DIR there; "
            "for models of the Hub and the demo set HF_HOME and LRMC_CACHE to directories on it"
        )


def check_files_shared(files: Mapping[str, Path]) -> None:
    """Refuse task files that some node of the cluster does not have at the same place.

    Raises:
        IncompleteArtifactError: a node lacks one, or has another content; names the nodes.
    """
    for path in files.values():
        blind = _nodes_without(_has, str(path), file_digest(path))
        if blind:
            raise IncompleteArtifactError(
                f"{path} must be on every node of the cluster, with the same content, to ask what "
                f"it says; it is not on {', '.join(blind)}. Copy it there (`file_mounts` in the "
                "cluster's file), or to a file system that all nodes share"
            )


def _nodes_without(
    finds: Callable[[str, str], bool], *what: str, seconds: float = PROBE_SECONDS
) -> list[str]:
    """Addresses of the nodes on which ``finds(*what)``, which ends in ``seconds``, is false."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) < 2:
        return []
    probe = ray.remote(finds)
    asked = {
        probe.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(*what): node["NodeManagerAddress"]
        for node in alive
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    blind = []
    for answer in answered:
        # A node that does not answer is going or gone; Ray gives it no work either.
        with contextlib.suppress(ray.exceptions.RayError):
            if not ray.get(answer):
                blind.append(asked[answer])
    return sorted(blind)


def _sees(path: str, content: str) -> bool:
    """Runs on a node: whether it sees the driver's file. Network file systems may lag a little."""
    import time

    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if Path(path).read_text(encoding="utf-8") == content:
                return True
        time.sleep(0.1)
    return False


def _has(path: str, sha256: str) -> bool:
    """Runs on a node: whether it has this file."""
    try:
        return file_digest(Path(path)) == sha256
    except OSError:
        return False


def _reads(uri: str, name: str) -> bool:
    """Runs on a node: whether it reads the driver's object, and writes one."""
    try:
        check_storage(uri)  # within a time limit, which a client of its own does not keep
        return Storage(uri).read(name) == name.encode()
    except LrmcError:
        return False


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Send what is written past Python to ``log``.

    Ray's C++ core writes errors to the terminal that Ray itself calls harmless
    (https://github.com/ray-project/ray/issues/53727); Python's own stderr stays where it is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    terminal = os.dup(2)
    shown, python_stderr = os.fdopen(os.dup(2), "w", buffering=1), sys.stderr
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = shown
    try:
        yield
    finally:
        shown.flush()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)
        os.close(terminal)
        shown.close()


def release_orphaned_groups() -> int:
    """Remove the placement groups whose creator is dead; returns how many.

    Ray keeps such a group, and the cores in it, until the whole job ends: when a trial dies, so
    does the controller of its training, but not the group of the training's workers.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    own_job = ray.get_runtime_context().get_job_id()
    released = 0
    # Ray's public table of placement groups does not say who made them.
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        if (
            group.creator_actor_dead
            # Groups that the driver made, Tune's among them, have no creating actor to be alive.
            and set(group.creator_actor_id) - {0xFF}
            and not group.is_detached
            and group.creator_job_id.hex() == own_job
            and group.state != PlacementGroupTableData.REMOVED
        ):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            released += 1
    return released


def _ensure_token() -> None:
    """Make the secret that Ray's processes show each other, readable by its owner only."""
    if os.environ["RAY_AUTH_MODE"] != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not path.exists():
        import secrets

        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
