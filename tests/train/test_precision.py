"""``train.precision = "auto"``: what it measures, what it decides, and that a search asks once."""

import math

import pytest
import torch
import torch.nn.functional as F

from lrmc_ray.cluster.session import ray_session
from lrmc_ray.config import ModelSettings, RunSettings
from lrmc_ray.errors import LrmcError
from lrmc_ray.files.study import FoundPrecision
from lrmc_ray.models.loading import load_model
from lrmc_ray.record.reader import Records
from lrmc_ray.train import precision as precision_module
from lrmc_ray.train.precision import (
    GRADIENT_DISTANCE,
    LOSS_DISTANCE,
    Distances,
    computes_bf16,
    distances,
    find_precision,
    judge,
    with_precision,
)
from lrmc_ray.train.samples import TrainingSamples
from tests.support.fake_search import FakeSearch, install
from tests.support.fake_search import settings_of as searched
from tests.support.training import settings_of

CPU = torch.device("cpu")


def plain(directory, samples, autocast):
    """Mean cross-entropy of the model's own body and head, and its gradients in a vector."""
    model = load_model(directory).train()
    count = sum(int(sample.is_supervised_P.sum()) for sample in samples)
    total = 0.0
    for sample in samples:
        positions_N = sample.positions_P[sample.is_supervised_P]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden_TD = model.model(sample.input_ids_T[None]).last_hidden_state[0]
        logits_NV = hidden_TD[positions_N].float() @ model.lm_head.weight.T
        gold_N = sample.input_ids_T[positions_N + 1]
        loss = F.cross_entropy(logits_NV, gold_N, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.double().flatten() for p in model.parameters()])


def test_distances_are_those_of_plain_passes_on_the_first_batch(recorded, tiny_model):
    settings = settings_of(loss="full", tail_samples=0, anchor_weight=0.0, packing=False)
    samples = TrainingSamples(Records(recorded), settings)
    batch = [samples[index] for index in samples.indices_of_step(0)]
    loss, gradient_D = plain(tiny_model, batch, autocast=False)
    loss_bf16, gradient_bf16_D = plain(tiny_model, batch, autocast=True)
    expected = (gradient_bf16_D - gradient_D).norm() / gradient_D.norm()
    found = distances(settings, recorded, tiny_model, device=CPU)
    assert found.gradient == pytest.approx(float(expected), rel=0.1)
    assert found.loss == pytest.approx(abs(loss_bf16 / loss - 1), rel=0.3, abs=2e-5)
    assert 1e-4 < found.gradient < GRADIENT_DISTANCE


def test_what_is_asked_for_does_not_change_what_is_measured(recorded, tiny_model):
    found = [
        distances(settings_of(precision=asked), recorded, tiny_model, device=CPU)
        for asked in ("auto", "bf16")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("loss", "gradient", "expected"),
    [
        (0.0, 0.0, "bf16"),
        (LOSS_DISTANCE, GRADIENT_DISTANCE, "bf16"),
        (1.01 * LOSS_DISTANCE, 0.0, "fp32"),
        (0.0, 1.01 * GRADIENT_DISTANCE, "fp32"),
        (math.inf, 0.0, "fp32"),
        (0.0, math.nan, "fp32"),
    ],
)
def test_both_must_be_near(loss, gradient, expected):
    found = judge(Distances(loss, gradient))
    assert found.precision == expected
    assert f"{gradient:.1%}" in found.reason


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 4.0, 0.25),
        (1.0, 0.0, math.inf),
        (math.nan, 1.0, math.inf),
        (0.0, math.nan, math.inf),
    ],
)
def test_shares_of_what_is_nothing_or_no_number(part, whole, expected):
    assert precision_module._ratio(part, whole) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features : fp asimd bf16 i8mm\n", True),  # ARM
        ("flags : fpu avx512f avx2\nmodel name : bf16\n", False),
        (None, False),
    ],
)
def test_processors_that_multiply_in_bf16(text, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(precision_module, "CPUINFO", file)
    precision_module._processor_flags.cache_clear()
    assert computes_bf16(CPU) == expected
    precision_module._processor_flags.cache_clear()


@pytest.mark.parametrize("is_native", [True, False])
def test_nothing_is_tried_where_it_would_be_slower(is_native, monkeypatch, tmp_path):
    tried = []

    def measure(*_, **__):
        tried.append(True)
        return Distances(0.001, 0.02)

    class Here:
        def here(self, sent):
            return sent

    monkeypatch.setattr(precision_module, "computes_bf16", lambda _: is_native)
    monkeypatch.setattr(precision_module, "distances", measure)
    monkeypatch.setattr(precision_module, "record_here", lambda _, record: record)
    found = precision_module._try_out(settings_of(), "r", "m", Here(), 1)
    assert (found.precision, bool(tried)) == (("bf16", True) if is_native else ("fp32", False))


@pytest.mark.ray
def test_a_worker_tries_it_and_what_it_refuses_is_one_error(recorded, tiny_model, tmp_path):
    settings = RunSettings(
        model=ModelSettings(name=str(tiny_model)), train=settings_of(precision="auto")
    )
    with ray_session("local", log=tmp_path / "ray.log", num_cpus=2):
        found = find_precision(settings, recorded)
        if computes_bf16(CPU):  # elsewhere nothing is read
            with pytest.raises(LrmcError, match="gone"):
                find_precision(settings, tmp_path / "gone")
    if computes_bf16(CPU):
        assert found == judge(distances(settings.train, recorded, tiny_model, device=CPU))
    else:
        assert found.reason == "this processor does not compute in bf16 by itself"


def test_what_is_said_by_name_is_taken_without_a_trial(tmp_path):
    for name in ("fp32", "bf16"):  # no Ray here
        settings = RunSettings(train=settings_of(precision=name))
        assert with_precision(settings, tmp_path) is settings


def test_a_search_asks_once_and_all_its_trials_say_what_it_came_to(tmp_path, monkeypatch):
    asked = []

    def find(settings, record):
        asked.append(settings.train.precision)
        return FoundPrecision("bf16", "near enough")

    monkeypatch.setattr("lrmc_ray.tune.run.find_precision", find)
    for trials in (2, 3):  # the second command adds a trial
        settings = searched(trials)
        train = settings.train.model_copy(update={"precision": "auto"})
        settings = settings.model_copy(update={"train": train})
        search = install(monkeypatch, FakeSearch(settings, tmp_path)).run()
    assert asked == ["auto"]
    study = search.description.file
    assert study.precision == FoundPrecision("bf16", "near enough")
    assert [entry.settings["precision"] for entry in study.trials] == ["bf16"] * 3
    assert study.settings["train"]["precision"] == "auto"  # as it was asked for
