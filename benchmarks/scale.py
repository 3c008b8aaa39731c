"""Does a command that has ten times as much before it take ten times as long, or more?

    python benchmarks/scale.py --trials 1000 --old-trials 10000 --studies 200 --rows 10000

Every part is measured at a tenth of its size and at the size, in processes of their own. Trials are
made up (tests/support/fake_search.py), but asked for, described, written down and reported by the
project's code. A search of ``--old-trials`` is one of 60 trials whose ended trials were copied, in
all its files and its database, and goes on. Studies are copies of one; rows of a
short question each are recorded by a random model of 0.2M parameters in one process, without Ray.
Its logits are made so large that a position has few candidates, as a trained model's has.

Last line, one JSON object: for every command the processor seconds and the peak of memory at both
sizes, and ``times``, the processor seconds per unit at the size over those at a tenth of it. What a
command takes with next to nothing before it, its imports above all, is subtracted first. The exit
code is 1 if any is above ``--most``.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

Command = Callable[[Path, int], None]

SEARCHED = 60
"""Trials that are searched where more are made of them."""

SHARPER = 8.0
"""Times as large as a random model's are the logits that rows are recorded with."""
SHORT_RECORD = ("record.prompt_k_max=0", "train.anchor_weight=0")
"""Candidates of what is learned alone."""


def run_search(output: Path, trials: int) -> None:
    import pytest

    from tests.support.fake_search import FakeSearch, install, settings_of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrmc_ray.tune.watch.POLL_SECONDS", 1.0)
        fake = install(patch, FakeSearch(settings_of(trials), output))
        patch.setattr("lrmc_ray.tune.watch.POLL_SECONDS", 1.0)
        assert len(fake.run().description.file.trials) == trials


def go_on(output: Path, trials: int) -> None:
    """One trial more than the search had."""
    run_search(output, trials + 1)


def make_old_trials(output: Path, trials: int) -> None:
    """A search of many trials: what it knows of a few that have ended, again and again."""
    run_search(output, min(trials, SEARCHED))
    (study,) = output.glob("fake-*")
    values = json.loads((study / "study.json").read_text())
    ended = [trial for trial in values["trials"] if trial["role"] == "search"]
    rows = [
        ended[index % len(ended)] | {"number": number}
        for index, number in enumerate(range(len(values["trials"]), trials))
    ]
    with contextlib.closing(sqlite3.connect(study / "study.db")) as database:
        for row in rows:
            source = int(row["directory"].rpartition("/")[2])
            directory = f"trials/{row['number']:04d}"
            copy_trial(database, source, row["number"])
            shutil.copytree(study / row["directory"], study / directory)
            for key in ("scores", "metrics_file"):
                row[key] = row[key].replace(row["directory"], directory)
            row["directory"] = directory
        database.commit()
    values["trials"] += rows
    (study / "study.json").write_text(json.dumps(values))


def copy_trial(database: sqlite3.Connection, source: int, number: int) -> None:
    """Add trial ``number`` to a database of Optuna, with all that it says of another one."""
    (old,) = database.execute("SELECT trial_id FROM trials WHERE number = ?", (source,)).fetchone()
    rest = "study_id, state, datetime_start, datetime_complete"
    new = database.execute(
        f"INSERT INTO trials (number, {rest}) SELECT ?, {rest} FROM trials WHERE trial_id = ?",
        (number, old),
    ).lastrowid
    for table in ("params", "values", "user_attributes", "system_attributes"):
        names = [row[1] for row in database.execute(f"PRAGMA table_info(trial_{table})")][1:]
        rest = ", ".join(name for name in names if name != "trial_id")
        database.execute(
            f"INSERT INTO trial_{table} (trial_id, {rest}) "
            f"SELECT ?, {rest} FROM trial_{table} WHERE trial_id = ?",
            (new, old),
        )


def go_on_without_report(output: Path, trials: int) -> None:
    """Ten trials more than the search had."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrmc_ray.tune.finish.write_study_report", lambda _: None)
        patch.setattr("lrmc_ray.tune.finish.load_study", lambda path: path)
        patch.setattr("lrmc_ray.tune.finish.study_note", lambda _: "")
        patch.setattr("lrmc_ray.tune.finish.study_scores", lambda _: {})
        run_search(output, trials + 10)


def report(output: Path, _: int) -> None:
    from lrmc_ray.report.page import write_report

    write_report(next(output.glob("fake-*")))


def list_outputs(output: Path, _: int) -> None:
    from lrmc_ray.outputs.ls_command import main

    main([str(output), "--size"])


def prune(output: Path, _: int) -> None:
    from lrmc_ray.outputs.prune_command import main

    main([str(output), "--dry-run"])


def look_back(output: Path, _: int) -> None:
    """What a search looks for in earlier ones before it begins."""
    from lrmc_ray.tune.forecast import forecast
    from tests.support.fake_search import settings_of

    forecast(settings_of(7), output, slots=2)


def make_studies(output: Path, studies: int) -> None:
    """A search of six trials, copied."""
    if not any(output.glob("fake-*")):
        run_search(output, 6)
    (first,) = output.glob("fake-*")
    study = json.loads((first / "study.json").read_text())
    for number in range(1, studies):
        copy = output / f"fake-{number:012x}"
        shutil.copytree(first, copy)
        (copy / "study.json").write_text(json.dumps({**study, "id": copy.name}))


def sharpen(model: Path) -> None:
    """Make the logits so large that a position has few candidates, as a trained model's has."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= SHARPER
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def record_rows(output: Path, rows: int) -> None:
    import pytest

    from lrmc_ray.config import load_settings
    from lrmc_ray.record import run as record_run
    from lrmc_ray.record.actors import Recorder, recorder_options
    from tests.support.tiny import make_model

    def actors_here(prepared: Any, shards: Any, tokenizer_size: int) -> Any:
        recorder = Recorder(**recorder_options(prepared, tokenizer_size))
        for shard in shards:
            yield recorder.record(shard)

    model = make_model(output / "model")
    sharpen(model)
    data = output / "train.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for a in range(rows):
            row = {"prompt": f"What is {a} plus {a % 7}?", "completion": f"{a + a % 7}"}
            file.write(json.dumps(row) + "\n")
    settings = load_settings(
        None,
        [f'model.name="{model}"', f'data.train="{data}"', "train.tau=0.9", *SHORT_RECORD],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_run, "run_actors", actors_here)
        record_run.record(settings, output)


def read_rows(output: Path, _: int) -> None:
    """Open the record, and read a sample from its beginning, middle and end."""
    from lrmc_ray.record.reader import Records

    records = Records(next((output / "records").iterdir()))
    for index in (0, len(records) // 2, len(records) - 1):
        records[index]


PARTS: dict[str, list[tuple[str, Command]]] = {
    "trials": [
        ("tune, per trial", run_search),
        ("tune again, one more", go_on),
        ("report", report),
    ],
    "old_trials": [
        ("", make_old_trials),
        ("tune goes on, ten more", go_on_without_report),
        ("ls --size, one study", list_outputs),
        ("prune --dry-run, one study", prune),
        ("report, one study", report),
    ],
    "studies": [
        ("", make_studies),
        ("ls --size", list_outputs),
        ("prune --dry-run", prune),
        ("tune looks back", look_back),
    ],
    "rows": [("record", record_rows), ("record is read", read_rows)],
}
SMALLEST = {"trials": 3, "old_trials": 20, "studies": 1, "rows": 20}
"""At which a command's fixed part is measured."""


def child(part: str, name: str, output: Path, size: int) -> None:
    """Run one command, and print what it took."""
    command = dict(PARTS[part])[name]
    with contextlib.redirect_stdout(sys.stderr):
        command(output, size)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": 1024 * used.ru_maxrss}))


def measure(part: str, size: int, work: Path) -> dict[str, dict[str, float]]:
    """What every command of ``part`` takes at ``size``."""
    output = work / f"{part}-{size}"
    output.mkdir()
    found = {}
    for name, _ in PARTS[part]:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--child", part, name, str(output), str(size)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LRMC_CACHE": str(work / "cache")},
        )
        if done.returncode:
            raise SystemExit(f"{part}, {name}, {size}: {done.stderr[-3000:]}")
        if name:
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{part} {size}: {name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    shutil.rmtree(output)
    return found


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--child"]:
        child(argv[1], argv[2], Path(argv[3]), int(argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in PARTS:
        name = part.replace("_", "-")
        parser.add_argument(f"--{name}", type=int, default=0, help="0 leaves this part out")
    parser.add_argument("--most", type=float, default=2.0, help="times per unit")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lrmc-scale-") as folder:
        for part in PARTS:
            size = getattr(arguments, part)
            if not size:
                continue
            fixed, few, many = (
                measure(part, at, Path(folder)) for at in (SMALLEST[part], size // 10, size)
            )
            for name in few:
                base = fixed[name]["cpu"]
                each = [max(found[name]["cpu"] - base, 0.05) for found in (few, many)]
                result[name] = {
                    "sizes": [size // 10, size],
                    "cpu_seconds": [round(found[name]["cpu"], 2) for found in (few, many)],
                    "fixed_cpu_seconds": round(base, 2),
                    "peak_bytes": [found[name]["peak"] for found in (few, many)],
                    "times": round(each[1] / each[0] / 10, 2),
                }
    for name, row in result.items():
        print(f"{name:24} {row}")
    print(json.dumps(result))
    return int(any(row["times"] > arguments.most for row in result.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
