"""Which samples are recorded for a search."""

import subprocess
import sys

import pytest

from lrmc_ray.config import load_settings
from lrmc_ray.train.sample_order import samples_of_step
from lrmc_ray.tune.used import recorded_samples, samples_of_search


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' * 100)

    def of(*changes):
        return load_settings(
            None, [f'data.train="{path}"', "train.steps=5", "train.batch_size=4", *changes]
        )

    return of


def test_those_of_the_steps_where_nothing_else_is_searched(settings):
    found = samples_of_search(settings("parameters.lr={low=1e-5,high=1e-4}"))
    assert found.recipe["places"] == 20
    assert found.choose([""] * 100) == {
        index for step in range(5) for index in samples_of_step(100, step, batch_size=4, seed=0)
    }
    assert recorded_samples(settings(), 100) == 20


def test_the_largest_of_the_searched_steps_and_batch_sizes(settings):
    found = samples_of_search(
        settings(
            "parameters.steps={low=3,high=10}",
            "parameters.batch_size={choices=[2,6]}",
            "train.micro_batches=1",
        )
    )
    assert found.recipe["places"] == 60


@pytest.mark.parametrize(
    "changes",
    [
        ["train.epochs=0.1"],
        ["parameters.seed={choices=[0,1]}"],
        ["parameters.epochs={choices=[0.1,0.2]}"],
        ["parameters.holdout_share={low=0.1,high=0.2}", "train.evaluate_every=1"],
        ['parameters.tau={range="auto"}'],
        ['train.loss="flow"', "train.anchor_weight=0"],
        ['parameters.loss={choices=["restricted","flow"]}', "train.anchor_weight=0"],
        ["train.steps=19"],  # 76 of 100 samples
        ["train.steps=15", "train.evaluate_every=1", "train.holdout_share=0.2"],  # 60 and 20
    ],
)
def test_all_where_the_order_or_the_losses_are_not_known(settings, changes):
    assert samples_of_search(settings(*changes)) is None
    assert recorded_samples(settings(*changes), 100) == 100


def test_held_out_samples_are_recorded_as_well(settings):
    held_out = settings("train.evaluate_every=1", "train.holdout_share=0.2")
    assert recorded_samples(held_out, 100) == 40
    assert len(samples_of_search(held_out).choose([""] * 100)) == 40
    assert samples_of_search(settings("train.steps=18")).recipe["places"] == 72


def test_it_loads_neither_torch_nor_ray():
    code = (
        "import sys, lrmc_ray.tune.used; print({'torch', 'ray', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
