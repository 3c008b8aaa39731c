"""When a run saves a checkpoint, what it goes on from, and who may write.

Rank 0 saves; all workers hold the same state, so what it saves is everybody's. Of a model in shards
every worker saves its own, and rank 0 makes a checkpoint of them. A run never starts again from
step 0 where there were checkpoints.

Shards are written in a thread, while training goes on. There is one such save at a time: the next
one waits for it, and so does the end of training. Until all of it is there the one before counts.
"""

import contextlib
import copy
import fcntl
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError, DirectoryInUseError
from lrmc_ray.files.in_background import InBackground
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS, LEDGER
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.train.checkpoints import (
    begin_checkpoint,
    checkpoint_path,
    finish_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    partial_path,
    save_checkpoint,
)
from lrmc_ray.train.ledger import read_ledger
from lrmc_ray.train.run_files import RunFiles
from lrmc_ray.train.sharded_state import ShardedState

WRITER_SECONDS = 120.0
"""How long rank 0 waits for one of an earlier attempt to end."""


NOTICE_SHARE = 0.1
"""Share of the time that may go into checkpoints while a node is about to be taken away."""


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold the run in ``directory``: a worker whose driver was killed may live on for a while.

    Raises:
        DirectoryInUseError: it still does after ``WRITER_SECONDS``.
    """
    with (directory / ".writer").open("a") as file:
        deadline = time.monotonic() + WRITER_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DirectoryInUseError(
                        f"a worker of an earlier attempt still writes to {directory}; stop it"
                    ) from None
                time.sleep(0.2)
        yield


@dataclass
class _Save:
    """A checkpoint that is being saved."""

    step: int
    state: dict[str, Any]
    keep: int
    also: list[int]
    begun_at: float
    """Seconds, monotonic."""
    is_asked_for: bool
    """Whether somebody waits for it."""


class Checkpoints:
    """The checkpoints of one run, as one of its workers sees them."""

    def __init__(
        self,
        settings: TrainSettings,
        files: RunFiles,
        *,
        record: str,
        group: WorkerGroup,
        device: torch.device,
    ) -> None:
        """Look at nothing yet.

        Args:
            settings: of the run.
            files: of the run.
            record: name of the record that it trains on.
            group: this worker and the others.
            device: where tensors are that workers exchange.
        """
        self._settings = settings
        self._files = files
        self._directory = files.directory / CHECKPOINTS
        self._group = group
        self._device = device
        # What a checkpoint must agree with; nothing of the number of workers.
        self._claims: dict[str, Any] = {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "micro_batches": settings.micro_batches,
            "parallel": settings.parallel,
            "record": record,
        }
        self._asked = files.directory / CHECKPOINT_NOW
        self._saved_at = -math.inf
        self._save_seconds = 0.0
        self._background = InBackground()

    @contextlib.contextmanager
    def completed(self) -> Iterator[None]:
        """Wait at the end for the save that goes on; behind an error it is given up.

        Another attempt may begin then, and what this one has left half done never counts.
        """
        try:
            yield
            self.wait()
        finally:
            self._background.give_up()

    def is_due(self, done: int, is_preempted: bool) -> bool:
        """Whether rank 0 saves a checkpoint behind step ``done``."""
        if done % self._settings.checkpoint_every == 0 or self._asked.exists():
            return True
        pause = self._save_seconds / NOTICE_SHARE
        return (
            is_preempted
            and not self._background.is_busy
            and time.monotonic() - self._saved_at > pause
        )

    def agree(self, is_time: bool) -> bool:
        """What rank 0 says; all workers ask together.

        Raises:
            Exception: what the last save in shards failed with.
        """
        self._background.check()
        said = torch.tensor([int(is_time)], device=self._device)
        self._group.broadcast_(said, source=0)
        return bool(said)

    def path(self, step: int) -> Path:
        """Where the checkpoint behind ``step`` steps is."""
        return checkpoint_path(self._directory, step)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        best: int | None,
        shards: ShardedState | None = None,
    ) -> None:
        """Save ``state`` as the checkpoint behind ``step`` steps; rank 0 alone, or all with shards.

        With shards it goes on behind the return, unless somebody waits for it.

        Args:
            step: steps done.
            state: of the run; it gets back what it gives.
            best: step of the best model so far, whose checkpoint stays; None if there is none.
            shards: weights and moments that all workers write together.

        Raises:
            DirectoryInUseError: another rank 0 has taken over.
            Exception: what the last save in shards failed with.
        """
        state = {"step": step, "claims": self._claims, **state}
        save = _Save(
            step,
            state,
            self._settings.keep_checkpoints,
            [] if best is None else [best],
            begun_at=time.monotonic(),
            is_asked_for=self._asked.exists(),
        )
        if shards is None:
            save_checkpoint(self._directory, step, state, keep=save.keep, also=save.also)
            self._made_known(save)
            return
        self.wait()
        shards.stage()
        if self._group.rank == 0:
            save.state = copy.deepcopy(state)  # it changes with the next step
        # Without an older one there is nothing to go back to.
        is_waited_for = save.is_asked_for or not list_checkpoints(self._directory)
        self._background.start(lambda: self._write(save, shards))
        if self._group.rank == 0 and is_waited_for:
            self.wait()

    def wait(self) -> None:
        """Wait for the save that goes on, if one does.

        Raises:
            Exception: what it failed with.
        """
        self._background.wait()

    def _write(self, save: _Save, shards: ShardedState) -> None:
        """Make a checkpoint of what is staged, all workers together; none waits in vain."""
        writers, path = shards.writers, partial_path(self._directory, save.step)

        def begin() -> None:
            if writers.rank == 0:
                begin_checkpoint(self._directory, save.step)

        def finish() -> None:
            digests = {name: digest for theirs in found for name, digest in theirs.items()}
            finish_checkpoint(
                path, save.step, save.state, shards=digests, keep=save.keep, also=save.also
            )
            self._made_known(save)

        writers.together(begin)
        found = writers.together(lambda: shards.write(path))
        writers.together(lambda: self._background.commit(finish) if writers.rank == 0 else None)

    def _made_known(self, save: _Save) -> None:
        """Show the others the new checkpoint."""
        self._files.push(save.step, keep=save.keep, also=save.also)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - save.begun_at
        if save.is_asked_for:
            self._asked.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest good checkpoint, and ``step``; None at the very beginning.

        All workers ask together; rank 0 says which checkpoint that is, and what is newer is
        removed.

        Raises:
            DataError: there were checkpoints and none is good, or it is that of another run.
        """
        state = self._newest_of_rank_0() if self._group.rank == 0 else None
        chosen = torch.tensor([state["step"] if state else 0], device=self._device)
        self._group.broadcast_(chosen, source=0)
        step = int(chosen)
        if self._group.rank != 0 and step:
            self._files.pull(step)
            state = load_checkpoint(self._directory, step, is_verified=True)
        if state is not None and state["claims"] != self._claims:
            raise DataError(
                f"the checkpoint behind step {step} in {self._directory} is that of another "
                f"run ({state['claims']}, this one {self._claims}); remove {self._files.directory}"
            )
        return state

    def weights(self, step: int) -> dict[str, Any]:
        """The model's weights behind ``step`` steps.

        Raises:
            DataError: the checkpoint is missing, or not what was written.
        """
        self._files.pull(step)
        weights: dict[str, Any] = load_checkpoint(self._directory, step)["model"]
        return weights

    def check(self, step: int) -> None:
        """Read the checkpoint behind ``step`` once more; rank 0 all of it.

        Raises:
            DataError: it is missing, or not what was written.
        """
        load_checkpoint(self._directory, step, is_verified=self._group.rank != 0)

    def _newest_of_rank_0(self) -> dict[str, Any] | None:
        self._files.begin()
        state = load_newest(self._directory)
        if state is None:
            self._refuse_lost_checkpoints()
        self._files.discard_after(state["step"] if state else 0)
        return state

    def _refuse_lost_checkpoints(self) -> None:
        """Never start again from step 0 where the ledger shows that there were checkpoints."""
        ledger = self._files.directory / LEDGER
        last = max((line.step for line in read_ledger(ledger)), default=-1)
        # The line of a step is written before its checkpoint, that of the next one after it.
        if last >= self._settings.checkpoint_every:
            raise DataError(
                f"{ledger} shows {last + 1} steps, but there is no checkpoint in "
                f"{self._directory}; restore them from a backup, or remove "
                f"{self._files.directory} to train from the start"
            )
