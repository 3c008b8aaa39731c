"""A training run whose workers share no disk: what crosses between nodes, and in which order.

Rank 0 works in a directory of its own node, as without a storage, and copies: the ledger and the
metrics, then a checkpoint, its marker last. Whoever goes on, on whatever node, takes the newest
checkpoint that is whole, with the ledger that was written before it. A rank 0 that lives on behind
a broken network notes at its next checkpoint that another one has taken over, and ends.
"""

import contextlib
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError, DirectoryInUseError, DiskError
from lrmc_ray.files.artifacts import MANIFEST, json_content, write_json
from lrmc_ray.files.beats import PROGRESS, beat
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS, LEDGER, METRICS, MODEL, RUNG
from lrmc_ray.files.place import StoredPlace
from lrmc_ray.files.storage import COMMITTED, Storage, files_below
from lrmc_ray.train.checkpoints import checkpoint_path, discard_after

_log = logging.getLogger(__name__)

PACE_SECONDS = 2.0
"""How often the metrics, and a wish for a checkpoint, cross between driver and rank 0."""


SIGN_SECONDS = 15.0
"""Shortest time between two signs of life that cross to the storage."""
METRICS_BYTES_PER_SECOND = 1e6
"""Metrics are copied as a whole: seldom enough that this much of them crosses in a second."""


WRITER = "writer"


RESERVATION = "reservation"
"""Holds the name under which Ray keeps the run's resources."""


RAY = "ray"
"""What Ray Train itself writes for its workers, and we do not read."""


HISTORY = (METRICS, LEDGER, RUNG)
"""What a run goes on writing, and takes up again. Only a trial has the last one."""


class StoredRun:
    """One run in a storage: the stored side of :class:`lrmc_ray.train.run_files.RunFiles`."""

    def __init__(self, storage: Storage, name: str, directory: Path) -> None:
        """The run ``name``, whose files this node has in ``directory``."""
        self.storage = storage
        self.name = name
        self.directory = directory
        self._token = uuid.uuid4().hex
        self._is_asked = False
        self._sent = -1
        self._next_sign = 0.0

    @cached_property
    def place(self) -> StoredPlace:
        """The storage, for what is not the run's own."""
        return StoredPlace(self.storage.uri)

    # Rank 0

    def begin(self) -> None:
        """Take over the run: its history, and the newest checkpoint that is whole.

        Raises:
            DataError: there are checkpoints, and all are damaged.
        """
        self.storage.write(f"{self.name}/{WRITER}", self._token.encode())
        shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)
        for name in HISTORY:
            (self.directory / name).unlink(missing_ok=True)
        _get_history(self)
        steps = self.steps()
        for step in reversed(steps):
            try:
                self.pull(step)
                return
            except DataError as error:
                _log.warning("%s; using the checkpoint before", error)
                self.storage.delete_all(self._checkpoint(step))
        if steps:
            raise DataError(
                f"all {len(steps)} checkpoints in {self.storage.place(self.name)}/{CHECKPOINTS} "
                f"are damaged; remove {self.storage.place(self.name)} to train from the start"
            )

    def push(self, step: int, *, keep: int, also: Collection[int]) -> None:
        """Copy the checkpoint behind ``step``, and remove what is no longer kept.

        Raises:
            DirectoryInUseError: another rank 0 has taken over.
        """
        self._check_alone()
        _push_history(self)
        path = checkpoint_path(self.directory / CHECKPOINTS, step)
        self.storage.publish(self._checkpoint(step), files_below(path))
        for old in self.steps()[:-keep]:
            if old not in also:
                self.storage.delete_all(self._checkpoint(old))
        if self._is_asked:
            self._is_asked = False
            self.storage.delete(f"{self.name}/{CHECKPOINT_NOW}")

    def end(self) -> None:
        """Copy the model, the whole history, and clear this node."""
        self._check_alone()
        _push_history(self)
        if (self.directory / MODEL).is_dir():
            self.storage.publish(f"{self.name}/{MODEL}", files_below(self.directory / MODEL))
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Copy the metrics now and then, and hear of a wish for a checkpoint."""

        def follow() -> None:
            self._send_metrics()
            self._send_sign()
            if self.storage.exists(f"{self.name}/{CHECKPOINT_NOW}"):
                self._is_asked = True
                (self.directory / CHECKPOINT_NOW).touch()

        with _repeated(follow, self.directory / METRICS):
            yield

    def _send_metrics(self) -> None:
        path = self.directory / METRICS
        size = path.stat().st_size if path.is_file() else -1
        # An attempt that was cut off must not overwrite what a later one has written.
        if size > self._sent and self._is_alone():
            self.storage.put(path, f"{self.name}/{METRICS}")
            self._sent = size

    def _send_sign(self) -> None:
        """Copy the sign of life of this worker, not too often."""
        path, now = self.directory / PROGRESS, time.monotonic()
        if now < self._next_sign or not path.is_file() or not self._is_alone():
            return
        self._next_sign = now + SIGN_SECONDS
        self.storage.put(path, f"{self.name}/{PROGRESS}")

    def push_decision(self) -> None:
        """Copy the decision about a trial, before anybody acts on it."""
        self.storage.put(self.directory / RUNG, f"{self.name}/{RUNG}")

    def _is_alone(self) -> bool:
        """Whether no later attempt has taken over."""
        return self.storage.read(f"{self.name}/{WRITER}") == self._token.encode()

    def _check_alone(self) -> None:
        if not self._is_alone():
            raise DirectoryInUseError(
                f"{self.storage.place(self.name)} may be written by one attempt at a time, and a "
                "later one has taken over; this one ends"
            )

    def note_reservation(self, name: str) -> None:
        """Write ``name`` where the driver finds it."""
        self.storage.write(f"{self.name}/{RESERVATION}", name.encode())

    # Any rank

    def pull(self, step: int) -> None:
        """Fetch the checkpoint behind ``step`` to this node.

        Raises:
            DataError: it is not what was written.
        """
        path = checkpoint_path(self.directory / CHECKPOINTS, step)
        self.storage.fetch(self._checkpoint(step), path)

    def leave(self) -> None:
        """Clear this node of what was fetched, unless rank 0 works here, too."""
        if not (self.directory / ".writer").exists():
            shutil.rmtree(self.directory, ignore_errors=True)

    def steps(self) -> list[int]:
        """The checkpoints that were written to their end, ascending, good or not."""
        place = f"{self.name}/{CHECKPOINTS}"
        return sorted(
            int(name.removeprefix("step_"))
            for name in self.storage.children(place)
            if name.startswith("step_") and self.storage.exists(f"{place}/{name}/{COMMITTED}")
        )

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints behind ``step``, here and in the storage."""
        discard_after(self.directory / CHECKPOINTS, step)
        for other in self.steps():
            if other > step:
                self.storage.delete_all(self._checkpoint(other))

    def _checkpoint(self, step: int) -> str:
        return f"{self.name}/{CHECKPOINTS}/{checkpoint_path(Path(), step).name}"

    # The driver

    def for_workers(self) -> Callable[[], "StoredRun"]:
        """The run in a directory that a worker's node has for it."""
        return partial(_on_this_node, self.storage.uri, self.name)

    def ray_storage(self) -> dict[str, Any]:
        """A prefix of the storage, and how Ray reaches it."""
        return {
            "storage_path": f"{self.storage.root}/{self.name}/{RAY}",
            "storage_filesystem": self.storage.filesystem,
        }

    def clear_ray(self) -> None:
        """Remove what Ray Train wrote; what cannot be removed now is when the run is committed."""
        with contextlib.suppress(DiskError):
            self.storage.delete_all(f"{self.name}/{RAY}")

    def is_finished(self) -> bool:
        """Whether the run has its manifest."""
        return self.storage.exists(f"{self.name}/{MANIFEST}")

    def fetch(self) -> None:
        """Bring model, ledger and metrics of a run that has come to its end to this node.

        Raises:
            DataError: the model is not what was written.
        """
        _get_history(self)
        if self.storage.committed(f"{self.name}/{MODEL}") is not None:
            model = self.storage.fetch(f"{self.name}/{MODEL}", self.directory / MODEL)
            (model / COMMITTED).unlink(missing_ok=True)

    def fetch_finished(self) -> None:
        """The same, of a run that another machine has finished; its manifest last."""
        self.fetch()
        write_json(self.directory / MANIFEST, self.storage.read_json(f"{self.name}/{MANIFEST}"))

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Declare the run finished, and remove what only an unfinished one needs."""
        self.storage.write(f"{self.name}/{MANIFEST}", json_content(manifest))
        for name in (CHECKPOINTS, RAY):
            self.storage.delete_all(f"{self.name}/{name}")
        for name in (WRITER, RESERVATION, CHECKPOINT_NOW, PROGRESS):
            self.storage.delete(f"{self.name}/{name}")

    def clear(self) -> None:
        """Remove the run, but for the decision about it, which other trials compare with."""
        for name, size in self.storage.children(self.name).items():
            if size is None:
                self.storage.delete_all(f"{self.name}/{name}")
            elif name != RUNG:
                self.storage.delete(f"{self.name}/{name}")

    def ask(self) -> None:
        """Wish for a checkpoint."""
        self.storage.write(f"{self.name}/{CHECKPOINT_NOW}", b"now")

    def is_asked(self) -> bool:
        """Whether a wish for a checkpoint has not been fulfilled yet."""
        return self.storage.exists(f"{self.name}/{CHECKPOINT_NOW}")

    def forget_wishes(self) -> None:
        """Take back what an earlier command asked for, in the storage or on this node."""
        (self.directory / CHECKPOINT_NOW).unlink(missing_ok=True)
        self.storage.delete(f"{self.name}/{CHECKPOINT_NOW}")

    def reservation(self) -> str | None:
        """The name that rank 0 noted; None if there is none."""
        noted = self.storage.read(f"{self.name}/{RESERVATION}")
        return None if noted is None else noted.decode()

    def forget_reservation(self) -> None:
        """Remove the note."""
        self.storage.delete(f"{self.name}/{RESERVATION}")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Bring the metrics to this node now and then, for whoever follows them here.

        A wish for a checkpoint that appears in this node's directory crosses the other way.
        """
        path, wish = self.directory / METRICS, self.directory / CHECKPOINT_NOW
        is_sent = False

        def follow() -> None:
            nonlocal is_sent
            if is_sent and not self.is_asked():
                wish.unlink(missing_ok=True)
                is_sent = False
            elif wish.exists() and not is_sent:
                self.ask()
                is_sent = True
            size = self.storage.size(f"{self.name}/{METRICS}")
            if size is not None and (not path.is_file() or size != path.stat().st_size):
                self.storage.get(f"{self.name}/{METRICS}", path)
            if (sign := self.storage.read(f"{self.name}/{PROGRESS}")) is not None:
                path.with_name(PROGRESS).write_bytes(sign)

        def follow_or_wait() -> None:
            try:
                follow()
            except DiskError:
                beat()  # whether rank 0 gets on is not known: that is no reason to end the run
                raise

        with _repeated(follow_or_wait, path):
            yield


def _push_history(run: StoredRun) -> None:
    for name in HISTORY:
        if (run.directory / name).is_file():
            run.storage.put(run.directory / name, f"{run.name}/{name}")


def _get_history(run: StoredRun) -> None:
    for name in HISTORY:
        if run.storage.exists(f"{run.name}/{name}"):
            run.storage.get(f"{run.name}/{name}", run.directory / name)


def _on_this_node(uri: str, name: str) -> StoredRun:
    """The run ``name``, as a worker sees it that knows nothing but the storage's address."""
    storage = Storage(uri)
    directory = storage.cache / name
    directory.mkdir(parents=True, exist_ok=True)
    return StoredRun(storage, name, directory)


@contextlib.contextmanager
def _repeated(work: Callable[[], None], metrics: Path) -> Iterator[None]:
    """Do ``work`` in a side thread, as often as the size of the metrics allows."""
    stop = threading.Event()

    def repeat() -> None:
        while True:
            size = metrics.stat().st_size if metrics.is_file() else 0
            if stop.wait(max(PACE_SECONDS, size / METRICS_BYTES_PER_SECOND)):
                return
            try:
                work()
            except (DiskError, DataError, OSError) as error:
                _log.debug("metrics are not followed: %s", error)  # they come with a checkpoint

    thread = threading.Thread(target=repeat, daemon=True, name="storage")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
