"""What of an output directory can go: no report needs it, and a command makes it again.

- Models of a finished search's trials, but the best one's; all models of a finished comparison.
- Records that only finished searches, comparisons and trainings were made from.
- If asked for: what was begun and not finished, which the same command would go on with.
- If asked for: what this node fetched from a storage and has not used for some days.

Scores, ledgers, metrics and descriptions stay, so every report can be written again. So does a
record that nothing was made from yet, everything in a directory that a command works in, and links
with what lies behind them.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.files.node_cache import unused
from lrmc_ray.outputs.inventory import Entry, Sizes

SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class Prunable:
    """A directory that can go."""

    path: Path
    reason: str
    """Why nothing needs it, and how it comes back."""
    size_bytes: int


def prunable(
    entries: Sequence[Entry], *, sizes: Sizes, with_unfinished: bool = False
) -> list[Prunable]:
    """What of ``entries`` can go.

    Args:
        entries: All of an output directory.
        sizes: Counts the bytes that are freed.
        with_unfinished: Also what was begun and not finished.
    """
    found: list[tuple[Path, str]] = []
    for entry in entries:
        if not is_held(entry.path):
            kind = "best" if entry.kind == "search" else "reported"
            reason = f"{entry.name} is finished, and another model is its {kind} one"
            if entry.kind == "comparison":
                reason = f"{entry.name} is finished; its report reads scores alone"
            found += [(model, reason) for model in entry.models if not is_held(model.parent)]
    found += _records(entries)
    if with_unfinished:
        found += [
            (entry.path, entry.about)
            for entry in entries
            if entry.kind == "unfinished" and not is_held(entry.path)
        ]
    return [
        Prunable(path, reason, sizes.of(path))
        for path, reason in found
        if not _leads_away(path, entries)
    ]


def _leads_away(path: Path, entries: Sequence[Entry]) -> bool:
    """Whether ``path`` is a link, or lies behind one that leaves its entry: that is not ours."""
    own = [entry.path for entry in entries if path.is_relative_to(entry.path)]
    return path.is_symlink() or not any(
        not entry.is_symlink() and path.resolve().is_relative_to(entry.resolve()) for entry in own
    )


def _records(entries: Sequence[Entry]) -> Iterator[tuple[Path, str]]:
    done, wanted = set[str](), set[str]()
    for entry in entries:
        (done if entry.state == "finished" else wanted).update(entry.records)
    # What is damaged does not say which records it needs, nor does a search that has just begun.
    if any(entry.state == "damaged" or is_held(entry.path) for entry in entries):
        return
    for entry in entries:
        if entry.kind == "record" and entry.name in done - wanted and not is_held(entry.path):
            yield (
                entry.path,
                "all that was made from it is finished; a longer search would record again",
            )


def cached(
    directory: Path, *, days: float, sizes: Sizes, now: float | None = None
) -> list[Prunable]:
    """What this node fetched from storages and has not used for ``days``.

    Args:
        directory: Holds a folder for each storage.
        days: Age from which on it can go.
        sizes: Counts the bytes that are freed.
        now: In seconds since 1970; by default the clock's.
    """
    since = (time.time() if now is None else now) - days * SECONDS_PER_DAY
    reason = f"fetched from a storage and not used for {days:g} days; it is fetched again"
    return [
        Prunable(path, reason, sizes.of(path))
        for path in sorted(directory.glob("*/*/*"))
        if path.is_dir() and not _is_used(path) and _last_use(path) < since
    ]


def _is_used(path: Path) -> bool:
    """Whether a process uses what this node fetched, or fetches it now."""
    with unused(path) as is_free:
        return not is_free or is_held(path)


def _last_use(path: Path) -> float:
    """When a file below was last read or written, in seconds since 1970."""
    used = path.lstat().st_mtime
    for file in path.rglob("*"):
        status = file.lstat()
        used = max(used, status.st_mtime, status.st_atime)
    return used


def is_held(directory: Path) -> bool:
    """Whether a command works in ``directory``: it holds the lock, see ``lock_directory``."""
    try:
        with (directory / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def remove(found: Sequence[Prunable]) -> None:
    """Remove all of ``found``, but for what a command has begun to work in.

    A directory loses its name first, so that a kill leaves none that looks whole.
    """
    for item in found:
        with unused(item.path) as is_free:
            if not is_free or is_held(item.path) or is_held(item.path.parent):
                continue
            doomed = item.path.with_name(f".{item.path.name}.pruned")
            shutil.rmtree(doomed, ignore_errors=True)
            try:
                item.path.rename(doomed)
            except FileNotFoundError:
                continue
            shutil.rmtree(doomed)
