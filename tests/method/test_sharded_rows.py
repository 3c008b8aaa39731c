"""The rows of a vocabulary in shards: one worker's look-ups, and that it waits for no device."""

import pytest
import torch
from torch import Tensor, nn

from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.losses import LossSettings
from lrmc_ray.method.microbatch import collate
from lrmc_ray.method.sharded_rows import ShardedVocabulary
from lrmc_ray.method.vocabulary_rows import EmbeddingLookup, distinct_padded
from lrmc_ray.method.workers import WorkerGroup
from tests.support.plain_training import VOCABULARY, random_samples

torch.set_num_threads(1)

LOSS = LossSettings("restricted", 5, 0.5, seed=0)
SIZE = 6


def vocabulary(device: str, *, tied: bool, padding: int | None = None):
    """Embedding and head of random weights, in shards, with nothing left in their own places."""
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, SIZE, padding_idx=padding)
    embedding.weight.data.normal_()
    weight = embedding.weight if tied else nn.Parameter(torch.randn(VOCABULARY, SIZE))
    plain = embedding.weight.detach().clone(), weight.detach().clone()
    embedding, weight = embedding.to(device), nn.Parameter(weight.detach().to(device))
    head = OutputHead(embedding.weight if tied else weight)
    shards = ShardedVocabulary(embedding, head, WorkerGroup(), torch.device(device))
    embedding.weight = nn.Parameter(
        torch.full((1,), torch.nan, device=device).expand(VOCABULARY, SIZE), requires_grad=False
    )
    return embedding, shards, plain


def step(device: str, *, tied: bool, whole_head: bool = False, padding: int | None = None):
    """What is looked up and multiplied in a step of two micro-batches, and the rows' gradients."""
    embedding, shards, plain = vocabulary(device, tied=tied, padding=padding)
    # Rows of token 0, which fill up the shorter one of two sequences.
    batches = [collate(random_samples(2, seed=s), LOSS.activity) for s in range(2)]
    tail = LOSS.tail_on_host(0, OutputHead(plain[1]))
    found = []
    with shards.of_step(batches, tail, whole_head=whole_head) as rows:
        for batch in batches:
            moved = batch.to(torch.device(device))
            values_BTD = embedding(moved.input_ids_BT)
            assert embedding.padding_idx == padding
            mapped = rows.batch(moved)
            sets = mapped.supervised.candidates
            products_E = rows.head.weight_VD[sets.token_ids.long()] @ torch.ones(
                SIZE, device=device
            )
            ramp = torch.arange(values_BTD.numel(), device=device).view_as(values_BTD)
            ((values_BTD * ramp).sum() + products_E.square().sum()).backward()
            found += [values_BTD.detach(), products_E.detach()]
        shards.reduce()
    gradients = [weight.own_XD.grad for weight in shards.weights]
    return found, gradients, (batches, plain)


def truth(batches, plain, *, tied: bool, padding: int | None = None):
    """The same by the whole weights, in float64."""
    embedded, output = (x.double().requires_grad_() for x in plain)
    if tied:
        output = embedded
    found = []
    for batch in batches:
        values_BTD = nn.functional.embedding(batch.input_ids_BT, embedded, padding_idx=padding)
        sets = batch.supervised.candidates
        products_E = output[sets.token_ids.long()].sum(1)
        ramp = torch.arange(values_BTD.numel()).view_as(values_BTD)
        ((values_BTD * ramp).sum() + products_E.square().sum()).backward()
        found += [values_BTD.detach(), products_E.detach()]
    return found, [x.grad for x in ([embedded] if tied else [embedded, output])]


@pytest.mark.parametrize("whole_head", [False, True], ids=["rows", "whole head"])
@pytest.mark.parametrize("padding", [None, 0, VOCABULARY - 1], ids=["none", "there", "elsewhere"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_a_step_has_the_numbers_of_the_whole_weights(way, tied, padding, whole_head, monkeypatch):
    """Tokens are counted on a CPU; a GPU gets as many as there are places."""
    if way == "gpu":
        monkeypatch.setattr(EmbeddingLookup, "distinct", lambda _, ids: distinct_padded(ids))
    found, gradients, inputs = step("cpu", tied=tied, whole_head=whole_head, padding=padding)
    values, expected = truth(*inputs, tied=tied, padding=padding)
    for our, their in zip((*found, *gradients), (*values, *expected), strict=True):
        assert our.any()
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("padding", [None, 0], ids=["no padding", "padding"])
@pytest.mark.parametrize("whole_head", [False, True], ids=["rows", "whole head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_host_reads_nothing_of_a_device(tied, whole_head, padding):
    """On the device meta, whose tensors have no content: whoever reads one gets an error."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").tolist()
    found, gradients, _ = step("meta", tied=tied, whole_head=whole_head, padding=padding)
    tensors: list[Tensor] = [*found, *gradients]
    assert all(x.device.type == "meta" for x in tensors)
    assert [x.shape for x in gradients] == [(VOCABULARY, SIZE)] * (1 if tied else 2)


def test_a_tail_of_the_host_is_that_of_the_step():
    head = OutputHead(torch.zeros(VOCABULARY, 2))
    ours, theirs = LOSS.tail_on_host(3, head), LOSS.tail_of_step(3, head)
    assert torch.equal(ours.ids_R, theirs.ids_R)
    assert torch.equal(ours.logweights_R, theirs.logweights_R)
    on_meta = OutputHead(torch.zeros(VOCABULARY, 2, device="meta"))
    assert LOSS.tail_on_host(3, on_meta).ids_R.device.type == "cpu"
    assert LossSettings("restricted", 0, 0.0, seed=0).tail_on_host(0, head) is None


def test_a_token_whose_row_is_not_there_is_named():
    embedding, shards, _ = vocabulary("cpu", tied=True)
    with shards.embedding.gathered(torch.tensor([1, 4])):
        with pytest.raises(IndexError, match="the row of token 3 was not gathered"):
            embedding(torch.tensor([1, 3]))
        assert embedding.weight.shape == (VOCABULARY, SIZE)  # behind an error as well
        assert embedding.padding_idx is None
