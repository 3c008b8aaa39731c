"""Training checkpoints: a directory per step, whole or absent, the newest good one wins.

The state holds the step and the moments but nothing of the number of workers, so a run can go on
with more or fewer of them. A checkpoint that is torn or damaged is passed over for the one before;
if there were checkpoints and none is good, that is an error and never a silent new start.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError, LrmcError
from lrmc_ray.files.artifacts import PARTIAL, file_digest, read_manifest, write_manifest

_log = logging.getLogger(__name__)

STATE = "state.pt"
SHARDS = "shards"
"""Beside it where the model is in shards: what ``torch.distributed.checkpoint`` writes."""
METADATA = ".metadata"
"""What it reads first, a pickle: never before its digest is that of the manifest."""


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
    partial = begin_checkpoint(directory, step)
    finish_checkpoint(partial, step, state, keep=keep, also=also)
    return checkpoint_path(directory, step)


def begin_checkpoint(directory: Path, step: int) -> Path:
    """A fresh directory for the checkpoint behind ``step`` steps, which is none yet."""
    _remove_partial(directory)
    partial = partial_path(directory, step)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(
    partial: Path,
    step: int,
    state: dict[str, Any],
    *,
    shards: Mapping[str, str] | None = None,
    keep: int = 2,
    also: Collection[int] = (),
) -> None:
    """Write ``state`` and the manifest, and make a checkpoint of ``partial``; see above.

    Args:
        partial: what :func:`begin_checkpoint` returned.
        step: steps done.
        state: as above.
        shards: files below ``partial`` that workers have written, with their SHA-256.
        keep: as above.
        also: as above.
    """
    import torch

    directory, final = partial.parent, checkpoint_path(partial.parent, step)
    with (partial / STATE).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    write_manifest(partial, {**_manifest(partial / STATE, step), **_of_shards(shards)})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    kept = {checkpoint_path(directory, other) for other in also}
    for old in list_checkpoints(directory)[:-keep]:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


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


def partial_path(directory: Path, step: int) -> Path:
    """Where that checkpoint is while it is written."""
    path = checkpoint_path(directory, step)
    return path.with_name(path.name + PARTIAL)


def step_of(path: Path) -> int:
    """Steps done at the checkpoint ``path``."""
    return int(path.name.removeprefix("step_"))


def _manifest(state: Path, step: int) -> dict[str, Any]:
    return {"kind": "checkpoint", "step": step, "sha256": file_digest(state)}


def _of_shards(shards: Mapping[str, str] | None) -> dict[str, Any]:
    return {} if shards is None else {"shards": dict(shards)}


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


def load_checkpoint(directory: Path, step: int, *, is_verified: bool = False) -> dict[str, Any]:
    """The state of the checkpoint behind ``step`` steps, all of whose files are as written.

    Args:
        directory: of the checkpoints.
        step: steps done.
        is_verified: rank 0 has just read all shards; they are not read again.

    Raises:
        DataError: it is missing, or not what was written.
    """
    import torch

    path = checkpoint_path(directory, step)
    try:
        manifest = read_manifest(path, made_by="python -m lrmc_ray.train")
        shards = manifest.get("shards")
        if not isinstance(shards, dict | None):
            raise DataError(f"{path} has a manifest that was not written here")
        if manifest != {**_manifest(path / STATE, step), **_of_shards(shards)}:
            raise DataError(f"{path / STATE} is not what was written")
        for name, digest in (shards or {}).items():
            if is_verified and not name.endswith(METADATA):
                continue
            if file_digest(path / name) != digest:
                raise DataError(f"{path / name} is not what was written")
        state: dict[str, Any] = torch.load(
            path / STATE, map_location="cpu", weights_only=True, mmap=True
        )
        return state
    except (LrmcError, FileNotFoundError) as error:
        raise DataError(f"checkpoint {path.name} is damaged ({error})") from None
    except (pickle.UnpicklingError, RuntimeError):
        # What torch says of it ends in the advice to load it all the same.
        raise DataError(f"checkpoint {path.name} is no saved state") from None
