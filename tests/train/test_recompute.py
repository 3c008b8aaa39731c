"""What is computed again in the backward pass: fewer bytes, the same bits."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from benchmarks.tiny_models import make
from lrmc_ray.errors import ConfigError
from lrmc_ray.method.layout import pad
from lrmc_ray.train import recompute
from lrmc_ray.train.recompute import Recomputation
from tests.support.operators import Counted

torch.set_num_threads(1)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, attention_dropout=0.3),
    "qwen3": Qwen3Config(**SHAPE, attention_dropout=0.3),
    "gemma2": Gemma2Config(**SHAPE, attention_dropout=0.3, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        attention_dropout=0.3,
    ),
}
"""Norms in other places, learned positions, dropout on layers, experts that tokens choose."""
BATCH = pad(list(torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))))


def make_model(name, which, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    return Recomputation(model.train(), which)


def step(recomputation, *, autocast=False):
    """The hidden states and all gradients of one pass with dropout, and the number drawn next."""
    model = recomputation.model
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden_BTD = recomputation.forward(BATCH)
    hidden_BTD.float().pow(3).sum().backward()
    gradients = {name: p.grad for name, p in model.base_model.named_parameters()}
    return hidden_BTD.detach(), gradients, torch.rand(1)


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert (gradient is None) == (other[1][name] is None), name
        assert gradient is None or torch.equal(gradient, other[1][name]), name
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("which", ["selective", "full"])
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), *((name, "eager") for name in CONFIGS)]
)
def test_the_same_bits_with_dropout(name, attention, which):
    expected = step(make_model(name, False, attention))
    assert_same(step(make_model(name, which, attention)), expected)
    assert sum(g is not None and bool(g.any()) for g in expected[1].values()) > 20


@pytest.mark.parametrize("which", ["selective", "full"])
def test_the_same_bits_under_autocast(which):
    assert_same(
        step(make_model("llama", which), autocast=True),
        step(make_model("llama", False), autocast=True),
    )


def test_dropout_does_something():
    model = make_model("gpt2", False)
    dropped = step(model)[0]
    model.model.eval()
    assert not torch.equal(step(model)[0], dropped)


def count(which):
    """Operators of one pass over the three layers of the Llama, forward and backward."""
    model = make_model("llama", which)
    model.forward(BATCH)  # the proof is behind us
    with Counted() as counted:
        step(model)
    return counted.calls


def test_selective_computes_the_activation_function_again_and_no_product():
    """Of products a layer has seven, and two in attention with dropout; backward twice as many."""
    plain, selective, full = count(False), count("selective"), count("full")
    assert (plain["mm"], plain["bmm"]) == (3 * 7 * 3, 3 * 2 * 3)
    assert (selective["mm"], selective["bmm"]) == (plain["mm"], plain["bmm"])
    # Of a layer that is computed again, all but the last product, whose result nobody asks for.
    assert (full["mm"], full["bmm"]) == (plain["mm"] + 3 * 6, plain["bmm"] + 3 * 2)
    assert plain["silu"] == 3
    assert selective["silu"] == full["silu"] == 6
    # Two norms in a layer, one behind them.
    assert plain["rsqrt"] == 3 * 2 + 1
    assert selective["rsqrt"] == full["rsqrt"] == 2 * 3 * 2 + 1


def kept_bytes(which, *, num_layers):
    """What a forward pass has allocated and not freed at its end."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SHAPE, "num_hidden_layers": num_layers})
    )
    recomputation = Recomputation(model.train(), which)
    recomputation.forward(BATCH).sum().backward()  # what is made once is there now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        hidden_BTD = recomputation.forward(BATCH)
    assert hidden_BTD.requires_grad
    return sum(event.self_cpu_memory_usage for event in recorded.events())


def test_a_layer_keeps_what_it_should():
    """Bytes of one layer more, counted by hand."""
    hidden, intermediate, heads, keys = 32, 64, 4, 2 * 8
    products = hidden + 2 * keys + hidden + 2 * intermediate + hidden  # q, k v, o, gate up, down
    attention = hidden + heads  # log-sum-exp of every head
    norms = 2 * (2 * hidden + 1)  # each: normalized, times the weight; one over the deviation
    residuals = 2 * hidden
    floats = {
        # As inputs of what comes behind: o and down are gone into the sums.
        False: products - 2 * hidden + attention + norms + residuals + 2 * intermediate,
        "selective": hidden + products + attention,
        "full": hidden,
    }
    for which, expected in floats.items():
        per_layer = kept_bytes(which, num_layers=3) - kept_bytes(which, num_layers=2)
        random_state = torch.get_rng_state().nbytes if which else 0
        assert per_layer == 4 * expected * BATCH.input_ids_BT.numel() + random_state, which


def test_a_model_that_transformers_cannot_do_it_with_is_left_alone_unless_it_was_asked_for():
    expected = step(make_model("llama", False))
    model = make_model("llama", False).model
    model.supports_gradient_checkpointing = False
    assert_same(step(Recomputation(model, "auto")), expected)
    with pytest.raises(ConfigError, match=r"must be one that LlamaForCausalLM \(llama\) can do"):
        Recomputation(model, "selective")


def test_a_model_that_computes_no_gradient_is_left_alone():
    expected, model = make_model("llama", False), make_model("llama", "selective")
    for one in (expected, model):
        one.model.eval()
    with Counted() as counted, torch.no_grad():
        hidden = model.forward(BATCH)
    assert torch.equal(hidden, expected.forward(BATCH))
    assert counted.calls["silu"] == 3


BY_POSITION = ["gpt2", "gpt_neox", "falcon", "bloom", "mpt", "gptj", "gpt_neo", "mamba", "mamba2"]
"""Their heads pass the token ids to the body by position."""


@pytest.mark.parametrize("model_type", BY_POSITION)
def test_models_that_take_ids_by_position(model_type, monkeypatch):
    """Short batches and long ones, and the model's own forward pass, which ``auto`` met once."""
    expected = step(Recomputation(make(model_type).train(), False))
    model = make(model_type).train()
    auto = Recomputation(model, "auto")
    model(input_ids=BATCH.input_ids_BT)
    assert_same(step(auto), expected)
    assert auto.way is None
    monkeypatch.setattr(recompute, "MANY_TOKENS", BATCH.input_ids_BT.numel())
    model.zero_grad()
    assert_same(step(auto), expected)
    assert auto.way in ("selective", "full")


@pytest.mark.parametrize(("model_type", "said"), [("gpt_oss", "mutated"), ("gemma3n_text", "%")])
def test_a_way_that_changes_gradients_is_not_taken(model_type, said, monkeypatch, caplog):
    """GPT-OSS and Gemma 3n add to the results of products in place."""
    expected = step(Recomputation(make(model_type).train(), False))
    monkeypatch.setattr(recompute, "MANY_TOKENS", 1)
    auto = Recomputation(make(model_type).train(), "auto")
    assert_same(step(auto), expected)
    assert auto.way == "full"
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == recompute.__name__
    ]
    assert "does not stand train.gradient_checkpointing (selective: " in line
    assert said in line
    assert "whole layers are computed again instead" in line
    assert_same(step(Recomputation(make(model_type).train(), "full")), expected)
    with pytest.raises(ConfigError, match=f"got 'selective': .*{said}.* leave it at 'auto'"):
        step(Recomputation(make(model_type).train(), "selective"))


def test_where_no_way_is_right_all_is_kept(monkeypatch, caplog):
    """A layer whose result depends on how often it was called."""
    monkeypatch.setattr(recompute, "MANY_TOKENS", 1)
    auto = make_model("llama", "auto")
    mlp = auto.model.model.layers[0].mlp
    calls = []

    def scale(_module, _args, output):
        calls.append(1)
        return output * (1 + 0.1 * len(calls))

    mlp.register_forward_hook(scale)
    auto.forward(BATCH)
    assert auto.way is None
    assert "all activations are kept instead" in caplog.text
