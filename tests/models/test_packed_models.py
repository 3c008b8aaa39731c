"""Which models are packed, up to which length: where it is exact, and only there."""

import math

import pytest
import torch

from benchmarks.tiny_models import make
from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.models import forward
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.forward import batch_hidden_states, hidden_states
from lrmc_ray.models.masks import added_mask
from lrmc_ray.models.packing import attention_cost

PACKED = {
    "llama": ({}, 200),
    # Its layers cut windows by places in the row; this one is beyond what is tried.
    "gpt_neo": ({"window_size": 100}, 0),
    "doge": ({"keep_window_size": 16}, 16),
    "mistral": ({"sliding_window": 16}, 16),
    "gemma3_text": ({"sliding_window": 16}, 16),
    "gpt_oss": ({"sliding_window": 16}, 16),
    "llama4_text": ({"attention_chunk_size": 16}, 16),
    "deepseek_v2": ({}, 200),
    "deepseek_v3": ({}, 200),
    "glm4_moe_lite": ({}, 200),
    "minicpm3": ({}, 200),
    "mamba2": ({}, 0),
    "bloom": ({}, 0),
}
"""Types, options, and the tokens of the longest sample that is packed, of 200 at most."""


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3", "mamba2"])
def test_bf16_is_packed_as_well_unless_tokens_see_others(model_type, monkeypatch):
    options, longest = PACKED[model_type]
    model = make(model_type, **options).bfloat16()
    assert math.isfinite(attention_cost(model)) == (longest > 0)
    if longest:

        def causal(model, is_visible_QT):
            return added_mask(model, torch.ones_like(is_visible_QT).tril())

        monkeypatch.setattr(forward, "added_mask", causal)
        assert attention_cost(model) == math.inf


@pytest.mark.parametrize("model_type", PACKED)
def test_samples_are_packed_where_that_is_exact_and_only_there(model_type):
    """Samples as long as the window and one longer, against every sample alone."""
    options, longest = PACKED[model_type]
    model = make(model_type, **options)
    cost = 0.0 if longest else math.inf
    assert math.isfinite(attention_cost(model)) == (longest > 0)
    rng = torch.Generator().manual_seed(1)
    for length in sorted({longest or 16, 17, 200}):
        stem_T = torch.randint(3, 120, (length - 4,), generator=rng)
        ends = [torch.randint(3, 120, (n,), generator=rng) for n in (4, 2, 3)]
        sequences = [torch.cat([stem_T, end_T]) for end_T in ends]
        layout = lay_out(sequences, cost, longest_packed(model.config))
        assert (layout.is_visible_TT is not None) == (length <= longest)
        if model_type == "doge" and length > longest:
            continue  # its own selection of keys sees what comes behind, padding included
        with torch.no_grad():
            hidden_BTD = batch_hidden_states(model, layout)
            for ids_T, row, columns_T in zip(sequences, layout.rows, layout.columns, strict=True):
                alone_TD = hidden_states(model, ids_T[None])[0]
                error = (hidden_BTD[row, columns_T] - alone_TD).norm() / alone_TD.norm()
                assert error < 1e-5, (length, float(error))
