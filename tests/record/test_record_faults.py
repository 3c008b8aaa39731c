"""kill -9 at every named commit point of a recording, then the same call: nothing lost or doubled.

The actors' part runs in the killed process itself, without Ray; benchmarks/faults.py does the same,
and more, to the whole job.
"""

import json
import os
import random
import signal
from collections import Counter

import pytest
import torch

from lrmc_ray.config import load_settings
from lrmc_ray.errors import DirectoryInUseError, IncompleteArtifactError
from lrmc_ray.files import fault_points
from lrmc_ray.files.artifacts import file_digest, is_finished, lock_directory, read_manifest
from lrmc_ray.files.fault_points import POINTS
from lrmc_ray.record import prepare as prepare_module
from lrmc_ray.record import run as record_run
from lrmc_ray.record.actors import Recorder, recorder_options
from lrmc_ray.record.names import EXAMPLES, PLAN
from lrmc_ray.record.prepare import prepare
from lrmc_ray.record.reader import Records
from lrmc_ray.record.run import record
from tests.support.tiny import make_data

torch.set_num_threads(1)


def actors_here(prepared, shards, tokenizer_size):
    recorder = Recorder(**recorder_options(prepared, tokenizer_size))
    for shard in shards:
        yield recorder.record(shard)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(record_run, "run_actors", actors_here)
    monkeypatch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 300)


@pytest.fixture(scope="module")
def settings(tiny_model, tmp_path_factory):
    data = make_data(tmp_path_factory.mktemp("data") / "train.jsonl", num_rows=30)
    return load_settings(
        None, [f'model.name="{tiny_model}"', f'data.train="{data}"', "train.tau=0.9"]
    )


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_run, "run_actors", actors_here)
        patch.setattr(prepare_module, "SMALLEST_SHARD_TOKENS", 300)
        return record(settings, tmp_path_factory.mktemp("undisturbed"))


def digests(directory) -> dict[str, str]:
    return {path.name: file_digest(path) for path in directory.glob("part-*.parquet")}


def killed(settings, output, fault: str) -> bool:
    """Whether a recording in a process of its own died of ``fault``."""
    pid = os.fork()
    if pid == 0:
        try:
            fault_points._FAULT = fault
            fault_points._passes.clear()
            record(settings, output)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


CASES = [(point, 1) for point in POINTS if point.startswith("record.")] + [
    (f"record.{point}", 3)
    for point in ("shard_started", "part_written", "part_renamed", "part_counted")
]


@pytest.mark.parametrize(("point", "number"), CASES)
def test_after_kill_9_the_same_call_gives_the_same_record(
    settings, undisturbed, tmp_path, point, number
):
    assert killed(settings, tmp_path, f"{point}:kill:{number}")
    final = tmp_path / "records" / undisturbed.name
    assert is_finished(final) == (point == "record.published")
    assert final.exists() == is_finished(final)
    if not final.exists():
        with pytest.raises(IncompleteArtifactError) as caught:
            Records(final)
        assert caught.value.exit_code == 3
    assert record(settings, tmp_path) == final
    assert digests(final) == digests(undisturbed)
    manifests = [read_manifest(path, made_by="") for path in (final, undisturbed)]
    for manifest in manifests:
        del manifest["seconds"]
    assert manifests[0] == manifests[1]
    # Nothing is left of the interrupted attempt.
    assert {path.name for path in final.iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert [path.name for path in (tmp_path / "records").iterdir()] == [final.name]


def test_many_kills_in_a_row_lose_nothing_and_redo_little(settings, undisturbed, tmp_path):
    """Each life writes one file and dies before the driver knows of the next."""
    log = tmp_path / "passes"
    lives = 0
    fault_points._LOG = str(log)
    try:
        while killed(settings, tmp_path, "record.part_written:kill:2"):
            lives += 1
    finally:
        fault_points._LOG = None
    final = tmp_path / "records" / undisturbed.name
    assert digests(final) == digests(undisturbed)
    started = Counter(
        line.split()[2] for line in log.read_text().splitlines() if "shard_started" in line
    )
    assert lives == len(started) - 1
    assert sum(started.values()) == 2 * len(started) - 1  # one began in vain in every life


def test_what_a_kill_left_behind_may_be_damaged(settings, undisturbed, tmp_path):
    """A bit of a file, of the examples; a file cut short; a stray one. All are made again."""
    rng = random.Random(0)
    for number in range(5):
        output = tmp_path / str(number)
        assert killed(settings, output, "record.parts_complete:kill:1")
        partial = output / "records" / f"{undisturbed.name}.partial"
        for path in rng.sample(sorted(partial.glob("part-*.parquet")), 2):
            content = bytearray(path.read_bytes())
            if rng.random() < 0.3:
                del content[rng.randrange(len(content)) :]
            else:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        if number % 3 == 0:
            content = bytearray((partial / EXAMPLES).read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (partial / EXAMPLES).write_bytes(content)
        (partial / "part-00099.parquet").write_bytes(b"stray")
        final = record(settings, output)
        records = Records(final)
        expected = Records(undisturbed)
        assert len(records) == len(expected)
        for index in range(len(expected)):
            one, other = records[index], expected[index]
            assert one.sample_id == other.sample_id
            assert torch.equal(one.input_ids_T, other.input_ids_T)
            assert torch.equal(one.candidates.token_ids, other.candidates.token_ids)
            assert torch.equal(one.candidates.logprobs, other.candidates.logprobs)
        assert not (final / "part-00099.parquet").exists()


def test_a_file_that_was_replaced_after_it_was_counted_is_described_anew(
    settings, undisturbed, tmp_path, monkeypatch
):
    """By an actor that was thought dead: here one that rounds otherwise."""
    import dataclasses

    import pyarrow.parquet as pq

    from lrmc_ray.record.schema import write_part

    def late_actor(prepared, shards, tokenizer_size):
        parts = list(actors_here(prepared, shards, tokenizer_size))
        path = prepared.partial / parts[0]["name"]
        samples = [Records(undisturbed)[index] for index in range(parts[0]["rows"])]
        other = [dataclasses.replace(s, domain="other") for s in samples]
        write_part(path, other, prepared.provenance)
        yield from parts

    monkeypatch.setattr(record_run, "run_actors", late_actor)
    final = record(settings, tmp_path)
    records = Records(final)
    assert records[0].domain == "other"
    assert pq.read_metadata(final / records.parts[0].name).num_rows == records.parts[0].rows
    summary = read_manifest(final, made_by="")["summary"]
    assert set(summary["domains"]) == {"", "other"}


def test_two_commands_do_not_record_into_one_directory(settings, tmp_path):
    prepared = prepare(settings, tmp_path)
    with lock_directory(prepared.partial), pytest.raises(DirectoryInUseError) as caught:
        record(settings, tmp_path)
    assert caught.value.exit_code == 5


def test_a_plan_is_whole_or_absent(settings, tmp_path):
    """Killed while tokenizing: the examples are there, the plan is not."""
    prepared = prepare(settings, tmp_path)
    plan = json.loads((prepared.partial / PLAN).read_text())
    (prepared.partial / PLAN).unlink()
    content = (prepared.partial / EXAMPLES).read_bytes()
    (prepared.partial / EXAMPLES).write_bytes(content[: len(content) // 2])
    assert json.loads((prepare(settings, tmp_path).partial / PLAN).read_text()) == plan
