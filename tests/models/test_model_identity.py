"""What changes the fingerprint of a model or a tokenizer, and what does not."""

import os

import pytest
import torch
from safetensors.torch import save_file

from lrmc_ray.models.identity import model_fingerprint, tokenizer_fingerprint


def test_the_model_fingerprint_is_that_of_the_content(tiny_model, copy_of_model):
    before = model_fingerprint(tiny_model)
    for path in copy_of_model.iterdir():
        os.utime(path, (1, 1))
    (copy_of_model / "README.md").write_text("A note changes nothing.")
    assert model_fingerprint(copy_of_model) == before
    assert len(before) == 64
    assert set(before) <= set("0123456789abcdef")


def test_one_flipped_bit_of_one_weight_changes_the_model_fingerprint(tiny_model, copy_of_model):
    before, tokenizer = model_fingerprint(tiny_model), tokenizer_fingerprint(tiny_model)
    weights = copy_of_model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(copy_of_model) != before
    assert tokenizer_fingerprint(copy_of_model) == tokenizer


def test_every_weight_file_and_the_configuration_count(tiny_model, copy_of_model):
    before = model_fingerprint(tiny_model)
    save_file({"extra": torch.zeros(1)}, copy_of_model / "model-2.safetensors")
    with_shard = model_fingerprint(copy_of_model)
    config = copy_of_model / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with_config = model_fingerprint(copy_of_model)
    assert len({before, with_shard, with_config}) == 3


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_the_tokenizer_fingerprint_covers_template_and_vocabulary(name, tiny_model, copy_of_model):
    before, model = tokenizer_fingerprint(tiny_model), model_fingerprint(tiny_model)
    assert tokenizer_fingerprint(copy_of_model) == before
    path = copy_of_model / name
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_stop|>"))
    assert tokenizer_fingerprint(copy_of_model) != before
    assert model_fingerprint(copy_of_model) == model
