"""Which trial is the best, and whose models stay."""

from lrmc_ray.tune.choice import model_of, remove_models
from lrmc_ray.tune.finish import export_best
from tests.support.searches import POINTS, complete_entry, make_description


def models_left(search):
    search.choose_best()
    remove_models(search.directory, search.file, search.settings.search)
    numbers = [trial.number for trial in search.file.trials]
    return [number for number in numbers if model_of(search.directory, number).is_dir()]


def test_the_highest_combined_score_is_the_best_and_keeps_its_model(tmp_path):
    search = make_description(tmp_path, POINTS)
    assert models_left(search) == [1, 3]
    assert (search.file.best, search.file.closest) == (3, None)


def test_all_models_stay_where_that_is_asked_for(tmp_path):
    assert models_left(make_description(tmp_path, POINTS, keep_models="all")) == [0, 1, 2, 3, 4]


def test_by_budget_the_best_is_within_it(tmp_path):
    search = make_description(tmp_path, POINTS, objective="budget", max_forgetting=0.01)
    assert models_left(search) == [1, 2]
    assert search.file.best == 2


def test_without_a_trial_in_the_budget_there_is_no_best_but_the_closest_model_is_kept(tmp_path):
    search = make_description(tmp_path, POINTS, objective="budget", max_forgetting=0.0)
    assert models_left(search) == [0, 1]
    assert (search.file.best, search.file.closest) == (None, 0)
    assert export_best(search) is None


def test_of_a_front_all_models_are_kept_since_its_knee_may_move_back(tmp_path):
    search = make_description(tmp_path, POINTS, objective="pareto")
    assert models_left(search) == [0, 1, 2, 3]
    assert search.file.best == 2
    # A new end of the front moves the knee to an older trial, whose model must be there.
    search.file.trials.append(complete_entry(5, 0.62, 0.9))
    assert 3 in models_left(search)
    assert search.file.best == 3


def test_a_new_best_makes_the_final_scores_void(tmp_path):
    search = make_description(tmp_path, POINTS)
    search.file.best, search.file.final = 0, {"base": "x"}
    search.choose_best()
    assert search.file.final == {}
