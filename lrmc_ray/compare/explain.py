"""``lrmc compare --explain``: what a comparison would run and what it would cost."""

import statistics

from lrmc_ray.compare.description import Description
from lrmc_ray.compare.jobs import num_jobs
from lrmc_ray.console import format_seconds


def explain(description: Description) -> str:
    """What a comparison would run, and what that costs by the runs that have ended."""
    space, methods = description.space, description.methods
    total = num_jobs(space, methods)
    models = sum(len(space.learning_rates_of(m)) + len(space.seeds_of(m)) - 1 for m in methods)
    lines = []
    for method in methods:
        rates = ", ".join(f"{lr:g}" for lr in space.learning_rates_of(method))
        own = space.methods[method].seeds
        seeds = "" if own is None else f"; seeds {', '.join(map(str, own))}"
        lines.append(f"  {method:<20} {space.methods[method].title:<40} lr {rates}{seeds}")
    lines.append(
        f"{len(methods)} methods: {models} models of {space.train.steps} steps, scored {total} "
        f"times, {description.num_ended} of which are there; seeds "
        f"{', '.join(map(str, space.compare.seeds))}."
    )
    blends = len(space.compare.blend_weights) + len(space.compare.depth_blend_weights)
    if blends:
        reported = sum(len(space.seeds_of(method)) for method in methods)
        lines.append(
            f"{blends} models between the base and each of the {reported} reported ones are scored "
            "as well."
        )
    runs = description.values.get("runs", [])
    if costs := [entry["cost"] for entry in runs if entry.get("cost")]:
        seconds = statistics.median(c["train_seconds"] + c["evaluate_seconds"] for c in costs)
        left = total - description.num_ended
        lines.append(
            f"At {format_seconds(seconds)} each, the median of {len(costs)} that have ended, "
            f"{left} more take {format_seconds(seconds * left)} one after the other; as many run "
            "side by side as the machine has room for."
        )
    return "\n".join(lines)
