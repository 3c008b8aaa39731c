"""Named places at which a test may kill the process, so that the known windows are proven.

    LRMC_TESTING=1 LRMC_FAULT=record.part_written:kill:3 python -m lrmc_ray.record ...

kills the process with SIGKILL when it passes ``record.part_written`` for the third time. The
variable has no effect without ``LRMC_TESTING=1``; a pass then costs one comparison.
"""

import os
import signal
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
)
_IS_TESTING = os.environ.get("LRMC_TESTING") == "1"
_FAULT = os.environ.get("LRMC_FAULT") if _IS_TESTING else None
_LOG = os.environ.get("LRMC_FAULT_LOG") if _IS_TESTING else None
"""A file to which every pass is appended, for whoever counts what was done twice."""
_passes: dict[str, int] = {}


def passed(point: str, note: str = "") -> None:
    """Die here, if this is the pass that ``LRMC_FAULT`` names."""
    if _FAULT is None and _LOG is None:
        return
    _passes[point] = _passes.get(point, 0) + 1
    if _LOG is not None:
        with Path(_LOG).open("a", encoding="utf-8") as log:
            log.write(f"{point} {os.getpid()} {note}\n")
    if f"{point}:kill:{_passes[point]}" == _FAULT:
        os.kill(os.getpid(), signal.SIGKILL)
