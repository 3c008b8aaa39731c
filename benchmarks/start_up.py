"""What `lrmc tune` takes, from the command to its first line of metrics, or to its end.

    python benchmarks/start_up.py --repeats 2 --tree . --tree ../old     # two checkouts in turn
    python benchmarks/start_up.py --to-end --limit 3600                  # the whole demo

Runs the demo, or the command that follows `--`, in a new output directory. It is killed when the
first step of a trial is written, unless `--to-end` lets it end by itself. Processor seconds are
those of all of the command's processes, which are found by a mark in their environment and looked
at twice a second: what a process takes in its last half of a second is not counted.

Last line: a JSON object, a list of one object per run for each checkout: processor and clock
seconds up to each of MILESTONES.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = "LRMC_START_UP"
LOOK_SECONDS = 0.5
TICK = os.sysconf("SC_CLK_TCK")
LOOKS = 5
"""At a process that is not one of the command's, before it is left alone."""


def _has_lines(path: Path) -> bool:
    return path.stat().st_size > 0


MILESTONES: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "the study is begun": ("runs/*/study.json", Path.is_file),
    "the samples are recorded": ("runs/records/*/manifest.json", Path.is_file),
    "the base is scored": ("runs/scores/*/manifest.json", Path.is_file),
    "the first step is written": ("runs/*/trials/*/training/metrics.jsonl", _has_lines),
}
"""Files by which each is known; the last one ends the run, or the command does."""
ENDED = "the command has ended"


class Processes:
    """All processes of one command, those that have ended included."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._looks: dict[tuple[int, str], int] = {}
        self._seconds: dict[tuple[int, str], float] = {}

    def look(self) -> float:
        """Processor seconds so far."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                key = (int(path.name), fields[19])
                looks = self._looks.setdefault(key, 0)
                # Looked at more than once: before it has its own environment it has its parent's.
                if looks < LOOKS and key not in self._seconds:
                    self._looks[key] += 1
                    if self._has_mark(path):
                        self._seconds[key] = 0.0
                if key in self._seconds:
                    self._seconds[key] = (int(fields[11]) + int(fields[12])) / TICK
            except OSError:
                continue  # ended, or of another user
        return sum(self._seconds.values())

    def _has_mark(self, path: Path) -> bool:
        return f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0")

    def kill(self) -> None:
        """End all that are alive."""
        for _ in range(20):
            alive = 0
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    if self._has_mark(path):
                        os.kill(int(path.name), signal.SIGKILL)
                        alive += 1
                except OSError:
                    continue
            if not alive:
                return
            time.sleep(0.5)


def one_run(
    tree: Path, arguments: Sequence[str], limit: float, *, to_end: bool
) -> dict[str, dict[str, float]]:
    """Seconds up to each milestone."""
    processes = Processes()
    found: dict[str, dict[str, float]] = {}
    work = Path(tempfile.mkdtemp(prefix="lrmc_start_"))
    command = [sys.executable, "-m", "lrmc_ray.tune", *arguments, "--output", str(work / "runs")]
    environment = {**os.environ, MARK: processes.mark, "PYTHONPATH": str(tree)}
    start = time.monotonic()
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log)
        try:
            while ENDED not in found and (to_end or len(found) < len(MILESTONES)):
                code = process.poll()
                clock = time.monotonic() - start
                if code or (code == 0 and not to_end) or clock > limit:
                    raise SystemExit((work / "log").read_text()[-3000:])
                if code is None:
                    time.sleep(LOOK_SECONDS)
                seconds = processes.look()
                now = {"cpu": round(seconds, 1), "clock": round(clock, 1)}
                for name, (pattern, holds) in MILESTONES.items():
                    if name not in found and any(map(holds, work.glob(pattern))):
                        found[name] = now
                if code == 0:
                    found[ENDED] = now
        finally:
            processes.kill()
            process.wait()
    shutil.rmtree(work)
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--tree", type=Path, action="append", help="a checkout; several are run in turn"
    )
    parser.add_argument("--to-end", action="store_true", help="let the command end")
    parser.add_argument("--limit", type=float, default=850.0, help="seconds of one run")
    parser.add_argument("rest", nargs="*", help="arguments of `lrmc tune`, behind --")
    arguments = parser.parse_args(argv)
    trees = [tree.resolve() for tree in arguments.tree or [ROOT]]
    found: dict[str, list[dict[str, dict[str, float]]]] = {tree.name: [] for tree in trees}
    for _ in range(arguments.repeats):
        for tree in trees:
            run = one_run(tree, arguments.rest, arguments.limit, to_end=arguments.to_end)
            found[tree.name].append(run)
            for name, seconds in run.items():
                cpu, clock = seconds["cpu"], seconds["clock"]
                print(f"{tree.name:12} {name:28} {cpu:>7} CPU s {clock:>7} s", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
