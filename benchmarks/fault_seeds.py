"""Hundreds of random kills -9 in little time: one process, no Ray, tiny models.

    python benchmarks/fault_seeds.py --stage record --seeds 2000:2100 --results record.jsonl

Each seed decides how often, from one to three times, and when a process is killed with SIGKILL; the
same work is begun anew each time, and a last time to its end. A moment is a share of the processor
time that undisturbed work takes, so that it falls where the code is, however crowded the machine.
Now and then a file that was left behind is damaged.

    record  48 rows; compared row by row with a record that was never interrupted
    train   16 steps in the process itself; parameters compared with those of a run left alone
    shards  the same with the model in shards, all of them this one worker's
    tune    a search of 6 trials that are made up (tests/support/fake_search.py), so that what is
            killed are the study's database, files and report; compared with a search left alone

Kills of Ray's own processes are in benchmarks/faults.py. Every seed adds a line to ``--results``;
seeds that are there already are left out. The last line is one JSON object: seeds, kills,
recovered, and the seeds that were not. The exit code is 1 if there are any.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
ROWS, STEPS, TRIALS = 48, 16, 6
DAMAGED_SHARE = 0.3
"""Of the kills behind which a file is damaged."""


def forked(
    work: Callable[[], object], log: Path, *, seconds: float = float("inf")
) -> tuple[int, float]:
    """Do ``work`` in a process of its own; its exit code, and the processor seconds that it took.

    Args:
        work: what it does.
        log: gets what it prints.
        seconds: of processor time, after which it is killed with SIGKILL.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        ended, status, used = os.wait4(pid, 0 if seconds == float("inf") else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if processor_seconds(pid) >= seconds:
            os.kill(pid, signal.SIGKILL)
            seconds = float("inf")
        else:
            time.sleep(0.002)


def processor_seconds(pid: int) -> float:
    """What a living process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Stage:
    """What is killed, and how it is told whether anything is wrong afterwards."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def prepare(self) -> None:
        """Make what every seed shares."""

    def run(self, folder: Path) -> None:
        """The work that is interrupted, with all that it leaves in ``folder``."""
        raise NotImplementedError

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Spoil a file that an interrupted process has left; what was done, empty for nothing."""
        raise NotImplementedError

    def differences(self, folder: Path, alone: Path, kills: int) -> dict[str, Any]:
        """What differs from work that was left alone; every value must be 0."""
        raise NotImplementedError


class Record(Stage):
    """Stage 0, whose actors are replaced by this process."""

    def prepare(self) -> None:
        from tests.support.tiny import make_data, make_model

        make_model(self.work / "model")
        make_data(self.work / "train.jsonl", num_rows=ROWS)

    def settings(self) -> Any:
        from lrmc_ray.config import load_settings

        model, data = self.work / "model", self.work / "train.jsonl"
        values = [f'model.name="{model}"', f'data.train="{data}"', "train.tau=0.9"]
        return load_settings(None, [*values, "train.anchor_weight=0"])

    def run(self, folder: Path) -> None:
        import pytest

        from lrmc_ray.record import run as record_run
        from lrmc_ray.record.actors import Recorder, recorder_options

        def actors_here(prepared: Any, shards: Any, tokenizer_size: int) -> Any:
            recorder = Recorder(**recorder_options(prepared, tokenizer_size))
            for shard in shards:
                yield recorder.record(shard)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_run, "run_actors", actors_here)
            record_run.record(self.settings(), folder)

    def damage(self, folder: Path, rng: random.Random) -> str:
        files = sorted(folder.glob("records/*.partial/part-*.parquet"))
        files += sorted(folder.glob("records/*.partial/examples.parquet"))
        files = [path for path in files if path.stat().st_size]  # a killed writer may leave none
        return flip_a_bit(rng.choice(files), rng) if files else ""

    def differences(self, folder: Path, alone: Path, kills: int) -> dict[str, Any]:
        from benchmarks.faults_record import rows_of
        from lrmc_ray.record.reader import Records

        (made,), (other,) = (list(path.glob("records/*")) for path in (folder, alone))
        records = Records(made)
        for part in range(len(records.parts)):
            records.verify_part(part)
        rows, wanted = rows_of(made), rows_of(other)
        return {
            "lost": sum((wanted - rows).values()),
            "doubled_or_changed": sum((rows - wanted).values()),
        }


class Train(Record):
    """Stage 1 on the only worker, in this process."""

    changes: ClassVar[dict[str, Any]] = {}
    """Of the settings."""

    def prepare(self) -> None:
        super().prepare()
        super().run(self.work)

    def run(self, folder: Path) -> None:
        import pytest

        from lrmc_ray.config import ResourceSettings, TrainSettings
        from lrmc_ray.train import driver, workers

        values: dict[str, Any] = {
            "steps": STEPS,
            "batch_size": 8,
            "micro_batches": 2,
            "checkpoint_every": 5,
        }
        values |= {"lr": 1e-3, "tau": 0.9, "tail_samples": 64, "max_grad_norm": 1.0}
        values |= self.changes
        settings = self.settings().model_copy(
            update={
                "train": TrainSettings.model_validate({**values, "schedule": "cosine"}),
                "resources": ResourceSettings.model_validate({"workers": [1, 1]}),
            }
        )
        (record,) = self.work.glob("records/*")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "worker_range", lambda _: (1, 1))
            patch.setattr(driver, "trains_here", lambda _: True)
            patch.setattr(workers, "held_cores", lambda _: contextlib.nullcontext())
            driver.train(settings, record, folder / "run", here=True)

    def damage(self, folder: Path, rng: random.Random) -> str:
        from benchmarks.faults_train import damage_checkpoint

        return damage_checkpoint(folder / "run", rng)

    def differences(self, folder: Path, alone: Path, kills: int) -> dict[str, Any]:
        from benchmarks.faults_train import largest_difference

        audit = json.loads((folder / "run" / "manifest.json").read_text())["ledger"]
        names = ("steps_missing", "samples_missing", "samples_duplicated", "replays_that_differ")
        model = Path("run/model/model.safetensors")
        difference = largest_difference(folder / model, alone / model)
        return {"parameters": difference} | {name: audit[name] for name in names}


class Shards(Train):
    """The same with the model in shards."""

    changes: ClassVar[dict[str, Any]] = {"parallel": "shard", "reduction": "fast"}

    def run(self, folder: Path) -> None:
        import pytest
        import torch.distributed as dist

        from lrmc_ray.train import driver

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(driver, "run_workers", driver.run_here)
                super().run(folder)
        finally:
            # The threads of a process group would be missing in a process that is forked later.
            if dist.is_initialized():
                dist.destroy_process_group()


class Tune(Stage):
    """A search whose trials are made up."""

    def run(self, folder: Path) -> None:
        import pytest

        from tests.support.fake_search import FakeSearch, install, settings_of

        def note(number: int) -> None:
            with (folder / "trained").open("a") as file:
                file.write(f"{number}\n")

        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            install(patch, FakeSearch(settings_of(TRIALS), folder, on_train=note)).run()

    def damage(self, folder: Path, rng: random.Random) -> str:
        return ""  # a damaged study is refused: tests/tune

    def differences(self, folder: Path, alone: Path, kills: int) -> dict[str, Any]:
        found, wanted = (self._told(path) for path in (folder, alone))
        trained = Counter((folder / "trained").read_text().split())
        (study,) = folder.glob("fake-*")
        # A trial whose process died before it was described is not begun: the next has another
        # number, and so other settings.
        first = min(set(range(max(found[0]) + 2)) - found[0].keys())
        starts = sum(
            path.read_text().count("\n") for path in study.glob("trials/*/processes.jsonl")
        )
        return {
            "trials_missing_or_too_many": abs(len(found[0]) - len(wanted[0])),
            "trials_that_differ": sum(found[0][n] != wanted[0][n] for n in wanted[0] if n < first),
            "trials_that_did_not_end": sum(t["state"] != "COMPLETE" for t in found[0].values()),
            "database_says_otherwise": int(
                found[1] != [(n, t["state"], t["params"]) for n, t in sorted(found[0].items())]
            ),
            "skipped_too_many": max(0, max(found[0]) + 1 - len(found[0]) - kills),
            "trainings_too_many": max(0, sum(trained.values()) - len(trained)),
            "starts_too_many": max(0, starts - TRIALS - kills),
            "other_best": int(first > max(wanted[0]) and found[2] != wanted[2]),
            "no_report": int(not (study / "report.html").is_file()),
        }

    def _told(self, folder: Path) -> tuple[dict[int, Any], list[Any], Any]:
        """What ``study.json`` and the database say: trials, their states and values, the best."""
        import optuna

        (study,) = folder.glob("fake-*")
        file = json.loads((study / "study.json").read_text())
        names = ("role", "state", "params", "settings", "results", "scores")
        trials = {t["number"]: {name: t.get(name) for name in names} for t in file["trials"]}
        assert file["state"] == "FINISHED"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        database = optuna.load_study(study_name=None, storage=f"sqlite:///{study / 'study.db'}")
        rows = [
            (trial.number, trial.state.name, trial.params)
            for trial in database.trials
            if trial.user_attrs.get("ready")
        ]
        return trials, rows, file["best"]


STAGES: dict[str, type[Stage]] = {
    "record": Record,
    "train": Train,
    "shards": Shards,
    "tune": Tune,
}


def flip_a_bit(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file; which file it is."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of {path.name}"


def one_seed(stage: Stage, seed: int, alone: Path, usual: float) -> dict[str, Any]:
    """Kill one piece of work, let it end, and compare it."""
    rng = random.Random(seed)
    folder = stage.work / f"seed-{seed}"
    folder.mkdir()
    log = folder / "log.txt"
    planned, kills, damages = rng.randint(1, 3), 0, []
    for _ in range(planned):
        seconds = rng.random() * usual
        code, _ = forked(lambda: stage.run(folder), log, seconds=seconds)
        if code == 0:
            break  # it had ended before
        if code != -signal.SIGKILL:
            return {"seed": seed, "kills": kills, "recovered": False, "code": code}
        kills += 1
        if rng.random() < DAMAGED_SHARE:
            damages += [done] if (done := stage.damage(folder, rng)) else []
    code, used = forked(lambda: stage.run(folder), log)
    row: dict[str, Any] = {"seed": seed, "kills": kills, "damages": damages, "code": code}
    row["again"] = round(used, 2)
    result = folder / "differences.json"
    if code == 0:
        found = lambda: result.write_text(json.dumps(stage.differences(folder, alone, kills)))  # noqa: E731
        row["audit"], _ = forked(found, log)
        if row["audit"] == 0:
            row |= json.loads(result.read_text())
    row["recovered"] = (
        code == 0 and row["audit"] == 0 and not any(json.loads(result.read_text()).values())
    )
    if row["recovered"]:
        shutil.rmtree(folder)
    return row


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--seeds", required=True, metavar="FROM:TO", help="TO is left out")
    parser.add_argument("--results", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--work", type=Path, help="directory to keep (default: a temporary one)")
    arguments = parser.parse_args(argv)
    first, _, end = arguments.seeds.partition(":")
    results: Path = arguments.results
    done = (
        {json.loads(line)["seed"] for line in results.read_text().splitlines()}
        if (results.exists())
        else set()
    )
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    work = arguments.work or Path(tempfile.mkdtemp(prefix="lrmc_seeds_"))
    work.mkdir(parents=True, exist_ok=True)
    os.environ["LRMC_CACHE"] = str(work / "cache")
    stage = STAGES[arguments.stage](work)
    stage.prepare()
    alone = work / "alone"
    stage.run(alone)  # in this process: what it imports and compiles, all others have
    usual = forked_well(lambda: stage.run(work / "usual"), work)
    print(f"{arguments.stage}: undisturbed {usual:.2f} s of processor time", flush=True)
    with results.open("a") as file:
        for seed in range(int(first), int(end)):
            if seed not in done:
                row = one_seed(stage, seed, alone, usual)
                file.write(json.dumps(row) + "\n")
                file.flush()
    if arguments.work is None:
        shutil.rmtree(work)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    bad = [row["seed"] for row in rows if not row["recovered"]]
    kills, damages = (sum(row["kills"] for row in rows), sum(bool(r["damages"]) for r in rows))
    summary = {"stage": arguments.stage, "seeds": len(rows), "kills": kills, "damages": damages}
    print(json.dumps({**summary, "recovered": len(rows) - len(bad), "not": bad}))
    return int(bool(bad))


def forked_well(work: Callable[[], object], folder: Path) -> float:
    """Do what must not fail; the processor seconds that it took."""
    code, used = forked(work, folder / "log.txt")
    if code:
        raise SystemExit((folder / "log.txt").read_text())
    return used


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
