"""The samples of a record as a run uses them; their order is that of ``sample_order``."""

import dataclasses
import functools
import math
import statistics
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError
from lrmc_ray.method.microbatch import Sample, cut_sample
from lrmc_ray.method.subsets import CandidateSets, without_added_gold
from lrmc_ray.record.reader import Records
from lrmc_ray.train.sample_order import divide_samples


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
        self._order, self.held_out = divide_samples(domains, settings, str(records.directory))

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
