"""How much each searched parameter matters: shares of the differences between trials.

fANOVA (Hutter et al. 2014, Optuna's). Scores far from the others are moved to the edge of a box
plot's whiskers first: one trial that broke its model would outweigh all others. Some parameters
exist in some trials only, as the cap of one optimizer. So trials with the same parameters make a
group, and the variance is split:

- between the groups: shared out among the switches, the parameters that others depend on,
- within a group: shared out among the parameters that its trials have.

A parameter's share is the sum of both. Where the branch alone decides, what exists within it has
no share. PED-ANOVA, Optuna's default, looks at the parameters that all trials have, and at the
best quarter only.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from lrmc_ray.evaluate.statistics import FloatArray

LEAST_TRIALS = 20
"""With fewer trials nothing is said: a forest finds shares in luck as well."""

LEAST_OF_GROUP = 4
"""The differences within a smaller group are left out."""

MOST_TRIALS = 150
"""More are thinned out evenly: the forest's time grows with the square of their number."""

TREES = 32


def importance(
    trials: Sequence[FrozenTrial],
    scores: Mapping[str, Sequence[float]],
    switches: Collection[str],
) -> dict[str, dict[str, float]]:
    """Shares of every parameter in the differences of each score.

    Args:
        trials: completed ones, with the parameters that each has.
        scores: of these trials, by name.
        switches: parameters whose value decides which others a trial has.

    Returns:
        By name of the score, the shares of all parameters, which add up to one. A score that is the
        same in all trials is left out.
    """
    kept = np.unique(np.linspace(0, len(trials) - 1, min(len(trials), MOST_TRIALS)).astype(int))
    if len(kept) < LEAST_TRIALS:
        return {}
    chosen = [trials[index] for index in kept]
    shares = {
        name: _shares(
            chosen, _without_outliers(np.asarray(values, dtype=np.float64)[kept]), switches
        )
        for name, values in scores.items()
    }
    return {name: found for name, found in shares.items() if found}


def _without_outliers(values_J: FloatArray) -> FloatArray:
    """Values beyond the whiskers, 1.5 times the distance of the quartiles, moved to them."""
    low, high = np.quantile(values_J, [0.25, 0.75])
    if low == high:
        return values_J
    reach = 1.5 * (high - low)
    return np.clip(values_J, low - reach, high + reach)


def _shares(
    trials: Sequence[FrozenTrial], values_J: FloatArray, switches: Collection[str]
) -> dict[str, float]:
    """Shares of the parameters in the differences of one score, by the rule in the file's head."""
    found = dict.fromkeys(sorted({name for trial in trials for name in trial.params}), 0.0)
    groups: dict[frozenset[str], list[int]] = {}
    for index, trial in enumerate(trials):
        groups.setdefault(frozenset(trial.params), []).append(index)
    means_J = values_J.copy()
    for names, group in groups.items():
        means_J[group] = values_J[group].mean()
        if len(group) >= LEAST_OF_GROUP:
            inside = [trials[index] for index in group]
            _add(found, inside, values_J[group], names, weight=len(group))
    common = set.intersection(*(set(trial.params) for trial in trials))
    _add(found, trials, means_J, common & set(switches) or common, weight=len(trials))
    whole = sum(found.values())
    return {name: share / whole for name, share in found.items()} if whole > 0 else {}


def _add(
    found: dict[str, float],
    trials: Sequence[FrozenTrial],
    values_J: FloatArray,
    names: Collection[str],
    *,
    weight: int,
) -> None:
    """Share out the variance of ``values_J`` among ``names``, by Optuna's fANOVA."""
    variance = float(np.var(values_J))
    if variance == 0.0 or not names:
        return
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: trial.params[name] for name in names},
                distributions={name: trial.distributions[name] for name in names},
                value=float(value),
            )
            for trial, value in zip(trials, values_J, strict=True)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    try:
        shares = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=sorted(names)
        )
    except (RuntimeError, ValueError):  # nothing varies
        return
    for name, share in shares.items():
        found[name] += weight * variance * float(share)
