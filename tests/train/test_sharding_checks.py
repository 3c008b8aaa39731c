"""What cannot be in shards is refused by name, and no shard is read that was not verified."""

import itertools
import os
import pickle

import pytest
import torch
from torch import nn

from benchmarks.tiny_models import make
from lrmc_ray.config import RunSettings, validate
from lrmc_ray.errors import ConfigError, DataError
from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.method.sharded_rows import bounds_of
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.train.checkpoints import (
    METADATA,
    SHARDS,
    begin_checkpoint,
    checkpoint_path,
    finish_checkpoint,
    load_checkpoint,
    load_newest,
)
from lrmc_ray.train.resume import Checkpoints
from lrmc_ray.train.run_files import LocalRun
from lrmc_ray.train.sharding import check_shardable
from tests.support.training import settings_of


def head_with_bias(model):
    model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape))


def single_number(model):
    model.model.layers[1].scale = nn.Parameter(torch.tensor(1.0))


def shared_weight(model):
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


def third_reader(model):
    model.model.layers[0].reader = nn.Linear(1, 1, bias=False)
    model.model.layers[0].reader.weight = model.lm_head.weight


def part_outside(model):
    model.more = nn.Linear(2, 2)


def unknown_layers(model):
    model.model.layers = nn.ModuleList(
        nn.Sequential(*layer.children()) for layer in model.model.layers
    )


def short_and_long(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def adapted_experts(model):
    class ParamWrapper(nn.Module):
        pass

    model.model.layers[0].wrapper = ParamWrapper()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt2"])
def test_these_can_be_in_shards(model_type):
    check_shardable(make(model_type))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (head_with_bias, "its output head has a bias"),
        (single_number, r"layers\.1\.scale is a single number"),
        (shared_weight, "some layers share a weight"),
        (third_reader, "a Linear reads the vocabulary's weight"),
        (part_outside, r"more\.weight is neither in its body"),
        (unknown_layers, "transformers does not say what its layers are"),
        (short_and_long, "depends on the lengths"),
        (adapted_experts, "adapters on its experts"),
    ],
)
def test_what_cannot_is_refused_by_name(change, reason):
    model = make("llama", tie_word_embeddings=False)
    change(model)
    with pytest.raises(ConfigError, match=reason) as error:
        check_shardable(model)
    assert "train.parallel must be 'replicate' for a llama model, got 'shard'" in str(error.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("resources", {"storage": "s3://bucket/runs"}),
        ("search", {"early_stopping": "median"}),
    ],
)
def test_what_needs_the_whole_model_in_one_place_is_refused(section, values):
    train = {"parallel": "shard", "reduction": "fast"}
    assert validate(RunSettings, {"train": train}, "run.toml").train.parallel == "shard"
    (name,) = values
    for settings in (
        {"train": train, section: values},
        {
            "train": {"reduction": "fast"},
            "parameters": {"parallel": {"choices": ["replicate", "shard"]}},
            section: values,
        },
    ):
        with pytest.raises(ConfigError, match=rf"{section}\.{name} must be .* 'shard'"):
            validate(RunSettings, settings, "run.toml")


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7, 12, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_rows_are_divided_as_torch_divides_them(num_rows, world_size):
    bounds = bounds_of(num_rows, world_size)
    chunks = [len(chunk) for chunk in torch.arange(num_rows).chunk(world_size)]
    chunks += [0] * (world_size - len(chunks))
    assert [last - first for first, last in itertools.pairwise(bounds)] == chunks


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints behind steps 10 and 20 with the files of two workers."""
    for step in (10, 20):
        partial = begin_checkpoint(tmp_path, step)
        (partial / SHARDS).mkdir()
        names = [f"{SHARDS}/{name}" for name in (METADATA, "__0_0.distcp", "__1_0.distcp")]
        for name in names:
            (partial / name).write_bytes(f"{name} {step}".encode())
        digests = {name: file_digest(partial / name) for name in names}
        finish_checkpoint(partial, step, {"step": step}, shards=digests)
    return tmp_path


def test_a_damaged_or_missing_file_of_any_worker_is_passed_over(saved):
    assert load_newest(saved) == {"step": 20}
    path = checkpoint_path(saved, 20) / SHARDS / "__1_0.distcp"
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content[:-1] + b"x"):
        path.write_bytes(damaged)
        assert load_newest(saved) == {"step": 10}
    path.unlink()
    assert load_newest(saved) == {"step": 10}


def test_a_pickle_that_was_not_written_here_is_never_opened(saved, tmp_path):
    path = checkpoint_path(saved, 20) / SHARDS / METADATA
    path.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    for is_verified in (False, True):
        with pytest.raises(DataError, match="is not what was written"):
            load_checkpoint(saved, 20, is_verified=is_verified)
    assert not (tmp_path / "canary").exists()


def test_a_manifest_with_something_else_is_refused(saved):
    path = checkpoint_path(saved, 20) / "manifest.json"
    path.write_text(path.read_text().replace('"shards": {', '"shards": [], "others": {'))
    with pytest.raises(DataError, match="a manifest that was not written here"):
        load_checkpoint(saved, 20)


@pytest.mark.parametrize(("before", "after"), [("replicate", "shard"), ("shard", "replicate")])
def test_a_run_does_not_go_on_from_a_checkpoint_of_the_other_way(before, after, tmp_path):
    def checkpoints(parallel):
        return Checkpoints(
            settings_of(parallel=parallel, reduction="fast"),
            LocalRun(tmp_path),
            record="r",
            group=WorkerGroup(),
            device=torch.device("cpu"),
        )

    checkpoints(before).save(2, {}, best=None)
    assert checkpoints(before).newest()["step"] == 2
    with pytest.raises(DataError, match=f"'{before}'.*'{after}'.*; remove") as error:
        checkpoints(after).newest()
    assert error.value.exit_code == 4
