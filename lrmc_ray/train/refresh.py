"""The samples of a step, their candidates recorded again with the model as it is now.

With ``train.refresh_every = R``, the supervised positions of steps R to 2R - 1 are recorded again
before step R, and so on. The first R steps use what Stage 0 recorded.
"""

import dataclasses
from typing import Any

import torch

from lrmc_ray.config import TrainSettings
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.microbatch import Sample, collate, deal
from lrmc_ray.method.subsets import CandidateSets, select_candidates
from lrmc_ray.method.workers import WorkerGroup, waves
from lrmc_ray.train.learner import Learner
from lrmc_ray.train.samples import TrainingSamples, with_supervised_candidates

_LOGIT_ELEMENTS = 2**22
"""Of the [n, V] logits that are computed at once."""


class FreshCandidates:
    """The samples of every step; in turn each worker records a part of the coming ones again."""

    def __init__(
        self,
        settings: TrainSettings,
        samples: TrainingSamples,
        learner: Learner,
        *,
        k_max: int,
        group: WorkerGroup,
    ) -> None:
        """Begin with the candidates of the record.

        Args:
            settings: of the run.
            samples: of the record, in the order of the run.
            learner: has the model that is trained, and says which positions a step uses, which
                decides how samples are dealt to workers.
            k_max: most candidates of a supervised position, as recorded.
            group: this worker and the others.
        """
        self._settings = settings
        self._samples = samples
        self._learner = learner
        self._k_max = k_max
        self._group = group
        self._fresh: dict[int, list[CandidateSets]] = {}

    def samples_of_step(self, step: int) -> list[Sample]:
        """The samples of ``step``, asked for once and in order, by all workers."""
        every = self._settings.refresh_every
        samples = self._recorded(step)
        if not every or step < every:
            return samples
        if step not in self._fresh:
            self._refresh(step)
        return [
            with_supervised_candidates(sample, fresh)
            for sample, fresh in zip(samples, self._fresh.pop(step), strict=True)
        ]

    def state(self) -> dict[int, list[dict[str, Any]]]:
        """What a checkpoint keeps: the candidates of steps that are still to come."""
        return {
            step: [dataclasses.asdict(sets) for sets in fresh]
            for step, fresh in self._fresh.items()
        }

    def load(self, state: dict[int, list[dict[str, Any]]]) -> None:
        """Go on from what :meth:`state` returned."""
        self._fresh = {
            step: [CandidateSets(**sets) for sets in fresh] for step, fresh in state.items()
        }

    def _recorded(self, step: int) -> list[Sample]:
        return [self._samples[index] for index in self._samples.indices_of_step(step)]

    @torch.no_grad()
    def _refresh(self, first: int) -> None:
        """Record the supervised positions of the coming steps again, with the current model.

        Prompt positions keep the base model's: those are what the anchor holds on to.
        """
        last = min(first + self._settings.refresh_every, self._settings.steps)
        self._learner.model.eval()
        jobs = []
        for step in range(first, last):
            samples = self._recorded(step)
            # The parts are those of the step: rows padded together give the same bits each time.
            parts = deal(samples, self._settings.micro_batches, self._learner.loss.activity)
            jobs += [(step, part, [samples[i] for i in part]) for part in parts]
        own: dict[tuple[int, int], CandidateSets] = {}
        sharding = self._learner.sharding
        with self._learner.whole_head() as head:
            for wave in waves(range(len(jobs)), self._group.world_size):
                if self._group.rank < len(wave):
                    step, part, samples = jobs[wave[self._group.rank]]
                    fresh = self._record_again(samples, head)
                    for place, candidates in zip(part, fresh, strict=True):
                        own[step, place] = candidates
                elif sharding is not None:
                    with self._autocast():
                        sharding.model.run_idle(self._learner.hidden_states)
        self._learner.model.train()
        together: dict[tuple[int, int], CandidateSets] = {}
        for theirs in self._group.gather(own):
            together |= theirs
        for step in range(first, last):
            places = range(self._settings.batch_size)
            self._fresh[step] = [together[step, place] for place in places]

    def _autocast(self) -> torch.autocast:
        """Of the model's passes."""
        dtype = self._learner.autocast
        return torch.autocast(self._learner.head.weight_VD.device.type, dtype, dtype is not None)

    def _record_again(self, samples: list[Sample], head: OutputHead) -> list[CandidateSets]:
        """Candidates of the supervised positions of ``samples``, which are computed together."""
        device = head.weight_VD.device
        batch = collate(samples, self._learner.loss.activity, trim=False).to(device)
        with self._autocast():
            hidden_BTD = self._learner.hidden_states(batch)
        fresh = []
        for row, sample in enumerate(samples):
            positions = sample.positions_P[sample.is_supervised_P].to(device)
            chunks = torch.split(positions, max(1, _LOGIT_ELEMENTS // head.vocabulary_size))
            fresh.append(
                CandidateSets.concatenate(
                    [
                        select_candidates(
                            head_logits(hidden_BTD[row, chunk], head),
                            batch.input_ids_BT[row, chunk + 1],
                            tau=self._settings.tau,
                            k_min=self._settings.k_min,
                            k_max=self._k_max,
                        ).to("cpu")
                        for chunk in chunks
                    ]
                )
            )
        return fresh
