"""Models that are not what they are loaded as are refused; every other one is let through."""

import pytest
import torch

from benchmarks.tiny_models import make
from lrmc_ray.errors import DataError
from lrmc_ray.models.causal import check_causal, differs
from lrmc_ray.models.head import head_of


@pytest.mark.parametrize(
    "model_type", ["xlnet", "cpmant", "bert-generation", "xlm", "reformer", "bert"]
)
def test_a_model_that_sees_later_tokens_is_refused(model_type):
    model = make(model_type)
    with pytest.raises(DataError, match=rf"\(model_type {model_type}\) is not causal"):
        check_causal(model)
    with pytest.raises(DataError, match="is not causal"):
        head_of(model)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bert", {"is_decoder": True}),
        ("gpt2", {}),
        ("mamba2", {}),
        ("mistral", {"sliding_window": 8}),
        ("llama4_text", {"attention_chunk_size": 16}),
        ("deepseek_v32", {}),
        ("qwen3_next", {}),
    ],
)
def test_a_causal_model_is_let_through(model_type, options):
    model = make(model_type, **options)
    check_causal(model)
    assert not model.training
    check_causal(model.to(torch.bfloat16))


def test_what_needs_more_than_token_ids_is_refused(monkeypatch):
    model = make("gpt2")

    def forward(self, **_kwargs):
        raise KeyError("encoder_hidden_states")

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        DataError, match=r"token ids alone in torch.float32 \(KeyError: 'encoder_hidden_states'\)"
    ):
        check_causal(model)


def test_logits_that_are_not_finite_are_refused():
    model = make("gpt2")
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        check_causal(model)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_a_difference_is_measured_by_the_spread(spread):
    model = make("gpt2")
    logits_NV = spread * torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    moved_NV = logits_NV.clone()
    moved_NV[3, 3] += 0.01 * logits_NV.std()
    assert differs(model, logits_NV, moved_NV) == pytest.approx(0.01, rel=1e-3)
    assert differs(model, logits_NV, logits_NV * (1 + 1e-6)) is None
    short = model.to(torch.bfloat16)
    assert differs(short, logits_NV, logits_NV.bfloat16()) is None
    moved_NV[3] += logits_NV.std()  # one position alone: another expert
    assert differs(short, logits_NV, moved_NV) is None
    moved_NV = logits_NV + 0.2 * logits_NV.std()
    assert differs(short, logits_NV, moved_NV) == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    ("model_type", "name", "cap"),
    [
        ("xlstm", "output_logit_soft_cap", 2.0),
        ("recurrent_gemma", "logits_soft_cap", 2.0),
        ("gemma2", "final_logit_softcapping", 2.0),
    ],
)
def test_every_name_of_the_soft_cap_is_known(model_type, name, cap):
    """The check itself compares with the model's own logits."""
    assert head_of(make(model_type, **{name: cap})).softcap == cap
