"""Where the nodes of a run find each other's files: a directory that all of them see, or a storage.

:func:`place_of` chooses once, from the setting ``resources.storage``; nothing else asks whether
there is a storage. Both places answer the same questions:

    send(directory, name)   brings a directory to the other nodes; returns what they call it
    here(sent)              that directory on this node
    lend, borrowed          the same for a directory that stays at no node
    read, children, where   single files, below a name that all nodes use
    home(directory, name)   what all nodes call a directory that this node works in
    clear, publish_report   the end of a run
    check                   whether the place can be used at all

What nodes call a directory is its path in a :class:`LocalPlace`, where nothing is copied, and a
name in the storage, parts separated by ``/``, in a :class:`StoredPlace`. A stage whose files have
an order of their own has a pair of classes with one interface, and one function that takes the
right one by :meth:`Place.either`. A place is small and can be sent to any process.
"""

import contextlib
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lrmc_ray.errors import DiskError
from lrmc_ray.files.node_cache import use
from lrmc_ray.files.storage import Storage, check_storage, files_below

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Place(Protocol):
    """What both places offer. In a storage every method but ``home`` may raise DiskError."""

    @property
    def uri(self) -> str | None:
        """Address of the storage; None where all nodes see the same directories."""

    def check(self) -> None:
        """Refuse a place that this node cannot use.

        Raises:
            DiskError: the storage does not answer, or refuses; the message says why.
        """

    def either(self, local: Callable[[], T], stored: Callable[[Storage], T]) -> T:
        """What one of the two returns: ``local``, or ``stored`` of the storage.

        It chooses from a stage's pair of classes, or of checks.
        """

    def send(self, directory: Path, name: Callable[[], str]) -> str:
        """Bring ``directory`` to where all nodes see it, if it is not there.

        Args:
            directory: its files, hidden ones left out, are sent.
            name: says what to call it in a storage; asked only if there is one.

        Returns:
            What :meth:`here` and :meth:`borrowed` take on every node.
        """

    def here(self, sent: str) -> Path:
        """The directory ``sent`` on this node, fetched and verified unless it is there already.

        Raises:
            IncompleteArtifactError: it was not sent, or not to its end.
            DataError: a file is not what was sent.
        """

    def lend(self, directory: Path, *, name: str | None) -> AbstractContextManager[str]:
        """Let other nodes see ``directory`` for a while; gives what :meth:`borrowed` takes.

        Args:
            directory: of this node.
            name: what it was already sent as, perhaps. Where nothing of this name is in the
                storage, a copy is, until the context ends.
        """

    def borrowed(self, sent: str) -> AbstractContextManager[Path]:
        """The directory ``sent`` on this node, and not for longer than the context lasts."""

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""

    def children(self, name: str) -> list[str]:
        """Names of what is in a directory, one level down, in ascending order."""

    def where(self, name: str) -> str:
        """Where ``name`` is, for people to read."""

    def home(self, directory: Path, name: Callable[[], str]) -> str:
        """What all nodes call ``directory``, in which this node works: its path, or ``name()``."""

    def clear(self, name: str) -> None:
        """Remove what was copied to the storage below ``name``.

        Nothing where all nodes see the same directories: what is there is the result itself.
        """

    def publish_report(self, name: str, files: Mapping[str, Path]) -> None:
        """Keep a report in the storage, too, as ``reports/NAME``: this node may not last.

        Args:
            name: of the report.
            files: the report's, by their names in it. That they cannot be kept only warns.
        """


@dataclass(frozen=True)
class LocalPlace:
    """All nodes see the same directories, under the same paths: nothing is ever copied."""

    @property
    def uri(self) -> None:
        """None."""
        return

    def check(self) -> None:
        """Nothing can be wrong with it that a stage would not find itself."""

    def either(self, local: Callable[[], T], stored: Callable[[Storage], T]) -> T:
        """What ``local`` returns."""
        return local()

    def send(self, directory: Path, name: Callable[[], str]) -> str:
        """The path of ``directory``."""
        return str(directory)

    def here(self, sent: str) -> Path:
        """The directory itself."""
        return Path(sent)

    @contextlib.contextmanager
    def lend(self, directory: Path, *, name: str | None) -> Iterator[str]:
        """Give the path of ``directory``."""
        yield str(directory)

    @contextlib.contextmanager
    def borrowed(self, sent: str) -> Iterator[Path]:
        """Give the directory itself."""
        yield Path(sent)

    def read(self, name: str) -> bytes | None:
        """The content of the file ``name``, a path; None if there is none."""
        try:
            return Path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def children(self, name: str) -> list[str]:
        """Names in the directory ``name``, a path; none if it does not exist."""
        try:
            return sorted(path.name for path in Path(name).iterdir())
        except FileNotFoundError:
            return []

    def where(self, name: str) -> str:
        """``name``, a path."""
        return name

    def home(self, directory: Path, name: Callable[[], str]) -> str:
        """The path of ``directory``, absolute."""
        return str(directory.resolve())

    def clear(self, name: str) -> None:
        """Nothing was copied."""

    def publish_report(self, name: str, files: Mapping[str, Path]) -> None:
        """The report is where all nodes see it."""


@dataclass(frozen=True)
class StoredPlace:
    """Nodes share nothing but a storage; each keeps what it fetched in a directory of its own."""

    uri: str
    """Address of the storage; see :func:`lrmc_ray.config.check_storage_uri`."""

    @cached_property
    def storage(self) -> Storage:
        """The storage, opened by this process."""
        return Storage(self.uri)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens it itself: an open storage knows directories of this node.
        return StoredPlace, (self.uri,)

    def check(self) -> None:
        """Write, read and remove a small object, within a time limit."""
        check_storage(self.uri)

    def either(self, local: Callable[[], T], stored: Callable[[Storage], T]) -> T:
        """What ``stored`` returns of the storage."""
        return stored(self.storage)

    def send(self, directory: Path, name: Callable[[], str]) -> str:
        """Write the files, those of the same content left as they are; returns ``name()``."""
        sent = name()
        self.storage.publish(sent, files_below(directory))
        return sent

    def here(self, sent: str) -> Path:
        """The copy that this node keeps, from one command to the next; see ``node_cache``."""
        directory = self.storage.cache / sent
        use(directory)
        return self.storage.fetch(sent, directory)

    @contextlib.contextmanager
    def lend(self, directory: Path, *, name: str | None) -> Iterator[str]:
        """Give ``name`` if it is in the storage, else that of a copy, which is removed again."""
        if name is not None and self.storage.committed(name) is not None:
            yield name
            return
        copy = f"scoring/{uuid.uuid4().hex}"
        try:
            yield self.send(directory, lambda: copy)
        finally:
            try:
                self.storage.delete_all(copy)
            except DiskError as error:  # it must not hide why the context ends
                _log.warning("%s is left in the storage: %s", copy, error)

    @contextlib.contextmanager
    def borrowed(self, sent: str) -> Iterator[Path]:
        """Give a copy in a directory that is removed again."""
        cache = self.storage.cache
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="scoring-", dir=cache) as scratch:
            yield self.storage.fetch(sent, Path(scratch) / "model")

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none."""
        return self.storage.read(name)

    def children(self, name: str) -> list[str]:
        """The last parts of the names one level below ``name``."""
        return sorted(self.storage.children(name))

    def where(self, name: str) -> str:
        """The address of an object."""
        return self.storage.place(name)

    def home(self, directory: Path, name: Callable[[], str]) -> str:
        """``name()``."""
        return name()

    def clear(self, name: str) -> None:
        """Remove everything below ``name``."""
        self.storage.delete_all(name)

    def publish_report(self, name: str, files: Mapping[str, Path]) -> None:
        """Copy ``files`` to ``reports/NAME``."""
        try:
            self.storage.publish(f"reports/{name}", files)
        except DiskError as error:  # the report is on this node
            _log.warning("the report is not in the storage: %s", error)


def place_of(uri: str | None) -> Place:
    """The place that ``resources.storage`` names; the only place that asks whether there is one.

    Args:
        uri: address of a storage; None where all nodes see the output directory.
    """
    return LocalPlace() if uri is None else StoredPlace(uri)
