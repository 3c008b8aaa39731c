"""The head of a model, against the model's own logits."""

import pytest
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.method.head import head_logits
from lrmc_ray.models.forward import hidden_states
from lrmc_ray.models.head import head_of

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # large logits, so that a forgotten softcap shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(architecture: str, **options):
    """A small model of a transformers architecture, every weight and bias random."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


MODELS = {
    "tied Llama": ("Llama", {"tie_word_embeddings": True}),
    "untied Llama": ("Llama", {"tie_word_embeddings": False}),
    "Gemma 2, softcap": (
        "Gemma2",
        {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16},
    ),
    "Cohere, logit scale": ("Cohere", {"logit_scale": 0.0625}),
    "Granite, logits scaling": ("Granite", {"logits_scaling": 8.0}),
    "Phi, bias": ("Phi", {}),
}


EXPECTED_OPTIONS = {
    "Gemma 2, softcap": (False, 1.0, 5.0),
    "Cohere, logit scale": (False, 0.0625, None),
    "Granite, logits scaling": (False, 0.125, None),
    "Phi, bias": (True, 1.0, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_head_of_gives_the_models_own_logits(name):
    architecture, options = MODELS[name]
    model = random_model(architecture, **options)
    head = head_of(model)
    assert head.weight_VD is model.get_output_embeddings().weight
    expected_options = EXPECTED_OPTIONS.get(name, (False, 1.0, None))
    assert (head.bias_V is not None, head.logit_scale, head.softcap) == expected_options

    ids_BT = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BTV = model(input_ids=ids_BT).logits
        actual_BTV = head_logits(hidden_states(model, ids_BT), head)
        plain_BTV = hidden_states(model, ids_BT) @ head.weight_VD.T
    torch.testing.assert_close(actual_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    # What makes the model special matters.
    is_plain = torch.allclose(plain_BTV, expected_BTV, rtol=1e-2, atol=1e-2)
    assert is_plain == (architecture == "Llama")


@pytest.mark.parametrize("training", [True, False])
def test_dropout_does_not_mislead_the_check_and_the_mode_stays(training):
    model = random_model("Llama", attention_dropout=0.5).train(training)
    assert head_of(model).weight_VD is model.lm_head.weight
    assert model.training is training


def test_a_head_that_cannot_be_expressed_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    class ShiftedByPosition(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            shift_T = torch.arange(output.logits.shape[1]) * 0.05
            output.logits = output.logits + shift_T[:, None]
            return output

    model = ShiftedByPosition(LlamaConfig(**SIZES)).eval()
    with pytest.raises(DataError, match=r"the head of ShiftedByPosition .*differ"):
        head_of(model)


def test_a_model_without_an_output_head_is_refused():
    from transformers import LlamaConfig, LlamaModel

    with pytest.raises(DataError, match=r"LlamaModel .* has no output head; a causal LM"):
        head_of(LlamaModel(LlamaConfig(**SIZES)))
