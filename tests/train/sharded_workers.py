"""What one of W workers does in the tests of sharded training: short runs of tiny models."""

import contextlib
import dataclasses
import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tiny_models import make
from lrmc_ray.method import sharded_rows
from lrmc_ray.method.baselines.l2_sp import StartingPoint
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.step_result import StepResult
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.method.training_loop import StepOptions, train
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.train.sharding import shard_model
from tests.support.all_double import AllDouble
from tests.support.plain_training import VOCABULARY, random_samples

WORLD_SIZES = (2, 3)
STEPS = 3
MICRO_BATCHES = 3
LR = 1e-2
OURS = LossSettings("restricted", tail_samples=32, anchor_weight=0.5, seed=0)
PAPER = LossSettings("restricted", tail_samples=0, anchor_weight=0.0, seed=0)


@dataclass(frozen=True)
class Case:
    """One short run."""

    model: str = "llama"
    tied: bool = True
    loss: LossSettings = OURS
    dtype: torch.dtype = torch.float64
    optimizer: str = "moclip"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the optimizer."""
    l2_sp_weight: float = 0.0
    max_grad_norm: float | None = 1.0
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that are not trained."""
    num_samples: int = 7
    """Of a batch; 2 leave the third worker without a micro-batch."""
    by_rows: bool = False
    """However many rows of the vocabulary a step touches, no others are gathered."""
    offload: bool = False
    is_short: bool = False
    """The forward pass is under autocast of bf16."""
    is_alone_in_shards: bool = False
    """What it is compared with is in shards, too, all of them one worker's: experts are gathered in
    bf16, and autocast over the whole model leaves them in float32."""
    steps: int = STEPS
    is_small: bool = False
    """One layer, and a vocabulary of two tokens: fewer of each than there are workers."""

    def make_model(self, *, seed: int = 0) -> Any:
        """The model before it is trained."""
        vocabulary = 2 if self.is_small else VOCABULARY
        options: dict[str, Any] = {"num_hidden_layers": 1} if self.is_small else {}
        return make(
            self.model,
            seed=seed,
            vocab_size=vocabulary,
            tie_word_embeddings=self.tied,
            **options,
        )

    def samples(self, step: int) -> list[Sample]:
        """The global batch of a step."""
        samples = random_samples(self.num_samples, seed=step)
        return [_of_two_tokens(sample) for sample in samples] if self.is_small else samples


def _of_two_tokens(sample: Sample) -> Sample:
    """``sample`` with the tokens 0 and 1 alone; its candidates are the gold one, or both."""
    ids_T = sample.input_ids_T % 2
    gold_P = ids_T[sample.positions_P + 1].int()
    sizes_P = sample.candidates.sizes.clamp(max=2)
    tokens = [[gold, 1 - gold][:size] for gold, size in zip(gold_P.tolist(), sizes_P, strict=True)]
    candidates = CandidateSets(
        F.pad(sizes_P.cumsum(0), (1, 0)),
        torch.tensor([token for some in tokens for token in some], dtype=torch.int32),
        torch.full((int(sizes_P.sum()),), math.log(0.4), dtype=torch.float16),
        gold_P,
    )
    return dataclasses.replace(sample, input_ids_T=ids_T, candidates=candidates)


READINGS = {
    f"{clip}, {angle}": Case(options={"clip": clip, "angle": angle, "delta_max": 40.0})
    for clip, angle in [
        ("cautious", "global"),
        ("scale", "tensor"),
        ("momentum", "global"),
        ("project", "tensor"),
        ("rotate", "global"),
        ("none", "tensor"),
    ]
}
MODELS = {
    "llama": Case(),
    "qwen3": Case("qwen3", tied=False),
    "gemma3": Case("gemma3_text"),
    "mixture": Case("qwen3_moe", tied=False),
}
SINGLE = {
    f"{name} in float32": dataclasses.replace(case, dtype=torch.float32)
    for name, case in MODELS.items()
}
CASES = {
    **MODELS,
    **SINGLE,
    **READINGS,
    "capped second moment": Case(options={"second_moment": "capped", "delta_max": 40.0}),
    "bf16 moments": Case(dtype=torch.float32, options={"state_dtype": torch.bfloat16}),
    # After one step: rounded to bf16, what differs in the last bit can differ in the last of 8.
    "llama in bf16": Case(dtype=torch.float32, is_short=True, steps=1),
    "gemma3 in bf16, idle worker": Case(
        "gemma3_text", dtype=torch.float32, is_short=True, steps=1, num_samples=2
    ),
    "mixture in bf16": Case(
        "qwen3_moe",
        tied=False,
        dtype=torch.float32,
        is_short=True,
        is_alone_in_shards=True,
        steps=1,
    ),
    "kl_to_base in bf16": Case(
        loss=dataclasses.replace(PAPER, loss="kl_to_base"),
        dtype=torch.float32,
        is_short=True,
        steps=1,
    ),
    "adamw": Case(optimizer="adamw"),
    "adam_atan2": Case(optimizer="adam_atan2"),
    "c_adamw": Case(optimizer="c_adamw"),
    "mofo": Case(optimizer="mofo", options={"mofo_share": 0.3}),
    "mofo in float32": Case(optimizer="mofo", dtype=torch.float32),
    "magma": Case(optimizer="magma"),
    "l2_sp": Case(l2_sp_weight=0.5),
    "no clipping": Case(max_grad_norm=None),
    "paper, by rows": Case("qwen3", tied=False, loss=PAPER, by_rows=True),
    "tied, by rows": Case(by_rows=True),
    "offloaded, by rows": Case(offload=True, by_rows=True),
    "idle worker": Case("qwen3_moe", tied=False, num_samples=2, by_rows=True),
    "more workers than layers, tokens and micro-batches": Case(
        "qwen3", tied=False, num_samples=2, is_small=True
    ),
    "full": Case(loss=dataclasses.replace(OURS, loss="full")),
    "soft": Case(loss=dataclasses.replace(PAPER, loss="soft")),
    "asft": Case(loss=dataclasses.replace(PAPER, loss="asft")),
    "frozen_tail": Case(loss=dataclasses.replace(PAPER, loss="frozen_tail")),
    "frozen_tail, idle worker": Case(
        "qwen3", tied=False, loss=dataclasses.replace(PAPER, loss="frozen_tail"), num_samples=2
    ),
    "kl_to_base": Case(loss=dataclasses.replace(PAPER, loss="kl_to_base")),
    "frozen vocabulary": Case("qwen3", tied=False, frozen=("model.embed", "lm_head")),
    "frozen layer": Case(frozen=("model.layers.0",)),
}


@dataclass(frozen=True)
class Outcome:
    """What a worker saw."""

    parameters: dict[str, Tensor]
    """Whole, by name."""
    results: list[StepResult]
    angle_deg: float
    """Mean angle of MoClip over all steps."""
    num_own: int
    """Elements of the parameters that this worker holds."""


def run(case: Case, group: WorkerGroup, *, shard: bool) -> Outcome:
    """One worker's part in a run; in float64 all of it is."""
    with AllDouble() if case.dtype == torch.float64 else contextlib.nullcontext():
        return _run(case, group, shard=shard)


def _run(case: Case, group: WorkerGroup, *, shard: bool) -> Outcome:
    sharded_rows.LARGEST_SHARE = 1.0 if case.by_rows else 0.6
    model = case.make_model().to(case.dtype).train()
    if case.dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped products are of short types alone
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.frozen and name.startswith(case.frozen)))
    head = head_of(model)
    parameters: dict[str, Any] = dict(model.named_parameters())
    shards = None
    first_elements: list[int] = []
    if shard:
        sharding = shard_model(
            model,
            head,
            group,
            torch.device("cpu"),
            under_autocast=case.is_short,
            offload=case.offload,
        )
        shards, head = sharding.model, sharding.head
        assert sharding.shards.keys() == parameters.keys()
        parameters = {name: sharding.shards[name].own for name in parameters}
        first_elements = [
            held.first_element for held in map(sharding.shards.__getitem__, parameters)
        ]
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    penalty = StartingPoint(trained, case.l2_sp_weight)
    reduce_sums = group.sum_ if shard else None
    options = {"lr": LR, "weight_decay": 0.1, "reduce_sums": reduce_sums, **case.options}
    optimizer = make_optimizer(case.optimizer, trained, **options)
    if isinstance(optimizer, MoClip):
        optimizer.first_elements = first_elements
    results = list(
        train(
            LanguageModel(lambda batch: batch_hidden_states(model, batch), head, shards=shards),
            optimizer,
            case.samples,
            case.loss,
            StepOptions(
                num_micro_batches=MICRO_BATCHES,
                reduction="fast",
                autocast=torch.bfloat16 if case.is_short else None,
                max_grad_norm=case.max_grad_norm,
                penalize=penalty.add_gradient if case.l2_sp_weight else None,
                base=_base(case, group, shard=shard) if case.loss.loss in NEED_BASE else None,
            ),
            group,
            steps=range(case.steps),
            lr_of_step=lambda step: LR,
        )
    )
    angles = optimizer.angle_statistics() if isinstance(optimizer, MoClip) else None
    whole = {
        name: torch.cat(group.gather(parameter.detach())) if shard else parameter.detach()
        for name, parameter in parameters.items()
    }
    num_own = sum(parameter.numel() for parameter in parameters.values())
    return Outcome(whole, results, angles.mean_deg if angles else 0.0, num_own)


def start_of(case: Case) -> list[Tensor]:
    """The parameters before the first step."""
    return [parameter.detach() for parameter in case.make_model().parameters()]


def _base(case: Case, group: WorkerGroup, *, shard: bool) -> LanguageModel:
    base = case.make_model(seed=1).to(case.dtype).requires_grad_(False)
    head, shards = head_of(base), None
    if shard:
        sharding = shard_model(base, head, group, torch.device("cpu"), under_autocast=case.is_short)
        head, shards = sharding.head, sharding.model
    return LanguageModel(lambda batch: batch_hidden_states(base, batch), head, shards=shards)


def worker(rank: int, directory: Path, names: Sequence[str]) -> None:
    """Run the cases ``names`` in every group that ``rank`` belongs to; see ``outcomes``."""
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/group-of-{world_size}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=10),
        )
        group = WorkerGroup(rank, world_size)
        found = {name: run(CASES[name], group, shard=True) for name in names}
        found["llama again"] = run(SINGLE["llama in float32"], group, shard=True)
        dist.destroy_process_group()
        torch.save(found, directory / f"{world_size}-{rank}.pt")


def outcomes(directory: Path, names: Sequence[str]) -> dict[int, list[dict[str, Outcome]]]:
    """Of every world size, of every rank, of every case of ``names``."""
    # The server imports torch and transformers once, then forks every worker.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        worker, (directory, names), nprocs=max(WORLD_SIZES), start_method="forkserver"
    )
    return {
        world_size: [
            torch.load(directory / f"{world_size}-{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]
        for world_size in WORLD_SIZES
    }
