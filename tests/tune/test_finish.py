"""The end of a search: what is scored on the test questions."""

import pytest

from lrmc_ray.tune import finish
from tests.support.searches import POINTS, make_description


@pytest.mark.parametrize("final_limit", [None, 30])
def test_finalists_are_scored_on_test_questions_of_their_own_number(
    tmp_path, monkeypatch, final_limit
):
    search = make_description(tmp_path, POINTS, final_limit=final_limit)
    scored = search.settings.evaluate.model_copy(update={"limit": 10})
    search.settings = search.settings.model_copy(update={"evaluate": scored})
    search.file.best, search.file.base_scores, search.file.state = 0, "base", "FINISHED"
    for trial in search.file.trials:
        trial.scores = f"scores/{trial.number}"
    asked = []

    def record_request(settings, model, output, *, split, base, general_from):
        asked.append((settings.evaluate.limit, split, general_from.name, base is None))
        return output / model.parent.parent.name

    monkeypatch.setattr(finish, "evaluate", record_request)
    monkeypatch.setattr(finish, "local_directory", lambda _: tmp_path / "base" / "x" / "y")
    assert not search.is_finished
    finish.score_finalists(search, tmp_path)
    limit = final_limit or 10
    assert sorted(asked) == [
        (limit, "test", "0", False),
        (limit, "test", "1", False),
        (limit, "test", "base", True),
    ]
    assert search.file.final == {"base": "../base", "best": "../0000", "yardstick": "../0001"}
    assert search.is_finished  # until more are asked for
    more = search.settings.search.model_copy(update={"final_limit": 40})
    search.settings = search.settings.model_copy(update={"search": more})
    assert not search.is_finished


def test_a_best_that_is_plain_fine_tuning_is_scored_once(tmp_path, monkeypatch):
    search = make_description(tmp_path, POINTS)
    search.file.best, search.file.base_scores = 1, "base"
    for trial in search.file.trials:
        trial.scores = f"scores/{trial.number}"
    asked = []

    def record_request(settings, model, output, **_):
        asked.append(model.parent.parent.name)
        return output / model.parent.parent.name

    monkeypatch.setattr(finish, "evaluate", record_request)
    monkeypatch.setattr(finish, "local_directory", lambda _: tmp_path / "base" / "x" / "y")
    finish.score_finalists(search, tmp_path)
    assert asked == ["base", "0001"]
    assert search.file.final == {"base": "../base", "best": "../0001", "yardstick": "../0001"}
