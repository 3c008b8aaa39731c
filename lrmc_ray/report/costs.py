"""What the search took: seconds, core hours, and what early stopping saved."""

from collections.abc import Mapping

from lrmc_ray.console import format_seconds
from lrmc_ray.evaluate.numbers import (
    percent,
)
from lrmc_ray.report.study import Study


def rows_of_costs(study: Study) -> list[dict[str, str]]:
    """The report's table of costs, a row per part of the search."""
    rows = []
    stages = study.file.stage_seconds
    if "record" in stages:
        rows.append(_cost_row("Stage 0: record (once)", {"train_seconds": stages["record"]}))
    if "base_evaluation" in stages:
        rows.append(_cost_row("base model (once)", {"evaluate_seconds": stages["base_evaluation"]}))
    if study.shown is not None:
        how = "the best" if study.best else "closest to the budget"
        rows.append(_cost_row(f"{study.shown.name}, {how}", study.shown.entry.cost))
    if study.yardstick is not None and study.yardstick is not study.shown:
        rows.append(
            _cost_row(f"{study.yardstick.name}, plain fine-tuning", study.yardstick.entry.cost)
        )
    total: dict[str, float] = {}
    for trial in study.trials:
        cost = dict(trial.entry.cost)
        if (hours := _core_hours(cost)) is not None:
            cost["core_hours"] = hours
        for key, value in cost.items():
            total[key] = total.get(key, 0.0) + value
    rows.append(_cost_row(f"all {len(study.trials)} trials", total))
    return rows


def _core_hours(cost: Mapping[str, float]) -> float | None:
    """Cores held, times hours; None where that was not written down."""
    if "core_hours" in cost:
        return cost["core_hours"]
    if "train_cores" not in cost or "evaluate_cores" not in cost:
        return None
    seconds = sum(
        cost.get(f"{part}_seconds", 0.0) * cost[f"{part}_cores"] for part in ("train", "evaluate")
    )
    return seconds / 3600


def sentences_on_cost(study: Study) -> list[str]:
    """Wall time, and the forecast beside it."""
    sessions = study.file.sessions
    taken = sum(end - start for start, end in sessions)
    if not taken:
        return []
    sentences = [
        f"The search took {format_seconds(taken)} by the clock"
        + (f" in {len(sessions)} sittings." if len(sessions) > 1 else ".")
    ]
    if study.file.forecast is not None:
        expected = study.file.forecast.get("seconds", 0.0)
        sentences.append(
            f"The forecast for {study.file.forecast.get('trials')} trials was "
            f"{format_seconds(expected)} ({study.file.forecast.get('basis')})."
        )
    return [*sentences, *_early_sentences(study)]


def _early_sentences(study: Study) -> list[str]:
    """What early stopping cost and saved, by the trials that ran to the end."""
    scored = [t.entry for t in study.trials if t.entry.rung is not None]
    if not scored:
        return []
    asked = sum(entry.rung["seconds"] for entry in scored if entry.rung is not None)
    ended = [entry for entry in scored if entry.state == "PRUNED"]
    whole = [entry for entry in scored if entry.state == "COMPLETE" and entry.cost]
    sentence = (
        f"{len(ended)} of {len(scored)} trials that were scored on the way, which took "
        f"{format_seconds(asked)} in all, stopped early"
    )
    if not ended or not whole:
        return [f"{sentence}."]
    mean = sum(e.cost["train_seconds"] + e.cost["evaluate_seconds"] for e in whole) / len(whole)
    saved = sum(mean - e.cost["train_seconds"] for e in ended if "train_seconds" in e.cost)
    return [
        f"{sentence}: about {format_seconds(max(0.0, saved))} of training and scoring less, by "
        "what the others took."
    ]


def _cost_row(part: str, cost: Mapping[str, float]) -> dict[str, str]:
    def seconds(key: str) -> str:
        return format_seconds(cost[key]) if key in cost else "-"

    tokens, share = "-", ""
    if cost.get("original_tokens"):
        processed, original = cost.get("processed_tokens", 0.0), cost["original_tokens"]
        tokens, share = f"{processed:,.0f} of {original:,.0f}", percent(processed / original)
    return {
        "part": part,
        "train": seconds("train_seconds"),
        "evaluate": seconds("evaluate_seconds"),
        "core_hours": "-" if (hours := _core_hours(cost)) is None else f"{hours:.3f}",
        "tokens": tokens,
        "tokens_share": share,
    }


def cost_footnote(study: Study) -> str:
    """What the cost table counts, and what the best trial took with Stage 0 in full."""
    note = (
        "Fewer tokens are processed than the data has where a sequence ends in positions, or "
        "consists of positions, that give no gradient; the gradient stays the same."
    )
    record = study.file.stage_seconds.get("record")
    best, plain = study.shown, study.yardstick
    if record is None or best is None or plain is None or best is plain:
        return note
    own, other = (trial.entry.cost.get("train_seconds") for trial in (best, plain))
    if own is None or other is None:
        return note
    return (
        f"With Stage 0 counted in full, {best.name} took {format_seconds(record + own)} to train, "
        f"plain fine-tuning {format_seconds(other)}. {note}"
    )
