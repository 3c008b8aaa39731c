"""Gradients and short runs of a tiny model on one worker, for the method's tests."""

import dataclasses
import math

import torch

from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import divide
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.method.training_loop import StepOptions, compute_gradients, train
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states, hidden_states
from lrmc_ray.models.head import head_of
from tests.support.plain_training import VOCABULARY, base_llama

PAPER = LossSettings("restricted", tail_samples=0, anchor_weight=0.0, seed=3)


LOSSES = {
    "restricted": PAPER,
    "restricted + anchor": dataclasses.replace(PAPER, anchor_weight=0.7),
    "restricted + tail": dataclasses.replace(PAPER, tail_samples=40),
    "restricted + tail + anchor": LossSettings("restricted", 40, 0.7, seed=3),
    "restricted + tail of all tokens + anchor": LossSettings("restricted", VOCABULARY, 0.7, seed=3),
    "soft": LossSettings("soft", 0, 0.0, seed=3),
    "soft + tail + anchor": LossSettings("soft", 40, 0.7, seed=3),
    "active_only": LossSettings("active_only", 0, 0.0, seed=3),
    "active_only + tail + anchor": LossSettings("active_only", 40, 0.7, seed=3),
    "full": LossSettings("full", 0, 0.0, seed=3),
    "full + anchor": LossSettings("full", 0, 0.7, seed=3),
    "dft": LossSettings("dft", 0, 0.0, seed=3),
    "dft + anchor": LossSettings("dft", 0, 0.7, seed=3),
    "asft": LossSettings("asft", 0, 0.0, seed=3, base_kl_weight=0.4),
    "asft + anchor": LossSettings("asft", 0, 0.7, seed=3, base_kl_weight=3.0),
    "eaft": LossSettings("eaft", 0, 0.0, seed=3),
    "flow": LossSettings("flow", 0, 0.0, seed=3),
    "frozen_tail": LossSettings("frozen_tail", 0, 0.0, seed=3),
    "frozen_tail + tail + anchor": LossSettings("frozen_tail", 40, 0.7, seed=3),
    "kl_to_base": LossSettings("kl_to_base", 0, 0.0, seed=3, base_kl_weight=0.4),
    "kl_to_base + anchor": LossSettings("kl_to_base", 0, 0.7, seed=3, base_kl_weight=3.0),
}


def base_of(loss, dtype=torch.float64):
    """The frozen base model that the loss needs, if it does."""
    if loss.loss not in NEED_BASE:
        return None
    base = base_llama(dtype)
    return LanguageModel(lambda batch: batch_hidden_states(base, batch), head_of(base))


def gradients_of(
    model,
    samples,
    loss,
    *,
    num_micro_batches=1,
    trim=True,
    step=0,
    attention_cost=math.inf,
    **options,
):
    """The gradients that ``compute_gradients`` leaves, and what it returns."""
    parameters = list(model.parameters())
    result = compute_gradients(
        LanguageModel(lambda batch: batch_hidden_states(model, batch), head_of(model)),
        parameters,
        divide(samples, num_micro_batches, loss.activity, trim=trim, attention_cost=attention_cost),
        loss,
        StepOptions(**{"base": base_of(loss), **options}),
        WorkerGroup(),
        step=step,
    )
    gradients = [parameter.grad for parameter in parameters]
    model.zero_grad(set_to_none=True)
    return gradients, result


def run(model, optimizer, batch_of_step, loss=PAPER, *, steps, first_step=0, **options):
    """All steps of a run on one worker."""
    forward = options.pop("forward", lambda batch: hidden_states(model, batch.input_ids_BT))
    lr_of_step = options.pop("lr_of_step", lambda step: 0.01)
    bad_steps = options.pop("bad_steps", 0)
    return train(
        LanguageModel(forward, head_of(model)),
        optimizer,
        batch_of_step,
        loss,
        StepOptions(**{"num_micro_batches": 2, **options}),
        WorkerGroup(),
        steps=range(first_step, steps),
        lr_of_step=lr_of_step,
        bad_steps=bad_steps,
    )


def bytes_of(tensors) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def state_of(optimizer) -> list[bytes]:
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return bytes_of(state[name] for state in states for name in sorted(state))
