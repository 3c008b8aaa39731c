"""A model of which only the rows of the vocabulary are trained that a run touches."""

from collections.abc import Iterable

import torch
from torch import nn

from lrmc_ray.method.losses import LossSettings
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.restricted_loss import draw_tail
from lrmc_ray.method.vocabulary_rows import EmbeddingLookup, HeadRows, TrainedRows, tokens_of
from lrmc_ray.models.head import head_of


def train_rows(
    model: nn.Module, samples: Iterable[Sample], loss: LossSettings, *, steps: int
) -> tuple[dict[str, TrainedRows], HeadRows]:
    """Divide embedding and head of a Llama; the trained rows by the weight's name, and the head's.

    Args:
        model: changed in place.
        samples: of all steps.
        loss: says which candidates and tails are used.
        steps: of the run.
    """
    head = head_of(model)
    inputs, outputs = tokens_of(samples, loss.activity)
    tails = [
        draw_tail(loss.tail_samples, head.vocabulary_size, seed=loss.seed, step=step).ids_R
        for step in range(steps if loss.tail_samples else 0)
    ]
    outputs = torch.cat([outputs, *tails])
    embedding = model.get_input_embeddings()
    tied = embedding.weight is head.weight_VD
    used = torch.cat([inputs, outputs]) if tied else inputs
    trained = {"model.embed_tokens.weight": TrainedRows(embedding.weight, used)}
    EmbeddingLookup(embedding, trained["model.embed_tokens.weight"])
    if not tied:
        trained["lm_head.weight"] = TrainedRows(head.weight_VD, outputs)
    return trained, HeadRows(head, list(trained.values())[-1])
