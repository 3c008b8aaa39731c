"""What MLflow is to show of a study: its runs, and the chart of its trade-off."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrmc_ray.files.study import Artifact, TrainingFile

STUDY_TAG = "lrmc.study"
TRIAL_TAG = "lrmc.trial"
ROLE_TAG = "lrmc.role"
SEARCH = "search items"
_SHARES = ("domain_gain", "forgetting", "combined", "accuracy", "probability", "gold_probability")
"""How names of results begin that are fractions of 1."""


@dataclass(frozen=True)
class ShownRun:
    """What MLflow is to show of a study or a trial; times are seconds since 1970."""

    state: str = "RUNNING"
    """As MLflow names a run's states, or Optuna a trial's."""
    role: str | None = None
    """Of a trial."""
    cause: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    """Nested ones get dotted names."""
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics_file: str | None = None
    """Relative to the study's directory, or absolute."""
    results: Mapping[str, Any] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class ShownStudy:
    """What MLflow is to show of a study and its trials."""

    id: str
    """Identifies it when it goes on after a crash."""
    name: str
    """What people read."""
    run: ShownRun
    trials: Mapping[int, ShownRun] = field(default_factory=dict)
    """By number."""
    datasets: Sequence[TrainingFile] = ()
    artifacts: Sequence[Artifact] = ()
    """Paths are relative to the study's directory, or absolute."""
    model: str | None = None
    """Directory of the best model, where there is one; MLflow is told where it is."""


RUN_ID = "RUN-ID-OF-THE-STUDY"
"""Stands in a description for the id of the run that has the figure."""

NOTE_TAG = "mlflow.note.content"
"""A run's description, in Markdown."""

GAIN, FORGETTING, COMBINED = (
    f"{SEARCH}/{name}" for name in ("domain gain", "forgetting", "combined")
)
"""What MLflow calls a trial's scores: its charts have no other titles."""


def shown_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's results as the report has them: scores in points of 100, of the search items.

    What is no score of 100, such as a cross-entropy, keeps its name and its unit.
    """
    shown = {}
    for name, value in results.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name.startswith("eval/") and name.rpartition("/")[2].startswith(_SHARES):
            shown[f"{SEARCH}/{name.removeprefix('eval/').replace('_', ' ')}"] = 100.0 * value
        else:
            shown[name] = value
    return shown


def trade_off_view(study_id: str, study_name: str) -> str:
    """A saved view, as the button "Views" of MLflow's page of runs stores it in a tag.

    The format is MLflow 3.17's own. A page that does not know it shows its default charts.
    """

    def chart(kind: str, **settings: Any) -> dict[str, Any]:
        return {
            "uuid": f"lrmc-{kind}",
            "type": kind,
            "metricSectionId": "lrmc",
            "runsCountToCompare": 100,
            "deleted": False,
            "isGenerated": False,
            **settings,
        }

    state = {
        "searchFilter": f"tags.`{STUDY_TAG}` = '{study_id}'",
        "runsHiddenMode": "SHOW_ALL",
        # Groups show their runs at once, while a parent's children are folded away.
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": ROLE_TAG}],
        },
        "useGroupedValuesInCharts": False,
        "compareRunCharts": [
            chart(
                "SCATTER",
                xaxis={"key": FORGETTING, "type": "METRIC"},
                yaxis={"key": GAIN, "type": "METRIC"},
            ),
            chart("BAR", metricKey=COMBINED),
            chart("LINE", metricKey="train/loss", selectedMetricKeys=["train/loss"]),
        ],
        "compareRunSections": [
            {
                "uuid": "lrmc",
                "name": "Trade-off, in points of 100",
                "columns": 2,
                "cardHeight": 460,
                "display": True,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
        ],
        # The charts have the whole width.
        "runListHidden": True,
        # Otherwise sections are sorted by name.
        "isAccordionReordered": True,
    }
    now = round(1000 * time.time())
    return json.dumps(
        {
            "name": f"{study_name}: forgetting against domain gain",
            "createdAt": now,
            "updatedAt": now,
            "state": json.dumps(state),
        }
    )
