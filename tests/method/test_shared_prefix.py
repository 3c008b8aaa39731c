"""The beginning that all samples of a step share, computed once: the same gradients."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, Qwen3Config

from lrmc_ray.method import shared_prefix
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import Activity
from lrmc_ray.method.names import Reduction
from lrmc_ray.method.shared_prefix import FEWEST_TOKENS, share_prefix
from lrmc_ray.method.step_result import summarize
from lrmc_ray.method.training_loop import StepOptions, compute_gradients
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.train.split_forward import SplitModel, can_split
from tests.support.method_training import LOSSES
from tests.support.plain_training import (
    largest_difference,
    plain_gradients,
    plain_sums,
    random_samples,
    samples_with_a_beginning,
    tiny_llama,
)

COMMON = FEWEST_TOKENS + 3
EVERY = Activity(supervised=1, prompt=1)


def gradients_of(
    model, samples, loss, *, parts, share=math.inf, reduction: Reduction = "strict", split=None
):
    """Gradients of all parameters, and what ``compute_gradients`` returns."""
    options = StepOptions(
        num_micro_batches=parts,
        attention_cost=0.0,
        share_prefix_up_to=share,
        reduction=reduction,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = compute_gradients(
        LanguageModel(
            lambda batch: batch_hidden_states(model, batch),
            head_of(model),
            split or SplitModel(model),
        ),
        parameters,
        options.divide(samples, loss.activity),
        loss,
        options,
        WorkerGroup(),
        step=2,
    )
    gradients = [parameter.grad for parameter in parameters]
    model.zero_grad(set_to_none=True)
    return gradients, result


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("reduction", ["strict", "fast"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_from_full_logits_of_each_sample(parts, reduction, tied):
    """In float64; losses at positions of the beginning as well (the anchor), and a tail."""
    loss = LOSSES["restricted + tail + anchor"]
    model = tiny_llama(tied=tied)
    samples = samples_with_a_beginning(7, common=COMMON)
    main, _ = plain_sums(model, samples, loss, step=2)
    expected = plain_gradients(model, samples, loss, step=2)
    gradients, result = gradients_of(model, samples, loss, parts=parts, reduction=reduction)
    assert {batch.num_prefix for batch in result.micro_batches} == {COMMON}
    assert result.loss_sum == pytest.approx(main.item(), rel=1e-12)
    assert largest_difference(gradients, expected) < 1e-10


class Counted(SplitModel):
    """Counts the tokens that the model sees."""

    def __init__(self, model):
        super().__init__(model)
        self.tokens = []

    def beginning(self, input_ids_1X):
        self.tokens.append(input_ids_1X.shape[1])
        return super().beginning(input_ids_1X)

    def rest(self, batch, states):
        hidden_1TD = super().rest(batch, states)
        self.tokens.append(hidden_1TD.shape[1])
        return hidden_1TD


def test_every_token_of_the_beginning_is_computed_once():
    loss = LossSettings("full", 0, 1.0, seed=0)
    model = tiny_llama()
    samples = samples_with_a_beginning(6, common=COMMON)
    split = Counted(model)
    _, result = gradients_of(model, samples, loss, parts=3, split=split)
    beginning, *rest = split.tokens
    assert beginning == COMMON
    assert rest == [batch.input_ids_BT.shape[1] - COMMON for batch in result.micro_batches]
    step = summarize(0, samples, result, 1.0, 0.1, 0)
    assert step.num_padded == sum(split.tokens)
    assert step.num_processed - step.num_shared == step.num_padded


def test_frozen_beginnings_and_weights_get_no_gradient():
    """With the embedding and the first layer frozen, no gradient goes back to them."""
    loss = LOSSES["restricted + anchor"]
    model = tiny_llama(tied=False)
    samples = samples_with_a_beginning(4, common=COMMON)
    expected, _ = gradients_of(model, samples, loss, parts=2)
    names = [name for name, _ in model.named_parameters()]
    frozen = [n for n in names if "embed" in n or "layers.0" in n]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found, _ = gradients_of(model, samples, loss, parts=2)
    kept = [g for n, g in zip(names, expected, strict=True) if n not in frozen]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("reduction", ["strict", "fast"])
def test_gradients_of_inner_weights_alone(reduction):
    """As adapters are trained: neither the embedding nor the output head is."""
    loss = LOSSES["restricted + anchor"]
    model = tiny_llama()
    samples = samples_with_a_beginning(4, common=COMMON)
    expected = dict(
        zip(
            [name for name, _ in model.named_parameters()],
            plain_gradients(model, samples, loss, step=2),
            strict=True,
        )
    )
    model.requires_grad_(False)
    names = [name for name in expected if "q_proj" in name]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    found, result = gradients_of(model, samples, loss, parts=3, reduction=reduction)
    assert {batch.num_prefix for batch in result.micro_batches} == {COMMON}
    assert largest_difference(found, [expected[name] for name in names]) < 1e-10


def divided(samples, *, parts=2, longest=math.inf, pack_up_to=math.inf, cost=0.0):
    batches = StepOptions(num_micro_batches=parts, attention_cost=cost).divide(samples, EVERY)
    return share_prefix(batches, longest, pack_up_to)


def test_length_of_the_beginning(monkeypatch):
    """It ends with what all have in common, and leaves a token of every micro-batch."""
    samples = samples_with_a_beginning(5, common=COMMON)
    assert [batch.num_prefix for batch in divided(samples)] == [COMMON] * 2
    # A sample alone in its row is packed as well.
    alone = divided(samples, parts=5)
    assert [batch.num_prefix for batch in alone] == [COMMON] * 5
    assert all(batch.is_visible_TT is not None for batch in alone)
    # Each of four has less in common with the first, the last one least.
    ids_T, sample = samples[0].input_ids_T, samples[0]
    differing = []
    for length in (len(ids_T), COMMON - 1, COMMON, COMMON - 2):
        other_T = torch.where(torch.arange(len(ids_T)) < length, ids_T, ids_T + 1)
        differing.append(dataclasses.replace(sample, input_ids_T=other_T))
    assert [batch.num_prefix for batch in divided(differing, parts=4)] == [COMMON - 2] * 4
    # Two samples alike, and two micro-batches that are nothing but the beginning and one token.
    twice = [samples[0], samples[0]]
    length = len(samples[0].input_ids_T)
    batches = divided(twice)
    assert [b.num_prefix for b in batches] == [b.input_ids_BT.shape[1] - 1 for b in batches]
    assert batches[0].num_prefix == length - 2  # the last token has no position of a loss
    monkeypatch.setattr(shared_prefix, "FEWEST_TOKENS", COMMON + 1)
    assert [batch.num_prefix for batch in divided(samples)] == [0, 0]


def test_nothing_is_shared_where_it_may_not_be():
    samples = samples_with_a_beginning(4, common=COMMON)
    longest = max(len(sample.input_ids_T) for sample in samples)
    row = max(batch.input_ids_BT.shape[1] for batch in divided(samples))
    for shared, options in (
        (True, {"longest": row}),
        (False, {"longest": row - 1}),
        (True, {"parts": 4, "pack_up_to": longest}),
        (False, {"parts": 4, "pack_up_to": longest - 1}),
        (False, {"parts": 1}),
        (False, {"cost": math.inf}),
    ):
        batches = divided(samples, **options)
        assert [batch.num_prefix > 0 for batch in batches] == [shared] * len(batches), options
    assert not any(batch.num_prefix for batch in divided(random_samples(6), parts=3))


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SHAPE),
        Gemma3TextConfig(**SHAPE, sliding_window=64, layer_types=None),
        GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_divide_their_pass(config):
    torch.manual_seed(0)
    assert can_split(AutoModelForCausalLM.from_config(config))


def test_a_model_without_such_a_cache_is_left_alone():
    model = tiny_llama(dtype=torch.float32)
    forward = model.model.forward

    def forgetful(*args, **kwargs):
        kwargs.pop("past_key_values", None)
        return forward(*args, **kwargs)

    model.model.forward = forgetful
    assert not can_split(model)
