"""Training checkpoints: a directory per step, whole or absent, the newest good one wins.

The state holds the step and the moments but nothing of the number of workers, so a run can go on
with more or fewer of them. A checkpoint that is torn or damaged is passed over for the one before;
if there were checkpoints and none is good, that is an error and never a silent new start.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError, LrmcError
from lrmc_ray.files.artifacts import PARTIAL, file_digest, read_manifest, write_manifest

_log = logging.getLogger(__name__)

STATE = "state.pt"


def save_checkpoint(
    directory: Path,
    step: int,
    state: dict[str, Any],
    *,
    keep: int = 2,
    also: Collection[int] = (),
) -> Path:
    """Save ``state`` as the checkpoint behind ``step`` steps.

    Then all but the ``keep`` newest and those of the steps ``also`` are removed, and with them
    what saves that were killed have left.
    """
    import torch

    final = checkpoint_path(directory, step)
    _remove_partial(directory)
    partial = final.with_name(final.name + PARTIAL)
    partial.mkdir(parents=True)
    with (partial / STATE).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    write_manifest(partial, _manifest(partial / STATE, step))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    kept = {checkpoint_path(directory, other) for other in also}
    for old in list_checkpoints(directory)[:-keep]:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return final


def discard_after(directory: Path, step: int) -> None:
    """Remove the checkpoints behind ``step``, and what saves that were killed have left.

    For a run that goes on from ``step``: what is newer is damaged, and were it kept it would count
    among the newest.
    """
    _remove_partial(directory)
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            shutil.rmtree(path, ignore_errors=True)


def _remove_partial(directory: Path) -> None:
    for path in directory.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint behind ``step`` steps is in ``directory``."""
    return directory / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Steps done at the checkpoint ``path``."""
    return int(path.name.removeprefix("step_"))


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
    checkpoints = list_checkpoints(directory)
    for path in reversed(checkpoints):
        try:
            return load_checkpoint(directory, step_of(path))
        except DataError as error:
            _log.warning("%s; using the one before", error)
    if checkpoints:
        raise DataError(
            f"all {len(checkpoints)} checkpoints in {directory} are damaged; restore one from a "
            "backup, or remove that directory to train from the start"
        )
    return None


def load_checkpoint(directory: Path, step: int) -> dict[str, Any]:
    """The state of the checkpoint behind ``step`` steps.

    Raises:
        DataError: it is missing, or not what was written.
    """
    import torch

    path = checkpoint_path(directory, step)
    try:
        manifest = read_manifest(path, made_by="python -m lrmc_ray.train")
        if manifest != _manifest(path / STATE, step):
            raise DataError(f"{path / STATE} is not what was written")
        state: dict[str, Any] = torch.load(
            path / STATE, map_location="cpu", weights_only=True, mmap=True
        )
        return state
    except (LrmcError, FileNotFoundError) as error:
        raise DataError(f"checkpoint {path.name} is damaged ({error})") from None
    except (pickle.UnpicklingError, RuntimeError):
        # What torch says of it ends in the advice to load it all the same.
        raise DataError(f"checkpoint {path.name} is no saved state") from None
