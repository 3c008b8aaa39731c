import json
import math
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lrmc_ray.errors import DataError
from lrmc_ray.train.ledger import Ledger, audit_ledger, committed, read_ledger
from lrmc_ray.train.sample_order import samples_of_step


def write(path, *, attempts, num_samples=10, batch_size=4, change=lambda attempt, step, ids: ids):
    """A ledger of attempts, each the steps from the first to before the second number."""
    for first, last, world_size in attempts:
        with Ledger(path) as ledger:
            for step in range(first, last):
                ids = ids_of_step(num_samples, batch_size)(step)
                ledger.write(
                    step=step,
                    sample_ids=change(ledger.attempt, step, ids),
                    world_size=world_size,
                    loss=1.0 / (step + 1),
                    applied=True,
                )


def ids_of_step(num_samples, batch_size, seed=0):
    def ids(step):
        return [
            f"s{index}"
            for index in samples_of_step(num_samples, step, batch_size=batch_size, seed=seed)
        ]

    return ids


def audit(path, *, steps, num_samples=10, batch_size=4):
    return audit_ledger(path, ids_of_step(num_samples, batch_size), steps=steps)


def test_a_line_by_hand(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.write(step=0, sample_ids=["a", "b"], world_size=2, loss=0.5, applied=False)
    assert json.loads(path.read_text()) == {
        "attempt": 1,
        "step": 0,
        "sample_ids": ["a", "b"],
        "world_size": 2,
        "loss": 0.5,
        "applied": False,
    }
    with Ledger(path) as ledger:
        assert ledger.attempt == 2


def test_an_undisturbed_run_is_exact(tmp_path):
    write(tmp_path / "l", attempts=[(0, 9, 1)])
    result = audit(tmp_path / "l", steps=9)
    assert result.is_exact
    assert (result.attempts, result.steps_replayed, result.world_sizes) == (1, 0, (1,))


def test_a_run_with_restarts_is_exact_and_counts_what_was_done_again(tmp_path):
    """Killed after step 6, resumed at 5; killed after 7, resumed at 5; then to the end."""
    write(tmp_path / "l", attempts=[(0, 7, 2), (5, 8, 1), (5, 9, 3)])
    result = audit(tmp_path / "l", steps=9)
    assert result.is_exact
    assert result.steps_replayed == 2 + 3
    assert (result.attempts, result.world_sizes) == (3, (1, 2, 3))
    assert result.replays_that_differ == 0


def test_what_an_earlier_attempt_did_further_on_does_not_count(tmp_path):
    """An attempt that stops short leaves a gap, however far the one before it came."""
    write(tmp_path / "l", attempts=[(0, 9, 1), (3, 5, 1)])
    assert sorted(committed(read_ledger(tmp_path / "l"))) == [0, 1, 2, 3, 4]
    result = audit(tmp_path / "l", steps=9)
    assert (result.steps_missing, result.samples_missing) == (4, 16)
    assert result.steps_replayed == 2  # what was not done again is no replay
    assert not result.is_exact


@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 30),
    every=st.integers(1, 7),
    history=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=6),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_every_history_of_kills_and_sizes_leaves_each_sample_once_per_epoch(
    tmp_path_factory, num_samples, batch_size, steps, every, history
):
    """(workers, steps until the kill) as often as the history says, then to the end."""
    path = tmp_path_factory.mktemp("ledger") / "l"
    first, attempts = 0, []
    for world_size, length in history:
        last = min(first + length, steps - 1)
        attempts.append((first, last, world_size))
        first = last - last % every if last >= every else 0
    attempts.append((first, steps, 1))
    write(path, attempts=attempts, num_samples=num_samples, batch_size=batch_size)
    result = audit(path, steps=steps, num_samples=num_samples, batch_size=batch_size)
    assert result.is_exact
    assert result.steps_replayed == sum(b - a for a, b, _ in attempts) - steps
    # The same without the order that the audit was given: epoch by epoch.
    history_of = committed(read_ledger(path))
    used = [name for step in range(steps) for name in history_of[step].sample_ids]
    everything = {f"s{index}" for index in range(num_samples)}
    for start in range(0, len(used), num_samples):
        epoch = used[start : start + num_samples]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < num_samples or set(epoch) == everything


CHANGES = {
    "a sample left out": (lambda ids: ids[1:], 1, 0),
    "a sample twice": (lambda ids: [*ids, ids[0]], 0, 1),
    "another sample in its place": (lambda ids: ["s99", *ids[1:]], 1, 1),
    "another order": (lambda ids: ids[::-1], 0, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_deviation_is_found(tmp_path, name):
    change, missing, duplicated = CHANGES[name]
    write(
        tmp_path / "l",
        attempts=[(0, 5, 1)],
        change=lambda attempt, step, ids: change(ids) if step == 3 else ids,
    )
    result = audit(tmp_path / "l", steps=5)
    assert not result.is_exact
    assert (result.samples_missing, result.samples_duplicated) == (missing, duplicated)


def test_a_deviation_that_a_restart_undid_is_no_fault_but_is_counted(tmp_path):
    write(
        tmp_path / "l",
        attempts=[(0, 5, 1), (2, 6, 1)],
        change=lambda attempt, step, ids: ids[::-1] if (attempt, step) == (1, 4) else ids,
    )
    result = audit(tmp_path / "l", steps=6)
    assert result.is_exact
    assert result.replays_that_differ == 1


def test_steps_beyond_the_end_are_duplicates(tmp_path):
    write(tmp_path / "l", attempts=[(0, 6, 1)])
    result = audit(tmp_path / "l", steps=5)
    assert result.samples_duplicated == 4
    assert not result.is_exact


def test_a_torn_end_is_ignored_by_the_reader_and_cut_by_the_writer(tmp_path):
    path = tmp_path / "l"
    write(path, attempts=[(0, 3, 1)])
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole[:-1].rfind(b"\n") - 1):
        path.write_bytes(whole[:-cut])
        assert len(read_ledger(path)) == 2
    write(path, attempts=[(2, 4, 1)])
    assert audit(path, steps=4).is_exact


def test_a_corrupt_line_inside_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "l"
    write(path, attempts=[(0, 3, 1)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + '{"step": 1}\n' + lines[2])
    with pytest.raises(DataError, match="line 2 does not"):
        read_ledger(path)


def test_a_loss_that_is_not_finite_is_written_and_read(tmp_path):
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        ledger.write(step=0, sample_ids=["a"], world_size=1, loss=math.nan, applied=False)
    with Ledger(path) as ledger:
        ledger.write(step=0, sample_ids=["a"], world_size=1, loss=math.nan, applied=False)
    result = audit_ledger(path, lambda step: ["a"], steps=1)
    assert result.is_exact
    assert (result.steps_replayed, result.replays_that_differ) == (1, 0)


FULL_DISK = """
import resource, sys
from pathlib import Path
from lrmc_ray.train.ledger import Ledger
fill = dict(sample_ids=["a"] * 20, world_size=1, loss=0.5, applied=True)
with Ledger(Path(sys.argv[1])) as ledger:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        for step in range(100):
            ledger.write(step=step, **fill)
    except OSError as error:
        print(step, error.filename)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    ledger.write(step=step, **fill)  # there is room again
"""


def test_a_full_disk_leaves_whole_lines_and_the_next_one_is_whole_as_well(tmp_path):
    path = tmp_path / "ledger.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    failed, name = done.stdout.split()
    assert name == str(path)
    assert int(failed) > 3
    assert [line.step for line in read_ledger(path)] == list(range(int(failed) + 1))
