"""One JSON object of what ``gpu_round.sh`` has left in its folder.

    python benchmarks/gpu_summary.py FOLDER

``rows`` has what is to be reached and what was found, and whether that is enough; null where the
part failed, which ``failed`` then names. Exit code 1 if a part has.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PARTS = (
    *("peers", "fused"),
    *("correctness", "head", "head_float32", "moclip", "step"),
    *("qwen_model", "qwen_step", "qwen_record"),
)
HEAD_GOALS = {
    "1024,576,49152,24": 5.0,
    "2048,576,49152,24": 8.0,
    "1024,640,262144,24": 20.0,
    "512,2560,151936,32": 8.0,
}
TAIL_GOAL = 3.0
KERNEL, TAIL, AUTO = "restricted, kernel", "restricted, kernel, tail 1024", "restricted, auto"
DENSE = "restricted, dense_kernel"
PLAIN = "logits + cross_entropy"
RIVALS = ("F.linear_cross_entropy", "liger-kernel", "cut-cross-entropy")
LARGEST_SHARE = 0.05
"""Of the memory of all logits, on top of what there is."""

Row = dict[str, Any]


def row(goal: float, find: Callable[[], float], *, at_most: bool = False) -> Row:
    """A goal and what was found, which ``find`` may not find."""
    try:
        found = find()
    except (KeyError, TypeError, IndexError):
        return {"goal": goal, "at_most": at_most, "found": None, "is_reached": None}
    is_reached = found <= goal if at_most else found >= goal
    return {"goal": goal, "at_most": at_most, "found": found, "is_reached": is_reached}


def rows(parts: Mapping[str, Any]) -> dict[str, Row]:
    """Every row of the table, from the JSON objects of the parts by name."""
    found: dict[str, Row] = {}
    head = parts.get("head") or {}
    methods = {result["size"]: result["methods"] for result in head.get("results", [])}

    def head_row(goal: float, size: str, method: str, rival: str) -> Row:
        def speed() -> float:
            seconds = methods[size]
            return float(seconds[rival]["seconds"] / seconds[method]["seconds"])

        return row(goal, speed)

    for size, goal in HEAD_GOALS.items():
        found[f"head {size}"] = head_row(goal, size, KERNEL, PLAIN)
        found[f"head {size}, tail"] = head_row(TAIL_GOAL, size, TAIL, PLAIN)
        share = functools.partial(look_up, methods, size, KERNEL, "extra_memory_share")
        found[f"head {size}, memory"] = row(LARGEST_SHARE, share, at_most=True)
        for rival in RIVALS:
            if rival in methods.get(size, {}):
                found[f"head {size} against {rival}"] = head_row(1.0, size, KERNEL, rival)
    for size in methods:
        found[f"auto {size}"] = head_row(1.0, size, AUTO, PLAIN)
        found[f"all logits {size}"] = head_row(1.0, size, DENSE, PLAIN)
    for name, goal, at_most, path in (
        ("moclip over fused AdamW", 1.6, True, ("moclip", "moclip_over_fused_adamw")),
        ("step, SmolLM2", 1.3, False, ("step", "trainer_over_defaults")),
        ("step, Qwen3-1.7B", 1.2, False, ("qwen_step", "trainer_over_defaults")),
        ("memory, Qwen3-1.7B", 0.8, True, ("qwen_step", "variants", "default", "memory_ratio")),
        ("recording, Qwen3-1.7B", 0.9, False, ("qwen_record", "recording_over_forward")),
    ):
        found[name] = row(goal, functools.partial(look_up, parts, *path), at_most=at_most)
    return found


def look_up(values: Any, *path: str) -> float:
    """A number in nested objects."""
    for name in path:
        values = values[name]
    return float(values)


def last_object(text: str) -> Any:
    """The JSON object of the last line that is one; None without."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


def summary(folder: Path) -> dict[str, Any]:
    """What the parts in ``folder`` have found."""
    parts, failed = {}, {}
    for name in PARTS:
        code = folder / f"{name}.exit"
        if not code.exists():
            failed[name] = "not run"
        elif (number := code.read_text().strip()) != "0":
            failed[name] = "took too long" if number == "124" else f"exit code {number}"
        else:
            parts[name] = last_object((folder / f"{name}.txt").read_text(encoding="utf-8"))
    return {
        "benchmark": "gpu_round",
        "is_correct": "correctness" not in failed,
        "rows": rows(parts),
        "failed": failed,
        "parts": parts,
    }


def main() -> None:
    found = summary(Path(sys.argv[1]))
    for name, values in found["rows"].items():
        sign = "at most" if values["at_most"] else "at least"
        value = "-" if values["found"] is None else f"{values['found']:.2f}"
        print(f"{name:55s}{value:>8s}   {sign} {values['goal']}")
    print(json.dumps(found))
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
