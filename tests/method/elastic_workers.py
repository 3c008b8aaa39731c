"""What one of W workers does in the tests of elastic training: short runs of a tiny model."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lrmc_ray.method import workers
from lrmc_ray.method.baselines.l2_sp import StartingPoint
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import Sample, active_length
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.shared_prefix import FEWEST_TOKENS
from lrmc_ray.method.step_result import StepResult
from lrmc_ray.method.training_loop import StepOptions, train
from lrmc_ray.method.vocabulary_rows import TrainedRows
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.train.split_forward import SplitModel
from tests.support.plain_training import (
    base_llama,
    random_sample,
    random_samples,
    samples_with_a_beginning,
    tiny_llama,
)
from tests.support.trained_rows import train_rows

WORLD_SIZES = (1, 2, 3, 4)
STEPS = 3
MICRO_BATCHES = 4
LR = 1e-2
WEIGHT_DECAY = 0.1

PAPER = LossSettings("restricted", tail_samples=0, anchor_weight=0.0, seed=0)
ANCHORED = dataclasses.replace(PAPER, anchor_weight=0.5)


@dataclass(frozen=True)
class Case:
    """One short run."""

    loss: LossSettings = PAPER
    tied: bool = True
    reduction: Literal["strict", "fast"] = "strict"
    dropout: float = 0.1
    attention_cost: float = math.inf
    """0 packs every micro-batch that has two samples."""
    shares_prefix: bool = False
    """All samples begin alike, and their beginning is computed once."""
    num_active: int = 7
    """Samples, of 8, that have an active position."""
    optimizer: str = "moclip"
    l2_sp_weight: float = 0.0
    by_rows: bool = False
    """Of the vocabulary, only the rows that the run touches are trained."""
    state_dtype: torch.dtype | None = None
    """Of MoClip's moments."""
    inner_alone: bool = False
    """Neither embedding nor output head is trained, as with adapters."""


CASES = {
    "tied": Case(),
    "untied": Case(tied=False),
    "bf16 moments": Case(ANCHORED, state_dtype=torch.bfloat16),
    "anchor": Case(ANCHORED),
    "anchor and tail": Case(dataclasses.replace(ANCHORED, tail_samples=32), tied=False),
    "full": Case(dataclasses.replace(ANCHORED, loss="full")),
    "soft": Case(dataclasses.replace(ANCHORED, loss="soft"), optimizer="adamw"),
    "active_only": Case(dataclasses.replace(PAPER, loss="active_only"), optimizer="adam_atan2"),
    "dft, c_adamw": Case(dataclasses.replace(PAPER, loss="dft"), optimizer="c_adamw"),
    "asft, magma": Case(dataclasses.replace(PAPER, loss="asft"), optimizer="magma"),
    "frozen_tail": Case(dataclasses.replace(ANCHORED, loss="frozen_tail")),
    "flow": Case(dataclasses.replace(PAPER, loss="flow"), optimizer="adamw"),
    "kl_to_base, mofo": Case(dataclasses.replace(ANCHORED, loss="kl_to_base"), optimizer="mofo"),
    "full, l2_sp": Case(dataclasses.replace(PAPER, loss="full"), l2_sp_weight=0.5),
    # Sorted by length, the empty samples are in the first parts: those of the first workers.
    "one busy part": Case(num_active=2),
    "no busy part": Case(num_active=0),
    "packed": Case(ANCHORED, attention_cost=0.0),
    "shared prefix": Case(
        dataclasses.replace(ANCHORED, tail_samples=32), attention_cost=0.0, shares_prefix=True
    ),
    "shared prefix, inner weights": Case(
        ANCHORED, attention_cost=0.0, shares_prefix=True, inner_alone=True
    ),
    "tied, by rows": Case(by_rows=True),
    "anchor and tail, by rows": Case(
        dataclasses.replace(ANCHORED, tail_samples=32), tied=False, by_rows=True
    ),
    "shared prefix, by rows": Case(
        dataclasses.replace(ANCHORED, tail_samples=32),
        attention_cost=0.0,
        shares_prefix=True,
        by_rows=True,
    ),
    "fast": Case(ANCHORED, reduction="fast"),
    "fast, shared prefix": Case(ANCHORED, attention_cost=0.0, shares_prefix=True, reduction="fast"),
    "fast, one busy part": Case(reduction="fast", num_active=2),
}


@dataclass(frozen=True)
class Outcome:
    """What a worker saw."""

    parameters: list[Tensor]
    results: list[StepResult]

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters' bytes."""
        content = b"".join(parameter.numpy().tobytes() for parameter in self.parameters)
        return hashlib.sha256(content).hexdigest()


def samples_of_step(case: Case, step: int) -> list[Sample]:
    """Eight samples; those without an active position have no choice anywhere."""
    if case.shares_prefix:
        return samples_with_a_beginning(8, common=FEWEST_TOKENS + 4, seed=step)
    generator = torch.Generator().manual_seed(1000 + step)
    samples = random_samples(20, seed=step)
    active = [sample for sample in samples if active_length(sample, case.loss.activity)]
    empty = [random_sample(generator, name="empty", sizes=[1] * (6 + i)) for i in range(8)]
    return active[: case.num_active] + empty[case.num_active :]


def run(case: Case, group: WorkerGroup) -> Outcome:
    """One worker's part in a run."""
    model = tiny_llama(tied=case.tied, dropout=case.dropout, dtype=torch.float32).train()
    named = dict(model.named_parameters())
    trained: dict[str, TrainedRows] = {}
    head_rows = None
    if case.by_rows:
        samples = [sample for step in range(STEPS) for sample in samples_of_step(case, step)]
        trained, head_rows = train_rows(model, samples, case.loss, steps=STEPS)
        named |= {name: rows.rows_XD for name, rows in trained.items()}
    if case.inner_alone:
        for name in [name for name in named if "layers" not in name]:
            named.pop(name).requires_grad_(False)
    parameters = list(named.values())
    penalty = StartingPoint(parameters, case.l2_sp_weight)
    frozen = base_llama(torch.float32)
    base = LanguageModel(lambda batch: batch_hidden_states(frozen, batch), head_of(frozen))

    def after_update(lr: float) -> None:
        for rows in trained.values():
            rows.write_back(1 - lr * WEIGHT_DECAY)

    results = train(
        LanguageModel(
            lambda batch: batch_hidden_states(model, batch),
            head_of(model),
            SplitModel(model),
            head_rows,
        ),
        make_optimizer(
            case.optimizer,
            parameters,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            state_dtype=case.state_dtype,
        ),
        lambda step: samples_of_step(case, step),
        case.loss,
        StepOptions(
            num_micro_batches=MICRO_BATCHES,
            reduction=case.reduction,
            max_grad_norm=1.0,
            attention_cost=case.attention_cost,
            share_prefix_up_to=math.inf if case.shares_prefix else 0,
            base=base if case.loss.loss in NEED_BASE else None,
            penalize=penalty.add_gradient if case.l2_sp_weight else None,
            after_update=after_update,
        ),
        group,
        steps=range(STEPS),
        lr_of_step=lambda step: LR,
    )
    steps = list(results)
    return Outcome([parameter.detach() for parameter in model.parameters()], steps)


def worker(rank: int, directory: Path, names: Sequence[str]) -> None:
    """Run the cases ``names`` in every group that ``rank`` belongs to; see ``outcomes``."""
    torch.set_num_threads(1)
    workers.BUCKET_ELEMENTS = 5000  # so that even a tiny model takes several collectives
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{directory}/group-of-{world_size}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(minutes=10),
            )
        group = WorkerGroup(rank, world_size)
        outcomes = {name: run(CASES[name], group) for name in names}
        if world_size > 1:
            dist.destroy_process_group()
        torch.save(outcomes, directory / f"{world_size}-{rank}.pt")


def outcomes(directory: Path) -> dict[int, list[dict[str, Outcome]]]:
    """Of every world size, of every rank, of every case."""
    return {
        world_size: [
            torch.load(directory / f"{world_size}-{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]
        for world_size in WORLD_SIZES
    }
