"""Seconds from a command to its first training step, on the demo's model and data.

    python benchmarks/start_up.py [--command train] [--repeats 3] [--against DIR]

- ``train`` finds its record made: it is about start-up alone.
- ``tune`` begins with nothing: it records and scores the base model first.

A step is taken when its line is in ``metrics.jsonl``; then the command is stopped. Beside the
seconds, the processor seconds of all its processes, read every 0.2 s, and when the stages before
had ended. With --against another checkout runs the same command in turn with this one, so that the
machine's other work hits both alike. The last line is one JSON object; ``seconds_ratio`` and
``cpu_ratio`` are the medians here over those there.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
LOOK_SECONDS = 0.2
STAGES = {
    "tokenized": "records/*/plan.json",
    "recorded": "records/*/manifest.json",
    "base model scored": "scores/*/manifest.json",
    "first step": "**/metrics.jsonl",
}
"""Whose file says that a stage has ended."""


def command(source: Path, which: str, output: Path, rest: list[str]) -> list[str]:
    """A command that uses the package in ``source``, which may not be this one."""
    return [sys.executable, "-m", f"lrmc_ray.{which}", "--output", str(output), *rest]


def environment(source: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}


def measure(source: Path, which: str, output: Path, rest: list[str]) -> dict[str, float]:
    """Run the command up to its first step."""
    before = {path for pattern in STAGES.values() for path in output.glob(pattern)}
    used: dict[tuple[int, float], float] = {}
    found: dict[str, float] = {}
    start = time.monotonic()
    with (output / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command(source, which, output, rest),
            env=environment(source),
            stdout=log,
            stderr=log,
            cwd=output,
        )
    own = psutil.Process(process.pid)
    family: dict[int, psutil.Process] = {}
    try:
        while "first step" not in found:
            if process.poll() is not None:
                raise RuntimeError((output / "log.txt").read_text()[-2000:])
            with contextlib.suppress(psutil.Error):
                for one in [own, *own.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        times = one.cpu_times()
                        family[one.pid] = one
                        used[one.pid, one.create_time()] = times.user + times.system
            for name, pattern in STAGES.items():
                new = [path for path in output.glob(pattern) if path not in before]
                if name not in found and any(path.stat().st_size for path in new):
                    found[name] = round(time.monotonic() - start, 2)
            time.sleep(LOOK_SECONDS)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for left in family.values():
            with contextlib.suppress(psutil.Error):
                left.kill()  # psutil knows a process by its birth, too
        process.wait()
    return {**found, "cpu": round(sum(used.values()), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--command", choices=["train", "tune"], default="train")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--no-warm-up", action="store_true", help="the first run counts as well")
    parser.add_argument("rest", nargs="*", help="settings, such as train.micro_batches=1")
    args = parser.parse_args()
    sources = {"here": ROOT} | ({"there": args.against.resolve()} if args.against else {})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats + (not args.no_warm_up)):
            for name, source in sources.items():
                output = Path(scratch) / (name if args.command == "train" else f"{name}{repeat}")
                output.mkdir(exist_ok=True)
                if args.command == "train" and not (output / "records").exists():
                    subprocess.run(
                        command(source, "record", output, args.rest),
                        env=environment(source),
                        check=True,
                        capture_output=True,
                    )
                # A setting that makes it another run, on the same record.
                seed = [f"train.seed={repeat}"] if args.command == "train" else []
                found = measure(source, args.command, output, [*args.rest, *seed])
                print(f"{name}: {found}", file=sys.stderr, flush=True)
                if repeat or args.no_warm_up:
                    runs[name].append(found)
    result: dict[str, Any] = {"benchmark": "start_up", "command": args.command, "runs": runs}
    for name, key in (("seconds", "first step"), ("cpu", "cpu")):
        medians = {one: statistics.median(run[key] for run in runs[one]) for one in sources}
        result[name] = medians
        if "there" in medians:
            result[f"{name}_ratio"] = medians["here"] / medians["there"]
        print(f"{name}: {medians}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
