"""Whether drift ranks the forgetting, over the models of finished comparisons.

    python benchmarks/report_results.py drift    # from packed results

Forgetting is on all general items where a comparison tried learning rates: those that choose a rate
and those that are reported. Rank correlations are Spearman's; their intervals are over methods,
whose models stay together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.compare.measure import general_half
from lrmc_ray.compare.reader import ComparisonReader
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.request import Split
from lrmc_ray.evaluate.statistics import Interval, rank_correlation

PREDICTORS = ("drift on the new task", "drift on general texts", "domain gain")
RATE = 1e-4
"""The learning rate that most methods chose."""


@dataclass(frozen=True)
class Model:
    """One tuned model."""

    method: str
    lr: float
    forgetting: float
    predictors: tuple[float, ...]
    """Of ``PREDICTORS``."""


def tried(reader: ComparisonReader, half: Split | None = None) -> list[Model]:
    """Every method at every learning rate, on the first seed.

    Args:
        reader: of the comparison.
        half: of the general items, on which the forgetting is; None for both.
    """
    found = []
    for entry in reader.description["runs"]:
        if entry["split"] == "dev" and entry["state"] == "COMPLETE":
            forgetting = reader.forgetting(entry) if half is None else _on(half, reader, entry)
            found.append(_model(reader, entry, forgetting, "dev"))
    return found


def _on(half: Split, reader: ComparisonReader, entry: Mapping[str, object]) -> float:
    base = Scores.load(reader.directory / reader.description["base_scores"]["dev"])
    tuned = Scores.load(reader.directory / str(entry["scores"]))
    halves = (general_half(scores, half) for scores in (base, tuned))
    return compare(*halves, forgetting_weight=1.0, seed=0, resamples=2).forgetting.value


def reported(reader: ComparisonReader) -> list[Model]:
    """Every method at its chosen rate, on all seeds: forgetting on the items that are reported."""
    return [
        _model(reader, entry, reader.compared(entry).forgetting.value, "test")
        for entry in reader.description["runs"]
        if entry["split"] == "test" and entry["state"] == "COMPLETE"
    ]


def _model(
    reader: ComparisonReader, entry: Mapping[str, object], forgetting: float, split: str
) -> Model:
    method, lr, seed = str(entry["method"]), float(str(entry["lr"])), int(str(entry["seed"]))
    drifts = [reader.drift(method, lr, seed, group) for group in ("domain", "general")]
    if split == "dev":  # the same run may have test scores, on other questions of the domain
        own = entry["results"]
        assert isinstance(own, Mapping)
        drifts = [own.get(f"eval/kl_base_{group}") for group in ("domain", "general")]
    gain = reader.compared(entry).domain_gain.value
    return Model(method, lr, forgetting, (*(float(str(d)) for d in drifts), gain))


def correlations(models: Sequence[Model]) -> list[Interval | None]:
    """How each of ``PREDICTORS`` ranks the forgetting."""
    return [
        rank_correlation(
            [model.predictors[number] for model in models],
            [model.forgetting for model in models],
            [model.method for model in models],
        )
        for number in range(len(PREDICTORS))
    ]


def table(nl2sql: Path, radio: Path) -> str:
    """The whole answer, as Markdown."""
    task, other = ComparisonReader(nl2sql), ComparisonReader(radio)
    all_rates = tried(task)
    cells = [
        ("NL2SQL, all learning rates, seed 0", all_rates),
        ("the same, half of the general items that chooses", tried(task, "dev")),
        ("the same, the other half", tried(task, "test")),
        (f"all items, rates below {RATE:g}", [m for m in all_rates if m.lr < RATE]),
        (f"all items, {RATE:g}", [m for m in all_rates if m.lr == RATE]),
        (f"all items, rates above {RATE:g}", [m for m in all_rates if m.lr > RATE]),
        ("NL2SQL, chosen rates, all seeds, reported items", reported(task)),
        ("radio questions, all learning rates, seed 0", tried(other)),
        ("radio questions, chosen rates, all seeds, reported items", reported(other)),
    ]
    lines = [
        "# What ranks the forgetting",
        "",
        "Spearman's rank correlation with the forgetting; 95 % intervals over methods.",
        "",
        f"| models | number | {' | '.join(PREDICTORS)} |",
        "|---" * (2 + len(PREDICTORS)) + "|",
    ]
    for title, models in cells:
        texts = [
            "-" if one is None else f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"
            for one in correlations(models)
        ]
        lines.append(f"| {title} | {len(models)} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"
