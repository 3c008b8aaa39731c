"""Which models have the vocabulary of their base."""

import json
import shutil

import pytest

from lrmc_ray.evaluate.vocabulary import vocabulary_of


@pytest.mark.parametrize(("written", "is_equal"), [(262_208, True), (262_144, False)])
def test_a_size_that_is_left_to_the_class_is_the_one_that_is_written(
    written, is_equal, tiny_model, tmp_path
):
    """Gemma 3 is published without it, and saved with it after training."""
    found = []
    for name, text in (("base", {}), ("tuned", {"vocab_size": written})):
        directory = tmp_path / name
        directory.mkdir()
        shutil.copy(tiny_model / "tokenizer.json", directory)
        config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **text}}
        (directory / "config.json").write_text(json.dumps(config))
        found.append(vocabulary_of(directory))
    assert (found[0] == found[1]) == is_equal
    assert found[0]["size"] == 262_208
