"""What MLflow says of a study by itself: a description in Markdown, and the study's own scores."""

from lrmc_ray.evaluate.changes import Comparison
from lrmc_ray.evaluate.numbers import points, points_range
from lrmc_ray.report.figures_png import FIGURE_FILE
from lrmc_ray.report.markdown import inert, inert_code
from lrmc_ray.report.mlflow_shown import RUN_ID
from lrmc_ray.report.study import Study
from lrmc_ray.report.words import (
    caution_sentences,
    headline,
    headline_numbers,
    items_text,
    score_text,
    verdict_items_text,
)


def study_note(study: Study) -> str:
    """The description: what was found, the scores, the figure."""
    lines = [inert(sentence.text) for sentence in headline(study)]
    if study.verdict is not None:
        rows = [("best" if study.best else "closest to the budget", study.verdict.comparison)]
        if study.verdict.plain is not None:
            rows.append(("plain fine-tuning", study.verdict.plain))
        lines += [
            "| | domain gain | forgetting | combined |\n|---|---|---|---|\n"
            + "\n".join(_row(name, comparison) for name, comparison in rows),
            f"Points of 100 on {inert(verdict_items_text(study.verdict))}, with 95 % intervals. "
            f"{inert(score_text(study.verdict.comparison))}",
            *map(inert, caution_sentences(study)),
        ]
    directory = inert_code(str(study.directory))
    lines += [
        f"![Domain gain against forgetting](get-artifact?path={FIGURE_FILE}&run_uuid={RUN_ID})",
        f"`report.html` among the artifacts has all of it; the study is in {directory}.",
    ]
    return "\n\n".join(lines)


def _row(name: str, comparison: Comparison) -> str:
    cells = [f"{points(i.value)} ({points_range(i)})" for i in headline_numbers(comparison)]
    return f"| {' | '.join([name, *cells])} |"


def study_scores(study: Study) -> dict[str, float]:
    """The verdict's numbers in points of 100, under the items that each is of."""
    if study.verdict is None:
        return {}
    verdict, fresh = study.verdict, study.verdict.fresh_tasks
    of_group = {
        group: items_text([t.task for t in verdict.comparison.tasks if t.group == group], fresh)
        for group in ("domain", "general")
    }
    every = items_text([task.task for task in verdict.comparison.tasks], fresh)
    items = (of_group["domain"], of_group["general"], every)
    scores = {}
    for name, comparison in (("best", verdict.comparison), ("plain fine-tuning", verdict.plain)):
        if comparison is not None:
            values = zip(items, ("domain gain", "forgetting", "combined"), strict=True)
            for (where, what), interval in zip(values, headline_numbers(comparison), strict=True):
                scores[f"{where}/{name}: {what}"] = 100.0 * interval.value
    return scores
