"""Does every node see the output directory, the model, the files, the storage?"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lrmc_ray.errors import IncompleteArtifactError, LrmcError
from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.files.place import Place
from lrmc_ray.files.storage import CHECK_SECONDS, Storage, check_storage

PROBE_SECONDS = 20.0
"""How long a node may take to say whether it sees the output directory."""
SHARED_SECONDS = 5.0
"""How long a file may take to be seen by another node."""


def check_place_seen(place: Place, directory: Path) -> None:
    """Refuse a place of a run's files that some node of the cluster does not see.

    Args:
        place: the output directory itself, or a storage.
        directory: the output directory.

    Raises:
        IncompleteArtifactError: a node does not see it; names the nodes.
    """
    place.either(lambda: check_shared(directory), lambda storage: check_storage_seen(storage.uri))


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
        blind = _nodes_without(reads_storage, uri, name, seconds=CHECK_SECONDS + PROBE_SECONDS)
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


def reads_storage(uri: str, name: str) -> bool:
    """Runs on a node: whether it reads the driver's object, and writes one."""
    try:
        check_storage(uri)  # within a time limit, which a client of its own does not keep
        return Storage(uri).read(name) == name.encode()
    except LrmcError:
        return False
