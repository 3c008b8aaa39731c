"""What the report says in sentences."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lrmc_ray.config.search import Objective
from lrmc_ray.evaluate.changes import Comparison, TaskChange
from lrmc_ray.evaluate.numbers import (
    flatten,
    number,
    percent,
    percent_range,
    points,
    points_range,
)
from lrmc_ray.evaluate.statistics import CONFIDENCE, Interval
from lrmc_ray.record.capped import capped_text
from lrmc_ray.report.study import Study, Trial, Verdict

OBJECTIVE_NOTES: dict[Objective, str] = {
    "combined": "",
    "budget": " The search looked for the most domain gain with at most {budget} of forgetting.",
    "pareto": " The search looked for the whole front; its knee is called the best.",
}


# In words


@dataclass(frozen=True)
class Sentence:
    """One sentence of the summary."""

    text: str
    distinguishable: bool
    """False: what it says may be luck, and is shown in grey."""


def headline(study: Study) -> tuple[Sentence, ...]:
    """What was learned, what was forgotten, and how that compares with plain fine-tuning."""
    if study.shown is None or study.verdict is None:
        count = len(study.problems)
        text = f"No trial has scores yet: {count} of {count} failed or unfinished."
        return (Sentence(text, False),)
    comparison = study.verdict.comparison
    sentences = [
        *_closest(study),
        _learned(study.shown, comparison, study.verdict.fresh_tasks),
        _forgotten(comparison, study.verdict.fresh_tasks),
        *_by_objective(study),
    ]
    versus = _against_yardstick(study, study.verdict)
    return (*sentences, versus) if versus else tuple(sentences)


def _closest(study: Study) -> list[Sentence]:
    """That no trial keeps the budget, where that is so."""
    if study.closest is None:
        return []
    return [
        Sentence(
            f"No trial stays within the budget of {points(study.file.max_forgetting)} points of "
            f"forgetting, so there is no best one; {study.closest.name} forgets least.",
            True,
        )
    ]


def _by_objective(study: Study) -> list[Sentence]:
    """How sure the choice is, in terms of the study's own objective."""
    best, traded = study.best, study.trade_off
    if best is None or traded is None:
        return []
    if study.file.objective == "budget":
        share = best.budget_probability
        return [
            Sentence(
                f"It stays within the budget of {points(study.file.max_forgetting)} points in "
                f"{percent(share)} of the resamples of the search's items.",
                share >= CONFIDENCE,
            )
        ]
    if study.file.objective == "pareto":
        share = best.knee_probability
        return [
            Sentence(
                f"It is the knee of a front of {len(traded.front)} trials, and is so in "
                f"{percent(share)} of the resamples of the search's items.",
                share >= CONFIDENCE,
            )
        ]
    return []


def _learned(best: Trial, comparison: Comparison, fresh_tasks: Collection[str]) -> Sentence:
    """What the model answers, and whether the search had seen these items when it chose."""
    facts = []
    for task in comparison.tasks:
        if task.group != "domain":
            continue
        if task.kind == "text":
            change = task.metric("cross_entropy")
            verb = "lowers" if change.delta.value < 0 else "raises"
            facts.append(
                f"{verb} the cross-entropy of {task.task} from {number(change.before.value, 3)} "
                f"to {number(change.after.value, 3)} nats per token"
            )
        else:
            change = task.metric("accuracy")
            asked = f"{task.num_items} {task.task} items that the search also chose by"
            if task.task in fresh_tasks:
                asked = f"{task.num_items} {task.task} test items"
            facts.append(
                f"answers {percent(change.after.value)} of the {asked} "
                f"(95 % interval {percent_range(change.after)}; "
                f"base {percent(change.before.value)}, {percent_range(change.before)})"
            )
    shown = facts[:3] + ([f"and so on for {len(facts) - 3} more tasks"] if len(facts) > 3 else [])
    gain = comparison.domain_gain
    doubt = "" if gain.distinguishable else " The gain is not distinguishable from zero."
    subject = f"Trial {best.entry.number}"
    if best.entry.role == "yardstick":
        subject += ", plain fine-tuning,"
    return Sentence(f"{subject} {', '.join(shown)}.{doubt}", gain.distinguishable)


def items_text(tasks: Iterable[str], fresh_tasks: Collection[str]) -> str:
    """Which items scores of ``tasks`` are of: ``search items``, ``test items``, or both."""
    kinds = {"test" if task in fresh_tasks else "search" for task in tasks}
    return f"{' and '.join(sorted(kinds))} items"


def verdict_items_text(verdict: Verdict) -> str:
    """Which items domain gain and forgetting of a verdict are of."""
    texts = {
        group: items_text(
            [task.task for task in verdict.comparison.tasks if task.group == group],
            verdict.fresh_tasks,
        )
        for group in ("domain", "general")
    }
    if len(set(texts.values())) == 1:
        return texts["domain"]
    return f"domain: {texts['domain']}, general: {texts['general']}"


def _score_of(task: TaskChange) -> str:
    """What the score of a task is, in words."""
    if task.kind == "choice":
        return "the probability of the right choice"
    if task.kind == "text":
        return "the relative change of the cross-entropy"
    if any(change.metric == "gold_probability" for change in task.metrics):
        return "the mean of accuracy and the right answer's probability"
    return "the accuracy"


def score_text(comparison: Comparison) -> str:
    """What gain and forgetting are differences of, in one sentence."""
    tasks_of: dict[str, list[str]] = {}
    for task in comparison.tasks:
        tasks_of.setdefault(_score_of(task), []).append(task.task)
    parts = [f"{what} ({', '.join(tasks)})" for what, tasks in tasks_of.items()]
    return f"Gain and forgetting, in points of 100, are changes of {'; '.join(parts)}."


def _forgotten(comparison: Comparison, fresh_tasks: Collection[str]) -> Sentence:
    forgetting = comparison.forgetting
    verb = "lost" if forgetting.value > 0 else "gained"
    amount = number(abs(100 * forgetting.value), 1)
    interval = forgetting if forgetting.value > 0 else -forgetting
    doubt = "" if forgetting.distinguishable else ", not distinguishable from zero"
    general = [task.task for task in comparison.tasks if task.group == "general"]
    return Sentence(
        f"On the general tasks it {verb} {amount} points of 100 "
        f"({items_text(general, fresh_tasks)}, 95 % interval {points_range(interval)}){doubt}.",
        forgetting.distinguishable,
    )


def _against_yardstick(study: Study, verdict: Verdict) -> Sentence | None:
    versus = verdict.versus
    if versus is None or study.candidate is None or study.yardstick is None:
        return None
    combined = versus.combined
    # Where plain fine-tuning is the best itself, the other is compared with it by the search.
    items = "search items" if verdict.plain is None else verdict_items_text(verdict)
    plain = f"plain fine-tuning ({study.yardstick.name}, {items})"
    start = ""
    if study.candidate is not study.shown:
        start = f"Plain fine-tuning itself scored best; the best other is {study.candidate.name}. "
    if combined.distinguishable:
        relation = f"{'better' if combined.value > 0 else 'worse'} than"
    else:
        relation = "not distinguishable from"
    return Sentence(
        f"{start}Item by item, {study.candidate.name} is {relation} {plain}: "
        f"combined score {points(combined.value)} points "
        f"(95 % interval {points_range(combined)}), from domain gain "
        f"{points(versus.domain_gain.value)} ({points_range(versus.domain_gain)}) and "
        f"forgetting {points(versus.forgetting.value)} ({points_range(versus.forgetting)})."
        f"{_untuned(study)}",
        combined.distinguishable,
    )


def _untuned(study: Study) -> str:
    """That the yardstick had one try, while the candidate was chosen among several."""
    others = sum(trial.entry.role != "yardstick" for trial in study.compared)
    if len(study.compared) - others != 1 or others < 2 or study.yardstick is None:
        return ""
    rate = study.yardstick.entry.settings.get("lr")
    at = f" at the learning rate {rate:g}" if isinstance(rate, float) else ""
    return (
        f" Plain fine-tuning ran once{at}, the other is the best of {others} trials: tune both "
        "before you call one method the better."
    )


def caution_sentences(study: Study) -> list[str]:
    """Which items the verdict stands on, and what the intervals do not cover."""
    if study.verdict is None:
        return []
    cautions = []
    fresh = study.verdict.fresh_tasks
    others = [task for task in study.verdict.base.tasks if task not in fresh]
    if fresh:
        cautions.append(
            f"Test items, which no trial was chosen by: {', '.join(fresh)}."
            + (f" Search items: {', '.join(others)}." if others else "")
        )
    elif len(study.compared) > 1:
        cautions.append(
            f"The best of {len(study.compared)} trials was chosen on these same items, so its "
            "numbers lean to the lucky side: score it on other items before relying on them. A "
            "domain task with 8 items or more keeps half of them for that (evaluate.test_share)."
        )
    cautions.append(
        "The intervals cover the choice of items. Another training seed adds its own spread: "
        "repeat the best trial with other seeds to see it."
    )
    return cautions


def record_sentences(study: Study) -> list[str]:
    """What the record of a study says against its tau."""
    settings = study.file.settings.get("record")
    k_max = settings.get("k_max") if isinstance(settings, Mapping) else None
    share = study.file.record.get("capped_share")
    if not isinstance(k_max, int) or not isinstance(share, int | float):
        return []
    warning = capped_text(float(share), k_max)
    return [warning] if warning else []


def knee_advice(study: Study) -> str:
    """Which of the front's knee and the best trial to take."""
    traded = study.trade_off
    if traded is None or study.best is None:
        return ""
    bend = study.compared[traded.knee]
    if bend is study.best:
        return f"{bend.name.capitalize()} is both the best and the knee: take it."
    assert bend.comparison is not None  # compared
    assert study.best.comparison is not None
    gain = study.best.comparison.domain_gain.value - bend.comparison.domain_gain.value
    forgetting = study.best.comparison.forgetting.value - bend.comparison.forgetting.value
    return (
        f"Take {study.best.name}, the best by the study's own objective, unless forgetting counts "
        f"more for you than search.forgetting_weight says: the knee, {bend.name}, differs from it "
        f"by {points(-gain)} points of gain and {points(-forgetting)} of forgetting."
    )


def headline_numbers(comparison: Comparison) -> tuple[Interval, Interval, Interval]:
    """Domain gain, forgetting and the combined score."""
    return comparison.domain_gain, comparison.forgetting, comparison.combined


def accuracy_text(accuracy: Interval, *, separator: str = ", ") -> str:
    """An accuracy with its interval."""
    return f"accuracy {percent(accuracy.value)}{separator}{percent_range(accuracy)}"


def tags_of(study: Study, trial: Trial) -> list[str]:
    """What is said beside a trial's name: best, on the front, yardstick."""
    tags = ["best"] if trial is study.best else []
    if trial is study.closest:
        tags.append("closest to the budget")
    if trial.entry.role == "yardstick":
        tags.append("plain fine-tuning")
    elif trial.entry.role == "defaults":
        tags.append("defaults")
    return tags


def shown_role(study: Study, trial: Trial) -> str:
    """The role that decides a trial's colour and mark."""
    return "best" if trial is study.best else trial.entry.role


MOST_NAMED = 20
"""Trials that one sentence names."""


def note_on_not_drawn(study: Study) -> str:
    """Which trials the figure leaves out, and why; empty where it shows all."""
    if not study.problems:
        return ""
    numbers = ", ".join(str(trial.entry.number) for trial in study.problems[:MOST_NAMED])
    if len(study.problems) > MOST_NAMED:
        numbers += f" and {len(study.problems) - MOST_NAMED} more"
    return f"Not drawn, because they have no scores: {numbers}."


def chosen_settings(study: Study, trial: Trial) -> list[tuple[str, str]]:
    """The searched parameters, and the settings in which the trial differs from the study's.

    Of plain fine-tuning the learning rate stands there in any case: it is what the row is about.
    """
    common = study.file.settings.get("train")
    common = common if isinstance(common, Mapping) else {}
    differing = {
        name: value
        for name, value in trial.entry.settings.items()
        if name not in common
        or common[name] != value
        or (name == "lr" and trial.entry.role == "yardstick")
    }
    return flatten({**trial.entry.params, **differing})


def settings_text(settings: Sequence[tuple[str, str]]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings)
