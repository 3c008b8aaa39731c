"""The files of one training run, where its workers and its driver find them.

Two classes with one interface, :class:`RunFiles`, chosen by :func:`run_files` alone:
:class:`LocalRun`, whose workers and driver all see the run's directory, and :class:`StoredRun`,
whose nodes exchange by a storage. The loop and the driver say when something must be seen by the
others; where there is one directory it is seen already, so a local run has little to do.
"""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS
from lrmc_ray.files.place import LocalPlace, Place
from lrmc_ray.train.checkpoints import discard_after, list_checkpoints, step_of
from lrmc_ray.train.stored import RAY, RESERVATION, StoredRun


class RunFiles(Protocol):
    """One training run's files, seen from a worker or from the driver."""

    @property
    def directory(self) -> Path:
        """Where this process keeps them; all see it if the run is local."""

    @property
    def place(self) -> Place:
        """Where nodes find what is not the run's own: the model, the record, other trials."""

    # Rank 0

    def begin(self) -> None:
        """Take over the run, with its history and the newest checkpoint that is whole.

        Raises:
            DataError: there are checkpoints, and all are damaged.
        """

    def push(self, step: int, *, keep: int, also: Collection[int]) -> None:
        """Show the others the checkpoint behind ``step``, and remove what is no longer kept.

        Args:
            step: steps done.
            keep: newest checkpoints that stay.
            also: steps whose checkpoints stay, too.

        Raises:
            DirectoryInUseError: another rank 0 has taken over.
        """

    def push_decision(self) -> None:
        """Show the others the decision about a trial, before anybody acts on it."""

    def followed(self) -> AbstractContextManager[None]:
        """Let the driver see the metrics, and hear of its wishes, while the run goes on."""

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints behind ``step``, wherever they are."""

    def note_reservation(self, name: str) -> None:
        """Write down under which name Ray keeps the run's resources."""

    def end(self) -> None:
        """Show the driver the model and the whole history."""

    # Any rank

    def pull(self, step: int) -> None:
        """Have the checkpoint behind ``step`` in the directory of this process.

        Raises:
            DataError: it is not what was written.
        """

    def leave(self) -> None:
        """Clear this node of what it fetched; of the ranks other than 0."""

    # The driver

    def for_workers(self) -> Callable[[], "RunFiles"]:
        """What makes these files in a worker; it can be sent to one."""

    def ray_storage(self) -> dict[str, Any]:
        """Arguments of Ray's ``RunConfig``: where Ray Train keeps what it writes itself."""

    def clear_ray(self) -> None:
        """Remove what Ray Train wrote, which nobody reads."""

    def steps(self) -> list[int]:
        """The checkpoints that were written to their end, ascending, good or not."""

    def ask(self) -> None:
        """Wish for a checkpoint."""

    def is_asked(self) -> bool:
        """Whether a wish for a checkpoint has not been fulfilled yet."""

    def forget_wishes(self) -> None:
        """Take back what an earlier command asked for."""

    def reservation(self) -> str | None:
        """The name that rank 0 of an earlier command noted; None if there is none."""

    def forget_reservation(self) -> None:
        """Remove the note: the resources have been given back."""

    def shown(self) -> AbstractContextManager[None]:
        """Follow the metrics in the directory of this process while the run goes on."""

    def is_finished(self) -> bool:
        """Whether another machine has finished the run."""

    def fetch_finished(self) -> None:
        """Bring the run that another machine has finished to this node; its manifest last."""

    def fetch(self) -> None:
        """Bring model, ledger and metrics of a run that has come to its end to this node.

        Raises:
            DataError: the model is not what was written.
        """

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Declare the run finished to other machines, and remove what only they needed."""

    def clear(self) -> None:
        """Remove what was copied, but for the decision, which other trials compare with."""


@dataclass(frozen=True)
class LocalRun:
    """A run whose directory the driver and all workers see."""

    directory: Path
    place: Place = field(default_factory=LocalPlace)

    def begin(self) -> None:
        """Everything is here."""

    def push(self, step: int, *, keep: int, also: Collection[int]) -> None:
        """All see it already; who saved it has removed the others."""

    def push_decision(self) -> None:
        """All see it already."""

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """The driver reads the same files."""
        yield

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints behind ``step``."""
        discard_after(self.directory / CHECKPOINTS, step)

    def note_reservation(self, name: str) -> None:
        """Write ``name`` into a file."""
        (self.directory / RESERVATION).write_text(name, encoding="utf-8")

    def end(self) -> None:
        """All see it already."""

    def pull(self, step: int) -> None:
        """It is here."""

    def leave(self) -> None:
        """Nothing was fetched."""

    def for_workers(self) -> Callable[[], RunFiles]:
        """The same directory, whatever directory a worker runs in."""
        return partial(LocalRun, self.directory.resolve())

    @property
    def _scratch(self) -> Path:
        return self.directory / RAY

    def ray_storage(self) -> dict[str, Any]:
        """A folder of the run's directory."""
        return {"storage_path": str(self._scratch.resolve())}

    def clear_ray(self) -> None:
        """Remove that folder."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of the checkpoints in the directory."""
        return [step_of(path) for path in list_checkpoints(self.directory / CHECKPOINTS)]

    def ask(self) -> None:
        """Make a file that rank 0 looks for after every step."""
        (self.directory / CHECKPOINT_NOW).touch()

    def is_asked(self) -> bool:
        """Whether that file is still there."""
        return (self.directory / CHECKPOINT_NOW).exists()

    def forget_wishes(self) -> None:
        """Remove that file."""
        (self.directory / CHECKPOINT_NOW).unlink(missing_ok=True)

    def reservation(self) -> str | None:
        """What the file says; None if there is none."""
        try:
            return (self.directory / RESERVATION).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def forget_reservation(self) -> None:
        """Remove the file."""
        (self.directory / RESERVATION).unlink(missing_ok=True)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """They are in the directory as rank 0 writes them."""
        yield

    def is_finished(self) -> bool:
        """False: who has the lock of the directory has looked there."""
        return False

    def fetch_finished(self) -> None:
        """Everything is here."""

    def fetch(self) -> None:
        """Everything is here."""

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """There is no other machine to tell."""

    def clear(self) -> None:
        """Nothing was copied."""


def run_files(place: Place, directory: Path, name: str) -> RunFiles:
    """The files of the run that this process keeps in ``directory``.

    Args:
        place: where nodes find each other's files.
        directory: need not be there yet.
        name: of the run in a storage.
    """

    def local() -> RunFiles:
        return LocalRun(directory)

    return place.either(local, lambda storage: StoredRun(storage, name, directory))
