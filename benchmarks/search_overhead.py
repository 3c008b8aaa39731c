"""What a search costs beside the trials' own work.

    python benchmarks/search_overhead.py --trials 8,64

Runs searches of trivially short trials, one training step and four scored items of a random model
of 0.2M parameters, and divides the time from the first trial's start to the last one's end by their
number: processes, Ray Train's start, imports, loading, the study, MLflow. Beside the time, the
processor time of all processes in that span, by kind: a busy machine counts less in it. The last
line is one JSON object: seconds per trial by number of trials, and the ratio of the largest to the
smallest search.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil

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


SAMPLING_SECONDS = 0.2


class ProcessorTime:
    """Processor time of this process's descendants, read now and then; what dies in between loses.

    Ray's processes are children of children that nobody waits for, so the kernel keeps no sum.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], list[tuple[float, float]]] = {}
        self._titles: dict[tuple[int, float], str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "ProcessorTime":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(SAMPLING_SECONDS):
            for process in [own, *own.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    key = (process.pid, process.create_time())
                    used = process.cpu_times()
                    self._seconds.setdefault(key, []).append((time.time(), used.user + used.system))
                    title = "this process" if process is own else next(iter(process.cmdline()), "")
                    is_vague = not title or title.endswith(("IDLE", "python", "python3"))
                    if not is_vague or key not in self._titles:
                        self._titles[key] = title.rpartition("/")[2].removeprefix("ray::")

    def between(self, began: float, ended: float) -> dict[str, float]:
        """Seconds of all processes from ``began`` to ``ended`` (of the epoch), by kind."""
        total: defaultdict[str, float] = defaultdict(float)
        for key, readings in self._seconds.items():
            before = max((used for at, used in readings if at < began), default=0.0)
            until = max((used for at, used in readings if at <= ended), default=before)
            total[re.split(r"[.:( ]", self._titles[key])[0]] += until - before
        return total


def seconds_per_trial(work: Path, trials: int, cpus: int) -> tuple[float, float, dict[str, float]]:
    """Seconds per trial by the clock, those of its own training and scoring, processor time."""
    from lrmc_ray.cluster.session import ray_session
    from lrmc_ray.tune.command import main as tune
    from tests.support.tiny import make_data, make_model

    model, data = make_model(work / "model"), make_data(work / "train.jsonl")
    (work / "space.toml").write_text(SPACE)
    with (
        ray_session(log=work / "ray.log", num_cpus=cpus),
        contextlib.redirect_stdout(None),
        ProcessorTime() as processors,
    ):
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
    used = processors.between(began, ended)
    for kind in used:
        used[kind] /= trials
    return (ended - began) / trials, own / trials, used


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
    header = ("trials", "seconds per trial", "in training, scoring", "processor seconds")
    print("".join(f"{title:>22}" for title in header), file=sys.stderr)
    for trials, (total, own, used) in rows.items():
        cells = (total, own, sum(used.values()))
        print(f"{trials:22}" + "".join(f"{cell:22.2f}" for cell in cells), file=sys.stderr)
        for kind, seconds in sorted(used.items(), key=lambda item: -item[1])[:8]:
            print(f"{kind:>66} {seconds:21.2f}", file=sys.stderr)
    fewest, most = min(rows), max(rows)
    print(
        json.dumps(
            {
                **{f"seconds_per_trial_{trials}": round(row[0], 2) for trials, row in rows.items()},
                **{
                    f"processor_seconds_{trials}": round(sum(row[2].values()), 2)
                    for trials, row in rows.items()
                },
                "ratio": round(rows[most][0] / rows[fewest][0], 3),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
