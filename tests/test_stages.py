"""Record and train through Ray on a small model: whatever happens on the way, the same result."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.cluster.session import ray_session
from lrmc_ray.config import load_settings
from lrmc_ray.errors import DataError, TrainingError
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.files.names import MODEL
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.record.reader import Records
from lrmc_ray.record.run import record
from lrmc_ray.train.driver import train
from lrmc_ray.train.sample_order import samples_of_step
from tests.support.cases import rest_is_slow
from tests.support.tiny import make_data

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "train.jsonl", num_rows=30)


@pytest.fixture(scope="module")
def make_settings(tiny_model, data):
    def make(*overrides):
        return load_settings(
            None,
            [
                f'model.name="{tiny_model}"',
                f'data.train="{data}"',
                f"train.steps={STEPS}",
                "train.lr=1e-3",
                "train.tau=0.9",
                "train.checkpoint_every=3",
                "train.anchor_weight=0.5",
                "train.tail_samples=32",
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with ray_session(log=tmp_path_factory.mktemp("ray") / "ray.log", num_cpus=3):
        yield


@pytest.fixture(scope="module")
def recorded(session, make_settings, tmp_path_factory):
    return record(make_settings(), tmp_path_factory.mktemp("runs"))


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / MODEL / "model.safetensors")


def assert_same_parameters(first: Path, second: Path) -> None:
    one, other = parameters(first), parameters(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_the_record_holds_what_the_model_says_position_by_position(recorded, tiny_model, data):
    """Against the model's own logits, one sequence at a time, without padding or Ray."""
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    records = Records(recorded)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(records) == len(rows)
    seen = set()
    for index in range(len(records)):
        sample = records[index]
        seen.add(tokenizer.decode(sample.input_ids_T))
        with torch.no_grad():
            logits_TV = model(input_ids=sample.input_ids_T[None]).logits[0]
        caps = torch.where(sample.is_supervised_P, 1024, 64)
        expected = select_candidates(
            logits_TV[sample.positions_P],
            sample.input_ids_T[sample.positions_P + 1],
            tau=0.9,
            k_min=2,
            k_max=caps,
        )
        # Padding changes the last bits of a logit, so a set may differ at its edge.
        assert (expected.sizes - sample.candidates.sizes).abs().max() <= 1
        same = expected.sizes == sample.candidates.sizes
        ours, theirs = sample.candidates.rows(same), expected.rows(same)
        torch.testing.assert_close(
            ours.logprobs.float(), theirs.logprobs.float(), atol=0.02, rtol=0.002
        )
        assert sample.is_supervised_P.any()
        assert not sample.is_supervised_P[0]
    texts = {
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ],
            tokenize=False,
        )
        for row in rows
    }
    assert seen == texts


def test_the_manifests_numbers_are_those_of_the_files(recorded):
    summary = read_manifest(recorded, made_by="")["summary"]
    records = Records(recorded)
    samples = [records[index] for index in range(len(records))]
    supervised = sum(int(s.is_supervised_P.sum()) for s in samples)
    sizes = torch.cat([s.candidates.sizes[s.is_supervised_P] for s in samples])
    assert summary["supervised_positions"] == supervised
    assert summary["prompt_positions"] == sum(int((~s.is_supervised_P).sum()) for s in samples)
    assert summary["k_mean"] == pytest.approx(float(sizes.float().mean()), abs=0.01)
    assert summary["tokens"] == sum(len(s.input_ids_T) for s in samples)
    assert summary["bytes"] == sum(path.stat().st_size for path in recorded.glob("part-*"))
    assert summary["capped_share"] == 0.0


def test_another_number_of_actors_records_the_same(recorded, make_settings, tmp_path):
    other = record(make_settings("resources.actors=[1,1]"), tmp_path)
    assert other.name == recorded.name
    for path in sorted(recorded.glob("part-*.parquet")):
        assert pq.read_table(path).equals(pq.read_table(other / path.name))


def test_a_finished_record_is_found_again_wherever_the_data_lie(
    recorded, make_settings, tmp_path, data
):
    moved = tmp_path / "renamed.jsonl"
    moved.write_bytes(data.read_bytes())
    before = (recorded / "manifest.json").stat().st_mtime_ns
    again = record(make_settings(f'data.train="{moved}"'), recorded.parent.parent)
    assert again == recorded
    assert (recorded / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def one_worker(recorded, make_settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "training"
    return train(make_settings("resources.workers=[1,1]"), recorded, directory)


@pytest.mark.parametrize("workers", rest_is_slow([2, 3], [2]))
def test_parameters_do_not_depend_on_the_number_of_workers(
    one_worker, recorded, make_settings, tmp_path, workers
):
    settings = make_settings(f"resources.workers=[{workers},{workers}]")
    other = train(settings, recorded, tmp_path / "training")
    assert_same_parameters(one_worker, other)
    assert read_manifest(other, made_by="")["world_size"] == workers


def test_the_ledger_holds_every_sample_once_per_epoch(one_worker, recorded):
    lines = [json.loads(line) for line in (one_worker / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    used = [sample for line in lines for sample in line["sample_ids"]]
    records = Records(recorded)
    everything = sorted(records[index].sample_id for index in range(len(records)))
    epoch = len(records)
    for start in range(0, len(used) - epoch + 1, epoch):
        assert sorted(used[start : start + epoch]) == everything
    expected = samples_of_step(epoch, 5, batch_size=8, seed=0)
    assert lines[5]["sample_ids"] == [records[index].sample_id for index in expected]


def test_a_killed_training_goes_on_to_the_same_parameters(
    one_worker, recorded, make_settings, tmp_path
):
    """kill -9 of driver, Ray and worker in the middle, then the same call with two workers."""
    directory = tmp_path / "training"
    script = tmp_path / "run.py"
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in make_settings()
        .model_dump(mode="json", exclude_none=True, exclude={"parameters", "resources"})
        .items()
        for key, value in values.items()
    ]
    script.write_text(
        "from pathlib import Path\n"
        "from lrmc_ray.config import load_settings\n"
        "from lrmc_ray.cluster.session import ray_session\n"
        "from lrmc_ray.train.driver import train\n"
        f"settings = load_settings(None, {[*overrides, 'resources.workers=[1,1]']!r})\n"
        f"with ray_session(log=Path({str(tmp_path / 'ray.log')!r}), num_cpus=1):\n"
        f"    train(settings, Path({str(recorded)!r}), Path({str(directory)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        checkpoints = list((directory / "checkpoints").glob("step_*/manifest.json"))
        if checkpoints:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (directory / "manifest.json").exists(), "finished before it could be killed"
    finished = train(make_settings("resources.workers=[2,2]"), recorded, directory)
    assert_same_parameters(one_worker, finished)
    lines = [json.loads(line) for line in (finished / "ledger.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == list(range(STEPS))
    assert not (finished / "checkpoints").exists()


@pytest.mark.slow
def test_a_training_in_an_actor_needs_no_controller_and_outlives_its_workers(
    one_worker, recorded, make_settings, tmp_path
):
    """As a search's trial trains: with the controller in its own process."""
    import psutil
    import ray

    class Trial:
        def train(self, settings, recorded, directory):
            from lrmc_ray.train.driver import train

            return train(settings, recorded, directory)

    def titles():
        found = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found[process.pid] = next(iter(process.cmdline()), "")
        return found

    def of(names, found):
        return [pid for pid, title in found.items() if any(name in title for name in names)]

    others = ("TrainController", "PreemptionWatcher", "PlacementGroupCleaner")
    directory = tmp_path / "training"
    trial = ray.remote(num_cpus=0)(Trial).remote()
    earlier = set(of(["RayTrainWorker", *others], titles()))  # of other tests, on their way out
    result = trial.train.remote(make_settings("resources.workers=[2,2]"), recorded, directory)
    seen: dict[int, str] = {}
    deadline = time.monotonic() + 300
    while not list((directory / "checkpoints").glob("step_*/manifest.json")):
        assert time.monotonic() < deadline
        if len(set(of(["RayTrainWorker"], seen)) - earlier) < 2:
            seen |= titles()
        time.sleep(0.01)
    workers = set(of(["RayTrainWorker"], seen)) - earlier
    os.kill(min(workers), signal.SIGKILL)
    finished = ray.get(result)
    assert_same_parameters(one_worker, finished)
    assert read_manifest(finished, made_by="")["world_size"] == 2
    assert set(of(others, seen)) <= earlier
    everything = ray.cluster_resources()["CPU"]
    while ray.available_resources().get("CPU") != everything and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == everything


def test_training_on_another_models_record_is_refused(recorded, make_settings, tmp_path):
    from tests.support.tiny import make_model

    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="another model"):
        train(make_settings(f'model.name="{other}"'), recorded, tmp_path / "training")


def test_a_directory_is_not_used_for_other_settings(one_worker, recorded, make_settings):
    with pytest.raises(DataError, match=r"lr was 0\.001, now 0\.002"):
        train(make_settings("train.lr=2e-3"), recorded, one_worker)


@pytest.mark.slow
def test_a_training_that_explodes_fails_once_with_its_cause(recorded, make_settings, tmp_path):
    settings = make_settings(
        "train.optimizer=adamw", "train.lr=0.99", "train.weight_decay=1e30", "train.max_bad_steps=2"
    )
    with pytest.raises(TrainingError, match="2 steps in a row without a finite loss"):
        train(settings, recorded, tmp_path / "training")
    ledger = (tmp_path / "training" / "ledger.jsonl").read_text().splitlines()
    assert {json.loads(line)["attempt"] for line in ledger} == {1}
    assert not (tmp_path / "training" / "manifest.json").exists()
