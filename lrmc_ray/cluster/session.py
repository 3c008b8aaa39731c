"""Start Ray for one command, or join a cluster, and leave nothing behind."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrmc_ray.cluster.checks import check_place_seen
from lrmc_ray.cluster.resources import TRIAL_SLOT, TRIAL_SLOTS, local_cpus
from lrmc_ray.errors import ResourceError
from lrmc_ray.files.place import place_of

_log = logging.getLogger(__name__)
RAY_LOG = "ray.log"
ANSWER_SECONDS = 10.0
"""How long a cluster's head may take to accept a connection."""
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the commands show their own
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables on stdout
    # A trial's process that is slow to end its thread would make the next trial fail in its place.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_gcs_server_port_wait_time_s": "120",  # the first start after a boot reads a cold disk
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
def no_preemption() -> Iterator[None]:
    """Leave Ray's watcher of nodes that are taken away off, unless the user has set it."""
    if _PREEMPTION_WATCHER in os.environ:  # as the user wants it
        yield
        return
    os.environ[_PREEMPTION_WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[_PREEMPTION_WATCHER]


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
    for name, value in RAY_ENVIRONMENT.items():
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
        no_preemption() if address == "local" else contextlib.nullcontext(),
    ):
        handler = signal.getsignal(signal.SIGTERM)
        _start(address, num_cpus, verbose)
        _keep_sigterm(handler)
        try:
            if address != "local":
                check_place_seen(place_of(storage), log.parent)
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
        _start_here(num_cpus or local_cpus(), verbose)
        return
    _check_answers(address)
    try:
        # The nodes were started with an environment of their own.
        env_vars = {name: os.environ[name] for name in RAY_ENVIRONMENT if name != "RAY_AUTH_MODE"}
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


def _start_here(num_cpus: int, verbose: bool) -> None:
    """Start Ray on this machine; if its processes take too long to come up, once more.

    Raises:
        ResourceError: they took too long twice.
    """
    import ray

    _ensure_token()
    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                resources={TRIAL_SLOT: TRIAL_SLOTS},
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level="WARNING",
            )
            return
        except Exception as error:  # Ray has no type for this
            if "timed out" not in str(error).lower():
                raise
            ray.shutdown()
            if is_last:
                raise ResourceError(
                    "Ray must start on this machine, and its processes were not there in time, "
                    f"twice ({error}); try again when the machine has less to do"
                ) from error
            _log.warning("Ray's processes were not there in time; it is started once more")


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
    # Ray's logger writes there, too. A disk that is full has its own error, and not one for a line.
    raises, logging.raiseExceptions = logging.raiseExceptions, False
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = shown
    try:
        yield
    finally:
        shown.flush()
        logging.raiseExceptions = raises
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
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        path.chmod(0o600)
    except OSError as error:  # a home that cannot be written: one for this session alone
        _log.debug("no token is kept: %s", error)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
