"""What a search costs beside the trials' own work.

    python benchmarks/search_overhead.py --trials 8,64

Runs searches of trivially short trials, one training step and four scored items of a random model
of 0.2M parameters, and divides the time from the first trial's start to the last one's end by their
number: processes, Ray Train's start, imports, loading, the study, MLflow. The last line is one JSON
object: seconds per trial by number of trials, and the ratio of the largest to the smallest search.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SPACE = """\
[search]
name = "overhead"
[train]
steps = 1
batch_size = 2
micro_batches = 2
probe_every = 0
[evaluate]
limit = 4
drift_samples = 2
[resources]
max_concurrent = 2
[parameters]
tau = { low = 0.80, high = 0.999 }
delta_max = { low = 10, high = 120 }
"""


def seconds_per_trial(work: Path, trials: int, cpus: int) -> tuple[float, float]:
    """Seconds per trial by the clock, and those of the trials' own training and scoring."""
    from lrmc_ray.ray_session import ray_session
    from lrmc_ray.tune import main as tune
    from tests.tiny import make_data, make_model

    model, data = make_model(work / "model"), make_data(work / "train.jsonl")
    (work / "space.toml").write_text(SPACE)
    with ray_session(log=work / "ray.log", num_cpus=cpus):
        code = tune(
            [
                *("--space", str(work / "space.toml"), "--model", str(model)),
                *("--train-data", str(data), "--output", str(work / "runs"), "--json"),
                *("--domain-tasks", "capitals", "--general-tasks", "plain_english"),
                f"search.trials={trials}",
            ]
        )
    assert code == 0, f"exit code {code}"
    study = json.loads(next((work / "runs").glob("*/study.json")).read_text())
    began = min(trial["started"] for trial in study["trials"])
    ended = max(trial["ended"] for trial in study["trials"])
    own = sum(
        trial["cost"]["train_seconds"] + trial["cost"]["evaluate_seconds"]
        for trial in study["trials"]
    )
    return (ended - began) / trials, own / trials


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", default="8,64", help="trials of each search, by commas")
    parser.add_argument("--cpus", type=int, default=2, help="cores that Ray may use")
    arguments = parser.parse_args(argv)
    sys.path[:0] = [str(Path(__file__).parents[1])]
    rows = {}
    for trials in map(int, arguments.trials.split(",")):
        work = Path(tempfile.mkdtemp(prefix="lrmc-overhead-"))
        try:
            rows[trials] = seconds_per_trial(work, trials, arguments.cpus)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{'trials':>8} {'seconds per trial':>20} {'in training, scoring':>22}", file=sys.stderr)
    for trials, (total, own) in rows.items():
        print(f"{trials:8} {total:20.2f} {own:22.2f}", file=sys.stderr)
    fewest, most = min(rows), max(rows)
    print(
        json.dumps(
            {
                **{f"seconds_per_trial_{trials}": round(row[0], 2) for trials, row in rows.items()},
                "ratio": round(rows[most][0] / rows[fewest][0], 3),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
