"""Which rows of embedding and head a run trains: those that it touches, where they are few.

See :mod:`lrmc_ray.method.vocabulary_rows` for why that changes nothing. All rows are trained where
something else may touch them: losses over the whole vocabulary, a head with a bias, a penalty on
the distance of weights, candidates that are recorded again on the way, optimizers that compare the
elements of a tensor with each other.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.microbatch import Activity
from lrmc_ray.method.names import ON_CANDIDATES
from lrmc_ray.method.restricted_loss import draw_tail
from lrmc_ray.method.vocabulary_rows import EmbeddingLookup, HeadRows, TrainedRows, tokens_of
from lrmc_ray.train.samples import TrainingSamples

_log = logging.getLogger(__name__)

MOST_SAMPLES = 4096
"""Distinct samples of a run whose tokens are looked up; those of a longer one touch most rows."""
LARGEST_SHARE = 0.6
"""Of the rows. Beyond it the second copy of the trained ones takes what is saved elsewhere."""
FEWEST_SPARED = 2**22
"""Elements of the rows that are left alone, below which it is not worth it."""


class Vocabulary:
    """Embedding and output head in one run."""

    def __init__(
        self,
        model: Any,
        head: OutputHead,
        parameters: dict[str, nn.Parameter],
        settings: TrainSettings,
        activity: Activity,
        samples: TrainingSamples | None,
    ) -> None:
        """Divide what can be divided.

        Args:
            model: in which an embedding looks up trained rows from now on.
            head: its output head.
            parameters: what is trained, by name; a weight's rows take its place.
            settings: of the run.
            activity: which positions have a loss.
            samples: of the run; None trains all rows.
        """
        self.head_rows: HeadRows | None = None
        self._rows: dict[str, TrainedRows] = {}
        self._weight_decay = settings.weight_decay
        embedding = model.get_input_embeddings()
        weights = _weights(model, embedding, head, parameters)
        touched = None
        if samples is not None and _leaves_others_alone(settings):
            divisible = [w for w in weights.values() if not w.is_head or _is_restricted(settings)]
            touched = _touched(settings, activity, samples, head) if divisible else None
        for name, weight in weights.items():
            rows = None
            if touched is not None and (not weight.is_head or _is_restricted(settings)):
                rows = weight.rows_of(*touched)
            if rows is not None:
                self._rows[name] = rows
                parameters[name] = rows.rows_XD
                if weight.is_head:
                    self.head_rows = HeadRows(head, rows)
            # On a GPU the gradient of all rows is left to torch: the other way was not measured.
            if weight.looks_up and (rows is not None or weight.weight_VD.is_cpu):
                EmbeddingLookup(embedding, rows)

    def after_update(self, lr: float) -> None:
        """Bring the whole weights up to date."""
        for rows in self._rows.values():
            rows.write_back(1 - lr * self._weight_decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the rows: which, and the others where they decay."""
        return {
            name: {
                "tokens": rows.token_ids_X,
                "whole": rows.weight_VD.detach() if self._weight_decay else None,
            }
            for name, rows in self._rows.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned; the rows themselves are loaded already.

        Raises:
            DataError: ``state`` is of other rows.
        """
        self.check(state)
        for name, rows in self._rows.items():
            whole = state[name]["whole"]
            if whole is not None:
                with torch.no_grad():
                    rows.weight_VD.copy_(whole)
            rows.write_back()

    def check(self, state: Mapping[str, Any]) -> None:
        """Whether ``state`` is of the same rows.

        Raises:
            DataError: it is not.
        """
        same = state.keys() == self._rows.keys() and all(
            torch.equal(state[name]["tokens"].to(rows.token_ids_X.device), rows.token_ids_X)
            for name, rows in self._rows.items()
        )
        if not same:
            raise DataError(
                "the checkpoint holds other rows of the vocabulary than those that this run "
                "trains; train anew in another directory"
            )


def _leaves_others_alone(settings: TrainSettings) -> bool:
    """Whether a row without a gradient only decays, and by a factor that is the same for all."""
    if settings.refresh_every or settings.l2_sp_weight:
        return False
    if settings.weight_decay:
        # The best weights on the way would have to keep the others as well.
        return settings.optimizer in ("moclip", "adam_atan2") and settings.export == "last"
    return settings.optimizer in ("moclip", "adam_atan2", "adamw")


def _is_restricted(settings: TrainSettings) -> bool:
    return settings.loss in ON_CANDIDATES


class _Weight(NamedTuple):
    """A trained weight of the vocabulary."""

    weight_VD: nn.Parameter
    looks_up: bool
    """The embedding's."""
    is_head: bool
    """The output head's; both where they are tied."""

    def rows_of(self, inputs: Tensor, outputs: Tensor) -> TrainedRows | None:
        """The rows of these tokens, where that is worth it."""
        used = torch.unique(torch.cat([inputs] * self.looks_up + [outputs] * self.is_head))
        spared = (len(self.weight_VD) - len(used)) * self.weight_VD.shape[1]
        if len(used) > LARGEST_SHARE * len(self.weight_VD) or spared < FEWEST_SPARED:
            return None
        _log.info("%d of %d rows of the vocabulary are trained", len(used), len(self.weight_VD))
        return TrainedRows(self.weight_VD, used)


def _weights(
    model: Any, embedding: Any, head: OutputHead, parameters: Mapping[str, nn.Parameter]
) -> dict[str, _Weight]:
    """Trained weights of embedding and head, by name, that nothing else of the model uses."""
    outer = {id(embedding), id(model.get_output_embeddings())}
    found = {}
    for name, weight in parameters.items():
        looks_up = isinstance(embedding, nn.Embedding) and embedding.weight is weight
        is_head = head.weight_VD is weight and head.bias_V is None
        users = {id(m) for m in model.modules() if any(p is weight for p in m._parameters.values())}
        is_plain = not looks_up or (embedding.max_norm is None and not embedding.sparse)
        if (looks_up or is_head) and users <= outer and is_plain:
            found[name] = _Weight(weight, looks_up, is_head)
    return found


def _touched(
    settings: TrainSettings, activity: Activity, samples: TrainingSamples, head: OutputHead
) -> tuple[Tensor, Tensor] | None:
    """Tokens of all samples of the run, and those of all candidates and tails; None: too many."""
    vocabulary_size = head.vocabulary_size
    num_tail = min(settings.tail_samples, vocabulary_size)
    if 1 - (1 - num_tail / vocabulary_size) ** settings.steps > LARGEST_SHARE:
        return None
    indices: set[int] = set()
    for step in range(settings.steps):
        indices.update(samples.indices_of_step(step))
        if len(indices) > MOST_SAMPLES:
            return None
    inputs, outputs = tokens_of((samples[index] for index in sorted(indices)), activity)
    tails = [
        draw_tail(num_tail, vocabulary_size, seed=settings.seed, step=step).ids_R
        for step in range(settings.steps if num_tail else 0)
    ]
    return inputs, torch.unique(torch.cat([outputs, *tails]))
