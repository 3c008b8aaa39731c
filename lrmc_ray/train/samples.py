"""The global order of samples: a function of (seed, epoch, index) alone.

Neither the number of workers nor a restart enters, so every history of worker losses and joins
sees the same samples at the same steps, each exactly once per epoch.
"""

import dataclasses
import fnmatch
import functools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError
from lrmc_ray.method.microbatch import Sample, cut_sample
from lrmc_ray.method.subsets import CandidateSets, without_added_gold
from lrmc_ray.record.reader import Records

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


REPLAY = "replay"
"""The domain of which ``train.replay_share`` speaks."""


_HELD_OUT_KEY = 2**62


class TrainingSamples:
    """The samples of a record as one training run uses them."""

    def __init__(self, records: Records, settings: TrainSettings) -> None:
        """Divide ``records`` as ``settings`` say.

        Raises:
            ConfigError: a domain of ``domain_weights`` is not in the record, or nothing is left.
        """
        self.records = records
        self._settings = settings
        self.sample_ids, domains = sample_names(records)
        self.held_out = _held_out(domains, settings)
        """Indices of the samples that are scored and never trained on, ascending."""
        is_trained = np.ones(len(records), dtype=bool)
        is_trained[self.held_out] = False
        weights = _domain_weights(settings, Counter(domains), records.directory)
        try:
            self._order = SampleOrder(
                [
                    np.array(
                        [i for i, d in enumerate(domains) if d == domain and is_trained[i]],
                        dtype=np.int64,
                    )
                    for domain in weights
                ],
                list(weights.values()),
                seed=settings.seed,
            )
        except ValueError:
            raise ConfigError(
                f"training needs at least one sample, {records.directory} has {len(records)}, of "
                f"which {len(self.held_out)} are held out and the others' domains have weight 0; "
                "raise train.domain_weights or give more data"
            ) from None

    @functools.cached_property
    def flow_temperature(self) -> float:
        """``train.flow_temperature``: by default the median loss of the base over the samples."""
        if self._settings.flow_temperature is not None:
            return self._settings.flow_temperature
        held_out = set(self.held_out)
        trained = (index for index in range(len(self.records)) if index not in held_out)
        return statistics.median(base_loss(self.records[index]) for index in trained)

    @property
    def epoch_length(self) -> int:
        """Samples per epoch, repetitions counted."""
        return self._order.epoch_length

    def indices_of_step(self, step: int) -> list[int]:
        """Where the samples of ``step`` are in the record."""
        return self._order.of_step(step, batch_size=self._settings.batch_size)

    def ids_of_step(self, step: int) -> list[str]:
        """The names of the samples of ``step``."""
        return [self.sample_ids[index] for index in self.indices_of_step(step)]

    def in_full(self, index: int) -> Sample:
        """One sample to be scored: every position counts, and counts alike."""
        return cut_sample(self.records[index], self._settings.tau, k_min=self._settings.k_min)

    def __getitem__(self, index: int) -> Sample:
        """One sample to be learned, its candidates cut at the settings' tau."""
        tau, k_min = self._settings.tau, self._settings.k_min
        sample = self.records[index]
        if self._settings.loss == "flow":
            share = base_loss(sample) / self.flow_temperature
            sample = dataclasses.replace(sample, weight=math.exp(-share))
        if self._settings.stm_perplexity is not None:
            sample = without_surprises(sample, self._settings.stm_perplexity)
        sample = cut_sample(sample, tau, k_min=k_min)
        if self._settings.keep_gold:
            return sample
        k_max = self.records.manifest["identity"]["k_max"]
        bare = without_added_gold(sample.candidates, tau, k_min=k_min, k_max=k_max)
        # The anchor's prompt positions stay: nothing is learned there.
        return with_supervised_candidates(sample, bare.rows(sample.is_supervised_P))


def base_loss(sample: Sample) -> float:
    """The base model's mean loss of the gold tokens at supervised positions, in nats.

    It is from the record, so a little too large: log-probabilities are rounded down to float16.
    """
    sets = sample.candidates
    logprobs_P = sets.logprobs[sets.is_gold].double()
    return -float(logprobs_P[sample.is_supervised_P].mean())


def without_surprises(sample: Sample, perplexity: float) -> Sample:
    """``sample`` without supervised positions at which the base's perplexity is larger.

    Selective Token Masking, arXiv 2501.14315: the labels of such tokens are masked, so they are not
    counted in the divisor either. The tokens stay where they are, for those behind them to see.
    """
    sets = sample.candidates
    surprises_P = sets.logprobs[sets.is_gold].double() < -math.log(perplexity)
    kept_P = ~(surprises_P & sample.is_supervised_P)
    return dataclasses.replace(
        sample,
        positions_P=sample.positions_P[kept_P],
        is_supervised_P=sample.is_supervised_P[kept_P],
        candidates=sets.rows(kept_P),
    )


def with_supervised_candidates(sample: Sample, candidates: CandidateSets) -> Sample:
    """``sample`` with other candidate sets at its supervised positions."""
    supervised = sample.is_supervised_P.nonzero()[:, 0]
    prompt = (~sample.is_supervised_P).nonzero()[:, 0]
    together = CandidateSets.concatenate([candidates, sample.candidates.rows(prompt)])
    in_order = torch.cat([supervised, prompt]).argsort()
    return dataclasses.replace(sample, candidates=together.rows(in_order))


def sample_names(records: Records) -> tuple[list[str], list[str]]:
    """Id and domain of every sample."""
    index = records.index_path()
    paths = map(records.part_path, range(len(records.parts))) if index is None else [index]
    ids: list[str] = []
    domains: list[str] = []
    for path in paths:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(columns=["sample_id", "domain"]):
                ids += batch["sample_id"].to_pylist()
                domains += map(sys.intern, batch["domain"].to_pylist())  # few, one copy of each
    return ids, domains


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
    settings: TrainSettings, counts: Mapping[str, int], directory: Path
) -> dict[str, float]:
    """Weight of every domain that occurs, by name; ``counts`` are those of its samples."""
    present = sorted(counts)
    for pattern in settings.domain_weights:
        if not fnmatch.filter(present, pattern):
            names = ", ".join(repr(name) for name in present)
            raise ConfigError(
                f"train.domain_weights must name domains of the record, got {pattern!r}; "
                f"{directory} has {names}"
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
            f"train.replay_share = {share:g} needs samples of the domain {REPLAY}, {directory} has "
            f"none; add some, as in --train-data {REPLAY}=english"
        )
    if REPLAY in weights:
        others = sum(w * counts[domain] for domain, w in weights.items() if domain != REPLAY)
        weights[REPLAY] = share / (1 - share) * others / counts[REPLAY]
    return weights


def number_of_steps(settings: TrainSettings, record: Path) -> int:
    """Steps of a run: ``train.steps``, or as many as ``train.epochs`` need, rounded up.

    Raises:
        ConfigError: the warm-up is longer.
    """
    if settings.epochs is None:
        return settings.steps
    samples = TrainingSamples(Records(record), settings)
    steps = math.ceil(round(settings.epochs * samples.epoch_length, 6) / settings.batch_size)
    if settings.warmup_steps > steps:
        raise ConfigError(
            f"train.warmup_steps must not exceed the steps of train.epochs, got "
            f"{settings.warmup_steps} > {steps}; lower it"
        )
    return steps
