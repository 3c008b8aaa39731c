"""How many tokens training will compute, from a part of its data; without Ray.

What samples begin with is computed once for a micro-batch or for a whole step where that is cheaper
(:mod:`lrmc_ray.method.fast.packing`, :mod:`lrmc_ray.method.shared_prefix`), and data whose prompts
begin alike cost half of what their length says, or less. So random batches of real rows are divided
as training divides them.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrmc_ray.chat.answers import Chat
from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError
from lrmc_ray.method.microbatch import Activity, Sample
from lrmc_ray.method.step_result import token_slots
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.method.training_loop import StepOptions
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.loading import empty_model, load_tokenizer
from lrmc_ray.models.packing import may_be_packed, price_of_attention
from lrmc_ray.record.encode import Example, encode_row
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import Source
from lrmc_ray.train.recompute import Recomputation
from lrmc_ray.train.routers import Routers
from lrmc_ray.train.split_forward import may_share

ROWS = 256
"""Rows that are tokenized, at random among the first ``ROWS_SEEN``."""
ROWS_SEEN = 4096

BATCHES = 32
"""Random batches in which tokens are counted."""

_ALL_LEARNED = Activity(supervised=1, prompt=math.inf)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one sample, on average."""

    alone: float
    """Of the sample itself."""
    computed: float
    """That a training step computes for it."""


def count_sample_tokens(
    sources: Sequence[Source],
    model_directory: Path,
    train: TrainSettings,
    *,
    max_length: int,
    on_gpu: bool,
    template_options: Mapping[str, Any] | None = None,
) -> TokenCounts:
    """Tokenize some rows of ``sources`` as recording does, and count.

    Which positions have a choice only the record will say. Here all that are learned do: what
    training leaves out behind the last one that has a choice is counted as computed.

    Args:
        sources: the training data.
        model_directory: with the tokenizer and ``config.json``; no weights are read.
        train: how batches are made and divided.
        max_length: of a sample, in tokens; a longer one is cut.
        on_gpu: where training will compute.
        template_options: ``model.template_options``.

    Raises:
        ConfigError: the model cannot be trained as ``train`` says.
        DataError: tokenizer or configuration cannot be loaded, or no row can be read.
    """
    chat = Chat(load_tokenizer(model_directory), template_options)
    rows = list(itertools.islice(read_rows(sources, Rejects(max_share=1.0)), ROWS_SEEN))
    rng = random.Random(0)
    samples: list[Sample] = []
    for row in rng.sample(rows, min(ROWS, len(rows))):
        try:
            cut = [_sample(example, max_length) for example in encode_row(row, chat)]
        except DataError:
            continue  # recording names the rows that it refuses
        samples += [sample for sample in cut if len(sample.positions_P)]
    if not samples:
        raise DataError("none of the first rows of the training data can be used")
    computed = 0
    # Every row once before any row again, as an epoch has it.
    order = itertools.chain.from_iterable(
        rng.sample(samples, len(samples)) for _ in itertools.count()
    )
    options = _step_options(model_directory, train, on_gpu=on_gpu)
    for _ in range(BATCHES):
        batch = list(itertools.islice(order, train.batch_size))
        computed += token_slots(options.divide(batch, _ALL_LEARNED))
    return TokenCounts(
        alone=sum(len(sample.input_ids_T) for sample in samples) / len(samples),
        computed=computed / (BATCHES * train.batch_size),
    )


def _sample(example: Example, max_length: int) -> Sample:
    """As it will be recorded, with no other candidates than the tokens that are learned."""
    ids_T = torch.tensor(example.input_ids[:max_length])
    gold_P = torch.tensor(example.is_target[:max_length], dtype=torch.bool).nonzero()[:, 0]
    gold_P = gold_P[gold_P > 0]
    gold_ids = ids_T[gold_P].int()
    return Sample(
        sample_id=example.sample_id,
        input_ids_T=ids_T,
        positions_P=gold_P - 1,
        is_supervised_P=torch.ones_like(gold_P, dtype=torch.bool),
        candidates=CandidateSets(
            offsets=torch.arange(len(gold_P) + 1),
            token_ids=gold_ids,
            logprobs=torch.zeros(len(gold_P), dtype=torch.float16),
            gold_ids=gold_ids,
        ),
    )


def _step_options(directory: Path, train: TrainSettings, *, on_gpu: bool) -> StepOptions:
    """How training will divide its batches, as far as the model's structure tells."""
    model = empty_model(directory)
    packs = train.packing and may_be_packed(model)
    shares = packs and may_share(
        train, on_cpu=not on_gpu, is_mixture=Routers(model, train.router_loss).is_mixture
    )
    return StepOptions(
        num_micro_batches=train.micro_batches,
        attention_cost=price_of_attention(model) if packs else math.inf,
        pack_up_to=longest_packed(model.config),
        share_prefix_up_to=(
            Recomputation(model, train.gradient_checkpointing).most_kept if shares else 0
        ),
    )
