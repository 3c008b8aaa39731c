"""The global order of samples: a function of (seed, epoch, index) alone.

Neither the number of workers nor a restart enters, so every history of worker losses and joins
sees the same samples at the same steps, each exactly once per epoch.
"""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError

_COPIES_KEY = 2**63
"""Marks the random numbers that choose extra copies; no epoch has such a number."""


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(num_samples)`` in which ``epoch`` visits the samples."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)


def samples_of_step(num_samples: int, step: int, *, batch_size: int, seed: int) -> list[int]:
    """Indices of the samples of ``step`` (counted from 0).

    Epochs follow one another without a gap: a batch may end one epoch and begin the next, so a
    sample is never dropped, also where ``batch_size`` does not divide ``num_samples``.
    """
    order = SampleOrder([np.arange(num_samples)], [1.0], seed=seed)
    return order.of_step(step, batch_size=batch_size)


class SampleOrder:
    """Epochs over groups of samples, each with a weight.

    A group of n samples with weight w has round(w n) places in every epoch: every sample gets
    floor(w) of them, and the rest go to samples that are drawn anew for each epoch. So weight 1 is
    every sample exactly once, 2 twice, 0.5 every other one, 0 none.
    """

    def __init__(
        self, groups: Sequence[np.ndarray], weights: Sequence[float], *, seed: int
    ) -> None:
        """Order the samples of all ``groups``.

        Raises:
            ValueError: no sample is left.
        """
        self._groups = [
            (group, int(weight), round(weight * len(group)) - int(weight) * len(group))
            for group, weight in zip(groups, weights, strict=True)
        ]
        self.epoch_length = sum(whole * len(group) + part for group, whole, part in self._groups)
        """Places in an epoch, the same in all."""
        if not self.epoch_length:
            raise ValueError("an epoch must have at least one sample")
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """The samples of ``epoch`` in their order."""
        if epoch not in self._epochs:
            places = []
            for number, (group, whole, part) in enumerate(self._groups):
                key = [self._seed, _COPIES_KEY + (number << 40) + epoch]
                extra = np.random.Generator(np.random.Philox(key=key)).permutation(group)[:part]
                places += [group] * whole + [extra]
            samples = np.concatenate(places)
            if len(self._epochs) > 1:
                self._epochs.clear()
            order = epoch_order(self.epoch_length, seed=self._seed, epoch=epoch)
            self._epochs[epoch] = samples[order]
        return self._epochs[epoch]

    def of_step(self, step: int, *, batch_size: int) -> list[int]:
        """Indices of the samples of ``step`` (counted from 0); a batch may span two epochs."""
        indices = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, offset = divmod(position, self.epoch_length)
            indices.append(int(self.epoch(epoch)[offset]))
        return indices


def divide_samples(
    domains: Sequence[str], settings: TrainSettings, where: str
) -> tuple[SampleOrder, list[int]]:
    """The order of a run, and the samples that are scored and never trained on, ascending.

    Args:
        domains: of all samples.
        settings: of the run.
        where: the samples are, for the message.

    Raises:
        ConfigError: a domain of ``domain_weights`` is not among them, or nothing is left.
    """
    held_out = _held_out(domains, settings)
    is_trained = np.ones(len(domains), dtype=bool)
    is_trained[held_out] = False
    weights = _domain_weights(settings, Counter(domains), where)
    groups = [
        np.array([i for i, d in enumerate(domains) if d == domain and is_trained[i]], np.int64)
        for domain in weights
    ]
    try:
        return SampleOrder(groups, list(weights.values()), seed=settings.seed), held_out
    except ValueError:
        raise ConfigError(
            f"training needs at least one sample, {where} has {len(domains)}, of which "
            f"{len(held_out)} are held out and the others' domains have weight 0; raise "
            "train.domain_weights or give more data"
        ) from None


REPLAY = "replay"
"""The domain of which ``train.replay_share`` speaks."""


_HELD_OUT_KEY = 2**62


def _held_out(domains: Sequence[str], settings: TrainSettings) -> list[int]:
    if not settings.evaluate_every:
        return []
    # What is replayed is not what is to be learned.
    is_replay = settings.replay_share is not None
    learned = [i for i, domain in enumerate(domains) if not (is_replay and domain == REPLAY)]
    count = min(max(1, round(settings.holdout_share * len(learned))), len(learned) - 1)
    key = [settings.seed, _HELD_OUT_KEY]
    chosen = np.random.Generator(np.random.Philox(key=key)).permutation(learned)[:count]
    return sorted(chosen.tolist())


def _domain_weights(
    settings: TrainSettings, counts: Mapping[str, int], where: str
) -> dict[str, float]:
    """Weight of every domain that occurs, by name; ``counts`` are those of its samples."""
    present = sorted(counts)
    for pattern in settings.domain_weights:
        if not fnmatch.filter(present, pattern):
            names = ", ".join(repr(name) for name in present)
            raise ConfigError(
                f"train.domain_weights must name domains of the record, got {pattern!r}; "
                f"{where} has {names}"
            )
    weights = {
        domain: next(
            (w for p, w in settings.domain_weights.items() if fnmatch.fnmatchcase(domain, p)), 1.0
        )
        for domain in present
    }
    share = settings.replay_share
    if share is None:
        return weights
    if share and REPLAY not in weights:
        raise ConfigError(
            f"train.replay_share = {share:g} needs samples of the domain {REPLAY}, {where} has "
            f"none; add some, as in --train-data {REPLAY}=english"
        )
    if REPLAY in weights:
        others = sum(w * counts[domain] for domain, w in weights.items() if domain != REPLAY)
        weights[REPLAY] = share / (1 - share) * others / counts[REPLAY]
    return weights
