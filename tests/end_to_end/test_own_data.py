"""The README's example of own data, as it stands, on a small model."""

import pytest

from lrmc_ray.evaluate.items import Scores
from lrmc_ray.report.study import load_study
from tests.support.own_data import study_of, tasks_of

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def test_it_runs_and_no_item_of_the_end_was_asked_while_the_trial_was_chosen(tiny_model, tmp_path):
    study = study_of("own-data", tiny_model, tmp_path)
    assert study["record"]["samples"] == 72
    assert tasks_of(study) == {"invented", "wordnet"}
    (found,) = (tmp_path / "my_runs").glob("*/study.json")
    searched, final = (
        set(Scores.load(found.parent / path).objective("invented").item_ids)
        for path in (study["base_scores"], study["final"]["base"])
    )
    assert len(searched) == 8  # the limit
    assert len(final) == 9
    assert searched.isdisjoint(final)
    assert load_study(found.parent).verdict.fresh_tasks == ("invented",)
