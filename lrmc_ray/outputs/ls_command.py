"""The command ``lrmc ls``."""

import json
from collections.abc import Sequence
from pathlib import Path

from lrmc_ray.command_line import CommandParser
from lrmc_ray.console import harmless
from lrmc_ray.files.sizes import size_text
from lrmc_ray.outputs.arguments import add_output_argument
from lrmc_ray.outputs.inventory import Entry, Sizes, inventory

TITLES = {
    "search": "Searches",
    "comparison": "Comparisons",
    "training": "Trainings by themselves",
    "record": "Records",
    "scores": "Scores",
    "unfinished": "Unfinished",
}


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc ls``."""
    parser = CommandParser(
        "ls",
        description="Say what lies in an output directory: searches, comparisons, trainings, "
        "records and scores.",
        epilog="`lrmc prune` removes what no report needs.",
    )
    add_output_argument(parser)
    parser.add_argument("--size", action="store_true", help="say what each takes on the disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(argv)
    entries = inventory(arguments.output)
    sizes: dict[Path, int] = {}
    if arguments.size or arguments.json:
        counted = Sizes()
        sizes = {entry.path: counted.of(entry.path) for entry in entries}
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "entries": _rows(entries, sizes)}))
        return 0
    if not entries:
        print(f"{arguments.output} holds nothing that a command of lrmc has made")
    for kind, title in TITLES.items():
        own = [entry for entry in entries if entry.kind == kind]
        if own:
            print(f"{title}")
        for entry in own:
            size = f"  {size_text(sizes[entry.path]):>9s}" if arguments.size else ""
            state = "" if entry.state in ("finished", "unfinished") else f"{entry.state}: "
            print(harmless(f"  {entry.name}{size}\n    {state}{entry.about}"))
    if arguments.size:
        print(f"In all {size_text(sum(sizes.values()))}")
    return 0


def _rows(entries: Sequence[Entry], sizes: dict[Path, int]) -> list[dict[str, object]]:
    return [
        {
            "kind": entry.kind,
            "name": entry.name,
            "path": str(entry.path),
            "state": entry.state,
            "about": entry.about,
            "size_bytes": sizes[entry.path],
        }
        for entry in entries
    ]
