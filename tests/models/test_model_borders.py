"""Borders against the names in the configurations of transformers, and against the models."""

import pytest
import torch

from benchmarks.tiny_models import dynamic_ntk, long_rope, make, make_config
from lrmc_ray.models.borders import Borders, attention_borders


@pytest.mark.parametrize(
    ("model_type", "options", "borders"),
    [
        ("llama", {}, Borders()),
        ("mistral", {"sliding_window": 16}, Borders(windows=(16,))),
        ("mistral", {"sliding_window": None}, Borders()),
        ("gemma3_text", {"sliding_window": 16}, Borders(windows=(16,))),
        ("gemma3", {"text_config": {"sliding_window": 16}}, Borders(windows=(16,))),
        ("gpt_oss", {"sliding_window": 16}, Borders(windows=(16,))),
        ("gpt_neo", {"window_size": 16}, Borders(windows=(16,))),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, Borders()),
        ("recurrent_gemma", {"attention_window_size": 16}, Borders(windows=(16,))),
        ("inkling_text", {"sliding_window_size": 16}, Borders(windows=(16,))),
        ("modernbert-decoder", {"local_attention": 32}, Borders(windows=(16, 32))),
        ("qwen2", {"sliding_window": 16}, Borders()),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            Borders(windows=(16,)),
        ),
        ("llama4_text", {"attention_chunk_size": 16}, Borders(chunks=(16,))),
        ("deepseek_v32", {}, Borders(selections=(24,))),
        ("minimax_m3_vl_text", {}, Borders(selections=(24,))),
        ("doge", {"keep_window_size": 16}, Borders(selections=(16,))),
        (
            "dots3_note_text",
            {"sliding_window": 16},
            Borders(windows=(16,), selections=(24,)),
        ),
        ("phi3", long_rope(32), Borders(rope_switch=32)),
        ("llama", dynamic_ntk(32), Borders(is_dynamic_ntk=True, dynamic_length=32)),
    ],
)
def test_borders_of_a_configuration(model_type, options, borders):
    assert attention_borders(make_config(model_type, **options)) == borders


def test_the_whole_and_the_sides():
    borders = Borders(windows=(16, 64), chunks=(8,), rope_switch=32)
    assert borders.whole == 8
    assert borders.rope_border == 32
    assert [borders.side(n) for n in (1, 32, 33, 99)] == [0, 0, 1, 1]
    dynamic = Borders(is_dynamic_ntk=True, dynamic_length=32)
    assert dynamic.whole is None
    assert dynamic.rope_border == 32
    assert [dynamic.side(n) for n in (1, 32, 33, 99)] == [0, 0, 33, 99]
    assert Borders().whole is Borders().rope_border is None


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16, "layer_types": ["sliding_attention"]}),
        ("gpt_neo", {"window_size": 16, "attention_types": [[["local"], 1]]}),
        ("llama4_text", {"attention_chunk_size": 16}),
    ],
)
def test_a_layer_sees_the_first_token_up_to_the_border_and_not_beyond(model_type, options):
    """One layer alone: what it makes of the last token depends on the first, or does not."""
    model = make(model_type, num_hidden_layers=1, **options)
    whole = attention_borders(model.config).whole
    assert whole == 16
    for length, is_seen in ((whole, True), (whole + 1, False)):
        ids_BT = torch.arange(2 * length).reshape(2, length) % 100 + 3
        ids_BT[1] = ids_BT[0]
        ids_BT[1, 0] += 1
        with torch.inference_mode():
            first_V, second_V = model(input_ids=ids_BT).logits[:, -1]
        assert (not torch.equal(first_V, second_V)) == is_seen
