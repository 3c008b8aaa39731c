"""Seconds from the command ``lrmc record`` to its first part, and what they go into.

    python benchmarks/first_part.py [--model demo]

One actor. Each line is a moment: seconds by the clock since the command began, and the processor
seconds of the process that it is in. The command is ended behind its first part.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lrmc_ray.console import run_command
from lrmc_ray.record import actors, command
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run


class Stamps:
    """Moments of several processes, in one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.time()

    def __call__(self, what: str) -> None:
        line = {"what": what, "wall": time.time() - self.start, "cpu": time.process_time()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def behind(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with a moment when it returns."""

        def stamped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self(what)
            return result

        return stamped

    def show(self) -> None:
        for line in map(json.loads, self.path.read_text().splitlines()):
            print(f"{line['wall']:9.2f} s {line['cpu']:8.2f} CPU s  {line['what']}")


def timed_recorder(stamp: Stamps) -> type[actors.Recorder]:
    """A recorder that says when it is where."""

    class Recorder(actors.Recorder):
        def __init__(self, **options: Any) -> None:
            stamp("actor: constructor begins")
            from lrmc_ray.record import candidates

            stamp("actor: torch and transformers are imported")
            load = getattr(candidates, "load_model")  # noqa: B009
            setattr(candidates, "load_model", stamp.behind("actor: weights are read", load))  # noqa: B010
            super().__init__(**options)
            stamp("actor: head and packing are tried, constructor ends")

        def record(self, shard: Any) -> Any:
            stamp("actor: a part begins")
            part = super().record(shard)
            stamp("actor: a part is written")
            return part

    return Recorder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        stamp = Stamps(Path(directory) / "stamps")
        run_actors = actors.run_actors

        def first(*of_job: Any) -> Iterator[Any]:
            import ray

            stamp("driver: Ray is up")
            next(run_actors(*of_job))
            stamp("driver: the first part is there")
            stamp.show()
            ray.shutdown()
            shutil.rmtree(directory)
            os._exit(0)

        setattr(actors, "Recorder", timed_recorder(stamp))  # noqa: B010
        setattr(record_run, "run_actors", first)  # noqa: B010
        prepare = stamp.behind("driver: prepared, rows are tokenized", prepare_module.prepare)
        setattr(prepare_module, "prepare", prepare)  # noqa: B010
        argv = ["--model", arguments.model, "--output", directory, "--quiet"]
        raise SystemExit(run_command(command.main, [*argv, "resources.actors=[1,1]"]))


if __name__ == "__main__":
    main()
