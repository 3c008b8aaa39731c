"""What early stopping saves, and whether it keeps the winner.

    python benchmarks/early_stopping.py --trials 12                     # a random model of 0.2M
    python benchmarks/early_stopping.py --demo --trials 10              # SmolLM2-135M, 40 minutes

Runs one study twice, with ``search.early_stopping`` "none" and "median", in one output directory,
so record and base scores are made once. All points are drawn at random and seeded per trial
(``search.startup_trials`` = trials): both searches have the same trials, and the winner of the
whole one is kept exactly if it was not stopped. The last line is one JSON object: hours by the
clock of both, the shares that are left, trials stopped, whether the winner is the same, and
Spearman's correlation of the scores on the way with the final ones, over all trials.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL = """\
[search]
name = "small"
[train]
steps = 40
batch_size = 4
micro_batches = 2
probe_every = 0
[evaluate]
limit = 40
drift_samples = 2
[parameters]
tau = { low = 0.80, high = 0.999 }
delta_max = { low = 10, high = 120 }
lr = { low = 1e-5, high = 3e-2, log = true }
"""
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metadata: {{chat_template: true}}
"""


def small_task(directory: Path) -> Path:
    """Questions like those of the training data; three of four choices are not in their form."""
    with (directory / "sums.jsonl").open("w") as file:
        for number in range(40):
            a, b = 1 + number * 2, 90 - number
            choices = [f"It is {a + b}.", "The farad.", f"Nobody knows {b}", "class and def"]
            turn = number % len(choices)
            row = {
                "question": f"What is {a} plus {b}?",
                "choices": choices[-turn:] + choices[:-turn] if turn else choices,
                "answer": turn,
            }
            file.write(json.dumps(row) + "\n")
    task = directory / "sums.yaml"
    task.write_text(TASK.format(path=directory / "sums.jsonl"))
    return task


def search(work: Path, arguments: argparse.Namespace, rule: str) -> dict[str, Any]:
    """Run the study with early stopping by ``rule``; returns its description."""
    from lrmc_ray.cluster.session import ray_session
    from lrmc_ray.tune.command import main as tune

    if arguments.demo:
        where = ["--space", "demo"]
    else:
        from tests.support.tiny import make_data, make_model

        (work / "space.toml").write_text(SMALL)
        where = [
            *("--space", str(work / "space.toml"), "--model", str(make_model(work / "model"))),
            *("--train-data", str(make_data(work / "train.jsonl"))),
            *("--domain-tasks", str(small_task(work)), "--general-tasks", "plain_english"),
        ]
    steps = [f"train.steps={arguments.steps}"] if arguments.steps else []
    with ray_session(log=work / "ray.log", num_cpus=arguments.cpus):
        code = tune(
            [
                *where,
                *("--output", str(work / "runs"), f"search.seed={arguments.seed}", *steps),
                f"search.trials={arguments.trials}",
                f"search.startup_trials={arguments.trials}",
                f"search.early_stopping={rule}",
                f"search.early_stopping_items={arguments.items}",
                f"search.early_stopping_after={arguments.after}",
            ]
        )
    assert code == 0, f"exit code {code}"
    studies = [json.loads(path.read_text()) for path in (work / "runs").glob("*/study.json")]
    study: dict[str, Any]
    (study,) = [s for s in studies if s["settings"]["search"]["early_stopping"] == rule]
    return study


def cost(study: dict[str, Any]) -> tuple[float, float]:
    """Hours by the clock from the first trial's start to the last one's end, and core hours."""
    trials = study["trials"]
    first, last = min(t["started"] for t in trials), max(t["ended"] for t in trials)
    # Without the pauses of a search that was interrupted.
    clock = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in study["sessions"])
    cores = sum(
        trial["cost"][f"{part}_seconds"] * trial["cost"][f"{part}_cores"]
        for trial in trials
        for part in ("train", "evaluate")
    )
    return clock / 3600, cores / 3600


def rank_correlation(whole: dict[str, Any], stopped: dict[str, Any]) -> float:
    """Between the final scores of the whole study and those on the way of the other."""
    from scipy.stats import spearmanr

    on_the_way = {t["number"]: t["rung"]["value"] for t in stopped["trials"] if t["rung"]}
    final = {t["number"]: t["results"]["eval/combined"] for t in whole["trials"]}
    numbers = sorted(on_the_way)
    return float(spearmanr([on_the_way[n] for n in numbers], [final[n] for n in numbers])[0])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="the real model of the demo")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, help="of a trial (default: 40, the demo 24)")
    parser.add_argument("--items", type=int, default=16, help="per task, on the way")
    parser.add_argument("--after", type=float, default=0.5, help="share of the steps")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--cpus", type=int, default=2, help="cores that Ray may use")
    parser.add_argument("--work", type=Path, help="directory to keep (default: a temporary one)")
    arguments = parser.parse_args(argv)
    sys.path[:0] = [str(Path(__file__).parents[1])]
    work = arguments.work or Path(tempfile.mkdtemp(prefix="lrmc-early-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        whole, stopped = (search(work, arguments, rule) for rule in ("none", "median"))
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    pairs = list(zip(whole["trials"], stopped["trials"], strict=True))
    assert all(a["params"] == b["params"] for a, b in pairs), "both must have the same trials"
    show(pairs)
    hours, core_hours = zip(cost(whole), cost(stopped), strict=True)
    print(
        json.dumps(
            {
                "trials": arguments.trials,
                "stopped_early": sum(b["state"] == "PRUNED" for _, b in pairs),
                "hours_whole": round(hours[0], 4),
                "hours_early_stopping": round(hours[1], 4),
                "hours_saved": round(hours[0] - hours[1], 4),
                "clock_ratio": round(hours[1] / hours[0], 3),
                "core_hours_ratio": round(core_hours[1] / core_hours[0], 3),
                "seconds_on_the_way": round(
                    sum(b["rung"]["seconds"] for _, b in pairs if b["rung"]) / len(pairs), 2
                ),
                "best_whole": whole["best"],
                "best_early_stopping": stopped["best"],
                "same_winner": whole["best"] == stopped["best"],
                "rank_correlation": round(rank_correlation(whole, stopped), 3),
            }
        )
    )
    return 0


def show(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Every trial in both searches."""
    print(
        f"{'trial':>5} {'role':>10} {'on the way':>11} {'state':>9} {'final':>8} {'seconds':>8} "
        f"{'whole':>8}",
        file=sys.stderr,
    )
    for whole, stopped in pairs:
        value = stopped["rung"]["value"] if stopped["rung"] else float("nan")
        seconds = [
            trial["cost"]["train_seconds"] + trial["cost"]["evaluate_seconds"]
            for trial in (stopped, whole)
        ]
        print(
            f"{whole['number']:5} {whole['role']:>10} {value:+11.3f} {stopped['state']:>9} "
            f"{whole['results']['eval/combined']:+8.3f} {seconds[0]:8.1f} {seconds[1]:8.1f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
