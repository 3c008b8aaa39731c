import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lrmc_ray.train.sample_order import epoch_order, samples_of_step

quick = settings(deadline=None, max_examples=100, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


# These orders are part of every checkpoint and every published result: a run that goes on after an
# update must see the samples that it would have seen before. Written down once, never recomputed.
GOLDEN = {
    (10, 0, 0): [0, 7, 8, 6, 9, 5, 1, 3, 2, 4],
    (10, 0, 1): [9, 4, 2, 1, 0, 7, 8, 5, 3, 6],
    (10, 7, 0): [6, 3, 9, 1, 2, 0, 5, 7, 8, 4],
    (17, 2**32 - 1, 3): [1, 16, 14, 4, 2, 11, 10, 0, 13, 8, 5, 15, 6, 9, 7, 12, 3],
}


@pytest.mark.parametrize(("num_samples", "seed", "epoch"), GOLDEN)
def test_the_order_never_changes(num_samples, seed, epoch):
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert order.tolist() == GOLDEN[num_samples, seed, epoch]


def test_the_batches_of_a_run_never_change():
    batches = [samples_of_step(10, step, batch_size=4, seed=0) for step in range(5)]
    assert batches == [[0, 7, 8, 6], [9, 5, 1, 3], [2, 4, 9, 4], [2, 1, 0, 7], [8, 5, 3, 6]]


@given(num_samples=st.integers(1, 300), seed=seeds, epoch=st.integers(0, 10**6))
@quick
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(num_samples))


@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 100), seed=seeds)
@quick
def test_every_sample_comes_exactly_once_per_epoch_whatever_the_batch_size(
    num_samples, batch_size, seed
):
    num_epochs = 3
    num_steps = -(-num_epochs * num_samples // batch_size)
    seen = []
    for step in range(num_steps):
        batch = samples_of_step(num_samples, step, batch_size=batch_size, seed=seed)
        assert len(batch) == batch_size
        seen += batch
    for epoch in range(num_epochs):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))
        assert part == epoch_order(num_samples, seed=seed, epoch=epoch).tolist()


@given(
    num_samples=st.integers(1, 40),
    step=st.integers(0, 10**6),
    batch_size=st.integers(1, 20),
    seed=seeds,
)
@quick
def test_a_step_depends_on_its_arguments_alone(num_samples, step, batch_size, seed):
    """A worker that joins late, or starts again, asks for a step without those before it."""
    np.random.seed(seed % 1000)
    alone = samples_of_step(num_samples, step, batch_size=batch_size, seed=seed)
    np.random.seed(0)
    np.random.permutation(5)
    for other in (step + 1, 0):
        samples_of_step(num_samples, other, batch_size=batch_size, seed=seed)
    assert samples_of_step(num_samples, step, batch_size=batch_size, seed=seed) == alone
    # Any other batch size cuts the same order at other places.
    one_by_one = [
        samples_of_step(num_samples, position, batch_size=1, seed=seed)[0]
        for position in range(step * batch_size, (step + 1) * batch_size)
    ]
    assert alone == one_by_one


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100
    # Seed and epoch are two numbers, not their sum.
    assert tuple(epoch_order(50, seed=1, epoch=0)) != tuple(epoch_order(50, seed=0, epoch=1))


def test_every_sample_is_as_likely_in_every_place():
    """Of fair shuffles of 5 samples, 99.9 % stay below chi-square's quantile for 4 x 4 degrees."""
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), epoch_order(5, seed=3, epoch=epoch)] += 1
    assert 4 / 5 * ((counts - 400) ** 2 / 400).sum() < stats.chi2(16).ppf(0.999)


def test_indices_are_plain_integers():
    assert {type(index) for index in samples_of_step(5, 3, batch_size=4, seed=0)} == {int}
