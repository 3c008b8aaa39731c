"""Did a run diverge: is its loss at the end far above that of the model it began with?"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHARE = 0.1
"""Of the steps, the last ones, whose mean loss counts."""

MOST_STEPS = 10

FACTOR, MARGIN_NATS = 2.0, math.log(2.0)
"""A loss above ``FACTOR`` times the first one plus the margin is no noise of the batches.

The margin is for first losses near zero: half of the probability of every right token.
"""


@dataclass(frozen=True)
class Divergence:
    """A run that ended far above where it began."""

    first_loss: float
    """Of the first step, before the model was changed; nats per supervised position."""
    last_loss: float
    """Mean over the last steps; infinity where none of them had a finite loss."""
    last_steps: int

    def message(self, lr: float) -> str:
        """What happened, and what to do."""
        limit = FACTOR * self.first_loss + MARGIN_NATS
        last = f"{self.last_loss:.4g}" if math.isfinite(self.last_loss) else "not finite"
        return (
            f"training must not end with a loss above {limit:.4g} nats, {FACTOR:g} times that of "
            f"the first step ({self.first_loss:.4g}) and {MARGIN_NATS:.2g} more; over the last "
            f"{self.last_steps} steps it is {last}: the run diverged, and its model is not kept. "
            f"Lower train.lr (it was {lr:g}), or raise train.warmup_steps"
        )

    def as_dict(self) -> dict[str, float | None]:
        """For the manifest; JSON has no infinity."""
        finite = self.last_loss if math.isfinite(self.last_loss) else None
        return {**asdict(self), "last_loss": finite}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Divergence":
        """What :meth:`as_dict` returned."""
        last = math.inf if values["last_loss"] is None else values["last_loss"]
        return cls(values["first_loss"], last, values["last_steps"])


class LossWatch:
    """The first loss of a run and its last ones, those before a checkpoint included."""

    def __init__(self, steps: int) -> None:
        """Watch a run of ``steps`` steps."""
        self._first: float | None = None
        self._last: deque[float] = deque(maxlen=max(1, min(MOST_STEPS, int(SHARE * steps))))

    def add(self, loss: float) -> None:
        """Take note of the loss of one more step."""
        if self._first is None and math.isfinite(loss):
            self._first = loss
        self._last.append(loss)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self._first, "last": list(self._last)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self._first = state["first"]
        self._last.extend(state["last"])

    def divergence(self) -> Divergence | None:
        """How the run diverged; None if it did not."""
        if self._first is None:
            return None
        finite = [loss for loss in self._last if math.isfinite(loss)]
        last = sum(finite) / len(finite) if finite else math.inf
        if last <= FACTOR * self._first + MARGIN_NATS:
            return None
        return Divergence(self._first, last, len(self._last))
