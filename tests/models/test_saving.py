"""A saved model is the one that was saved."""

import os

import pytest
import torch

from lrmc_ray.models.identity import tokenizer_fingerprint
from lrmc_ray.models.loading import (
    load_model,
    load_tokenizer,
)
from lrmc_ray.models.saving import save_model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_gives_the_same_bits_and_the_same_tokens(tied, tiny_model, tmp_path):
    torch.manual_seed(3)
    model = load_model(tiny_model)
    if not tied:
        config = model.config.__class__(**{**model.config.to_dict(), "tie_word_embeddings": False})
        model = type(model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    save_model(model, tiny_model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")

    ids_BT = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, loaded(input_ids=ids_BT).logits)
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert is_tied == tied
    assert not list((tmp_path / "saved").glob("*.bin"))

    assert tokenizer_fingerprint(tmp_path / "saved") == tokenizer_fingerprint(tiny_model)
    ours, theirs = load_tokenizer(tmp_path / "saved"), load_tokenizer(tiny_model)
    text = "SELECT name FROM city WHERE 2 > 1; ÄÖ 日本 <|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    messages = [{"role": "user", "content": "How many?"}]
    rendered = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_whoever_the_umask_lets_read_can_read_the_weights(tiny_model, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(load_model(tiny_model), tiny_model, tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()}
    assert modes["model.safetensors"] == mode, modes
    assert set(modes.values()) == {mode}
