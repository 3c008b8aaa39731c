"""Named places at which a test may break the process, so that the known windows are proven.

    LRMC_TESTING=1 LRMC_FAULT=record.part_written:kill:3 python -m lrmc_ray.record ...

kills the process with SIGKILL when it passes ``record.part_written`` for the third time. In place
of ``kill``, ``full`` finds the disk full there, ``hang`` waits for ever, and ``interrupt`` is a
Ctrl-C. The variable has no effect without ``LRMC_TESTING=1``; a pass then costs one comparison.

A new window gets a line in ``POINTS``, a call of :func:`passed`, and by its name a row in
tests/reliability/test_fault_table.py.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

POINTS = (
    "record.planned",  # the examples are tokenized and cut into shards
    "record.shard_started",  # an actor has a shard and nothing of it
    "record.part_written",  # a file is complete, under its temporary name
    "record.part_renamed",  # the file has its name, the driver does not know
    "record.part_counted",  # the driver knows
    "record.parts_complete",  # every file is there, the manifest is not
    "record.manifest_written",  # the manifest is there, the directory has its temporary name
    "record.published",  # the directory has its name
    "storage.part_put",  # a file of a record is in the storage, what it holds is not
    "storage.record_committed",  # its manifest is, what is not part of it is not yet removed
    "storage.files_put",  # the files of a directory are in the storage, its marker is not
    "storage.committed",  # the marker is
    "export.weights_written",  # in a directory beside the one that is asked for
    "export.card_written",  # the model is complete there, perhaps but for the GGUF file
    "export.written",  # everything is on the disk, under the temporary name
    "export.published",  # the directory has its name
    "blend.model_written",  # a model between two others is there, and not scored
    "chat.answered",  # every question is answered, the table is not written
    "tune.begun",  # study.json says that the search runs, and nothing else is there
    "tune.prepared",  # the record is there, no trial has been asked for
    "tune.base_scored",  # the base's scores are there, study.json does not name them
    "tune.trial_asked",  # the study's database has a new trial, study.json has not
    "tune.trial_described",  # study.json has it too, it has not begun
    "tune.result_written",  # a trial has left its result, nobody has read it
    "tune.trial_told",  # the database knows the result, study.json does not
    "tune.trial_ended",  # study.json knows it too
    "tune.trials_ended",  # every trial has ended, the finalists are not scored
    "tune.finalists_scored",  # they are, the best model is not in its place
    "tune.model_copied",  # it is, under its temporary name
    "tune.exported",  # it has its name, there is no report
    "tune.reported",  # the report is there, the search is not declared finished
    "tune.ended",  # it is
    "compare.begun",  # compare.json says what is compared
    "compare.prepared",  # record and base scores are there
    "compare.run_started",  # a run has been handed out
    "compare.run_ended",  # a run has left its result, compare.json does not know
    "compare.run_settled",  # compare.json knows it
    "compare.runs_ended",  # all runs have ended, there is no report
)
_IS_TESTING = os.environ.get("LRMC_TESTING") == "1"
_FAULT = os.environ.get("LRMC_FAULT") if _IS_TESTING else None
_LOG = os.environ.get("LRMC_FAULT_LOG") if _IS_TESTING else None
"""A file to which every pass is appended, for whoever counts what was done twice."""
_passes: dict[str, int] = {}


def passed(point: str, note: str = "") -> None:
    """Break here, if this is the pass that ``LRMC_FAULT`` names.

    Raises:
        OSError: the fault is ``full``.
        KeyboardInterrupt: the fault is ``interrupt``.
    """
    if _FAULT is None and _LOG is None:
        return
    _passes[point] = _passes.get(point, 0) + 1
    if _LOG is not None:
        with Path(_LOG).open("a", encoding="utf-8") as log:
            log.write(f"{point} {os.getpid()} {note}\n")
    for kind, do in _FAULTS.items():
        if f"{point}:{kind}:{_passes[point]}" == _FAULT:
            do()


def _find_no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "an output file")


def _interrupt() -> None:
    raise KeyboardInterrupt


_FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "full": _find_no_space,
    "hang": lambda: time.sleep(1e9),
    "interrupt": _interrupt,
}
"""What can happen at a point."""
