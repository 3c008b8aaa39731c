"""Batches of rows on both sides of a rotary border give what every row alone gives."""

import math

import pytest
import torch

from benchmarks.tiny_models import dynamic_ntk, long_rope, make
from lrmc_ray.method.layout import pad
from lrmc_ray.method.microbatch import Activity, Sample, collate
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.loading import load_model

MODELS = {"phi3": long_rope(32), "llama": dynamic_ntk(32)}
LENGTHS = [10, 40, 70, 32, 33, 70]


@pytest.fixture(scope="module", params=MODELS)
def directory(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    make(request.param, **MODELS[request.param]).save_pretrained(made)
    return made


def alone(directory, ids_T):
    """By a model that has seen nothing before."""
    with torch.inference_mode():
        return load_model(directory).base_model(input_ids=ids_T[None]).last_hidden_state[0]


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]


def test_a_row_does_not_depend_on_its_batch_nor_on_what_came_before(directory):
    model = load_model(directory)
    ids = sequences()
    for rows in ([0, 1, 2, 3, 4, 5], [0, 3], [3], [2, 5], [0, 1]):
        layout = pad([ids[row] for row in rows])
        with torch.inference_mode():
            hidden_BTD = batch_hidden_states(model, layout)
        for row, states_TD in zip(rows, hidden_BTD, strict=True):
            expected_TD = alone(directory, ids[row])
            torch.testing.assert_close(
                states_TD[: LENGTHS[row]], expected_TD, rtol=1e-4, atol=1e-4 * expected_TD.std()
            )


def test_the_borders_matter(directory):
    """What would come of it if the rows were run as they stand."""
    ids = sequences()
    layout = pad([ids[0], ids[2]])
    with torch.inference_mode():
        mixed_TD = load_model(directory).base_model(layout.input_ids_BT).last_hidden_state[0, :10]
    expected_TD = alone(directory, ids[0])
    assert (mixed_TD - expected_TD).abs().max() > 0.1 * expected_TD.std()


def sample(ids_T, last):
    """Supervised up to ``last``; what follows has no influence on the loss."""
    positions_P = torch.arange(len(ids_T) - 1)
    gold_P = ids_T[1:].int()
    sizes = [2 if position <= last else 1 for position in positions_P.tolist()]
    tokens = [
        token
        for gold, size in zip(gold_P.tolist(), sizes, strict=True)
        for token in [gold, (gold + 1) % 128][:size]
    ]
    return Sample(
        "s",
        ids_T,
        positions_P,
        torch.ones(len(positions_P), dtype=torch.bool),
        CandidateSets(
            torch.tensor([0, *sizes]).cumsum(0),
            torch.tensor(tokens, dtype=torch.int32),
            torch.full((len(tokens),), -0.5).half(),
            gold_P,
        ),
    )


@pytest.mark.parametrize("attention_cost", [math.inf, 0.0])
def test_a_trimmed_row_keeps_the_side_of_the_whole_one(directory, attention_cost):
    ids = sequences()
    lasts = [8, 2, 3, 4, 5, 6]  # packed, they would be fewer tokens
    samples = [sample(ids_T, last=last) for ids_T, last in zip(ids, lasts, strict=True)]
    activity = Activity(supervised=2, prompt=math.inf)
    batch = collate(samples, activity, attention_cost=attention_cost, pack_up_to=32)
    assert batch.full_lengths == LENGTHS
    assert batch.num_processed == sum(lasts) + len(lasts)
    with torch.inference_mode():
        hidden_BTD = batch_hidden_states(load_model(directory), batch)
    assert hidden_BTD.shape[:2] == batch.input_ids_BT.shape == (6, 9)
    for ids_T, last, states_TD in zip(ids, lasts, hidden_BTD, strict=True):
        expected_TD = alone(directory, ids_T)[: last + 1]
        torch.testing.assert_close(
            states_TD[: last + 1], expected_TD, rtol=1e-4, atol=1e-4 * expected_TD.std()
        )


def test_the_gradient_of_a_split_batch_is_the_sum_of_its_rows(directory):
    model = load_model(directory)
    ids = sequences()
    embedding = model.get_input_embeddings()

    def gradient(layouts):
        embedding.weight.grad = None
        for layout in layouts:
            hidden_BTD = batch_hidden_states(model, layout)
            for row, columns_T in zip(layout.rows, layout.columns, strict=True):
                hidden_BTD[row, columns_T].sin().sum().backward(retain_graph=True)
        return embedding.weight.grad.clone()

    together_VD = gradient([pad(ids)])
    apart_VD = gradient([pad([ids_T]) for ids_T in ids])
    torch.testing.assert_close(together_VD, apart_VD, rtol=1e-3, atol=1e-4 * apart_VD.abs().max())
