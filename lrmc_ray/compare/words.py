"""What a comparison says, in sentences, and how its numbers are written."""

from collections.abc import Callable, Sequence

from lrmc_ray.compare.curves import WHOLE
from lrmc_ray.compare.measure import Estimate
from lrmc_ray.compare.table import ComparisonTable
from lrmc_ray.evaluate.numbers import points


def sentences(table: ComparisonTable) -> list[str]:
    """What the numbers say, and what they do not."""
    scored = [row for row in table.rows if row.trade is not None]
    if not scored:
        return ["No method has scores on the test questions yet."]
    best = max(scored, key=table.advantage)
    assert best.trade is not None
    said = [
        f"Highest combined score: {best.title} at learning rate {best.lr:g}, "
        f"{with_intervals(best.trade.combined)} points, from domain gain "
        f"{with_intervals(best.trade.domain_gain)} and forgetting "
        f"{with_intervals(best.trade.forgetting)}."
    ]
    others = [row for row in scored if row.versus is not None]
    title = table.title_of(table.reference)
    if others:
        verdicts = [(row.title, row.versus.combined) for row in others if row.versus is not None]
        said.append(
            f"Against {title}, seed by seed: {_verdicts(verdicts)}. No correction for "
            f"{len(others)} comparisons: about one in twenty would stand out by luck."
        )
    beyond = [
        (table.title_of(row.method), row.beyond)
        for row in table.curves
        if row.place == WHOLE and row.beyond is not None
    ]
    if beyond:
        said.append(
            f"By gain against models between the base and {title} that forget no more, seed by "
            f"seed: {_verdicts(beyond)}."
        )
    said.append(
        "( ) is the 95 % interval over training seeds (Student's t), [ ] that over the items "
        "(paired bootstrap). Learning rates were chosen on the development questions and the "
        "general items at even places; what is reported was left out of the choice."
    )
    if table.undivided_tasks:
        said.append(
            f"Not so the items of {listed(list(table.undivided_tasks))}: too few to be divided, "
            "they chose the learning rates, too, so the scores may be too good."
        )
    asked = {m["name"]: m.get("seeds") or table.seeds for m in table.description["methods"]}
    if short := [row for row in scored if len(row.seeds) < len(asked[row.name])]:
        least = min(short, key=lambda row: len(row.seeds))
        said.append(
            f"Some methods have only {len(least.seeds)} of {len(asked[least.name])} seeds so far."
        )
    edge = []
    for row in scored:
        tried = sorted(point.lr for point in table.points if point.method == row.name)
        if len(tried) > 1 and row.lr in (tried[0], tried[-1]):
            edge.append(f"{row.title} ({'lowest' if row.lr == tried[0] else 'highest'})")
    if edge:
        said.append(
            f"At the edge of the learning rates tried, so a better one may lie beyond: "
            f"{listed(edge)}."
        )
    if table.predictors:
        ranked = "; ".join(f"{p.name} {p.correlation}" for p in table.predictors)
        said.append(
            f"What ranks the forgetting of {table.predictors[0].points} models, all methods and "
            f"learning rates on the first seed, on all general items (Spearman, intervals over "
            f"methods): {ranked}."
        )
    failed = [row for row in table.rows if any("failed" in problem for problem in row.problems)]
    if failed:
        said.append(f"Runs failed of: {listed([row.title for row in failed])}.")
    if table.not_begun:
        said.append(f"Not run yet: {'; '.join(table.not_begun)}.")
    return said


def _verdicts(estimates: Sequence[tuple[str, Estimate]]) -> str:
    """Which of the differences, by title, can be told from none, and to which side."""
    told = [(title, value.value > 0) for title, value in estimates if value.distinguishable]
    better = [title for title, is_better in told if is_better]
    worse = [title for title, is_better in told if not is_better]
    return (
        f"better {listed(better)}; worse {listed(worse)}; {len(estimates) - len(told)} of "
        f"{len(estimates)} not distinguishable"
    )


def listed(titles: Sequence[str]) -> str:
    """Titles with commas between them."""
    return ", ".join(titles) if titles else "none"


def with_intervals(value: Estimate, form: Callable[[float], str] = points) -> str:
    """A number with ( ) its interval over seeds, [ ] that over items."""
    text = form(value.value)
    if value.over_seeds is not None:
        text += f" ({form(value.over_seeds.low)} to {form(value.over_seeds.high)})"
    else:
        text += " (one seed)"
    if value.over_items is not None:
        text += f" [{form(value.over_items.low)} to {form(value.over_items.high)}]"
    return text
