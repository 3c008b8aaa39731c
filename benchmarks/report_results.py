"""Write the tables and figures of the comparisons whose raw results are in ``benchmarks/results``.

    python benchmarks/report_results.py            # all of them: about a minute of processor time
    python benchmarks/report_results.py code ct_radio    # some, by the name of their table

Nothing is run: every number and interval is computed from the packed scores of the items. Tables
go to ``benchmarks/results`` (the CSV has each method's difference from the reference, too), figures
to ``docs``.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import drift_and_forgetting
from lrmc_ray.compare.description import COMPARISON_FILE
from lrmc_ray.compare.figure import draw_effects, draw_methods, draw_scatter
from lrmc_ray.compare.report import as_csv, as_markdown
from lrmc_ray.compare.table import ComparisonTable, load_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPACE = ROOT / "tune_spaces" / "compare.toml"
COMMAND = "python benchmarks/report_results.py"


@dataclass(frozen=True)
class Report:
    """A table, and the figures that are drawn beside it."""

    name: str
    archive: str
    comparison: str
    """The first part of its directory's name in the archive."""
    seeds: tuple[int, ...] | None = None
    """Those that are reported; None for all that have run."""
    figures: dict[str, Callable[[ComparisonTable], "Figure"]] = field(default_factory=dict)
    """By the name of their file."""
    pooled: tuple[str, str] | None = None
    """Archive and name of a second comparison, with other seeds of the same: its methods are
    reported, on the seeds of both."""


REPORTS = (
    Report(
        "nl2sql", "compare_nl2sql", "compare", (0, 1, 2),
        {"compare_nl2sql.png": draw_scatter, "compare_nl2sql_methods.png": draw_methods},
    ),
    Report(
        "nl2sql_six_seeds", "compare_nl2sql", "compare", (0, 1, 2, 3, 4, 5),
        {"compare_nl2sql_effects.png": draw_effects},
    ),
    Report("ct_radio", "compare_ct_radio", "ct"),
    Report("code", "compare_code", "code"),
    Report("prompt_k4", "compare_prompt_k", "prompt_k4"),
    Report("prompt_k512", "compare_prompt_k", "prompt_k512"),
    Report("nl2sql_fresh_seeds", "compare_nl2sql_fresh", "fresh"),
    Report(
        "nl2sql_nine_seeds", "compare_nl2sql", "compare", pooled=("compare_nl2sql_fresh", "fresh")
    ),
)  # fmt: skip
TRANSFER = "transfer"
DRIFT = "drift"


def unpack(archive: str, directory: Path) -> None:
    """Unpack the raw results ``archive`` into ``directory``."""
    with tarfile.open(RESULTS / f"{archive}.tar.xz") as tar:
        tar.extractall(directory, filter="data")


def comparison_directory(directory: Path, name: str) -> Path:
    """Where the comparison ``name`` is in what was unpacked."""
    (found,) = directory.glob(f"{name}-*/{COMPARISON_FILE}")
    return found.parent


def load(report: Report, directory: Path) -> ComparisonTable:
    """The table of ``report``, of what was unpacked into ``directory``."""
    comparison = comparison_directory(directory, report.comparison)
    path = comparison / COMPARISON_FILE
    description = json.loads(path.read_text(encoding="utf-8"))
    if report.pooled is not None:
        other = comparison_directory(directory, report.pooled[1])
        description = pool(description, other)
    if report.seeds is not None:
        description["seeds"] = list(report.seeds)
    # The labels are no part of the results: they came later, and say only what is in colour.
    methods = tomllib.loads(SPACE.read_text(encoding="utf-8"))["methods"]
    for method in description["methods"]:
        method["label"] = methods.get(method["name"], {}).get("label", "")
    path.write_text(json.dumps(description), encoding="utf-8")
    return load_table(comparison)


def pool(description: dict[str, Any], other: Path) -> dict[str, Any]:
    """What two comparisons of the same say of the methods of the second, which has other seeds.

    Args:
        description: of the first, whose base scores are taken and whose directory it is for.
        other: directory of the second, beside that of the first.
    """
    added = json.loads((other / COMPARISON_FILE).read_text(encoding="utf-8"))
    names = {method["name"] for method in added["methods"]}
    in_both = names & {method["name"] for method in description["methods"]}
    seeds = [*description["seeds"], *added["seeds"]]
    runs = [run for run in description["runs"] if run["method"] in names]
    here = f"../{other.name}"
    for run in added["runs"]:
        run["directory"] = f"{here}/{run['directory']}"
        if "scores" in run:
            run["scores"] = f"{here}/{run['scores']}"
        for blend in run.get("blends", ()):
            blend["scores"] = f"{here}/{blend['scores']}"
        if run["split"] == "test" or run["method"] not in in_both:
            runs.append(run)  # of the others the first comparison has chosen the learning rate
    effects = [
        {**effect, "pairs": [pair for pair in effect["pairs"] if names >= set(pair)]}
        for effect in description["effects"]
    ]
    return {
        **description,
        "methods": [
            {**method, "seeds": seeds} if method["name"] in in_both else method
            for method in added["methods"]
        ],
        "chosen": {**added["chosen"], **{name: description["chosen"][name] for name in in_both}},
        "runs": runs,
        "seeds": seeds,
        "effects": [effect for effect in effects if effect["pairs"]],
    }


def as_page(markdown: str, *archives: str) -> str:
    """The table with a line that says where it is from."""
    title, _, rest = markdown.partition("\n")
    names = " and ".join(f"`{archive}.tar.xz`" for archive in archives)
    return f"{title}\n\nWritten by `{COMMAND}` from {names}.\n{rest}"


def transfer_table(directory: Path) -> str:
    """What ``benchmarks/transfer.py`` says of the two comparisons."""
    sides = [str(comparison_directory(directory, f"{TRANSFER}{steps}")) for steps in (10, 60)]
    script = ROOT / "benchmarks" / "transfer.py"
    said = subprocess.run(
        [sys.executable, str(script), *sides], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    table = [line for line in said if line.startswith("|")]
    correlations = [f"- {line}" for line in said if not line.startswith("|")]
    head = ["# tau and delta_max at 10 and at 60 steps", "", "One seed; 95 % intervals over items."]
    return "\n".join([*head, "", *table, "", *correlations]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write what is asked for."""
    names = [*(report.name for report in REPORTS), TRANSFER, DRIFT]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, help="write tables and figures there instead")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in names]:
        parser.error(f"no table is called {unknown[0]}; there are {', '.join(names)}")
    tables = arguments.output or RESULTS
    figures = arguments.output or ROOT / "docs"
    for report in REPORTS:
        if report.name in (arguments.names or names):
            with tempfile.TemporaryDirectory() as directory:
                archives = [report.archive, *([report.pooled[0]] if report.pooled else [])]
                for archive in archives:
                    unpack(archive, Path(directory))
                table = load(report, Path(directory))
            path = tables / f"compare_{report.name}.md"
            path.write_text(as_page(as_markdown(table), *archives), encoding="utf-8")
            print(path)
            path = path.with_suffix(".csv")
            path.write_text(as_csv(table), encoding="utf-8")
            print(path)
            for name, draw in report.figures.items():
                draw(table).savefig(figures / name, facecolor="white")
                print(figures / name)
    if TRANSFER in (arguments.names or names):
        with tempfile.TemporaryDirectory() as directory:
            unpack(TRANSFER, Path(directory))
            path = tables / f"{TRANSFER}.md"
            path.write_text(as_page(transfer_table(Path(directory)), TRANSFER), encoding="utf-8")
        print(path)
    if DRIFT in (arguments.names or names):
        archives = ["compare_nl2sql", "compare_ct_radio"]
        with tempfile.TemporaryDirectory() as directory:
            for archive in archives:
                unpack(archive, Path(directory))
            found = [comparison_directory(Path(directory), name) for name in ("compare", "ct")]
            path = tables / f"{DRIFT}.md"
            path.write_text(as_page(drift_and_forgetting.table(*found), *archives), "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
