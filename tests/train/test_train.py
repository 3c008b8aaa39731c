"""The driver of training: flags, failures, what is asked of the workers; without Ray."""

import argparse
import json
import os
import signal
import threading
import time

import pytest
import ray.exceptions
import ray.train.v2._internal.exceptions as internal
import torch.distributed
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from lrmc_ray.config import RunSettings, TrainSettings, load_settings
from lrmc_ray.config.arguments import (
    add_run_arguments,
    add_setting_flags,
    flag_overrides,
    settings_from,
)
from lrmc_ray.errors import DataError, TrainingError
from lrmc_ray.files.names import CHECKPOINT_NOW, CHECKPOINTS
from lrmc_ray.train import driver as driver_module
from lrmc_ray.train.checkpoints import save_checkpoint
from lrmc_ray.train.command import progress_note
from lrmc_ray.train.driver import (
    MAX_WORKER_FAILURES,
    TrainingJob,
    claim,
    interruptible,
    run_workers,
)
from lrmc_ray.train.failures import is_worker_loss, telling_cause
from lrmc_ray.train.run_files import LocalRun
from lrmc_ray.train.stored import RESERVATION
from lrmc_ray.train.workers import collective_backend, release_reservation


def settings_of(*argv):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    add_setting_flags(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides += flag_overrides(arguments)
    return settings_from(arguments)


def test_every_setting_of_train_has_a_flag_that_says_the_same():
    for name, field in TrainSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = field.get_default(call_default_factory=True)
        if field.annotation is bool:
            assert getattr(settings_of(flag).train, name) is True
            continue
        # A value that is not the default where one is easily made.
        value = {int: "7", float: "0.5", type(None): "0.5", tuple: '["a*"]', dict: "{a = 2.0}"}.get(
            type(default), f'"{default}"'
        )
        value = {
            "gradient_checkpointing": "full",
            "betas": "[0.5, 0.6]",
            "micro_batches": "2",
            "lora_alpha": "32",
            "k_min": "2",
            "batch_size": "9",
            "stm_perplexity": "2.5",
        }.get(name, value)
        others = ["train.evaluate_every=1"] if name == "export" else []
        made = settings_of(*others, flag, value)
        assert made == settings_of(*others, f"train.{name}={value}"), name
        assert made != settings_of(*others) or value == f'"{default}"', name


def test_flags_win_over_overrides():
    made = settings_of("train.lr=1e-3", "--lr", "1e-4", "--lora-rank", "8", "--precision", "bf16")
    assert (made.train.lr, made.train.lora_rank, made.train.precision) == (1e-4, 8, "bf16")
    assert made.train.gradient_checkpointing == "auto"
    for text, value in (
        ("false", False),
        *((name, name) for name in ("auto", "selective", "full")),
    ):
        assert settings_of("--gradient-checkpointing", text).train.gradient_checkpointing == value
    assert settings_of() == load_settings(None)


def test_the_note_shows_what_there_is():
    note = progress_note(
        {
            "train/loss": 0.71234,
            "train/tokens_per_second": 123.4,
            "subset/k_mean": 196.3,
            "subset/active_share": 0.825,
            "subset/rho": 0.01234,
            "moclip/angle_deg": 61.2,
            "moclip/clipped_share": 0.95,
            "elastic/world_size": 2.0,
            "train/lr": 3e-5,
        }
    )
    assert note == (
        "loss 0.712, tokens/s 123, K 196, active 82%, rho 0.0123, angle 61, clipped 95%, workers 2"
    )
    assert progress_note({"train/loss": 1.0, "moclip/angle_deg": float("nan")}) == "loss 1.000"


# What went wrong


def worker_died():
    """What ``fit`` raised when a worker got kill -9, as seen with ray 2.60."""
    died = ray.exceptions.ActorDiedError()
    failed = internal.WorkerHealthCheckFailedError("A worker health check failed.", failure=died)
    return WorkerGroupError("failed", {1: failed})


def of_the_loop(error):
    return WorkerGroupError("failed", {0: internal.UserExceptionWithTraceback(error, "trace")})


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (worker_died(), True),
        (ControllerError(ray.exceptions.OutOfMemoryError("killed")), True),
        (internal.WorkerGroupStartupTimeoutError(2), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (torch.distributed.DistNetworkError("connection reset"), True),
        (RuntimeError("shape mismatch"), False),
        (FloatingPointError("5 steps in a row"), False),
        (KeyError("x"), False),
    ],
)
def test_a_lost_worker_is_told_from_an_error_of_the_loop(error, is_loss):
    assert is_worker_loss(telling_cause(error)) == is_loss


def test_an_error_of_the_loop_counts_more_than_the_deaths_it_causes():
    own = FloatingPointError("nan")
    both = WorkerGroupError(
        "failed",
        {0: RuntimeError("gloo: connection closed"), 1: own, 2: ray.exceptions.ActorDiedError()},
    )
    assert telling_cause(both) is own


@pytest.mark.parametrize(
    ("gpus", "offload", "backend"),
    [
        (0, "none", None),
        (0.5, "none", "gloo"),
        (1, "none", None),
        (0.5, "cpu", "gloo"),
        (1, "cpu", "cpu:gloo,cuda:nccl"),
    ],
)
def test_workers_exchange_by_what_takes_their_tensors(gpus, offload, backend):
    """NCCL refuses two ranks on one device, and tensors of the host."""
    settings = RunSettings(
        resources={"gpus_per_worker": gpus},
        train={"parallel": "shard", "reduction": "fast", "offload": offload},
    )
    assert collective_backend(settings.resources, settings.train) == backend


class Trainers:
    """Stands for TorchTrainer: each fit ends as the list says."""

    def __init__(self, endings):
        self.endings = iter(endings)
        self.starts = 0

    def __call__(self, *_args):
        return self

    def fit(self):
        self.starts += 1
        ending = next(self.endings)
        if isinstance(ending, BaseException):
            raise ending
        if callable(ending):
            ending()
            raise worker_died()
        return argparse.Namespace(return_value=ending)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    def run(endings):
        trainers = Trainers(endings)
        monkeypatch.setattr(driver_module, "make_trainer", trainers)
        monkeypatch.setattr(driver_module, "release_reservation", lambda *_: None)
        try:
            job = TrainingJob(RunSettings(), tmp_path, tmp_path)
            return run_workers(job, LocalRun(tmp_path)), trainers.starts
        except BaseException as error:
            error.starts = trainers.starts
            raise

    return run


def test_lost_workers_are_replaced(fit):
    assert fit([worker_died(), worker_died(), {"steps": 3}]) == ({"steps": 3}, 3)


def test_losses_without_progress_end_at_last(fit):
    with pytest.raises(TrainingError, match="ActorDiedError") as caught:
        fit([worker_died() for _ in range(MAX_WORKER_FAILURES + 5)])
    assert caught.value.starts == MAX_WORKER_FAILURES + 1


def test_losses_with_progress_may_go_on_for_ever(fit, tmp_path):
    def saving(step):
        return lambda: save_checkpoint(tmp_path / CHECKPOINTS, step, {"step": step})

    many = 3 * MAX_WORKER_FAILURES
    assert fit([*map(saving, range(1, many + 1)), {"steps": 1}]) == ({"steps": 1}, many + 1)


def test_an_error_of_the_loop_ends_at_once(fit):
    with pytest.raises(TrainingError, match="5 steps in a row") as caught:
        fit([of_the_loop(FloatingPointError("5 steps in a row")), {}])
    assert caught.value.starts == 1


def test_damaged_checkpoints_keep_their_exit_code(fit):
    with pytest.raises(DataError, match="all 2 checkpoints") as caught:
        fit([of_the_loop(DataError("all 2 checkpoints are damaged")), {}])
    assert caught.value.exit_code == 4


def test_a_request_for_a_checkpoint_of_an_earlier_command_is_forgotten(fit, tmp_path):
    (tmp_path / CHECKPOINT_NOW).touch()
    fit([{"steps": 1}])
    assert not (tmp_path / CHECKPOINT_NOW).exists()


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_answered", [True, False])
def test_a_signal_waits_for_a_checkpoint(tmp_path, monkeypatch, number, is_answered):
    monkeypatch.setattr(driver_module, "STOP_SECONDS", 1.0)
    release = threading.Event()
    asked = tmp_path / CHECKPOINT_NOW
    seen = []

    def worker():
        while not release.is_set():
            if asked.exists() and is_answered:
                seen.append(time.monotonic())
                asked.unlink()
            time.sleep(0.01)

    def stop(*_):
        raise SystemExit(15)

    thread = threading.Thread(target=worker)
    thread.start()
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    before = signal.signal(signal.SIGTERM, stop)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            interruptible(lambda: release.wait(30), LocalRun(tmp_path))
        elapsed = time.monotonic() - start
    finally:
        release.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == is_answered
    assert (elapsed < 0.9) == is_answered
    assert elapsed < 5


def test_in_a_thread_of_a_trial_training_runs_as_it_is(tmp_path):
    names = []

    def fit():
        names.append(threading.current_thread().name)
        return argparse.Namespace(return_value={"steps": 1})

    thread = threading.Thread(target=lambda: interruptible(fit, LocalRun(tmp_path)), name="trial")
    thread.start()
    thread.join()
    assert names == ["trial"]


def test_errors_come_out_of_the_thread(tmp_path):
    def fit():
        raise worker_died()

    with pytest.raises(WorkerGroupError):
        interruptible(fit, LocalRun(tmp_path))


def test_a_damaged_identity_is_an_error_of_the_data(tmp_path):
    (tmp_path / "identity.json").write_text('{"lr": 1')
    with pytest.raises(DataError, match="is damaged"):
        claim(tmp_path, {"lr": 1})
    (tmp_path / "identity.json").write_text(json.dumps({"lr": 1}))
    claim(tmp_path, {"lr": 1})


# What Ray keeps for a run that was killed


class Coordinator:
    """Stands for Ray's actor."""

    def __init__(self):
        self.cancelled = []
        self.cancel_request = self

    def remote(self, name):
        self.cancelled.append(name)
        return name


def test_the_reservation_of_a_killed_run_is_given_back_once(tmp_path, monkeypatch):
    coordinator = Coordinator()
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: coordinator)
    monkeypatch.setattr("ray.get", lambda reference, timeout: None)
    (tmp_path / RESERVATION).write_text("train-1234")
    for _ in range(2):
        release_reservation(LocalRun(tmp_path))
    assert coordinator.cancelled == ["train-1234"]
    assert not (tmp_path / RESERVATION).exists()


@pytest.mark.parametrize(
    "error", [ValueError("no such actor"), ray.exceptions.GetTimeoutError("10 s")]
)
def test_where_nothing_answers_training_starts_all_the_same(tmp_path, monkeypatch, error):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("ray.get_actor", fail)
    (tmp_path / RESERVATION).write_text("train-1234")
    release_reservation(LocalRun(tmp_path))
    assert not (tmp_path / RESERVATION).exists()
