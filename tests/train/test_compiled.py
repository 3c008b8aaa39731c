"""Compiled layers against plain ones: the same steps up to rounding, and few shapes."""

import functools
import math
import shutil

import pytest
import torch
from torch import Tensor

from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import ConfigError
from lrmc_ray.method.losses import LanguageModel, LossSettings
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.training_loop import StepOptions, train
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.train import compiled
from lrmc_ray.train.compiled import LENGTHS, compile_layers
from tests.support.plain_training import random_samples, tiny_llama
from tests.support.training import model_of, run_alone, settings_of

torch.set_num_threads(1)

LOSS = LossSettings("restricted", 40, 0.7, seed=3)


def steps(*, compiles: bool, attention_cost: float = math.inf, num: int = 3):
    """Losses and weights; batches of other lengths in every step."""
    model = tiny_llama(dtype=torch.float32).train()
    if compiles:
        compile_layers(model)
    widths = []

    def forward(batch) -> Tensor:
        widths.append(batch.input_ids_BT.shape[1])
        return batch_hidden_states(model, batch)

    results = train(
        LanguageModel(forward, head_of(model)),
        MoClip(model.parameters(), lr=0.01),
        functools.partial(random_batch),
        LOSS,
        StepOptions(lengths=LENGTHS if compiles else 1, attention_cost=attention_cost),
        WorkerGroup(),
        steps=range(num),
        lr_of_step=lambda step: 0.01,
    )
    losses = [result.loss for result in results]
    return losses, [p.detach() for p in model.parameters()], widths


def random_batch(step: int):
    return random_samples(2 + step, seed=step)


def check(**options) -> None:
    torch._dynamo.reset()
    losses, weights, widths = steps(compiles=False, **options)
    ours, found, filled = steps(compiles=True, **options)
    assert all(width % LENGTHS == 0 for width in filled)
    assert len(set(filled)) < len(set(widths))
    assert ours == pytest.approx(losses, rel=1e-5)
    for our, their in zip(found, weights, strict=True):
        assert float((our - their).norm()) < 1e-4 * float(their.norm())


@pytest.mark.slow
@pytest.mark.parametrize("attention_cost", [math.inf, 0.001], ids=["padded", "packed"])
def test_compiled_layers_take_the_same_steps(attention_cost, monkeypatch):
    """Through the compiler's front, which needs no other compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    check(attention_cost=attention_cost)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("attention_cost", [math.inf, 0.001], ids=["padded", "packed"])
def test_layers_compiled_to_machine_code_take_the_same_steps(attention_cost):
    check(attention_cost=attention_cost)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand more")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", broken)
    model = tiny_llama(dtype=torch.float32).train()
    with pytest.raises(ConfigError, match=r"torch cannot compile its layers here: .*no compiler"):
        compile_layers(model)
    assert model.training
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ConfigError, match="a llama model does not have its layers in one list"):
        compile_layers(model)


def test_layers_that_give_other_states_are_refused(monkeypatch):
    def wrong(graph, inputs):
        return lambda *args: [x * 1.5 if x.is_floating_point() else x for x in graph(*args)]

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", wrong)
    with pytest.raises(ConfigError, match="compiled layers give hidden states that differ by"):
        compile_layers(tiny_llama(dtype=torch.float32))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing must be 'auto' or false with"):
        TrainSettings(compile_layers=True, gradient_checkpointing="selective")
    with pytest.raises(ValueError, match="compile_layers must be false with parallel = 'shard'"):
        TrainSettings(compile_layers=True, parallel="shard", reduction="fast")
    assert not TrainSettings().compile_layers
    assert TrainSettings(compile_layers=True, gradient_checkpointing=False).compile_layers


@pytest.mark.parametrize("attention_cost", [math.inf, 0.001], ids=["padded", "packed"])
def test_padding_that_fills_up_changes_nothing(attention_cost):
    options = StepOptions(attention_cost=attention_cost)
    (batch,) = options.divide(random_samples(3, seed=1), LOSS.activity)
    filled = batch.filled_up(32)
    length = batch.input_ids_BT.shape[1]
    assert filled.input_ids_BT.shape[1] == -(-length // 32) * 32 > length
    assert filled.filled_up(32).input_ids_BT.shape == filled.input_ids_BT.shape
    assert int(filled.is_token_BT.sum()) == int(batch.is_token_BT.sum())
    assert filled.num_processed == batch.num_processed
    model = tiny_llama().eval()
    with torch.no_grad():
        plain, ours = (batch_hidden_states(model, x) for x in (batch, filled))
    torch.testing.assert_close(ours[:, :length], plain)
    assert ours.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["weights", "adapters"])
def test_a_run_with_compiled_layers_ends_in_the_same_model(
    changes, tiny_model, recorded, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        directory = tmp_path / f"{compiles}"
        settings = settings_of(compile_layers=compiles, steps=3, **changes)
        run_alone(settings, record=recorded, model=tiny_model, directory=directory).run()
        found.append(model_of(directory))
    plain, ours = found
    assert plain.keys() == ours.keys()
    for name, weight in plain.items():
        assert float((ours[name] - weight).norm()) <= 1e-3 * float(weight.norm()), name
