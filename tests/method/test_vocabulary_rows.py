"""Training only the rows of the vocabulary that are touched: the bits of training all."""

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.microbatch import MicroBatch
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.training_loop import StepOptions, train
from lrmc_ray.method.vocabulary_rows import (
    EmbeddingLookup,
    HeadRows,
    TrainedRows,
    distinct_padded,
    tokens_of,
)
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from tests.support.method_training import PAPER
from tests.support.operators import NoHostSync
from tests.support.plain_training import VOCABULARY, random_samples, tiny_llama
from tests.support.trained_rows import train_rows

STEPS = 4
LR = 1e-2
TAILED = LossSettings("restricted", 3, 0.5, seed=0)


def batch_of_step(step):
    return random_samples(3, seed=step % 2)


def run(model, loss=TAILED, *, by_rows, optimizer="moclip", decay=0.0, options=None, seen=None):
    """Train ``model`` in place; the numbers of trained rows, and the steps' results."""
    head = head_of(model)
    parameters = dict(model.named_parameters())
    trained: dict[str, TrainedRows] = {}
    head_rows = None
    if by_rows:
        samples = [sample for step in range(STEPS) for sample in batch_of_step(step)]
        trained, head_rows = train_rows(model, samples, loss, steps=STEPS)
        parameters |= {name: rows.rows_XD for name, rows in trained.items()}

    def after_update(lr):
        for rows in trained.values():
            rows.write_back(1 - lr * decay)

    steps = train(
        LanguageModel(lambda batch: batch_hidden_states(model, batch), head, rows=head_rows),
        make_optimizer(optimizer, parameters.values(), lr=LR, weight_decay=decay),
        batch_of_step,
        loss,
        StepOptions(num_micro_batches=2, after_update=after_update, **(options or {})),
        WorkerGroup(),
        steps=range(STEPS),
        lr_of_step=lambda step: LR / (1 + step),
    )
    return {name: len(rows.rows_XD) for name, rows in trained.items()}, list(steps)


def assert_same_bits(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "decay", "options"),
    [
        ("moclip", 0.0, {}),
        ("moclip", 0.1, {}),
        ("moclip", 0.1, {"max_grad_norm": 0.5}),
        ("moclip", 0.0, {"reduction": "fast", "attention_cost": 0.0}),
        ("adam_atan2", 0.1, {}),
        ("adamw", 0.0, {}),
    ],
)
def test_weights_are_those_of_training_all_rows(tied, optimizer, decay, options):
    """Those of rows that are not trained as well, which only decay."""
    whole, apart = (tiny_llama(tied=tied, dtype=torch.float32).train() for _ in range(2))
    start = [p.detach().clone() for p in whole.parameters()]
    arguments = {"optimizer": optimizer, "decay": decay, "options": options}
    _, expected = run(whole, by_rows=False, **arguments)
    sizes, found = run(apart, by_rows=True, **arguments)
    assert all(0 < size < 0.9 * VOCABULARY for size in sizes.values())
    assert len(sizes) == (1 if tied else 2)
    assert_same_bits(apart, whole)
    assert found == expected
    assert not any(torch.equal(p, s) for p, s in zip(whole.parameters(), start, strict=True))


@pytest.mark.parametrize("loss", [PAPER, dataclasses.replace(PAPER, loss="soft")])
def test_without_a_tail(loss):
    whole, apart = (tiny_llama(dtype=torch.float32).train() for _ in range(2))
    run(whole, loss, by_rows=False)
    run(apart, loss, by_rows=True)
    assert_same_bits(apart, whole)


def test_embeddings_that_are_scaled_and_have_a_padding_token():
    """Gemma multiplies its embeddings, and its padding token's row gets no gradient from them."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )

    def model():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).train()

    whole, apart = model(), model()
    assert whole.get_input_embeddings().padding_idx == 0
    run(whole, by_rows=False)
    run(apart, by_rows=True)
    assert_same_bits(apart, whole)
    assert apart.get_input_embeddings().padding_idx == 0
    assert len(apart.get_input_embeddings().weight) == VOCABULARY


def test_an_embedding_is_as_it_was_without_a_gradient():
    embedding = torch.nn.Embedding(10, 4)
    plain = embedding.weight.detach().clone()
    rows = TrainedRows(embedding.weight, torch.tensor([7, 2, 2]))
    EmbeddingLookup(embedding, rows)
    assert rows.token_ids_X.tolist() == [2, 7]
    with torch.no_grad():
        rows.rows_XD.add_(1)
        assert torch.equal(embedding(torch.arange(10)), plain)
    assert torch.equal(embedding(torch.tensor([7, 2])), plain[[7, 2]] + 1)
    with pytest.raises(IndexError, match="token 3 is not among the 2 trained ones"):
        embedding(torch.tensor([2, 3]))
    assert embedding.weight is rows.weight_VD  # behind an error as well
    assert torch.equal(embedding.eval()(torch.arange(10)), plain)
    rows.write_back(0.5)
    expected = plain * 0.5
    expected[[2, 7]] = plain[[2, 7]] + 1
    assert torch.equal(embedding.weight, expected)


def test_tokens_of_samples():
    """Candidates of a position without a choice are left out, and those of prompts by the loss."""
    samples = random_samples(4, seed=1)
    for loss in (TAILED, PAPER):
        inputs, outputs = tokens_of(samples, loss.activity)
        assert set(inputs.tolist()) == {0}.union(*(s.input_ids_T.tolist() for s in samples))
        expected = set()
        for sample in samples:
            sets, start = sample.candidates, 0
            for size, learned in zip(sets.sizes.tolist(), sample.is_supervised_P, strict=True):
                tokens = sets.token_ids[start : start + size].tolist()
                start += size
                if loss is TAILED or (learned and size > 1):
                    expected |= set(tokens)
        assert set(outputs.tolist()) == expected


def test_a_micro_batch_keeps_its_tokens():
    """Places of rows stand in for candidates alone: the model's own code sees token ids."""
    (sample,) = random_samples(1)
    batch = StepOptions().divide([sample], TAILED.activity)[0]
    model = tiny_llama()
    head = head_of(model)
    rows = TrainedRows(head.weight_VD, sample.candidates.token_ids.long())
    found = HeadRows(head, rows).batch(batch)
    assert isinstance(found, MicroBatch)
    assert torch.equal(found.input_ids_BT, batch.input_ids_BT)
    for places, tokens in (
        (found.supervised.candidates.token_ids, batch.supervised.candidates.token_ids),
        (found.anchored.candidates.gold_ids, batch.anchored.candidates.gold_ids),
    ):
        assert torch.equal(rows.token_ids_X[places.long()], tokens.long())
        assert places.dtype == torch.int32
    assert HeadRows(head, rows).head.vocabulary_size == VOCABULARY


@pytest.mark.parametrize("padding", [None, 3, 9], ids=["none", "there", "elsewhere"])
def test_distinct_tokens_are_found_without_waiting_for_a_device(padding, monkeypatch):
    """As on a GPU: the same numbers, and the same gradient to the last bit."""
    tokens_BT = torch.tensor([[5, 3, 5, 1], [7, 7, 3, 0]])
    tokens_X, index_BT = distinct_padded(tokens_BT)
    assert tokens_X.tolist() == [0, 1, 3, 5, 7, 7, 7, 7]
    assert torch.equal(tokens_X[index_BT], tokens_BT)
    assert int(index_BT.max()) == 4
    assert [x.numel() for x in distinct_padded(tokens_BT[:, :0])] == [0, 0]
    upstream = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    found: list[tuple[Tensor, Tensor]] = []
    for way in (EmbeddingLookup.distinct, lambda _, tokens: distinct_padded(tokens)):
        monkeypatch.setattr(EmbeddingLookup, "distinct", way)
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(10, 6, padding_idx=padding)
        embedding.weight.data.normal_()
        EmbeddingLookup(embedding)
        with NoHostSync() if found else contextlib.nullcontext():
            values_BTD = embedding(tokens_BT)
            (values_BTD * upstream).sum().backward()
        assert embedding.padding_idx == padding
        found.append((values_BTD, embedding.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert padding != 3 or not found[0][1][3].any()
    assert found[0][1][7].any()
