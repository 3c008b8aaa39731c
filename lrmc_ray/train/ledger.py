"""What training has used, step by step, and the proof that every sample was used as it should.

Append-only JSON lines, one per step that was taken::

    {"attempt": 1, "step": 12, "sample_ids": ["a", "b"], "world_size": 2, "loss": 0.71,
     "applied": true}

``attempt`` counts the starts of the loop: a restart goes on from a checkpoint, so it takes the
steps behind it again. The *committed* history is what the last attempts left: when an attempt
begins at a step, the lines of earlier attempts from that step on no longer count.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError
from lrmc_ray.files.json_lines import JsonLines, whole_lines


@dataclass(frozen=True)
class LedgerLine:
    """One step of one attempt."""

    attempt: int
    step: int
    """From 0."""
    sample_ids: list[str]
    world_size: int
    loss: float
    applied: bool
    """False where the gradient was not finite and the update was left out."""


class Ledger(JsonLines):
    """The one writer of a ledger."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        lines = read_ledger(path)
        self.attempt = lines[-1].attempt + 1 if lines else 1
        """Of this writer."""

    def write(
        self, *, step: int, sample_ids: Sequence[str], world_size: int, loss: float, applied: bool
    ) -> None:
        """Append a step.

        Raises:
            OSError: the disk is full; the file then ends with the line before.
        """
        self.append(
            {
                "attempt": self.attempt,
                "step": step,
                "sample_ids": list(sample_ids),
                "world_size": world_size,
                "loss": loss,
                "applied": applied,
            }
        )

    def close(self) -> None:
        """Close the file, when all lines are on the disk."""
        self.sync()
        super().close()


def read_ledger(path: Path) -> list[LedgerLine]:
    """All whole lines, in the order of writing; no file reads as none.

    Raises:
        DataError: a line is not what :class:`Ledger` writes.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for number, line in enumerate(whole_lines(content).splitlines(), start=1):
        try:
            fields: dict[str, Any] = json.loads(line)
            lines.append(
                LedgerLine(
                    attempt=int(fields["attempt"]),
                    step=int(fields["step"]),
                    sample_ids=[str(name) for name in fields["sample_ids"]],
                    world_size=int(fields["world_size"]),
                    loss=float(fields["loss"]),
                    applied=bool(fields["applied"]),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} must hold one JSON object of a step per line; line {number} does not "
                f"({type(error).__name__}: {error}); remove that line"
            ) from None
    return lines


def committed(lines: Sequence[LedgerLine]) -> dict[int, LedgerLine]:
    """The line of every step of the history that counts."""
    history: dict[int, LedgerLine] = {}
    attempt = 0
    for line in lines:
        if line.attempt != attempt:
            attempt = line.attempt
            history = {step: kept for step, kept in history.items() if step < line.step}
        history[line.step] = line
    return history


@dataclass(frozen=True)
class LedgerAudit:
    """What a ledger proves, or does not."""

    steps: int
    """Steps that were asked for."""
    steps_missing: int
    """Of these, steps that the committed history lacks."""
    steps_replayed: int
    """Lines beyond one per step: work that was done again behind a checkpoint."""
    replays_that_differ: int
    """Steps that, taken again, used other samples or had another loss.

    None in strict mode.
    """
    samples_missing: int
    """Uses of a sample that should be in the committed history and are not."""
    samples_duplicated: int
    """Uses of a sample in the committed history that should not be there."""
    is_in_order: bool
    """Whether every committed step used exactly its own samples, in their order."""
    attempts: int
    world_sizes: tuple[int, ...]
    """All numbers of workers that occur, ascending."""

    @property
    def is_exact(self) -> bool:
        """Whether every sample was used exactly as often, and where, as it should."""
        return self.is_in_order and not (
            self.steps_missing or self.samples_missing or self.samples_duplicated
        )


def audit_ledger(
    path: Path, sample_ids_of_step: Callable[[int], Sequence[str]], *, steps: int
) -> LedgerAudit:
    """Compare the committed history in ``path`` with what the global order asks for.

    Args:
        path: the ledger.
        sample_ids_of_step: the order: a function of the seed and the step alone.
        steps: how many there should be.

    Raises:
        DataError: the file is no ledger.
    """
    lines = read_ledger(path)
    history = committed(lines)
    wanted: Counter[str] = Counter()
    used: Counter[str] = Counter()
    is_in_order = True
    for step in range(steps):
        expected = list(sample_ids_of_step(step))
        wanted.update(expected)
        is_in_order &= step in history and history[step].sample_ids == expected
    for line in history.values():
        used.update(line.sample_ids)
    seen: dict[int, set[tuple[str, tuple[str, ...]]]] = {}
    for line in lines:
        # NaN is not equal to itself; the text of it is.
        seen.setdefault(line.step, set()).add((repr(line.loss), tuple(line.sample_ids)))
    return LedgerAudit(
        steps=steps,
        steps_missing=len(set(range(steps)) - history.keys()),
        steps_replayed=len(lines) - len(seen),
        replays_that_differ=sum(len(versions) > 1 for versions in seen.values()),
        samples_missing=(wanted - used).total(),
        samples_duplicated=(used - wanted).total(),
        is_in_order=is_in_order and set(history) == set(range(steps)),
        attempts=len({line.attempt for line in lines}),
        world_sizes=tuple(sorted({line.world_size for line in lines})),
    )
