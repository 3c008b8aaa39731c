"""What the documents tell people to type does what they say, here on a small model."""

import pytest

from tests.support.documents import block
from tests.support.own_data import study_of, tasks_of


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_example_of_own_data_in_full_runs_as_it_stands(tiny_model, tmp_path):
    study = study_of("own-data-in-full", tiny_model, tmp_path)
    assert study["record"]["samples"] == 3
    assert tasks_of(study) == {"my_task", "wordnet", "plain_english"}


def test_the_example_in_the_readme_is_short():
    assert len(block("own-data").splitlines()) == 2
