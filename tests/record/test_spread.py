"""A model over several devices: who holds what, and that the numbers stay the same."""

import itertools
import random

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks

from benchmarks.tiny_models import make, make_config, short_borders
from lrmc_ray.cluster.resources import ACTOR, Node, check_slots
from lrmc_ray.config import ResourceSettings, load_settings
from lrmc_ray.errors import ConfigError, DataError, ResourceError
from lrmc_ray.method.fast.packing import pack
from lrmc_ray.method.layout import pad
from lrmc_ray.models.forward import batch_hidden_states
from lrmc_ray.models.loading import empty_model
from lrmc_ray.models.parts import layers_of
from lrmc_ray.record.candidates import CandidateRecorder, own_devices
from lrmc_ray.record.prepare import prepare
from lrmc_ray.record.spread import LOGITS_ELEMENTS, SELECTION, divide, spread, spread_model
from tests.support.tiny import make_data, make_model_of_type

torch.set_num_threads(1)
TYPES = ("llama", "qwen3", "gemma3_text", "qwen3_moe")
THREE = ["cpu", "disk", "cpu"]
OPTIONS = {"tau": 0.9, "k_min": 2, "k_max": 9, "prompt_k_max": 5, "threads": 1}


def rows(number=6, length=20):
    rng = random.Random(0)
    stem = [rng.randrange(512) for _ in range(8)]
    ids = [
        stem + [rng.randrange(512) for _ in range(rng.randint(2, length))] for _ in range(number)
    ]
    return [
        {
            "sample_id": f"{n}",
            "domain": "",
            "input_ids": x,
            "is_target": [i > 8 for i in range(len(x))],
        }
        for n, x in enumerate(ids)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_layers_are_divided_as_well_as_any_division_does(seed):
    rng = random.Random(seed)
    layers = [rng.randint(1, 9) for _ in range(rng.randint(1, 8))]
    first, last, devices = rng.randint(0, 20), rng.randint(0, 20), rng.randint(1, len(layers))

    def fullest(places):
        loads = [0] * devices
        loads[0], loads[-1] = loads[0] + first, loads[-1] + last
        for place, size in zip(places, layers, strict=True):
            loads[place] += size
        return max(loads)

    found = divide(layers, first, last, devices)
    assert found == sorted(found)
    assert set(found) == set(range(devices))  # none is idle
    every = itertools.combinations_with_replacement(range(devices), len(layers))
    assert fullest(found) == min(fullest(p) for p in every if set(p) == set(range(devices)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_on_one_device_and_the_head_has_room(tmp_path, tied, precision):
    make_config("llama", num_hidden_layers=5, tie_word_embeddings=tied).save_pretrained(tmp_path)
    made = spread(tmp_path, [0, 1, 2], precision)
    model = empty_model(tmp_path)
    names = [f"model.layers.{n}" for n in range(5)]
    places = [made.device_map[name] for name in names]
    assert places == sorted(places)
    assert made.device_map["model.embed_tokens"] == made.device_map["model.rotary_emb"] == 0
    assert made.device_map["model.norm"] == 2
    assert made.device_map["lm_head"] == (0 if tied else 2)
    itemsize = 2 if precision == "bf16" else 4
    weights = [0, 0, 0]
    for name, parameter in model.named_parameters():  # tied ones once
        (part,) = [p for p in made.device_map if name.startswith(f"{p}.")]
        weights[made.device_map[part]] += itemsize * parameter.numel()
    room = int(4 * LOGITS_ELEMENTS * SELECTION)
    room += 4 * model.get_output_embeddings().weight.numel() * (precision == "bf16")
    weights[made.device_map["lm_head"]] += room
    assert made.loads == weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_record_over_three_places_has_the_bits_of_one_over_one(tmp_path, model_type, precision):
    """The second of three is the disk: its layers are there while accelerate's hooks run them."""
    options = short_borders(model_type, 16) | {"vocab_size": 512, "eos_token_id": 1}
    model = make(model_type, **options, num_hidden_layers=4)
    # The disk gives weights in the type that they are saved in.
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32).save_pretrained(tmp_path)
    whole, parts = (
        CandidateRecorder(tmp_path, **OPTIONS, precision=precision, devices=devices)
        for devices in (["cpu"], THREE if model_type != "qwen3_moe" else ["cpu"])
    )
    if model_type == "qwen3_moe":  # whose experts are stacked only when they are loaded
        device_map = spread(tmp_path, THREE, precision).device_map
        dispatch_model(parts._model, device_map, offload_dir=tmp_path / "offloaded")
    weights = {p.device.type for layer in layers_of(parts._model) for p in layer.parameters()}
    assert weights == {"cpu", "meta"}
    assert parts._attention_cost == whole._attention_cost < 1
    for one, other in zip(whole.record(rows()), parts.record(rows()), strict=True):
        assert torch.equal(one.candidates.token_ids, other.candidates.token_ids)
        assert torch.equal(one.candidates.logprobs, other.candidates.logprobs)


@pytest.mark.parametrize("model_type", [name for name in TYPES if "moe" not in name])
def test_nothing_meets_what_is_on_another_device(model_type):
    """The second one is torch's for tensors without values, which it refuses to mix with others.

    Experts are not among them: which tokens they get depends on values.
    """
    model = make(model_type, num_hidden_layers=4).eval()
    ids = [torch.arange(1, 9), torch.tensor([1, 2, 3, 9])]
    devices = spread_model(model, ["cpu", "meta"], "fp32").device_map
    for name, part in model.named_modules():
        if devices.get(name) == "meta":
            part.to("meta")
    used = [next(layer.parameters()).device.type for layer in layers_of(model)]
    assert used == sorted(used)
    assert set(used) == {"cpu", "meta"}
    with torch.inference_mode():
        for has_hooks in (False, True):
            if has_hooks:
                attach_align_device_hook_on_blocks(model, devices, dict.fromkeys(devices, False))
            for layout in (pad(ids), pack(ids)):
                if has_hooks:
                    assert batch_hidden_states(model, layout).is_meta
                else:
                    with pytest.raises(RuntimeError, match="device"):
                        batch_hidden_states(model, layout)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_two_gpus_record_what_one_does(tmp_path, model_type, precision):
    make_model_of_type(model_type, tmp_path)
    whole, parts = (
        CandidateRecorder(tmp_path, **OPTIONS, precision=precision, devices=own_devices(number))
        for number in (1, 2)
    )
    assert {p.device.index for p in parts._model.parameters()} == {0, 1}
    for one, other in zip(whole.record(rows()), parts.record(rows()), strict=True):
        assert torch.equal(one.candidates.token_ids, other.candidates.token_ids)
        assert torch.equal(one.candidates.logprobs, other.candidates.logprobs)


@pytest.mark.parametrize(
    ("model_type", "gpus", "said"),
    [
        ("llama", 3, "at most 2 for a llama model, got 3: it has 2 layers; lower it"),
        ("openai-gpt", 2, "at most 1 for a openai-gpt model, got 2: transformers does not say"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_anything_is_written(
    tmp_path, model_type, gpus, said
):
    model = make_model_of_type(model_type, tmp_path / "model")
    data = make_data(tmp_path / "train.jsonl", num_rows=3)
    names = [f'model.name="{model}"', f'data.train="{data}"', f"resources.gpus_per_actor={gpus}"]
    with pytest.raises(ConfigError) as caught:
        prepare(load_settings(None, names), tmp_path / "runs")
    assert f"resources.gpus_per_actor must be {said}" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_node_with_all_gpus_of_an_actor_is_needed():
    resources = ResourceSettings(gpus_per_worker=1, gpus_per_actor=4)
    two = Node({"CPU": 8.0, "GPU": 2.0}, count=4)
    assert check_slots([two], resources, 1, "worker") == 8
    with pytest.raises(ResourceError) as caught:
        check_slots([two], resources.of_actors(), 1, ACTOR)
    assert "1 recording actor of 1 CPU, 4 GPU each must fit, 0 do" in str(caught.value)
    assert "resources.gpus_per_actor, or add nodes" in str(caught.value)
    four = Node({"CPU": 8.0, "GPU": 4.0})
    assert check_slots([two, four], resources.of_actors(), 1, ACTOR) == 1


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="for a machine without several GPUs")
def test_an_actor_that_does_not_see_its_gpus_says_so():
    with pytest.raises(DataError, match=r"an actor of 2 GPUs must see them all.*sees"):
        own_devices(2)
