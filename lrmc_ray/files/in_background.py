"""Work in a thread of its own, one piece at a time, that can be given up."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


class GivenUpError(Exception):
    """The work was not to be finished any more."""


class InBackground:
    """At most one piece of work, beside what its owner does."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._work: Future[None] | None = None
        self._is_given_up = False
        self._committing = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether it has not ended."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work`` when the one before has ended.

        Raises:
            BaseException: whatever the one before raised.
        """
        self.wait()
        future: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._work = future
        # A process that ends does not wait for it.
        threading.Thread(target=run, daemon=True).start()

    def check(self) -> None:
        """Raise what the work raised, if it has ended."""
        if not self.is_busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the work.

        Raises:
            BaseException: whatever it raised.
        """
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def commit(self, last: Callable[[], None]) -> None:
        """Do the last part of the work, in its thread, unless it was given up.

        Raises:
            GivenUpError: it was.
        """
        with self._committing:
            if self._is_given_up:
                raise GivenUpError
            last()

    def give_up(self) -> None:
        """Let the work commit nothing from now on; what it commits at the moment is waited for."""
        with self._committing:
            self._is_given_up = True
