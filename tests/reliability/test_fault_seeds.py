"""The harness of many random kills: it kills when it says, and notices what is wrong."""

import json
import os
import random
import signal
import time

import pytest

from benchmarks.fault_seeds import Record, Stage, Tune, forked, main, one_seed


class Counting(Stage):
    """Writes a number to a file, slowly; ``is_careful`` puts it there by a rename."""

    is_careful = True

    def run(self, folder):
        folder.mkdir(exist_ok=True)
        if (folder / "done").exists():
            return
        with (folder / "starts").open("a") as file:
            file.write("x")
        path = folder / ("part" if self.is_careful else "done")
        for number in range(50):
            with path.open("w" if number == 0 else "a") as file:
                file.write(f"{number}\n")
            end = time.process_time() + 0.004
            while time.process_time() < end:
                pass
        if self.is_careful:
            path.rename(folder / "done")

    def damage(self, folder, rng):
        return ""

    def differences(self, folder, alone, kills):
        lines = (folder / "done").read_text().split()
        starts = len((folder / "starts").read_text())
        return {"lost": 50 - len(lines), "starts_too_many": max(0, starts - 1 - kills)}


class Careless(Counting):
    is_careful = False


def test_a_process_dies_when_it_has_used_its_time(tmp_path):
    def work():
        while True:
            pass

    begin = time.process_time()
    code, used = forked(work, tmp_path / "log", seconds=0.2)
    assert code == -signal.SIGKILL
    assert 0.2 <= used < 1.0
    assert time.process_time() - begin < used  # it is another process


def test_the_end_of_a_process_is_told(tmp_path):
    def print_and_fail():
        print("before the end")
        raise ValueError("as asked for")

    assert forked(lambda: None, tmp_path / "log")[0] == 0
    assert forked(print_and_fail, tmp_path / "log")[0] == 1
    log = (tmp_path / "log").read_text()
    assert "before the end" in log
    assert "ValueError: as asked for" in log


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recovered"), [(Counting, True), (Careless, False)])
def test_what_was_half_written_is_noticed(tmp_path, kind, recovered):
    stage = kind(tmp_path)
    stage.run(tmp_path / "alone")
    rows = [one_seed(stage, seed, tmp_path / "alone", usual=0.2) for seed in range(6)]
    assert all(row["recovered"] for row in rows if not row["kills"])
    killed = [row for row in rows if row["kills"]]
    assert len(killed) >= 4
    assert all(row["recovered"] for row in killed) == recovered
    assert {row["lost"] for row in killed} == {0} if recovered else {row["lost"] for row in killed}
    left = [path.name for path in tmp_path.glob("seed-*")]
    assert left == [] if recovered else len(left) == sum(not row["recovered"] for row in rows)


def test_the_same_seed_plans_the_same(tmp_path):
    stage = Counting(tmp_path)
    stage.run(tmp_path / "alone")
    first, second = (one_seed(stage, 3, tmp_path / "alone", usual=0.1)["kills"] for _ in range(2))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["record", "train", "tune"])
def test_two_seeds_of_every_stage(tmp_path, stage, capsys):
    argv = ["--stage", stage, "--seeds", "7:9", "--results", str(tmp_path / "rows.jsonl")]
    pid = os.fork()  # what it puts in place of ours stays there
    if not pid:
        os._exit(main([*argv, "--work", str(tmp_path / "work")]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["recovered"]) for row in rows] == [(7, True), (8, True)]


def test_a_stage_has_its_own_damage(tmp_path):
    assert Record(tmp_path).damage(tmp_path, random.Random(0)) == ""
    assert Tune(tmp_path).damage(tmp_path, random.Random(0)) == ""
    part = tmp_path / "records" / "0.partial" / "part-0.parquet"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(9))
    assert Record(tmp_path).damage(tmp_path, random.Random(0)) == "a bit of part-0.parquet"
    assert sum(byte.bit_count() for byte in part.read_bytes()) == 1
