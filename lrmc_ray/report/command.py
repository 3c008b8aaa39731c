"""The report from the command line: ``python -m lrmc_ray.report``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.command_line import CommandParser
from lrmc_ray.console import plain_console
from lrmc_ray.files.study import find_study
from lrmc_ray.report.console import as_json, summary_table
from lrmc_ray.report.figures_png import FIGURE_FILE
from lrmc_ray.report.page import write_study_report
from lrmc_ray.report.study import load_study
from lrmc_ray.report.words import headline, record_sentences, score_text

# Command


def main(argv: Sequence[str]) -> int:
    """The command ``python -m lrmc_ray.report``."""
    parser = CommandParser(
        "report",
        description="Write report.html and gain_vs_forgetting.png of a finished or running search.",
    )
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="RUNS_DIR",
        help="the search's output directory, or the study's in it (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(argv)
    study = load_study(find_study(arguments.directory))
    path = write_study_report(study)
    if arguments.json:
        paths = {"report": str(path), "figure": str(path.with_name(FIGURE_FILE))}
        print(json.dumps(as_json(study) | paths, allow_nan=False))
        return 0

    # Without a terminal nothing limits the width, and a wrapped table is hard to read.
    console = plain_console(width=None if sys.stdout.isatty() else 120)
    console.print(summary_table(study))
    if study.verdict is not None:
        console.print(score_text(study.verdict.comparison), style="bright_black")
    for sentence in headline(study):
        console.print(sentence.text)
    for note in (*study.notes, *record_sentences(study)):
        console.print(f"Note: {note}")
    # Not through rich, which would break a long path in two.
    print(f"\nReport  {path}\nFigure  {path.with_name(FIGURE_FILE)}")
    return 0
