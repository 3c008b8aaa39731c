"""The command ``lrmc prune``."""

import itertools
import json
import sys
from collections.abc import Sequence

from lrmc_ray.command_line import CommandParser
from lrmc_ray.console import harmless
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.files.sizes import size_text
from lrmc_ray.outputs.arguments import add_output_argument
from lrmc_ray.outputs.inventory import Sizes, inventory
from lrmc_ray.outputs.prunable import Prunable, cached, prunable, remove


def main(argv: Sequence[str]) -> int:
    """The command ``lrmc prune``."""
    parser = CommandParser(
        "prune",
        description="Remove what no report needs: models of a finished search but the best one, "
        "models of a finished comparison, and records that only finished work was made from. "
        "Scores, metrics and descriptions stay. It asks first.",
    )
    add_output_argument(parser)
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="also what was begun and not finished; its command begins anew then",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="also what this node fetched from a storage and has not used for --days",
    )
    parser.add_argument(
        "--days", type=float, default=7.0, metavar="N", help="with --cache (default: 7 days)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(argv)
    if arguments.days < 0:
        parser.error(f"argument --days: must not be negative, got {arguments.days:g}")
    sizes = Sizes()
    found = prunable(inventory(arguments.output), sizes=sizes, with_unfinished=arguments.unfinished)
    if arguments.cache:
        found += cached(cache_directory() / "storage", days=arguments.days, sizes=sizes)
    total = sum(item.size_bytes for item in found)
    if not arguments.json:
        _show(found, total)
    is_asked = bool(found) and not (arguments.dry_run or arguments.yes)
    if is_asked and not sys.stdin.isatty():
        print("error: nobody can be asked here; add --yes or --dry-run", file=sys.stderr)
        return 2
    is_agreed = _asked(total) if is_asked else bool(found) and not arguments.dry_run
    if is_agreed:
        remove(found)
    if arguments.json:
        rows = [
            {"path": str(item.path), "reason": item.reason, "size_bytes": item.size_bytes}
            for item in found
        ]
        print(json.dumps({"removed": is_agreed, "size_bytes": total, "paths": rows}))
    elif is_agreed:
        print(f"Removed, {size_text(total)} are free now.")
    elif found:
        print("Nothing was removed.")
    return 0


def _show(found: Sequence[Prunable], total: int) -> None:
    if not found:
        print("There is nothing that can go.")
        return
    for reason, items in itertools.groupby(found, lambda item: item.reason):
        own = list(items)
        print(f"{size_text(sum(item.size_bytes for item in own))}: {reason}")
        for item in own:
            print(harmless(f"  {item.path}".replace("\n", "\\n")))
    print(f"In all {size_text(total)}.")


def _asked(total: int) -> bool:
    """Whether the person at the terminal agrees."""
    print(f"Remove {size_text(total)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
