"""Training in the process of a trial, in place of a worker's."""

import json
import sys

import pytest

from lrmc_ray.cluster.session import ray_session
from lrmc_ray.config import ModelSettings, ResourceSettings, RunSettings
from lrmc_ray.errors import DataError, DiskError, TrainingError
from lrmc_ray.files.names import CHECKPOINT_NOW
from lrmc_ray.train import driver as driver_module
from lrmc_ray.train.driver import TrainingJob, run_here
from lrmc_ray.train.run_files import LocalRun
from lrmc_ray.train.workers import trains_here
from tests.support.training import STEPS, assert_same, model_of, run_alone, settings_of


@pytest.mark.ray
def test_a_trial_trains_to_the_bits_of_a_worker_and_gives_its_core_back(
    recorded, tiny_model, tmp_path
):
    import ray

    class Trial:
        """An actor, as Ray Tune's trials are."""

        def train(self, settings, record, directory):
            from lrmc_ray.train import driver

            driver.check_fits = lambda *_: None  # the record was not made by its own stage
            driver.train(settings, record, directory, here=True)
            return "lrmc_ray.train.loop" in sys.modules, "ray.train.torch" in sys.modules

        def free_cores(self):
            return ray.available_resources().get("CPU", 0.0)

    settings = RunSettings(
        model=ModelSettings(name=str(tiny_model)), train=settings_of(micro_batches=1)
    )
    resources = settings.resources.model_copy(update={"workers": (1, 1)})
    settings = settings.model_copy(update={"resources": resources})
    with ray_session("local", log=tmp_path / "ray.log", num_cpus=2):
        trial = ray.remote(num_cpus=0)(Trial).remote()
        run = trial.train.remote(settings, recorded, tmp_path / "here")
        assert ray.get(run) == (True, False)  # the loop ran in the actor, and Ray Train nowhere
        assert ray.get(trial.free_cores.remote()) == 2
    run_alone(settings.train, record=recorded, model=tiny_model, directory=tmp_path / "alone").run()
    assert_same(model_of(tmp_path / "here"), model_of(tmp_path / "alone"))
    manifest = json.loads((tmp_path / "here" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["world_size"]) == (STEPS, 1)
    assert manifest["ledger"]["is_exact"]
    assert 0 < manifest["peak_memory_bytes"] < 4e9


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"workers": [1, 1]}, True),
        ({"workers": [1, 2]}, False),  # elastic: Ray Train starts it anew with another number
        ({}, False),
        ({"workers": [1, 1], "gpus_per_worker": 1}, False),
        ({"workers": [1, 1], "cpus_per_worker": 3}, False),
        ({"workers": [1, 1], "storage": "s3://bucket/runs"}, False),
    ],
)
def test_only_a_worker_alone_is_replaced(resources, expected, monkeypatch):
    monkeypatch.setattr("lrmc_ray.cluster.resources.can_hold_cores", lambda count: count <= 2)
    assert trains_here(ResourceSettings.model_validate(resources)) == expected


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FloatingPointError("5 steps in a row"), TrainingError, "failed: 5 steps in a row"),
        (OSError(28, "No space left on device"), DiskError, "failed: No space .*; free space"),
        (DataError("a damaged record"), DataError, "^a damaged record"),
    ],
)
def test_what_goes_wrong_is_told_as_by_workers(error, kind, text, tmp_path, monkeypatch):
    def fails(_):
        raise error

    files = LocalRun(tmp_path)
    files.ask()  # an earlier command's wish
    monkeypatch.setattr(driver_module, "train_here", fails)
    with pytest.raises(kind, match=text):
        run_here(TrainingJob(RunSettings(), tmp_path, tmp_path), files)
    assert not (tmp_path / CHECKPOINT_NOW).exists()
