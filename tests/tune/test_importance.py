"""Importance of parameters, against made-up studies in which it is known what decides."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from lrmc_ray.tune.importance import LEAST_TRIALS, MOST_TRIALS, importance

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "optimizer": CategoricalDistribution(["moclip", "adamw"]),
    "lr": FloatDistribution(1e-6, 1e-3, log=True),
    "irrelevant": FloatDistribution(0.0, 1.0),
    "delta_max": FloatDistribution(1.0, 180.0),
    "clip": CategoricalDistribution(["scale", "rotate"]),
}


def trials(score, *, count=40, seed=0):
    """Random trials; the cap and its reading exist under MoClip alone."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    made = []
    for _ in range(count):
        optimizer = study.ask({"optimizer": SPACE["optimizer"]}).params["optimizer"]
        names = [name for name in SPACE if name != "optimizer"]
        if optimizer != "moclip":
            names = ["lr", "irrelevant"]
        drawn = study.ask({name: SPACE[name] for name in names}).params
        params = {"optimizer": optimizer, **drawn}
        distributions = {name: SPACE[name] for name in params}
        made.append(
            optuna.trial.create_trial(params=params, distributions=distributions, value=0.0)
        )
    return made, {"score": [score(trial.params) for trial in made]}


def shares(score, **options):
    made, scores = trials(score, **options)
    found = importance(made, scores, {"optimizer"})["score"]
    assert sum(found.values()) == pytest.approx(1.0)
    assert set(found) == set(SPACE)
    return found


def is_moclip(params):
    return float(params["optimizer"] == "moclip")


@pytest.mark.parametrize("seed", range(3))
def test_where_the_branch_decides_all_nothing_else_matters(seed):
    found = shares(lambda p: is_moclip(p) + 0.001 * p["lr"], seed=seed)
    assert found["optimizer"] > 0.95
    noise = shares(is_moclip, seed=seed)
    assert noise["optimizer"] > 0.95
    assert noise["delta_max"] == noise["clip"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_what_decides_within_its_branch_is_found(seed):
    within = shares(lambda p: p.get("delta_max", 90.0) / 180, seed=seed)
    assert max(within, key=within.__getitem__) == "delta_max"
    assert within["delta_max"] > 2 * max(within[n] for n in ("clip", "irrelevant", "lr"))
    clip = shares(lambda p: float(p.get("clip") == "scale") if "clip" in p else 0.5, seed=seed)
    assert max(clip, key=clip.__getitem__) == "clip"


def test_the_variance_within_two_branches_is_shared_out():
    """Moclip's scores are spread over 0 to 1 by the cap, those of the others by another."""
    found = shares(
        lambda p: p["delta_max"] / 180 if "delta_max" in p else p["irrelevant"], count=100
    )
    assert 0.3 < found["delta_max"] < 0.7
    assert 0.3 < found["irrelevant"] < 0.7


def test_one_broken_trial_does_not_decide():
    made, scores = trials(lambda p: p["irrelevant"])
    scores["score"][4] = -1e6
    assert importance(made, scores, {"optimizer"})["score"]["irrelevant"] > 0.9


def test_too_few_trials_equal_scores_and_very_many_trials():
    made, scores = trials(lambda p: p["lr"], count=19)
    assert importance(made, scores, {"optimizer"}) == {}
    assert LEAST_TRIALS == 20
    made, scores = trials(lambda p: p["lr"], count=20)
    assert importance(made, scores, {"optimizer"})["score"]["lr"] > 0.5
    made, scores = trials(lambda p: 1.0)
    assert importance(made, scores, {"optimizer"}) == {}
    made, scores = trials(lambda p: p["lr"], count=MOST_TRIALS * 10)
    assert importance(made, scores, {"optimizer"})["score"]["lr"] > 0.9
