"""What is scored is what is learned, on the chat template of Qwen3 and on others."""

import functools
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from lrmc_ray.chat.answers import Chat
from lrmc_ray.evaluate.prefix_lm import PrefixLM
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import shipped, tokenizer_for

HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]
SQL = "SELECT 1;"


def language_model(tokenizer, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    return PrefixLM(model, tokenizer, batch_tokens=512, template_options=options)


@pytest.mark.parametrize(
    ("name", "options", "before", "behind"),
    [
        ("qwen3", {}, "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),
        (
            "qwen3",
            {"enable_thinking": False},
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "",
        ),
        ("qwen3_6", {}, "<|im_start|>assistant\n<think>\n", "\n</think>\n\n"),
        ("qwen2_5", {}, "<|im_start|>assistant\n", ""),
        ("gptoss", {}, "<|start|>assistant", "<|channel|>final<|message|>"),
        ("muse_glimmer", {}, "assistant", " to=user<|message|>"),
        (None, {}, "Assistant:\n", ""),
    ],
)
def test_the_text_scored_is_the_text_learned(name, options, before, behind, monkeypatch):
    tokenizer = tokenizer_for(shipped()[name] if name else None)
    row = {"messages": [*HISTORY, {"role": "assistant", "content": SQL}]}
    (example,) = encode_row(Row("x:1", row), Chat(tokenizer, options))
    start = example.is_target.index(True)
    learned = [i for i, wanted in zip(example.input_ids, example.is_target, strict=True) if wanted]
    lm = language_model(tokenizer, **options)
    prompt = lm.apply_chat_template(HISTORY)
    assert prompt.endswith(before)
    request = Instance("loglikelihood", {}, (prompt, SQL), 0)
    asked: list[Any] = []

    def answer(requests, **_):
        asked.extend(requests)
        return [(0.0, True)]

    monkeypatch.setattr(lm, "_loglikelihood_tokens", answer)
    lm.loglikelihood([request], disable_tqdm=True)
    ((_, context_ids, answer_ids),) = asked
    assert context_ids == example.input_ids[:start]
    assert answer_ids == learned[:-1]  # the end of the turn is no part of the gold query
    assert request.args == (prompt, behind + SQL)
    assert tokenizer.decode(answer_ids) == behind + SQL


def form_of(name, *, template=None, **options):
    tokenizer = tokenizer_for(template or shipped()[name])
    return Chat(tokenizer, options).form(HISTORY)


@pytest.mark.parametrize(
    ("name", "options", "written", "spoken"),
    [
        ("qwen3", {}, "SELECT 1;", ("SELECT 1;", True, False)),
        ("qwen3", {}, "<think>\n\n", ("<think>\n\n", False, False)),
        ("qwen3", {}, "<think>\n\n</think>\n\nSELECT 1;", ("SELECT 1;", True, False)),
        ("qwen3", {}, "Two.<|im_end|>\nmore", ("Two.", True, True)),
        ("qwen3", {"enable_thinking": False}, "SELECT 1;", ("SELECT 1;", True, False)),
        ("qwen3_6", {}, "One;\n\nand one.\n", ("One;\n\nand one.\n", False, False)),
        ("qwen3_6", {}, "One;\n\n</think>\n\nSELECT 1;", ("SELECT 1;", True, False)),
        ("gptoss", {}, "", ("", False, False)),
        ("gptoss", {}, "<|channel|>", ("", False, False)),
        ("gptoss", {}, "<|channel|>analysis<|message|>One;\n\nand", ("", False, False)),
        (
            "gptoss",
            {},
            "<|channel|>analysis<|message|>One;\n\n<|end|><|start|>assistant<|channel|>final"
            "<|message|>SELECT 1;<|return|>",
            ("SELECT 1;", True, True),
        ),
        (
            "gptoss",
            {},
            "<|channel|>final <|constrain|>json<|message|>{}",
            ("{}", True, False),
        ),
        (
            "gptoss",
            {},
            ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
            ("", False, False),
        ),
        ("gptoss", {}, "No channel at all.", ("No channel at all.", True, False)),
        ("muse_glimmer", {}, " to=us", ("", False, False)),
        ("muse_glimmer", {}, " to=user<|message|>Two.<|eot|>", ("Two.", True, True)),
        ("cohere2", {}, "Two.<|END_RESPONSE|>", ("Two.", True, True)),
    ],
)
def test_the_answer_in_what_is_written(name, options, written, spoken):
    said = form_of(name, **options).spoken(written)
    assert (said.text, said.has_begun, said.has_ended) == spoken


def test_a_quoted_think_block_opens_none():
    tokenizer = tokenizer_for(shipped()["qwen3"])
    form = Chat(tokenizer).form([{"role": "user", "content": "Say </think>"}])
    assert form.spoken("<think>").has_begun is False


SETTINGS = {"until": [";", "\n\n"], "max_gen_toks": 96, "do_sample": False}
WRITTEN = {
    "qwen3": "<think>\n\n</think>\n\nTwo;\n\nTwo",
    "gptoss": "<|channel|>analysis<|message|>One; one.\n\nSo.<|end|><|start|>assistant"
    "<|channel|>final<|message|>Two;\n\nTwo",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_stop_strings_do_not_stop_within_reasoning(name, monkeypatch):
    tokenizer = tokenizer_for(shipped()[name])
    lm = language_model(tokenizer)
    steps = iter(tokenizer(WRITTEN[name], add_special_tokens=False)["input_ids"])

    def logits(hidden_BD):
        return torch.nn.functional.one_hot(
            torch.tensor([next(steps)] * len(hidden_BD)), len(tokenizer)
        ).float()

    monkeypatch.setattr(lm._shared, "logits", logits)
    request = Instance("generate_until", {}, (lm.apply_chat_template(HISTORY), SETTINGS), 0)
    assert lm.generate_until([request], disable_tqdm=True) == ["Two"]
    assert next(steps, None) is not None  # nothing is written behind the stop string


@pytest.mark.parametrize(
    "settings", [SETTINGS, {**SETTINGS, "do_sample": True, "temperature": 0.5}]
)
@pytest.mark.parametrize("name", WRITTEN)
def test_nor_where_transformers_generates(name, settings, monkeypatch):
    """As it does for models whose passes cannot be shared, and for sampled answers."""
    tokenizer = tokenizer_for(shipped()[name])
    lm = language_model(tokenizer)
    monkeypatch.setattr(lm, "_shared", None)
    monkeypatch.setattr(lm, "_takes_padding", True)  # not tried out on what is scripted
    steps = iter(tokenizer(WRITTEN[name], add_special_tokens=False)["input_ids"])
    forward = lm.model.forward

    @functools.wraps(forward)
    def scripted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1] = -1e9
        output.logits[:, -1, next(steps)] = 0.0
        return output

    monkeypatch.setattr(lm.model, "forward", scripted)
    longer = [*HISTORY[:1], {"role": "user", "content": "Two? And two?"}]
    requests = [
        Instance("generate_until", {}, (lm.apply_chat_template(history), settings), 0)
        for history in (HISTORY, longer)
    ]
    assert lm.generate_until(requests, disable_tqdm=True) == ["Two", "Two"]
    assert next(steps, None) is not None


def test_transformers_writes_what_shared_passes_write(monkeypatch):
    lm = language_model(tokenizer_for(shipped()["qwen2_5"]))
    with torch.no_grad():  # so that what is written depends on the prompt
        for name, parameter in lm.model.named_parameters():
            parameter.mul_(1 if "norm" in name else 12)
    prompts = [
        lm.apply_chat_template([{"role": "user", "content": text}])
        for text in ("Two?", "Ohm? the sum of one and two")
    ]
    requests = [
        Instance("generate_until", {}, (p, {**SETTINGS, "max_gen_toks": 8}), 0) for p in prompts
    ]
    shared = lm.generate_until(requests, disable_tqdm=True)
    monkeypatch.setattr(lm, "_shared", None)
    assert lm.generate_until(requests, disable_tqdm=True) == shared
    assert len(set(shared)) == 2
