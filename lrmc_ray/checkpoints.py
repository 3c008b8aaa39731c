"""Training checkpoints: a directory per step, whole or absent, the newest good one wins.

The state holds the step and the moments but nothing of the number of workers, so a run can go on
with more or fewer of them. A checkpoint that is torn or damaged is passed over for the one before;
if there were checkpoints and none is good, that is an error and never a silent new start.
"""

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from lrmc_ray.artifacts import PARTIAL, file_digest, read_manifest, write_manifest
from lrmc_ray.errors import DataError, LrmcError

_log = logging.getLogger(__name__)

STATE = "state.pt"


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Save ``state`` as the checkpoint behind ``step`` steps, then remove all but ``keep``."""
    import torch

    final = directory / f"step_{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / STATE).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    write_manifest(partial, _manifest(partial / STATE, step))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _manifest(state: Path, step: int) -> dict[str, Any]:
    return {"kind": "checkpoint", "step": step, "sha256": file_digest(state)}


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in ``directory``, oldest first, good or not."""
    return sorted(directory.glob("step_" + "[0-9]" * 8))


def load_newest(directory: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is what was written; None if there are none.

    Raises:
        DataError: there are checkpoints, and all are damaged.
    """
    import torch

    checkpoints = list_checkpoints(directory)
    for path in reversed(checkpoints):
        try:
            manifest = read_manifest(path, made_by="python -m lrmc_ray.train")
            if manifest != _manifest(path / STATE, int(path.name.removeprefix("step_"))):
                raise DataError(f"{path / STATE} is not what was written")
            state: dict[str, Any] = torch.load(
                path / STATE, map_location="cpu", weights_only=True, mmap=True
            )
            return state
        except (LrmcError, FileNotFoundError) as error:
            _log.warning("checkpoint %s is damaged (%s); using the one before", path.name, error)
        except (pickle.UnpicklingError, RuntimeError):
            # What torch says of it ends in the advice to load it all the same.
            _log.warning("checkpoint %s is no saved state; using the one before", path.name)
    if checkpoints:
        raise DataError(
            f"all {len(checkpoints)} checkpoints in {directory} are damaged; restore one from a "
            "backup, or remove that directory to train from the start"
        )
    return None
